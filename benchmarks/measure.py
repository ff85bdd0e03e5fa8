"""Measuring from outside: a child's time and memory, talking to a worker, and what the memory bus can deliver."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import QwenRtError
from qwen_rt.machine import last_json_line, read_cpu

__all__ = [
    "ChildResult",
    "Worker",
    "first_byte_seconds",
    "l3_bytes",
    "num_cores",
    "package_python",
    "process_seconds",
    "read_bandwidth",
    "run_child",
]

# Linux counts the memory of the forking parent as the child's peak, so a small process stands in between.
_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - start
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class ChildResult:
    """How a child process did: exit code, seconds, peak resident bytes, and all that it printed."""

    returncode: int
    wall_s: float
    peak_rss_bytes: int
    output: str

    def require(self, what: str) -> Self:
        """Return this, of a program that ended well.

        Args:
            what: The program, for the error.

        Raises:
            QwenRtError: It did not; the end of what it printed is in the message.
        """
        if self.returncode:
            raise QwenRtError(f"{what} ended with {self.returncode}: {self.output[-500:]}")
        return self


def package_python(*arguments: str) -> list[str]:
    """Return a command of this Python."""
    return [sys.executable, *arguments]


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 600.0) -> ChildResult:
    """Run a program in a process of its own and measure it.

    Args:
        command: Absolute path of the program and its arguments.
        env: Changes to the environment.
        timeout_s: Longest it may take.

    Returns:
        Wall time from spawn to exit, and the peak resident memory of it and its children (the largest one).

    Raises:
        QwenRtError: The program could not be started or did not end in time.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    pipe, env = subprocess.PIPE, {**os.environ, **(env or {})}
    with subprocess.Popen(launcher, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True) as process:
        try:
            told, output = process.communicate(timeout=timeout_s)
        except BaseException as error:  # the program goes with its launcher, or it would disturb what is measured next
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise QwenRtError(f"{' '.join(command[1:4])} ran for more than {timeout_s:g} s") from None
            raise
    measured = last_json_line(told)
    if not isinstance(measured, list):
        raise QwenRtError(f"{command[0]} could not be measured: {output[-300:]}")
    return ChildResult(int(measured[0]), float(measured[1]), int(measured[2]), output)


def first_byte_seconds(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[float, str]:
    """Return the seconds from starting a program to the first byte on its stdout, and its whole output.

    Raises:
        QwenRtError: It printed nothing or failed.
    """
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,  # no pipe: one that is full would hold the child up
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **(env or {})}) as child,
    ):
        assert child.stdout is not None
        first = os.read(child.stdout.fileno(), 1)
        elapsed_s = time.perf_counter() - start
        rest = child.stdout.read()
        child.wait()
        errors.seek(0)
        trouble = errors.read().decode(errors="replace")
    if not first or child.returncode:
        raise QwenRtError(f"{' '.join(command[1:4])} ended with {child.returncode}: {trouble[-300:]}")
    return elapsed_s, (first + rest).decode(errors="replace")


class Worker:
    """A contender in its own process, asked over pipes: one JSON object a line each way (see `cpu_worker.py`).

    Args:
        python: The interpreter; it may be that of another environment.
        kind: Which contender.
        options: What it is loaded with.
    """

    def __init__(self, python: str, kind: str, options: Mapping[str, Any]) -> None:
        self.kind = kind
        env = dict(os.environ)
        if python != sys.executable:
            env.pop("PYTHONPATH", None)  # another environment: ours must not leak into it
        script = str(Path(__file__).with_name("cpu_worker.py"))
        self._process = subprocess.Popen(
            [python, "-P", script, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        try:
            self.loaded = self.ask("load", **options)
        except BaseException:
            self.close()
            raise

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line)
            del self._errors[:-50]

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the contender and return its answer.

        Raises:
            QwenRtError: The worker failed or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print lines of their own
                answer = json.loads(line)
                if isinstance(answer, dict) and "error" in answer:
                    raise QwenRtError(f"{self.kind}: {answer['error']}")
                if isinstance(answer, dict) and "answer" in answer:
                    return dict(answer["answer"])
        self._process.wait()
        self._reader.join(timeout=5)
        raise QwenRtError(f"{self.kind} ended with {self._process.returncode}: {''.join(self._errors)[-500:]}")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def num_cores() -> int:
    """Cores that this process may use."""
    return read_cpu().num_usable_cores


def l3_bytes() -> int:
    """Size of the last-level cache; 32 MiB where Linux does not tell."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KM")) * (1 << 20 if text.endswith("M") else 1 << 10))
    return max(sizes)


_READERS: dict[str, tuple[type[np.generic], Callable[[NDArray[Any]], object]]] = {
    "add float32": (np.float32, np.add.reduce),
    "maximum float32": (np.float32, np.maximum.reduce),
    "maximum int64": (np.int64, np.maximum.reduce),
    "add int64": (np.int64, np.add.reduce),
    "or uint64": (np.uint64, np.bitwise_or.reduce),
}


def read_bandwidth(nbytes: int | None = None, threads: int = 0, seconds: float = 1.0) -> dict[str, Any]:
    """Measure how fast all cores together can read memory.

    Every thread reduces a buffer of its own, over and over. No single reduction saturates the bus on every processor,
    so the fastest of several counts.

    Args:
        nbytes: All buffers together; None takes 8 times the last-level cache, but at least 512 MiB. A size that fits
            the cache measures the cache: right for a model that fits it too.
        threads: 0 for every core.
        seconds: For each reduction.

    Returns:
        `gb_s` (1e9 bytes a second), `reader`, and the rates of all readers.
    """
    threads = threads or num_cores()
    nbytes = max(8 * l3_bytes(), 512 << 20) if nbytes is None else nbytes
    share = max(nbytes // threads // 64 * 64, 4096)
    rates = {}
    for name, (dtype, reduce) in _READERS.items():
        buffers = [np.ones(share // np.dtype(dtype).itemsize, dtype) for _ in range(threads)]
        rates[name] = max(_rate(buffers, reduce, seconds / 3) for _ in range(3)) / 1e9
    best = max(rates, key=lambda name: rates[name])
    rounded = {name: round(rate, 2) for name, rate in rates.items()}
    return {"gb_s": rounded[best], "reader": best, "all": rounded}


def _rate(buffers: list[NDArray[Any]], reduce: Callable[[NDArray[Any]], object], seconds: float) -> float:
    """Bytes a second that the threads read together, all of them running all the time."""
    barrier = threading.Barrier(len(buffers))
    rates = [0.0] * len(buffers)

    def work(index: int) -> None:
        reduce(buffers[index])
        barrier.wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            reduce(buffers[index])
            count += 1
        rates[index] = count * buffers[index].nbytes / (time.perf_counter() - start)

    readers = [threading.Thread(target=work, args=(index,)) for index in range(len(buffers))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(rates)


def process_seconds() -> float:
    """Return how long this process has been running; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, up_s - ticks / os.sysconf("SC_CLK_TCK"))
