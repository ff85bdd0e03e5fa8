"""What TensorRT says while it parses and builds, collected; from errors, the line that says what was refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["make_log", "reason_of"]

_MAX_LISTED = 64
# Without a GPU the library also reports that it looked for one; that is never the cause.
_NOISE = re.compile(r"Error Code 1: Cuda Runtime|CUDA initialization failure|^\s*$", re.IGNORECASE)
_ABOUT = re.compile(r"(\w+) operation ")  # the compiler says so of a kind of layer; the first one is named
_PLACES = (
    (re.compile(r"^.*?MyelinCheckException: \S+: CHECK\(.*?\) failed\.\s*"), ""),
    (re.compile(r"^.*?Error Code \d+: Myelin \((?:\[[^\]]*\])?\s*"), ""),
    (re.compile(r"\s*\(See https?://.*$"), ""),
    (re.compile(r"\s*\[\w+\.(?:cpp|h)[^\]]*\]\s*"), " "),
    (re.compile(r"\s*\(?(?:In|at) [\w:~<>]+ at /\S+\)?"), ""),
    (re.compile(r"^\s*\[\d+\]\s*"), ""),
    (re.compile(r"^\S+\.cpp:\d+(?: In function \w+)?:\s*"), ""),
    (re.compile(r"^[\w:]+: Error Code \d+: "), ""),
)


def make_log(module: Any) -> Any:
    """Return a logger for the library, with two lists: `errors`, and `engine_lists`, messages that list an engine."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.engine_lists: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == module.ILogger.WARNING:
                if len(self.warnings) < _MAX_LISTED:
                    self.warnings.append(message)
            elif message.startswith("Layers:"):
                self.engine_lists.append(message)

    return Log()


def reason_of(errors: Sequence[str], layers: Sequence[str] = ()) -> str:
    """The error that says most, without places in the library's own source.

    Args:
        errors: Messages of errors, in order.
        layers: Names of the network's layers, to find the one that a message is about.

    Returns:
        One line, which begins with the layer's name if a message has one; empty without errors.
    """
    said = [message for message in errors if not _NOISE.search(message)] or list(errors)
    if not said:
        return ""
    by_length = sorted(layers, key=len, reverse=True)
    for message in said:
        layer = next((name for name in by_length if len(name) > 3 and name in message), None)
        if layer is not None:
            text = _plain(message)
            return text if text.startswith(layer) else f"{layer}: {text}"
    text = _plain(said[0])
    about = _ABOUT.match(text)
    if about is not None:
        for name in layers:
            if name.rpartition("/")[2].startswith(f"{about[1]}_"):
                return f"{name.rpartition('_')[0]}: {text}"
    return text


def _plain(message: str) -> str:
    text = " ".join(message.split())
    for pattern, replacement in _PLACES:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix(".")
