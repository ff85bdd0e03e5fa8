r"""Problems from the jsonl files in which the public datasets come, and the held-out ones that ship with qwen-rt.

    layout        what a row has
    qwen-rt       question, answer, kind, id
    gsm8k         question, answer that ends in "#### 42"
    math          problem, solution with \boxed{...}; level, type or subject
    math-500      problem, answer, subject, level, unique_id
    qwen2.5-math  question or problem, answer (as it is, or after "####"); idx, level, subject

The layout is told from the first row; all rows must have it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_rt.benchmarks.nano.heldout import HELDOUT_PATH
from qwen_rt.benchmarks.nano.prompts import boxed_content
from qwen_rt.errors import UsageError

__all__ = ["LAYOUTS", "SHIPPED", "Dataset", "Problem", "Style", "load_dataset", "load_datasets"]

Style = Literal["words", "math"]

SHIPPED = {"nano": HELDOUT_PATH}
"""Datasets that come with qwen-rt, by name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: Unique in its dataset.
        question: What the model is asked.
        answer: What is right, as the dataset writes it.
        categories: The dataset's own groups that it belongs to (`kind`, `level`, `subject`) → which of them.
    """

    id: str
    question: str
    answer: str
    categories: Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """All problems of a file.

    Attributes:
        name: What the results call it.
        layout: A key of `LAYOUTS`.
        sha256: Hex digest of the file.
        style: Which worked examples suit it: word problems, or mathematics in LaTeX.
        problems: In the file's order.
    """

    name: str
    layout: str
    sha256: str
    style: Style
    problems: tuple[Problem, ...]


def _after_hashes(text: str) -> str | None:
    return text.rpartition("####")[2].strip() if "####" in text else None


def _as_it_is(text: str) -> str | None:
    found = _after_hashes(text)
    return text.strip() if found is None else found


@dataclass(frozen=True)
class _Layout:
    """Where a row has what: for each thing the keys to look at, in order."""

    question: tuple[str, ...]
    answer: str
    read: Callable[[str], str | None]
    wanted: str
    ids: tuple[str, ...] = ("unique_id", "idx", "id")
    categories: tuple[tuple[str, tuple[str, ...]], ...] = (("level", ("level",)), ("subject", ("subject", "type")))
    style: Style | None = None


LAYOUTS: Mapping[str, _Layout] = {
    "qwen-rt": _Layout(
        ("question",), "answer", _as_it_is, "an answer", ids=("id",), categories=(("kind", ("kind",)),), style="words"
    ),
    "gsm8k": _Layout(("question",), "answer", _after_hashes, 'an answer after "####"', style="words"),
    "math": _Layout(("problem",), "solution", boxed_content, "an answer in \\boxed{}", style="math"),
    "math-500": _Layout(("problem",), "answer", _as_it_is, "an answer", style="math"),
    "qwen2.5-math": _Layout(("question", "problem"), "answer", _as_it_is, "an answer"),
}
"""Name → how its rows are read, most particular first."""


def load_datasets(given: Sequence[str], layout: str | None = None, limit: int | None = None) -> tuple[Dataset, ...]:
    """Load datasets, each under a name of its own.

    Args:
        given: As for `load_dataset`.
        layout: As for `load_dataset`, for all files.
        limit: Only so many problems of each, the first ones; None for all.

    Raises:
        UsageError: As for `load_dataset`; or two have the same name, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}", "at least 1")
    found: dict[str, Dataset] = {}
    for text in given:
        dataset = load_dataset(text, layout)
        if dataset.name in found:
            raise UsageError(f"two datasets called {dataset.name}", "different names", "write --dataset NAME=FILE")
        kept = dataset.problems if limit is None else dataset.problems[:limit]
        found[dataset.name] = Dataset(dataset.name, dataset.layout, dataset.sha256, dataset.style, kept)
    return tuple(found.values())


