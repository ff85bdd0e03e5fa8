"""What was measured of one phase, as the outputs take it, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_rt.benchmarks.profile.waterfall import CAUSES, Step, Waterfall

__all__ = ["KIND", "SCHEMA", "Profile", "Span", "to_document"]

SCHEMA = 1
"""Version of the JSON document; raised when a key changes its meaning or goes."""

KIND = "qwen-rt profile"
"""What the document says that it is."""

_DIGITS = 3


@dataclass(frozen=True)
class Span:
    """Something with a name on a track of the trace: begin and end in µs, and what belongs to it."""

    name: str
    start_us: float
    end_us: float
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Profile:
    """A decode step or a prefill.

    Attributes:
        phase: `decode` or `prefill`.
        settings: Model, precision, rows, prompt and so on.
        method: How it was recorded.
        waterfall: Its figures.
        steps: Those that the figures are the mean of.
        tracks: Name of a track → what was on it; kernels of a stream may overlap.
        alone_us: A step's time without recording; None if it was not taken.
        has_gaps: Whether gaps can be told from the time of ops.
        notes: What a reader should know, a sentence each.
    """

    phase: str
    settings: Mapping[str, Any]
    method: str
    waterfall: Waterfall
    steps: tuple[Step, ...]
    tracks: Mapping[str, tuple[Span, ...]]
    alone_us: float | None = None
    has_gaps: bool = True
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data: times in µs, the mean of a step."""
        fall = self.waterfall
        return {
            "phase": self.phase,
            "settings": dict(self.settings),
            "method": self.method,
            "notes": list(self.notes),
            "steps": fall.num_steps,
            "step_us": _round(fall.step_us),
            "step_range_us": [_round(value) for value in fall.step_range_us],
            "step_without_recording_us": None if self.alone_us is None else _round(self.alone_us),
            "floor_us": _round(fall.floor_us),
            "lost_us": _round(fall.lost_us),
            "has_gaps": self.has_gaps,
            "ops": [
                {
                    "op": op.op,
                    "calls": _round(op.calls),
                    "busy_us": _round(op.busy_us),
                    "floor_us": _round(op.floor_us),
                    "gap_us": _round(op.gap_us),
                    "lost_us": _round(op.lost_us),
                    "cause": op.cause,
                    "kernel_us": _round(op.kernel_us),
                    "read_bytes": round(op.read_bytes),
                    "kernels": [
                        {"name": name, "calls": _round(count), "us": _round(us)}
                        for name, (count, us) in op.kernels.items()
                    ],
                }
                for op in fall.ops
            ],
            "causes": [
                {"cause": cause, "us": _round(us), "meaning": CAUSES[cause]} for cause, us in fall.causes.items()
            ],
        }


def _round(value: float) -> float:
    return round(value, _DIGITS)


def to_document(
    profiles: Sequence[Profile], command: str, date: str, device: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return the whole JSON document.

    Args:
        profiles: One for each phase.
        command: What was run.
        date: When, ISO 8601.
        device: What it ran on, with the measured bandwidth.
        versions: Of what took part.
    """
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": date,
        "command": command,
        "device": dict(device),
        "versions": dict(versions),
        "profiles": [profile.to_dict() for profile in profiles],
    }
