"""Read JSON that others wrote: bounded in memory, without duplicate keys, every field typed and ranged.

All errors are `CheckpointError`, one line each: `field=value`, what was expected, the next step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qwen_rt.errors import CheckpointError

__all__ = ["INT_MAX", "check_bool", "check_float", "check_int", "name_some", "parse_object", "show"]

INT_MAX = 2**31 - 1
"""Largest integer that any field may hold: sizes beyond it are mistakes or attacks."""

_MAX_VALUES = 1_000_000
"""Most values in one document: what bounds the memory of the parsed objects (at most some 250 bytes each)."""
_MAX_INT_DIGITS = 20
_MAX_SHOWN_CHARS = 80
_FIX = "correct the model configuration or download it again"


def show(value: object) -> str:
    """Write a value of any type and size as a short piece of an error message, the way JSON would."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= _MAX_SHOWN_CHARS else value[:_MAX_SHOWN_CHARS] + "...")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"an object of {len(value)} keys" if isinstance(value, dict) else type(value).__name__


def name_some(names: Iterable[str]) -> str:
    """Name at most three of `names`, and count the rest."""
    ordered = sorted(names)
    shown = ", ".join(json.dumps(name[:200])[1:-1] for name in ordered[:3])
    return shown if len(ordered) <= 3 else f"{shown} and {len(ordered) - 3} more"


def parse_object(data: bytes, source: str, fix: str = "download it again") -> dict[str, Any]:
    """Parse one JSON object.

    Memory and time stay proportional to `len(data)`; the caller bounds that. `NaN` and `Infinity` parse, as Python
    writes them, and are left to the checks of the fields.

    Args:
        data: The bytes of the document, UTF-8.
        source: What the document is, to begin the message with (`"config.json"`).
        fix: The next step for the reader.

    Returns:
        The object; its keys and string values can be encoded as UTF-8.

    Raises:
        CheckpointError: Not UTF-8, not JSON, not an object, a key given twice, nested too deeply, an integer of more
            than 20 digits, or more than a million values.
    """
    if sum(data.count(c) for c in (b",", b"[", b"{")) > _MAX_VALUES:
        raise CheckpointError(f"{source} holds more than {_MAX_VALUES} JSON values", "a smaller document", fix)
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not UTF-8 at byte {error.start}", "UTF-8 JSON", fix) from None
    except RecursionError:
        raise CheckpointError(f"{source} is nested too deeply", "a flat JSON object", fix) from None
    except ValueError as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}", "a JSON object", fix) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{source} holds {show(document)}", "a JSON object", fix)
    return document


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; refuse a key given twice and text with half a surrogate pair."""
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str) and not text.isascii():
                text.encode("utf-8")  # UnicodeEncodeError is a ValueError
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {show(twice)} is given twice")
    return result


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise ValueError(f"integer of {len(digits)} digits")
    return int(digits)


def check_int(name: str, value: object, low: int = 1, high: int = INT_MAX) -> int:
    """Return `value` if it is an integer in [`low`, `high`]; a bool is not one.

    Raises:
        CheckpointError: It is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{name}={show(value)}", f"an integer from {low} to {high}", _FIX)
    return value


def check_float(name: str, value: object, low: float, high: float) -> float:
    """Return `value` as a float if it is a finite number in (`low`, `high`]; a bool is not one.

    Raises:
        CheckpointError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise CheckpointError(f"{name}={show(value)}", f"a number above {low:g} and up to {high:g}", _FIX)
    return float(value)


def check_bool(name: str, value: object) -> bool:
    """Return `value` if it is a bool.

    Raises:
        CheckpointError: It is not.
    """
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}={show(value)}", "true or false", _FIX)
    return value
