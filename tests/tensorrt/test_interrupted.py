"""A build that is killed or interrupted: the bundle is complete or absent, and building again gives a whole one."""

from __future__ import annotations

import _thread
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.engine_card import engine_file
from qwen_rt.export.tensorrt import engines
from qwen_rt.export.tensorrt.progress import STEPS

from ..cli.kit import names
from ..export.kill_kit import BuildDriver, complete_or_absent
from .kit import engine_build, needs_rtx, same_bundle

needs_rtx()
pytestmark = pytest.mark.trt

OPTIONS = ("--target", "tensorrt-rtx", "--max-length", "64", "--compute-capability", "8.9", "--precision", "int4")


@pytest.fixture(scope="module")
def driver() -> Iterator[BuildDriver]:
    running = BuildDriver()
    yield running
    running.close()


@pytest.mark.parametrize("stride", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_every_step(stride: int, driver: BuildDriver, tmp_path: Path) -> None:
    """kill -9 whenever a file is made, renamed or removed; every build goes on from what the killed one left."""
    options = (*OPTIONS, "--no-gate")
    assert driver.build(tmp_path / "whole", *options) == 0
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    killed = 0
    for step in range(1, 500, stride):
        code = driver.build(out, *options, step=step)
        assert code in (0, -signal.SIGKILL)
        if complete_or_absent(out):
            assert same_bundle(out, tmp_path / "whole")
            shutil.rmtree(out)
        if code == 0:
            break
        killed += 1
    assert killed * stride > 15
    assert driver.build(out, *options) == 0
    assert same_bundle(out, tmp_path / "whole")
    assert names(place) == {"out"}


def test_killed_while_the_engine_is_written(driver: BuildDriver, tmp_path: Path) -> None:
    """The engine has no name until it is whole."""
    options = (*OPTIONS, "--no-gate")
    out = tmp_path / "out"
    engine = tmp_path / ".out.partial" / engine_file(0)

    def reached() -> bool:
        assert not engine.exists()
        return any(path.name.startswith(".rank0.engine.") for path in engine.parent.glob(".*"))

    assert driver.build(out, *options, kill_when=reached) == -signal.SIGKILL
    assert not out.exists()
    assert driver.build(out, *options) == 0
    assert complete_or_absent(out)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("moment", ["compiling", "writing"])
def test_interrupted(moment: str, nano_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the library works: it has stopped when the command returns, and the next build succeeds."""
    plain, after = engines.compile_engine, []

    def compile_engine(flavour: Any, network: Any, plan: Any, bar: Any, write: Any, idle: Any) -> Any:
        update = bar.update

        def interrupted(act: Any) -> Any:
            def run(value: Any) -> Any:
                if not after:
                    after.append(moment)
                    _thread.interrupt_main()
                    time.sleep(0.2)  # until it has got through
                else:
                    after.append("more")
                return act(value)

            return run

        if moment == "compiling":
            bar.update = interrupted(update)
        else:
            write = interrupted(write)
        return plain(flavour, network, plan, bar, write, idle)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "compile_engine", compile_engine)
        with pytest.raises(KeyboardInterrupt):
            engine_build(nano_portable, tmp_path / "out")
    assert after[0] == moment
    assert len(after) < 20, "the library goes on"
    assert not [thread for thread in threading.enumerate() if thread.name == "tensorrt"]
    assert names(tmp_path) == {".out.partial"}
    assert not (tmp_path / ".out.partial" / engine_file(0)).exists()
    engine_build(nano_portable, tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_disk_that_fills_up(nano_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the library hands over the engine is that error, and nothing stays."""
    plain = engines.compile_engine

    def compile_engine(flavour: Any, network: Any, plan: Any, bar: Any, write: Any, idle: Any) -> Any:
        def full(data: bytes) -> None:
            raise OSError(28, "No space left on device")

        return plain(flavour, network, plan, bar, full, idle)

    monkeypatch.setattr(engines, "compile_engine", compile_engine)
    with pytest.raises(Exception, match="no space left on the device"):
        engine_build(nano_portable, tmp_path / "out")
    assert names(tmp_path) == set()


def test_progress_goes_to_the_end_and_never_back(nano_portable: Path, tmp_path: Path, monkeypatch: Any) -> None:
    reported: list[int] = []
    plain = engines.compile_engine

    def compile_engine(flavour: Any, network: Any, plan: Any, bar: Any, *others: Any) -> Any:
        update = bar.update

        def told(n: int = 1) -> None:
            reported.append(n)
            update(n)

        bar.update = told
        return plain(flavour, network, plan, bar, *others)

    monkeypatch.setattr(engines, "compile_engine", compile_engine)
    engine_build(nano_portable, tmp_path / "out")
    assert len(reported) > 5
    assert all(n >= 0 for n in reported)
    assert sum(reported) == 2 * STEPS
    assert sum(n > 0 for n in reported[:-2]) > 20, "the library's own steps"
