"""Disk trouble as one-line errors that say what to do: full, over quota, read-only, failing, forbidden, in the way."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_rt.errors import StorageError
from qwen_rt.progress import format_count

__all__ = ["device_error", "require_free_space", "storage_errors"]

# error number -> (what, next step). The first table tells of the device, whichever file was touched ...
_DEVICE = {
    errno.ENOSPC: ("no space left on the device", "free some space or choose a folder on another disk, then rerun"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose a folder on another disk, then rerun"),
    errno.EIO: ("a device reports an input/output error", "check the disk and the kernel log, then rerun"),
    errno.EFBIG: ("a file grew past the size limit", "raise the limit (ulimit -f, or the file system's) and rerun"),
    errno.EROFS: ("the file system is read-only", "choose a writable folder"),
}
# ... the second one of the path that was named.
_PATH = {
    errno.EACCES: ("permission denied", "choose a folder that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write to"),
    errno.ENOENT: ("its folder does not exist", "create the folder first, or choose another"),
    errno.ENOTDIR: ("a part of the path is not a folder", "choose another path"),
    errno.EISDIR: ("it is a folder", "choose a file name"),
    errno.ENOTEMPTY: ("a non-empty folder is in the way", "choose another path, or pass --force to replace it"),
    errno.EEXIST: ("something is in the way", "choose another path, or pass --force to replace it"),
    errno.EXDEV: ("it is a mount point", "choose a folder below it"),
    errno.EBUSY: ("it is a mount point or in use by the system", "choose a folder below it"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.ELOOP: ("a symbolic link is in the way", "choose another path"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n) and rerun"),
    errno.ENOLCK: ("the file system offers no locks", "choose a folder on a local disk"),
}


def _free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system that holds the path, or its nearest parent that exists."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def device_error(error: BaseException | None, path: Path) -> StorageError | None:
    """Return the one-line error if the device refused: full, over quota, failing, read-only, past a size limit.

    Args:
        error: What ended a block that wrote `path`; it may stem from another file.
        path: What was being written.

    Returns:
        The error to raise instead; None for any other trouble.
    """
    if not isinstance(error, OSError) or error.errno not in _DEVICE:
        return None
    what, fix = _DEVICE[error.errno]
    free = _free_bytes(path) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    there = "" if free is None else f" ({format_count(free, 'B')} free)"
    return StorageError(f"cannot write {path}: {what}{there}", fix=fix)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing `path` (full disk, quota, I/O, permission, ...) into a one-line `StorageError`.

    Put only file operations on `path` into the block: a missing file elsewhere would be told of in its name.

    Args:
        path: What is being written; the error names it.

    Raises:
        StorageError: For the error numbers that a reader can act on; other errors pass unchanged.
    """
    try:
        yield
    except OSError as error:
        mapped = device_error(error, path)
        if mapped is None and error.errno in _PATH:
            what, fix = _PATH[error.errno]
            mapped = StorageError(f"cannot write {path}: {what}", fix=fix)
        if mapped is None:
            raise
        raise mapped from error


def require_free_space(path: Path, num_bytes: int) -> None:
    """Refuse a write that cannot fit, before it starts.

    Args:
        path: The file or folder to be written; it need not exist yet.
        num_bytes: How much will be written there.

    Raises:
        StorageError: If less is free.
    """
    free = _free_bytes(path)
    if free is not None and free < num_bytes:
        raise StorageError(
            f"{format_count(free, 'B')} free for {path}",
            f"at least {format_count(num_bytes, 'B')}",
            "free some space or choose a folder on another disk",
        )
