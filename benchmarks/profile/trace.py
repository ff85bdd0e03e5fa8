"""Profiles as a Chrome trace: JSON that ui.perfetto.dev and chrome://tracing open.

A process for each phase; in it a track for the host, for steps, for ops, and for every stream of kernels. Slices of a
track must lie inside each other or apart, so kernels that overlap through dependent launches share a stream over
several tracks, `stream 7` and `stream 7, overlapping`: each kernel on the first that is free when it begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_rt.benchmarks.profile.profile import Profile, Span

__all__ = ["lanes", "trace_bytes", "trace_events"]


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spread spans over as few lanes as let none overlap another, in order of their begin."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start_us, span.end_us)):
        free = next((lane for lane in found if lane[-1].end_us <= span.start_us), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _tracks(profile: Profile) -> Iterator[tuple[str, Sequence[Span]]]:
    """Yield the tracks of a phase from top to bottom."""
    if host := profile.tracks.get("host"):
        yield "host", host
    yield (
        "steps",
        [
            Span(f"{profile.phase} {number}", step.begin_us, step.end_us, {"us": step.end_us - step.begin_us})
            for number, step in enumerate(profile.steps, 1)
        ],
    )
    yield "ops", list(_ops(profile))
    for name, spans in profile.tracks.items():
        if name != "host":
            for number, lane in enumerate(lanes(spans)):
                again = "" if number == 0 else ", overlapping" if number == 1 else f", overlapping {number}"
                yield name + again, lane


def _ops(profile: Profile) -> Iterator[Span]:
    """Yield the time that is given to every op, and the gaps."""
    floors = {op.op: op.floor_us / op.calls for op in profile.waterfall.ops}
    for step in profile.steps:
        done_us = step.begin_us
        for number, (call, (gap_us, busy_us)) in enumerate(zip(step.calls, step.shares(), strict=True)):
            begin_us, is_between = done_us + gap_us, number <= step.first
            if gap_us > 0:
                what = "before the first op" if is_between else "gap"
                yield Span(what, done_us, begin_us, {"before": call.op})
            done_us = begin_us + busy_us
            floor_us = floors[call.op]
            lost_us = busy_us - floor_us + (0.0 if is_between else gap_us)
            yield Span(call.op, begin_us, done_us, {"floor_us": floor_us, "lost_us": lost_us})


def trace_events(profiles: Sequence[Profile], device: str) -> dict[str, Any]:
    """Return the trace: µs since the first thing of each phase.

    Args:
        profiles: One for each phase; each is a process.
        device: Part of the processes' names.
    """
    events: list[dict[str, Any]] = []
    for process, profile in enumerate(profiles, 1):
        tracks = [(name, spans) for name, spans in _tracks(profile) if spans]
        zero_us = min(span.start_us for _, spans in tracks for span in spans)
        events.append(_name("process_name", process, 0, f"{profile.phase} on {device}"))
        for thread, (name, spans) in enumerate(tracks, 1):
            events.append(_name("thread_name", process, thread, name))
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
            )
            events += (
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": name.split(" ")[0].rstrip(","),
                    "pid": process,
                    "tid": thread,
                    "ts": round(span.start_us - zero_us, 3),
                    "dur": round(span.end_us - span.start_us, 3),
                    "args": {key: _plain(value) for key, value in span.details.items()},
                }
                for span in spans
            )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return round(value, 3) if isinstance(value, float) else value


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def trace_bytes(profiles: Sequence[Profile], device: str) -> bytes:
    """Return the trace as a file: an event a line."""
    document = trace_events(profiles, device)
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in document["traceEvents"])
    return f'{{"displayTimeUnit": "ns", "traceEvents": [\n{lines}\n]}}\n'.encode()
