"""`qwen-rt generate`: every way to give a prompt and to get the answer says the same as the Python API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.cli.generate import BOXED
from qwen_rt.runtime.llm import LLM

from ..runtime.cuda_bundle import NumpyCudaSession, as_cuda, install
from .conftest import Cli
from .kit import QUESTION, child, command, environment, names

NUM = ["--max-tokens", "12"]


@pytest.fixture(scope="module")
def llm(bundle: Path) -> LLM:
    return LLM(bundle)


@pytest.fixture(scope="module")
def answer(llm: LLM) -> str:
    return llm.chat([{"role": "user", "content": QUESTION}], max_tokens=12).text


def test_prompt_before_and_after_options_and_from_stdin(bundle: Path, answer: str, cli: Cli) -> None:
    ways: list[dict[str, Any]] = [
        {"arguments": ["generate", bundle, QUESTION, *NUM]},
        {"arguments": ["generate", bundle, *NUM, QUESTION]},
        {"arguments": ["generate", *NUM, bundle, QUESTION]},
        {"arguments": ["generate", bundle, *NUM, "--", QUESTION]},
        {"arguments": ["generate", bundle, *NUM], "stdin": QUESTION + "\n"},
        {"arguments": ["generate", bundle, *NUM], "stdin": QUESTION},
    ]
    assert answer
    for way in ways:
        result = cli(*way["arguments"], stdin=way.get("stdin", ""))
        assert (result.code, result.out, result.err) == (0, answer + "\n", ""), way


def test_a_prompt_that_begins_with_a_dash(bundle: Path, llm: LLM, cli: Cli) -> None:
    expected = llm.chat([{"role": "user", "content": "-5 + 7 ="}], max_tokens=12).text
    assert cli("generate", bundle, *NUM, "--", "-5 + 7 =").out == expected + "\n"


def test_raw_boxed_and_system(bundle: Path, llm: LLM, cli: Cli) -> None:
    raw = llm.generate("17 + 25 =", max_tokens=12)[0].text
    assert cli("generate", bundle, "--raw", *NUM, "17 + 25 =").out == raw + "\n"
    boxed = llm.chat([{"role": "user", "content": QUESTION + BOXED}]).text
    assert cli("generate", bundle, "--boxed", QUESTION).out == boxed + "\n"
    assert "\\boxed{42}" in boxed
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    system = llm.chat(messages, max_tokens=12).text
    assert cli("generate", bundle, "--system", "Be brief.", *NUM, QUESTION).out == system + "\n"


def test_a_file_is_a_batch(bundle: Path, llm: LLM, workplace: Path, cli: Cli) -> None:
    questions = [QUESTION, "What is 3 * 4?", "What is 100 - 1?\u2028Tell me."]
    (workplace / "questions.txt").write_text("\ufeff" + "\r\n\r\n".join(questions) + "\n")
    texts = [llm.chat([{"role": "user", "content": question + BOXED}], max_tokens=12).text for question in questions]
    for batch in ("1", "2", "1000000"):
        result = cli("generate", bundle, "--file", "questions.txt", "--boxed", "--batch", batch, "--json", "-", *NUM)
        assert (result.code, result.err) == (0, "")
        records = [json.loads(line) for line in result.out.split("\n") if line]
        assert [record["text"] for record in records] == texts
        assert [record["prompt"].rstrip() for record in records] == [question + BOXED for question in questions]
    shown = cli("generate", bundle, "--file", "questions.txt", "--boxed", *NUM).out
    assert all(f"> {question}" in shown for question in questions)
    assert all(text in shown for text in texts)


def test_json_and_stats(bundle: Path, llm: LLM, answer: str, workplace: Path, cli: Cli) -> None:
    result = cli("generate", bundle, QUESTION, *NUM, "--json", "out.jsonl", "--stats", "--logprobs", "2")
    assert (result.code, result.out) == (0, answer + "\n")
    assert result.err.count("\n") == 1
    assert "12 generated in" in result.err
    (record,) = [json.loads(line) for line in (workplace / "out.jsonl").read_text().splitlines()]
    expected = llm.chat([{"role": "user", "content": QUESTION}], max_tokens=12)
    assert record["prompt"] == QUESTION
    assert record["text"] == answer
    assert record["token_ids"] == list(expected.token_ids)
    assert record["num_prompt_tokens"] == len(expected.prompt_token_ids)
    assert record["finish_reason"] == "length"
    assert [len(entry["top"]) for entry in record["logprobs"]] == [2] * 12
    assert all(entry["logprob"] == pytest.approx(entry["top"][0][1]) for entry in record["logprobs"])
    to_stdout = cli("generate", bundle, QUESTION, *NUM, "--json", "-")
    assert json.loads(to_stdout.out)["text"] == answer
    assert names(workplace) == {"out.jsonl"}


def test_options_reach_the_sampler(bundle: Path, llm: LLM, answer: str, cli: Cli) -> None:
    def ask(*options: str) -> str:
        return cli("generate", bundle, QUESTION, *options).out.removesuffix("\n")

    hot = ["--temperature", "3", "--top-k", "0", *NUM]
    assert ask(*hot, "--seed", "1") == ask(*hot, "--seed", "1")
    assert len({ask(*hot, "--seed", str(seed)) for seed in range(4)}) > 1
    messages = [{"role": "user", "content": QUESTION}]
    assert ask(*hot, "--seed", "7") == llm.chat(messages, temperature=3.0, top_k=0, seed=7, max_tokens=12).text
    first = llm.chat(messages, max_tokens=1).token_ids[0]
    assert llm.chat(messages, max_tokens=1, logit_bias={first: -100.0}).text == ask(
        "--max-tokens", "1", "--logit-bias", f"{first}:-100"
    )
    assert ask("--stop", answer[3:5], *NUM) == answer[: answer.index(answer[3:5])]
    assert ask("--stop-token", str(first), *NUM) == ""
    assert len(ask("--ignore-eos", "--max-tokens", "300")) > len(ask("--max-tokens", "300"))


def test_streaming_gives_each_piece_as_it_comes(bundle: Path) -> None:
    with subprocess.Popen(
        command("generate", bundle, "--ignore-eos", "--max-tokens", "2000", QUESTION),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 5)
        assert process.poll() is None, "the first piece came only at the end"
        process.kill()


def test_a_reader_that_goes_away_is_no_error(bundle: Path) -> None:
    """`qwen-rt … | head -c 5`: silence."""
    for arguments in (
        ["generate", bundle, "--ignore-eos", "--max-tokens", "500", QUESTION],
        ["inspect", bundle, "--json"],
    ):
        read_end, write_end = os.pipe()
        with subprocess.Popen(
            command(*arguments), stdout=write_end, stderr=subprocess.PIPE, env=environment(), text=True
        ) as process:
            os.close(write_end)
            if arguments[0] == "generate":
                assert os.read(read_end, 5)
            os.close(read_end)
            assert process.communicate(timeout=60)[1] == ""
            assert process.returncode == 1


def test_ctrl_c_is_one_line_and_130(bundle: Path) -> None:
    with subprocess.Popen(
        command("generate", bundle, "--ignore-eos", "--max-tokens", "2000", QUESTION),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 5)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, "qwen-rt: interrupted\n")


def test_closed_and_narrow_streams(bundle: Path, answer: str) -> None:
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command("generate", bundle)],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1), closed
    assert "no prompt" in closed.stderr
    narrow = child(["generate", bundle, "--raw", "--max-tokens", "30", "--json", "-", "三"], env=environment(
        PYTHONIOENCODING="ascii"))  # fmt: skip
    assert (narrow.code, narrow.err) == (0, "")
    assert "\\u4e09" in narrow.out


def test_the_module_runs_as_the_command(bundle: Path) -> None:
    assert child(["--version"]).out.startswith("qwen-rt ")
    code = "import runpy, sys; sys.argv = ['qwen-rt', '--version']; runpy.run_module('qwen_rt', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- target cuda


@pytest.fixture
def cuda_bundle(bundle: Path, tmp_path: Path) -> Path:
    return as_cuda(bundle, tmp_path / "nano-cuda")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[NumpyCudaSession]:
    return install(monkeypatch)


def test_a_cuda_bundle_answers_as_the_cpu_bundle_does(
    cuda_bundle: Path, answer: str, workplace: Path, made: list[NumpyCudaSession], cli: Cli
) -> None:
    streamed = cli("generate", cuda_bundle, QUESTION, *NUM, "--kv-memory", "4MiB", "--device", "3")
    assert (streamed.code, streamed.out, streamed.err) == (0, answer + "\n", "")
    assert made[0].options == {"device": 3, "kv_memory": 4 << 20, "quiet": True}
    (workplace / "questions.txt").write_text(f"{QUESTION}\nWhat is 3 * 4?\n")
    batch = cli("generate", cuda_bundle, "--file", "questions.txt", "--batch", "1000000", *NUM, "--stats")
    assert (batch.code, batch.out.splitlines()[:2]) == (0, [f"> {QUESTION}", answer.splitlines()[0]])
    assert batch.err.count("\n") == 1
    assert "24 generated in" in batch.err
    assert batch.err.endswith("2 requests on cuda\n")
    assert [session.is_closed for session in made] == [True, True]


def test_options_that_do_not_fit_the_target(
    cuda_bundle: Path, bundle: Path, made: list[NumpyCudaSession], cli: Cli
) -> None:
    leave = "leave it out"
    cli("generate", cuda_bundle, "--threads", "2", "hi").refused(2, "num_threads=2 with .* target cuda", "cpu", leave)
    cli("generate", bundle, "--device", "1", "hi").refused(2, "device=1 with .* target cpu", "cuda", leave)
    cli("generate", bundle, "--kv-memory", "1GiB", "hi").refused(2, "kv_memory=1GiB with .* target cpu", leave)
    cli("generate", cuda_bundle, "--kv-memory", "8G", "hi").refused(2, "kv_memory='8G'", "KiB, MiB", "like 8GiB")
    cli("generate", cuda_bundle, "--kv-memory", "64KiB", "hi").refused(2, "num_blocks=1", "more memory")
    cli("generate", cuda_bundle, "--device", "x", "hi").refused(2, "--device", "invalid int value")
    cli("generate", cuda_bundle, "--device", "-1", "hi").refused(2, "device=-1", "at least 0")
    assert all(session.is_closed for session in made)


def test_a_request_larger_than_the_cache(cuda_bundle: Path, made: list[NumpyCudaSession], cli: Cli) -> None:
    words = (r"\d+ prompt tokens and max_tokens=400: \d+ cache blocks", "at most 15", "lower max_tokens or raise --kv")
    cli("generate", cuda_bundle, "--kv-memory", "1MiB", "--max-tokens", "400", QUESTION).refused(2, *words)
    assert [(session.is_closed, session.calls) for session in made] == [(True, [])]
