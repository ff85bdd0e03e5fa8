"""Weights that a bundle stores itself: laid out before a byte is written, made in blocks, file by file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np

from qwen_rt.bundle import FileEntry, file_sha256
from qwen_rt.errors import UsageError
from qwen_rt.export.portable import WeightLocation
from qwen_rt.row_reader import RowSource
from qwen_rt.safetensors_header import write_header
from qwen_rt.storage import AtomicFile

__all__ = [
    "NUMPY_DTYPES",
    "Piece",
    "PlannedFile",
    "copy_file",
    "float_piece",
    "in_order",
    "is_whole",
    "one_thread_a_worker",
    "plan_files",
    "row_blocks",
    "write_weight_file",
]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors dtype → numpy dtype, of those that a float can be stored as."""

MAX_FILE_BYTES = 1 << 30
"""A file of weights ends after the piece that passes this: what a killed build loses at most."""

BLOCK_BYTES = 16 << 20
"""Float32 bytes of the rows that a worker has in hand."""

_NUM_AHEAD = 4  # blocks under way or waiting to be written

T = TypeVar("T")
Tensors = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Piece:
    """Tensors that lie behind each other in a file, and how to make their bytes.

    Attributes:
        tensors: (name, safetensors dtype, shape) each.
        blocks: Yields their bytes in order; work may be given to the executor's threads.
    """

    tensors: Tensors
    blocks: Callable[[Executor], Iterator[bytes]]


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file to be written: its name, its header, its pieces, and where each tensor's bytes will lie."""

    name: str
    header: bytes
    pieces: Sequence[Piece]
    locations: Mapping[str, WeightLocation]

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(place.nbytes for place in self.locations.values())


def plan_files(pieces: Iterable[Piece], folder: Path) -> list[PlannedFile]:
    """Lay pieces out in files.

    Args:
        pieces: In order.
        folder: Where the files will stand.

    Returns:
        The files in order; none without pieces.
    """
    groups: list[list[Piece]] = []
    group_bytes = MAX_FILE_BYTES
    for piece in pieces:
        if group_bytes >= MAX_FILE_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append(piece)
        group_bytes += sum(place.nbytes for place in write_header(piece.tensors)[1].values())
    files = []
    for index, group in enumerate(groups, 1):
        file_name = f"rank0-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = list(itertools.chain.from_iterable(piece.tensors for piece in group))
        header, ranges = write_header(tensors, {"format": "pt"})
        places = {
            name: WeightLocation(folder / file_name, ranges[name].offset, ranges[name].nbytes, dtype, shape)
            for name, dtype, shape in tensors
        }
        files.append(PlannedFile(file_name, header, group, places))
    return files


def write_weight_file(
    plan: PlannedFile, path: Path, pool: Executor, advance: Callable[[int], object] | None = None
) -> FileEntry:
    """Make and write one planned file; it appears under its name when whole.

    Args:
        plan: What to write.
        path: Where; an existing file is replaced.
        pool: Threads that make the bytes.
        advance: Told the bytes of each block written.

    Returns:
        Size and hash, for the manifest.
    """
    digest = hashlib.sha256()
    with AtomicFile(path) as file:
        blocks = itertools.chain.from_iterable(piece.blocks(pool) for piece in plan.pieces)
        for block in itertools.chain([plan.header], blocks):
            digest.update(block)
            file.write(block)
            if advance is not None:
                advance(len(block))
    return FileEntry(plan.nbytes, digest.hexdigest())


@contextlib.contextmanager
def one_thread_a_worker() -> Iterator[None]:
    """Let each worker that begins in the block compute on one thread of torch.

    With one a core each, as is torch's habit, four workers on 16 cores quantize a quarter as fast.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(pool: Executor, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run tasks on a pool and yield their results in order; only a few are under way at a time."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= _NUM_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def row_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut the rows of a tensor into blocks of about `BLOCK_BYTES` in float32: (first row, row behind the last) each."""
    row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
    count = max(1, BLOCK_BYTES // row_bytes)
    return [(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


def float_piece(source: RowSource, name: str, dtype: str, stored_name: str | None = None) -> Piece:
    """A parameter stored as floats, rounded to nearest even by way of float32.

    Args:
        source: Where it comes from.
        name: Which one.
        dtype: safetensors dtype to store: `F32`, `BF16` or `F16`.
        stored_name: Name in the file; None for the same.

    Raises:
        UsageError: A finite number beyond float16; as the bytes are made.
    """
    shape, target = source.shape(name), NUMPY_DTYPES[dtype]

    def convert(start: int, stop: int) -> bytes:
        block = source.rows(name, start, stop)
        with np.errstate(over="ignore"):
            converted = block.astype(target)
        if target == np.float16 and np.isfinite(block).all() and not np.isfinite(converted).all():
            raise UsageError(
                f"tensor {name} holds {np.abs(block).max():g}, beyond float16",
                "values up to 65504",
                "build with --precision bf16 or fp32",
            )
        return converted.tobytes()

    def blocks(pool: Executor) -> Iterator[bytes]:
        return in_order(pool, (partial(convert, start, stop) for start, stop in row_blocks(shape)))

    return Piece(((stored_name or name, dtype, shape),), blocks)


def copy_file(source: Path, target: Path, advance: Callable[[int], object] | None = None) -> FileEntry:
    """Copy a file in blocks of 8 MiB; it appears under its name when whole.

    Args:
        source: What to copy; a symbolic link is followed.
        target: Where to; an existing file is replaced.
        advance: Told the bytes of each block.

    Returns:
        Size and hash, for the manifest.
    """
    digest, nbytes = hashlib.sha256(), 0
    with source.open("rb") as reader, AtomicFile(target) as writer:
        while block := reader.read(8 << 20):
            digest.update(block)
            writer.write(block)
            nbytes += len(block)
            if advance is not None:
                advance(len(block))
    return FileEntry(nbytes, digest.hexdigest())


def is_whole(path: Path, entry: FileEntry) -> bool:
    """Whether an earlier build left exactly this file."""
    return path.is_file() and path.stat().st_size == entry.nbytes and file_sha256(path) == entry.sha256
