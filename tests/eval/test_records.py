"""The folder of an evaluation: what is there stays, what is torn goes, what is another's is not touched."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.eval.records import Answer, open_answers
from qwen_rt.errors import StorageError

SETTINGS = {"model": {"bundle": "a"}, "sampling": {"seed": 1, "max_tokens": 5}, "datasets": {"d": {"sha256": "00"}}}


def _answer(number: int, **more: Any) -> Answer:
    fields: dict[str, Any] = {
        "prompt": "p",
        "seed": None,
        "finish_reason": "stop",
        "num_tokens": 3,
        "expected": "1",
        "extracted": None,
        "correct": False,
        "undecided": False,
        "output": "text\u2028\ud800\n",
    }
    return Answer("d", str(number), 0, **fields | more)


def _fill(folder: Path, num: int) -> None:
    with open_answers(folder, SETTINGS) as answers:
        for number in range(num):
            answers.append(_answer(number))


def test_answers_are_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    _fill(folder, 3)
    assert (folder / "answers.jsonl").read_bytes().count(b"\n") == 3
    with open_answers(folder, json.loads(json.dumps(SETTINGS))) as answers:
        assert list(answers.answers) == [("d", str(i), 0) for i in range(3)]
        assert all(answer.output is None for answer in answers.answers.values())
        answers.append(_answer(3))
        assert len(answers.answers) == 4
    assert json.loads((folder / "settings.json").read_text("utf-8")) == SETTINGS


@pytest.mark.parametrize("torn", [b"{", b'{"dataset": "d"', b"\0\0\0", None])
def test_a_torn_last_line_is_dropped(torn: bytes | None, tmp_path: Path) -> None:
    _fill(tmp_path / "new", 3)
    file = tmp_path / "new" / "answers.jsonl"
    whole = file.read_bytes()
    if torn is None:  # a whole line but for its end
        file.write_bytes(whole[:-1])
        whole = b"".join(whole.splitlines(keepends=True)[:2])
    else:
        file.write_bytes(whole + torn)
    with open_answers(tmp_path / "new", SETTINGS) as answers:
        assert len(answers.answers) == whole.count(b"\n")
        assert file.read_bytes() == whole
        answers.append(_answer(7))
    assert file.read_bytes().startswith(whole)
    with open_answers(tmp_path / "new", SETTINGS) as answers:
        assert ("d", "7", 0) in answers.answers


@pytest.mark.parametrize(
    "line", [b"[]", b"{}", b"nonsense", b"5", b'{"dataset": "d"}', b"\xff\xfe", b"[" * 50_000, b"null", b"\0"]
)
def test_a_line_that_is_no_answer(line: bytes, tmp_path: Path) -> None:
    _fill(tmp_path / "new", 1)
    file = tmp_path / "new" / "answers.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n" + file.read_bytes())
    with (
        pytest.raises(StorageError, match=r"answers.jsonl:2 is no answer; .*--force"),
        open_answers(tmp_path / "new", SETTINGS),
    ):
        pass


def test_values_of_another_type_and_doubles(tmp_path: Path) -> None:
    _fill(tmp_path / "new", 1)
    file = tmp_path / "new" / "answers.jsonl"
    line = file.read_bytes()
    for changed, words in (
        (line + line, "answers.jsonl:2 answers 0 again"),
        (line.replace(b'"sample": 0', b'"sample": true'), "sample=true"),
        (line.replace(b'"correct": false', b'"correct": 0'), "correct=0"),
        (line.replace(b'"expected": "1"', b'"expected": [1]'), "expected="),
    ):
        file.write_bytes(changed)
        with pytest.raises(StorageError, match=words), open_answers(tmp_path / "new", SETTINGS):
            pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"sampling": {"seed": 2, "max_tokens": 5}},
            "were made with sampling.seed=1; expected sampling.seed=2; .*--force",
        ),
        ({"datasets": {"e": {}}}, "datasets.e=null"),
        ({"model": {"bundle": "b" * 500}}, 'model.bundle="a"'),
    ],
)
def test_a_folder_of_other_settings_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    _fill(folder, 2)
    (folder / "results.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StorageError, match=words) as found, open_answers(folder, SETTINGS | change):
        pass
    assert len(str(found.value)) < 500
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with open_answers(folder, SETTINGS | change, force=True) as answers:
        assert answers.answers == {}
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "settings.json"]
    with open_answers(folder, SETTINGS | change):
        pass


def test_what_is_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    for force in (False, True):
        with (
            pytest.raises(StorageError, match=r"is not empty and holds no settings.json"),
            open_answers(folder, SETTINGS, force=force),
        ):
            pass
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    with pytest.raises(StorageError, match="its folder does not exist"), open_answers(tmp_path / "a" / "b", SETTINGS):
        pass
    with pytest.raises(StorageError, match="in the way"), open_answers(folder / "thesis.txt", SETTINGS):
        pass
    _fill(tmp_path / "new", 1)
    (tmp_path / "new" / "settings.json").write_text("{")
    with pytest.raises(StorageError, match=r"settings.json is not JSON"), open_answers(tmp_path / "new", SETTINGS):
        pass


def test_a_killed_atomic_write_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".settings.json.0123456789ab.tmp").write_text("{")
    _fill(tmp_path / "new", 1)


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with (
        open_answers(tmp_path / "new", SETTINGS),
        pytest.raises(StorageError, match="another evaluation writes"),
        open_answers(tmp_path / "new", SETTINGS, force=True),
    ):
        pass


def test_of_two_that_begin_at_once_one_runs_with_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, others = tmp_path / "new", SETTINGS | {"datasets": {"e": {}}}
    plain, stack = os.open, contextlib.ExitStack()

    def open_second(*arguments: Any, **options: Any) -> int:
        monkeypatch.setattr(os, "open", plain)
        stack.enter_context(open_answers(folder, SETTINGS))  # the other one, between our look and our lock
        return plain(*arguments, **options)

    with stack:
        monkeypatch.setattr(os, "open", open_second)
        with pytest.raises(StorageError, match="another evaluation writes"), open_answers(folder, others):
            pass
    assert json.loads((folder / "settings.json").read_text("utf-8")) == SETTINGS


def test_a_run_killed_as_it_began_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "answers.jsonl").touch()
    _fill(tmp_path / "new", 1)
    (tmp_path / "new" / "settings.json").unlink()
    with pytest.raises(StorageError, match="holds no settings"), open_answers(tmp_path / "new", SETTINGS):
        pass


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    _fill(tmp_path / "new", 2)
    file = tmp_path / "new" / "answers.jsonl"
    size = file.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_answers(tmp_path / "new", SETTINGS) as answers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"cannot write .*answers.jsonl"):
                answers.append(_answer(7))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(answers.answers) == 2
    assert file.stat().st_size == size + 100
    with open_answers(tmp_path / "new", SETTINGS) as answers:
        assert len(answers.answers) == 2
