"""What the gate reads: the built-in text in the checkpoint's own tokens, or random ones where there is no tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.spec import ModelSpec
from qwen_rt.verification_text import VERIFICATION_TEXT

__all__ = ["NUM_GATE_TOKENS", "file_tokens", "gate_tokens"]

NUM_GATE_TOKENS = 128
"""Half a second of a 0.5B model, and every matrix is read once whatever their number. Errors of matrices are means over
tokens: 128 leave them within a few hundredths of what a whole book gives."""

_SEED = 2


def gate_tokens(folder: Path, spec: ModelSpec, num_tokens: int = NUM_GATE_TOKENS) -> tuple[list[int], str]:
    """Choose the tokens that the gate reads.

    Args:
        folder: The checkpoint, with tokenizer.json or without.
        spec: The model.
        num_tokens: How many, at most; the context length and the text bound it too.

    Returns:
        The tokens, and what they are: `built-in text`, or `random tokens` if the checkpoint has no tokenizer, or one
        that knows tokens which the model does not.

    Raises:
        CheckpointError: tokenizer.json is malformed.
    """
    count = min(num_tokens, spec.context_length)
    file = folder / "tokenizer.json"
    if file.is_file():
        ids = _encode(file, VERIFICATION_TEXT)[:count]
        if ids and max(ids) < spec.vocab_size:
            return ids, "built-in text"
    return np.random.default_rng(_SEED).integers(0, spec.vocab_size, count).tolist(), "random tokens"


def file_tokens(folder: Path, spec: ModelSpec, text_file: Path) -> list[int]:
    """Tokens of a text file, by the checkpoint's own tokenizer.

    Raises:
        UsageError: The file cannot be read, or gives no tokens.
        CheckpointError: There is no tokenizer, it is malformed, or it knows tokens that the model does not.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text_file} cannot be read: {error}", "a UTF-8 text file", "check the path") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json", "one, to read a text with", "put it there")
    ids = _encode(file, text)
    if not ids:
        raise UsageError(f"{text_file} has no tokens", "some pages of text", "choose another file")
    if max(ids) >= spec.vocab_size:
        raise CheckpointError(f"{file} gives token {max(ids)}", f"0 to {spec.vocab_size - 1}", "check tokenizer.json")
    return ids


def _encode(file: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {error}", "a tokenizer", "download it again") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
