"""Read and write the header of a safetensors file; the data behind it is never touched.

    u64 little-endian N │ N bytes of JSON, begins with "{", padded with spaces │ data

The JSON maps each tensor's name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the start
of the data, and `__metadata__` to strings. The tensors cover the data without holes or overlap. Everything here is
checked, since a checkpoint is somebody else's file: whatever parses is in bounds.

Source: https://github.com/huggingface/safetensors README, "Format"; `safetensors/src/tensor.rs` for the limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qwen_rt.errors import CheckpointError, StorageError
from qwen_rt.strict_json import parse_object, show

__all__ = ["BYTES_OF_DTYPE", "ByteRange", "ShardHeader", "TensorRef", "read_errors", "read_header", "write_header"]

BYTES_OF_DTYPE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
"""Every dtype that is read, with the bytes of one element."""

_DATA_ALIGNMENT = 64  # a cache line: what numpy and copies to a GPU like
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LENGTH_BYTES = 8
_MAX_DIMS = 16
_MAX_DATA_BYTES = 2**63 - 1
_METADATA = "__metadata__"
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
_LFS_POINTER = b"version "  # how a Git LFS pointer file begins
_FIX = "download it again"


class ByteRange(NamedTuple):
    """Where the data of a tensor lies: `offset` from the start of the file, `nbytes` long."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor: what it is and where its bytes are.

    Attributes:
        name: Hugging Face name.
        dtype: Safetensors name (`"BF16"`).
        shape: Dimensions, row-major.
        path: The file as it is named in the checkpoint; a symlink in Hugging Face's cache.
        offset: First byte, from the start of the file.
        nbytes: Bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def real_path(self) -> Path:
        """The file itself, symlinks resolved."""
        return self.path.resolve()


@dataclass(frozen=True)
class ShardHeader:
    """What the header of one file says.

    Attributes:
        path: The file, as it was named.
        header_nbytes: Bytes before the data: the length field and the JSON with its padding.
        tensors: By name, in the order of their data.
        metadata: `__metadata__`, empty if there is none.
        nbytes: Size of the file.
        sha256: Hex digest of the `header_nbytes` first bytes.
    """

    path: Path
    header_nbytes: int
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    nbytes: int
    sha256: str


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while `path` is read into one line.

    Raises:
        StorageError: For every `OSError`, and for a `ValueError`, as a path with a NUL byte gives.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path, an empty file to map
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} cannot be read: {reason}", "a readable file or folder", "check the path") from error


def read_header(path: str | Path) -> ShardHeader:
    """Read and check the header of a safetensors file.

    Reads `header_nbytes` bytes, at most 100 MB, whatever the size of the file.

    Raises:
        CheckpointError: The file is missing, cut short, or its header breaks the format.
        StorageError: The file cannot be opened or is not a regular file.
    """
    path = Path(path)
    with read_errors(path):
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist", "a safetensors file", _FIX) from None
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{path} is not a regular file", "a safetensors file", "check the path")
            prefix = _read_prefix(file, path, status.st_size)
    return _parse_header(path, prefix, status.st_size)


def _read_prefix(file: BinaryIO, path: Path, file_nbytes: int) -> bytes:
    """Read the length field and the JSON, believing the length only after it is bounded by the file."""
    length_field = file.read(_LENGTH_BYTES)
    if length_field == _LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself", "tensor data", "run `git lfs pull`")
    json_nbytes = int.from_bytes(length_field, "little")
    if len(length_field) < _LENGTH_BYTES or json_nbytes > file_nbytes - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is cut short: its header says {json_nbytes} bytes, the file has {file_nbytes}", fix=_FIX
        )
    if not 2 <= json_nbytes <= _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} has a header of {json_nbytes} bytes", f"between 2 and {_MAX_HEADER_BYTES}", _FIX)
    first = file.read(1)
    if first != b"{":
        raise CheckpointError(f"the header of {path} begins with {first!r}", "'{' as in every safetensors file", _FIX)
    return length_field + first + file.read(json_nbytes - 1)


