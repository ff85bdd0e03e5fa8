"""The manifest of a bundle: what is in the folder, what it needs, and how to tell that it is whole.

    BUNDLE/
      manifest.json             this file, written last: a folder without it is no bundle
      graph/rank0.onnx          the lowered graph; weights are references by file name
      graph/*.safetensors       weights that had to change, or all with --self-contained; beside the graph, where
                                any ONNX tool finds them
      tokenizer.json …          the checkpoint's text files
      config.json, generation_config.json

A portable graph is the same folder with target `portable`; compiled engines have the files of `qwen_rt.engine_card` in
place of graph and weights. Weights that did not change stay in the checkpoint; the manifest says where.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen_rt.engine_card import CARD_FILE, ENGINE_TARGETS, engine_files
from qwen_rt.errors import BundleError, CheckpointError, StorageError
from qwen_rt.gate_result import GateResult
from qwen_rt.manifest_fields import REBUILD, Fields, inner_path, plain_name
from qwen_rt.manifest_quantization import Quantization
from qwen_rt.quantization import FORMATS
from qwen_rt.safetensors_header import TensorRef, read_header
from qwen_rt.spec import ModelSpec
from qwen_rt.strict_json import parse_object, show

__all__ = [
    "FORMAT_VERSION",
    "GRAPH_FILE",
    "KV_DTYPES",
    "MANIFEST_FILE",
    "MIXED",
    "PRECISIONS",
    "TARGETS",
    "TEXT_FILES",
    "WEIGHTS_FOLDER",
    "Bundle",
    "CheckpointLink",
    "FileEntry",
    "Manifest",
    "ShardEntry",
    "file_sha256",
]

FORMAT, FORMAT_VERSION = "qwen-rt-bundle", 2
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "graph/rank0.onnx"
WEIGHTS_FOLDER = "graph"

TARGETS = ("cpu", "cuda", "portable", *ENGINE_TARGETS)
PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Dtype in which floating-point weights are stored → its safetensors name."""

MIXED = "mixed"
"""Precision of a bundle whose layers are not all alike."""

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
)
"""Files of a checkpoint that travel in the bundle where they exist."""

KV_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}
"""Format of a quantized KV cache → its dtype in memory."""

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_MAX_MANIFEST_BYTES = 64 << 20
_HASHED_AT_LOAD_BYTES = 1 << 30
_BLOCK_BYTES = 8 << 20

