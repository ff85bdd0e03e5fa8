"""Counts of an evaluation: accuracy with its interval, by the dataset's own categories, as JSON and as a table.

mean@K is the share of right answers among K to each problem (for K = 1 the accuracy); maj@K the share of problems whose
most frequent answer is right. Both come with the 95 % interval of Wilson (1927), whose n is the number of problems: K
answers to one problem are not independent, and their mean varies no more than one answer does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_rt.benchmarks.eval.datasets import Dataset, Problem
from qwen_rt.benchmarks.eval.grading import Grader, majority
from qwen_rt.benchmarks.eval.records import Answer

__all__ = ["count", "markdown", "table", "wilson"]

_Z = 1.959963984540054
"""Of a two-sided 95 % interval."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share.

    center ± half = (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        share: p, from 0 to 1.
        n: Number of independent trials, at least 1.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    square = _Z * _Z
    center = share + square / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    scale = 1 + square / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


@dataclass(frozen=True)
class _Judged:
    """A problem with its answers: how many are right, and whether the majority is."""

    problem: Problem
    answers: Sequence[Answer]
    num_right: int
    majority_right: bool


def count(
    dataset: Dataset, answers: Mapping[tuple[str, str, int], Answer], samples: int, grader: Grader
) -> dict[str, Any]:
    """Return all counts of a dataset, as JSON data.

    Args:
        dataset: The problems that were asked.
        answers: Key → answer; has every sample of every problem.
        samples: K.
        grader: Says which answers vote together.
    """
    judged = []
    for problem in dataset.problems:
        given = [answers[dataset.name, problem.id, sample] for sample in range(samples)]
        chosen = majority([answer.extracted for answer in given], grader) if samples > 1 else None
        right = [answer.correct for answer in given]
        judged.append(_Judged(problem, given, sum(right), chosen is not None and right[chosen]))
    names = dict.fromkeys(name for problem in dataset.problems for name in problem.categories)
    breakdown = {name: _groups(name, judged, samples) for name in names}
    return {
        "dataset": dataset.name,
        "layout": dataset.layout,
        "sha256": dataset.sha256,
        **_shares(judged, samples),
        **_totals(answer for one in judged for answer in one.answers),
        "breakdown": breakdown,
    }


def _groups(name: str, judged: Sequence[_Judged], samples: int) -> dict[str, Any]:
    """Shares of every value of a category, in the order in which people count."""
    values = {one.problem.categories.get(name, "none") for one in judged}
    return {
        value: _shares([one for one in judged if one.problem.categories.get(name, "none") == value], samples)
        for value in sorted(values, key=_natural)
    }


def _natural(text: str) -> list[tuple[bool, int, str]]:
    parts = [part for part in re.split(r"([0-9]{1,9})", text) if part]
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts]


def _shares(judged: Sequence[_Judged], samples: int) -> dict[str, Any]:
    num_problems = len(judged)
    num_right = sum(one.num_right for one in judged)
    found: dict[str, Any] = {
        "num_problems": num_problems,
        "num_answers": num_problems * samples,
        "num_right": num_right,
        "mean": _share(num_right / (num_problems * samples), num_problems),
    }
    if samples > 1:
        num_majorities = sum(one.majority_right for one in judged)
        found["num_right_majorities"] = num_majorities
        found["majority"] = _share(num_majorities / num_problems, num_problems)
    return found


def _share(share: float, n: int) -> dict[str, float]:
    low, high = wilson(share, n)
    return {"accuracy": round(share, 6), "low": round(low, 6), "high": round(high, 6)}


def _totals(answers: Iterable[Answer]) -> dict[str, Any]:
    """What is worth knowing of the outputs themselves."""
    all_answers = list(answers)
    tokens = [answer.num_tokens for answer in all_answers if answer.num_tokens is not None]
    return {
        "num_tokens": sum(tokens) if len(tokens) == len(all_answers) else None,
        "num_cut_off": sum(answer.finish_reason == "length" for answer in all_answers),
        "num_without_answer": sum(answer.extracted is None for answer in all_answers),
        "num_undecided": sum(answer.undecided for answer in all_answers),
    }


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table, heading first."""
    samples = results["samples"]
    heading = ["dataset", "group", "problems", "accuracy" if samples == 1 else f"mean@{samples}", "95 % interval"]
    if samples > 1:
        heading += [f"maj@{samples}", "95 % interval"]
    rows = [heading]
    for found in results["datasets"]:
        rows.append([found["dataset"], "all", *_cells(found)])
        for name, groups in found["breakdown"].items():
            rows += [["", f"{name} {value}", *_cells(shares)] for value, shares in groups.items()]
    return rows


def _cells(shares: Mapping[str, Any]) -> list[str]:
    cells = [str(shares["num_problems"])]
    for name in ("mean", "majority"):
        if name in shares:
            share = shares[name]
            cells += [f"{100 * share['accuracy']:.1f} %", f"{100 * share['low']:.1f} – {100 * share['high']:.1f}"]
    return cells


def _heading(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    model, prompt, sampling = settings["model"], settings["prompt"], settings["sampling"]
    name = model.get("bundle") or f"{model['model']} at {model['endpoint']}"
    shots = "" if prompt["shots"] is None else f" ({prompt['shots']} examples)"
    how = f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, seed {sampling['seed']}"
    chosen = "greedy" if sampling["temperature"] == 0 else how
    return f"{name}: {prompt['format']}{shots}, {chosen}, at most {sampling['max_tokens']} tokens"


def _notes(results: Mapping[str, Any]) -> list[str]:
    """A line on the outputs of each dataset."""
    notes = []
    for found in results["datasets"]:
        tokens = found["num_tokens"]
        length = "" if tokens is None else f", {tokens / found['num_answers']:.0f} tokens each"
        parts = (
            ("num_cut_off", "cut off"),
            ("num_without_answer", "without an answer"),
            ("num_undecided", "undecided"),
        )
        counts = ", ".join(f"{found[key]} {text}" for key, text in parts)
        notes.append(f"{found['dataset']}: {found['num_answers']} outputs{length}; {counts}")
    return notes


def table(results: Mapping[str, Any]) -> str:
    """Return the results for a terminal."""
    rows = _rows(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([_heading(results), "", *lines, "", *_notes(results)])


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown document."""
    heading, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _rows(results)]
    lines = [heading, ["---"] * 2 + ["--:"] * (len(heading) - 2), *rows]
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([_heading(results), "", *body, "", *_notes(results)]) + "\n"
