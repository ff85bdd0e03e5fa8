"""A source that changes while a bundle is built of it: no bundle of two states comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import CheckpointError
from qwen_rt.export import build as build_module
from qwen_rt.export.build import BuildOptions, build

from ..cli.kit import SHARDS, copy_graph_of, copy_nano, edit_json, names, rehash

OWN = BuildOptions(quiet=True, self_contained=True)


class _KilledError(BaseException):
    """Stands for kill -9: no `except Exception` sees it."""


def _flip_a_weight(checkpoint: Path) -> None:
    data = bytearray((checkpoint / SHARDS[0]).read_bytes())
    data[-2] ^= 1
    (checkpoint / SHARDS[0]).write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of nano that may change, and its portable graph."""
    checkpoint = copy_nano(tmp_path / "checkpoint")
    return checkpoint, copy_graph_of(checkpoint, tmp_path / "portable")


def _when_weights_are_written(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    original = build_module._Job._write_weights

    def write(job: Any, *arguments: Any) -> None:
        original(job, *arguments)
        change()

    patch.setattr(build_module._Job, "_write_weights", write)


def test_a_shard_that_changes_meanwhile(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, portable = source
    _when_weights_are_written(monkeypatch, lambda: _flip_a_weight(checkpoint))
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]} was changed while the build ran; expected a source"):
        build(portable, tmp_path / "out", OWN)
    assert names(tmp_path) == {"checkpoint", "portable"}


def test_a_text_file_that_changes_meanwhile(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, portable = source

    def change() -> None:
        edit_json(portable / "generation_config.json", lambda document: document.update(temperature=0.5))
        rehash(portable, "generation_config.json")

    _when_weights_are_written(monkeypatch, change)
    with pytest.raises(CheckpointError, match=r"generation_config\.json was changed while the build ran"):
        build(portable, tmp_path / "out", OWN)


def test_a_killed_build_does_not_note_the_new_state_for_what_it_made_of_the_old(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, portable = source

    def stop(job: Any) -> None:
        raise _KilledError

    with monkeypatch.context() as patch:
        _when_weights_are_written(patch, lambda: _flip_a_weight(checkpoint))
        patch.setattr(build_module._Job, "_refuse_changes", stop)
        with pytest.raises(_KilledError):
            build(portable, tmp_path / "out", OWN)
    copied = tmp_path / ".out.partial" / "graph" / SHARDS[0]
    assert copied.read_bytes() != (checkpoint / SHARDS[0]).read_bytes()
    build(portable, tmp_path / "out", OWN)
    assert (tmp_path / "out" / "graph" / SHARDS[0]).read_bytes() == (checkpoint / SHARDS[0]).read_bytes()
