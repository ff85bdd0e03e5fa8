"""Checkpoints of holes for the tests of core/checkpoint.py: true headers, no data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.safetensors_header import write_header
from qwen_rt.spec import ModelSpec

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2_72B = {
    **TINY,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors_of(config: dict[str, Any], dtype: str = "BF16") -> Tensors:
    return {name: (dtype, shape) for name, shape in ModelSpec.from_config(config).parameters().items()}


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write a sparse file: a true header, and data that is all holes."""
    header, ranges = write_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(part.nbytes for part in ranges.values()))


def write_checkpoint(
    folder: Path, config: dict[str, Any] = TINY, tensors: Tensors | None = None, num_shards: int = 0
) -> Path:
    """Write a checkpoint of one file, or of `num_shards` with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(config) if tensors is None else tensors
    if not num_shards:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for i in range(num_shards):
        shard = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[i * len(names) // num_shards : (i + 1) * len(names) // num_shards]
        write_shard(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map_of(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def refusal(path: str | Path) -> QwenRtError:
    with pytest.raises(QwenRtError) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    return caught.value