def _parse_header(path: Path, prefix: bytes, file_nbytes: int) -> ShardHeader:
    """Turn the bytes before the data into a `ShardHeader`; see `read_header`."""
    document = parse_object(prefix[_LENGTH_BYTES:], f"the header of {path}")
    metadata = _parse_metadata(path, document.pop(_METADATA, {}))
    refs = [_parse_tensor(path, name, value, len(prefix)) for name, value in document.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    end = len(prefix)
    for ref in refs:
        if ref.offset != end:
            raise CheckpointError(
                f"tensor {show(ref.name)} in {path} begins at byte {ref.offset}",
                f"{end}, where the tensor before it ends",
                _FIX,
            )
        end += ref.nbytes
    if end != file_nbytes:
        problem = "is cut short" if end > file_nbytes else "has bytes behind its last tensor"
        raise CheckpointError(f"{path} {problem}: its header says {end} bytes, the file has {file_nbytes}", fix=_FIX)
    tensors = {ref.name: ref for ref in refs}
    return ShardHeader(path, len(prefix), tensors, metadata, file_nbytes, hashlib.sha256(prefix).hexdigest())


def _parse_metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{_METADATA} in {path} holds {show(value)}", "an object of strings", _FIX)
    return value


def _parse_tensor(path: Path, name: str, value: Any, data_start: int) -> TensorRef:
    """Check one entry on its own; that neighbours touch is checked by the caller."""
    where = f"tensor {show(name)} in {path}"
    if not isinstance(value, dict) or set(value) != _TENSOR_KEYS:
        raise CheckpointError(f"{where} holds {show(value)}", "an object of dtype, shape and data_offsets", _FIX)
    nbytes = _num_bytes(where, value["dtype"], value["shape"])
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{where} has data_offsets={_show_list(offsets)}", "two integers, begin and end", _FIX)
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where} has data_offsets={_show_list(offsets)}",
            f"{nbytes} bytes for {value['dtype']} {_show_list(value['shape'])}",
            _FIX,
        )
    return TensorRef(name, value["dtype"], tuple(value["shape"]), path, data_start + begin, nbytes)


def _num_bytes(where: str, dtype: object, shape: object) -> int:
    """Bytes of a tensor, its dtype and shape checked."""
    if not isinstance(dtype, str) or dtype not in BYTES_OF_DTYPE:
        raise CheckpointError(f"{where} has dtype={show(dtype)}", f"one of {', '.join(BYTES_OF_DTYPE)}", _FIX)
    if not isinstance(shape, list | tuple) or len(shape) > _MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise CheckpointError(
            f"{where} has shape={_show_list(shape)}", f"at most {_MAX_DIMS} integers of 0 or more", _FIX
        )
    nbytes = BYTES_OF_DTYPE[dtype] * math.prod(shape)
    if nbytes > _MAX_DATA_BYTES or (0 in shape and math.prod(filter(None, shape)) > _MAX_DATA_BYTES):
        raise CheckpointError(f"{where} has shape={_show_list(shape)}", "fewer than 2^63 bytes", _FIX)
    return nbytes


def _is_size(value: object) -> bool:
    """Whether `value` is an integer that fits a signed 64-bit size; a bool does not."""
    return type(value) is int and 0 <= value <= _MAX_DATA_BYTES


def _show_list(value: object) -> str:
    """Show the items of a short list, anything else as `show` does."""
    if not isinstance(value, list | tuple) or len(value) > _MAX_DIMS:
        return show(value)
    return f"[{', '.join(show(item) for item in value)}]"


def write_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, ByteRange]]:
    """Lay out a safetensors file: tensors back to back in the given order, data from a multiple of 64 bytes on.

    Args:
        tensors: (name, dtype, shape) each.
        metadata: Written as `__metadata__` unless empty.

    Returns:
        The bytes to begin the file with, and where each tensor's data belongs in the file.

    Raises:
        CheckpointError: A name given twice or reserved, an unknown dtype, a bad shape, metadata that is not text, or
            a header over the 100 MB that readers accept.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries[_METADATA] = _parse_metadata(Path("the new file"), dict(metadata))
    spans: list[tuple[str, int, int]] = []
    end = 0
    for name, dtype, shape in tensors:
        if name in entries or name == _METADATA:
            raise CheckpointError(f"tensor name {show(name)} is taken", "names that differ", "rename the tensor")
        nbytes = _num_bytes(f"tensor {show(name)}", dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        spans.append((name, end, nbytes))
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _DATA_ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise CheckpointError(f"a header of {len(text)} bytes", f"at most {_MAX_HEADER_BYTES}", "write several files")
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: ByteRange(len(header) + begin, nbytes) for name, begin, nbytes in spans}
