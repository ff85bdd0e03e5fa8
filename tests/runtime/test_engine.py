"""Continuous batching: what a request gets does not depend on who else runs, how many rows there are, or the order."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import UsageError
from qwen_rt.runtime.engine import PREFILL_CHUNK, Engine, plan_prefill
from qwen_rt.runtime.kv_cache import KVCache
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.outputs import RequestOutput, StreamChunk
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32

from ..compare import assert_close

QUESTIONS = [
    "What is 17 + 25?",
    "What is 4085 - 917?",
    "What is 12 * 34?",
    "Solve 3x + 5 = 20.",
    "Elena sells 31 marbles in the morning and 42 marbles at noon at $9 each. How many dollars does Elena earn?",
    "What is 99999 + 1?",
    "Solve 7x - 3 = 2x + 12.",
    "What is 8 + 8?",
    "What is 123 * 45?",
]


def run(
    llm: LLM, max_num_seqs: int, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Request]:
    requests = llm._requests(prompts, params, {})
    chunks = list(Engine(llm.session, llm.tokenizer.vocab_size, max_num_seqs).run(requests))
    check_chunks(chunks, [request.output() for request in requests])
    return requests


def check_chunks(chunks: Sequence[StreamChunk], outputs: Sequence[RequestOutput]) -> None:
    """What is streamed is what is returned, and exactly the last chunk of a request says why it ended."""
    for index, output in enumerate(outputs):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert tuple(chunk.token_id for chunk in own) == output.token_ids
        assert "".join(chunk.text for chunk in own) == output.text
        assert [chunk.finish_reason for chunk in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == output.finish_reason


@pytest.fixture(scope="module")
def prompts(nano: LLM) -> list[list[int]]:
    return [nano.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def mixed_params(sampled: bool) -> list[SamplingParams]:
    """Every request ends after another number of tokens, for another reason."""
    choices: dict[str, Any] = {"temperature": 0.8, "top_k": 20} if sampled else {"temperature": 0.0}
    return [
        SamplingParams(max_tokens=limit, seed=1000 + i if sampled else None, **choices)
        for i, limit in enumerate([1, 30, 7, 100, 60, 2, 19, 100, 45])
    ]


@pytest.fixture(scope="module")
def alone(nano: LLM, prompts: list[list[int]]) -> dict[bool, list[tuple[int, ...]]]:
    """Tokens of every request when it is the only one."""
    return {
        sampled: [
            run(nano, 1, [p], [s])[0].output().token_ids for p, s in zip(prompts, mixed_params(sampled), strict=True)
        ]
        for sampled in (False, True)
    }


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("order_seed", [0, 1, 2])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 100])
def test_results_do_not_depend_on_batch_mates(
    nano: LLM,
    prompts: list[list[int]],
    alone: dict[bool, list[tuple[int, ...]]],
    max_num_seqs: int,
    order_seed: int,
    sampled: bool,
) -> None:
    order = list(range(len(prompts)))
    random.Random(order_seed).shuffle(order)
    params = mixed_params(sampled)
    requests = run(nano, max_num_seqs, [prompts[i] for i in order], [params[i] for i in order])
    for request, index in zip(requests, order, strict=True):
        assert request.output().token_ids == alone[sampled][index], QUESTIONS[index]


def test_logits_in_a_batch_are_those_of_the_request_alone(nano: LLM, prompts: list[list[int]]) -> None:
    params = [SamplingParams(max_tokens=limit, temperature=0.0, logprobs=5) for limit in (4, 12, 3, 9, 6, 2, 12, 12, 5)]
    together = run(nano, 4, prompts, params)
    for request, prompt, setting in zip(together, prompts, params, strict=True):
        (single,) = run(nano, 1, [prompt], [setting])
        expected, found = single.output().logprobs, request.output().logprobs
        assert len(found) == len(expected) == len(request.output_ids)
        for a, b in zip(found, expected, strict=True):
            assert_close(a.top_logprobs, b.top_logprobs, relative=CHUNKING_RELATIVE_FP32)


def test_equal_requests_get_equal_results(nano: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20)
    requests = run(nano, 3, [prompts[0]] * 5, [params] * 5)
    assert len({request.output().token_ids for request in requests}) == 1


class Recorder:
    """A session that notes its caches and calls."""

    def __init__(self, llm: LLM) -> None:
        self.session, self.spec = llm.session, llm.session.spec
        self.caches: list[weakref.ref[KVCache]] = []
        self.sizes: list[tuple[int, int]] = []
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        cache = self.session.new_cache(num_rows, capacity)
        for array in (*cache.keys, *cache.values):
            array[:] = np.nan  # a row that was not written must not be read
        self.caches.append(weakref.ref(cache))
        self.sizes.append((num_rows, capacity))
        return cache

    def run(self, cache: KVCache, first_row: int, input_ids: Any, write_indices: Any, logits_indices: Any) -> Any:
        self.calls.append((first_row, input_ids.shape))
        assert first_row + input_ids.shape[0] <= cache.num_rows
        assert (write_indices + input_ids.shape[1] <= cache.capacity).all()
        if min(input_ids.shape) > 1:
            assert not write_indices.any()  # what the CPU graph allows
        logits = self.session.run(cache, first_row, input_ids, write_indices, logits_indices)
        assert np.isfinite(logits).all()
        return logits


@pytest.mark.parametrize("max_num_seqs", [1, 3, 50])
def test_the_cache_is_as_large_as_needed_and_stays_within_it(
    nano: LLM, prompts: list[list[int]], alone: dict[bool, list[tuple[int, ...]]], max_num_seqs: int
) -> None:
    recorder = Recorder(nano)
    requests = nano._requests(prompts, mixed_params(False), {})
    list(Engine(recorder, nano.tokenizer.vocab_size, max_num_seqs).run(requests))  # type: ignore[arg-type]
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    assert recorder.sizes == [(min(max_num_seqs, len(prompts)), longest)]
    assert [request.output().token_ids for request in requests] == alone[False]
    gc.collect()
    assert recorder.caches[0]() is None


def test_decoding_is_one_call_a_step_for_all_rows(nano: LLM, prompts: list[list[int]]) -> None:
    recorder = Recorder(nano)
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    requests = nano._requests(prompts[:4], params, {})
    list(Engine(recorder, nano.tokenizer.vocab_size, 4).run(requests))  # type: ignore[arg-type]
    assert [call for call in recorder.calls if call[1][1] == 1] == [(0, (4, 1))] * 9


def test_closing_the_iterator_frees_the_cache(nano: LLM, prompts: list[list[int]]) -> None:
    recorder = Recorder(nano)
    requests = nano._requests(prompts, SamplingParams(max_tokens=50, temperature=0.0), {})
    stream = Engine(recorder, nano.tokenizer.vocab_size, 4).run(requests)  # type: ignore[arg-type]
    for _ in range(13):
        next(stream)
    assert recorder.caches[0]() is not None
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert recorder.caches[0]() is None


def test_settings_that_cannot_be_are_refused_before_anything_runs(nano: LLM, prompts: list[list[int]]) -> None:
    """Also those of a request that would have joined late, when others have their answers."""
    recorder = Recorder(nano)
    params = [SamplingParams(max_tokens=2, temperature=0.0)] * 8 + [SamplingParams(logit_bias={10**6: 1.0})]
    requests = nano._requests(prompts, params, {})
    with pytest.raises(UsageError, match="logit_bias token 1000000 is outside the vocabulary"):
        Engine(recorder, nano.tokenizer.vocab_size, 2).run(requests)  # type: ignore[arg-type]
    assert not recorder.sizes
    assert not recorder.calls


def test_a_closed_engine_runs_nothing(nano: LLM, prompts: list[list[int]]) -> None:
    recorder = Recorder(nano)
    engine = Engine(recorder, nano.tokenizer.vocab_size, 2)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=50, temperature=0.0)
    stream = engine.run(nano._requests(prompts[:1], params, {}))
    next(stream)
    engine.close()
    num_calls = len(recorder.calls)
    for unwanted in (stream, engine.run(nano._requests(prompts[:1], params, {}))):
        with pytest.raises(UsageError, match="the model is closed"):
            next(unwanted)
    gc.collect()
    assert len(recorder.calls) == num_calls
    assert [cache() for cache in recorder.caches] == [None] * len(recorder.caches)


def test_a_prompt_of_several_chunks_is_read_as_one(nano: LLM) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 2 * PREFILL_CHUNK + 77)
    (request,) = run(nano, 1, [ids.tolist()], [SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)])
    cache = nano.session.new_cache(1, len(ids))
    logits = nano.session.run(cache, 0, ids[None], np.zeros(1, np.int64), np.array([len(ids) - 1]))[0].astype(
        np.float64
    )
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    (found,) = request.output().logprobs
    assert_close(found.top_logprobs, np.sort(logprobs)[::-1][:20], relative=CHUNKING_RELATIVE_FP32)


def test_long_and_short_prompts_together(nano: LLM, prompts: list[list[int]]) -> None:
    """A prompt of several chunks runs on its own while its neighbours share a call."""
    long = np.random.default_rng(1).integers(0, 256, PREFILL_CHUNK + 9).tolist()
    params = [SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)] * 4
    some = [long, prompts[0], prompts[4], prompts[2]]
    together = run(nano, 4, some, params)
    for request, prompt in zip(together, some, strict=True):
        assert run(nano, 1, [prompt], params[:1])[0].output_ids == request.output_ids


# ---------------------------------------------------------------- plan_prefill


@pytest.mark.parametrize("chunk", [1, 16, 512])
@pytest.mark.parametrize("spread", [1.01, 1.3, 4, 700])
def test_plan_prefill_covers_all_rows_in_order_within_its_bounds(spread: float, chunk: int) -> None:
    for seed in range(100):
        random_numbers = random.Random(seed)
        shortest = random_numbers.choice([1, 5, 100, 513])
        lengths = [int(shortest * random_numbers.uniform(1, spread)) for _ in range(random_numbers.randint(1, 40))]
        lengths = sorted(lengths) if seed % 2 else lengths
        plan = plan_prefill(lengths, chunk)
        assert [row for start, stop in plan for row in range(start, stop)] == list(range(len(lengths)))
        for start, stop in plan:
            group = lengths[start:stop]
            assert group
            if len(group) > 1:
                padded = max(group) * len(group)
                assert max(group) <= chunk
                assert padded - sum(group) <= sum(group) / 4
                assert padded <= 8 * chunk


def test_plan_prefill_puts_equal_prompts_together_and_nothing_in_no_call() -> None:
    assert plan_prefill([20] * 6) == [(0, 6)]
    assert plan_prefill([20] * 6, chunk=10) == [(i, i + 1) for i in range(6)]
    assert plan_prefill([1, 100]) == [(0, 1), (1, 2)]
    assert plan_prefill([]) == []
