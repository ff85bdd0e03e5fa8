"""A profile as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_rt.benchmarks.profile.profile import Profile
from qwen_rt.benchmarks.profile.waterfall import CAUSES

__all__ = ["device_text", "profile_text", "title_of"]

_HEADER = ("op", "calls", "µs", "floor", "gap", "lost", "of lost", "of rate")


def title_of(profile: Profile) -> str:
    """Return what was measured: phase, model, formats, rows, prompt."""
    of = profile.settings
    cache = "" if of["kv_cache"] in ("bf16", "fp32") else f", {of['kv_cache']} KV cache"
    rows = f"{of['rows']} row{'s' * (of['rows'] > 1)}, "
    tokens = f"{rows}prompt {of['prompt']}" if profile.phase == "decode" else f"{of['prompt']} tokens"
    return f"{profile.phase}, {of['model']} {of['precision']}{cache}, {tokens}"


def device_text(device: Mapping[str, Any], profiles: Sequence[Profile]) -> str:
    """Return what profiles of one run were taken on, with the rates that their floors are made of."""
    gpu = f"one {device['name']}" if "name" in device else ""
    text = gpu or f"{device['cpu']}, {profiles[0].settings['threads']} threads"
    text += f", read {device['read_gb_s']:g} GB/s"
    if "matrix_tflop_s" in device and any(profile.phase == "prefill" for profile in profiles):
        text += f", bf16 products {device['matrix_tflop_s']:g} TFLOP/s"
    return text


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def profile_text(profile: Profile, device: str) -> str:
    """Return two tables: time and loss of every op, and what is lost to which cause.

    Args:
        profile: What was measured.
        device: What it ran on, with its rates: the second line.
    """
    fall = profile.waterfall
    unit = "step" if profile.phase == "decode" else "prefill"
    lost_us = fall.lost_us

    def of_lost(us: float) -> str:
        return f"{us / lost_us:.0%}".replace("-0%", "0%") if lost_us > 0 else ""

    def gap(us: float) -> str:
        return f"{us:.1f}" if profile.has_gaps else "-"

    lines = [_HEADER]
    for op in fall.ops:
        rate = f"{op.floor_us / op.busy_us:.0%}" if op.floor_us and op.busy_us else ""
        share = of_lost(op.lost_us)
        numbers = (f"{op.calls:g}", f"{op.busy_us:.1f}", f"{op.floor_us:.1f}", gap(op.gap_us), f"{op.lost_us:.1f}")
        lines.append((op.op, *numbers, share, rate))
    first = "between steps" if profile.phase == "decode" else "before the first"
    between = f"{fall.between_us:.1f}"
    lines.append((first, "", "", "", between, between, of_lost(fall.between_us), ""))
    gaps = gap(fall.between_us + sum(op.gap_us for op in fall.ops))
    busy_us = sum(op.busy_us for op in fall.ops)
    rate = f"{fall.floor_us / fall.step_us:.0%}"
    whole = (
        f"whole {unit}",
        "",
        f"{busy_us:.1f}",
        f"{fall.floor_us:.1f}",
        gaps,
        f"{fall.lost_us:.1f}",
        of_lost(lost_us),
        rate,
    )
    lines.append(whole)
    causes = [("lost to", "µs", "of lost", "of step")]
    for cause, us in fall.causes.items():
        if cause == "gap" and not profile.has_gaps:
            continue
        causes.append((CAUSES[cause], f"{us:.1f}", of_lost(us), f"{us / fall.step_us:.0%}"))
    alone = "" if profile.alone_us is None else f"; without recording {profile.alone_us:.1f} µs"
    table = _table(lines)
    rule = "-" * max(map(len, table))
    return "\n".join(
        [
            f"{title_of(profile)}: {fall.step_us:.1f} µs a {unit} = "
            f"floor {fall.floor_us:.1f} + lost {fall.lost_us:.1f}",
            device,
            f"{fall.num_steps} {unit}s, {fall.step_range_us[0]:.1f} to {fall.step_range_us[1]:.1f} µs, by "
            f"{profile.method}{alone}",
            *profile.notes,
            "",
            table[0],
            *table[1:-1],
            rule,
            table[-1],
            "",
            *_table(causes),
        ]
    )
