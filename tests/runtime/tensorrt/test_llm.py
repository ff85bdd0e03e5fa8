"""`LLM` on an engine's bundle answers as on the CPU's: greedy and seeded, ragged and continuous batches, streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.runtime.tensorrt.platform import Platform
from qwen_rt.runtime.tensorrt.session import TensorRtSession

from ..cuda.fake import FakeGpu
from .kit import CAPACITY, platform_of

QUESTIONS = [
    "What is 17 + 25?",
    "What is 4085 - 917?",
    "Elena sells 31 marbles in the morning and 42 marbles at noon at $9 each. How many dollars does Elena earn?",
    "Solve 3x + 5 = 20.",
    "What is 8 + 8?",
    "What is 12 * 34?",
    "Solve 7x - 3 = 2x + 12.",
]
LIMITS = (200, 1, 200, 40, 200, 25, 60)


@pytest.fixture
def llm(bundle: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(Platform, "real", lambda flavour: platform)
    with LLM(bundle, max_num_seqs=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts(nano: LLM) -> list[list[int]]:
    return [nano.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_greedy_answers_are_those_of_the_cpu(
    target: str,
    bundles: dict[str, Path],
    gpu: FakeGpu,
    nano: LLM,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of very different lengths, more than rows; requests end, and others join, at different steps."""
    platform, trt = platform_of(gpu, rtx=target == "tensorrt-rtx")
    monkeypatch.setattr(Platform, "real", lambda flavour: platform if flavour == target else None)
    params = [SamplingParams(temperature=0.0, max_tokens=limit) for limit in LIMITS]
    expected = nano.generate(prompts, params)
    with LLM(bundles[target], max_num_seqs=4) as llm:
        found = llm.generate(prompts, params)
        assert isinstance(llm.session, TensorRtSession)
        assert len(llm.session.steps) > 1
    assert "\\boxed{42}" in found[0].text
    for a, b in zip(found, expected, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
    assert trt._violations == []
    assert trt._num_alive() == 0
    prefills = [shape for profile, shape, _ in trt._log if profile == 0]
    assert any(rows > 1 for rows, _ in prefills), "no ragged prefill"
    assert any(profile == 1 and captured for profile, _, captured in trt._log)


def test_seeded_answers_and_log_probabilities_are_those_of_the_cpu(
    llm: LLM, nano: LLM, prompts: list[list[int]]
) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 30, "logprobs": 2}
    found, expected = llm.generate(prompts[:3], **options), nano.generate(prompts[:3], **options)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert [e.logprob for e in a.logprobs] == pytest.approx([e.logprob for e in b.logprobs], abs=1e-4)


def test_streams_at_once_have_rows_of_their_own(llm: LLM, nano: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    expected = [output.token_ids for output in nano.generate(prompts[:3], params)]
    streams = [llm.stream(prompt, params) for prompt in prompts[:3]]
    found: list[list[int]] = [[] for _ in streams]
    for _ in range(20):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream).token_id)
    assert [tuple(tokens) for tokens in found] == expected


def test_a_batch_beside_streams_takes_the_rows_that_are_left(llm: LLM, nano: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = [output.token_ids for output in nano.generate(prompts[:3], params)]
    streams = [llm.stream(prompts[0], params) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert [output.token_ids for output in llm.generate(prompts[:3], params)] == expected
    last = llm.stream(prompts[1], params)
    next(last)
    with pytest.raises(CapacityError, match="all 4 rows of the KV cache are in use"):
        llm.generate(prompts[:2], params)
    streams.pop().close()
    assert len(llm.generate(prompts[:2], params)) == 2
    assert next(last).token_id == expected[1][1]


def test_a_request_longer_than_the_engine_is_refused(llm: LLM) -> None:
    with pytest.raises(CapacityError, match=f"at most {CAPACITY - 1}"):
        llm.generate([list(range(5)) * CAPACITY])
    assert len(llm.generate([[1, 2, 3]], temperature=0.0, ignore_eos=True)[0].token_ids) == CAPACITY - 3


def test_options_of_loading(bundle: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "real", lambda flavour: platform)
    with pytest.raises(UsageError, match="num_threads=2 with a bundle of target tensorrt-rtx"):
        LLM(bundle, num_threads=2)
    with pytest.raises(UsageError, match="device=3"):
        LLM(bundle, device=3)
    with LLM(bundle, max_num_seqs=100, kv_memory="64MiB") as llm:
        assert llm.session.max_rows == 6  # the engine's own limit
    with pytest.raises(UsageError, match="is closed"):
        llm.generate("x")


def test_a_closed_model_ends_its_streams(llm: LLM, prompts: list[list[int]]) -> None:
    stream = llm.stream(prompts[0], temperature=0.0)
    next(stream)
    llm.close()
    with pytest.raises(UsageError, match="the model is closed"):
        next(stream)
    llm.close()


@pytest.mark.slow
def test_verify_compares_an_engine_with_transformers(
    bundle: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_rt.benchmarks.verify import verify

    monkeypatch.setattr(Platform, "real", lambda flavour: platform)
    result = verify(bundle, num_tokens=40, greedy_tokens=24, exact_match=4, quiet=True)
    assert result.passed, str(result)
    assert len(result.checks) > 5
