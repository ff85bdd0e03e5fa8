import ast
import operator
import re
from itertools import islice

import pytest

from qwen_rt.benchmarks.nano import arithmetic, heldout
from qwen_rt.benchmarks.nano.base import KINDS, Draw, Problem, normalise
from qwen_rt.benchmarks.nano.problems import distinct, stream
from qwen_rt.benchmarks.nano.prompts import boxed_answer

NUM_SAMPLE = 3000
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def calculate(expression: str) -> int:
    """Evaluate an integer expression of + - * / // and parentheses."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                if isinstance(op, ast.Div | ast.FloorDiv):
                    assert a % b == 0, expression
                return OPERATORS[type(op)](a, b)
        raise AssertionError(expression)

    # Python reads a leading zero as a syntax error; no generated number has one.
    return value(ast.parse(expression, mode="eval").body)


@pytest.fixture(scope="module")
def sample() -> list[Problem]:
    return list(islice(stream(11, heldout.excluded_questions()), NUM_SAMPLE))


def test_a_seed_gives_the_same_problems_and_another_seed_others():
    first, again, other = (list(islice(stream(seed), 200)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_stream_is_pinned_across_python_versions():
    draw = Draw(1)
    assert [draw.integer(0, 999) for _ in range(5)] == [134, 847, 763, 255, 495]


def test_every_kind_occurs_and_no_solution_is_long(sample):
    assert {problem.kind for problem in sample} == set(KINDS)
    assert max(len(problem.solution) for problem in sample) < 700


def test_the_boxed_answer_is_the_independently_computed_one(sample):
    for problem in sample:
        assert int(problem.answer) == calculate(problem.expression), problem
        assert boxed_answer(problem.solution) == problem.answer


def test_every_arithmetic_statement_in_a_solution_is_true(sample):
    statement = re.compile(r"(?<![\w(*/+<>=-])(-?\d[\d+*/()-]*)=(-?[\d(][\d+*/()-]*)(?![\d=a-z])")
    num_checked = 0
    for problem in sample:
        lines = [line for line in problem.solution.splitlines() if not line.startswith("Compare:")]
        for left, right in statement.findall("\n".join(lines)):
            assert calculate(left) == calculate(right), (left, right, problem)
            num_checked += 1
    assert num_checked > 10 * NUM_SAMPLE // 2


def side_value(side: str, variable: str, root: int) -> int:
    term = re.sub(rf"(\d){variable}", rf"\1*{variable}", side)
    return calculate(term.replace(variable, f"({root})").strip())


def test_roots_satisfy_their_equations(sample):
    equation = re.compile(r"([\dxyntz +-]*[xyntz\d])\s*=\s*(-?[\dxyntz][\dxyntz +-]*)")
    num_checked = 0
    for problem in sample:
        if problem.kind != "linear":
            continue
        text = re.sub(r"[A-Za-z']{2,}", "|", problem.question)
        left, right = equation.search(text.replace("| for", "|")).groups()
        variable = next(character for character in left if character in "xyntz")
        root = int(problem.answer)
        assert side_value(left, variable, root) == side_value(right, variable, root), problem
        num_checked += 1
    assert num_checked > NUM_SAMPLE // 10


def test_the_solution_depends_on_the_numbers_alone():
    by_numbers: dict[tuple[str, ...], set[str]] = {}
    for problem in islice(stream(3), 20_000):
        if problem.kind in ("addition", "multiplication"):
            by_numbers.setdefault((problem.kind, problem.expression), set()).add(problem.solution)
    assert max(map(len, by_numbers.values())) == 1


@pytest.mark.parametrize(
    ("worked", "value"),
    [
        (arithmetic.add(0, 0), 0),
        (arithmetic.add(99999, 99999), 199998),
        (arithmetic.subtract(1000, 1), 999),
        (arithmetic.subtract(7, 12345), -12338),
        (arithmetic.subtract(43, 43), 0),
        (arithmetic.multiply(999, 99), 98901),
        (arithmetic.multiply(99, 999), 98901),
        (arithmetic.multiply(100, 10), 1000),
        (arithmetic.multiply(345, 0), 0),
        (arithmetic.signed_sum(-20, 5), -15),
        (arithmetic.signed_sum(-20, -5), -25),
        (arithmetic.signed_sum(-5, 20), 15),
        (arithmetic.divide(-15, -3), 5),
    ],
)
def test_arithmetic_edges(worked, value):
    assert worked.value == value
    assert worked.lines[-1].endswith(f"={value}")


def test_all_small_sums_differences_and_products():
    for a in range(0, 130, 3):
        for b in range(0, 100, 3):
            assert arithmetic.add(a, b).value == a + b
            assert arithmetic.subtract(a, b).value == a - b
            assert arithmetic.multiply(a, b).value == a * b
            assert arithmetic.signed_sum(-a, b).value == b - a


def test_what_cannot_be_worked_out_is_refused():
    with pytest.raises(ValueError, match="below 100"):
        arithmetic.multiply(123, 456)
    with pytest.raises(ValueError, match="not a whole number"):
        arithmetic.divide(7, 2)


def test_the_heldout_file_regenerates_byte_for_byte():
    assert heldout.HELDOUT_PATH.read_bytes() == heldout.render().encode("utf-8")


def test_the_heldout_set_has_equal_shares_and_no_question_twice():
    rows = heldout.load()
    assert len(rows) == heldout.NUM_HELDOUT
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} == dict.fromkeys(KINDS, 200)
    assert len({normalise(row["question"]) for row in rows}) == len(rows) == len({row["id"] for row in rows})
    for row, problem in zip(rows, distinct(heldout.HELDOUT_SEED, heldout.NUM_HELDOUT), strict=True):
        assert row["answer"] == boxed_answer(row["solution"]) == str(calculate(problem.expression))


def test_training_never_sees_a_heldout_question(sample):
    excluded = heldout.excluded_questions()
    assert len(excluded) == heldout.NUM_HELDOUT
    assert not excluded & {normalise(problem.question) for problem in sample}
    unfiltered = {normalise(problem.question) for problem in islice(stream(12), 60_000)}
    assert excluded & unfiltered, "the exclusion is never needed: the test above proves nothing"


@pytest.mark.parametrize(
    ("a", "b"), [("What is 2 + 3?", "what is 2+3"), ("12 × 7", "12 * 7 ="), ("Solve x = 3.", "solve x=3")]
)
def test_normal_forms_ignore_typography(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(r"so \boxed{12}.", "12"), (r"\boxed{1} no, \boxed{ -3 }", "-3"), ("twelve", None), (r"\boxed{", None)],
)
def test_boxed_answers_are_read_back(text, answer):
    assert boxed_answer(text) == answer
