"""What a bundle's own runtime makes of a text, on either target: token by token, through prefill, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.progress import track
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["greedy_ids", "prefill_logits", "stepwise_logits"]


def stepwise_logits(llm: LLM, ids: Sequence[int], quiet: bool) -> NDArray[np.float32]:
    """Logits of every position, float32[T, V], each through the cache that the positions before it wrote."""
    feed = (_feed_cuda if llm.bundle.manifest.target == "cuda" else _feed_cpu)(llm.session, ids)
    logits = np.empty((len(ids), llm.spec.vocab_size), np.float32)
    for position in track(range(len(ids)), "reading token by token", quiet=quiet):
        logits[position] = feed(position)
    return logits


def _feed_cpu(session: Any, ids: Sequence[int]) -> Callable[[int], NDArray[np.float32]]:
    cache, zero = session.new_cache(1, len(ids)), np.zeros(1, np.int64)

    def feed(position: int) -> NDArray[np.float32]:
        token = np.array([[ids[position]]], np.int64)
        logits: NDArray[np.float32] = session.run(cache, 0, token, np.array([position]), zero)[0]
        return logits

    return feed


def _feed_cuda(session: Any, ids: Sequence[int]) -> Callable[[int], NDArray[np.float32]]:
    row = _row(session, ids[:1], len(ids))

    def feed(position: int) -> NDArray[np.float32]:
        if position == 0:
            session.prefill(row, np.array(ids[:1], np.int64), 0, is_last=True)
        else:
            row.output_ids.append(ids[position])
            session.set_rows([row])  # anew for every step: what the device has chosen itself is not the text
            session.wait_step(session.launch_step())
        logits: NDArray[np.float32] = session.read_logits(1)[0]
        return logits

    return feed


def prefill_logits(llm: LLM, ids: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of some positions of a text that is read in as few calls as can be, float32[P, V]."""
    session, text = llm.session, np.array(ids, np.int64)
    if llm.bundle.manifest.target != "cuda":
        cache, zero = session.new_cache(1, len(ids)), np.zeros(1, np.int64)
        return np.stack([session.run(cache, 0, text[None], zero, np.array([p]))[0].copy() for p in positions])
    found = []
    for stop in (positions + 1).tolist():
        row = _row(session, ids[:stop], stop)
        for start in range(0, stop, session.chunk_tokens):
            chunk = text[start : min(start + session.chunk_tokens, stop)]
            session.prefill(row, chunk, start, is_last=start + len(chunk) == stop)
        found.append(session.read_logits(1)[0])
    return np.stack(found)


def _row(session: Any, prompt_ids: Sequence[int], num_tokens: int) -> RowState:
    """A sequence that has the cache for itself, with room for `num_tokens` tokens and one more, if the context has."""
    num_blocks = -(-min(num_tokens + 1, session.max_length) // session.block_size)
    return RowState(tuple(prompt_ids), SamplingParams(temperature=0.0), 0, tuple(range(1, num_blocks + 1)))


def greedy_ids(llm: LLM, ids: Sequence[int], num_tokens: int) -> Sequence[int]:
    """Continue a text greedily, past any end token."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return llm.generate([list(ids)], params)[0].token_ids
