"""A profile as a picture: a bar for every op, begun where the one before ended, and what is lost to which cause."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.latency_report import load_pyplot
from qwen_rt.benchmarks.profile.profile import Profile
from qwen_rt.benchmarks.profile.text import title_of
from qwen_rt.benchmarks.profile.waterfall import OpFigures
from qwen_rt.storage import atomic_write_bytes

__all__ = ["draw_profiles"]

_FLOOR, _EXCESS, _GAP, _BETWEEN = "#4e79a7", "#f28e2b", "#e15759", "#9c755f"
_INK, _PALE = "#24292e", "#8a949a"
_CAUSES = {
    "gap": ("between ops", _GAP),
    "latency": ("latency of small ops", _EXCESS),
    "rate": ("below the measured rate", _EXCESS),
    "attention": ("attention", _EXCESS),
    "between_steps": ("between steps", _BETWEEN),
}
_SMALL_SHARE = 0.01  # of a step: ops that take and lose less are drawn as one
_ROW_INCHES = 0.3


def _rows(ops: Sequence[OpFigures], step_us: float) -> list[tuple[str, float, float, float]]:
    """Return label, floor, excess and gap of every bar; small ops of a CPU's many are one."""
    small = [op for op in ops if op.busy_us + op.gap_us < _SMALL_SHARE * step_us]
    few = len(small) < 4
    rows = [(f"{op.op}  × {op.calls:g}", op.floor_us, op.excess_us, op.gap_us) for op in ops if few or op not in small]
    if not few:
        sums = [sum(getattr(op, name) for op in small) for name in ("floor_us", "excess_us", "gap_us")]
        rows.append((f"{len(small)} small ops  × {sum(op.calls for op in small):g}", *sums))
    return rows


