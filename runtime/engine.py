"""Continuous batching on one session: requests join when a row is free and leave when they end.

The running requests always occupy the rows 0 … A-1 of the cache, so a decode step is one call over a contiguous view.
When a request ends, the last row moves into its place: one copy of that row per request, none per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_rt.runtime.kv_cache import KVCache
from qwen_rt.runtime.outputs import StreamChunk
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampler import Sampler
from qwen_rt.runtime.session import CpuSession

__all__ = ["PREFILL_CHUNK", "Engine", "plan_prefill"]

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


class Engine:
    """Runs requests on a session.

    Args:
        session: The loaded graph.
        num_tokens: Tokens of the tokenizer: larger ids are padding of the embedding and never chosen.
        max_num_seqs: Most requests that run at once.
    """

    def __init__(self, session: CpuSession, num_tokens: int, max_num_seqs: int) -> None:
        self.session, self.num_tokens, self.max_num_seqs = session, num_tokens, max_num_seqs

    @property
    def capacity(self) -> int:
        """Tokens that prompt and output of one request can have together."""
        return self.session.max_length

    def run(self, requests: Sequence[Request]) -> Iterator[StreamChunk]:
        """Run requests to their end; yields a chunk for every token of every request, as it is chosen.

        The cache holds as many rows as run at once, each as long as the longest request can get. Closing the iterator
        ends all requests and frees the cache.
        """
        waiting = deque(sorted(requests, key=lambda request: len(request.prompt_ids)))  # alike ones prefill together
        num_rows = min(self.max_num_seqs, len(requests))
        capacity = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        cache = self.session.new_cache(num_rows, capacity)
        sampler = Sampler([], self.session.spec.vocab_size, [], num_tokens=self.num_tokens)
        running: list[Request] = []
        while waiting or running:
            joining = [waiting.popleft() for _ in range(min(num_rows - len(running), len(waiting)))]
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
        self, cache: KVCache, sampler: Sampler, first_row: int, requests: Sequence[Request]
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

    def _decode(self, cache: KVCache, sampler: Sampler, running: Sequence[Request]) -> Iterator[StreamChunk]:
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

    def _retire(self, cache: KVCache, sampler: Sampler, running: list[Request]) -> None:
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
