"""Continuous batching on one session: requests join when a row is free and leave when they end.

The running requests always occupy the rows 0 … A-1 of the cache, so a decode step is one call over a contiguous view.
When a request ends, the last row moves into its place: one copy of that row per request, none per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import UsageError
from qwen_rt.runtime.outputs import StreamChunk
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampler import Sampler
from qwen_rt.spec import ModelSpec

__all__ = ["PREFILL_CHUNK", "Engine", "SlotCache", "SlotSession", "plan_prefill"]

PREFILL_CHUNK = 512
"""Prompt tokens per call: bounds the memory of activations, and how long a running request waits for a new one."""

_MAX_PADDING = 0.25


def plan_prefill(lengths: Sequence[int], chunk: int = PREFILL_CHUNK) -> list[tuple[int, int]]:
    """Group neighbouring prompts into ragged calls with little padding.

    Args:
        lengths: Tokens of each prompt, in row order.
        chunk: Most tokens of a row in one call; a longer prompt gets calls of its own.

    Returns:
        Ranges `(start, stop)` of rows that cover all, each with at most a quarter of padding.
    """
    groups: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(lengths) + 1):
        if index < len(lengths):
            group = lengths[start : index + 1]
            padded = max(group) * len(group)
            if max(group) <= chunk and padded - sum(group) <= _MAX_PADDING * sum(group) and padded <= 8 * chunk:
                continue
        groups.append((start, index))
        start = index
    return groups


class SlotCache(Protocol):
    """Rows of a cache that one run of requests has; `KVCache` and `LeasedCache` are two."""

    num_rows: int

    def move_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of a row over another row."""
        ...

    def close(self) -> None:
        """Give the rows back. Closing twice does nothing."""
        ...


