"""Storage: whatever happens (errors, kills, full disks, a second builder), a name shows a whole thing or nothing."""

# ruff: noqa: PT012 - blocks that fail half-way are what is tested

from __future__ import annotations

import ctypes
import errno
import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_rt import storage
from qwen_rt.errors import StorageError
from qwen_rt.storage import AtomicFile, StagedDirectory, atomic_write_bytes, require_free_space, storage_errors


def _hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def _bundle(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(text)
    return path


# --- AtomicFile


def test_atomic_write_replaces_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"one")
    atomic_write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_permissions_follow_the_umask_and_an_existing_file_keeps_its_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "new", b"")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        (tmp_path / "new").chmod(0o604)
        atomic_write_bytes(tmp_path / "new", b"x")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


def test_a_file_system_without_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    atomic_write_bytes(tmp_path / "a.bin", b"old")
    monkeypatch.setattr(os, "fchmod", refuse)
    atomic_write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert _hidden(tmp_path) == []


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(error), AtomicFile(target) as file:
        file.write(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert _hidden(tmp_path) == []


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/", "."])
def test_devices_and_folders_are_not_replaced(path: str) -> None:
    before = os.lstat(path).st_mode
    with pytest.raises(StorageError, match="not a regular file"):
        atomic_write_bytes(Path(path), b"x")
    assert os.lstat(path).st_mode == before


def test_missing_folder_and_long_name_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="folder does not exist; create the folder"):
        atomic_write_bytes(tmp_path / "no" / "a", b"")
    with pytest.raises(StorageError, match="name is too long; choose a shorter name"):
        atomic_write_bytes(tmp_path / ("é" * 200), b"")
    atomic_write_bytes(tmp_path / ("é" * 127), b"x")
    assert (tmp_path / ("é" * 127)).read_bytes() == b"x"


# --- disk trouble


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on the device .* free.*; free some space"),
        (errno.EDQUOT, "quota is used up .*; free some space"),
        (errno.EIO, "input/output error; check the disk"),
        (errno.EROFS, "read-only; choose a writable folder"),
        (errno.EACCES, "permission denied; choose"),
    ],
)
def test_errors_become_one_line_with_a_next_step(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught, storage_errors(tmp_path / "out.bin"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "out.bin") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass() -> None:
    with pytest.raises(ConnectionResetError), storage_errors(Path("x")):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(ValueError, match=r"^x$"), storage_errors(Path("x")):
        raise ValueError("x")


def test_the_full_device_maps(tmp_path: Path) -> None:
    """/dev/full is the kernel's own ENOSPC."""
    with (
        pytest.raises(StorageError, match="no space left"),
        storage_errors(tmp_path / "out"),
        Path("/dev/full").open("wb") as f,
    ):
        f.write(b"x" * 10)
        f.flush()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_refusing_disk_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:

        class Raw(io.FileIO):
            write = refuse

        monkeypatch.setattr(os, "fdopen", lambda fd, mode, buffering: io.BufferedWriter(Raw(fd, "w"), buffering))
    with pytest.raises(StorageError, match=f"cannot write {target}"):
        atomic_write_bytes(target, b"new" * (1 << 20))
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert _hidden(tmp_path) == []


def test_the_size_limit_of_the_process(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="size limit; raise the limit"), AtomicFile(tmp_path / "a") as file:
            for _ in range(4):
                file.write(b"x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_require_free_space(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(StorageError, match=r"free for .*; expected at least 1000000.0 TB; free some space"):
        require_free_space(tmp_path, 10**18)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 2 MiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip(f"cannot mount a small file system here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def test_a_really_full_disk(small_disk: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"cannot write .*no space left on the device \(.*free\); free some space"),
        StagedDirectory(small_disk / "out") as stage,
    ):
        atomic_write_bytes(stage.path / "fits", b"x" * 1000)
        with AtomicFile(stage.path / "large") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 17))
    assert not (small_disk / "out").exists()
    assert [p.name for p in (small_disk / ".out.partial").iterdir()] == ["fits"]
    with pytest.raises(StorageError, match=r"expected at least 3\.0 MB"):
        require_free_space(small_disk / "out", 3_000_000)
    with StagedDirectory(small_disk / "out") as stage:
        assert stage.resumed
        stage.commit()
    assert (small_disk / "out" / "fits").stat().st_size == 1000


def test_a_mount_point_is_refused_in_one_line(small_disk: Path) -> None:
    (small_disk / "manifest.json").write_text("{}")
    with pytest.raises(StorageError, match="mount point"), StagedDirectory(small_disk, overwrite=True) as stage:
        stage.commit()
    assert (small_disk / "manifest.json").read_text() == "{}"


# --- StagedDirectory


def test_commit_shows_the_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    final = tmp_path / "Qwen2.5-7B.bundle"
    with StagedDirectory(final) as stage:
        assert not stage.resumed
        (stage.path / "graph").mkdir()
        atomic_write_bytes(stage.path / "graph" / "rank0.onnx", b"g")
        (stage.path / "link").symlink_to("nowhere")
        assert not final.exists()
        stage.commit()
        assert final.is_dir()
    assert (final / "graph" / "rank0.onnx").read_bytes() == b"g"
    assert _hidden(tmp_path) == []


