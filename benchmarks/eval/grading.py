"""Whether an answer is right: exact for whole numbers and equal texts, by math-verify for everything else.

math-verify runs in a process of its own (`judge`), with limits on time and memory: an answer that cannot be parsed or
compared within them is wrong and counted as undecided, and never stops the evaluation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from qwen_rt.benchmarks.eval.extraction import MAX_ANSWER_CHARS, find_answer, tidy
from qwen_rt.errors import QwenRtError

__all__ = ["Grade", "Grader", "majority"]

CPU_SECONDS = 10.0
"""For one comparison, a thousand times what an ordinary one takes."""

_TAIL_CHARS = 2000
_CACHED = 100_000
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_GIVE_UP_S = 5.0


@dataclass(frozen=True)
class Grade:
    """What became of one output.

    Attributes:
        extracted: The answer found in it; None if there is none.
        correct: Whether it equals the expected one.
        undecided: The comparison ran out of time or memory; `correct` is False then.
    """

    extracted: str | None
    correct: bool
    undecided: bool = False


class Grader:
    """Grades outputs; a context manager that ends its process.

    Args:
        cpu_seconds: For one comparison.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, str], bool | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process. A later call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_GIVE_UP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def grade(self, output: str, expected: str, *, is_cut_off: bool = False) -> Grade:
        """Find the answer in an output and compare it with the expected one.

        Args:
            output: What the model wrote.
            expected: What is right.
            is_cut_off: It ended for its length: only a marked answer counts, not a number that it was working with.
        """
        extracted = find_answer(output) if is_cut_off else self.extract(output)
        if extracted is None:
            return Grade(None, False)
        equal = self._compare(_plain(expected), extracted)
        return Grade(extracted, equal is True, equal is None)

    def extract(self, output: str) -> str | None:
        """Return the answer of an output: the marked one, else what math-verify finds at its end; None without one."""
        marked = find_answer(output)
        if marked is not None or not output.strip():
            return marked
        found = self._ask({"extract": output[-_TAIL_CHARS:]})
        return tidy(found) if isinstance(found, str) else None

    def equal(self, expected: str, found: str) -> bool:
        r"""Whether two answers are the same: `1/2`, `0.5` and `\frac{1}{2}` are; what cannot be compared is not."""
        return self._compare(_plain(expected), _plain(found)) is True

    def _compare(self, expected: str, found: str) -> bool | None:
        """None where it cannot be decided."""
        if expected == found:
            return True
        if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(found):
            return int(expected) == int(found)
        if max(len(expected), len(found)) > MAX_ANSWER_CHARS:
            return False
        if (expected, found) not in self._known:
            if len(self._known) >= _CACHED:
                self._known.clear()
            value = self._ask({"equal": [expected, found]})
            self._known[expected, found] = value if isinstance(value, bool) else None
        return self._known[expected, found]

    def _ask(self, request: dict[str, Any]) -> object:
        """Return the reply of the process, or None if the request was its end."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._read(self._process)
        except (OSError, ValueError, KeyError):  # it has ended: a broken pipe, or half a line
            self.close()
            return None

    def _start(self) -> subprocess.Popen[str]:
        program = [sys.executable, "-P", "-W", "ignore", "-m", "qwen_rt.benchmarks.eval.judge", str(self._cpu_seconds)]
        process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        try:
            self._read(process)
        except (ValueError, KeyError):
            self._process = process
            self.close()
            raise QwenRtError(
                "math-verify does not start",
                fix='run python -c "import math_verify" to see why, or pip install --force-reinstall "qwen-rt[eval]"',
            ) from None
        return process

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> object:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())["value"]


def majority(answers: Sequence[str | None], grader: Grader) -> int | None:
    """Vote: return the number of the first answer of the largest class of equal answers.

    Of classes of the same size the one seen first wins. An output without an answer does not vote.

    Args:
        answers: Extracted answers, in the order of their samples.
        grader: Says which are equal.

    Returns:
        An index into `answers`; None if none of them is an answer.
    """
    first: list[int] = []  # the first member of each class
    votes: list[int] = []
    class_of: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in class_of:
            equal = (c for c, member in enumerate(first) if grader.equal(str(answers[member]), answer))
            class_of[answer] = next(equal, len(first))
            if class_of[answer] == len(first):
                first.append(index)
                votes.append(0)
        votes[class_of[answer]] += 1
    return first[votes.index(max(votes))] if votes else None


def _plain(answer: str) -> str:
    return tidy(answer) or answer
