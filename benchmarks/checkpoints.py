"""Checkpoints in the shapes of released models, made on the spot: random weights, or none at all.

`write_sparse` makes the files of a large checkpoint with real headers and holes for data: they take no space, and
anything that reads or copies a weight shows. `write_random` makes a small one that runs, tokenizer included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_rt.runtime.tokenizer import PRETOKENIZE_PATTERN
from qwen_rt.safetensors_header import write_header
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvPlan

__all__ = [
    "QWEN2_05B",
    "QWEN2_7B",
    "QWEN2_72B",
    "random_offsets",
    "split_shards",
    "write_random",
    "write_repeated",
    "write_sparse",
    "write_tokenizer",
]

Tensors = list[tuple[str, tuple[int, ...]]]

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

QWEN2_72B: dict[str, Any] = _COMMON | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
"""config.json of Qwen2-72B."""

QWEN2_7B: dict[str, Any] = QWEN2_72B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
}
"""config.json of Qwen2-7B."""

QWEN2_05B: dict[str, Any] = _COMMON | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""config.json of Qwen2-0.5B."""

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_NUM_PLAIN_TOKENS = 151643
_BLOCK_ELEMENTS = 4 << 20
_REPEAT_ELEMENTS = 33554393  # a prime


def split_shards(tensors: Tensors, num_shards: int) -> list[Tensors]:
    """Split bf16 tensors, in order, into shards of about equal size."""
    total = sum(int(np.prod(shape)) for _, shape in tensors)
    shards: list[Tensors] = [[] for _ in range(num_shards)]
    done = 0
    for name, shape in tensors:
        count = int(np.prod(shape))
        shards[min((done + count // 2) * num_shards // total, num_shards - 1)].append((name, shape))
        done += count
    return [shard for shard in shards if shard]


def _write_layout(folder: Path, config: dict[str, Any], num_shards: int) -> list[tuple[Path, bytes, Tensors]]:
    """Write config and index; return each shard's path, header and tensors."""
    shards = split_shards(list(ModelSpec.from_config(config).parameters().items()), num_shards)
    weight_map, layout, total = {}, [], 0
    for index, tensors in enumerate(shards, 1):
        path = folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        header, ranges = write_header([(name, "BF16", shape) for name, shape in tensors], {"format": "pt"})
        weight_map.update({name: path.name for name, _ in tensors})
        total += sum(place.nbytes for place in ranges.values())
        layout.append((path, header, tensors))
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n", encoding="utf-8")
    return layout


def write_sparse(folder: Path, config: dict[str, Any], num_shards: int) -> list[Path]:
    """Write a bf16 checkpoint whose tensors are holes.

    Args:
        folder: An existing folder.
        config: Its config.json.
        num_shards: Safetensors files.

    Returns:
        The shards. Each has its full size; only its header takes space.
    """
    paths = []
    for path, header, tensors in _write_layout(folder, config, num_shards):
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(2 * int(np.prod(shape)) for _, shape in tensors))
        paths.append(path)
    return paths


def write_random(folder: Path, config: dict[str, Any], num_shards: int = 2, seed: int = 0) -> list[Path]:
    """Write a bf16 checkpoint of random weights: normal, standard deviation `initializer_range`; norms are 1.

    Args:
        folder: An existing folder.
        config: Its config.json.
        num_shards: Safetensors files.
        seed: Of the weights; the same seed gives the same bytes.

    Returns:
        The shards.
    """
    rng = np.random.default_rng(seed)
    scale = np.float32(config["initializer_range"])
    paths = []
    for path, header, tensors in _write_layout(folder, config, num_shards):
        with path.open("wb") as file:
            file.write(header)
            for name, shape in tensors:
                count = int(np.prod(shape))
                for start in range(0, count, _BLOCK_ELEMENTS):
                    size = min(_BLOCK_ELEMENTS, count - start)
                    is_norm = name.endswith("norm.weight")
                    block = np.ones(size, np.float32) if is_norm else rng.standard_normal(size, np.float32) * scale
                    file.write(block.astype(ml_dtypes.bfloat16).tobytes())
        paths.append(path)
    return paths


def write_repeated(
    folder: Path,
    config: dict[str, Any],
    num_shards: int = 2,
    seed: int = 0,
    factors: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write a bf16 checkpoint at the speed of the disk: as `write_random`, but the random numbers repeat.

    They repeat after a prime number of elements, so no two rows of a matrix are alike within many thousand rows.

    Args:
        folder: An existing folder.
        config: Its config.json.
        num_shards: Safetensors files.
        seed: Of the weights; the same seed gives the same bytes.
        factors: End of a name → power of two that its numbers are multiplied by.

    Returns:
        The shards.
    """
    factors = factors or {}
    numbers = np.random.default_rng(seed).standard_normal(_REPEAT_ELEMENTS, np.float32)
    block = (numbers * np.float32(config["initializer_range"])).astype(ml_dtypes.bfloat16)
    blocks = {factor: (block * ml_dtypes.bfloat16(factor)).view(np.uint16) for factor in {1.0, *factors.values()}}
    paths, at = [], 0
    for path, header, tensors in _write_layout(folder, config, num_shards):
        with path.open("wb") as file:
            file.write(header)
            for name, shape in tensors:
                left = int(np.prod(shape))
                if name.endswith("norm.weight"):
                    file.write(np.ones(left, ml_dtypes.bfloat16).tobytes())
                    continue
                factor = next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
                while left:
                    size = min(left, _REPEAT_ELEMENTS - at)
                    file.write(blocks[factor][at : at + size].tobytes())
                    left, at = left - size, (at + size) % _REPEAT_ELEMENTS
        paths.append(path)
    return paths


def random_offsets(spec: ModelSpec, kv_format: str) -> KvPlan | None:
    """Offsets of a few times one for every layer of a quantized cache; None for a cache of bf16."""
    if kv_format == "bf16":
        return None
    from qwen_rt.export.quantize.kv import KvLayer, KvPlan

    rng, size = np.random.default_rng(0), (spec.num_kv_heads, spec.head_dim)

    def draw() -> NDArray[np.float32]:
        return (3 * rng.standard_normal(size)).astype(np.float32)

    return KvPlan(kv_format, tuple(KvLayer(draw(), draw(), None, None, (), ()) for _ in range(spec.num_layers)))


def _byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level BPE of Qwen2's size and file layout: 256 bytes, then pairs and triples of bytes, in order.

    As large as the real one, so that loading it costs as much; what its tokens mean does not matter here.

    Args:
        folder: The checkpoint.
        vocab_size: Rows of its embedding; every one gets a token, so that any may be generated.
    """
    num_tokens = _NUM_PLAIN_TOKENS
    num_extra = vocab_size - num_tokens - len(_SPECIAL_TOKENS)
    special = _SPECIAL_TOKENS + [f"<|extra_{index}|>" for index in range(num_extra)]
    letters = _byte_letters()
    tokens, merges = list(letters), []
    pairs = [left + right for left in letters for right in letters]
    longer = ((left, right) for words in (letters, pairs) for left in words for right in letters)
    for left, right in longer:
        if len(tokens) == num_tokens:
            break
        tokens.append(left + right)
        merges.append([left, right])
    added = [
        {
            "id": num_tokens + index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, text in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_PATTERN}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(item["id"]): {key: value for key, value in item.items() if key != "id"} for item in added
        },
        "bos_token": None,
        "eos_token": special[2],
        "pad_token": special[0],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    generation = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": False}
    for name, content in (
        ("tokenizer.json", document),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