def test_an_empty_folder_is_used_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with StagedDirectory(tmp_path / "link") as stage:
        atomic_write_bytes(stage.path / "a", b"1")
        stage.commit()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    final = _bundle(tmp_path / "b")
    (final / "stale").write_text("x")
    with StagedDirectory(final, overwrite=True) as stage:
        (stage.path / "manifest.json").write_text("new")
        stage.commit()
    assert [(p.name, p.read_text()) for p in final.iterdir()] == [("manifest.json", "new")]
    assert _hidden(tmp_path) == []


def test_the_exchange_is_one_step_here_or_says_that_it_cannot(tmp_path: Path) -> None:
    first, second = _bundle(tmp_path / "1", "one"), _bundle(tmp_path / "2", "two")
    if storage._exchange(first, second):
        assert (first / "manifest.json").read_text() == "two"
    with pytest.raises(FileNotFoundError):
        storage._exchange(first, tmp_path / "3")


def test_long_names_do_not_share_a_stage(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / ("x" * 250 + "1")) as one, StagedDirectory(tmp_path / ("x" * 250 + "2")) as two:
        assert one.path != two.path
        for stage in (one, two):
            (stage.path / "a").write_text(stage.final.name)
            stage.commit()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failing_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = _bundle(tmp_path / "b")
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".b.partial" and target == final:
            raise OSError(errno.EIO, "io")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="input/output"), StagedDirectory(final, overwrite=True) as stage:
        (stage.path / "manifest.json").write_text("new")
        stage.commit()
    assert (final / "manifest.json").read_text() == "old"
    assert (tmp_path / ".b.partial" / "manifest.json").read_text() == "new"


def test_refusals_say_what_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(final: Path, words: str, overwrite: bool = False) -> None:
        with pytest.raises(StorageError, match=words), StagedDirectory(final, overwrite):
            pytest.fail("not reached")
        assert [p for p in tmp_path.rglob(".*") if p.name != ".git"] == []

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file; expected a new or empty folder", True)
    refused(_bundle(tmp_path / "full"), "exists and is not empty; .*--force")
    refused(tmp_path / "no" / "b", f"no is not a folder; .*mkdir -p {tmp_path}/no")
    refused(tmp_path / "file" / "b", "is not a folder; expected an existing folder; choose another path")
    refused(Path("/"), "cannot be built", True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    refused(tmp_path / "home", "holds no manifest.json, so --force does not replace it", True)
    monkeypatch.chdir(tmp_path / "full")
    refused(tmp_path / "full", "holds the working folder", True)
    refused(Path(), "holds the working folder", True)


def test_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="permission denied"), StagedDirectory(tmp_path / "b"):
            pytest.fail("not reached")
    finally:
        tmp_path.chmod(0o700)


def test_a_foreign_partial_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".b.partial").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="is in the way"), StagedDirectory(tmp_path / "b"):
        pytest.fail("not reached")
    (tmp_path / "victim").write_text("x")
    (tmp_path / ".c.lock").symlink_to("victim")
    with pytest.raises(StorageError, match="symbolic link"), StagedDirectory(tmp_path / "c"):
        pytest.fail("not reached")
    assert (tmp_path / "victim").read_text() == "x"


def test_something_that_appears_while_building_is_not_lost(tmp_path: Path) -> None:
    final = tmp_path / "b"
    with pytest.raises(StorageError, match="not empty"), StagedDirectory(final) as stage:
        (stage.path / "a").write_text("mine")
        _bundle(final, "theirs")
        stage.commit()
    assert (final / "manifest.json").read_text() == "theirs"
    assert (tmp_path / ".b.partial" / "a").read_text() == "mine"


def test_a_failed_build_is_kept_for_the_next_one_and_its_debris_swept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StagedDirectory(tmp_path / "b") as stage:
        (stage.path / "done").write_text("1")
        (stage.path / ".half.0123456789ab.tmp").write_text("half")
        raise RuntimeError
    assert _hidden(tmp_path) == [".b.partial"]
    with StagedDirectory(tmp_path / "b") as stage:
        assert stage.resumed
        assert [p.name for p in stage.path.iterdir()] == ["done"]
        stage.abandon()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="not entered"):
        stage.commit()


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), StagedDirectory(tmp_path / "b") as stage, AtomicFile(stage.path / "w"):
        Path("/no/such/checkpoint").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_second_build_gets_one_line_with_the_process(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "b") as stage:
        with (
            pytest.raises(StorageError, match=rf"another build of {tmp_path}/b is running \(pid {os.getpid()}\)"),
            StagedDirectory(tmp_path / "b"),
        ):
            pytest.fail("not reached")
        with StagedDirectory(tmp_path / "c") as other:  # another folder is no trouble
            other.abandon()
        stage.abandon()
    with StagedDirectory(tmp_path / "b"):
        pass


@pytest.mark.parametrize("final_exists", [True, False])
def test_a_kill_between_two_renames_is_repaired(tmp_path: Path, final_exists: bool) -> None:
    _bundle(tmp_path / ".b.old", "old")
    if final_exists:
        _bundle(tmp_path / "b", "newer")
    with StagedDirectory(tmp_path / "b", overwrite=True):
        pass
    assert (tmp_path / "b" / "manifest.json").read_text() == ("newer" if final_exists else "old")
    assert _hidden(tmp_path) == []


# --- kill -9
