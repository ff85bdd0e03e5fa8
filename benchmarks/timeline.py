"""Where host and device are during decode steps, run as the engine runs them, by events and the host's clock.

    qwen-rt bench timeline
    qwen-rt bench timeline 7b --rows 16 --picture timeline.svg

The host launches step n + 1, waits for step n, reads its tokens. A timing event before and one behind every graph say
when the device had reached a step and was done with it; an event waited for on an idle device ties its clock to the
host's. Events between graphs cost a little, so as many steps are timed without any, and once launched back to back.

A step that is launched after the device was done with the one before would show an early event and a late graph; the
device then counts as idle until the launch has returned, so idle time is never told too short for that reason.

Rows of `timeline.jsonl`:
    idle_us, idle_max_us, idle_ratio       device between the end of a step and the start of the next; all of it over
                                           the time from the first step's end to the last one's
    host_us, host_max_us                   launching a step and reading its tokens
    lead_us, lead_min_us                   how long before the end of the step before it a launch had returned
    device_step_us                         a step on the device, event to event
    itl_ms, itl_without_events_ms          from one step's tokens to the next's, on the host's clock
    device_ms                              launched back to back, by events behind each
    clock_us                               what the two clocks may be apart by, to either side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.bench_latency import Gpu, Model, Plan, find_model, open_gpu
from qwen_rt.benchmarks.latency import check_tokens, tie_of, time_steps
from qwen_rt.benchmarks.timeline_picture import draw_timeline
from qwen_rt.errors import UsageError
from qwen_rt.runtime.cuda.bench import StepTimes, record_steps
from qwen_rt.storage import atomic_write_bytes

if TYPE_CHECKING:
    from qwen_rt.runtime.cuda.session import CudaSession

__all__ = ["Timeline", "measure", "run", "timeline_metrics", "timeline_text"]

_FOLLOWING = (
    2  # steps behind those that are told: the next one's start ends a gap, the one after is being launched then
)


@dataclass(frozen=True)
class Timeline:
    """Recorded steps.

    Attributes:
        times: Of the steps that are told, and of two more that follow them.
        clock_us: What host and device times may be apart by, to either side.
    """

    times: tuple[StepTimes, ...]
    clock_us: float

    @property
    def steps(self) -> tuple[StepTimes, ...]:
        """The steps that are told."""
        return self.times[:-_FOLLOWING]

    @property
    def _pairs(self) -> list[tuple[StepTimes, StepTimes]]:
        return list(pairwise(self.times[: 1 - _FOLLOWING]))

    @property
    def idle_us(self) -> list[float]:
        """Device time from the end of each step to the start of the next, which cannot start before it is launched."""
        gaps = []
        for step, following in self._pairs:
            launched_us = min(following.launch_end_us, following.device_end_us)
            gaps.append(max(0.0, max(following.device_start_us, launched_us) - step.device_end_us))
        return gaps

    @property
    def idle_share(self) -> float:
        """All idle time over the time from the end of the first step to the end of the one that follows the last."""
        return sum(self.idle_us) / (self._pairs[-1][1].device_end_us - self._pairs[0][0].device_end_us)

    @property
    def lead_us(self) -> list[float]:
        """For each step: how long before its end the launch of the next had returned; below 0 if it came too late."""
        return [step.device_end_us - following.launch_end_us for step, following in self._pairs]

    @property
    def device_us(self) -> list[float]:
        """Time of each step on the device."""
        return [step.device_end_us - step.device_start_us for step in self.steps]

    @property
    def launch_us(self) -> list[float]:
        """Host time of each step's launch."""
        return [step.launch_end_us - step.launch_start_us for step in self.steps]

    @property
    def read_us(self) -> list[float]:
        """Host time of reading each step's tokens."""
        return [step.read_end_us - step.read_start_us for step in self.steps]

    @property
    def host_us(self) -> list[float]:
        """Host time of each step, waiting not included."""
        return [launch + read for launch, read in zip(self.launch_us, self.read_us, strict=True)]

    @property
    def itl_ms(self) -> list[float]:
        """From each step's tokens to the next's, on the host's clock."""
        return [1e-3 * (following.read_end_us - step.read_end_us) for step, following in self._pairs]


def timeline_metrics(
    timeline: Timeline, without_events_ms: Sequence[float], device_ms: Sequence[float]
) -> dict[str, Any]:
    """Return the metrics of a row.

    Args:
        timeline: Steps with events.
        without_events_ms: Each of as many steps without them, on the host's clock.
        device_ms: Each of as many, launched back to back.
    """
    samples = {
        "idle_us": timeline.idle_us,
        "host_us": timeline.host_us,
        "lead_us": timeline.lead_us,
        "device_step_us": timeline.device_us,
        "itl_ms": timeline.itl_ms,
        "itl_without_events_ms": without_events_ms,
        "device_ms": device_ms,
    }
    return {
        **{name: harness.summarize(values, 5) for name, values in samples.items()},
        "idle_max_us": max(timeline.idle_us),
        "idle_ratio": timeline.idle_share,
        "host_max_us": max(timeline.host_us),
        "lead_min_us": min(timeline.lead_us),
        "clock_us": timeline.clock_us,
    }


