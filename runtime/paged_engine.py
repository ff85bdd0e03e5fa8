"""Continuous batching over a paged cache, with the host one step behind the device.

While the device runs step n + 1, the tokens of step n become text here: a step is launched before the one before it is
waited for. A request whose end shows only in the token of step n (a stop token, a stop string) has run in step n + 1
too; that token is dropped. An end by length is known beforehand, and nothing is launched beyond it.

A request gets the cache blocks of its whole possible length when it is admitted. So it is never preempted; while blocks
or rows are short, those after it wait, in order. Prompts are read one request at a time in chunks of a fixed size, so
what a prompt computes depends on nothing but itself. Between two decode steps the running rows wait for at most
`chunk_tokens` tokens of prompts.

The order of calls, for a set of rows that changes after step 2:

    prefill …  set_rows  launch 0  launch 1  wait 0  launch 2  wait 1  wait 2  prefill …  set_rows  launch 3 …

A prompt is read, and a set of rows replaced, only while no step is under way.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.block_pool import BlockPool
from qwen_rt.runtime.executor import PagedExecutor, RowState
from qwen_rt.runtime.outputs import StreamChunk
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampler import Sampler, SampleResult
from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["PagedEngine"]

_MAX_UNDER_WAY = 2


@dataclass(eq=False)
class _Row:
    """A request that has cache blocks."""

    request: Request
    state: RowState
    num_read: int = 0  # prompt tokens that have been fed


@dataclass(frozen=True)
class _Step:
    """A launched step and the rows that took part."""

    number: int
    rows: tuple[_Row, ...]


class PagedEngine:
    """Runs requests on an executor.

    Several iterators of `run` may be open at once: the executor works for the one that is asked for its next token.
    All calls come from one thread.

    Args:
        executor: The device.
        num_tokens: Tokens of the tokenizer: larger ids are padding of the embedding and never chosen.
        max_num_seqs: Most requests that run at once; the executor's `max_rows` bounds it too.
        check: Raises `UsageError` for settings that the executor cannot follow, though the sampler on the CPU could.

    Attributes:
        pool: Which cache blocks are free.
    """

    def __init__(
        self,
        executor: PagedExecutor,
        num_tokens: int,
        max_num_seqs: int,
        *,
        check: Callable[[SamplingParams], object] | None = None,
    ) -> None:
        self.executor, self.num_tokens, self._check_params = executor, num_tokens, check
        self.max_num_seqs = min(max_num_seqs, executor.max_rows)
        self.pool = BlockPool(executor.num_blocks, executor.block_size)
        self._owner: _Run | None = None
        self._is_closed = False

    @property
    def capacity(self) -> int:
        """Tokens that prompt and output of one request can have together when nothing else runs."""
        return min(self.executor.max_length, self.pool.num_usable * self.pool.block_size)

    def run(self, requests: Sequence[Request]) -> Iterator[StreamChunk]:
        """Run requests to their end; yields a chunk for every token of every request.

        Closing the iterator ends all its requests and returns their cache blocks.

        Args:
            requests: They are admitted in this order.

        Returns:
            The chunks; nothing runs before the first is asked for.

        Raises:
            CapacityError: A request can never fit into the cache; or, from the iterator, blocks that it needs are held
                by another iterator that has not ended.
            UsageError: Sampling settings that do not fit the vocabulary; or, from the iterator, the engine was closed.
        """
        for request in requests:
            self._check(request)
        return _Run(self, requests).chunks()

    def close(self) -> None:
        """Wait for what is under way and run nothing more; the executor stays open. Closing twice does nothing."""
        self._is_closed = True
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.drain()

    def blocks_of(self, request: Request) -> int:
        """How many blocks a request may need.

        The last token is never fed, so that prompt and `max_tokens` together are one position more than it writes.
        """
        return self.pool.blocks_for(len(request.prompt_ids) + request.max_tokens)

    def claim(self, run: _Run) -> None:
        """Let the executor work for `run`; one that it worked for before keeps what it has launched."""
        if self._is_closed:
            raise UsageError("the model is closed", "an open one", "load the bundle again")
        owner, self._owner = self._owner, run
        if owner is not None and owner is not run:
            owner.pause()

    def release(self, run: _Run) -> None:
        """Forget a run that has ended."""
        if self._owner is run:
            self._owner = None

    def _check(self, request: Request) -> None:
        """Refuse what could never run, or what the sampler would refuse later."""
        num_prompt, most = len(request.prompt_ids), request.max_tokens
        if num_prompt + most > self.executor.max_length:
            raise CapacityError(
                f"request {request.index} has {num_prompt} prompt tokens and max_tokens={most}",
                f"at most max_length={self.executor.max_length} together",
                "lower max_tokens, or build the bundle with a larger --max-length",
            )
        needed = self.blocks_of(request)
        if needed > self.pool.num_usable:
            raise CapacityError(
                f"request {request.index} has {num_prompt} prompt tokens and max_tokens={most}: {needed} cache blocks",
                f"at most {self.pool.num_usable} of {self.pool.block_size} tokens, all that the KV cache has",
                "lower max_tokens or raise --kv-memory",
            )
        vocab_size = self.executor.spec.vocab_size
        Sampler([request.params], vocab_size, [request.prompt_ids], num_tokens=self.num_tokens)
        if self._check_params is not None:
            self._check_params(request.params)


class _Run:
    """The state of one call of `run`.

    Attributes:
        waiting: Requests without cache blocks.
        reading: The request whose prompt is being read.
        rows: The decoding rows, in order; those that have ended stay until no step is under way.
        under_way: Steps that were launched and not waited for, all over `rows`.
    """

    def __init__(self, engine: PagedEngine, requests: Sequence[Request]) -> None:
        self.engine, self.executor, self.pool = engine, engine.executor, engine.pool
        self.waiting = deque(requests)
        self.reading: _Row | None = None
        self.rows: list[_Row] = []
        self.under_way: deque[_Step] = deque()
        self._unprocessed: deque[tuple[_Step, SampleResult]] = deque()
        self._is_told = False  # whether the executor's rows are ours
        self._finished: list[StreamChunk] = []  # chunks to yield when the device has work again

    def chunks(self) -> Iterator[StreamChunk]:
        """The loop: read prompts, launch, hand out what is known, wait for the older step."""
        try:
            self.engine.claim(self)
            while self.waiting or self.reading or self.rows:
                self._process()
                if not self.under_way:
                    self._retire()
                    yield from self._read_prompts()
                    self._tell_rows()
                self._launch()
                yield from self._hand_out()
                if self.under_way:
                    self._wait()
            yield from self._finished
        finally:
            self._end()

    def drain(self) -> None:
        """Wait for every step under way, whatever comes of it: nobody wants the tokens any more."""
        while self.under_way:
            step = self.under_way.popleft()
            with contextlib.suppress(Exception):  # what ended the run is the error to tell, not one that follows it
                self.executor.wait_step(step.number)

    def pause(self) -> None:
        """Leave the executor to another run; the tokens of steps under way are kept.

        An error of such a step is not the other run's to tell: the step is dropped, and as the rows are told anew it
        runs again, and fails again, when this run goes on.
        """
        self._is_told = False
        try:
            with contextlib.suppress(Exception):
                while self.under_way:
                    self._wait()
        finally:
            self.drain()

    def _end(self) -> None:
        try:
            self.drain()
        finally:
            held = self.rows if self.reading is None else [*self.rows, self.reading]
            self.rows, self.reading = [], None
            self.waiting.clear()
            for row in held:
                self.pool.free(row.state.blocks)
            self.engine.release(self)

    def _hand_out(self) -> Iterator[StreamChunk]:
        finished, self._finished = self._finished, []
        yield from finished
        self.engine.claim(self)  # who got the chunks may have asked another run for its own

    # ---------------------------------------------------------------- prompts

    def _read_prompts(self) -> Iterator[StreamChunk]:
        """Read chunks of prompts: as many as can join, or, if rows are running, `chunk_tokens` tokens at most."""
        budget = self.executor.chunk_tokens
        while (row := self._next_to_read()) is not None:
            prompt = row.state.prompt_ids
            stop = min(row.num_read + self.executor.chunk_tokens, len(prompt))
            num_chunk = stop - row.num_read
            if self.rows and num_chunk > budget:
                return
            budget -= num_chunk
            token_ids = np.array(prompt[row.num_read : stop], np.int64)
            is_last = stop == len(prompt)
            result = self.executor.prefill(row.state, token_ids, row.num_read, is_last=is_last)
            row.num_read = stop
            if result is not None:
                self._append(row, int(result.token_ids[0]), result, 0)
                self._join(row)
                yield from self._hand_out()
        if not self.rows and self.waiting:
            raise CapacityError(
                f"request {self.waiting[0].index} needs {self.engine.blocks_of(self.waiting[0])} cache blocks",
                f"at most {self.pool.num_free}: another stream holds the others",
                "finish or close that stream first, or raise --kv-memory",
            )

    def _next_to_read(self) -> _Row | None:
        """The request whose prompt is being read, or the next one if it fits."""
        if self.reading is None and self._can_admit():
            request = self.waiting.popleft()
            blocks = self.pool.allocate(self.engine.blocks_of(request))
            seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
            self.reading = _Row(request, RowState(request.prompt_ids, request.params, seed, blocks, request.output_ids))
        return self.reading

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.rows) >= self.engine.max_num_seqs:
            return False
        return self.engine.blocks_of(self.waiting[0]) <= self.pool.num_free

    def _join(self, row: _Row) -> None:
        """Let a request whose prompt has been read decode, unless its first token was its last."""
        self.reading = None
        if row.request.finish_reason is None:
            self.rows.append(row)
            self._is_told = False
        else:
            self.pool.free(row.state.blocks)

    # ---------------------------------------------------------------- steps

    def _tell_rows(self) -> None:
        if self.rows and not self._is_told:
            self.executor.set_rows([row.state for row in self.rows])
            self._is_told = True

    def _launch(self) -> None:
        """Launch up to two steps; one, where prompts are to be read after it; none beyond the end of a row."""
        most = 1 if self.reading is not None or self._can_admit() else _MAX_UNDER_WAY
        while len(self.under_way) < most and self.rows and all(map(self._goes_on, self.rows)):
            self.under_way.append(_Step(self.executor.launch_step(), tuple(self.rows)))

    def _goes_on(self, row: _Row) -> bool:
        """Whether a row, for all that is known, needs another token after those under way."""
        request = row.request
        return request.finish_reason is None and len(request.output_ids) + len(self.under_way) < request.max_tokens

    def _wait(self) -> None:
        step = self.under_way[0]  # stays there if the wait is interrupted, for `drain`
        self._unprocessed.append((step, self.executor.wait_step(step.number)))
        self.under_way.popleft()

    def _process(self) -> None:
        """Turn tokens into text, in the time of the step that was launched after theirs."""
        while self._unprocessed:
            step, result = self._unprocessed.popleft()
            for index, (row, token_id) in enumerate(zip(step.rows, result.token_ids.tolist(), strict=True)):
                if row.request.finish_reason is None:
                    self._append(row, token_id, result, index)

    def _append(self, row: _Row, token_id: int, result: SampleResult, index: int) -> None:
        self._finished.append(row.request.append(token_id, result.logprobs[index]))

    def _retire(self) -> None:
        """Return the blocks of rows that have ended; the others close up, in order."""
        ended = [row for row in self.rows if row.request.finish_reason is not None]
        if ended:
            self.rows = [row for row in self.rows if row.request.finish_reason is None]
            self._is_told = False
            for row in ended:
                self.pool.free(row.state.blocks)