Check = Literal["auto", "full", "size"]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes and the hex SHA-256 of its content."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """A checkpoint shard that the graph refers to.

    Attributes:
        path: Absolute path at build time.
        nbytes: Size in bytes.
        header_sha256: Hash of its safetensors header.
        sha256: Hash of the whole file; None in a portable graph, which is exported without reading any weight.
    """

    path: str
    nbytes: int
    header_sha256: str
    sha256: str | None = None


@dataclass(frozen=True)
class CheckpointLink:
    """Where the bundle came from, and the shards that it still needs.

    Attributes:
        path: Absolute path of the checkpoint folder at build time.
        fingerprint: `Checkpoint.fingerprint()`.
        shards: Shard file name → entry; empty for a self-contained bundle.
    """

    path: str
    fingerprint: str
    shards: Mapping[str, ShardEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime has to know before it opens the graph.

    Attributes:
        target: `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, or `portable` for a graph that is not lowered.
        precision: How the layers' matrices are stored: `fp32`, `bf16`, `fp16`, `fp8`, `int8`, `int4`, or `mixed`.
        compute_dtype: Dtype of the activations (`float32`, …).
        kv_dtype: Dtype of the KV cache, as it lies in memory.
        max_length: Positions that the graph can reach.
        tensor_parallel: Ranks; there is one graph or engine for each.
        model: Hyperparameters.
        checkpoint: Origin of the weights.
        files: Relative path → entry, of every file but the manifest.
        tools: Package → version that took part in the build.
        quantization: Schemes of the quantized matrices and of the cache; None if nothing is quantized.
        gate: Result of the build's accuracy gate (`qwen_rt.export.quantize.gate`), JSON data; None if nothing was to
            be checked.
    """

    target: str
    precision: str
    compute_dtype: str
    kv_dtype: str
    max_length: int
    tensor_parallel: int
    model: ModelSpec
    checkpoint: CheckpointLink
    files: Mapping[str, FileEntry]
    tools: Mapping[str, str]
    quantization: Quantization | None = None
    gate: Mapping[str, Any] | None = None

    def to_json(self) -> bytes:
        """Return the manifest as JSON with sorted keys: equal builds give equal bytes."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "target": self.target,
            "precision": self.precision,
            "compute_dtype": self.compute_dtype,
            "kv_dtype": self.kv_dtype,
            "max_length": self.max_length,
            "tensor_parallel": self.tensor_parallel,
            "model": self.model.to_dict(),
            "checkpoint": {
                "path": self.checkpoint.path,
                "fingerprint": self.checkpoint.fingerprint,
                "shards": {name: vars(shard) for name, shard in self.checkpoint.shards.items()},
            },
            "files": {name: vars(entry) for name, entry in self.files.items()},
            "tools": dict(self.tools),
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "gate": None if self.gate is None else dict(self.gate),
        }
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, source: str = MANIFEST_FILE) -> Manifest:
        """Parse and check a manifest that anyone may have written.

        Raises:
            BundleError: It is no manifest, of another format version, or a field is missing or malformed.
        """
        try:
            document = parse_object(data, source, REBUILD)
        except CheckpointError as error:
            raise BundleError(error.what, error.expected, error.fix) from None
        if document.get("format") != FORMAT:
            raise BundleError(f"{source}: format={show(document.get('format'))}", f'"{FORMAT}"', REBUILD)
        version = document.get("format_version")
        if type(version) is not int or version < 1:
            raise BundleError(f"{source}: format_version={show(version)}", "a positive integer", REBUILD)
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{source}: format_version={show(version)}",
                f"{FORMAT_VERSION} or older",
                "upgrade qwen-rt (pip install -U qwen-rt), or build the bundle again with this version",
            )
        take = Fields(document, source)
        checkpoint = Fields(take.object("checkpoint"), f"{source}: checkpoint")
        try:
            model = ModelSpec.from_dict(take.object("model"))
        except Exception as error:
            raise BundleError(f"{source}: {error}", fix=REBUILD) from None
        return cls(
            target=take.choice("target", TARGETS),
            precision=take.choice("precision", (*PRECISIONS, *FORMATS, MIXED)),
            compute_dtype=take.choice("compute_dtype", _COMPUTE_DTYPES),
            kv_dtype=take.choice("kv_dtype", (*_COMPUTE_DTYPES, *KV_DTYPES.values())),
            max_length=take.integer("max_length", 1),
            tensor_parallel=take.integer("tensor_parallel", 1),
            model=model,
            checkpoint=CheckpointLink(
                path=checkpoint.string("path"),
                fingerprint=checkpoint.string("fingerprint"),
                shards={
                    plain_name(name, source): _shard_entry(Fields(entry, f"{source}: shard {show(name)}"))
                    for name, entry in checkpoint.objects("shards").items()
                },
            ),
            files={
                inner_path(name, source): _file_entry(Fields(entry, f"{source}: file {show(name)}"))
                for name, entry in take.objects("files").items()
            },
            tools=take.strings("tools"),
            quantization=None if version < 2 or take.is_null("quantization") else _quantization(take, source),
            gate=None if version < 2 or take.is_null("gate") else _gate(take, source),
        )


def _gate(take: Fields, source: str) -> dict[str, Any]:
    """The gate's result, or why there is none: `{"skipped": "--no-gate"}`."""
    document = take.data("gate")
    if set(document) == {"skipped"}:
        Fields(document, f"{source}: gate").string("skipped")
    else:
        GateResult.from_dict(document, f"{source}: gate")
    return document


def _quantization(take: Fields, source: str) -> Quantization:
    return Quantization.from_dict(take.object("quantization"), f"{source}: quantization")


def _file_entry(take: Fields) -> FileEntry:
    return FileEntry(take.integer("nbytes", 0), take.sha256("sha256"))


def _shard_entry(take: Fields) -> ShardEntry:
    whole = None if take.is_null("sha256") else take.sha256("sha256")
    return ShardEntry(take.string("path"), take.integer("nbytes", 0), take.sha256("header_sha256"), whole)


