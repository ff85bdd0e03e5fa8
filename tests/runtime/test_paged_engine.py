"""The paged engine on a numpy executor that checks every rule: what requests get, and when the device is asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.plugins import reference
from qwen_rt.runtime.outputs import RequestOutput, StreamChunk
from qwen_rt.runtime.paged_engine import PagedEngine
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampling_params import SamplingParams

from .byte_tokenizer import byte_tokenizer
from .numpy_executor import ForcedError, NumpyExecutor, tiny_model

TOKENIZER = byte_tokenizer()
NUM_TOKENS = TOKENIZER.vocab_size
SPEC, WEIGHTS = tiny_model(NUM_TOKENS + 5)
GREEDY = SamplingParams(temperature=0.0)


def executor(**sizes: Any) -> NumpyExecutor:
    return NumpyExecutor(SPEC, WEIGHTS, num_tokens=NUM_TOKENS, **sizes)


def engine(max_num_seqs: int = 4, **sizes: Any) -> tuple[PagedEngine, NumpyExecutor]:
    device = executor(**sizes)
    return PagedEngine(device, NUM_TOKENS, max_num_seqs), device


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((num_tokens, seed)).integers(0, NUM_TOKENS, num_tokens).tolist()


def requests_of(
    prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], room: int = 200
) -> list[Request]:
    settings_of = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [
        Request(index, ids, one, room if one.max_tokens is None else one.max_tokens, TOKENIZER)
        for index, (ids, one) in enumerate(zip(prompts, settings_of, strict=True))
    ]


def run(paged: PagedEngine, prompts: Sequence[Sequence[int]], params: Any) -> list[RequestOutput]:
    """Run requests, and check the chunks and that everything was given back."""
    requests = requests_of(prompts, params)
    chunks = list(paged.run(requests))
    outputs = [request.output() for request in requests]
    check_chunks(chunks, outputs)
    check_idle(paged)
    return outputs


def check_chunks(chunks: Sequence[StreamChunk], outputs: Sequence[RequestOutput]) -> None:
    for index, output in enumerate(outputs):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert tuple(chunk.token_id for chunk in own) == output.token_ids
        assert "".join(chunk.text for chunk in own) == output.text
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [output.finish_reason]


def check_idle(paged: PagedEngine) -> None:
    device = paged.executor
    assert isinstance(device, NumpyExecutor)
    assert device.num_under_way == 0
    assert paged.pool.num_free == paged.pool.num_usable


def alone(ids: Sequence[int], params: SamplingParams) -> RequestOutput:
    return run(engine(1)[0], [ids], params)[0]


# ---------------------------------------------------------------- what requests get


def test_greedy_tokens_are_those_of_the_reference() -> None:
    """Every token by a run over the whole sequence, without cache, blocks or chunks."""
    ids = prompt(21)
    output = run(engine(chunk_tokens=8)[0], [ids], dataclasses.replace(GREEDY, max_tokens=20))[0]
    tokens = list(ids)
    empty = [np.zeros((1, SPEC.num_kv_heads, 64, SPEC.head_dim))] * SPEC.num_layers
    logits, _, _ = reference.decode(SPEC, WEIGHTS, [[*ids, *output.token_ids]], empty, empty, [0])
    for position in range(len(ids) - 1, len(ids) + 19):
        tokens.append(int(logits[0, position, :NUM_TOKENS].argmax()))
    assert list(output.token_ids) == tokens[len(ids) :]
    assert len(set(output.token_ids)) > 5  # a model that repeats itself would hide mistakes


LENGTHS = [3, 40, 17, 1, 90, 5, 16, 33, 64, 7, 25, 2]
LIMITS = [1, 30, 7, 50, 12, 2, 19, 40, 3, 25, 1, 33]
PROMPTS = [prompt(length) for length in LENGTHS]
SAMPLED = [SamplingParams(max_tokens=limit, seed=i, top_k=20, repetition_penalty=1.1) for i, limit in enumerate(LIMITS)]
BOTH = {"greedy": [dataclasses.replace(GREEDY, max_tokens=limit) for limit in LIMITS], "sampled": SAMPLED}


@functools.cache
def expected(kind: str) -> list[tuple[int, ...]]:
    """Tokens of every request when it is the only one."""
    return [alone(ids, one).token_ids for ids, one in zip(PROMPTS, BOTH[kind], strict=True)]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 4, 5, 100])
def test_results_do_not_depend_on_batch_mates(max_num_seqs: int, kind: str) -> None:
    paged, device = engine(max_num_seqs)
    outputs = run(paged, PROMPTS, BOTH[kind])
    assert [output.token_ids for output in outputs] == expected(kind)
    assert max(call[1] for call in device.calls if call[0] == "set_rows") <= min(max_num_seqs, device.max_rows)


@pytest.mark.parametrize("num_blocks", [10, 12, 20])
def test_few_blocks_let_requests_wait_in_order(num_blocks: int) -> None:
    paged, device = engine(8, num_blocks=num_blocks)
    outputs = run(paged, PROMPTS, BOTH["greedy"])
    assert [output.token_ids for output in outputs] == expected("greedy")
    lengths = [call[1] + call[2] for call in device.calls if call[0] == "prefill" and call[3]]
    assert lengths == LENGTHS  # admitted as they came


def test_a_request_that_can_never_fit_is_refused_before_anything_runs() -> None:
    paged, device = engine(num_blocks=5)
    requests = requests_of([prompt(5), prompt(40)], dataclasses.replace(GREEDY, max_tokens=25))
    words = (
        r"request 1 has 40 prompt tokens and max_tokens=25: 5 cache blocks; "
        r"expected at most 4 of 16 tokens, .*; lower max_tokens or raise --kv-memory"
    )
    with pytest.raises(CapacityError, match=words):
        paged.run(requests)
    assert device.calls == []
    assert paged.capacity == 64
    assert len(run(paged, [prompt(40)], dataclasses.replace(GREEDY, max_tokens=24))[0].token_ids) == 24


def test_nothing_beyond_the_context() -> None:
    paged, _ = engine(max_length=64, num_blocks=100)
    assert paged.capacity == 64
    with pytest.raises(CapacityError, match="max_tokens=25; expected at most max_length=64 together; lower"):
        paged.run(requests_of([prompt(40)], dataclasses.replace(GREEDY, max_tokens=25)))
    assert len(run(paged, [prompt(40)], dataclasses.replace(GREEDY, max_tokens=24))[0].token_ids) == 24


def test_settings_that_the_sampler_refuses_are_refused_before_anything_runs() -> None:
    paged, device = engine()
    with pytest.raises(UsageError, match=f"logit_bias token {NUM_TOKENS} is outside the vocabulary"):
        paged.run(requests_of([prompt(5)], SamplingParams(logit_bias={NUM_TOKENS: 1.0})))
    assert device.calls == []


def test_every_way_to_end() -> None:
    free = alone(PROMPTS[2], dataclasses.replace(GREEDY, max_tokens=30))
    tokens = free.token_ids
    stop_token = next(token for token in tokens[8:] if token not in tokens[:8])
    at = tokens.index(stop_token)
    text = TOKENIZER.decode(tokens[:20])
    stop_text = next(text[i : i + 2] for i in range(5, len(text)) if text.find(text[i : i + 2]) == i)
    ways = {
        "length": {"max_tokens": 13},
        "one": {"max_tokens": 1},
        "stop token": {"stop_token_ids": (stop_token,)},
        "eos": {"eos_token_ids": (stop_token,)},
        "ignored eos": {"eos_token_ids": (stop_token,), "ignore_eos": True, "max_tokens": 25},
        "stop string": {"stop": (stop_text,)},
        "late": {"stop_token_ids": (stop_token,), "min_tokens": at + 5},
    }
    paged, _ = engine(3)
    params = [SamplingParams(**({"temperature": 0.0, "max_tokens": 30} | way)) for way in ways.values()]
    outputs = dict(zip(ways, run(paged, [PROMPTS[2]] * len(ways), params), strict=True))
    assert outputs["length"].token_ids == tokens[:13]
    assert outputs["one"].token_ids == tokens[:1]
    for way in ("stop token", "eos"):
        assert outputs[way].token_ids == tokens[: at + 1]
        assert (outputs[way].finish_reason, outputs[way].stop_reason) == ("stop", stop_token)
    assert outputs["ignored eos"].token_ids == tokens[:25]
    assert outputs["stop string"].stop_reason == stop_text
    assert outputs["stop string"].text == text[: text.index(stop_text)]
    assert len(outputs["late"].token_ids) >= at + 5
    assert stop_token not in outputs["late"].token_ids[: at + 4]


def test_log_probabilities() -> None:
    params = dataclasses.replace(GREEDY, max_tokens=9, logprobs=3)
    plain = dataclasses.replace(GREEDY, max_tokens=6)
    outputs = run(engine()[0], PROMPTS[:3], [params, plain, params])
    assert [len(output.logprobs) for output in outputs] == [9, 0, 9]
    for output in (outputs[0], outputs[2]):
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            assert entry.top_ids[0] == token
            assert entry.logprob == entry.top_logprobs[0] < 0
            assert len(entry.top_ids) == 3


# ---------------------------------------------------------------- when the device is asked


def names(device: NumpyExecutor) -> list[str]:
    return [" ".join(map(str, call[:2])) for call in device.calls]


def test_a_step_is_launched_before_the_one_before_it_is_read() -> None:
    paged, device = engine()
    run(paged, [PROMPTS[0]], dataclasses.replace(GREEDY, max_tokens=6))
    assert names(device) == [
        "prefill 0", "set_rows 1",
        "launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "launch 3", "wait 2", "launch 4", "wait 3", "wait 4",
    ]  # fmt: skip


def test_text_of_a_step_is_made_while_the_next_one_runs() -> None:
    paged, device = engine()
    chunks = paged.run(requests_of([PROMPTS[0]], dataclasses.replace(GREEDY, max_tokens=8)))
    assert [device.num_under_way for _ in chunks] == [0, 2, 2, 2, 2, 2, 1, 0]


def test_one_token_needs_no_step() -> None:
    paged, device = engine()
    run(paged, PROMPTS[:3], dataclasses.replace(GREEDY, max_tokens=1))
    assert names(device) == ["prefill 0"] * 3


def test_a_stop_token_costs_one_step_more_and_its_token_is_dropped() -> None:
    tokens = alone(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=30)).token_ids
    at = next(i for i in range(4, 30) if tokens[i] not in tokens[:i])
    paged, device = engine()
    output = run(paged, [PROMPTS[0]], dataclasses.replace(GREEDY, stop_token_ids=(tokens[at],)))[0]
    assert output.token_ids == tokens[: at + 1]
    assert sum(call[0] == "launch" for call in device.calls) == at + 1
    assert names(device)[-2:] == [f"wait {at - 1}", f"wait {at}"]


def test_rows_change_only_when_one_ends() -> None:
    paged, device = engine()
    params = [dataclasses.replace(GREEDY, max_tokens=limit) for limit in (4, 12, 8)]
    run(paged, PROMPTS[:3], params)
    assert [call[1] for call in device.calls if call[0] == "set_rows"] == [3, 2, 1]
    assert sum(call[0] == "launch" for call in device.calls) == 11  # as many as the longest needs


def test_a_long_prompt_lets_running_rows_go_on() -> None:
    """In chunks of 16, a decode step after each, and neither changes what comes out."""
    long = prompt(100)
    params = [dataclasses.replace(GREEDY, max_tokens=limit) for limit in (2, 40, 20)]
    tokens = [alone(ids, one).token_ids for ids, one in zip([PROMPTS[0], PROMPTS[5], long], params, strict=True)]
    paged, device = engine(2, chunk_tokens=16)
    outputs = run(paged, [PROMPTS[0], PROMPTS[5], long], params)
    assert [output.token_ids for output in outputs] == tokens
    calls = names(device)
    start = calls.index("prefill 0", 2)
    assert calls[:start] == ["prefill 0", "prefill 0", "set_rows 2", "launch 0", "wait 0"]
    assert calls[start:] [:21] == [
        "prefill 0", "set_rows 1", "launch 1", "wait 1",
        "prefill 16", "launch 2", "wait 2",
        "prefill 32", "launch 3", "wait 3",
        "prefill 48", "launch 4", "wait 4",
        "prefill 64", "launch 5", "wait 5",
        "prefill 80", "launch 6", "wait 6",
        "prefill 96", "set_rows 2",
    ]  # fmt: skip
    assert [call[2:] for call in device.calls if call[:2] == ("prefill", 96)] == [(4, True)]


def test_short_prompts_join_together_within_the_budget() -> None:
    paged, device = engine(8, chunk_tokens=16)
    run(paged, [prompt(6, seed) for seed in range(5)], dataclasses.replace(GREEDY, max_tokens=6))
    assert names(device)[:8] == [
        "prefill 0", "prefill 0", "set_rows 2", "launch 0", "wait 0", "prefill 0", "prefill 0", "set_rows 4",
    ]  # fmt: skip


# ---------------------------------------------------------------- when it is cut short


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 20, 60])
def test_closing_midway_leaves_everything_as_it_was(taken: int) -> None:
    paged, device = engine(3, chunk_tokens=16)
    stream = paged.run(requests_of(PROMPTS, BOTH["greedy"]))
    for _ in range(taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    check_idle(paged)
    assert [output.token_ids for output in run(paged, PROMPTS, BOTH["greedy"])] == expected("greedy")
    assert not device.is_closed


@pytest.mark.parametrize("which", [0, 1, 2, 5])
@pytest.mark.parametrize("call", ["prefill", "set_rows", "launch", "wait"])
def test_an_error_of_the_device_leaves_the_pool_whole(call: str, which: int) -> None:
    paged, device = engine(3, chunk_tokens=16)
    device.fail_at = (call, which)
    with pytest.raises(ForcedError, match=f"{call} {which} failed"):
        list(paged.run(requests_of(PROMPTS, BOTH["greedy"])))
    check_idle(paged)
    assert [output.token_ids for output in run(paged, PROMPTS, BOTH["greedy"])] == expected("greedy")


def test_two_streams_at_once_take_turns() -> None:
    paged, _ = engine(2)
    kinds = ["greedy", "sampled"]
    both = [requests_of(PROMPTS, BOTH[kind]) for kind in kinds]
    streams = [paged.run(requests) for requests in both]
    random = np.random.default_rng(0)
    while streams:
        stream = streams[random.integers(len(streams))]
        if next(stream, None) is None:
            streams.remove(stream)
    for requests, kind in zip(both, kinds, strict=True):
        assert [tuple(request.output_ids) for request in requests] == expected(kind)
    check_idle(paged)


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_one_stream_does_not_end_another(which: int) -> None:
    """What fails while a stream is left for another runs again when it goes on; the other never hears of it."""
    paged, device = engine(2)
    device.takes_any_tokens = True
    params = dataclasses.replace(GREEDY, max_tokens=20)
    stream = paged.run(first := requests_of([PROMPTS[0]], params))
    next(stream)
    next(stream)
    assert device.num_under_way == 2
    device.fail_at = ("wait", sum(call[0] == "wait" for call in device.calls) + which)
    (other,) = requests_of([PROMPTS[5]], params)
    assert [len(list(paged.run([other]))), len(list(stream))] == [20, 18]
    for request, ids in ((other, PROMPTS[5]), (first[0], PROMPTS[0])):
        assert tuple(request.output_ids) == alone(ids, params).token_ids
    check_idle(paged)


def test_a_stream_that_holds_all_blocks_is_named() -> None:
    paged, _ = engine(2, num_blocks=5)
    long = dataclasses.replace(GREEDY, max_tokens=50)
    first = paged.run(requests_of([PROMPTS[0]], long))
    next(first)
    with pytest.raises(CapacityError, match=r"needs 4 cache blocks; expected at most 0: another stream .*; finish or"):
        list(paged.run(requests_of([PROMPTS[0]], long)))
    assert len(list(first)) == 49
    check_idle(paged)


def test_a_closed_engine_runs_nothing() -> None:
    paged, device = engine()
    stream = paged.run(requests_of(PROMPTS[:2], dataclasses.replace(GREEDY, max_tokens=50)))
    next(stream)
    paged.close()
    paged.close()
    assert device.num_under_way == 0
    with pytest.raises(UsageError, match="the model is closed"):
        list(stream)
    check_idle(paged)
    with pytest.raises(UsageError, match="the model is closed"):
        list(paged.run(requests_of(PROMPTS[:1], GREEDY)))


# ---------------------------------------------------------------- anything


@st.composite
def _case(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, SamplingParams]]]:
    sizes = {
        "block_size": draw(st.sampled_from([1, 4, 16])),
        "chunk_tokens": draw(st.sampled_from([1, 5, 16, 64])),
        "max_rows": draw(st.integers(1, 5)),
    }
    sizes["num_blocks"] = 1 + -(-60 // sizes["block_size"]) + draw(st.integers(0, 20))
    requests = []
    for seed in range(draw(st.integers(1, 7))):
        stops = draw(st.frozensets(st.integers(0, NUM_TOKENS - 1), max_size=40))
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 20)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=seed,
            stop_token_ids=tuple(stops),
            min_tokens=draw(st.integers(0, 1)),
            frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        )
        requests.append((draw(st.integers(1, 40)), params))
    return sizes, requests


@settings(max_examples=60, deadline=None)
@given(_case())
def test_any_mix_gives_what_each_request_gets_alone(case: tuple[dict[str, int], list[tuple[int, Any]]]) -> None:
    sizes, wanted = case
    prompts = [prompt(length, seed) for seed, (length, _) in enumerate(wanted)]
    params = [one for _, one in wanted]
    outputs = run(engine(4, **sizes)[0], prompts, params)
    for ids, one, output in zip(prompts, params, outputs, strict=True):
        single = alone(ids, one)
        assert (output.token_ids, output.text) == (single.token_ids, single.text)
        assert output.finish_reason == single.finish_reason
