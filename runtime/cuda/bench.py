"""Timing of a session by CUDA events: decode steps launched back to back, and whole prefills."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.model import DeviceModel
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen_rt.runtime.cuda.session import CudaSession

__all__ = ["time_decode", "time_prefill"]

_GREEDY = SamplingParams(temperature=0.0)


def _rows(session: CudaSession, count: int, prompt: int, length: int, num_outputs: int) -> list[RowState]:
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
    session.set_rows(_rows(session, rows, prompt, prompt + steps + 1, 1))
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
    (row,) = _rows(session, 1, tokens, tokens, 0)
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