def file_sha256(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Return the hex SHA-256 of a file, read in blocks of 8 MiB; `advance` is told the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are all there; `open` is the way in.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        weight_files: File name in the graph's references → real path of the file.
    """

    path: Path
    manifest: Manifest
    weight_files: Mapping[str, Path]

    @classmethod
    def open(cls, path: str | Path, check: Check = "auto", checkpoint: str | Path | None = None) -> Bundle:
        """Open a bundle and check that it is what was built.

        Args:
            path: The folder.
            check: `size` compares sizes; `full` also hashes every file; `auto` hashes everything if that is less
                than 1 GiB in all, else everything but the weights: of those it compares the sizes, and of shards in
                the checkpoint the headers.
            checkpoint: Folder to take the checkpoint's shards from, if they are no longer where the build saw them.

        Raises:
            BundleError: No bundle, another format, a file missing, truncated, or changed since the build.
            StorageError: The operating system refuses to read it.
        """
        try:
            return cls._open(Path(path), check, None if checkpoint is None else Path(checkpoint))
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, before Python 3.13
            reason = getattr(error, "strerror", None) or error
            place = getattr(error, "filename", None) or path
            raise StorageError(f"{place} cannot be read: {reason}", "a readable bundle", "check the path") from error

    @classmethod
    def _open(cls, folder: Path, check: Check, checkpoint: Path | None) -> Bundle:
        manifest = cls._read_manifest(folder)
        weights: dict[str, Path] = {}
        to_check: list[tuple[Path, FileEntry | ShardEntry, str]] = []
        for name, own in manifest.files.items():
            file = folder / name
            to_check.append((file, own, f"{name} of {folder}"))
            if name.startswith(f"{WEIGHTS_FOLDER}/") and name.endswith(".safetensors"):
                _add_weights(weights, Path(name).name, file, folder)
        for name, shard in manifest.checkpoint.shards.items():
            file = checkpoint / name if checkpoint is not None else Path(shard.path)
            to_check.append((file, shard, f"checkpoint shard {file}"))
            _add_weights(weights, name, file, folder)
        for name in TEXT_FILES:
            if name not in manifest.files and (folder / name).exists():
                raise BundleError(f"{name} of {folder} was added after the build", "the files of the build", REBUILD)
        total = sum(entry.nbytes for _, entry, _ in to_check)
        engines = engine_files(manifest.target, min(manifest.tensor_parallel, len(to_check)))
        heavy = {*weights.values(), *((folder / name).resolve() for name in engines)}
        for file, entry, what in to_check:
            is_weight = file.resolve() in heavy
            hashed = check == "full" or (check == "auto" and (total <= _HASHED_AT_LOAD_BYTES or not is_weight))
            _check_file(file, entry, what, hashed)
        for name in [*engines, CARD_FILE] if engines else [GRAPH_FILE]:
            if name not in manifest.files:
                raise BundleError(f"{folder} lists no {name}", fix=REBUILD)
        return cls(folder, manifest, weights)

    @staticmethod
    def _read_manifest(folder: Path) -> Manifest:
        if not folder.exists():
            raise BundleError(f"{folder} does not exist", "a bundle folder", REBUILD)
        if not folder.is_dir():
            raise BundleError(f"{folder} is a file", "a bundle folder", REBUILD)
        file = folder / MANIFEST_FILE
        if not file.is_file():
            if (folder / "config.json").is_file():
                raise BundleError(
                    f"{folder} is a checkpoint", "a bundle", f"build one: qwen-rt build {folder} -o BUNDLE"
                )
            raise BundleError(f"{folder} has no {MANIFEST_FILE}", "a bundle folder", REBUILD)
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{file} has {file.stat().st_size} bytes", f"at most {_MAX_MANIFEST_BYTES}", REBUILD)
        return Manifest.from_json(file.read_bytes(), str(file))

    def tensors(self) -> dict[str, TensorRef]:
        """Every stored tensor by its name; those of the bundle's own files win over the checkpoint's.

        Raises:
            CheckpointError: A weight file has no readable header.
        """
        own = [file for name, file in self.weight_files.items() if name not in self.manifest.checkpoint.shards]
        shards = [file for name, file in self.weight_files.items() if name in self.manifest.checkpoint.shards]
        return {name: ref for file in (*shards, *own) for name, ref in read_header(file).tensors.items()}

    @property
    def graph_file(self) -> Path:
        """The lowered graph."""
        return self.path / GRAPH_FILE


def _add_weights(weights: dict[str, Path], name: str, file: Path, folder: Path) -> None:
    """Note a weight file by the name that the graph calls it."""
    if name in weights:
        raise BundleError(f"{folder} has two weight files named {show(name)}", "names that differ", REBUILD)
    weights[name] = file.resolve()


def _check_file(file: Path, entry: FileEntry | ShardEntry, what: str, hashed: bool) -> None:
    if not file.is_file():
        fix = REBUILD if isinstance(entry, FileEntry) else "put it back, or pass --checkpoint FOLDER, or build again"
        raise BundleError(f"{what} is missing", f"a file of {entry.nbytes} bytes", fix)
    nbytes = file.stat().st_size
    if nbytes != entry.nbytes:
        raise BundleError(f"{what} has {nbytes} bytes", f"{entry.nbytes} bytes", REBUILD)
    if isinstance(entry, ShardEntry) and not _has_header(file, entry.header_sha256):
        raise BundleError(f"{what} has another header than at build time", entry.header_sha256[:12], REBUILD)
    if hashed and entry.sha256 is not None:
        found = file_sha256(file)
        if found != entry.sha256:
            raise BundleError(
                f"{what} was changed after the build: sha256 {found[:12]}...", f"{entry.sha256[:12]}...", REBUILD
            )


def _has_header(file: Path, sha256: str) -> bool:
    try:
        return read_header(file).sha256 == sha256
    except CheckpointError:  # no safetensors file any more
        return False
