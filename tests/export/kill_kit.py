"""Builds that can be killed at any moment, and what they may leave.

A driver process imports everything once and forks a child for each build, so that a moment of the build can be hit
and not a moment of importing. Children die in two ways: by a signal from outside at random times, and by their own
hand at every step that touches the disk, which an audit hook counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.bundle import MANIFEST_FILE, Bundle
from qwen_rt.errors import BundleError

from ..cli.kit import environment, shared_graph

DRIVER = r"""
import json, os, sys
import qwen_rt.export.build, qwen_rt.export.weights
from qwen_rt.cli import main

qwen_rt.export.weights.BLOCK_BYTES = 1 << 20
STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def die_at(step, folder):
    # Steps of the build: what changes names on the disk below the folder, and files opened there for writing.
    count = 0

    def hook(event, args):
        nonlocal count
        if event == "open":
            counts = isinstance(args[0], str) and args[0].startswith(folder) and (args[2] or 0) & os.O_CREAT
        else:
            counts = event in STEPS
        if counts:
            count += 1
            if count == step:
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        os.write(1, f"{os.getpid()}\n".encode())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        qwen_rt.export.weights.MAX_FILE_BYTES = job["file_bytes"]
        if job["step"]:
            die_at(job["step"], job["folder"])
        os._exit(main(job["arguments"]))
    _, status = os.waitpid(pid, 0)
    os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())
"""


class BuildDriver:
    """Runs builds in forked children."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
            bufsize=1,
        )

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def build(
        self,
        out: Path,
        *options: str,
        kill_when: Callable[[], bool] | None = None,
        step: int = 0,
        file_bytes: int = 2 << 20,
    ) -> int:
        """Build and return the exit code, -9 if the child was killed: when a condition holds, or at a step."""
        assert self.process.stdin is not None
        arguments = ["build", str(shared_graph()), "-o", str(out), "--quiet", *options]
        job: dict[str, Any] = {"arguments": arguments, "step": step, "folder": str(out.parent)}
        job["file_bytes"] = file_bytes
        self.process.stdin.write(json.dumps(job) + "\n")
        pid = self._read()
        if kill_when is not None:
            while not kill_when() and Path(f"/proc/{pid}").exists():
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def complete_or_absent(out: Path) -> bool:
    """Whether the bundle is there; what is there without being complete fails the test."""
    if out.exists():
        Bundle.open(out, check="full")
        return True
    stage = out.parent / f".{out.name}.partial"
    if stage.exists() and not (stage / MANIFEST_FILE).exists():
        with pytest.raises(BundleError):
            Bundle.open(stage)
    return False
