"""Progress, timing cache and profiles, with stand-ins for the library."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.engine_card import EngineProfile
from qwen_rt.export.tensorrt import timing_cache
from qwen_rt.export.tensorrt.engines import make_plan
from qwen_rt.export.tensorrt.flavour import Flavour
from qwen_rt.export.tensorrt.options import EngineOptions
from qwen_rt.export.tensorrt.progress import STEPS, make_monitor
from qwen_rt.progress import Progress


class _Base:
    """What the library's classes that are inherited from look like."""


MODULE = types.SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (_Base,), {}))


def _monitor() -> tuple[Any, Progress, threading.Event]:
    bar, cancelled = Progress(STEPS, "engine", quiet=True), threading.Event()
    return make_monitor(MODULE, bar, cancelled), bar, cancelled


def test_phases_within_phases() -> None:
    """Each phase is one step of the phase around it."""
    monitor, bar, _ = _monitor()
    monitor.phase_start("engine", None, 2)
    monitor.phase_start("first half", "engine", 4)
    shown = []
    for step in range(4):
        assert monitor.step_complete("first half", step)
        shown.append(bar.done)
    assert shown == [125, 250, 375, 500]
    monitor.phase_finish("first half")
    assert monitor.step_complete("engine", 0)
    assert bar.done == 500
    monitor.phase_start("second half", "engine", 1)
    monitor.phase_start("inside", "second half", 2)
    assert monitor.step_complete("inside", 0)
    assert bar.done == 750
    monitor.phase_finish("inside")
    monitor.phase_finish("second half")
    assert monitor.step_complete("engine", 1)
    monitor.phase_finish("engine")
    assert bar.done == STEPS


def test_odd_phases() -> None:
    """Steps that nobody announced, phases without steps, more steps than announced: never back, never beyond."""
    monitor, bar, _ = _monitor()
    assert monitor.step_complete("unknown", 3)
    monitor.phase_finish("unknown")
    monitor.phase_start("engine", None, 0)
    for _ in range(5):
        assert monitor.step_complete("engine", 0)
    monitor.phase_start("beside", None, 3)
    assert monitor.step_complete("beside", 0)
    assert bar.done == STEPS


def test_cancelled() -> None:
    monitor, _, cancelled = _monitor()
    monitor.phase_start("engine", None, 9)
    assert monitor.step_complete("engine", 0) is True
    cancelled.set()
    assert monitor.step_complete("engine", 1) is False


class _Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b" and more"


class _Config:
    """Takes caches that begin with `good` and empty ones."""

    def __init__(self) -> None:
        self.cache: _Cache | None = None

    def create_timing_cache(self, content: bytes) -> _Cache | None:
        return None if content == b"broken" else _Cache(content)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and not cache.content.startswith(b"good"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache


@pytest.mark.parametrize(
    ("found", "used"), [(None, b""), (b"", b""), (b"good", b"good"), (b"broken", b""), (b"of another GPU", b"")]
)
def test_timing_cache(found: bytes | None, used: bytes, tmp_path: Path) -> None:
    """A damaged file, or one of another GPU, is as good as none; afterwards the file has what is known."""
    file = tmp_path / "new" / "folder" / "cache"
    if found is not None:
        file.parent.mkdir(parents=True)
        file.write_bytes(found)
    config = _Config()
    assert timing_cache.load_cache(config, file) is config.cache
    assert config.cache is not None
    assert config.cache.content == used
    assert timing_cache.save_cache(config, file)
    assert file.read_bytes() == used + b" and more"


def test_a_timing_cache_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    config = _Config()
    assert not timing_cache.save_cache(config, tmp_path / "x")
    assert timing_cache.load_cache(config, tmp_path / "file" / "cache") is not None
    assert not timing_cache.save_cache(config, tmp_path / "file" / "cache")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_where_the_timing_cache_is(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file for each version; TensorRT-RTX has none, as it measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flavour = Flavour(target, "library 1.2", "1.2", None, ())
    plan = make_plan(flavour, EngineOptions(prefill_tokens=64, max_batch=4), ("8.9",))
    assert plan.profiles == {"prefill": EngineProfile(4, 64), "decode": EngineProfile(4, 1)}
    if target == "tensorrt":
        assert plan.timing_cache == tmp_path / "qwen-rt" / "timing" / "tensorrt-1.2.cache"
        plan = make_plan(flavour, EngineOptions(prefill_tokens=64, timing_cache=tmp_path / "mine"), ())
        assert plan.timing_cache == tmp_path / "mine"
    else:
        assert plan.timing_cache is None
