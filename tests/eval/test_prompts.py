"""What a model is asked, to the letter; the worked examples are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_rt.benchmarks.eval.datasets import Problem
from qwen_rt.benchmarks.eval.extraction import find_answer
from qwen_rt.benchmarks.eval.prompts import make_format
from qwen_rt.benchmarks.eval.shots import SHOTS
from qwen_rt.errors import UsageError

PROBLEM = Problem("1", "What is {x} + 1?", "2", {})


def test_instruct_is_qwen2_maths_prompt() -> None:
    prompt = make_format("instruct").prompt(PROBLEM, "words")
    assert prompt.is_chat
    assert prompt.messages == [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": "What is {x} + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        },
    ]
    assert prompt.stop == ()


@pytest.mark.parametrize(("style", "most"), [("words", 8), ("math", 4)])
def test_few_shot(style: str, most: int) -> None:
    for shots, count in ((None, most), (0, 0), (2, 2), (8, most)):
        prompt = make_format("few-shot", shots=shots, stop=("\n\n\n",)).prompt(PROBLEM, style)  # type: ignore[arg-type]
        assert not prompt.is_chat
        assert prompt.stop == ("Question:", "\n\n\n")
        parts = prompt.text.split("Question: ")
        assert parts[0] == ""
        assert len(parts) == count + 2
        assert all(re.fullmatch(r"[^\n]+\nAnswer: [^\n]+\n\n", part) for part in parts[1:-1])
        assert parts[-1] == "What is {x} + 1?\nAnswer:"


def test_the_worked_examples_are_right() -> None:
    assert [find_answer(answer) for _, answer in SHOTS["math"]] == [
        "8",
        "\\frac{1}{2}",
        "[-1,5]",
        "\\frac{4\\sqrt{5}}{5}",
    ]
    for question, answer in SHOTS["words"]:
        equations = re.findall(r"([\d+*/ -]*\d) = (\d+)", answer)
        assert equations
        for left, value in equations:
            assert eval(left) == int(value), (question, left)
        assert find_answer(answer) == equations[-1][1]


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Q {question} \\boxed{}\n{question}", "utf-8")
    prompt = make_format("raw", template_file=file, stop=("Q",)).prompt(PROBLEM, "math")
    assert (prompt.text, prompt.is_chat, prompt.stop) == (
        "Q What is {x} + 1? \\boxed{}\nWhat is {x} + 1?",
        False,
        ("Q",),
    )
    assert make_format("instruct", template_file=file).prompt(PROBLEM, "math").is_chat
    assert make_format("raw", template_file=file).describe() != make_format("few-shot").describe()


def test_the_digest_names_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("{question}\nPlease reason step by step, and put your final answer within \\boxed{}.", "utf-8")
    chat = make_format("instruct").prompt(PROBLEM, "words")
    raw = make_format("raw", template_file=file).prompt(PROBLEM, "words")
    assert chat.text == raw.text
    assert re.fullmatch("[0-9a-f]{16}", chat.digest)
    assert chat.digest != raw.digest
    assert chat.digest == make_format("instruct", template_file=file).prompt(PROBLEM, "math").digest


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("no hole", "utf-8")
    for words, make in (
        ("has no {question}", lambda: make_format("raw", template_file=file)),
        ("cannot be read", lambda: make_format("raw", template_file=tmp_path / "none")),
        ("raw without a template", lambda: make_format("raw")),
        ("a template with few-shot", lambda: make_format("few-shot", template_file=file)),
        ("shots=9; expected 0 to 8", lambda: make_format("few-shot", shots=9)),
        ("shots=-1", lambda: make_format("few-shot", shots=-1)),
        ("shots=1 with prompt format instruct", lambda: make_format("instruct", shots=1)),
    ):
        with pytest.raises(UsageError, match=words):
            make()
