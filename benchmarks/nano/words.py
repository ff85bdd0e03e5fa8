"""Two-step word problems: a story with three numbers, and the two calculations that answer it."""

from collections.abc import Callable
from dataclasses import dataclass

from .arithmetic import Worked, add, divide, multiply, subtract
from .base import Draw, Problem, finish, vary

NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Farid",
    "Grace",
    "Hiro",
    "Ines",
    "Jamal",
    "Kate",
    "Liam",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Victor",
    "Wei",
    "Yusuf",
    "Zoe",
    "Tom",
    "Lucy",
    "Emma",
    "Jack",
    "Alice",
    "Bob",
    "Natalia",
]
OBJECTS = [
    "apples",
    "pens",
    "books",
    "stickers",
    "marbles",
    "cards",
    "cookies",
    "oranges",
    "eggs",
    "balls",
    "toys",
    "shells",
    "coins",
    "stamps",
    "pencils",
    "candies",
    "tickets",
    "flowers",
    "cups",
    "clips",
]
CONTAINERS = ["boxes", "bags", "packs", "baskets", "crates", "jars"]

OPERATIONS: dict[str, Callable[[int, int], Worked]] = {"+": add, "-": subtract, "*": multiply, "/": divide}


@dataclass(frozen=True)
class Story:
    """A template: its text, the two steps, and how its numbers are drawn.

    Attributes:
        texts: phrasings with the fields ``n`` (name), ``m`` (another name), ``o`` (objects), ``c`` (containers),
            ``p``, ``q``, ``r`` (the numbers).
        first: what the first step finds, and its operation on ``p`` and ``q``.
        second: what the second step finds, its operation, and whether ``r`` stands on the left of it.
        ranges: lowest and highest value of ``p``, ``q``, ``r``.
    """

    texts: tuple[str, ...]
    first: tuple[str, str]
    second: tuple[str, str, bool]
    ranges: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


