"""kill -9 while a bundle is built: it is complete or absent, and building again gives what was never disturbed."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.bundle import MANIFEST_FILE
from qwen_rt.errors import StorageError
from qwen_rt.export import build as build_module
from qwen_rt.export import weights
from qwen_rt.export.build import BuildOptions, build

from ..cli.kit import (
    SHARDS,
    contents,
    copy_graph_of,
    copy_nano,
    edit_json,
    environment,
    names,
    rehash,
    shared_bundle,
    shared_graph,
)
from .kill_kit import BuildDriver, complete_or_absent


@pytest.fixture(scope="module")
def driver() -> Iterator[BuildDriver]:
    running = BuildDriver()
    yield running
    running.close()


def _finish(
    driver: BuildDriver, out: Path, expected: dict[str, bytes], *options: str, file_bytes: int = 2 << 20
) -> None:
    assert driver.build(out, *options, file_bytes=file_bytes) == 0
    assert contents(out) == expected
    assert names(out.parent) == {out.name}, "hidden files of the killed builds stayed"


@pytest.mark.parametrize(
    ("options", "file_bytes"),
    [
        (("--precision", "fp32"), 2 << 20),
        (("--precision", "int4", "--kv-cache", "int8", "--lm-head", "int8"), 300_000),
    ],
    ids=["floats", "quantized"],
)
def test_killed_from_outside_at_random_moments(
    options: tuple[str, ...], file_bytes: int, driver: BuildDriver, tmp_path: Path
) -> None:
    """Each build goes on from what the killed one before it left: a random time after a random number of files."""
    assert driver.build(tmp_path / "undisturbed", *options, file_bytes=file_bytes) == 0
    undisturbed = contents(tmp_path / "undisturbed")
    num_files = sum(name.endswith(".safetensors") for name in undisturbed)
    assert num_files > 8
    rng = random.Random(20_261_123)
    place = tmp_path / "place"
    place.mkdir()
    out, written = place / "out", place / ".out.partial" / "graph"
    killed = 0
    for count in [0, 0, *sorted(rng.sample(range(1, num_files), 8)), num_files, num_files, num_files + 1]:
        pause_s = rng.uniform(0, 0.02)

        def reached(count: int = count, pause_s: float = pause_s) -> bool:
            if not out.exists() and (count > num_files or len(list(written.glob("rank0-*"))) < count):
                return False
            time.sleep(pause_s)
            return True

        code = driver.build(out, *options, kill_when=reached, file_bytes=file_bytes)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if complete_or_absent(out):
            assert contents(out) == undisturbed
            shutil.rmtree(out)
    assert killed >= 10
    _finish(driver, out, undisturbed, *options, file_bytes=file_bytes)


STRIDES = pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])


def _until_it_survives(stride: int, kill_at: Callable[[int], int], check: Callable[[int], None]) -> int:
    """Kill at step 1, 1 + stride, …; returns the number of steps after which the build survives."""
    for step in range(1, 500, stride):
        code = kill_at(step)
        check(step)
        if code == 0:
            return step
        assert code == -signal.SIGKILL
    raise AssertionError("the build never ends")


@STRIDES
def test_killed_at_every_step(stride: int, driver: BuildDriver, tmp_path: Path) -> None:
    """Every file that is made, renamed or removed: a small bundle, so that all steps can be tried."""
    expected = contents(shared_bundle())
    out = tmp_path / "out"
    shown = []

    def check(step: int) -> None:
        shown.append(complete_or_absent(out))
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
        _finish(driver, out, expected)
        shutil.rmtree(out)

    steps = _until_it_survives(stride, lambda step: driver.build(out, step=step), check)
    assert steps > 15, steps
    assert stride > 1 or shown.count(True) >= 2, "one kill at least comes between the rename and the end"
    assert shown == sorted(shown), "once it is there it stays"


@STRIDES
def test_killed_at_every_step_of_a_replacement(stride: int, driver: BuildDriver, tmp_path: Path) -> None:
    """`--force`: at every moment the old bundle is there or the new one, and each is complete."""
    old, new = tmp_path / "old", contents(shared_bundle())
    assert driver.build(old, "--max-length", "64") == 0
    before = contents(old)
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    shutil.copytree(old, out)
    seen = set()

    def check(step: int) -> None:
        assert complete_or_absent(out), f"step {step}: neither of the two"
        found = contents(out)
        assert found in (before, new)
        seen.add(found == new)
        assert driver.build(out, "--force") == 0
        assert contents(out) == new
        assert names(place) == {"out"}
        shutil.rmtree(out)
        shutil.copytree(old, out)

    steps = _until_it_survives(stride, lambda step: driver.build(out, "--force", step=step), check)
    assert steps > 15
    assert seen == {False, True}


@pytest.mark.slow
def test_the_real_command_killed_while_it_traces_and_writes(tmp_path: Path) -> None:
    """From a checkpoint, as a user runs it, imports and tracing included."""
    code = (
        "import sys, qwen_rt.export.weights as w\n"
        "w.MAX_FILE_BYTES = 2 << 20\n"
        "from qwen_rt.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "place" / "out"
    out.parent.mkdir()

    def start(folder: Path) -> subprocess.Popen[bytes]:
        arguments = ["build", "nano", "-o", str(folder), "--precision", "fp32", "--quiet"]
        return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment())

    began = time.perf_counter()
    assert start(tmp_path / "undisturbed").wait(120) == 0
    seconds = time.perf_counter() - began
    expected = contents(tmp_path / "undisturbed")
    rng = random.Random(3)
    killed = 0
    for share in sorted(rng.uniform(0.2, 1.0) for _ in range(10)):
        process = start(out)
        time.sleep(share * seconds)
        process.kill()
        killed += process.wait(60) != 0
        if complete_or_absent(out):
            assert contents(out) == expected
            shutil.rmtree(out)
    assert killed >= 5
    assert start(out).wait(120) == 0
    assert contents(out) == expected
    assert names(out.parent) == {"out"}


# ---------------------------------------------------------------- resuming


def options(**fields: Any) -> BuildOptions:
    """Options without progress."""
    return BuildOptions(quiet=True, **fields)


class _KilledError(BaseException):
    """Stands for kill -9: no `except Exception` sees it."""


def _stop_before(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise _KilledError

    monkeypatch.setattr(build_module._Job, what, stop)


def test_a_stopped_build_keeps_what_it_has_and_reuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 4 << 20)
    build(shared_graph(), tmp_path / "whole", options(precision="fp32"))
    with monkeypatch.context() as patch:
        _stop_before(patch, "_sweep")
        with pytest.raises(_KilledError):
            build(shared_graph(), tmp_path / "out", options(precision="fp32"))
    stage = tmp_path / ".out.partial"
    inodes = {path.name: path.stat().st_ino for path in (stage / "graph").iterdir()}
    assert len(inodes) > 5
    victim = sorted(inodes)[3]
    data = bytearray((stage / "graph" / victim).read_bytes())
    data[-1] ^= 1  # not what the journal says: written again
    (stage / "graph" / victim).write_bytes(data)
    (stage / "graph" / "rank0-00009-of-00099.safetensors").write_bytes(b"of a plan that nobody follows any more")
    build(shared_graph(), tmp_path / "out", options(precision="fp32"))
    again = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "graph").iterdir()}
    assert {name for name in inodes if again[name] == inodes[name]} >= set(inodes) - {victim}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert names(tmp_path) == {"out", "whole"}


@pytest.mark.parametrize("changed", ["tokenizer.json", "generation_config.json", SHARDS[0], "options"])
def test_nothing_stale_is_reused(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changed between kill and rerun, or other options: the result is that of an undisturbed build."""
    checkpoint = copy_nano(tmp_path / "checkpoint")
    portable = copy_graph_of(checkpoint, tmp_path / "portable")
    with monkeypatch.context() as patch:
        _stop_before(patch, "_link_shards" if changed == "options" else "_sweep")
        with pytest.raises(_KilledError):
            build(portable, tmp_path / "out", options(self_contained=changed != "options"))
    if changed == "options":
        final = options(max_length=99)
    else:
        final = options(self_contained=True)
        file = portable / changed if changed.endswith(".json") else checkpoint / changed
        if changed.endswith(".json"):
            edit_json(file, lambda document: document.update(version_of_test="2"))
            rehash(portable, changed)
        else:
            data = bytearray(file.read_bytes())
            data[-2] ^= 1
            file.write_bytes(data)
    build(portable, tmp_path / "out", final)
    build(portable, tmp_path / "fresh", final)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert ".journal.json" not in contents(tmp_path / "out")


def test_an_error_leaves_nothing_but_an_interrupt_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        def raise_it(*args: object) -> None:
            raise error

        monkeypatch.setattr(build_module._Job, "_sweep", raise_it)

    for error in (StorageError("disk"), RuntimeError("bug"), OSError(28, "No space left on device")):
        fail(error)
        with pytest.raises((StorageError, RuntimeError), match=r"disk|bug|no space left on the device"):
            build(shared_graph(), tmp_path / "out", options())
        assert names(tmp_path) == set()
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(shared_graph(), tmp_path / "out", options())
    assert names(tmp_path) == {".out.partial"}
    assert not (tmp_path / ".out.partial" / MANIFEST_FILE).exists()
