"""Where the time of a step goes: from intervals of ops to figures for every op and every cause. Pure arithmetic.

Ops run one after another, but one may begin before the one before it has ended. Going through them in order of their
begin, time is given out once:

    gap      from the latest end so far to the op's begin, if it begins later
    busy     from there (or, if it begins earlier, from the latest end so far) to the op's own end, if that is later

so all gaps and busy times of a step add up to it exactly, from the end of the step before to its own. What an op does
under the one before costs nothing, and a busy time may be shorter than the floor.

    lost     gap + busy - floor, the sum of which is step - floor

Every part of it has one cause: the gap before an op; the gap before a step's first op (`between steps`); and what is
busy beyond the floor: `attention`; `latency` where the floor of a call is below `TINY_US`, as of an op that reads next
to nothing; `rate` elsewhere, where memory or arithmetic could have been faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "ATTENTION",
    "CAUSES",
    "OTHER",
    "TINY_US",
    "Call",
    "OpFigures",
    "Step",
    "Waterfall",
    "make_waterfall",
    "middle_half",
]

TINY_US = 2.0
"""A kernel that does nothing takes about that long from its launch to its end, so no op can do with less."""

OTHER = "other"
"""The op of copies, fills and unknown kernels."""

ATTENTION = ("rope_kv_append_attention", "GroupQueryAttention")
"""Ops that are attention: a GPU's, a CPU's."""

CAUSES = {
    "gap": "between ops: nothing runs, the next op has not begun",
    "latency": f"ops whose floor is below {TINY_US:g} µs a call: their beginning and end",
    "rate": "ops with more to do: memory or arithmetic below the measured rate",
    "attention": "attention beyond its floor",
    "between_steps": "before the first op: the device waits for the host, or for the launch",
}
"""Cause → what it means, in the order of the tables."""


@dataclass(frozen=True)
class Call:
    """One call of an op in a step.

    Attributes:
        op: Its name.
        start_us, end_us: When its first kernel began and its last one ended.
        kernels: Name, start and end of each.
    """

    op: str
    start_us: float
    end_us: float
    kernels: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """A step: when the one before had ended, and its calls in order of their begin."""

    begin_us: float
    calls: tuple[Call, ...]

    @property
    def end_us(self) -> float:
        """When its last call ended."""
        return max(call.end_us for call in self.calls)

    @property
    def first(self) -> int:
        """The place of the first call that is more than copies and fills: what is before belongs to its beginning."""
        return next((number for number, call in enumerate(self.calls) if call.op != OTHER), 0)

    def shares(self) -> list[tuple[float, float]]:
        """Return the gap before every call and its busy time, µs; they add up to the step."""
        found, done_us = [], self.begin_us
        for call in self.calls:
            gap_us = max(0.0, call.start_us - done_us)
            end_us = max(done_us, call.end_us)
            found.append((gap_us, end_us - done_us - gap_us))
            done_us = end_us
        return found


@dataclass(frozen=True)
class OpFigures:
    """An op's share of a step, the mean of all steps, µs.

    Attributes:
        op: Its name.
        calls: In a step.
        busy_us: Time that is given to it, gaps not included.
        floor_us: Time that it must take.
        gap_us: Time before its calls in which nothing ran; of the step's first op none, that is between steps.
        kernel_us: From begin to end of each of its kernels, overlapping ones counted twice.
        read_bytes: That it must read.
        kernels: Name → calls in a step and µs.
    """

    op: str
    calls: float
    busy_us: float
    floor_us: float
    gap_us: float
    kernel_us: float = 0.0
    read_bytes: float = 0.0
    kernels: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def excess_us(self) -> float:
        """Busy beyond the floor; below 0 where it does its work under the op before."""
        return self.busy_us - self.floor_us

    @property
    def lost_us(self) -> float:
        """Gap and excess."""
        return self.gap_us + self.excess_us

    @property
    def cause(self) -> str:
        """What its excess is put down to, a key of `CAUSES`."""
        if self.op in ATTENTION:
            return "attention"
        return "latency" if self.floor_us < TINY_US * self.calls else "rate"


@dataclass(frozen=True)
class Waterfall:
    """Where the time of a step goes, the mean of all steps, µs.

    Attributes:
        ops: In order of their first call.
        between_us: The gap before a step's first op, gaps among copies that come before it included.
        step_us: From the end of a step to the end of the next.
        step_range_us: The shortest and the longest.
        num_steps: How many steps these are.
    """

    ops: tuple[OpFigures, ...]
    between_us: float
    step_us: float
    step_range_us: tuple[float, float]
    num_steps: int

    @property
    def floor_us(self) -> float:
        """Sum of the floors."""
        return sum(op.floor_us for op in self.ops)

    @property
    def lost_us(self) -> float:
        """What the step takes beyond the floor."""
        return self.step_us - self.floor_us

    @property
    def causes(self) -> dict[str, float]:
        """Return what is lost to each cause; the sum is `lost_us`."""
        found = dict.fromkeys(CAUSES, 0.0)
        for op in self.ops:
            found["gap"] += op.gap_us
            found[op.cause] += op.excess_us
        found["between_steps"] = self.between_us
        return found


def make_waterfall(
    steps: Sequence[Step],
    floor_us: Mapping[str, float],
    read_bytes: Mapping[str, float] | None = None,
    order: Sequence[str] = (),
) -> Waterfall:
    """Work out the figures of steps that are alike.

    Args:
        steps: One or more.
        floor_us: Op → the shortest time of a call; ops that are not named have none.
        read_bytes: Op → bytes that a call must read.
        order: Ops that come first, in this order; all others follow in that of their first call.

    Raises:
        ValueError: No steps, or a step without calls.
    """
    if not steps or not all(step.calls for step in steps):
        raise ValueError("no steps, or a step without calls")
    share = 1 / len(steps)
    found = dict.fromkeys(call.op for step in steps for call in step.calls)
    sums = {op: _Sum() for op in dict.fromkeys([*(op for op in order if op in found), *found])}
    between_us = 0.0
    for step in steps:
        for number, (call, (gap_us, busy_us)) in enumerate(zip(step.calls, step.shares(), strict=True)):
            if number <= step.first:
                between_us += share * gap_us
                gap_us = 0.0
            sums[call.op].add(call, share, gap_us, busy_us)
    lengths = [step.end_us - step.begin_us for step in steps]
    figures = tuple(
        OpFigures(
            op,
            total.calls,
            total.busy_us,
            total.calls * floor_us.get(op, 0.0),
            total.gap_us,
            total.kernel_us,
            total.calls * (read_bytes or {}).get(op, 0.0),
            {name: (count, us) for name, (count, us) in total.kernels.items()},
        )
        for op, total in sums.items()
    )
    return Waterfall(figures, between_us, statistics.fmean(lengths), (min(lengths), max(lengths)), len(steps))


def middle_half(steps: Sequence[Step]) -> list[Step]:
    """Return the half of the steps that are neither the shortest nor the longest, in their order: at least one."""
    order = sorted(range(len(steps)), key=lambda index: steps[index].end_us - steps[index].begin_us)
    quarter = len(steps) // 4
    return [steps[index] for index in sorted(order[quarter : len(steps) - quarter])]


@dataclass
class _Sum:
    """An op's figures while they grow."""

    calls: float = 0.0
    busy_us: float = 0.0
    gap_us: float = 0.0
    kernel_us: float = 0.0
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, call: Call, share: float, gap_us: float, busy_us: float) -> None:
        self.calls += share
        self.gap_us += share * gap_us
        self.busy_us += share * busy_us
        for name, start_us, end_us in call.kernels:
            count, us = self.kernels.get(name, (0.0, 0.0))
            self.kernels[name] = count + share, us + share * (end_us - start_us)
            self.kernel_us += share * (end_us - start_us)
