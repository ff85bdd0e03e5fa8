"""The folder of an evaluation: settings, every answer, and the results of those who asked.

    settings.json   what the answers depend on; a run with other settings does not touch the folder
    answers.jsonl   an answer a line, appended when it is there; locked (flock) while an evaluation runs
    results.json    accuracy; results.md is the same as a table

A run that was killed left whole lines and at most one torn one, which the next run drops.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_rt.errors import StorageError
from qwen_rt.storage import atomic_write_bytes, storage_errors

__all__ = ["ANSWERS_FILE", "RESULTS_FILE", "SETTINGS_FILE", "TABLE_FILE", "Answer", "AnswerFile", "open_answers"]

SETTINGS_FILE, ANSWERS_FILE = "settings.json", "answers.jsonl"
RESULTS_FILE, TABLE_FILE = "results.json", "results.md"
Key = tuple[str, str, int]

_UNFINISHED = re.compile(r"\..+\.tmp")  # of an atomic write that was killed
_START_OVER = "choose another folder, or pass --force to start over"


@dataclass(frozen=True)
class Answer:
    """An answer, and what was made of it.

    Attributes:
        dataset: Name of the dataset.
        id: The problem's.
        sample: Which of several answers to it, from 0.
        prompt: Digest of the prompt.
        seed: Of its sampling; None when greedy.
        finish_reason: `stop`, `length`, or what a server calls it.
        num_tokens: Tokens of the output; None if unknown.
        expected: What is right.
        extracted: The answer found in the output; None if there is none.
        correct: Whether the two are equal.
        undecided: Whether they could not be compared.
        output: The text; not kept in memory when a file is read.
    """

    dataset: str
    id: str
    sample: int
    prompt: str
    seed: int | None
    finish_reason: str
    num_tokens: int | None
    expected: str
    extracted: str | None
    correct: bool
    undecided: bool
    output: str | None = None

    @property
    def key(self) -> Key:
        """Dataset, problem, sample."""
        return self.dataset, self.id, self.sample


_OPTIONAL_TYPES: Mapping[str, tuple[type, ...]] = {
    "seed": (int, type(None)),
    "num_tokens": (int, type(None)),
    "extracted": (str, type(None)),
    "sample": (int,),
    "correct": (bool,),
    "undecided": (bool,),
}


class AnswerFile:
    """The answers that are there, and the place for more.

    Attributes:
        answers: Key → answer, without its text.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self.answers: dict[Key, Answer] = {}

    def read(self) -> None:
        """Read what is there and drop a torn last line.

        Raises:
            StorageError: A line before is no answer, or a second one to the same problem.
        """
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                answer = _parse(line, f"{self._path}:{number}")
                if answer.key in self.answers:
                    raise StorageError(f"{self._path}:{number} answers {answer.id} again", "one answer", _START_OVER)
                self.answers[answer.key] = answer
        self.truncate(end)

    def truncate(self, size: int) -> None:
        """Forget what stands behind the first `size` bytes."""
        with storage_errors(self._path):
            os.ftruncate(self._fd, size)

    def append(self, answer: Answer) -> None:
        """Write an answer; when this returns, the death of the process does not take it away.

        Raises:
            StorageError: No space is left, or another trouble of the disk.
        """
        line = json.dumps(asdict(answer), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        with storage_errors(self._path):
            while line:
                line = line[os.write(self._fd, line) :]
        self.answers[answer.key] = replace(answer, output=None)

    def sync(self) -> None:
        """Wait until everything is on disk."""
        with storage_errors(self._path):
            os.fsync(self._fd)


@contextlib.contextmanager
def open_answers(folder: Path, settings: Mapping[str, Any], *, force: bool = False) -> Iterator[AnswerFile]:
    """Open the folder of an evaluation, or make it; yields its answers.

    Args:
        folder: The folder; its parent must exist.
        settings: What the answers depend on, as JSON data.
        force: Throw away what an earlier evaluation left there.

    Raises:
        StorageError: It holds something else, answers made with other settings, or another run is at work there.
    """
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        names = [path.name for path in folder.iterdir() if not _UNFINISHED.fullmatch(path.name)]
    settings_file, path = folder / SETTINGS_FILE, folder / ANSWERS_FILE
    # Without settings there may be an empty file of answers, of a run that was killed as it began.
    if SETTINGS_FILE not in names and any(name != ANSWERS_FILE or path.stat().st_size for name in names):
        what = f"{folder} is not empty and holds no {SETTINGS_FILE}"
        raise StorageError(what, "a new folder, or one of `qwen-rt eval`", "choose another folder")
    with storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another evaluation writes to {folder}", fix="wait for it, or choose another") from None
        answers = AnswerFile(path, fd)
        if force:
            for name in (RESULTS_FILE, TABLE_FILE):
                (folder / name).unlink(missing_ok=True)
            answers.truncate(0)
            _write_json(settings_file, settings)
        else:
            if not settings_file.exists():  # under the lock: of two runs that begin at once only one writes them
                _write_json(settings_file, settings)
            _compare(_read_json(settings_file), settings, folder)
            answers.read()
        yield answers
        answers.sync()
    finally:
        os.close(fd)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    atomic_write_bytes(
        file, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    )


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is not JSON: {error}", fix=_START_OVER) from None


def _compare(there: object, wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder of other settings, naming the first that differs."""
    for name, mine, other in _differences(json.loads(json.dumps(wanted)), there, ""):
        what = f"the answers in {folder} were made with {name}={_short(other)}"
        raise StorageError(what, f"{name}={_short(mine)}", _START_OVER)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}..."


def _differences(mine: object, other: object, name: str) -> Iterator[tuple[str, object, object]]:
    if isinstance(mine, dict) and isinstance(other, dict):
        for key in {**mine, **other}:
            yield from _differences(mine.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif mine != other:
        yield name or "settings", mine, other


def _parse(line: bytes, where: str) -> Answer:
    try:
        row = json.loads(line)
        row.pop("output", None)
        answer = Answer(**row)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise StorageError(f"{where} is no answer", "a line that `qwen-rt eval` wrote", _START_OVER) from None
    for name, value in vars(answer).items():
        kinds = _OPTIONAL_TYPES.get(name, (str,))
        if name != "output" and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise StorageError(f"{where}: {name}={_short(value)}", "a line that `qwen-rt eval` wrote", _START_OVER)
    return answer
