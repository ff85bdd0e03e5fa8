"""Adding a line to a file of rows: whole or not at all, on a line of its own whatever was there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qwen_rt.storage import storage_errors

__all__ = ["append_line"]


def append_line(file: Path, line: bytes) -> None:
    """Append a line, in one write, so that no kill tears it; a torn one from elsewhere stays a line of its own.

    Args:
        file: The file; it and its folders are made where they are missing.
        line: Without its end.

    Raises:
        StorageError: The disk refuses; the file is then as it was.
    """
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - 1))
            data = (b"" if stream.read(1) in (b"", b"\n") else b"\n") + line + b"\n"
            if stream.write(data) != len(data):  # as much as there was room for
                stream.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
