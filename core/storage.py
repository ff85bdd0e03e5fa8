"""Writing that is whole or absent: atomic files and staged folders; disk trouble comes as one-line errors (`disk`).

Every writer of this package goes through here:

    with StagedDirectory(out, overwrite=force) as stage:          # builds in .<name>.partial beside `out`
        with AtomicFile(stage.path / "weights.bin") as file:      # appears in the stage when whole
            file.write(block)
        stage.commit()                                            # one rename: `out` is there

What lies beside `final` while a build runs, or after it was killed:

    .<name>.lock      held (flock) by the running build, with its process id
    .<name>.partial   what has been built so far; the next build of the same folder finds it and may reuse its files
    .<name>.old       the replaced folder, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shlex
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from qwen_rt.disk import device_error, require_free_space, storage_errors
from qwen_rt.errors import StorageError

__all__ = ["AtomicFile", "StagedDirectory", "atomic_write_bytes", "require_free_space", "storage_errors"]

log = logging.getLogger(__name__)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
# A name has 255 bytes at most (143 where names are encrypted); what is put around it here takes up to 27.
_STEM_BYTES = 110


def _stem(name: str) -> str:
    """Return the name, or for a long one its start and a digest: different names stay different."""
    raw = os.fsencode(name)
    if len(raw) <= _STEM_BYTES:
        return name
    return f"{raw[:_STEM_BYTES].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:8]}"


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; the rename is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


class AtomicFile:
    """A file that appears under its name only when all of it is on disk; a context manager giving the open file.

    The bytes go to a hidden file in the same folder, which is synced and renamed when the block ends well, and removed
    when it does not. A symbolic link is followed: its target is replaced, the link stays. An existing file keeps its
    permissions, where the file system has any.

    Args:
        path: The file to write; its folder must exist.

    Raises:
        StorageError: If the path is a folder or a device, or for any trouble that `storage_errors` knows.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._target = Path(os.path.realpath(self.path))
        self._temporary = self._target.parent / f".{_stem(self._target.name)}.{secrets.token_hex(6)}.tmp"
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        with storage_errors(self.path):
            found = self._target.stat().st_mode if self._target.exists() else None
            if found is not None and not stat.S_ISREG(found):
                raise StorageError(f"{self.path} is not a regular file", fix="choose a file name")
            fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._file = os.fdopen(fd, "wb", buffering=1 << 20)
            if found is not None:
                with contextlib.suppress(OSError):  # FAT and some network file systems have no permissions to keep
                    os.fchmod(fd, stat.S_IMODE(found))
            return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if error is not None:
                if mapped := device_error(error, self.path):
                    raise mapped from error
                return
            with storage_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self._target)
                _fsync_path(self._target.parent)
        finally:
            # A buffer that could not be written fails once more on close; the first error is the one to report.
            with contextlib.suppress(OSError, ValueError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._file = None


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file: after a crash it has its old content or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        data: All of its content.

    Raises:
        StorageError: See `AtomicFile`.
    """
    with AtomicFile(path) as file:
        file.write(data)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the C library, the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    renameat2.restype = ctypes.c_int
    if renameat2(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(first))


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class StagedDirectory:
    """A folder built out of sight and shown by one rename; a context manager.

    Entering takes the lock and makes or finds the partial folder. Leaving without `commit` keeps what was built, so
    that the next build of the same folder can reuse it (`resumed` says so), also after kill -9. Whoever reuses a file
    checks it: a stage may stem from other inputs.

    Args:
        final: Where the folder is to appear; its parent must exist. A symbolic link is followed.
        overwrite: Replace a non-empty folder.
        marker: Replace only a folder that holds a file of this name, so that `--force` on a mistyped path destroys
            nothing; None replaces any folder.

    Attributes:
        path: The folder to build in.
        resumed: Whether an earlier build left files there.

    Raises:
        StorageError: If something is in the way, another build runs, or the disk refuses.
    """

    def __init__(self, final: Path, overwrite: bool = False, *, marker: str | None = "manifest.json") -> None:
        self.final = Path(os.path.realpath(final))
        self.overwrite = overwrite
        self.resumed = False
        self._marker = marker
        hidden = f".{_stem(self.final.name)}"
        self.path = self.final.parent / f"{hidden}.partial"
        self._old = self.final.parent / f"{hidden}.old"
        self._lock_path = self.final.parent / f"{hidden}.lock"
        self._lock_fd: int | None = None

    def __enter__(self) -> Self:
        with storage_errors(self.final):
            self._refuse_what_is_in_the_way()
            self._lock()
            try:
                self._recover()
                self._refuse_what_is_in_the_way()
                self._open_stage()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock_fd is None:
            return
        with contextlib.suppress(OSError):
            self.path.rmdir()  # an empty stage is worth nothing
        self._unlock()
        if mapped := device_error(error, self.final):
            raise mapped from error

    def commit(self) -> None:
        """Sync every file of the stage, then show it as `final` in one step, replacing what `overwrite` allowed.

        Raises:
            StorageError: If something appeared in the way meanwhile, or the disk refuses; the stage is kept.
        """
        self._require_lock()
        with storage_errors(self.final):
            for folder, _, files in os.walk(self.path, topdown=False):
                for name in files:
                    file = Path(folder, name)
                    if not file.is_symlink():
                        _fsync_path(file)
                _fsync_path(Path(folder))
            self._refuse_what_is_in_the_way()
            if self.final.exists() and any(self.final.iterdir()):
                self._replace()
            else:
                self.path.rename(self.final)
            _fsync_path(self.final.parent)
        self._unlock()

    def abandon(self) -> None:
        """Remove the stage and all that was built in it."""
        self._require_lock()
        with storage_errors(self.path):
            _remove_tree(self.path)
        self._unlock()

    def _require_lock(self) -> None:
        if self._lock_fd is None:
            raise RuntimeError("this StagedDirectory is not entered, or was already committed or abandoned")

    def _refuse_what_is_in_the_way(self) -> None:
        final = self.final
        if not final.name:
            raise StorageError(f"{final} cannot be built or replaced", "a folder below it", "choose another path")
        if not final.parent.is_dir():
            in_the_way = any(os.path.lexists(path) and not path.is_dir() for path in final.parents)
            fix = "choose another path" if in_the_way else f"run mkdir -p {shlex.quote(str(final.parent))}"
            raise StorageError(f"{final.parent} is not a folder", "an existing folder", fix)
        if not final.exists():
            return
        if not final.is_dir():
            raise StorageError(f"{final} exists and is a file", "a new or empty folder", "choose another path")
        if not any(final.iterdir()):
            return
        if not self.overwrite:
            raise StorageError(
                f"{final} exists and is not empty",
                "a new or empty folder",
                "choose another path, or pass --force to replace it",
            )
        if Path(os.path.realpath(".")).is_relative_to(final):
            raise StorageError(f"{final} holds the working folder", fix="change to another folder, then rerun")
        if self._marker is not None and not (final / self._marker).is_file():
            raise StorageError(
                f"{final} holds no {self._marker}, so --force does not replace it",
                "a folder that qwen-rt wrote, of the same kind",
                "remove it yourself, or choose another path",
            )

    def _lock(self) -> None:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                named = self._lock_path.stat()
            except BlockingIOError:
                owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                os.close(fd)
                raise StorageError(
                    f"another build of {self.final} is running (pid {owner or 'unknown'})",
                    fix="wait for it to end, or choose another path",
                ) from None
            except FileNotFoundError:
                os.close(fd)
                continue
            except BaseException:
                os.close(fd)
                raise
            # The builder before may have removed the file between our open and our lock: then ours locks nothing.
            mine = os.fstat(fd)
            if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                self._lock_fd = fd
                return
            os.close(fd)

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            with contextlib.suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock_fd)
            self._lock_fd = None

    def _recover(self) -> None:
        """Finish what a build killed between two renames left: put the old folder back if nothing took its place."""
        if not os.path.lexists(self._old):
            return
        if self.final.exists():
            _remove_tree(self._old)
        else:
            self._old.rename(self.final)

    def _open_stage(self) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise StorageError(
                f"{self.path} is in the way", "a folder of your own", "remove it, or choose another path"
            )
        for folder, _, files in os.walk(self.path):
            for name in files:
                if _TEMPORARY.fullmatch(name):
                    Path(folder, name).unlink()
                else:
                    self.resumed = True

    def _replace(self) -> None:
        """Put the stage where a non-empty folder stands; at every moment one of the two is whole on disk."""
        self.path.rename(self._old)
        try:
            swapped = _exchange(self._old, self.final)
        except OSError:
            self._old.rename(self.path)
            raise
        if not swapped:
            self._old.rename(self.path)
            self.final.rename(self._old)
            try:
                self.path.rename(self.final)
            except OSError:
                self._old.rename(self.final)
                raise
        try:
            _remove_tree(self._old)
        except OSError as error:
            log.warning("the replaced folder could not be removed: %s (%s)", self._old, error.strerror)