def load_dataset(given: str, layout: str | None = None) -> Dataset:
    """Load a dataset.

    Args:
        given: The name of one that ships, a file, or `NAME=FILE`; without a name a file goes by its stem.
        layout: A key of `LAYOUTS`; None tells it from the first row.

    Raises:
        UsageError: There is no such dataset or file, it is no JSONL, is empty, or a row lacks something.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout={layout}", f"one of {', '.join(LAYOUTS)}")
    name, file = _locate(given)
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"dataset {file} cannot be read: {reason}", "a UTF-8 file of JSON lines") from None
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        row = _parse(line, where)
        if layout is None:
            layout = _recognise(row, where)
        problem = _problem(row, LAYOUTS[layout], layout, where, number)
        if problem.id in seen:
            raise UsageError(f"{where}: id {problem.id} is that of line {seen[problem.id]}", "an id for each problem")
        seen[problem.id] = number
        problems.append(problem)
    if layout is None or not problems:
        raise UsageError(f"dataset {file} holds no problem", "one JSON object a line")
    in_latex: Style = "math" if {"level", "subject"} & set(problems[0].categories) else "words"
    return Dataset(name, layout, hashlib.sha256(data).hexdigest(), LAYOUTS[layout].style or in_latex, tuple(problems))


def _locate(given: str) -> tuple[str, Path]:
    """Return name and file of what the user asked for."""
    if given in SHIPPED:
        return given, SHIPPED[given]
    name, equals, rest = given.partition("=")
    if not equals or Path(given).exists():
        name, rest = re.sub(r"[^A-Za-z0-9._-]", "_", Path(given).stem).lstrip("._-")[:64] or "dataset", given
    elif not _NAME.fullmatch(name):
        raise UsageError(f"dataset name {name!r}", "up to 64 letters, digits, dots and dashes")
    file = SHIPPED.get(rest, Path(rest))
    if not file.is_file():
        near = difflib.get_close_matches(rest, SHIPPED, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else ""
        what = "is a folder" if file.is_dir() else "is neither a file nor a dataset that ships"
        raise UsageError(f"dataset {rest} {what}", f"a .jsonl file or one of {', '.join(SHIPPED)}", hint)
    return name, file


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise UsageError(f"{where} is not JSON: {reason}", "one JSON object a line") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} holds {type(row).__name__}", "one JSON object a line")
    return row


def _recognise(row: Mapping[str, Any], where: str) -> str:
    """Tell the layout from the keys of a row."""
    keys = set(row)
    if {"question", "answer", "kind", "id"} <= keys:
        return "qwen-rt"
    if {"problem", "answer", "unique_id"} <= keys:
        return "math-500"
    if "problem" in keys and "solution" in keys and "answer" not in keys:
        return "math"
    if {"question", "answer"} <= keys and "####" in str(row["answer"]):
        return "gsm8k"
    if "answer" in keys and keys & {"question", "problem"}:
        return "qwen2.5-math"
    known = "; ".join(f"{name}: {' or '.join(layout.question)}, {layout.answer}" for name, layout in LAYOUTS.items())
    found = ", ".join(sorted(map(str, keys))[:20]) or "none"
    raise UsageError(f"{where}: no known layout has the keys {found}", known, "rename the keys of the file")


def _problem(row: Mapping[str, Any], layout: _Layout, name: str, where: str, number: int) -> Problem:
    question = next((row[key] for key in layout.question if key in row), None)
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: no text {' or '.join(layout.question)}", f"layout {name}", "see --layout")
    if layout.answer not in row:
        raise UsageError(f"{where}: no key {layout.answer}", f"layout {name}", "see --layout")
    given = _text(row[layout.answer])
    answer = None if given is None else layout.read(given)
    if not answer or not answer.strip():
        raise UsageError(f"{where}: {layout.answer} holds no answer", f"layout {name}: {layout.wanted}", "see --layout")
    identity = next((row[key] for key in layout.ids if row.get(key) is not None), number)
    id_text = _text(identity)
    if not id_text:
        raise UsageError(f"{where}: an id of type {type(identity).__name__}", "a text or a number")
    categories = {}
    for category, keys in layout.categories:
        value = next((_text(row[key]) for key in keys if row.get(key) is not None), None)
        if value:
            categories[category] = value.removeprefix("Level ") if category == "level" else value
    return Problem(id_text, question.strip(), answer.strip(), categories)


def _text(value: object) -> str | None:
    """A text, or a number as one; None for anything else."""
    if isinstance(value, str):
        return value.strip()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps(value) if is_number else None
