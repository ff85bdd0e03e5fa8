"""Rows of stored matrices as float32, read when asked for: no file is ever held whole.

    with CheckpointRows(checkpoint) as reader:
        reader.rows("model.layers.0.mlp.up_proj.weight", 0, 128)          # float32 [128, K]

`StoredRows` holds no matrix whole either; `CheckpointRows` also reads what other tools quantized, by whole matrices.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize, part_name
from qwen_rt.safetensors_header import BYTES_OF_DTYPE, TensorRef, read_errors
from qwen_rt.strict_json import show
from qwen_rt.tensor_data import STORED_AS, read_bytes, to_float32

__all__ = ["CheckpointRows", "RowSource", "StoredRows", "read_bytes"]

_MAX_CACHED_MATRICES = 3  # of 72B one takes up to 250 MB


class RowSource(Protocol):
    """Where the parameters of a model come from, as float32, whatever they are stored as."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, [N, K] or [n]."""
        ...

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start … stop - 1` of a matrix, or elements of a vector: a new float32 array. Threads may share it."""
        ...


class StoredRows:
    """Parameters in safetensors files; quantized ones are dequantized.

    Args:
        tensors: Every stored tensor by its name, the parts of quantized matrices among them.
        schemes: Scheme of each quantized matrix, by its name.
    """

    def __init__(self, tensors: Mapping[str, TensorRef], schemes: Mapping[str, Scheme] | None = None) -> None:
        self._tensors, self._schemes = dict(tensors), dict(schemes or {})
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; another read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def shape(self, name: str) -> tuple[int, ...]:
        """See `RowSource`."""
        ref = self._ref(name)
        if name not in self._schemes or self._schemes[name].format != "int4":
            return ref.shape
        return ref.shape[0], ref.shape[1] * 2

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `RowSource`.

        Raises:
            CheckpointError: No such tensor, one of another dtype than floats, or a file that has been cut short.
            StorageError: A file cannot be read.
        """
        if name in self._schemes:
            return dequantize(self.quantized_rows(name, start, stop))
        ref = self._ref(name)
        return to_float32(ref, self.stored_rows(ref, start, stop))

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a quantized matrix, as they are stored."""
        scheme, columns = self._schemes[name], self.shape(name)[1]
        parts: dict[str, NDArray[Any]] = {}
        for part in scheme.parts((0, columns)):
            ref = self._ref(part_name(name, part))
            parts[part] = (
                self.stored_rows(ref, 0, ref.shape[0]) if part == "perm" else self.stored_rows(ref, start, stop)
            )
        values = parts["weight"]
        return QuantizedTensor(
            name,
            scheme,
            (len(values), columns),
            values,
            parts["scale"],
            parts.get("zero_point"),
            parts.get("perm"),
        )

    def stored_rows(self, ref: TensorRef, start: int, stop: int) -> NDArray[Any]:
        """Rows of any stored tensor, in `STORED_AS` of its dtype."""
        row_shape = ref.shape[1:]
        row_bytes = BYTES_OF_DTYPE[ref.dtype] * int(np.prod(row_shape, dtype=np.int64))
        stop = min(stop, ref.shape[0])
        data = np.empty((stop - start) * row_bytes, np.uint8)
        read_bytes(self._descriptor(ref.path), data, ref.offset + start * row_bytes, ref)
        rows: NDArray[Any] = data.view(STORED_AS[ref.dtype]).reshape(stop - start, *row_shape)
        return rows

    def _ref(self, name: str) -> TensorRef:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {show(name)} is not stored", "every tensor of the model", "build again")
        return self._tensors[name]

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                with read_errors(path):
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]


class CheckpointRows:
    """Parameters of any checkpoint: floats as they are stored, quantized matrices dequantized.

    The layout of a quantized matrix cannot be read by rows; the last few that were asked for stay in memory, as they
    were loaded. Threads may share a reader: they load different matrices side by side, and one matrix once.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stored, self._quantized = StoredRows(checkpoint.tensors), checkpoint.quantized
        self._cache: OrderedDict[str, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and forget the matrices; another read opens them again."""
        self._stored.close()
        with self._lock:
            self._cache.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `RowSource`."""
        return self._quantized[name].shape if name in self._quantized else self._stored.shape(name)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `RowSource`.

        Raises:
            CheckpointError: As `StoredRows.rows`; for a quantized matrix also as `ForeignMatrix.load`.
            StorageError: A file cannot be read.
        """
        if name in self._quantized:
            return dequantize(self.quantized(name).rows(start, stop))
        return self._stored.rows(name, start, stop)

    def quantized(self, name: str) -> QuantizedTensor:
        """A whole quantized matrix of `Checkpoint.quantized`, from the cache if it is there.

        Raises:
            CheckpointError, StorageError: As `ForeignMatrix.load`.
        """
        with self._lock:
            slot = self._cache.setdefault(name, _Slot())
            self._cache.move_to_end(name)
            while len(self._cache) > _MAX_CACHED_MATRICES:
                self._cache.popitem(last=False)
        with slot.lock:
            if slot.tensor is None:
                slot.tensor = self._quantized[name].load()
            return slot.tensor


@dataclass(eq=False)
class _Slot:
    """One matrix of the cache; whoever has its lock loads it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tensor: QuantizedTensor | None = None
