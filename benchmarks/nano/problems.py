r"""Seeded synthetic maths problems: a question, a worked solution, and the answer.

Five kinds (:data:`KINDS`) in many phrasings. The solution depends on the numbers alone, never on the phrasing, and
ends in ``\boxed{ANSWER}``. Only ``random.Random.random`` is drawn from, the one method whose stream Python promises
to keep for a given integer seed, so a seed gives the same problems on every Python version.

Command line: ``python -m qwen_rt.benchmarks.nano.problems --num 5 --seed 1`` prints problems as JSON lines.
"""

import argparse
import json
from collections.abc import Callable, Collection, Iterator

from .arithmetic import add, divide, multiply, signed_sum, subtract
from .base import KINDS, Draw, Problem, finish, normalise, vary
from .words import word

SYMBOLIC = (
    "What is {e}?",
    "What is {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "Evaluate {e}.",
    "Work out {e}.",
    "How much is {e}?",
    "What's {e}?",
    "Find {e}.",
    "What does {e} equal?",
    "{e}",
    "{e} = ?",
    "{e} =",
)
VERBAL = {
    "addition": (
        "What is the sum of {a} and {b}?",
        "Find the sum of {a} and {b}.",
        "Compute the sum of {a} and {b}.",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "What do you get if you add {b} to {a}?",
    ),
    "subtraction": (
        "What is {a} minus {b}?",
        "How much is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "What do you get if you subtract {b} from {a}?",
    ),
    "multiplication": (
        "What is the product of {a} and {b}?",
        "Compute the product of {a} and {b}.",
        "Find the product of {a} and {b}.",
        "Multiply {a} by {b}.",
        "Multiply {a} and {b}.",
        "What is {a} times {b}?",
        "How much is {a} times {b}?",
        "What is {a} multiplied by {b}?",
    ),
}
SYMBOLS = {"addition": ("+",), "subtraction": ("-",), "multiplication": ("*", "*", "\u00d7", "x")}


def _arithmetic_question(draw: Draw, kind: str, a: int, b: int) -> str:
    if draw.chance(0.4):
        return vary(draw, draw.choice(VERBAL[kind]).format(a=a, b=b))
    symbol = draw.choice(SYMBOLS[kind])
    gap = "" if draw.chance(0.25) else " "
    return vary(draw, draw.choice(SYMBOLIC).format(e=f"{a}{gap}{symbol}{gap}{b}"))


def addition(draw: Draw) -> Problem:
    """Make an addition of numbers of 1 to 5 digits."""
    a, b = draw.number(5), draw.number(5)
    worked = add(a, b)
    return finish("addition", _arithmetic_question(draw, "addition", a, b), worked.lines, worked.value, f"{a}+{b}")


def subtraction(draw: Draw) -> Problem:
    """Make a subtraction of numbers of 1 to 5 digits; some are close together, about half the results are negative."""
    a = draw.number(5)
    b = max(0, a + draw.integer(-30, 30)) if draw.chance(0.2) else draw.number(5)
    if a < b and draw.chance(0.4):
        a, b = b, a
    worked = subtract(a, b)
    question = _arithmetic_question(draw, "subtraction", a, b)
    return finish("subtraction", question, worked.lines, worked.value, f"{a}-{b}")


def multiplication(draw: Draw) -> Problem:
    """Make a multiplication of up to 3 digits by up to 2, in either order."""
    a = draw.number(3)
    if draw.chance(0.3):
        a = draw.integer(100, 999)
    b = draw.integer(10, 99) if draw.chance(0.6) else draw.integer(0, 9)
    if draw.chance(0.25):
        a, b = b, a
    worked = multiply(a, b)
    question = _arithmetic_question(draw, "multiplication", a, b)
    return finish("multiplication", question, worked.lines, worked.value, f"{a}*{b}")


LINEAR = (
    "Solve for {v}: {e}.",
    "Solve for {v}: {e}",
    "Solve {e} for {v}.",
    "Solve {e}.",
    "Solve the equation {e}.",
    "Solve the equation {e} for {v}.",
    "Find {v} if {e}.",
    "Find the value of {v} if {e}.",
    "If {e}, what is {v}?",
    "If {e}, find {v}.",
    "What value of {v} satisfies {e}?",
    "What is {v} if {e}?",
    "{e}. What is {v}?",
    "{e}",
)


