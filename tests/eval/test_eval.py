"""The command from end to end: a server or nano answers, the folder holds it, a kill costs nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.eval.bundle_model import BundleModel
from qwen_rt.benchmarks.eval.models import Sampling
from qwen_rt.cli import _parse

from .kit import MATH, Answered, Asked, Server, chat_reply, evaluate, read_lines, right, serving, sums, write_rows

KEY = "sk-secret-0123456789abcdef"


def _on(server: Server, file: Path, folder: Path) -> list[str | Path]:
    return ["--endpoint", server.url, "--dataset", file, "-o", folder]


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    shown = capsys.readouterr()
    assert shown.err.startswith("qwen-rt: error: ")
    assert shown.err.count("\n") == 1
    assert shown.err[:-1].isprintable()
    return shown.err


def test_a_whole_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sums(tmp_path / "sums.jsonl", 6, subject="Algebra")

    def handler(asked: Asked) -> Answered:
        return chat_reply("\\boxed{10^{1}}") if asked.first_number in (2, 9) else right(asked)

    with serving(handler) as server:
        assert evaluate(*_on(server, file, tmp_path / "out"), "--json", tmp_path / "copy.json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert json.loads((tmp_path / "copy.json").read_text("utf-8")) == results
    (found,) = results["datasets"]
    assert (found["dataset"], found["num_problems"], found["num_right"]) == ("sums", 6, 5)
    assert found["breakdown"]["subject"]["Algebra"]["num_right"] == 5
    assert results["settings"]["model"] == {"endpoint": server.url, "model": "nano"}
    assert shown.out.splitlines()[3].split()[:4] == ["sums", "all", "6", "83.3"]
    assert (
        (tmp_path / "out" / "results.md").read_text("utf-8").splitlines()[4].startswith("| sums | all | 6 | 83.3 % |")
    )
    lines = sorted(read_lines(tmp_path / "out"), key=lambda line: line["id"])
    assert [line["correct"] for line in lines] == [True, True, False, True, True, True]
    assert lines[2] == {
        "dataset": "sums",
        "id": "3",
        "sample": 0,
        "prompt": lines[2]["prompt"],
        "seed": None,
        "finish_reason": "stop",
        "num_tokens": 5,
        "expected": "3",
        "extracted": "10^{1}",
        "correct": False,
        "undecided": False,
        "output": "\\boxed{10^{1}}",
    }


def test_going_on_asks_only_for_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sums(tmp_path / "sums.jsonl", 10)
    with serving(right) as server:
        arguments = _on(server, file, tmp_path / "out")
        assert evaluate(*arguments, "--limit", "4") == 0
        assert evaluate(*arguments, "--limit", "4") == 0
        assert len(server.asked) == 4
        assert evaluate(*arguments, "--concurrency", "2") == 0
        assert sorted(asked.first_number for asked in server.asked) == list(range(10))
        assert evaluate(*arguments, "--limit", "3", "--json", "-") == 0
        assert len(server.asked) == 10
        capsys.readouterr()
        assert evaluate(*arguments, "--seed", "1") == 1
        assert "were made with sampling.seed=0; expected sampling.seed=1" in _error(capsys)
        assert evaluate(*arguments, "--seed", "1", "--limit", "1", "--force") == 0
    assert len(read_lines(tmp_path / "out")) == 1


def test_json_on_stdout_is_all_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(right) as server:
        assert evaluate(*_on(server, sums(tmp_path / "a.jsonl", 1), tmp_path / "out"), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["datasets"][0]["num_right"] == 1


def test_samples_vote_and_their_seeds_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs: Sequence[str] = ["\\boxed{0.5}", "\\boxed{1}", "\\boxed{1/2}", "none", "\\boxed{\\frac{1}{2}}"]
    rows = [{"question": f"What is {i} + 1?", "answer": "1/2"} for i in range(2)]
    file = write_rows(tmp_path / "halves.jsonl", rows)
    more = ["--samples", "5", "--temperature", "0.7", "--top-p", "0.9", "--seed", "3", "--concurrency", "1"]
    seeds = []
    for folder in ("first", "second"):
        with serving(lambda asked: chat_reply(outputs[asked.number % 5])) as server:
            assert evaluate(*_on(server, file, tmp_path / folder), *more) == 0
        seeds.append([asked.body["seed"] for asked in server.asked])
        assert [(asked.body["temperature"], asked.body["top_p"]) for asked in server.asked] == [(0.7, 0.9)] * 10
    assert seeds[0] == seeds[1] == [line["seed"] for line in read_lines(tmp_path / "first")]
    assert len(set(seeds[0])) == 10
    (found,) = json.loads((tmp_path / "first" / "results.json").read_text("utf-8"))["datasets"]
    assert (found["mean"]["accuracy"], found["majority"]["accuracy"]) == (0.6, 1.0)
    assert (found["num_right"], found["num_right_majorities"], found["num_without_answer"]) == (6, 2, 2)
    assert "maj@5" in capsys.readouterr().out


def test_few_shot_and_raw_prompts_continue_text(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m.jsonl", [MATH])
    template = tmp_path / "t.txt"
    template.write_text("Solve: {question} =", "utf-8")
    reply = Answered({"choices": [{"text": " 3/4. The answer is 3/4.", "finish_reason": "stop"}]})
    with serving(lambda asked: reply) as server:
        assert evaluate(*_on(server, file, tmp_path / "a"), "--prompt", "few-shot", "--shots", "1") == 0
        raw = ["--prompt", "raw", "--prompt-file", template, "--stop", "\n"]
        assert evaluate(*_on(server, file, tmp_path / "b"), *raw) == 0
    first, second = server.asked
    assert first.body["prompt"].endswith(f"\n\nQuestion: {MATH['problem']}\nAnswer:")
    assert (first.body["prompt"].count("Answer:"), first.body["stop"]) == (2, ["Question:"])
    assert (second.body["prompt"], second.body["stop"]) == (f"Solve: {MATH['problem']} =", ["\n"])
    assert all(line["correct"] for folder in ("a", "b") for line in read_lines(tmp_path / folder))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """kill -9 while answers come in, and half a line at the end, as a kill within a write leaves it."""
    gate = threading.Event()

    def handler(asked: Asked) -> Answered:
        if asked.number >= 5:
            gate.wait(30)
        return right(asked)

    file, folder = sums(tmp_path / "sums.jsonl", 12), tmp_path / "out"
    with serving(handler) as server:
        arguments = [*_on(server, file, folder), "--concurrency", "2"]
        program = [sys.executable, "-m", "qwen_rt", "eval", *map(str, arguments)]
        with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            until = time.monotonic() + 60
            while not (folder / "answers.jsonl").exists() or len(read_lines(folder)) < 5:
                assert time.monotonic() < until
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
        gate.set()
        before = (folder / "answers.jsonl").read_bytes()
        assert before.count(b"\n") == 5
        assert not (folder / "results.json").exists()
        with (folder / "answers.jsonl").open("ab") as answers:
            answers.write(before[:70])
        num_asked = len(server.asked)
        assert evaluate(*arguments) == 0
        assert len(server.asked) - num_asked == 7
    after = (folder / "answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert sorted(line["id"] for line in read_lines(folder)) == sorted(str(i + 1) for i in range(12))
    assert json.loads((folder / "results.json").read_text("utf-8"))["datasets"][0]["num_right"] == 12


def test_an_error_in_the_middle_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = True

    def handler(asked: Asked) -> Answered:
        return Answered({"error": "gone"}, 500) if broken and asked.first_number == 3 else right(asked)

    file = sums(tmp_path / "sums.jsonl", 6)
    with serving(handler) as server:
        arguments = [*_on(server, file, tmp_path / "out"), "--concurrency", "1"]
        assert evaluate(*arguments) == 1
        assert "problem 4 of sums: HTTP status 500 (gone); see the server, then rerun to go on" in _error(capsys)
        assert len(read_lines(tmp_path / "out")) == 3
        broken = False
        assert evaluate(*arguments) == 0
    assert len(read_lines(tmp_path / "out")) == 6


def test_the_key_is_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = sums(tmp_path / "sums.jsonl", 3)

    def handler(asked: Asked) -> Answered:
        assert asked.headers["Authorization"] == f"Bearer {KEY}"
        return chat_reply(f"{KEY} \\boxed{{1}}") if asked.number < 2 else Answered({"message": KEY}, 403)

    with serving(handler) as server:
        assert evaluate(*_on(server, file, tmp_path / "out"), "--concurrency", "1") == 1
    shown = capfd.readouterr()
    assert "HTTP status 403 (***)" in shown.err
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"***" in everything
    assert KEY.encode() not in everything
    assert KEY not in shown.out + shown.err


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 2, "neither BUNDLE and --endpoint; expected one of the two"),
        (["x", "--endpoint", "http://127.0.0.1:1/v1"], 2, "both BUNDLE and --endpoint"),
        (["x", "--model", "m"], 2, "--model with a bundle; leave it out"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--device", "1"], 2, "--device with --endpoint; leave it out"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--model", "m"], 1, "http://127.0.0.1:1/v1: "),
        (["x", "--samples", "4"], 2, "samples=4 with temperature 0; expected answers that differ; pass --temperature"),
        (["x", "--samples", "0"], 2, "samples=0"),
        (["x", "--limit", "0"], 2, "limit=0"),
        (["x", "--layout", "gsm"], 2, "layout=gsm"),
        (["x", "--max-tokens", "0"], 2, "max_tokens=0"),
        (["x", "--prompt", "raw"], 2, "raw without a template"),
        (["x", "--prompt", "chat"], 2, "invalid choice: 'chat'"),
        (["x", "--stop", ""], 2, "an empty text to stop at"),
        (["x"], 1, "x does not exist; expected a bundle folder"),
        (["x", "--dataset", "nothing"], 2, "dataset nothing is neither a file"),
    ],
)
def test_what_cannot_be_used_is_told_of_before_anything_is_written(
    more: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(*more, "--dataset", "nano", "-o", "out") == code
    assert words in _error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_without_the_eval_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "math_verify" else find(name, *a))
    assert evaluate("x", "--dataset", "nano", "-o", tmp_path / "out") == 1
    assert 'needs math_verify, which is not installed; pip install "qwen-rt[eval]"' in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_the_bundle_may_stand_behind_the_options() -> None:
    assert _parse(["eval", "--dataset", "nano", "-o", "out", "nano-cpu"]).bundle == "nano-cpu"
    assert _parse(["eval", "nano-cpu", "--dataset", "nano", "-o", "out"]).bundle == "nano-cpu"
    assert _parse(["generate", "nano-cpu", "--raw", "hello"]).prompt == "hello"


def test_nano_solves_its_problems(nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [nano_bundle, "--dataset", "nano", "-o", tmp_path / "out", "--threads", "1", "--batch", "4"]
    assert evaluate(*arguments, "--limit", "5") == 0
    assert evaluate(*arguments, "--limit", "12") == 0
    assert re.search(r"^nano +all +12 ", capsys.readouterr().out, re.MULTILINE)
    assert evaluate(*arguments, "--limit", "12", "-o", tmp_path / "whole") == 0
    parts, whole = (
        {line["id"]: (line["output"], line["num_tokens"]) for line in read_lines(tmp_path / name)}
        for name in ("out", "whole")
    )
    assert len(parts) == 12
    assert parts == whole
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["datasets"][0]["num_right"] >= 11
    assert results["settings"]["model"]["target"] == "cpu"
    assert results == json.loads((tmp_path / "whole" / "results.json").read_text("utf-8"))


def test_samples_of_a_bundle_repeat(nano_bundle: Path, tmp_path: Path) -> None:
    outputs = []
    for name, batch in (("a", "8"), ("b", "3")):
        more = ["--samples", "3", "--temperature", "5", "--max-tokens", "12", "--limit", "3", "--batch", batch]
        assert evaluate(nano_bundle, "--dataset", "nano", "-o", tmp_path / name, "--threads", "1", *more) == 0
        outputs.append({(line["id"], line["sample"]): line["output"] for line in read_lines(tmp_path / name)})
        assert {line["finish_reason"] for line in read_lines(tmp_path / name)} <= {"stop", "length"}
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 9
    assert len(set(outputs[0].values())) > 3


def test_a_prompt_that_leaves_no_room(nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "short", "answer": "1"}, {"question": "1 + " * 20_000, "answer": "2", "idx": "long"}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    assert evaluate(nano_bundle, "--dataset", file, "-o", tmp_path / "out") == 2
    assert "the prompt of problem long of d has" in _error(capsys)


def test_a_bundle_without_a_chat_template_gets_examples(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BundleModel(nano_bundle, Sampling())
    assert model.default_format == "instruct"
    monkeypatch.setattr(model._tokenizer, "chat_templates", {})
    assert model.default_format == "few-shot"


def test_progress_goes_to_stderr(tmp_path: Path) -> None:
    file = sums(tmp_path / "sums.jsonl", 3)
    with serving(right) as server:
        program = [sys.executable, "-m", "qwen_rt", "eval", *map(str, _on(server, file, tmp_path / "out"))]
        runs = [
            subprocess.run([*program, "--limit", n], capture_output=True, text=True, check=True, env=dict(os.environ))
            for n in ("2", "3")
        ]
    assert runs[0].stderr.startswith("answers: started, 2\n")
    assert runs[0].stderr.splitlines()[-1].startswith("answers: done 2 in ")
    assert runs[1].stderr.startswith("answers (2 were there): started, 1\n")
    assert all("100.0 %" in run.stdout for run in runs)
