"""Timing of a session by CUDA events: decode steps back to back, whole prefills, and steps as an engine runs them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.model import DeviceModel
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen_rt.runtime.cuda.session import CudaSession

__all__ = ["StepTimes", "make_rows", "record_steps", "time_decode", "time_prefill"]

_GREEDY = SamplingParams(temperature=0.0)
_CLOCK_TRIES = 32


@dataclass(frozen=True)
class StepTimes:
    """When a decode step was where, on one clock: µs since an event before the first step.

    Attributes:
        launch_start_us: The host began to launch it.
        launch_end_us: The launch returned.
        wait_start_us: The host began to wait for it.
        read_start_us: The wait was over, reading its tokens began.
        read_end_us: Its tokens were there.
        device_start_us: The device had reached it: the event before its graph.
        device_end_us: The device was done with it: the event behind its graph.
    """

    launch_start_us: float
    launch_end_us: float
    wait_start_us: float
    read_start_us: float
    read_end_us: float
    device_start_us: float
    device_end_us: float


def make_rows(session: CudaSession, count: int, prompt: int, length: int, num_outputs: int) -> list[RowState]:
    """Make requests of `prompt` tokens with blocks of their own for `length`."""
    for name, value in (("rows", count), ("tokens", prompt), ("length", length)):
        if value < 1:
            raise UsageError(f"{name}={value}", "1 or more")
    each = -(-length // BLOCK_SIZE)
    if count * each > session.num_blocks - 1:
        raise CapacityError(
            f"{count} rows of {length} tokens take {count * each} cache blocks", f"at most {session.num_blocks - 1}"
        )
    if length > session.max_length:
        raise CapacityError(f"rows of {length} tokens", f"at most max_length={session.max_length}")
    ids = tuple((np.arange(prompt) * 7919 % session.num_tokens).tolist())
    blocks = [tuple(range(1 + row * each, 1 + (row + 1) * each)) for row in range(count)]
    return [RowState(ids, _GREEDY, 0, own, [0] * num_outputs) for own in blocks]


def time_decode(session: CudaSession, model: DeviceModel, rows: int, prompt: int, steps: int) -> list[float]:
    """Time decode steps over what happens to be in the cache.

    Args:
        session: No step may be under way; its rows are replaced.
        model: The session's.
        rows: B.
        prompt: Tokens in the cache before the first step.
        steps: How many; each adds a token.

    Returns:
        Milliseconds from the end of a step to the end of the next, launched without waiting.

    Raises:
        CapacityError: The cache or the context has no room for that.
        UsageError: A count below 1, or a step under way.
    """
    if steps < 1:
        raise UsageError(f"steps={steps}", "1 or more")
    session.set_rows(make_rows(session, rows, prompt, prompt + steps + 1, 1))
    cuda, stream, resources = model.cuda, model.stream, Resources(model.cuda)
    graph = session.graph
    try:
        events = [resources.event(timing=True) for _ in range(steps + 1)]
        cuda.graph_launch(graph, stream)
        cuda.event_record(events[0], stream)
        for event in events[1:]:
            cuda.graph_launch(graph, stream)
            cuda.event_record(event, stream)
        cuda.event_synchronize(events[-1])
        return [cuda.elapsed_ms(start, stop) for start, stop in pairwise(events)]
    finally:
        session.forget_rows()
        cuda.stream_synchronize(stream)
        resources.close()


def time_prefill(session: CudaSession, model: DeviceModel, tokens: int, repeats: int) -> list[float]:
    """Time whole prefills of one request, in chunks, with the choice of the first token.

    Args:
        session: No step may be under way.
        model: The session's.
        tokens: Of the prompt.
        repeats: How many.

    Returns:
        Milliseconds from the first upload to the token, gaps in which the device waits for the host included.

    Raises:
        CapacityError: The cache or the context has no room for that.
        UsageError: A count below 1.
    """
    if repeats < 1:
        raise UsageError(f"repeats={repeats}", "1 or more")
    (row,) = make_rows(session, 1, tokens, tokens, 0)
    ids = np.array(row.prompt_ids, np.int64)
    cuda, stream, resources = model.cuda, model.stream, Resources(model.cuda)
    times = []
    try:
        start, stop = resources.event(timing=True), resources.event(timing=True)
        for _ in range(repeats):
            cuda.event_record(start, stream)
            for position in range(0, tokens, session.chunk_tokens):
                chunk = ids[position : position + session.chunk_tokens]
                session.prefill(row, chunk, position, is_last=position + len(chunk) == tokens)
            cuda.event_record(stop, stream)
            cuda.event_synchronize(stop)
            times.append(cuda.elapsed_ms(start, stop))
    finally:
        cuda.stream_synchronize(stream)
        resources.close()
    return times


def record_steps(
    session: CudaSession, rows: int, prompt: int, steps: int, warm_up: int = 4
) -> tuple[list[StepTimes], float]:
    """Record decode steps as an engine runs them: one is launched before the one before it is waited for and read.

    Args:
        session: No step may be under way; its rows are replaced. After an error it can only be closed.
        rows: B.
        prompt: Tokens in the cache before the first step; what happens to be there serves.
        steps: How many are recorded.
        warm_up: Steps before those.

    Returns:
        The times of each step, and what the host's and the device's clock may be apart by: µs to either side.

    Raises:
        CapacityError: The cache or the context has no room for that.
        UsageError: A count below 1, a step under way, or the session is closed.
    """
    if steps < 1:
        raise UsageError(f"steps={steps}", "1 or more")
    total = warm_up + steps
    session.set_rows(make_rows(session, rows, prompt, prompt + total + 1, 1))
    model = session._opened()
    cuda, stream, resources = model.cuda, model.stream, Resources(model.cuda)
    launches: list[tuple[float, float]] = []
    waits: list[tuple[float, float, float]] = []
    try:
        events = [(resources.event(timing=True), resources.event(timing=True)) for _ in range(total)]
        base, base_s, apart_s = _tie_clocks(cuda, stream, resources)

        def launch(before: int, after: int) -> int:
            cuda.event_record(before, stream)
            start = perf_counter()
            number = session.launch_step()
            launches.append((start, perf_counter()))
            cuda.event_record(after, stream)
            return number

        def wait(number: int) -> None:
            host_s, start = session.host_seconds, perf_counter()
            session.wait_step(number)
            end = perf_counter()
            waits.append((start, end - (session.host_seconds - host_s), end))

        under_way = launch(*events[0])
        for before, after in events[1:]:
            following = launch(before, after)
            wait(under_way)
            under_way = following
        wait(under_way)
        cuda.event_synchronize(events[-1][1])
        device = [[1e3 * cuda.elapsed_ms(base, event) for event in pair] for pair in events]
        host = [[1e6 * (at - base_s) for at in (*pair, *rest)] for pair, rest in zip(launches, waits, strict=True)]
        recorded = [StepTimes(*at, *on) for at, on in zip(host, device, strict=True)]
        return recorded[warm_up:], 1e6 * apart_s
    finally:
        session.forget_rows()
        cuda.stream_synchronize(stream)
        resources.close()


def _tie_clocks(cuda: Cudart, stream: int, resources: Resources) -> tuple[int, float, float]:
    """Return an event, the host's time of it, and how far that may be off to either side, in seconds.

    The device passes the event between the call that records it and the return of the call that waits for it; of many
    tries the one with the least time between them counts.
    """
    cuda.stream_synchronize(stream)
    tries = []
    for _ in range(_CLOCK_TRIES):
        event = resources.event(timing=True)
        start = perf_counter()
        cuda.event_record(event, stream)
        cuda.event_synchronize(event)
        tries.append((perf_counter() - start, start, event))
    width_s, start, event = min(tries)
    return event, start + width_s / 2, width_s / 2