def _side(coefficient: int, constant: int, variable: str, gap: str) -> str:
    """Write ``coefficient * variable + constant``."""
    term = {1: variable, -1: f"-{variable}"}.get(coefficient, f"{coefficient}{variable}")
    if constant == 0:
        return term
    return f"{term}{gap}{'+' if constant > 0 else '-'}{gap}{abs(constant)}"


def _move(constant: int) -> str:
    return f"Subtract {constant} from both sides" if constant > 0 else f"Add {-constant} to both sides"


def linear(draw: Draw) -> Problem:
    """Make ``a x + b = c`` or ``a x + b = c x + d`` with an integer solution."""
    variable = draw.choice(("x", "x", "x", "x", "y", "n", "t", "z"))
    root = draw.integer(-20, 20) if draw.chance(0.4) else draw.integer(0, 20)
    a = draw.integer(1, 12) if draw.chance(0.8) else draw.integer(-9, -1)
    b = draw.integer(-50, 50) if draw.chance(0.6) else draw.integer(0, 50)
    c = 0
    if draw.chance(0.4):
        c = draw.integer(-9, 12)
        while c in (a, 0):
            c = draw.integer(-9, 12)
    d = (a - c) * root + b
    gap = "" if draw.chance(0.25) else " "
    left = _side(a, b, variable, gap)
    right = _side(c, d, variable, gap) if c else str(d)
    question = vary(draw, draw.choice(LINEAR).format(v=variable, e=f"{left}{gap}={gap}{right}"))
    lines, slope = [], a - c
    if c:
        moved = _side(abs(c), 0, variable, "")
        verb = f"Subtract {moved} from" if c > 0 else f"Add {moved} to"
        joined = f"{_side(a, 0, variable, '')}{'-' if c > 0 else '+'}{moved}"
        lines.append(f"{verb} both sides: {joined}={_side(slope, 0, variable, '')}")
        if b:
            lines.append(f"{_side(slope, b, variable, '')}={d}")
    term, value = _side(slope, 0, variable, ""), d
    if b:
        moved_constant = signed_sum(d, -b)
        lines += [f"{_move(b)}: {term}={d}{-b:+d}", *moved_constant.lines]
        value = moved_constant.value
    if slope != 1 and (b or c):
        lines.append(f"{term}={value}")
    if slope != 1:
        quotient = divide(value, slope)
        lines.append(f"Divide both sides by {slope}: {variable}={quotient.lines[0]}")
        value = quotient.value
    lines.append(f"{variable}={value}")
    return finish("linear", question, lines, value, f"({d}-({b}))//({slope})")


MAKERS: dict[str, Callable[[Draw], Problem]] = dict(
    zip(KINDS, (addition, subtraction, multiplication, word, linear), strict=True)
)

TRAINING_SHARES = (0.13, 0.25, 0.17, 0.18, 0.27)
"""How often each of :data:`KINDS` is drawn for training; held-out problems have equal shares."""


def stream(seed: int, excluded: Collection[str] = frozenset()) -> Iterator[Problem]:
    """Yield training problems without end.

    Args:
        seed: the same seed gives the same stream.
        excluded: normal forms (:func:`normalise`) of questions to leave out.
    """
    draw = Draw(seed)
    while True:
        point, index = draw.unit(), 0
        while index < len(KINDS) - 1 and point >= TRAINING_SHARES[index]:
            point -= TRAINING_SHARES[index]
            index += 1
        problem = MAKERS[KINDS[index]](draw)
        if normalise(problem.question) not in excluded:
            yield problem


def distinct(seed: int, num_problems: int, excluded: Collection[str] = frozenset()) -> list[Problem]:
    """Return problems with equal shares of all kinds and no question twice, in a fixed order of kinds."""
    draw = Draw(seed)
    seen = set(excluded)
    problems: list[Problem] = []
    while len(problems) < num_problems:
        problem = MAKERS[KINDS[len(problems) % len(KINDS)]](draw)
        key = normalise(problem.question)
        if key not in seen:
            seen.add(key)
            problems.append(problem)
    return problems


def main() -> None:
    """Print problems as JSON lines."""
    parser = argparse.ArgumentParser(description="Print synthetic maths problems as JSON lines.")
    parser.add_argument("--num", type=int, default=5, help="how many problems (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed prints the same problems (default: 1)")
    arguments = parser.parse_args()
    problems = stream(arguments.seed)
    for _ in range(arguments.num):
        print(json.dumps(vars(next(problems)), ensure_ascii=False))


__all__ = ["KINDS", "MAKERS", "TRAINING_SHARES", "Problem", "distinct", "normalise", "stream"]

if __name__ == "__main__":
    main()
