"""Environments with the libraries that load our folders: made from pinned requirements, kept below build/."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEES_OURS = {"optimum": True, "genai": False}
"""Layout → whether its environment sees the packages of ours, which saves it a torch."""

_UNREACHABLE = re.compile(r"from versions: none|connection|timed? ?out|name resolution|unreachable", re.IGNORECASE)


def python_of(layout: str) -> Path:
    """The Python of an environment; makes it on first use, skips where the registry cannot be reached."""
    requirements, ours = ROOT / f"requirements/layout-{layout}.txt", sysconfig.get_path("purelib")
    key = hashlib.sha256(f"{requirements.read_text('utf-8')}{sys.version}{sys.prefix}{ours}".encode()).hexdigest()
    folder = ROOT / f"build/layouts/{layout}-{key[:12]}"
    python, stamp = folder / "bin/python", folder / ".installed"
    if stamp.is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "-q", "install"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--retries", "1", "--timeout", "30", "-r", str(requirements)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        if _UNREACHABLE.search(done.stderr):
            pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{requirements.name} cannot be installed: {done.stderr[-2000:]}")
    if SEES_OURS[layout]:
        purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (purelib / "ours.pth").write_text(f"{ours}\n")
    stamp.touch()
    return python


def run(layout: str, task: dict[str, Any]) -> dict[str, Any]:
    """Give a task to `run_{layout}.py` in its environment, without a network to load a model from."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python_of(layout)), str(Path(__file__).with_name(f"run_{layout}.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
