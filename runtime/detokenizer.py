"""Streaming detokenization: token ids in, one at a time; whole characters out, as soon as they are complete."""

from __future__ import annotations

import codecs

from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer"]


class IncrementalDetokenizer:
    """Turns a stream of token ids into text without splitting a character.

    All that :meth:`push` returned, joined, plus :meth:`flush`, is exactly ``tokenizer.decode(ids)``: bytes that are not
    UTF-8 become U+FFFD by the same rule, and an unfinished character is held back until it is complete or refuted.
    The cost of a token is that of its own bytes, however long the text already is.

    Args:
        tokenizer: Gives the bytes of each token.
        skip_special_tokens: Leave out the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._id_to_bytes = tokenizer.id_to_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one token and return the text that it completes; empty for a skipped token or half a character."""
        return "" if token_id in self._skipped else self._decoder.decode(self._id_to_bytes(token_id))

    def flush(self) -> str:
        """End the text: return what is held back (U+FFFD for half a character) and start anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
