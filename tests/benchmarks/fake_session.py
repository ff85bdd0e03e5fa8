"""A stand-in for a session: tokens follow from the tokens before by arithmetic, times are made up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.runtime.cuda.memory import MemoryReport
from qwen_rt.runtime.cuda.weights import LoadStats
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import SampleResult, TokenLogprobs
from qwen_rt.spec import ModelSpec


class FakeSession:
    """Prefill and decode agree, but for what the arguments say.

    Args:
        wrong_steps: Decode steps whose token is another one.
        tie: How far the wrong token lies below the best one; None: not among the best 20.
        nan_in: `decode` or `prefill`: whose log probabilities are not finite.
    """

    block_size, num_blocks, max_rows, chunk_tokens, max_length = 64, 500, 64, 32, 32768

    def __init__(self, wrong_steps: Sequence[int] = (), tie: float | None = None, nan_in: str = "") -> None:
        self.spec = ModelSpec.from_config(SHAPES["7b"].config())
        self.wrong_steps, self.tie, self.nan_in = wrong_steps, tie, nan_in
        self.host_seconds, self.steps, self.waited = 0.0, 0, 0
        self.load_stats = LoadStats(15_000_000_000, 1.25)
        self.fed: dict[tuple[int, ...], list[int]] = {}
        self.rows: list[list[int]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.clock_s = 0.0

    def _next(self, tokens: Sequence[int], *, wrong: bool = False, nan: bool = False) -> tuple[int, TokenLogprobs]:
        digest = hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()
        best = int.from_bytes(digest[:4], "little") % self.spec.vocab_size
        other = (best + 1) % self.spec.vocab_size
        tops = [best, *(range(20) if self.tie is None else [other])]
        values = [-1.0, *([-9.0] * 20 if self.tie is None else [-1.0 - self.tie])]
        if nan:
            values = [float("nan")] * len(values)
        logprobs = TokenLogprobs(values[0], np.array(tops, np.int64), np.array(values))
        return other if wrong else best, logprobs

    def prefill(
        self, row: RowState, token_ids: NDArray[np.int64], position: int, *, is_last: bool
    ) -> SampleResult | None:
        assert 1 <= len(token_ids) <= self.chunk_tokens
        fed = [*self.fed.get(row.blocks, [])[:position], *token_ids.tolist()]
        self.fed[row.blocks] = fed
        if not is_last:
            return None
        assert fed == list(row.prompt_ids)
        token, logprobs = self._next(fed, nan=self.nan_in == "prefill")
        return SampleResult(np.array([token]), (logprobs,))

    def set_rows(self, rows: Sequence[RowState]) -> None:
        assert self.steps == self.waited, "no step may be under way"
        assert all(len(row.blocks) * self.block_size > row.position for row in rows)
        assert len({block for row in rows for block in row.blocks}) == sum(len(row.blocks) for row in rows)
        assert all(1 <= block < self.num_blocks for row in rows for block in row.blocks)
        self.rows = [[*row.prompt_ids, *row.output_ids] for row in rows]

    def launch_step(self) -> int:
        self.steps += 1
        self.host_seconds += 20e-6 + 1e-6 * len(self.rows)
        assert self.steps - self.waited <= 2, "at most two steps may be under way"
        return self.steps

    def wait_step(self, number: int) -> SampleResult:
        self.waited += 1
        self.clock_s += 1e-3 * (3.55 + 0.01 * len(self.rows))
        assert number == self.waited, "steps are read in order"
        found = [self._next(row, wrong=number in self.wrong_steps, nan=self.nan_in == "decode") for row in self.rows]
        for row, (token, _) in zip(self.rows, found, strict=True):
            row.append(token)
        return SampleResult(np.array([token for token, _ in found]), tuple(logprobs for _, logprobs in found))

    def time_decode(self, rows: int, prompt: int, steps: int) -> list[float]:
        self.calls.append(("decode", rows, prompt, steps))
        return [3.5 + 0.01 * rows + prompt * 1e-5] * steps

    def time_prefill(self, tokens: int, repeats: int) -> list[float]:
        self.calls.append(("prefill", tokens, repeats))
        return [tokens / 60.0] * repeats

    def memory_report(self) -> MemoryReport:
        return MemoryReport(15 * 10**9, 4 * 10**9, 10**8, 10**8, 8 * 10**8, 20 * 10**9)

    def close(self) -> None:
        self.calls.append(("close",))
