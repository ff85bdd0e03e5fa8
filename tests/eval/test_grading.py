"""Answers are found, compared by mathematics, and voted on; what hangs or breaks the comparison is wrong."""

from __future__ import annotations

import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.benchmarks.eval.extraction import find_answer
from qwen_rt.benchmarks.eval.grading import Grade, Grader, majority
from qwen_rt.benchmarks.nano.prompts import boxed_answer, boxed_content
from qwen_rt.errors import QwenRtError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no \\boxed{1} but \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{7} and then \\boxed{8", "7"),
        ("\\fbox{3}", "3"),
        ("\\boxed {4}", "4"),
        ("so $\\boxed 6$.", "6"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{[0, 1\\}}", "[0, 1\\}"),
        ("\\boxed{ $12$. }", "12"),
        ("} } \\boxed{1} {", "1"),
        ("\\boxed{}", None),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234 ", "1,234"),
        ("The answer is 42.", "42"),
        ("the final answer is: $\\frac{3}{4}$, as shown", "\\frac{3}{4}"),
        ("The answer is 1. No, the answer is 2. Done.", "2"),
        ("The answer is 12 apples. So", "12"),
        ("The answer is 5 m.", "5"),
        ("The answer is $18.", "18"),
        ("The answer is 25%.", "25%"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 10^6.", "10^6"),
        ("**Answer:** \\(x+1\\)", "x+1"),
        ("Answer: \\[x\\]", "x"),
        ("The answer is **17**.", "17"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is (B).", "(B)"),
        ("The answer is .", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_answers_are_found(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


def test_the_last_box_is_found_in_one_pass() -> None:
    started = time.perf_counter()
    assert boxed_content("\\boxed{" * 200_000) is None
    assert boxed_content("\\boxed{1}" + "{" * 200_000) == "1"
    assert time.perf_counter() - started < 2
    assert boxed_answer("\\boxed{ 1 \\frac{1} {2} }") == "1\\frac{1}{2}"


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("1/2", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("\\frac12", "\\dfrac{1}{2}"),
        ("1,000", "1000"),
        ("1000", "1{,}000"),
        ("1000", "1,\\!000"),
        ("\\text{(A)}", "A"),
        ("\\text{(A)}", "(A)"),
        ("\\text{Evelyn}", "Evelyn"),
        ("[0,1)", "\\left[0, 1\\right)"),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)"),
        ("1,2", "2, 1"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("2\\sqrt2", "\\sqrt{8}"),
        ("x+1", "1+x"),
        ("y=2x+1", "2x+1"),
        ("5", "x = 5"),
        ("5", "5\\text{ cm}"),
        ("90", "90^\\circ"),
        ("50\\%", "50"),
        ("\\$5", "5"),
        ("12", "12.0"),
        ("5", "5."),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
        ("some words", "some  words"),
    ],
)
def test_equal(expected: str, found: str, grader: Grader) -> None:
    assert grader.equal(expected, found)
    assert grader.grade(f"So \\boxed{{{found}}}", expected).correct


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("1/2", "0.51"),
        ("1/3", "0.33"),
        ("[0,1)", "[0,1]"),
        ("(0,1)", "(0,1]"),
        ("(1,2)", "(2,1)"),
        ("\\text{(A)}", "B"),
        ("\\text{Evelyn}", "Bob"),
        ("5", "-5"),
        ("2", "2x"),
        ("100", "1000"),
        ("5", "five hundred"),
        ("5", "}{\\frac"),
        ("5", "1\ud800"),
        ("5", "9" * 2000),
    ],
)
def test_different(expected: str, found: str, grader: Grader) -> None:
    assert not grader.equal(expected, found)


INTEGERS = st.one_of(st.integers(-200, 200), st.integers(-(10**18) + 1, 10**18 - 1))


@settings(max_examples=100, deadline=None)
@given(first=INTEGERS, second=INTEGERS, same=st.booleans())
def test_whole_numbers_take_a_fast_path_that_agrees_with_math_verify(first: int, second: int, same: bool) -> None:
    from math_verify import parse, verify

    second = first if same else second
    theirs = verify(*(parse(f"${number}$", parsing_timeout=None) for number in (first, second)), timeout_seconds=None)
    grader = Grader()
    assert grader.equal(str(first), str(second)) == theirs == (first == second)
    assert grader._process is None


def test_an_unmarked_answer_is_left_to_math_verify(grader: Grader) -> None:
    assert grader.grade("We get 3 + 4 = 7", "7") == Grade("7", True)
    assert grader.grade("hence $x = \\frac{1}{2}$", "0.5").correct
    assert grader.grade("I do not know", "7") == Grade(None, False)
    assert grader.grade("We get 3 + 4 = 7", "7", is_cut_off=True) == Grade(None, False)
    assert grader.grade("The answer is 7. Next", "7", is_cut_off=True) == Grade("7", True)
    assert grader.grade("  \n", "7") == Grade(None, False)


@pytest.mark.parametrize("found", ["10^{10^{10}}", "(10^{9})!"])
def test_what_computes_for_ever_is_undecided_and_wrong(found: str) -> None:
    with Grader(cpu_seconds=0.5) as grader:
        started = time.perf_counter()
        assert grader.grade(f"\\boxed{{{found}}}", "5") == Grade(found, False, undecided=True)
        assert grader.grade(f"\\boxed{{{found}}}", "5").undecided  # known: no second try
        assert time.perf_counter() - started < 60
        assert grader.equal("1/2", "0.5")  # in a new process


@pytest.mark.parametrize(
    "found", ["{" * 5000 + "}" * 5000, "\\frac{" * 150, "\\begin{pmatrix}1\\\\2", "$$\\left(", "\\"]
)
def test_what_cannot_be_parsed_is_wrong(found: str, grader: Grader) -> None:
    assert not grader.equal("5", found)
    assert grader.equal("0.5", "1/2")


def test_the_process_may_die_at_any_time(grader: Grader) -> None:
    with Grader() as own:
        assert own.equal("1/2", "0.5")
        assert own._process is not None
        own._process.kill()
        own._process.wait()
        assert own.grade("\\boxed{2/4}", "1/2") == Grade("2/4", False, undecided=True)
        assert own.equal("3/6", "1/2")


def test_a_grader_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader, pytest.raises(QwenRtError, match="math-verify does not start; run python -c"):
        grader.equal("1/2", "0.5")


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["1", "2", "2"], 1),
        (["0.5", "3", "1/2", "3", "\\frac12"], 0),
        (["1", "2"], 0),  # a tie goes to the first
        (["2", "1", "1", "2"], 0),
        ([None, "4", None], 1),  # no answer, no vote
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_of_equal_answers(answers: list[str | None], chosen: int | None, grader: Grader) -> None:
    assert majority(answers, grader) == chosen
