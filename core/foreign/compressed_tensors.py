"""compressed-tensors checkpoints, as llm-compressor writes them: packed integers, plain int8, and fp8.

| format          | tensor              | dtype, shape                 | what                                          |
|-----------------|---------------------|------------------------------|-----------------------------------------------|
| pack-quantized  | `weight_packed`     | I32 [N, ceil(K · bits / 32)] | values plus 2^(bits-1), the first in low bits |
|                 | `weight_zero_point` | I32 [ceil(N · bits / 32), G] | likewise, rows in a word                      |
|                 | `weight_shape`      | I64 [2]                      | N, K                                          |
|                 | `weight_g_idx`      | I32 [K]                      | group of each column, for an act-order        |
| int-quantized   | `weight`            | I8 [N, K]                    |                                               |
|                 | `weight_zero_point` | I8, as the scales            |                                               |
| float-quantized | `weight`            | F8_E4M3 [N, K]               |                                               |
| all             | `weight_scale`      | floats [N, G], [N, 1] or [1] | by group, channel or tensor                   |
|                 |                     | floats [ceil(N/h), ceil(K/w)]| by block                                      |

    w[n, k] = weight_scale[n, g] · (weight[n, k] - weight_zero_point[n, g])

`naive-quantized` is one of the latter two, by its type. Which modules are quantized how stands in `config_groups`,
each with its targets: a module's name, a pattern after `re:`, or a class; in this order of precedence.

Source: compressed-tensors 0.20.0, `compressors/pack_quantized/`, `compressors/naive_quantized/` and `utils/match.py`;
`weight_g_idx` as in 0.12.2, `quantization/lifecycle/forward.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign.assemble import (
    ROW_BLOCK,
    check_groups,
    finish_integers,
    integer_scheme,
    read_scale,
    unpack_words,
)
from qwen_rt.foreign.gptq import column_order
from qwen_rt.foreign.matrix import FIX_AGAIN, ForeignMatrix, Part
from qwen_rt.quantization import QuantizedTensor, Scheme, pack_nibbles
from qwen_rt.tensor_data import FLOAT_DTYPES

__all__ = ["IntegerLayout"]

_Number = TypeVar("_Number", bound=np.generic)

_ZERO = "weight_zero_point"
_ORDER = "weight_g_idx"


@dataclass(frozen=True)
class IntegerLayout:
    """How a matrix of integers is stored.

    Attributes:
        bits: 4 or 8 packed; up to 8 in bytes.
        strategy: `tensor`, `channel` or `group`.
        group_size: Columns of a group, for that strategy.
        packed: `pack-quantized`, words; otherwise `int-quantized`, bytes.
        symmetric: No zero points; some versions store them all the same.
    """

    bits: int
    strategy: str
    group_size: int
    packed: bool
    symmetric: bool

    def __str__(self) -> str:
        kind = "pack-quantized" if self.packed else "int-quantized"
        grouped = f", group_size={self.group_size}" if self.strategy == "group" else f" by {self.strategy}"
        return f"{kind} of {self.bits} bits{grouped}"

    @property
    def format(self) -> str:
        """See `Layout`."""
        return f"int{self._stored_bits}"

    @property
    def _stored_bits(self) -> int:
        return self.bits if self.packed else 8

    def parts(self, name: str, shape: tuple[int, int], present: frozenset[str]) -> Mapping[str, Part]:
        """See `Layout`."""
        rows, columns = shape
        width = self._width(columns)
        check_groups(name, columns, width, self)
        groups = columns // width
        scales: tuple[tuple[int, ...], ...] = ((rows, groups),)
        if self.strategy == "tensor":
            scales = ((1,), (), (1, 1))
        elif self.strategy == "channel":
            scales = ((rows, 1), (rows,))
        found = {"weight_scale": Part(FLOAT_DTYPES, scales)}
        zero_dtypes: tuple[str, ...] = ("I8",)
        zero_shapes = scales
        if self.packed:
            if columns * self.bits % 8:
                raise UnsupportedModelError(f"{name} has {columns} columns", f"an even number for {self}")
            found["weight_packed"] = Part(("I32",), ((rows, -(-columns * self.bits // 32)),))
            found["weight_shape"] = Part(("I64", "I32"), ((2,),), required=False)
            found[_ORDER] = Part(("I32",), ((columns,),), required=False)
            if self.strategy != "tensor":
                zero_dtypes = ("I32", "I8")
                zero_shapes = ((-(-rows * self.bits // 32), groups), *scales)
        else:
            found["weight"] = Part(("I8",), (shape,))
        found[_ZERO] = Part(zero_dtypes, zero_shapes, required=not self.symmetric)
        return found

    def scheme(self, matrix: ForeignMatrix) -> Scheme:
        """See `Layout`."""
        columns = matrix.shape[1]
        permuted = self._order(matrix) is not None
        zero = self._zero(matrix)
        return integer_scheme(matrix.name, columns, self._width(columns), self._stored_bits, zero, permuted)

    def load(self, matrix: ForeignMatrix) -> QuantizedTensor:
        """See `Layout`.

        Raises:
            CheckpointError: As `ForeignMatrix.load`, or a `weight_shape` that is another.
        """
        self._check_shape(matrix)
        rows, columns = matrix.shape
        bits = self._stored_bits
        scale = self._by_row(read_scale(matrix, "weight_scale"), rows)
        zero, perm = self._zero(matrix), self._order(matrix)
        if self.packed:
            words = matrix.read("weight_packed")
            octets = words.view(np.uint8)[:, : columns * bits // 8]
            if perm is not None:
                octets = _reordered(words, bits, perm)
        else:
            octets = np.bitwise_xor(matrix.read("weight").view(np.uint8), np.uint8(0x80))
        return finish_integers(matrix, bits, self._width(columns), np.ascontiguousarray(octets), scale, zero, perm)

    def _width(self, columns: int) -> int:
        return self.group_size if self.strategy == "group" else columns

    @staticmethod
    def _by_row(array: NDArray[_Number], rows: int) -> NDArray[_Number]:
        """Scales or zero points as [N, G], one for all repeated."""
        return np.repeat(array.reshape(1, 1), rows, axis=0) if array.size == 1 else array.reshape(rows, -1)

    def _zero(self, matrix: ForeignMatrix) -> NDArray[np.uint8] | None:
        """Zero points, unsigned: [N, G]; None if there are none.

        Raises:
            CheckpointError: One that the integers cannot be.
        """
        if _ZERO not in matrix.parts:
            return None
        rows, bits = matrix.shape[0], self._stored_bits
        stored = matrix.read(_ZERO)
        if matrix.parts[_ZERO].dtype == "I32":
            return np.ascontiguousarray(unpack_words(stored.T, bits, rows).T)
        half = 1 << (bits - 1)
        outside = (stored < -half) | (stored >= half)
        if outside.any():
            raise CheckpointError(
                f"{matrix.parts[_ZERO].name} holds {int(stored[outside][0])}", f"{-half} to {half - 1}", FIX_AGAIN
            )
        return self._by_row((stored.astype(np.int16) + half).astype(np.uint8), rows)

    def _order(self, matrix: ForeignMatrix) -> NDArray[np.int32] | None:
        if _ORDER not in matrix.parts or self.strategy != "group":
            return None
        group = matrix.read(_ORDER)
        if (group == -1).all():  # allocated and never filled: no order
            return None
        return column_order(matrix.parts[_ORDER], group, self.group_size)

    def _check_shape(self, matrix: ForeignMatrix) -> None:
        if "weight_shape" not in matrix.parts:
            return
        shape = matrix.read("weight_shape").tolist()
        if shape != list(matrix.shape):
            raise CheckpointError(
                f"{matrix.parts['weight_shape'].name} says {shape}", f"{list(matrix.shape)}", FIX_AGAIN
            )


def _reordered(words: NDArray[np.int32], bits: int, perm: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Bring the columns of packed words into another order: uint8 [N, K · bits / 8]."""
    octets = np.empty((len(words), perm.size * bits // 8), np.uint8)
    for start in range(0, len(words), ROW_BLOCK):
        values = unpack_words(words[start : start + ROW_BLOCK], bits, perm.size)[:, perm]
        octets[start : start + ROW_BLOCK] = pack_nibbles(values) if bits == 4 else values
    return octets
