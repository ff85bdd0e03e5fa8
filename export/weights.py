"""Weights that a bundle stores itself: laid out before a byte is written, converted in blocks, file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_rt.bundle import FileEntry, file_sha256
from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.errors import UsageError
from qwen_rt.export.portable import WeightLocation
from qwen_rt.safetensors_header import write_header
from qwen_rt.storage import AtomicFile

__all__ = ["NUMPY_DTYPES", "PlannedFile", "copy_file", "is_whole", "plan_weight_files", "write_weight_file"]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors dtype → numpy dtype."""

MAX_FILE_BYTES = 1 << 30
"""A file of weights ends after the tensor that passes this: what a killed build loses at most."""

_BLOCK_ELEMENTS = 8 << 20


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file to be written: its name, its header, and where each tensor's bytes will lie in it."""

    name: str
    header: bytes
    locations: Mapping[str, WeightLocation]

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(place.nbytes for place in self.locations.values())


def plan_weight_files(checkpoint: Checkpoint, dtype: str, folder: Path) -> list[PlannedFile]:
    """Lay out the parameters that are not stored as `dtype` yet.

    Args:
        checkpoint: Where they come from.
        dtype: safetensors dtype to store: `F32`, `BF16` or `F16`.
        folder: Where the files will stand.

    Returns:
        The files in order, none if every parameter is stored as `dtype` already. Tensors keep their Hugging Face
        names and the checkpoint's order.
    """
    pending = [
        (name, shape) for name, shape in checkpoint.spec.parameters().items() if checkpoint.tensors[name].dtype != dtype
    ]
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]] if pending else []
    group_bytes = 0
    for name, shape in pending:
        if group_bytes >= MAX_FILE_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append((name, shape))
        group_bytes += int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize
    files = []
    for index, group in enumerate(groups, 1):
        file_name = f"rank0-{index:05d}-of-{len(groups):05d}.safetensors"
        header, ranges = write_header([(name, dtype, shape) for name, shape in group], {"format": "pt"})
        places = {
            name: WeightLocation(folder / file_name, ranges[name].offset, ranges[name].nbytes, dtype, shape)
            for name, shape in group
        }
        files.append(PlannedFile(file_name, header, places))
    return files


def write_weight_file(
    checkpoint: Checkpoint, plan: PlannedFile, path: Path, advance: Callable[[int], object] | None = None
) -> FileEntry:
    """Convert and write one planned file; it appears under its name when whole.

    Args:
        checkpoint: Source of the tensors.
        plan: What to write.
        path: Where; an existing file is replaced.
        advance: Told the bytes of each block written.

    Returns:
        Size and hash, for the manifest.
    """
    digest = hashlib.sha256()
    with AtomicFile(path) as file:
        for block in _blocks(checkpoint, plan):
            digest.update(block)
            file.write(block)
            if advance is not None:
                advance(len(block))
    return FileEntry(plan.nbytes, digest.hexdigest())


def _blocks(checkpoint: Checkpoint, plan: PlannedFile) -> Iterator[bytes]:
    """The file's bytes: header, then the tensors, converted by way of float32 and rounded to nearest even."""
    yield plan.header
    for name, place in plan.locations.items():
        ref, target = checkpoint.tensors[name], NUMPY_DTYPES[place.dtype]
        flat = checkpoint.read(name).reshape(-1)
        for start in range(0, flat.size, _BLOCK_ELEMENTS):
            block = to_float32(ref, flat[start : start + _BLOCK_ELEMENTS])
            with np.errstate(over="ignore"):
                converted = block.astype(target)
            if target == np.float16 and np.isfinite(block).all() and not np.isfinite(converted).all():
                raise UsageError(
                    f"tensor {name} holds {np.abs(block).max():g}, beyond float16",
                    "values up to 65504",
                    "build with --precision bf16 or fp32",
                )
            yield converted.tobytes()


def copy_file(source: Path, target: Path, advance: Callable[[int], object] | None = None) -> FileEntry:
    """Copy a file in blocks; it appears under its name when whole. Returns size and hash."""
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
