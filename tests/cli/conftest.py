"""Fixtures of the command line's tests: folders to read, folders to damage, and the command in this process."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_rt.cli import main

from .kit import Outcome, copy_nano, shared_bundle, shared_graph

Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in this process: `cli("inspect", folder)`, `stdin=` for what it may read."""

    def run(*arguments: str | Path, stdin: str | bytes = "") -> Outcome:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        found = capsys.readouterr()
        return Outcome(code, found.out, found.err)

    return run


@pytest.fixture(scope="session")
def graph() -> Path:
    """A portable graph of nano; not to be changed."""
    return shared_graph()


@pytest.fixture(scope="session")
def bundle() -> Path:
    """A bundle of nano whose weights stay in the checkpoint; not to be changed."""
    return shared_bundle()


@pytest.fixture(scope="session")
def packed() -> Path:
    """A bundle of nano that holds its weights; not to be changed."""
    return shared_bundle(self_contained=True)


@pytest.fixture
def nano_copy(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return copy_nano(tmp_path / "checkpoint")


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A linked bundle to damage."""
    return Path(shutil.copytree(shared_bundle(), tmp_path / "bundle"))


@pytest.fixture
def packed_copy(tmp_path: Path) -> Path:
    """A self-contained bundle to damage."""
    return Path(shutil.copytree(shared_bundle(self_contained=True), tmp_path / "packed"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to write into, which is the working folder too."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    os.environ.pop("COLUMNS", None)
    return folder
