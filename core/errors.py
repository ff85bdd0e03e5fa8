"""Typed errors: each says what was wrong, what was expected and what to do next, in one line.

QwenRtError                     exit code 1
├── UsageError                  exit code 2: an argument or option that cannot be used
│   └── CapacityError           a request larger than the KV cache or the context
├── CheckpointError             config, index or shard of a checkpoint that cannot be read
├── UnsupportedModelError       a readable checkpoint that needs something not implemented
├── GraphError                  a graph that lacks what the pass or the session relies on
├── BundleError                 a bundle that is incomplete, tampered with, or of another format
├── TextError                   tokenizer, chat template or detokenizer trouble
├── StorageError                no space, no permission, a path that is in the way
├── MissingDependencyError      an optional package is not installed
├── EndpointError               a server that cannot be reached, refuses, or answers nonsense
└── VerificationError           a comparison ended out of tolerance
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "EndpointError",
    "GraphError",
    "MissingDependencyError",
    "QwenRtError",
    "StorageError",
    "TextError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "one_line",
]

_MAX_CHARS = 1000


def one_line(text: str) -> str:
    """Fold white space and control characters, so that hostile names cannot forge lines or command a terminal."""
    if len(text) > 4 * _MAX_CHARS:  # what may be megabytes long is not worth reading from end to end
        text = text[: 2 * _MAX_CHARS] + text[-2 * _MAX_CHARS :]
    folded = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(folded) <= _MAX_CHARS:
        return folded
    half = _MAX_CHARS // 2 - 3
    return f"{folded[:half]} ... {folded[-half:]}"  # the end says what was wrong with the name at the beginning


class QwenRtError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: What was wrong, with the name and the value (`"hidden_size=-1"`).
        expected: What would have been right; empty if `what` says it.
        fix: The next step for the reader, an imperative; empty if there is none.
    """

    exit_code = 1

    def __init__(self, what: str, expected: str = "", fix: str = "") -> None:
        self.what, self.expected, self.fix = one_line(what), one_line(expected), one_line(fix)
        parts = [self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.fix:
            parts.append(self.fix)
        super().__init__("; ".join(parts))


class UsageError(QwenRtError):
    """An argument or option that cannot be used."""

    exit_code = 2


class CapacityError(UsageError):
    """A request larger than the KV cache or the context length."""


class CheckpointError(QwenRtError):
    """A checkpoint whose config, index or shards cannot be read."""


class UnsupportedModelError(QwenRtError):
    """A readable checkpoint that needs something not implemented."""


class GraphError(QwenRtError):
    """A graph that lacks what a pass or a session relies on."""


class BundleError(QwenRtError):
    """A bundle that is incomplete, tampered with, or of another format."""


class TextError(QwenRtError):
    """Trouble in the tokenizer, the chat template or the detokenizer."""


class StorageError(QwenRtError):
    """No space, no permission, or a path that is in the way."""


class MissingDependencyError(QwenRtError):
    """An optional package is not installed."""


class EndpointError(QwenRtError):
    """A server that cannot be reached, refuses, or answers nonsense."""


class VerificationError(QwenRtError):
    """A comparison ended out of tolerance."""
