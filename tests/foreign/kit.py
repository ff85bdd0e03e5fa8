"""Checkpoints of one layer in foreign layouts, and readers of single matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, QwenRtError
from qwen_rt.foreign import ForeignMatrix, find_matrices, read_quantization
from qwen_rt.quantization import QuantizedTensor, dequantize
from qwen_rt.safetensors_header import read_header, write_header
from qwen_rt.spec import ModelSpec

from .layouts import Written, floats

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_sliding_window": False,
}
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
Tensors = dict[str, tuple[str, NDArray[Any]]]


def write_shard(path: Path, tensors: Tensors) -> None:
    header, ranges = write_header([(name, dtype, array.shape) for name, (dtype, array) in tensors.items()])
    with path.open("wb") as file:
        file.write(header)
        for name, (_, array) in tensors.items():
            assert array.nbytes == ranges[name].nbytes, name
            file.write(np.ascontiguousarray(array).tobytes())


def write_matrix(folder: Path, written: Written) -> ForeignMatrix:
    """Store a lone matrix and find it again, without a model around it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "matrix.safetensors", {f"{MODULE}.{key}": value for key, value in written.tensors.items()})
    return find_matrix(folder, written)


def find_matrix(folder: Path, written: Written) -> ForeignMatrix:
    """Find the matrix that `write_matrix` stored; one that the config does not speak of is refused."""
    quantization = read_quantization({"quantization_config": written.config})
    rows, columns = written.weight.shape
    stored = read_header(folder / "matrix.safetensors").tensors
    found = find_matrices(quantization, {NAME: (rows, columns)}, stored) if quantization is not None else {}
    if NAME not in found:
        raise CheckpointError(f"{NAME} is not quantized")
    return found[NAME]


def assert_exact(matrix: ForeignMatrix, written: Written) -> QuantizedTensor:
    """The matrix stands for the very numbers that were written, and its parts are as its scheme has them."""
    tensor = matrix.load()
    assert tensor.scheme == matrix.scheme
    assert tensor.name == NAME
    assert tensor.scheme.format == matrix.format
    wanted = tensor.scheme.parts(matrix.shape)
    itemsizes = {"F8_E4M3": 1, "I8": 1, "U8": 1, "F16": 2, "F32": 4, "I32": 4}
    assert {part: (array.shape, array.itemsize) for part, array in tensor.parts().items()} == {
        part: (shape, itemsizes[dtype]) for part, (dtype, shape) in wanted.items()
    }
    np.testing.assert_array_equal(dequantize(tensor), written.weight.astype(np.float32))
    return tensor


def write_checkpoint(
    folder: Path, quantize: Callable[[str, int, int], Written | None], changes: Mapping[str, Any] = CONFIG
) -> dict[str, NDArray[np.float32]]:
    """Write a checkpoint whose matrices `quantize(name, rows, columns)` writes, None leaving one in float16.

    Returns:
        Every parameter as float32, quantized ones as they dequantize.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    rng = np.random.default_rng(7)
    tensors: Tensors = {}
    weights: dict[str, NDArray[np.float32]] = {}
    for name, shape in ModelSpec.from_config(config).parameters().items():
        module = name.removesuffix(".weight")
        written = quantize(name, *shape) if len(shape) == 2 and "embed" not in name else None
        if written is not None:
            config["quantization_config"] = written.config
            tensors |= {f"{module}.{key}": value for key, value in written.tensors.items()}
            weights[name] = written.weight.astype(np.float32)
            continue
        scale = 1.0 if name.endswith("norm.weight") else shape[-1] ** -0.5
        offset = 1.0 if name.endswith("norm.weight") else 0.0
        tensors[name], exact = floats(offset + scale * rng.standard_normal(shape) * 0.5, "F16")
        weights[name] = exact.astype(np.float32)
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", tensors)
    return weights


def refusal(act: Callable[[], object]) -> str:
    """The one line with which `act` is refused."""
    with pytest.raises(QwenRtError) as caught:
        act()
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1500
    return text


def open_refusal(folder: Path) -> str:
    return refusal(lambda: Checkpoint.open(folder))
