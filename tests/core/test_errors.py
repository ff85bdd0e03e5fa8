"""An error is one printable line of three parts, whatever stands in the names that it tells of."""

from __future__ import annotations

import inspect
import time

import pytest

from qwen_rt import errors
from qwen_rt.errors import CapacityError, QwenRtError, StorageError, UsageError, one_line


def test_the_three_parts_in_one_line() -> None:
    assert str(QwenRtError("a=1", "2", "choose 2")) == "a=1; expected 2; choose 2"
    assert str(QwenRtError("a=1", "2")) == "a=1; expected 2"
    assert str(QwenRtError("a=1", fix="choose 2")) == "a=1; choose 2"
    assert str(QwenRtError("a=1")) == "a=1"
    error = QwenRtError("a\n=1", " 2 ", "choose\t2")
    assert (error.what, error.expected, error.fix) == ("a =1", "2", "choose 2")


@pytest.mark.parametrize("text", ["\n", "\r", "\x1b[2J", "\0", "\u2028", "\u202e", "\ud800", "\x85", "\u200b"])
def test_no_character_forges_a_line_or_commands_a_terminal(text: str) -> None:
    line = str(QwenRtError(f"a{text}b", f"c{text}d", f"e{text}f"))
    assert line.isprintable()
    assert line.encode("utf-8").count(b"\n") == 0
    assert line.startswith("a ")


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Größe 三 = '1'; \"x\" — €"
    assert one_line(text) == text
    assert one_line("") == ""


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    line = one_line("name " + "x" * 5000 + " is too long")
    assert len(line) <= 1000
    assert line.startswith("name xxx")
    assert line.endswith("xxx is too long")
    assert " ... " in line
    assert one_line("y" * 1000) == "y" * 1000
    assert len(one_line("y" * 1001)) <= 1000
    start = time.perf_counter()
    assert len(one_line("\n" * 50_000_000 + "z")) <= 1000
    assert time.perf_counter() - start < 0.5


def test_exit_codes_and_the_tree_in_the_docstring() -> None:
    assert (UsageError.exit_code, CapacityError.exit_code, StorageError.exit_code) == (2, 2, 1)
    assert issubclass(CapacityError, UsageError)
    classes = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert all(issubclass(getattr(errors, name), QwenRtError) for name in classes)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in classes)
    assert set(errors.__all__) == classes | {"one_line"}
