"""`LLM` on a bundle of target cuda: the same answers as on the CPU, options, room in the cache, closing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams

from .cuda_bundle import KV_BYTES_PER_BLOCK, NumpyCudaSession, as_cuda, install

QUESTIONS = ["What is 17 + 25?", "What is 4085 - 917?", "Solve 3x + 5 = 20.", "What is 8 + 8?", "What is 12 * 34?"]
QUESTION = [{"role": "user", "content": QUESTIONS[0]}]


@pytest.fixture(scope="module")
def cuda_bundle(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_cuda(nano_bundle, tmp_path_factory.mktemp("cuda") / "nano")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[NumpyCudaSession]:
    return install(monkeypatch)


@pytest.fixture
def llm(cuda_bundle: Path, made: list[NumpyCudaSession]) -> Iterator[LLM]:
    with LLM(cuda_bundle, max_num_seqs=3) as loaded:
        yield loaded


def test_greedy_answers_are_those_of_the_cpu(llm: LLM, nano: LLM) -> None:
    prompts = [nano.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    params = [SamplingParams(temperature=0.0, max_tokens=limit) for limit in (300, 1, 40, 300, 25)]
    expected = nano.generate(prompts, params)
    found = llm.generate(prompts, params)
    assert "\\boxed{42}" in found[0].text
    for a, b in zip(found, expected, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
            b.token_ids, b.text, b.finish_reason, b.stop_reason,
        )  # fmt: skip


def test_seeded_answers_and_log_probabilities_are_those_of_the_cpu(llm: LLM, nano: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 30, "logprobs": 2}
    found, expected = llm.chat(QUESTION, **options), nano.chat(QUESTION, **options)
    assert found.token_ids == expected.token_ids
    assert [e.logprob for e in found.logprobs] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-3)


def test_a_stream_gives_what_generate_returns(llm: LLM) -> None:
    expected = llm.chat(QUESTION)
    chunks = list(llm.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert tuple(chunk.token_id for chunk in chunks) == expected.token_ids


def test_a_stream_that_is_left_gives_its_blocks_back(llm: LLM, made: list[NumpyCudaSession]) -> None:
    expected = llm.chat(QUESTION).token_ids
    stream = llm.stream(QUESTION)
    next(stream)
    del stream
    assert made[0].num_under_way == 0
    assert llm.chat(QUESTION).token_ids == expected


def test_what_the_session_is_given(cuda_bundle: Path, made: list[NumpyCudaSession]) -> None:
    with LLM(cuda_bundle, device=2, kv_memory="8MiB", max_num_seqs=1000, quiet=False) as llm:
        (session,) = made
        assert llm.session is session
        assert session.options == {"device": 2, "kv_memory": 8 << 20, "quiet": False}
        assert session.max_rows == 64
        assert not session.is_closed
    assert session.is_closed


def test_without_a_limit_the_cache_bounds_the_output(cuda_bundle: Path, made: list[NumpyCudaSession]) -> None:
    with LLM(cuda_bundle, kv_memory=5 * KV_BYTES_PER_BLOCK) as llm:
        output = llm.generate([[5] * 20], temperature=0.0, ignore_eos=True)[0]
        assert len(output.token_ids) == 4 * 16 - 20
        assert output.finish_reason == "length"
        words = (
            "request 1 has 20 prompt tokens and max_tokens=45: 5 cache blocks; expected at most 4 of 16.*--kv-memory"
        )
        calls = len(made[0].calls)
        with pytest.raises(CapacityError, match=words):
            llm.generate([[5], [5] * 20], max_tokens=45)
        with pytest.raises(CapacityError, match="request 0 has 64 prompt tokens and max_tokens=1: 5 cache blocks"):
            llm.stream([5] * 64)  # at the call, not at the first token
        assert len(made[0].calls) == calls


def test_a_cache_without_a_block_closes_the_session(cuda_bundle: Path, made: list[NumpyCudaSession]) -> None:
    with pytest.raises(UsageError, match=r"num_blocks=1, .*; give the cache more memory"):
        LLM(cuda_bundle, kv_memory=KV_BYTES_PER_BLOCK)
    assert made[0].is_closed


def test_misuse_is_told_before_anything_runs(llm: LLM, made: list[NumpyCudaSession]) -> None:
    for call, words in (
        (lambda: llm.generate("a", logit_bias={10**6: 1.0}), "1000000"),
        (lambda: llm.generate("a", logit_bias=dict.fromkeys(range(513), 1.0)), "name 513 tokens; expected at most 512"),
        (lambda: llm.generate([[1, -1]]), "prompt token -1"),
        (lambda: llm.stream("a", temperature=-1), "temperature=-1"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    assert made[0].calls == []


def test_closed(cuda_bundle: Path, nano_bundle: Path, made: list[NumpyCudaSession]) -> None:
    for path in (cuda_bundle, nano_bundle):
        llm = LLM(path)
        stream = llm.stream(QUESTION)
        next(stream)
        llm.close()
        llm.close()
        for use in (lambda one=llm: one.generate("a"), lambda one=llm: one.stream("a"), lambda one=llm: one.session):
            with pytest.raises(UsageError, match="is closed; expected an open one; load it again"):
                use()
        assert llm.tokenizer.encode("a")
    assert made[0].is_closed
    cuda_stream = LLM(cuda_bundle)
    stream = cuda_stream.stream(QUESTION)
    next(stream)
    cuda_stream.close()
    with pytest.raises(UsageError, match="the model is closed"):
        next(stream)


def test_verify_reads_the_logits_of_every_step(
    cuda_bundle: Path, made: list[NumpyCudaSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_rt.benchmarks.verify import verify

    monkeypatch.setattr(NumpyCudaSession, "takes_any_tokens", True)
    result = verify(cuda_bundle, num_tokens=70, greedy_tokens=8, exact_match=0, num_threads=1, device=1, quiet=True)
    (session,) = made
    assert session.is_closed
    assert session.options["device"] == 1
    assert sum(call[0] == "launch" for call in session.calls) == 69 + 7
    assert ("prefill", 64, 6, True) in session.calls  # chunks of 64
    assert result.passed, result.table()
    assert (result.kind, result.num_tokens) == ("rounded-bf16", 70)
    values = {check.name: check.value for check in result.checks}
    assert values["largest error of a logit, relative"] < 1e-4  # this executor rounds nothing
    assert values["largest error through prefill, relative"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": -1}, "device=-1; expected an integer of at least 0"),
        ({"device": True}, "device=True"),
        ({"kv_memory": "8G"}, "kv_memory='8G'; expected bytes, or a number with KB"),
        ({"kv_memory": 0}, "kv_memory=0; expected at least one byte"),
        ({"num_threads": 2}, "num_threads=2 with a bundle of target cuda; expected one of target cpu; leave it out"),
    ],
)
def test_options_are_checked_before_the_gpu_is_touched(
    cuda_bundle: Path, made: list[NumpyCudaSession], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(cuda_bundle, **options)
    assert made == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": 1}, "device=1 with a bundle of target cpu; expected one of target cuda; leave it out"),
        ({"kv_memory": "1GiB"}, "kv_memory=1GiB with a bundle of target cpu; expected one of target cuda"),
    ],
)
def test_options_of_a_gpu_with_a_cpu_bundle(nano_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(nano_bundle, **options)


def test_a_cpu_bundle_never_loads_the_cuda_session(nano_bundle: Path) -> None:
    code = (
        "import sys; from qwen_rt.runtime.llm import LLM\n"
        f"with LLM({str(nano_bundle)!r}, num_threads=1) as llm: llm.generate('1', max_tokens=2)\n"
        "print([name for name in sys.modules if name.startswith('qwen_rt.runtime.cuda')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
