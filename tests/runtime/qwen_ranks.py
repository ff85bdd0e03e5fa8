"""Builds Qwen2's real vocabulary for tests from the BPE ranks in Alibaba's own SDK (``pip install dashscope``).

The SDK carries Qwen's ranks as ``qwen.tiktoken`` and a tokenizer over them. The first 151,643 ranks are Qwen2's BPE
vocabulary; ids 151,643 to 151,645 are its special tokens. Nothing of the SDK is copied: the files are made on the spot.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

NUM_BPE_TOKENS = 151_643
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def ranks_path() -> Path | None:
    """Return the SDK's rank file, without importing the SDK; None if it is not installed."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    return path if path.is_file() else None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token: its id, and its priority as the result of a merge."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def write_vocabulary(ranks: dict[bytes, int], folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``, as a released Qwen2 checkpoint has them."""
    spelled = {_spell(token): rank for token, rank in ranks.items()}
    (folder / "vocab.json").write_text(json.dumps(spelled, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{_spell(left)} {_spell(right)}" for left, right in _merges(ranks))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(NUM_BPE_TOKENS + i): {"content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merge that makes each token: what is left of its bytes after all merges of lower rank."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge_below(ranks, token, rank)
            if len(parts) != 2:
                raise ValueError(f"token {rank} is made of {len(parts)} parts, not 2")
            yield parts[0], parts[1]


def _merge_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while True:
        options = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(options, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _spell(token: bytes) -> str:
    return "".join(map(_CHAR_OF_BYTE.__getitem__, token))


def _char_of_byte() -> list[str]:
    """Return GPT-2's printable stand-in for each byte (openai/gpt-2 ``encoder.py``, ``bytes_to_unicode``)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars = [chr(byte) if byte in kept else "" for byte in range(256)]
    spare = iter(range(256, 512))
    return [char or chr(next(spare)) for char in chars]


_CHAR_OF_BYTE = _char_of_byte()
