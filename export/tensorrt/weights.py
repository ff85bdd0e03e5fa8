"""Initializers as addresses: files are mapped, not read, and what has been read through is given back.

TensorRT's parser takes an address for each initializer and copies nothing. A weight whose bytes lie in one piece of a
file is that piece. Others (packed matrices, columns of a tensor-parallel rank, int4 in ONNX's order) are written behind
each other into a file without a name beside the bundle, and mapped too: it goes with the process, however that ends.

Pages of a mapped file count as resident while they stay mapped, so a build would seem to hold the model once more.
`release` drops them whenever they pass a limit; what is read again comes from the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qwen_rt.errors import StorageError
from qwen_rt.export.tensorrt.pack import Parts
from qwen_rt.storage import require_free_space

__all__ = ["INLINE_BYTES", "MappedWeights", "feed"]

INLINE_BYTES = 4096
"""Initializers up to this size that are no references stay in the graph."""

RELEASE_BYTES = 128 << 20
"""Resident pages of files above which `release` drops them."""

_BLOCK_BYTES = 8 << 20
_SPOOL = Path()  # stands for the file without a name


class MappedWeights:
    """The weights of a graph, in files; a context manager.

    Args:
        model: The graph; every weight in it is replaced by a reference, whose data is here.
        parts: Matrices that consist of several (`pack_linears`).
        folder: Where the file for rearranged weights may be made.
        advance: Told the bytes of every block that was written there.

    Attributes:
        addresses: Name → (address, bytes).
        nbytes: Bytes of all weights.
    """

    def __init__(
        self, model: ir.Model, parts: Parts, folder: Path, advance: Callable[[int], object] | None = None
    ) -> None:
        self.addresses: dict[str, tuple[int, int]] = {}
        self.nbytes = 0
        self._folder, self._advance = folder, advance
        self._maps: dict[Path, tuple[mmap.mmap, int]] = {}
        self._spool: BinaryIO | None = None
        self._dtypes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        try:
            self._take(model, parts)
        except BaseException:
            self.close()
            raise
        self._resident_before = self._resident_bytes()

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap everything; the addresses are void."""
        self.addresses.clear()
        for mapped, _ in self._maps.values():
            mapped.close()
        self._maps.clear()
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _take(self, model: ir.Model, parts: Parts) -> None:
        spooled: dict[str, tuple[int, int]] = {}
        rearranged = dict(self._rearranged(model, parts))
        if rearranged:
            require_free_space(self._folder, sum(nbytes for nbytes, _ in rearranged.values()))
            self._spool = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            for name, (nbytes, blocks) in rearranged.items():
                start = -(-self._spool.tell() // 64) * 64
                self._spool.seek(start)
                for block in blocks():
                    self._spool.write(block)
                    if self._advance is not None:
                        self._advance(len(block))
                if self._spool.tell() != start + nbytes:
                    raise StorageError(f"weight {name} has {self._spool.tell() - start} bytes", f"{nbytes}")
                spooled[name] = (start, nbytes)
            self._spool.flush()
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if name in spooled:
                assert self._spool is not None
                start, nbytes = spooled[name]
                address = self._map(_SPOOL, self._spool)
            elif isinstance(tensor, ir.ExternalTensor):
                (file, start, nbytes), *more = _merged(parts.get(name, (tensor,)))
                assert not more
                address = self._map(file)
            else:
                continue
            self.addresses[name] = (address + start, nbytes)
            self.nbytes += nbytes
            dims = tuple(tensor.shape.numpy())
            self._dtypes[name] = (str(tensor.dtype), dims)
            value.const_value = ir.ExternalTensor(
                "weights", 0, nbytes, tensor.dtype, shape=ir.Shape(dims), name=name, base_dir=""
            )

    def _rearranged(
        self, model: ir.Model, parts: Parts
    ) -> Iterator[tuple[str, tuple[int, Callable[[], Iterator[bytes]]]]]:
        """What has to be written: name → bytes, and what yields them."""
        begun: dict[tuple[Path, int], int] = {}  # TensorRT refuses two weights of one address and different sizes
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if isinstance(tensor, ir.ExternalTensor):
                spans = _merged(parts.get(name, (tensor,)))
                file, offset, _ = spans[0]
                if len(spans) > 1 or begun.setdefault((file, offset), tensor.nbytes) != tensor.nbytes:
                    yield name, (tensor.nbytes, partial(_read, spans))
            elif tensor.nbytes > INLINE_BYTES:
                yield name, (tensor.nbytes, partial(_made, tensor))

    def _map(self, file: Path, opened: BinaryIO | None = None) -> int:
        """Address at which a file begins."""
        if file not in self._maps:
            with contextlib.ExitStack() as stack:
                handle = opened or stack.enter_context(file.open("rb"))
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[file] = mapped, np.frombuffer(mapped, np.uint8).ctypes.data
        return self._maps[file][1]

    def sha256(self) -> str:
        """Hash over names, dtypes, shapes and bytes of all weights, in the order of their names."""
        digest = hashlib.sha256()
        for name, (address, nbytes) in sorted(self.addresses.items()):
            dtype, shape = self._dtypes[name]
            digest.update(f"{name} {dtype} {list(shape)} {nbytes}\n".encode())
            for start in range(0, nbytes, _BLOCK_BYTES):
                size = min(_BLOCK_BYTES, nbytes - start)
                digest.update((ctypes.c_char * size).from_address(address + start))
                self.release()
        return digest.hexdigest()

    def release(self) -> None:
        """Drop the pages of the files from this process's memory if they have become many; they can be read again."""
        if self._resident_bytes() - self._resident_before > RELEASE_BYTES:
            for mapped, _ in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def _resident_bytes(self) -> int:
        """Pages of files that count as this process's."""
        try:
            return int(Path("/proc/self/statm").read_bytes().split()[2]) * self._page_bytes
        except (OSError, ValueError, IndexError):
            return 0


Span = tuple[Path, int, int]


def _merged(tensors: tuple[ir.ExternalTensor, ...]) -> list[Span]:
    """(file, offset, bytes) of tensors that follow each other; neighbours in a file become one."""
    spans: list[Span] = []
    for tensor in tensors:
        file, offset, nbytes = Path(tensor.path).resolve(), tensor.offset or 0, tensor.nbytes
        if spans and spans[-1][0] == file and spans[-1][1] + spans[-1][2] == offset:
            spans[-1] = (file, spans[-1][1], spans[-1][2] + nbytes)
        else:
            spans.append((file, offset, nbytes))
    return spans


def _made(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    yield tensor.tobytes()


def _read(spans: list[Span]) -> Iterator[bytes]:
    for file, offset, nbytes in spans:
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            while nbytes:
                block = opened.read(min(_BLOCK_BYTES, nbytes))
                if not block:
                    raise StorageError(f"{file} ends too early", "a whole shard", "download it again")
                nbytes -= len(block)
                yield block


def feed(parser: Any, addresses: Mapping[str, tuple[int, int]]) -> list[str]:
    """Hand the addresses to TensorRT's parser, whose model is loaded; returns the names that it did not take."""
    return [name for name, (address, nbytes) in addresses.items() if not parser.load_initializer(name, address, nbytes)]
