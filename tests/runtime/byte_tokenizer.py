"""A tiny tokenizer in Qwen2's layout for tests: the 256 bytes, a few merges, Qwen2's special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from qwen_rt.runtime.tokenizer import Tokenizer, build_backend

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("o", "r")]
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def vocabulary() -> dict[str, int]:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    return {token: token_id for token_id, token in enumerate(tokens)}


def backend(extra: tuple[AddedToken, ...] = ()) -> tokenizers.Tokenizer:
    built = build_backend(models.BPE(vocab=vocabulary(), merges=MERGES))
    built.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    built.add_tokens(list(extra))
    return built


def byte_tokenizer(extra: tuple[AddedToken, ...] = (), **options: Any) -> Tokenizer:
    return Tokenizer(backend(extra), **options)


def write_merges(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write ``vocab.json``, ``merges.txt`` and, if given, ``tokenizer_config.json``."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES), encoding="utf-8"
    )
    if config is not None:
        write_config(folder, config)


def write_json(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write ``tokenizer.json`` and, if given, ``tokenizer_config.json``."""
    backend().save(str(folder / "tokenizer.json"))
    if config is not None:
        write_config(folder, config)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
