"""Counts, intervals and tables, against numbers worked out otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwen_rt.benchmarks.eval.datasets import Dataset, Problem
from qwen_rt.benchmarks.eval.grading import Grader
from qwen_rt.benchmarks.eval.records import Answer
from qwen_rt.benchmarks.eval.results import count, markdown, table, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_intervals(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right / n, n)
    assert found == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (1.0, 1), (0.5, 7), (0.98, 1000)])
def test_wilson_holds_every_share_that_the_score_test_accepts(share: float, n: int) -> None:
    """At both ends the share lies z standard errors away: the equation that the interval solves."""
    for end in wilson(share, n):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def _answer(problem: str, sample: int, extracted: str | None, **more: Any) -> Answer:
    fields: dict[str, Any] = {"finish_reason": "stop", "num_tokens": 10, "undecided": False}
    fields |= more
    return Answer(
        "d", problem, sample, "0", None, expected="1", extracted=extracted, correct=extracted == "1", **fields
    )


def _results(samples: int, grader: Grader) -> dict[str, Any]:
    problems = tuple(Problem(str(i), "q", "1", {"level": str(10 - i), "kind": "a|b"} if i else {}) for i in range(3))
    outputs = [["1", "2", "1"], ["3", "3", "1"], [None, None, None]]
    answers = [_answer(str(i), s, outputs[i][s]) for i in range(3) for s in range(samples)]
    answers[0] = _answer("0", 0, "1", finish_reason="length", num_tokens=30)
    answers[-1] = _answer("2", samples - 1, None, undecided=True)
    dataset = Dataset("d", "gsm8k", "00", "words", problems)
    counted = count(dataset, {answer.key: answer for answer in answers}, samples, grader)
    settings = {
        "model": {"bundle": "nano-cpu"},
        "prompt": {"format": "few-shot", "shots": 4},
        "sampling": {"temperature": 0.7 if samples > 1 else 0.0, "top_p": 0.8, "max_tokens": 64, "seed": 3},
    }
    return {"settings": settings, "samples": samples, "limit": None, "datasets": [counted]}


def test_greedy(grader: Grader) -> None:
    results = _results(1, grader)
    (found,) = results["datasets"]
    assert (found["num_problems"], found["num_answers"], found["num_right"]) == (3, 3, 1)
    assert found["mean"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert "majority" not in found
    assert (found["num_tokens"], found["num_cut_off"], found["num_without_answer"], found["num_undecided"]) == (
        50,
        1,
        1,
        1,
    )
    assert list(found["breakdown"]["level"]) == ["8", "9", "none"]
    assert found["breakdown"]["kind"]["a|b"]["num_problems"] == 2
    shown = table(results)
    assert shown.splitlines()[0] == "nano-cpu: few-shot (4 examples), greedy, at most 64 tokens"
    assert [line.split() for line in shown.splitlines()[2:4]] == [
        ["dataset", "group", "problems", "accuracy", "95", "%", "interval"],
        ["d", "all", "3", "33.3", "%", "6.1", "–", "79.2"],
    ]
    assert shown.endswith("d: 3 outputs, 17 tokens each; 1 cut off, 1 without an answer, 1 undecided")


def test_three_samples(grader: Grader) -> None:
    results = _results(3, grader)
    (found,) = results["datasets"]
    assert (found["num_answers"], found["num_right"], found["num_right_majorities"]) == (9, 3, 1)
    assert found["mean"]["accuracy"] == found["majority"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    low, high = wilson(1 / 3, 3)
    assert (found["mean"]["low"], found["mean"]["high"]) == pytest.approx((low, high), abs=1e-6)
    assert "temperature 0.7, top-p 0.8, seed 3" in table(results)
    lines = markdown(results).splitlines()
    assert lines[2] == "| dataset | group | problems | mean@3 | 95 % interval | maj@3 | 95 % interval |"
    assert lines[3] == "| --- | --- | --: | --: | --: | --: | --: |"
    assert any("kind a\\|b" in line for line in lines)
    assert all(line.count("|") - line.count("\\|") == 8 for line in lines[2:-2])
