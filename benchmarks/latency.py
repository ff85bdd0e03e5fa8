"""What a run of `bench_latency` is made of: the points, the check before the timing, the arithmetic of the figures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.errors import VerificationError
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.runtime.cuda.memory import MemoryReport, block_bytes
from qwen_rt.runtime.cuda.weights import LoadStats
from qwen_rt.runtime.executor import PagedExecutor, RowState
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.spec import ModelSpec

__all__ = [
    "BASE_PROMPT",
    "Plan",
    "TimedSession",
    "check_tokens",
    "decode_metrics",
    "prefill_metrics",
    "session_metrics",
    "tie_of",
    "time_first_tokens",
    "time_steps",
    "token_metrics",
]

_NO_NUMBER = "no figure without a correct model: run the tests marked gpu"

BASE_PROMPT = 128
"""Prompt at which rows are compared."""

REQUEST_TOKENS = 128
"""Tokens between two timed prefills, as in the requests that the peers were measured with."""

CHECK_STEPS = 16
TIE = 0.5
"""Log probability that the token of a decode step may lie below the prefill's best one, and be taken for a tie.

The logits of random bf16 weights spread by about 1, the two paths differ by some 0.03 of that after tens of layers, and
the best of 150,000 leads by 0.2 on average: ties do occur, ten times that error does not.
"""
TIE_8BIT = 1.0
"""The same with 8-bit weights or caches: a prefill of more than 64 tokens rounds activations to 8 bits where decode
steps do not. Behind 28 random layers the logits differ by 0.12 of their spread (a simulation in float32), two of them
by 0.2 to 0.3; a wrong product leaves nothing of the order.
"""
MIN_EQUAL_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        rows: Rows that decode at once, each with a prompt of `BASE_PROMPT` tokens.
        prompts: Lengths, each with the fewest of `rows`.
        first_token_prompts: Prompts whose time to the first token is taken.
        steps: Decode steps of a point.
        repeats: Prefills of a prompt.
    """

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    first_token_prompts: tuple[int, ...] = ()
    steps: int = 64
    repeats: int = 5

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """(rows, prompt) of every decode point, none twice."""
        by_rows = [(rows, BASE_PROMPT) for rows in self.rows]
        return tuple(dict.fromkeys(by_rows + [(min(self.rows), prompt) for prompt in self.prompts]))

    @property
    def max_length(self) -> int:
        """Positions that a row needs at most: whole blocks, with room for steps that warm up."""
        longest = max(*(prompt for _, prompt in self.points), *self.first_token_prompts, 2 * BASE_PROMPT)
        return -(-(longest + max(2 * self.steps, REQUEST_TOKENS) + BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def max_rows(self) -> int:
        """Rows that the session must take; the check needs two."""
        return max(*self.rows, 2)

    def kv_bytes(self, spec: ModelSpec, kv_format: str = "bf16") -> int:
        """Bytes of a cache that holds the largest point, and the scratch block."""

        def blocks(prompt: int) -> int:
            return -(-(prompt + 2 * self.steps + BLOCK_SIZE) // BLOCK_SIZE)

        most = max(rows * blocks(prompt) for rows, prompt in self.points)
        num_blocks = 1 + max(most, self.max_length // BLOCK_SIZE)
        return num_blocks * block_bytes(spec, kv_format)


class TimedSession(PagedExecutor, Protocol):
    """What is timed: `qwen_rt.runtime.cuda.session.CudaSession`."""

    host_seconds: float
    steps: int

    def time_decode(self, rows: int, prompt: int, steps: int) -> list[float]:
        """Return the ms of each step."""
        ...

    def time_prefill(self, tokens: int, repeats: int) -> list[float]:
        """Return the ms of each prefill, the first token chosen."""
        ...

    @property
    def load_stats(self) -> LoadStats:
        """How the weights were loaded."""
        ...

    def memory_report(self) -> MemoryReport:
        """Return bytes by use."""
        ...


def tie_of(precision: str, kv_format: str) -> float:
    """Return what counts as a tie between decode steps and prefills of a model."""
    return TIE_8BIT if precision in ("fp8", "int8") or kv_format != "bf16" else TIE


def check_tokens(session: PagedExecutor, steps: int = CHECK_STEPS, tie: float = TIE) -> dict[str, Any]:
    """Compare the greedy tokens of decode steps with those of prefills of the same tokens.

    Args:
        session: Random or real weights.
        steps: Tokens of each of two sequences.
        tie: What counts as one.

    Returns:
        What a row says of its check.

    Raises:
        VerificationError: A log probability is not finite, or the tokens differ by more than ties.
    """
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=steps, logprobs=20)
    lengths = (BLOCK_SIZE + 6, 33)
    blocks_per_row = -(-(max(lengths) + steps) // BLOCK_SIZE)

    def state(index: int, prompt: Sequence[int]) -> RowState:
        first = 1 + index * blocks_per_row
        return RowState(tuple(prompt), params, 0, tuple(range(first, first + blocks_per_row)))

    rows = [state(i, rng.integers(0, session.spec.vocab_size, n).tolist()) for i, n in enumerate(lengths)]
    for row in rows:
        row.output_ids.append(_prefill(session, row)[0])
    session.set_rows(rows)
    for _ in range(steps - 1):
        result = session.wait_step(session.launch_step())
        for row, token, logprobs in zip(rows, result.token_ids.tolist(), result.logprobs, strict=True):
            if logprobs is None or not np.isfinite(logprobs.logprob):
                raise VerificationError("a decode step gave logits that are not finite", "finite ones", _NO_NUMBER)
            row.output_ids.append(token)
    num_equal, gaps = 0, []
    for index, row in enumerate(rows):
        for count in range(1, steps):
            token, top = _prefill(session, state(index, [*row.prompt_ids, *row.output_ids[:count]]))
            num_equal += token == row.output_ids[count]
            gaps.append(max(top.values()) - top.get(row.output_ids[count], -np.inf))
    share = num_equal / len(gaps)
    if share < MIN_EQUAL_SHARE or max(gaps) > tie:
        raise VerificationError(
            f"of {len(gaps)} decode steps {num_equal} chose the token that a prefill chooses, the worst one lies "
            f"{max(gaps):.3g} below it",
            f"{MIN_EQUAL_SHARE:.0%} equal, the others ties within {tie}",
            _NO_NUMBER,
        )
    what = f"greedy tokens of {len(gaps)} decode steps against prefills of the same tokens"
    return {"passed": True, "what": what, "equal_share": round(share, 4), "worst_tie": round(float(max(gaps)), 4)}


def _prefill(session: PagedExecutor, row: RowState) -> tuple[int, dict[int, float]]:
    """Feed a prompt in chunks; return the first token, and the log probability of each of the best ones."""
    ids = np.array(row.prompt_ids, np.int64)
    starts = range(0, len(ids), session.chunk_tokens)
    result = None
    for start in starts:
        chunk = ids[start : start + session.chunk_tokens]
        result = session.prefill(row, chunk, start, is_last=start == starts[-1])
    logprobs = None if result is None else result.logprobs[0]
    if result is None or logprobs is None or not np.isfinite(logprobs.top_logprobs).all():
        raise VerificationError("a prefill gave logits that are not finite", "finite ones", _NO_NUMBER)
    return int(result.token_ids[0]), dict(zip(logprobs.top_ids.tolist(), logprobs.top_logprobs.tolist(), strict=True))


def time_steps(
    session: TimedSession, rows: int, prompt: int, steps: int, warm_up: int = 4
) -> tuple[list[float], float]:
    """Time decode steps as the engine runs them: one is launched before the one before it is read.

    Args:
        session: What happens to be in its cache is taken for the prompt.
        rows: Decode rows.
        prompt: Tokens of each row before the first step.
        steps: How many are timed.
        warm_up: Steps before those.

    Returns:
        Milliseconds from one step's tokens to the next's, on the host's clock; and the host's µs of a step, the median.
    """
    count = warm_up + steps
    each = -(-(prompt + count + 2) // BLOCK_SIZE)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    ids = tuple(token % session.spec.vocab_size for token in range(prompt))
    states = [RowState(ids, params, 0, tuple(range(1 + i * each, 1 + (i + 1) * each)), [0]) for i in range(rows)]
    session.set_rows(states)
    under_way = session.launch_step()
    times, host_times = [], []
    for _ in range(count):
        following = session.launch_step()
        session.wait_step(under_way)
        times.append(perf_counter())
        host_times.append(session.host_seconds)
        under_way = following
    session.wait_step(under_way)
    samples = [1e3 * (after - before) for before, after in itertools.pairwise(times[warm_up - 1 :])]
    spent = [1e6 * (after - before) for before, after in itertools.pairwise(host_times[warm_up - 1 :])]
    return samples, statistics.median(spent)


def decode_metrics(
    shape: ModelShape,
    floor_bytes: int,
    rows: int,
    prompt: int,
    samples_ms: Sequence[float],
    device_ms: Sequence[float],
    host_us: float,
    bandwidth: float,
    kv_format: str = "bf16",
) -> dict[str, Any]:
    """Return the metrics of a decode point.

    Args:
        shape: The model.
        floor_bytes: Stored bytes of all linear weights and the LM head.
        rows: Decode rows.
        prompt: Tokens of every row before the first step.
        samples_ms: Time of each step on the host's clock.
        device_ms: Time of each step on the device's, launched back to back.
        host_us: What the host spent on a step.
        bandwidth: Bytes a second of plain reads, measured in this run.
        kv_format: Of the KV cache.
    """
    return {
        "itl_ms": harness.summarize(samples_ms, 5),
        "device_ms": harness.summarize(device_ms, 5),
        **token_metrics(shape, floor_bytes, rows, prompt, samples_ms, bandwidth, kv_format),
        "host_us": host_us,
    }


def token_metrics(
    shape: ModelShape,
    floor_bytes: int,
    rows: int,
    prompt: int,
    samples_ms: Sequence[float],
    bandwidth: float,
    kv_format: str = "bf16",
) -> dict[str, Any]:
    """Return what a decode point of any engine has: ms a token, floors, ratios, tok/s; arguments: `decode_metrics`."""
    itl_ms = harness.percentile(samples_ms, 0.5)
    floor_ms = floor_bytes / bandwidth * 1e3
    with_kv_ms = floor_ms + shape.kv_bytes(rows * (prompt + 1), kv_format) / bandwidth * 1e3
    return {
        "itl_ms": harness.summarize(samples_ms, 5),
        "floor_ms": floor_ms,
        "floor_with_kv_ms": with_kv_ms,
        "itl_to_floor_ratio": itl_ms / floor_ms,
        "itl_to_floor_with_kv_ratio": itl_ms / with_kv_ms,
        "decode_tok_s": rows * 1e3 / itl_ms,
    }


def time_first_tokens(session: TimedSession, prompt: int, repeats: int) -> tuple[list[float], list[float]]:
    """Time prefills as requests come, and back to back.

    A request is a prefill and `REQUEST_TOKENS` decode steps, as the peers were measured. Prefills without a pause heat
    the GPU until it lowers its clock, so each takes longer than the first.

    Returns:
        Milliseconds to the first token of every request, and of as many prefills one right after the other.
    """
    samples: list[float] = []
    for _ in range(repeats):
        session.time_decode(1, prompt, REQUEST_TOKENS)
        samples += session.time_prefill(prompt, 1)
    return samples, session.time_prefill(prompt, repeats)


def prefill_metrics(
    shape: ModelShape,
    tokens: int,
    samples_ms: Sequence[float],
    back_to_back_ms: Sequence[float],
    matrix_rate: float | None,
    matrix_rate_fp8: float | None = None,
) -> dict[str, Any]:
    """Return the metrics of a prefill; the rates of matrix products, bf16 and fp8, are in operations a second."""
    rate = shape.prefill_flops(tokens) / (harness.percentile(samples_ms, 0.5) * 1e-3)
    metrics: dict[str, Any] = {"first_token_ms": harness.summarize(samples_ms, 5), "prefill_tflop_s": rate / 1e12}
    if back_to_back_ms:
        metrics["first_token_back_to_back_ms"] = harness.summarize(back_to_back_ms, 5)
    if matrix_rate is not None:
        metrics |= {"matrix_tflop_s": matrix_rate / 1e12, "share_of_matrix_ratio": rate / matrix_rate}
    if matrix_rate_fp8 is not None:
        metrics["matrix_fp8_tflop_s"] = matrix_rate_fp8 / 1e12
    return metrics


def session_metrics(
    session: TimedSession,
    driver_bytes: int,
    load_s: float,
    first_token_s: float | None,
    weights_load_gb_s: float | None,
    host_us: Sequence[float],
) -> dict[str, Any]:
    """Return the metrics of a session.

    Args:
        session: Whose memory is reported.
        driver_bytes: What the driver had less after loading than before.
        load_s: Seconds until the session was there.
        first_token_s: Seconds from the start of the process to the first token of a prompt of `BASE_PROMPT` tokens,
            without what only the benchmark does; None where an earlier model was in the way.
        weights_load_gb_s: Rate at which files became weights on the device; None where they are random.
        host_us: Host time of a step at every timed point.
    """
    uses = ("weights", "kv_cache", "workspace", "buffers", "runtime")
    report = session.memory_report()
    metrics: dict[str, Any] = {"load_s": load_s}
    if first_token_s is not None:
        metrics["start_to_first_token_s"] = first_token_s
    if weights_load_gb_s is not None:
        metrics["weights_load_gb_s"] = weights_load_gb_s
    metrics |= {f"{use}_gb": getattr(report, use) / 1e9 for use in uses}
    metrics |= {
        "kv_tokens": (session.num_blocks - 1) * BLOCK_SIZE,
        "chunk_tokens": session.chunk_tokens,
        "total_gb": report.total / 1e9,
        "driver_gb": driver_bytes / 1e9,
        "memory_difference_ratio": abs(report.total - driver_bytes) / max(1, driver_bytes),
    }
    return metrics | ({"slowest_host_us": max(host_us)} if host_us else {})
