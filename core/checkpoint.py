"""A Qwen2 checkpoint on disk, as Hugging Face lays it out: config.json and safetensors shards.

    checkpoint = Checkpoint.open("Qwen2-Math-7B-Instruct")
    checkpoint.spec.num_layers                            # 28
    name = "model.norm.weight"
    to_float32(checkpoint.tensors[name], checkpoint.read(name))

Opening reads configs and headers only (37 shards and 963 tensors of a 72B model: tens of milliseconds) and checks
them against each other; data is mapped when it is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import mmap
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError
from qwen_rt.foreign import ForeignMatrix, find_matrices, read_quantization
from qwen_rt.foreign.config import is_left_out
from qwen_rt.safetensors_header import ShardHeader, TensorRef, read_errors, read_header
from qwen_rt.spec import ModelDtype, ModelSpec
from qwen_rt.strict_json import name_some, parse_object, show
from qwen_rt.tensor_data import to_float32

__all__ = ["LAYOUT_FILE", "NANO", "Checkpoint", "to_float32"]

LAYOUT_FILE = "qwen_rt_layout.json"
"""What `qwen-rt export --layout` notes in a folder that is for another runtime."""

NANO = "nano"
"""The name that opens the checkpoint shipped with this package; `./nano` is a folder of that name."""

_TRTLLM_FILES = ("qwen-rt.json", "rank0.safetensors")  # of a folder of `qwen-rt build --target trtllm`
_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_MAX_CONFIG_BYTES = 4 << 20
_MAX_INDEX_BYTES = 64 << 20
_HASH_BLOCK_BYTES = 8 << 20

# Stored dtype → (its name in a spec, what a view of it holds; numpy has no bfloat16).
_WEIGHT_DTYPES: dict[str, tuple[ModelDtype, np.dtype[Any]]] = {
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F16": ("float16", np.dtype("<f2")),
    "F32": ("float32", np.dtype("<f4")),
}
_QUANTIZED_PARTS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
_HARMLESS_SUFFIX = "rotary_emb.inv_freq"  # older transformers stored it; it follows from the config
_FIX_AGAIN = "download it again"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: every tensor of its spec is present, of the right shape, and within its file.

    Attributes:
        path: The folder, absolute, symlinks not resolved.
        config: `config.json`, as parsed.
        generation_config: `generation_config.json`, empty if there is none.
        spec: The model.
        tensors: Where each parameter of the spec that is stored as floats is, by Hugging Face name.
        quantized: The other parameters, matrices that are stored quantized, likewise.
        headers: The shards that the index names, or the single file; `path` is the name inside the folder.
        ignored: Stored tensors that are known not to matter: rotary frequencies, the LM head of a tied model, scales
            to quantize activations and caches with.
        unexpected: Other stored tensors that the model has no use for.
        config_digests: sha256 of config.json and, if there is one, of the index.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorRef]
    headers: tuple[ShardHeader, ...]
    ignored: tuple[str, ...]
    unexpected: tuple[str, ...]
    config_digests: tuple[str, ...]
    quantized: Mapping[str, ForeignMatrix] = dataclasses.field(default_factory=dict)
    _maps: dict[Path, mmap.mmap] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, shards: Sequence[Path] | None = None) -> Checkpoint:
        """Open a checkpoint folder, or the shipped one by the name `"nano"`.

        Args:
            path: The folder with config.json; a snapshot folder of Hugging Face's cache works.
            shards: The safetensors files to take the tensors from, for a folder that refers to shards elsewhere (a
                portable graph); None takes those of the folder's index, or its single file.

        Raises:
            CheckpointError: Something is missing, malformed, cut short, or does not fit the rest.
            UnsupportedModelError: A model that this package does not compute.
            StorageError: The folder or a file cannot be read.
        """
        folder = _nano_folder() if path == NANO else Path(path).absolute()
        _require_folder(folder)
        if all(_exists(folder / name) for name in _TRTLLM_FILES):
            raise CheckpointError(
                f"{folder} is a checkpoint for TensorRT-LLM, which qwen-rt build wrote",
                "a checkpoint of Hugging Face's form",
                "hand it to trtllm-build, or build from the checkpoint that it was made from",
            )
        config, config_digest = _read_json(folder / _CONFIG, _MAX_CONFIG_BYTES)
        spec = ModelSpec.from_config(config)
        generation_config: dict[str, Any] = {}
        if _exists(folder / _GENERATION_CONFIG):
            generation_config, _ = _read_json(folder / _GENERATION_CONFIG, _MAX_CONFIG_BYTES)
        digests = [config_digest]
        if shards is not None:
            headers = [read_header(shard) for shard in shards]
            stored = {name: ref for header in headers for name, ref in header.tensors.items()}
        elif _exists(folder / _SINGLE):
            headers = [read_header(folder / _SINGLE)]
            stored = dict(headers[0].tensors)
        else:
            weight_map, index_digest = _read_index(folder)
            digests.append(index_digest)
            headers, stored = _read_shards(folder, weight_map)
        parameters = spec.parameters()
        quantization = read_quantization(config)
        quantized = find_matrices(quantization, parameters, stored) if quantization is not None else {}
        expected = {name: shape for name, shape in parameters.items() if name not in quantized}
        _check_tensors(folder, expected, stored, len(parameters))
        tensors = {name: stored[name] for name in expected}
        used = {ref.name for matrix in quantized.values() for ref in matrix.parts.values()}
        extra = sorted(set(stored) - set(expected) - used)
        ignored = tuple(name for name in extra if _is_harmless(name, spec, quantization is not None))
        if config.get("dtype") is None and config.get("torch_dtype") is None:
            stored_dtype = next(iter(tensors.values())).dtype  # the embedding's, as transformers 5 decides
            spec = dataclasses.replace(spec, dtype=_WEIGHT_DTYPES[stored_dtype][0])
        return cls(
            path=folder,
            config=config,
            generation_config=generation_config,
            spec=spec,
            tensors=tensors,
            headers=tuple(headers),
            ignored=ignored,
            unexpected=tuple(name for name in extra if name not in ignored),
            config_digests=tuple(digests),
            quantized=quantized,
        )

    @property
    def shards(self) -> list[Path]:
        """The files themselves, symlinks resolved, in the order of `headers`."""
        return [header.path.resolve() for header in self.headers]

    def read(self, name: str) -> NDArray[Any]:
        """Map the data of one tensor; pages are read when they are touched.

        Args:
            name: A parameter that is stored as floats.

        Returns:
            A read-only view of the stored shape: f32, f16, or the bits of bf16 as uint16 (`to_float32` converts).

        Raises:
            CheckpointError: No such tensor, a quantized matrix, or the file changed its size since it was opened.
            StorageError: The file cannot be opened.
        """
        if name in self.quantized:
            raise CheckpointError(
                f"{show(name)} is stored as {self.quantized[name].layout}", "a parameter of floats", "load it instead"
            )
        if name not in self.tensors:
            raise CheckpointError(
                f"no tensor {show(name)} in {self.path}", f"one of {name_some(self.tensors)}", "check the name"
            )
        ref = self.tensors[name]
        if ref.path not in self._maps:
            header = next(header for header in self.headers if header.path == ref.path)
            self._maps[ref.path] = _map_file(header)
        dtype = _WEIGHT_DTYPES[ref.dtype][1]
        view = np.frombuffer(self._maps[ref.path], dtype, ref.nbytes // dtype.itemsize, ref.offset)
        return view.reshape(ref.shape)

    def fingerprint(self) -> str:
        """Identify the checkpoint by what its configs and headers say: hex sha256, no data read.

        Covers config.json, the index, and of every shard its name, size and header. Data that changed under the same
        header is not noticed; `bundle.file_sha256` does.
        """
        digest = hashlib.sha256()
        for part in self.config_digests:
            digest.update(f"config {part}\n".encode())
        for header in self.headers:
            digest.update(f"shard {header.path.name} {header.nbytes} {header.sha256}\n".encode())
        return digest.hexdigest()


def _nano_folder() -> Path:
    """The folder of the shipped checkpoint."""
    try:
        return Path(str(importlib.resources.files("qwen_rt.nano") / _CONFIG)).parent
    except ModuleNotFoundError:
        raise CheckpointError("the nano checkpoint is not installed", "package data", "reinstall qwen-rt") from None


def _exists(path: Path) -> bool:
    with read_errors(path):
        return path.exists()


def _require_folder(folder: Path) -> None:
    with read_errors(folder):
        try:
            mode = folder.stat().st_mode
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} does not exist",
                "a checkpoint folder with config.json",
                "download one with `hf download ORG/NAME --local-dir FOLDER`",
            ) from None
    if not stat.S_ISDIR(mode):
        raise CheckpointError(
            f"{folder} is a file", "a checkpoint folder with config.json", f"name its folder, {folder.parent}"
        )


def _read_json(path: Path, max_bytes: int) -> tuple[dict[str, Any], str]:
    """Read one JSON object of at most `max_bytes`: (the object, the sha256 of its bytes)."""
    if not _exists(path):
        raise CheckpointError(f"{path} is missing", "a checkpoint folder with config.json", "check the path")
    with read_errors(path):
        if not path.is_file():  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path} is not a regular file", "a JSON file", _FIX_AGAIN)
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes} bytes", "a smaller file", _FIX_AGAIN)
        data = path.read_bytes()
    return parse_object(data, str(path), _FIX_AGAIN), hashlib.sha256(data).hexdigest()


def _read_index(folder: Path) -> tuple[dict[str, str], str]:
    """Read the index of a sharded checkpoint: (tensor name → shard name, sha256 of the index)."""
    path = folder / _INDEX
    if not _exists(path):
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder} holds pytorch_model.bin weights only",
                f"{_SINGLE} or {_INDEX}",
                "convert it to safetensors: load it with transformers and call save_pretrained",
            )
        if _exists(folder / LAYOUT_FILE):
            raise CheckpointError(
                f"{folder} was written by qwen-rt export --layout, for another runtime",
                "a checkpoint",
                f"name the one that it was made of: {LAYOUT_FILE} says which",
            )
        raise CheckpointError(f"{folder} has no weights", f"{_SINGLE} or {_INDEX}", _FIX_AGAIN)
    index, digest = _read_json(path, _MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has weight_map={show(weight_map)}", "an object of tensor and shard names", _FIX_AGAIN
        )
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.isprintable() and "/" not in shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors") or len(shard) > 255:
            raise CheckpointError(
                f"{path} stores tensor {show(name)} in {show(shard)}",
                "the name of a .safetensors file inside the checkpoint folder",
                _FIX_AGAIN,
            )
    return weight_map, digest


def _read_shards(folder: Path, weight_map: dict[str, str]) -> tuple[list[ShardHeader], dict[str, TensorRef]]:
    """Read the headers of all shards, by name, and find every tensor that the index names."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not _exists(folder / name)]
    if missing:
        verb = "shard {} is" if len(missing) == 1 else "shards {} are"
        raise CheckpointError(
            f"{verb.format(name_some(missing))} missing from {folder}",
            f"all {len(names)} shards of {_INDEX}",
            "download them again",
        )
    headers = {name: read_header(folder / name) for name in names}
    absent = [name for name, shard in weight_map.items() if name not in headers[shard].tensors]
    if absent:
        shard = weight_map[min(absent)]
        raise CheckpointError(
            f"{_INDEX} places {name_some(absent)} where it is not, the first in {shard}",
            "the tensors that the index names",
            "download the index and the shards again",
        )
    stored = {name: ref for header in headers.values() for name, ref in header.tensors.items()}
    stored |= {name: headers[shard].tensors[name] for name, shard in weight_map.items()}
    return list(headers.values()), stored


