"""A session on the fake GPU, and requests for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import SampleResult

from .fake import FakeGpu, make_graph, small_spec, write_shards

SPEC = small_spec()
VOCAB = SPEC.vocab_size
MAX_LENGTH = 300


def open_session(gpu: FakeGpu, folder: Path, kv_format: str = "bf16", **settings: Any) -> CudaSession:
    if not any(folder.iterdir()):
        write_shards(SPEC, folder)
    given = {"max_rows": 12, "chunk_tokens": 32, "kv_memory": 4 << 20, "quiet": True, **settings}
    graph = make_graph(SPEC, folder, kv_format=kv_format)
    return CudaSession.from_graph(graph, SPEC, MAX_LENGTH, base_dir=folder, platform=gpu.platform(), **given)


def feed(session: CudaSession, row: RowState) -> SampleResult:
    """Prefill a request in chunks and append its first token."""
    prompt = np.array(row.prompt_ids, np.int64)
    for start in range(0, len(prompt), session.chunk_tokens):
        chunk = prompt[start : start + session.chunk_tokens]
        is_last = start + len(chunk) == len(prompt)
        result = session.prefill(row, chunk, start, is_last=is_last)
        assert (result is None) != is_last
    assert result is not None
    row.output_ids.append(int(result.token_ids[0]))
    return result


def decode(session: CudaSession, rows: list[RowState], steps: int) -> list[SampleResult]:
    """Run steps, one ahead of the reading, as the engine does."""
    session.set_rows(rows)
    results = []
    number = session.launch_step()
    for step in range(steps):
        following = session.launch_step() if step + 1 < steps else -1
        results.append(session.wait_step(number))
        for row, token in zip(rows, results[-1].token_ids.tolist(), strict=True):
            row.output_ids.append(token)
        number = following
    return results


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(14, VOCAB, length).tolist()