def draw_profiles(profiles: Sequence[Profile], device: str, file: Path) -> None:
    """Draw a waterfall for each phase, below each other.

    Args:
        profiles: One for each phase.
        device: What they ran on, with its rates.
        file: .svg or .png.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    pyplot = load_pyplot()
    counts = [len(_rows(profile.waterfall.ops, profile.waterfall.step_us)) + 3 for profile in profiles]
    figure, axes = pyplot.subplots(
        len(profiles),
        2,
        squeeze=False,
        figsize=(12, 1.1 * len(profiles) + 0.7 + _ROW_INCHES * sum(counts)),
        layout="constrained",
        gridspec_kw={"width_ratios": (3.4, 1), "height_ratios": counts},
    )
    for profile, (steps, causes) in zip(profiles, axes, strict=True):
        _draw_ops(profile, steps)
        _draw_causes(profile, causes)
    figure.suptitle(device, fontsize=9, color=_PALE, x=0.01, ha="left")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (_FLOOR, _EXCESS, _GAP, _BETWEEN)]
    hidden = pyplot.Rectangle((0, 0), 1, 1, fc="none", ec=_FLOOR, hatch="////", lw=0.5)
    names = ("floor", "busy beyond the floor", "gap before the op", "between steps", "floor, done under the op before")
    figure.legend([*handles, hidden], names, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    data = io.BytesIO()
    kind = file.suffix[1:]
    figure.savefig(data, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)
    atomic_write_bytes(file, data.getvalue())


def _unit(us: float) -> tuple[float, str]:
    return (1e-3, "ms") if us >= 20_000 else (1.0, "µs")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _draw_ops(profile: Profile, axes: Any) -> None:
    """Draw bars from top to bottom, and the whole step under them."""
    fall = profile.waterfall
    factor, unit = _unit(fall.step_us)
    rows = _rows(fall.ops, fall.step_us)
    labels = [label for label, *_ in rows]
    labels += ["between steps", "whole step"] if profile.phase == "decode" else ["before the first", "whole prefill"]
    at = 0.0
    ends = []
    for row, (_, floor, excess, gap) in enumerate(rows):
        busy = floor + excess
        start = at + gap
        axes.barh(row, factor * gap, left=factor * at, color=_GAP, height=0.72)
        axes.barh(row, factor * min(floor, busy), left=factor * start, color=_FLOOR, height=0.72)
        if excess >= 0:
            axes.barh(row, factor * excess, left=factor * (start + floor), color=_EXCESS, height=0.72)
        else:
            axes.barh(
                row,
                factor * -excess,
                left=factor * (start + busy),
                fc="none",
                ec=_FLOOR,
                hatch="////",
                lw=0,
                height=0.72,
            )
        at = start + busy
        ends.append((at, max(at, start + floor), f"{_number(factor * (gap + busy))}", gap + excess))
    axes.barh(len(rows), factor * fall.between_us, left=factor * at, color=_BETWEEN, height=0.72)
    at += fall.between_us
    ends.append((at, at, _number(factor * fall.between_us), fall.between_us))
    busy_lost = sum(op.excess_us for op in fall.ops)
    gap = sum(op.gap_us for op in fall.ops)
    left = 0.0
    for part, color in ((fall.floor_us, _FLOOR), (busy_lost, _EXCESS), (gap, _GAP), (fall.between_us, _BETWEEN)):
        axes.barh(len(rows) + 1, factor * max(part, 0.0), left=factor * left, color=color, height=0.72)
        left += max(part, 0.0)
    ends.append((fall.step_us, left, _number(factor * fall.step_us), fall.lost_us))
    for row, (end, text_at, total, lost) in enumerate(ends):
        text = total if row == len(rows) else f"{total}, lost {_number(factor * lost)}"
        axes.annotate(
            text, (factor * text_at, row), (5, 0), textcoords="offset points", va="center", fontsize=8, color=_INK
        )
        if row + 1 < len(ends) - 1:
            axes.plot([factor * end] * 2, [row + 0.36, row + 0.64], color=_PALE, lw=0.8)
    axes.axhline(len(rows) + 0.5, color=_PALE, lw=0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set(ylim=(len(labels) - 0.4, -0.6), xlim=(0, factor * fall.step_us * 1.16))
    axes.set_xlabel(f"{unit} in a {'step' if profile.phase == 'decode' else 'prefill'}", fontsize=9)
    ratio = f"{fall.step_us / fall.floor_us:.2f} × its floor" if fall.floor_us else "no floor"
    axes.set_title(
        f"{title_of(profile)}: {_number(factor * fall.step_us)} {unit}, {ratio}", fontsize=11, loc="left", color=_INK
    )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_causes(profile: Profile, axes: Any) -> None:
    """Draw what is lost to every cause, the largest first."""
    causes = {cause: us for cause, us in profile.waterfall.causes.items() if cause != "gap" or profile.has_gaps}
    factor, unit = _unit(profile.waterfall.step_us)
    order = sorted(causes, key=lambda cause: -causes[cause])
    for row, cause in enumerate(order):
        us = causes[cause]
        axes.barh(row, factor * us, color=_CAUSES[cause][1], height=0.6)
        offset, align = (4, "left") if us >= 0 else (-4, "right")
        axes.annotate(
            _number(factor * us), (factor * us, row), (offset, 0), textcoords="offset points", va="center", ha=align,
            fontsize=8, color=_INK,
        )  # fmt: skip
    names = {cause: name for cause, (name, _) in _CAUSES.items()}
    if profile.phase != "decode":
        names["between_steps"] = "before the first op"
    axes.set_yticks(range(len(order)), [names[cause] for cause in order], fontsize=9)
    low, high = min(0.0, *causes.values()), max(0.0, *causes.values())
    span = (high - low) or 1.0
    axes.set(
        ylim=(max(len(order), 6) - 0.4, -0.6),
        xlim=(factor * (low - 0.2 * span * (low < 0)), factor * (high + 0.25 * span)),
    )
    axes.axvline(0, color=_PALE, lw=0.6)
    axes.set_xlabel(f"{unit} lost", fontsize=9)
    axes.set_title("lost to", fontsize=11, loc="left", color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
