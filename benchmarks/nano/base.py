"""What every kind of problem is made with: seeded draws, the problem record, typography."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

KINDS = ("addition", "subtraction", "multiplication", "word", "linear")


@dataclass(frozen=True)
class Problem:
    r"""One problem.

    Attributes:
        kind: one of :data:`KINDS`.
        question: the text a user would type.
        solution: the worked solution, ending in ``\boxed{answer}``.
        answer: the final answer, a decimal integer.
        expression: the answer as a Python integer expression (``//`` for exact division), computed with no column
            arithmetic: what a test compares the worked solution with.
    """

    kind: str
    question: str
    solution: str
    answer: str
    expression: str


class Draw:
    """Random choices built on ``random.Random.random`` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def unit(self) -> float:
        """Return a number of ``[0, 1)``."""
        return self._random()

    def integer(self, low: int, high: int) -> int:
        """Return an integer of ``low..high``, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[int(self._random() * len(items))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random() < probability

    def number(self, max_digits: int) -> int:
        """Return a non-negative integer whose digit count is uniform in ``1..max_digits``."""
        num_digits = self.integer(1, max_digits)
        return self.integer(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits - 1)


def finish(kind: str, question: str, lines: Sequence[str], value: int, expression: str) -> Problem:
    """Build a problem from its solution lines, adding the closing sentence with the boxed answer."""
    solution = "\n".join((*lines, f"The answer is \\boxed{{{value}}}."))
    return Problem(kind, question, solution, str(value), expression)


def vary(draw: Draw, question: str) -> str:
    """Loosen the typography as people do: a small first letter, no full stop or question mark at the end."""
    if draw.chance(0.15):
        question = question[0].lower() + question[1:]
    if draw.chance(0.15) and question[-1] in ".?" and not question.endswith("= ?"):
        question = question[:-1]
    return question


def normalise(question: str) -> str:
    """Reduce a question to what identifies it: lower case, no spaces, no closing punctuation, one sign for times.

    Two questions with the same normal form count as the same when held-out questions are kept out of training.
    """
    return "".join(question.lower().replace("\u00d7", "*").split()).rstrip(".?=:")
