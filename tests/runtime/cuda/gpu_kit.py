"""Requests for a session on a real GPU, and what one makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import SampleResult
from qwen_rt.runtime.sampling_params import SamplingParams

MEGABYTE = 1 << 20
KV_BYTES = 256 * MEGABYTE


def make_rows(session: CudaSession, lengths: list[int], **params: Any) -> list[RowState]:
    """Requests of these prompt lengths, each with blocks for 200 tokens more, none shared."""
    rng, rows, free = np.random.default_rng(5), [], iter(range(1, session.num_blocks))
    given = SamplingParams(**{"temperature": 0.0, "logprobs": 5, **params})
    for index, length in enumerate(lengths):
        prompt = tuple(rng.integers(0, session.spec.vocab_size, length).tolist())
        blocks = tuple(next(free) for _ in range(-(-(length + 200) // session.block_size)))
        rows.append(RowState(prompt, given, 1000 + index, blocks))
    return rows


def feed(session: CudaSession, row: RowState) -> SampleResult:
    prompt = np.array(row.prompt_ids, np.int64)
    result = None
    for start in range(0, len(prompt), session.chunk_tokens):
        chunk = prompt[start : start + session.chunk_tokens]
        result = session.prefill(row, chunk, start, is_last=start + len(chunk) == len(prompt))
    assert result is not None
    row.output_ids = result.token_ids.tolist()
    return result


def run(session: CudaSession, rows: list[RowState], steps: int) -> list[SampleResult]:
    session.set_rows(rows)
    results = [session.wait_step(session.launch_step()) for _ in range(steps)]
    for result in results:
        for row, token in zip(rows, result.token_ids.tolist(), strict=True):
            row.output_ids.append(token)
    return results
