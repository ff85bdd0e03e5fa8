"""Decode steps and prefills of a CUDA session, recorded by CUPTI, and steps cut short, which need no CUPTI."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from qwen_rt.benchmarks.profile.cupti import Activity, Cupti
from qwen_rt.benchmarks.profile.driver import GraphNode, destroy_node, graph_nodes
from qwen_rt.runtime.cuda.bench import make_rows
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.cuda.steps import bucket_of, width_of

__all__ = ["HostSpan", "Prefixes", "record_decode", "record_prefill", "time_prefixes"]

_WARM_UP = 4
_CLOCK_TRIES = 32
_SPARE_TOKENS = 4


@dataclass(frozen=True)
class HostSpan:
    """What the host did, on the clock of the records: `launch`, `wait` or `prefill`."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Prefixes:
    """A step cut short.

    Attributes:
        nodes: Mangled names of its kernels, in order.
        us: Time of the first 1, 2, … of them, from an event before to an event behind.
    """

    nodes: tuple[str, ...]
    us: tuple[float, ...]


def record_decode(
    session: CudaSession, rows: int, prompt: int, steps: int, cupti: Cupti
) -> tuple[list[Activity], list[HostSpan]]:
    """Record decode steps as an engine runs them: one is launched before the one before it is waited for.

    Args:
        session: No step may be under way; its rows are replaced.
        rows: B.
        prompt: Tokens in the cache before the first step; what happens to be there serves.
        steps: How many. The first ones warm up.
        cupti: Attached.

    Returns:
        What ran, and what the host did.
    """
    session.set_rows(make_rows(session, rows, prompt, prompt + _WARM_UP + steps + 1, 1))
    spans: list[HostSpan] = []
    model = session._opened()
    try:
        for _ in range(_WARM_UP):
            session.wait_step(session.launch_step())
        cupti.start()
        offset_ns = _clock_offset(cupti)

        def timed(name: str, call: Callable[[], int]) -> int:
            start = perf_counter_ns()
            number = call()
            spans.append(HostSpan(name, start + offset_ns, perf_counter_ns() + offset_ns))
            return number

        def wait(number: int) -> int:
            session.wait_step(number)
            return number

        under_way = timed("launch", session.launch_step)
        for _ in range(steps - 1):
            following = timed("launch", session.launch_step)
            timed("wait", lambda: wait(under_way))  # noqa: B023  # called at once
            under_way = following
        timed("wait", lambda: wait(under_way))
        return cupti.stop(), spans
    finally:
        session.forget_rows()
        model.cuda.stream_synchronize(model.stream)


def record_prefill(
    session: CudaSession, tokens: int, repeats: int, cupti: Cupti
) -> tuple[list[Activity], list[HostSpan]]:
    """Record prefills of one request each, in chunks, with the choice of the first token.

    Args:
        session: No step may be under way.
        tokens: Of the prompt.
        repeats: How many prefills. One more warms up.
        cupti: Attached.

    Returns:
        What ran, and what the host did: a span for each chunk of each prefill.
    """
    (row,) = make_rows(session, 1, tokens, tokens, 0)
    ids = np.array(row.prompt_ids, np.int64)
    model = session._opened()
    spans: list[HostSpan] = []
    cupti.start()
    offset_ns = _clock_offset(cupti)
    for turn in range(repeats + 1):  # the first after recording has begun takes longer
        for position in range(0, tokens, session.chunk_tokens):
            chunk = ids[position : position + session.chunk_tokens]
            start = perf_counter_ns()
            session.prefill(row, chunk, position, is_last=position + len(chunk) == tokens)
            if turn:
                spans.append(HostSpan("prefill", start + offset_ns, perf_counter_ns() + offset_ns))
        model.cuda.stream_synchronize(model.stream)
    return cupti.stop(), spans


def _clock_offset(cupti: Cupti) -> int:
    """Return what must be added to `perf_counter_ns` to be on the clock of the records."""
    tries = []
    for _ in range(_CLOCK_TRIES):
        before = perf_counter_ns()
        on_device = cupti.timestamp_ns()
        after = perf_counter_ns()
        tries.append((after - before, on_device - (before + after) // 2))
    return min(tries)[1]


def time_prefixes(
    session: CudaSession,
    rows: int,
    prompt: int,
    repeats: int,
    cuts_of: Callable[[Sequence[str]], Sequence[int]],
    advance: Callable[[], None] = lambda: None,
) -> Prefixes:
    """Time the first 1, 2, … kernels of a decode step, each number in a graph of its own.

    Every one is timed behind a whole step, which leaves nothing in L2 and gives the host time to get ahead. What a
    kernel adds to the time is what it costs in the step, its overlap with neighbours included; nothing slows it.

    Args:
        session: No step may be under way; its rows are replaced.
        rows: B.
        prompt: Tokens in the cache.
        repeats: Timings of every number; the median counts.
        cuts_of: Names of the kernels → numbers of kernels that are timed, ascending.
        advance: Called after each of them.

    Raises:
        QwenRtError: The step is no chain of kernels.
    """
    states = make_rows(session, rows, prompt, prompt + repeats + _SPARE_TOKENS, 1)
    session.set_rows(states)
    model = session._opened()
    cuda, stream, resources = model.cuda, model.stream, Resources(model.cuda)
    times: list[float] = []
    graph = 0
    try:
        whole = session.graph
        width = width_of(len(states[0].blocks), model.max_blocks)
        cuda.capture_begin(stream)
        try:
            model.enqueue_step(bucket_of(rows, session.max_rows), width, session._plan)
        finally:
            graph = cuda.capture_end(stream)
        nodes: list[GraphNode] = graph_nodes(graph)
        names = tuple(node.name for node in nodes)
        start, stop = resources.event(timing=True), resources.event(timing=True)
        for cut in reversed(cuts_of(names)):
            while len(nodes) > cut:
                destroy_node(nodes.pop())
            part = cuda.graph_instantiate(graph)
            session.set_rows(states)  # back to the end of the prompt: every whole step adds a token
            try:
                samples = []
                for turn in range(repeats + 1):
                    cuda.graph_launch(whole, stream)
                    cuda.event_record(start, stream)
                    cuda.graph_launch(part, stream)
                    cuda.event_record(stop, stream)
                    cuda.event_synchronize(stop)
                    if turn:
                        samples.append(1e3 * cuda.elapsed_ms(start, stop))
            finally:
                cuda.graph_exec_destroy(part)
            times.append(statistics.median(samples))
            advance()
        return Prefixes(names, tuple(reversed(times)))
    finally:
        session.forget_rows()
        cuda.stream_synchronize(stream)
        if graph:
            cuda.graph_destroy(graph)
        resources.close()
