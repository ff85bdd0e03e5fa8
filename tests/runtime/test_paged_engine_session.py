"""The paged engine on the real `CudaSession`, on a GPU of C: row packing, feedback and captured steps between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import UsageError
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.paged_engine import PagedEngine
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampler import LogitsError
from qwen_rt.runtime.sampling_params import SamplingParams

from .byte_tokenizer import byte_tokenizer
from .cuda.fake import BROKEN, FakeGpu, compile_fake, continuation, make_graph, small_spec, write_shards

TOKENIZER = byte_tokenizer()
NUM_TOKENS = TOKENIZER.vocab_size
SPEC = small_spec()
LENGTHS = [3, 40, 17, 1, 90, 64, 16, 33, 129, 7, 65, 2]
LIMITS = [1, 30, 7, 50, 12, 2, 19, 40, 3, 25, 1, 33]
PROMPTS = [np.random.default_rng(n).integers(14, NUM_TOKENS, n).tolist() for n in LENGTHS]
TOKENS = [continuation(ids, limit, SPEC.vocab_size, NUM_TOKENS) for ids, limit in zip(PROMPTS, LIMITS, strict=True)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def session(library: Path, tmp_path: Path) -> Iterator[CudaSession]:
    gpu = FakeGpu(library)
    write_shards(SPEC, tmp_path)
    sizes: dict[str, Any] = {"max_rows": 5, "chunk_tokens": 32, "kv_memory": 4 << 20, "num_tokens": NUM_TOKENS}
    graph = make_graph(SPEC, tmp_path)
    with CudaSession.from_graph(
        graph, SPEC, 300, base_dir=tmp_path, platform=gpu.platform(), quiet=True, **sizes
    ) as session:
        yield session


def run(engine: PagedEngine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    requests = [
        Request(index, ids, one, 200 if one.max_tokens is None else one.max_tokens, TOKENIZER)
        for index, (ids, one) in enumerate(zip(prompts, params, strict=True))
    ]
    for _ in engine.run(requests):
        pass
    assert engine.pool.num_free == engine.pool.num_usable
    return [request.output_ids for request in requests]


def greedy(**more: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0} | more))


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_every_request_gets_what_the_model_says(session: CudaSession, max_num_seqs: int) -> None:
    engine = PagedEngine(session, NUM_TOKENS, max_num_seqs, check=session.check_params)
    params = [greedy(max_tokens=limit) for limit in LIMITS]
    assert run(engine, PROMPTS, params) == TOKENS
    assert run(engine, PROMPTS, params) == TOKENS


def test_a_stop_token_ends_where_it_comes(session: CudaSession) -> None:
    stops = [tokens[len(tokens) // 2] for tokens in TOKENS]
    ends = [tokens.index(stop) + 1 for tokens, stop in zip(TOKENS, stops, strict=True)]
    params = [greedy(max_tokens=n, stop_token_ids=(stop,)) for n, stop in zip(LIMITS, stops, strict=True)]
    found = run(PagedEngine(session, NUM_TOKENS, 4), PROMPTS, params)
    assert found == [tokens[:end] for tokens, end in zip(TOKENS, ends, strict=True)]


def test_closing_and_errors_leave_the_session_usable(session: CudaSession) -> None:
    engine = PagedEngine(session, NUM_TOKENS, 4, check=session.check_params)
    params = [greedy(max_tokens=limit) for limit in LIMITS]
    requests = [
        Request(i, ids, one, LIMITS[i], TOKENIZER) for i, (ids, one) in enumerate(zip(PROMPTS, params, strict=True))
    ]
    stream = engine.run(requests)
    for _ in range(11):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert run(engine, PROMPTS, params) == TOKENS
    with pytest.raises(LogitsError, match="NaN"):
        run(engine, [*PROMPTS[:3], [BROKEN, 20, 30]], [*params[:3], greedy(max_tokens=5)])
    assert run(engine, PROMPTS, params) == TOKENS
    every = range(NUM_TOKENS)
    many = greedy(logit_bias=dict.fromkeys(every, 1.0), min_tokens=1, stop_token_ids=tuple(every[1:]))
    with pytest.raises(UsageError, match="expected at most 512 on a GPU"):
        run(engine, PROMPTS[:1], [many])