COUNT, SMALL, LARGE = (2, 99), (2, 12), (10, 999)
STORIES = (
    Story(
        (
            "{n} has {p} {c} with {q} {o} in each. {n} gives away {r} {o}. How many {o} are left?",
            "There are {p} {c} of {o} with {q} {o} each. If {n} takes {r} {o}, how many {o} remain?",
            "{n} buys {p} {c} of {o}. Each holds {q} {o}. After giving {r} {o} to {m}, how many {o} does {n} have?",
        ),
        ("All {o}", "*"),
        ("Left", "-", False),
        (COUNT, SMALL, COUNT),
    ),
    Story(
        (
            "{n} has {p} {c} with {q} {o} in each and {r} more {o}. How many {o} does {n} have in total?",
            "{n} packs {p} {c} with {q} {o} each and has {r} {o} left over. How many {o} were there?",
            "A shop has {p} {c} of {q} {o} each and {r} single {o}. How many {o} does it have altogether?",
        ),
        ("In {c}", "*"),
        ("Total", "+", False),
        (COUNT, SMALL, COUNT),
    ),
    Story(
        (
            "{n} has {p} {o}. {m} gives {n} {q} more, and then {n} loses {r}. How many {o} does {n} have now?",
            "{n} had {p} {o}, bought {q} more and gave away {r}. How many {o} are left?",
            "{n} collects {p} {o} on Monday and {q} {o} on Tuesday, then sells {r}. How many {o} does {n} have left?",
        ),
        ("Together", "+"),
        ("Left", "-", False),
        (LARGE, LARGE, COUNT),
    ),
    Story(
        (
            "{n} has {p} {o} and gives {q} to {m}. Then {n} finds {r} more. How many {o} does {n} have now?",
            "There were {p} {o} in a shop. It sold {q} and then received {r} more. How many {o} are in the shop now?",
        ),
        ("After giving", "-"),
        ("Total", "+", False),
        (LARGE, COUNT, LARGE),
    ),
    Story(
        (
            "{n} sells {p} {o} in the morning and {q} {o} in the afternoon at ${r} each. "
            "How many dollars does {n} earn?",
            "{n} sold {p} {o} on Monday and {q} {o} on Tuesday. Each costs ${r}. How much money did {n} make?",
        ),
        ("Sold", "+"),
        ("Money", "*", False),
        ((2, 60), (2, 60), SMALL),
    ),
    Story(
        (
            "{n} has {p} {o} and sells all but {q} of them for ${r} each. How many dollars does {n} earn?",
            "{n} baked {p} cookies, ate {q} of them and sold the rest for ${r} each. How much money did {n} make?",
        ),
        ("Sold", "-"),
        ("Money", "*", False),
        (LARGE, SMALL, SMALL),
    ),
    Story(
        (
            "{n} buys {p} {o} at ${q} each and pays with ${r}. How much change does {n} get?",
            "{n} has ${r} and buys {p} {o} for ${q} each. How much money is left?",
            "Each of {p} {o} costs ${q}. {n} has ${r}. How many dollars are left after buying them all?",
        ),
        ("Cost", "*"),
        ("Left", "-", True),
        ((2, 40), SMALL, (10, 999)),
    ),
    Story(
        (
            "{n} has {p} {o} and {m} has {q} {o}. They share all of them equally among {r} friends. "
            "How many {o} does each friend get?",
            "{n} puts {p} red and {q} blue {o} into {r} {c}, the same number in each. How many {o} are in each?",
        ),
        ("Together", "+"),
        ("Each", "/", False),
        (COUNT, COUNT, (2, 9)),
    ),
    Story(
        (
            "A car travels at {p} miles per hour for {q} hours and then drives {r} more miles. How far does it go?",
            "{n} rides {p} miles a day for {q} days and then {r} miles more. How many miles does {n} ride in total?",
            "{n} reads {p} pages a day for {q} days, then {r} more pages. How many pages did {n} read in total?",
            "{n} saves ${p} a week for {q} weeks and already has ${r}. How many dollars does {n} have in total?",
        ),
        ("First part", "*"),
        ("Total", "+", False),
        (COUNT, SMALL, COUNT),
    ),
)


def _numbers(draw: Draw, story: Story) -> tuple[int, int, int]:
    """Draw ``p``, ``q``, ``r`` such that nothing in the story becomes negative or fractional."""
    while True:
        p, q, r = (draw.integer(*limits) for limits in story.ranges)
        if story.second[1] == "/":
            total = r * draw.integer(2, 20)
            if total < 4:
                continue
            p = draw.integer(2, total - 2)
            q = total - p
        first = _plain(p, story.first[1], q)
        second = _plain(r, story.second[1], first) if story.second[2] else _plain(first, story.second[1], r)
        if first > 0 and second >= 0:
            return p, q, r


def _plain(a: int, operation: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]


def word(draw: Draw) -> Problem:
    """Make a two-step word problem."""
    story = draw.choice(STORIES)
    p, q, r = _numbers(draw, story)
    name = draw.choice(NAMES)
    other = draw.choice(NAMES)
    while other == name:
        other = draw.choice(NAMES)
    fields = {"n": name, "m": other, "o": draw.choice(OBJECTS), "c": draw.choice(CONTAINERS), "p": p, "q": q, "r": r}
    question = draw.choice(story.texts).format(**fields)
    if draw.chance(0.1):
        question = vary(draw, question)
    goal, operation = story.first
    first = OPERATIONS[operation](p, q)
    lines = [f"{goal.format(**fields)}: {p}{operation}{q}", *first.lines]
    expression = f"({p}{operation}{q})"
    goal, operation, reversed_order = story.second
    a, b = (r, first.value) if reversed_order else (first.value, r)
    second = OPERATIONS[operation](a, b)
    lines += [f"{goal}: {a}{operation}{b}", *second.lines]
    symbol = "//" if operation == "/" else operation
    expression = f"{r}{symbol}{expression}" if reversed_order else f"{expression}{symbol}{r}"
    return finish("word", question, lines, second.value, expression)