class SlotSession(Protocol):
    """What the engine needs of a loaded graph; `CpuSession` and `TensorRtSession` are two.

    Attributes:
        spec: The model's hyperparameters.
        max_length: Tokens that prompt and output can have together.
    """

    spec: ModelSpec
    max_length: int

    def new_cache(self, num_rows: int, capacity: int) -> SlotCache:
        """Make a cache for `num_rows` sequences, or fewer where no more are to be had, of up to `capacity` tokens."""
        ...

    def run(
        self,
        cache: Any,
        first_row: int,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_indices: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run the model over new tokens of the rows `first_row … first_row + B - 1`, whose keys and values it writes.

        Args:
            cache: One of `new_cache`. With S = 1 and `first_row` 0, the first token of rows behind those that take
                part may be overwritten.
            first_row: First of the B rows.
            input_ids: int64[B, S]. With B > 1 and S > 1 every `write_indices` must be 0.
            write_indices: int64[B], cache position of each row's first token.
            logits_indices: int64[B], token of each row whose logits are wanted, 0 … S - 1.

        Returns:
            Logits, float32[B, V], until the next call.
        """
        ...


class Engine:
    """Runs requests on a session.

    Args:
        session: The loaded graph.
        num_tokens: Tokens of the tokenizer: larger ids are padding of the embedding and never chosen.
        max_num_seqs: Most requests that run at once.
    """

    def __init__(self, session: SlotSession, num_tokens: int, max_num_seqs: int) -> None:
        self.session, self.num_tokens, self.max_num_seqs = session, num_tokens, max_num_seqs
        self._is_closed = False

    @property
    def capacity(self) -> int:
        """Tokens that prompt and output of one request can have together."""
        return self.session.max_length

    def run(self, requests: Sequence[Request]) -> Iterator[StreamChunk]:
        """Run requests to their end; yields a chunk for every token of every request, as it is chosen.

        The cache holds as many rows as run at once, each as long as the longest request can get. Closing the iterator
        ends all requests and frees the cache.

        Args:
            requests: One or more; those with short prompts are admitted first.

        Returns:
            The chunks; nothing runs before the first is asked for.

        Raises:
            UsageError: Sampling settings that do not fit the vocabulary, of whichever request; or, from the iterator,
                the engine was closed.
            CapacityError: From the iterator: the cache cannot be had.
        """
        for request in requests:  # else the one that is refused would end those that run by then
            self._sampler().add(request.params, request.prompt_ids)
        return self._chunks(requests)

    def close(self) -> None:
        """Run nothing more; the session stays open. Closing twice does nothing."""
        self._is_closed = True

    def _sampler(self) -> Sampler:
        return Sampler([], self.session.spec.vocab_size, [], num_tokens=self.num_tokens)

    def _chunks(self, requests: Sequence[Request]) -> Iterator[StreamChunk]:
        waiting = deque(sorted(requests, key=lambda request: len(request.prompt_ids)))  # alike ones prefill together
        num_rows = min(self.max_num_seqs, len(requests))
        capacity = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        cache = self.session.new_cache(num_rows, capacity)
        try:
            yield from self._run(cache, waiting)
        finally:
            cache.close()

    def _run(self, cache: SlotCache, waiting: deque[Request]) -> Iterator[StreamChunk]:
        sampler = self._sampler()
        running: list[Request] = []
        while waiting or running:
            if self._is_closed:
                raise UsageError("the model is closed", "an open one", "load the bundle again")
            joining = [waiting.popleft() for _ in range(min(cache.num_rows - len(running), len(waiting)))]
            if joining:
                for request in joining:
                    request.sampler_row = sampler.add(request.params, request.prompt_ids)
                first_row = len(running)
                running += joining
                for start, stop in plan_prefill([len(request.prompt_ids) for request in joining]):
                    yield from self._prefill(cache, sampler, first_row + start, joining[start:stop])
            else:
                yield from self._decode(cache, sampler, running)
            self._retire(cache, sampler, running)

    def _prefill(
        self, cache: SlotCache, sampler: Sampler, first_row: int, requests: Sequence[Request]
    ) -> Iterator[StreamChunk]:
        """Run the prompts of neighbouring rows: one ragged call, or a long prompt in chunks."""
        lengths = np.array([len(request.prompt_ids) for request in requests], np.int64)
        longest = int(lengths.max())
        if len(requests) > 1:
            input_ids = np.zeros((len(requests), longest), np.int64)
            for row, request in enumerate(requests):
                input_ids[row, : lengths[row]] = request.prompt_ids
            logits = self.session.run(cache, first_row, input_ids, np.zeros_like(lengths), lengths - 1)
        else:
            prompt = np.array(requests[0].prompt_ids, np.int64)[None]
            for start in range(0, longest, PREFILL_CHUNK):
                chunk = prompt[:, start : start + PREFILL_CHUNK]
                last = np.array([chunk.shape[1] - 1])
                logits = self.session.run(cache, first_row, chunk, np.array([start]), last)
        yield from self._choose(sampler, requests, logits)

    def _decode(self, cache: SlotCache, sampler: Sampler, running: Sequence[Request]) -> Iterator[StreamChunk]:
        input_ids = np.array([[request.output_ids[-1]] for request in running], np.int64)
        positions = np.array([request.num_tokens - 1 for request in running], np.int64)
        logits = self.session.run(cache, 0, input_ids, positions, np.zeros_like(positions))
        yield from self._choose(sampler, running, logits)

    def _choose(self, sampler: Sampler, requests: Sequence[Request], logits: np.ndarray) -> Iterator[StreamChunk]:
        result = sampler.sample(logits, [request.sampler_row for request in requests])
        chunks = [
            request.append(int(token), logprobs)
            for request, token, logprobs in zip(requests, result.token_ids, result.logprobs, strict=True)
        ]
        yield from chunks

    def _retire(self, cache: SlotCache, sampler: Sampler, running: list[Request]) -> None:
        """Let finished requests go, and close the gaps that they leave."""
        row = 0
        while row < len(running):
            if running[row].finish_reason is None:
                row += 1
                continue
            sampler.remove(running[row].sampler_row)
            last = running.pop()
            if row < len(running):
                running[row] = last
                if last.finish_reason is None:
                    cache.move_row(len(running), row, last.num_tokens)
