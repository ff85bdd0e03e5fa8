"""A profile read back from its JSON, to be printed and drawn again, as of a machine that is not at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.profile.profile import KIND, SCHEMA, Profile
from qwen_rt.benchmarks.profile.text import device_text
from qwen_rt.benchmarks.profile.waterfall import OpFigures, Waterfall
from qwen_rt.errors import UsageError

__all__ = ["read_profiles"]

MOST_BYTES = 1 << 24
"""A profile has some 10 kB."""


def read_profiles(file: Path) -> tuple[list[Profile], str]:
    """Read what `qwen-rt profile --json` wrote.

    Args:
        file: The JSON document.

    Returns:
        Its profiles, without single steps and their trace, and what they were taken on (`device_text`).

    Raises:
        UsageError: The file cannot be read, or is no profile of this version; one line.
    """
    fix = "name a file that `qwen-rt profile --json` wrote"
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UsageError(f"{file} has more than {MOST_BYTES >> 20} MiB", "a profile", fix)
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} could not be read: {error.strerror}", "a profile", fix) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{file} is no JSON", "a profile", fix) from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UsageError(f"{file} is no profile", f"kind {KIND!r}", fix)
    if document.get("schema") != SCHEMA:
        raise UsageError(f"{file} has schema {document.get('schema')!r}", f"{SCHEMA}", "profile again")
    try:
        profiles = [_profile(data) for data in document["profiles"]]
        title = device_text(document["device"], profiles)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged: {error}"
        raise UsageError(f"{file} {what}", "a profile", fix) from None
    if not profiles:
        raise UsageError(f"{file} has no profiles", "one at least", fix)
    return profiles, title


def _profile(data: Mapping[str, Any]) -> Profile:
    ops = tuple(_op(op) for op in data["ops"])
    shortest, longest = map(float, data["step_range_us"])
    step_us = float(data["step_us"])
    between_us = step_us - sum(op.busy_us + op.gap_us for op in ops)
    alone_us = data["step_without_recording_us"]
    return Profile(
        phase=str(data["phase"]),
        settings=dict(data["settings"]),
        method=str(data["method"]),
        waterfall=Waterfall(ops, between_us, step_us, (shortest, longest), int(data["steps"])),
        steps=(),
        tracks={},
        alone_us=None if alone_us is None else float(alone_us),
        has_gaps=bool(data["has_gaps"]),
        notes=tuple(map(str, data["notes"])),
    )


def _op(data: Mapping[str, Any]) -> OpFigures:
    figures = {
        name: float(data[name]) for name in ("calls", "busy_us", "floor_us", "gap_us", "kernel_us", "read_bytes")
    }
    kernels = {str(one["name"]): (float(one["calls"]), float(one["us"])) for one in data["kernels"]}
    return OpFigures(str(data["op"]), kernels=kernels, **figures)
