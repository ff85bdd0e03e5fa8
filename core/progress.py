"""Progress of long steps, on stderr: a bar on a terminal, plain lines in a pipe, nothing when quiet.

stdout belongs to results and is never touched. Trouble with stderr (closed, a broken pipe) ends the reporting, never
the work. Byte counts are decimal (1 GB = 10^9 bytes), as disks and model cards count.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Literal, Self, TextIO, TypeVar

__all__ = ["Progress", "format_count", "format_seconds", "progress", "track"]

T = TypeVar("T")
Unit = Literal["it", "B"]

MIN_LINE_INTERVAL_S = 2.0
MIN_LINE_STEP = 0.10


def format_count(value: float, unit: Unit = "it") -> str:
    """Return a count for people: `950 B`, `1.2 GB`, `1234`."""
    if unit != "B":
        return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    for prefix in ("", "k", "M", "G"):
        if round(value, 1 if prefix else 0) < 1000:  # what would read 1000.0 kB is 1.0 MB
            return f"{value:.0f} B" if not prefix else f"{value:.1f} {prefix}B"
        value /= 1000
    return f"{value:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Return a duration for people: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """A running step; a context manager that is told of every advance by `update`.

    Args:
        total: How much there is to do; None if that is unknown.
        desc: What is being done, a few words.
        unit: `it` counts things, `B` counts bytes.
        quiet: Report nothing at all.
        stream: Where to report; stderr if None.
        clock: Seconds that only grow; for tests.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        unit: Unit = "it",
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.desc = "".join(c if c.isprintable() else " " for c in desc)
        self.unit: Unit = unit
        self.done = 0
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._silent = quiet or self._stream is None
        self._bar: Any = None
        self._started = self._last_time = clock()
        self._last_done = 0

    def __enter__(self) -> Self:
        self._started = self._last_time = self._clock()
        if not self._silent and self._on_terminal():
            self._bar = self._open_bar()
        else:
            self._line(f"{self.desc}: started" + ("" if self.total is None else f", {self._amount(self.total)}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._guarded(self._bar.close)
            return
        elapsed = self._clock() - self._started
        verb = "done" if kind is None else "stopped after"
        rate = "" if elapsed <= 0 else f", {self._rate(elapsed)}"
        self._line(f"{self.desc}: {verb} {self._amount(self.done)} in {format_seconds(elapsed)}{rate}")

    def update(self, n: int = 1) -> None:
        """Count `n` more as done."""
        self.done += n
        if self._bar is not None:
            self._guarded(lambda: self._bar.update(n))
        elif not self._silent and self._line_is_due():
            self._last_time, self._last_done = self._clock(), self.done
            self._line(self._status())

    def _on_terminal(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            self._silent = True
            return False

    def _open_bar(self) -> Any:
        from tqdm import tqdm

        try:
            sized = os.get_terminal_size(self._stream.fileno()).columns > 0
        except (OSError, ValueError):
            sized = False
        return tqdm(
            total=self.total,
            desc=self.desc,
            unit=self.unit,
            unit_scale=self.unit == "B",
            unit_divisor=1000,
            file=self._stream,
            dynamic_ncols=sized,
            ncols=None if sized else 80,
        )

    def _line_is_due(self) -> bool:
        """Say whether both limits allow a line: the time since the last one and, where a total is known, the step."""
        if self.total and self.done >= self.total:
            return False  # the last line says it
        if self._clock() - self._last_time < MIN_LINE_INTERVAL_S:
            return False
        return not self.total or self.done - self._last_done >= MIN_LINE_STEP * self.total

    def _status(self) -> str:
        elapsed = self._clock() - self._started
        if not self.total:
            return f"{self.desc}: {self._amount(self.done)}, {self._rate(elapsed)}"
        left = (self.total - self.done) * elapsed / self.done if self.done else math.inf
        share = math.floor(100 * self.done / self.total)
        return (
            f"{self.desc}: {share} % ({self._amount(self.done)} of {self._amount(self.total)}), "
            f"{self._rate(elapsed)}, {format_seconds(max(left, 0.0))} left"
        )

    def _amount(self, value: int) -> str:
        return format_count(value, self.unit)

    def _rate(self, elapsed: float) -> str:
        rate = self.done / elapsed if elapsed > 0 else 0.0
        return f"{format_count(rate, self.unit)}/s"

    def _line(self, text: str) -> None:
        def write() -> None:
            self._stream.write(text + "\n")
            self._stream.flush()

        self._guarded(write)

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run one piece of reporting; the first failure ends all of it."""
        if self._silent:
            return
        try:
            action()
        except (OSError, ValueError):
            self._silent = True


def progress(
    total: int | None, desc: str, unit: Unit = "it", *, quiet: bool = False, stream: TextIO | None = None
) -> Progress:
    """Return a `Progress` to use as a context manager.

        with progress(num_bytes, "writing weights", "B") as bar:
            for block in blocks:
                file.write(block)
                bar.update(len(block))

    Args:
        total: How much there is to do; None if that is unknown.
        desc: What is being done, a few words.
        unit: `it` counts things, `B` counts bytes.
        quiet: Report nothing at all; the command line passes its `--quiet` here.
        stream: Where to report; stderr if None.

    Returns:
        The progress, not yet entered.
    """
    return Progress(total, desc, unit, quiet=quiet, stream=stream)


def track(items: Iterable[T], desc: str, *, quiet: bool = False, stream: TextIO | None = None) -> Iterator[T]:
    """Yield the items, reporting how many have been worked through."""
    total = len(items) if isinstance(items, Sized) else None
    with progress(total, desc, quiet=quiet, stream=stream) as bar:
        for item in items:
            yield item
            bar.update()