def _is_harmless(name: str, spec: ModelSpec, is_quantized: bool) -> bool:
    """Whether a tensor that no parameter is made of is known not to matter."""
    if name == "lm_head.weight" or name.endswith(_HARMLESS_SUFFIX):
        return True
    return is_quantized and (is_left_out(name) or (spec.tie_word_embeddings and name.startswith("lm_head.")))


def _check_tensors(
    folder: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, TensorRef], num_parameters: int
) -> None:
    """Refuse a checkpoint whose tensors of floats are not those of its config."""
    missing = expected.keys() - stored.keys()
    quantized = [name for name in stored if name.endswith(_QUANTIZED_PARTS)]
    if missing and len(expected) == num_parameters and quantized:
        raise CheckpointError(
            f"{folder} holds quantized matrices ({name_some(quantized)})",
            "a quantization_config in config.json that says how",
            "download config.json again",
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {num_parameters} tensors: {name_some(missing)}",
            "every tensor that config.json implies",
            "download it again, or correct config.json",
        )
    wrong_dtype = [name for name in expected if stored[name].dtype not in _WEIGHT_DTYPES]
    if wrong_dtype:
        first = min(wrong_dtype)
        raise CheckpointError(
            f"{stored[first].dtype} weights in {len(wrong_dtype)} of {num_parameters} tensors: "
            f"{name_some(wrong_dtype)}",
            " or ".join(_WEIGHT_DTYPES),
            "take a checkpoint whose config.json says how it is quantized",
        )
    wrong_shape = [name for name, shape in expected.items() if stored[name].shape != shape]
    if wrong_shape:
        shown = [f"{name} {list(stored[name].shape)} (expected {list(expected[name])})" for name in wrong_shape[:3]]
        more = f" and {len(wrong_shape) - 3} more" if len(wrong_shape) > 3 else ""
        raise CheckpointError(
            f"wrong shape of {len(wrong_shape)} of {num_parameters} tensors: {', '.join(shown)}{more}",
            "the shapes that config.json implies",
            "download config.json and the shards again",
        )


def _map_file(header: ShardHeader) -> mmap.mmap:
    """Map a whole shard, read-only; nothing is read until it is touched."""
    with read_errors(header.path), open(header.path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(mapping) != header.nbytes:
        # A view past the end would kill the process with SIGBUS.
        raise CheckpointError(
            f"{header.path} has {len(mapping)} bytes, {header.nbytes} when it was opened",
            "a file at rest",
            "open it again",
        )
    return mapping
