"""Progress: a bar on a terminal, sparse plain lines in a pipe, nothing on stdout, and no harm from a broken stderr."""

# ruff: noqa: PT012 - blocks that fail half-way are what is tested

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest

from qwen_rt.progress import Progress, format_count, format_seconds, progress, track


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _lines(total: int | None, steps: int, seconds_a_step: float, *, unit: str = "it", n: int = 1) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with Progress(total, "work", unit, stream=stream, clock=clock) as bar:  # type: ignore[arg-type]
        for _ in range(steps):
            clock.now += seconds_a_step
            bar.update(n)
    return stream.getvalue().splitlines()


def test_first_and_last_line_are_always_there() -> None:
    assert _lines(3, 3, 0.01) == ["work: started, 3", "work: done 3 in 0.0 s, 100/s"]
    assert _lines(None, 0, 1.0)[0] == "work: started"
    assert len(_lines(None, 0, 1.0)) == 2


def test_fast_work_is_limited_by_time() -> None:
    lines = _lines(1000, 1000, 0.01)  # 10 s in all
    assert len(lines) - 2 == 4  # after 2, 4, 6 and 8 s; the end has its own line
    assert lines[1] == "work: 20 % (200 of 1000), 100/s, 8.0 s left"


def test_slow_work_is_limited_by_steps_of_ten_percent() -> None:
    lines = _lines(1000, 1000, 10.0)
    assert len(lines) - 2 == 9
    assert [re.search(r"(\d+) %", line)[1] for line in lines[1:-1]] == [str(10 * k) for k in range(1, 10)]  # type: ignore[index]


def test_bytes_have_units_and_unknown_totals_have_no_percent() -> None:
    lines = _lines(4_000_000_000, 4, 5.0, unit="B", n=1_000_000_000)
    assert lines[0] == "work: started, 4.0 GB"
    assert lines[1] == "work: 25 % (1.0 GB of 4.0 GB), 200.0 MB/s, 15 s left"
    assert _lines(None, 2, 3.0)[1] == "work: 1, 0.3/s"


def test_zero_total_and_overshoot_do_not_fail() -> None:
    assert _lines(0, 2, 5.0)[1] == "work: 1, 0.2/s"
    assert _lines(2, 4, 5.0)[-1] == "work: done 4 in 20 s, 0.2/s"


def test_quiet_writes_nothing_but_counts() -> None:
    stream = io.StringIO()
    with progress(5, "work", quiet=True, stream=stream) as bar:
        bar.update(5)
    assert bar.done == 5
    assert stream.getvalue() == ""


def test_an_exception_passes_and_is_told_of() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), progress(5, "work", stream=stream) as bar:
        bar.update(2)
        raise KeyError("x")
    assert stream.getvalue().splitlines()[-1].startswith("work: stopped after 2 in")


def test_control_characters_in_the_description_stay_out_of_the_terminal() -> None:
    stream = io.StringIO()
    with progress(1, "a\x1b[2Jb\nc", stream=stream):
        pass
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [_closed, _Broken])
def test_a_broken_stderr_does_not_stop_the_work(stream: Callable[[], io.StringIO]) -> None:
    with progress(2, "work", stream=stream()) as bar:
        bar.update(2)
    assert bar.done == 2


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress(2, "work") as bar:
        bar.update()
    assert bar.done == 1


def test_track_yields_all_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "items")) == [1, 2, 3]
    assert list(track(iter("ab"), "letters")) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "items: done 3" in captured.err
    assert "letters: done 2" in captured.err


PROGRAM = """
import time
from qwen_rt.progress import progress
with progress(3_000_000, "copying", "B") as bar:
    for _ in range(3):
        time.sleep(0.15)
        bar.update(1_000_000)
print("result")
"""


@pytest.mark.parametrize("columns", [0, 60], ids=["unsized", "sized"])
def test_on_a_terminal_there_is_a_bar_and_stdout_stays_clean(columns: int) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while block := os.read(leader, 4096):
            shown += block
    except OSError:  # the terminal is gone once the process has ended
        pass
    finally:
        os.close(leader)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == b"result\n"
    text = shown.decode()
    assert "copying" in text
    assert "\r" in text
    assert "100%" in text
    assert "B/s" in text


def test_in_a_pipe_there_are_plain_lines_and_stdout_stays_clean() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "result\n"
    assert done.stderr.splitlines()[0] == "copying: started, 3.0 MB"
    assert "copying: done 3.0 MB in" in done.stderr
    assert "\r" not in done.stderr


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (999_949, "B", "999.9 kB"),
        (999_950, "B", "1.0 MB"),
        (999.6, "B", "1.0 kB"),
        (1.25e9, "B", "1.2 GB"),
        (3e15, "B", "3000.0 TB"),
        (7, "it", "7"),
        (2.5, "it", "2.5"),
        (1234.4, "it", "1234"),
    ],
)
def test_format_count(value: float, unit: str, text: str) -> None:
    assert format_count(value, unit) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (math.inf, "?"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