def timeline_text(timeline: Timeline, title: str, metrics: dict[str, Any]) -> str:
    """Return a table of the steps and a summary, for a terminal."""
    zero_us = timeline.steps[0].device_start_us
    header = ("step", "launched at", "device from", "to", "device", "idle after", "next led by", "launch", "read")
    lines: list[tuple[str, ...]] = [header]
    columns = zip(
        timeline.steps,
        timeline.device_us,
        timeline.idle_us,
        timeline.lead_us,
        timeline.launch_us,
        timeline.read_us,
        strict=True,
    )
    for number, (step, *durations) in enumerate(columns, 1):
        places = (step.launch_end_us - zero_us, step.device_start_us - zero_us, step.device_end_us - zero_us)
        lines.append((str(number), *(f"{value:.1f}" for value in (*places, *durations))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]

    def median(name: str) -> float:
        return float(metrics[name]["median"])

    return "\n".join(
        [
            f"{title}; µs, host and device within ±{timeline.clock_us:.1f}",
            *table,
            f"device idle between steps: median {median('idle_us'):.1f} µs, max {metrics['idle_max_us']:.1f} µs, "
            f"{metrics['idle_ratio']:.2%} of the time",
            f"host, a step: median {median('host_us'):.1f} µs, max {metrics['host_max_us']:.1f} µs; "
            f"launched {metrics['lead_min_us']:.1f} µs or more before the device needed it",
            f"ms a token: {median('itl_ms'):.4f} with events, {median('itl_without_events_ms'):.4f} without; "
            f"the device alone {median('device_ms'):.4f}",
        ]
    )


def measure(
    model: Model, rows: int, prompt: int, steps: int, gpu: Gpu
) -> tuple[Timeline, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Load and check a model, and record its steps.

    Args:
        model: From `find_model`.
        rows: Rows that decode at once.
        prompt: Tokens of each before the first step.
        steps: How many are recorded.
        gpu: From `open_gpu`.

    Returns:
        The steps; metrics, settings and check of a row.

    Raises:
        VerificationError: The check failed.
        CapacityError: It does not fit.
    """
    plan = Plan(rows=(rows,), prompts=(prompt,), steps=steps + _FOLLOWING)
    with model.start(gpu, plan) as (session, _):
        check = check_tokens(session, tie=tie_of(model.precision, model.kv_format))
        device_ms = session.time_decode(rows, prompt, steps)
        without_events_ms, _ = time_steps(session, rows, prompt, steps)
        times, clock_us = record_steps(cast("CudaSession", session), rows, prompt, steps + _FOLLOWING)
    timeline = Timeline(tuple(times), clock_us)
    settings = {
        "model": model.name,
        "weights": model.precision,
        "kv_cache": model.kv_format,
        "source": model.source,
        "layers": model.shape.layers,
        "rows": rows,
        "prompt": prompt,
    }
    return timeline, timeline_metrics(timeline, without_events_ms, device_ms), settings, check


def run(
    name: str,
    rows: int,
    prompt: int,
    steps: int,
    *,
    device: int = 0,
    output: Path | None = None,
    picture: Path | None = None,
    quiet: bool = False,
) -> None:
    """Record a model's steps; print the table, append the row, draw the picture.

    Args:
        name: A shape or a bundle.
        rows: Rows that decode at once.
        prompt: Tokens of each before the first step.
        steps: How many are recorded.
        device: The GPU's number.
        output: The file of rows; None writes none.
        picture: An .svg file.
        quiet: No progress on stderr.

    Raises:
        QwenRtError: Something is absent, does not fit or is not correct; one line.
    """
    if picture is not None and picture.suffix != ".svg":
        raise UsageError(f"--picture {picture.name}", "a name ending in .svg", "rename it")
    if picture is not None and not picture.parent.is_dir():
        raise UsageError(f"--picture {picture}", "a folder that exists", f"make {picture.parent}")
    model = find_model(name, None, device, quiet)
    gpu = open_gpu(device, with_matrix_rate=False)
    run_name = harness.new_run()
    timeline, metrics, settings, check = measure(model, rows, prompt, steps, gpu)
    row = harness.make_row(
        "timeline",
        "qwen-rt",
        metrics,
        settings,
        check=check,
        run=run_name,
        used=harness.versions("onnxruntime-gpu") | dict(gpu.versions),
        gpu=gpu.describe(),
    )
    if output is not None:
        harness.append_row(row, output)
    cache = "" if model.kv_format == "bf16" else f", {model.kv_format} KV cache"
    title = f"{model.name} {model.precision}{cache}, {rows} row{'s' * (rows > 1)}, prompt {prompt}, one {gpu.name}"
    print(timeline_text(timeline, title, metrics), flush=True)
    if picture is not None:
        atomic_write_bytes(picture, draw_timeline(timeline.times, timeline.idle_us, timeline.clock_us, title).encode())
