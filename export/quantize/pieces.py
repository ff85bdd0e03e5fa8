"""Quantized matrices and edited vectors as pieces of a bundle's weight files, made row block by row block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.weights import NUMPY_DTYPES, Piece, in_order, row_blocks
from qwen_rt.quantization import QuantizedTensor, Scheme, part_name
from qwen_rt.row_reader import RowSource

__all__ = ["EditedRows", "MatrixEdit", "quantized_piece", "stored_piece", "vector_piece"]


@dataclass(frozen=True, eq=False)
class MatrixEdit:
    """What a matrix is multiplied by before it is quantized, and what counts when it is.

    Attributes:
        rows: float32 [N], or None. Powers of two, so that nothing is rounded.
        columns: float32 [K], or None; likewise.
        importance: float32 [K], or None: see `quantize_rows`.
    """

    rows: NDArray[np.float32] | None = None
    columns: NDArray[np.float32] | None = None
    importance: NDArray[np.float32] | None = None


class EditedRows:
    """A `RowSource` of the parameters as a bundle computes with them: matrices scaled, vectors replaced.

    Args:
        source: The checkpoint.
        edits: Matrix → its factors.
        vectors: Vector → its new elements, float32.
    """

    def __init__(
        self, source: RowSource, edits: dict[str, MatrixEdit], vectors: dict[str, NDArray[np.float32]]
    ) -> None:
        self._source, self._edits, self._vectors = source, dict(edits), dict(vectors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `RowSource`."""
        return self._vectors[name].shape if name in self._vectors else self._source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `RowSource`."""
        if name in self._vectors:
            return self._vectors[name][start:stop].astype(np.float32)
        rows, edit = self._source.rows(name, start, stop), self._edits.get(name)
        if edit is not None and edit.rows is not None:
            rows *= edit.rows[start:stop, None]
        if edit is not None and edit.columns is not None:
            rows *= edit.columns
        return rows


def quantized_piece(
    source: RowSource,
    name: str,
    scheme: Scheme,
    stored_name: str | None = None,
    importance: NDArray[np.float32] | None = None,
) -> Piece:
    """A matrix that is quantized while it is written; scales and zero points are kept and written behind it.

    Args:
        source: Where it comes from, edited already.
        name: Which matrix.
        scheme: What to store; not permuted.
        stored_name: Name in the file; None for the same.
        importance: float32 [K], that of the matrix's `MatrixEdit`.
    """
    shape = source.shape(name)

    def quantize(start: int, stop: int) -> QuantizedTensor:
        return quantize_rows(name, source.rows(name, start, stop), scheme, start, importance)

    def blocks(pool: Executor) -> Iterator[bytes]:
        rest: dict[str, list[NDArray[Any]]] = {}
        tasks = (partial(quantize, start, stop) for start, stop in row_blocks(shape))
        for tensor in in_order(pool, tasks):
            parts = tensor.parts()
            yield parts.pop("weight").tobytes()
            for part, array in parts.items():
                rest.setdefault(part, []).append(array)
        for arrays in rest.values():
            yield np.concatenate(arrays).tobytes()

    return Piece(_tensors(stored_name or name, scheme, shape), blocks)


def stored_piece(name: str, scheme: Scheme, shape: tuple[int, ...], load: Callable[[], QuantizedTensor]) -> Piece:
    """A matrix that the checkpoint holds quantized, in the same scheme; `load` gives it when it is its turn."""

    def blocks(pool: Executor) -> Iterator[bytes]:
        for array in pool.submit(load).result().parts().values():
            yield np.ascontiguousarray(array).tobytes()

    return Piece(_tensors(name, scheme, shape), blocks)


def vector_piece(name: str, values: NDArray[np.float32], dtype: str) -> Piece:
    """A small tensor whose elements are known, stored as floats of `dtype`."""
    data = values.astype(NUMPY_DTYPES[dtype]).tobytes()
    return Piece(((name, dtype, values.shape),), lambda _: iter([data]))


def _tensors(name: str, scheme: Scheme, shape: tuple[int, ...]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple((part_name(name, part), dtype, size) for part, (dtype, size) in scheme.parts(shape).items())
