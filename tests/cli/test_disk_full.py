"""A disk that is full, and a size limit: one line, exit code 1, nothing left; and no harm to what was there."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Cli
from .kit import Outcome, child, command, contents, environment, names

MOUNT_DETACH = 2


def _mount(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"cannot mount a small file system here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), MOUNT_DETACH)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """64 kB: room for a graph, not for a tokenizer besides."""
    yield from _mount(tmp_path / "tiny", "64k")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB: room for a bundle without weights."""
    yield from _mount(tmp_path / "small", "4m")


def test_a_full_disk_while_writing(tiny_disk: Path, graph: Path, cli: Cli) -> None:
    result = cli("build", graph, "-o", tiny_disk / "out", "--quiet")
    result.refused(1, "no space left on the device", "free some space or choose a folder on another disk")
    assert names(tiny_disk) == set()


def test_weights_that_cannot_fit_are_refused_before_the_first_byte(small_disk: Path, graph: Path, cli: Cli) -> None:
    result = cli("build", graph, "-o", small_disk / "out", "--precision", "fp32", "--quiet")
    result.refused(1, "free for", r"expected at least 33\.\d MB", "free some space")
    assert names(small_disk) == set()
    assert cli("build", graph, "-o", small_disk / "out", "--quiet").code == 0


def test_a_failed_replacement_keeps_the_old_bundle(small_disk: Path, graph: Path, cli: Cli) -> None:
    assert cli("build", graph, "-o", small_disk / "out", "--quiet").code == 0
    before = contents(small_disk)
    result = cli("build", graph, "-o", small_disk / "out", "--self-contained", "--force", "--quiet")
    result.refused(1, "free for", "free some space")
    assert contents(small_disk) == before


def test_a_full_disk_below_an_answer(tiny_disk: Path, bundle: Path, cli: Cli) -> None:
    (tiny_disk / "answers.jsonl").write_text("old")
    (tiny_disk / "ballast").write_bytes(bytes(60 << 10))
    result = cli(
        "generate", bundle, "hi", "--max-tokens", "64", "--logprobs", "20", "--json", tiny_disk / "answers.jsonl"
    )
    result.refused(1, "answers.jsonl: no space left on the device", "free some space")
    assert (tiny_disk / "answers.jsonl").read_text() == "old"
    assert names(tiny_disk) == {"answers.jsonl", "ballast"}


def test_a_size_limit_of_the_process(graph: Path, workplace: Path) -> None:
    """RLIMIT_FSIZE needs no root: this way of running out of space is tested everywhere."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        command("build", graph, "-o", "out", "--quiet"),
        cwd=workplace,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        check=False,
    )
    result = Outcome(done.returncode, done.stdout, done.stderr)
    result.refused(1, "a file grew past the size limit", r"raise the limit \(ulimit -f")
    assert names(workplace) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk(bundle: Path) -> None:
    for arguments in (["inspect", bundle], ["inspect", bundle, "--json"], ["--help"], ["generate", bundle, "1+1="]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
            )
        Outcome(done.returncode, "", done.stderr).refused(1, "No space left on device")


def test_a_read_only_working_folder_is_no_matter(bundle: Path, workplace: Path) -> None:
    workplace.chmod(0o500)
    assert child(["generate", bundle, "--max-tokens", "2", "hi"], cwd=workplace).err == ""
    assert names(workplace) == set()
