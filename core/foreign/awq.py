"""AWQ checkpoints of the layout `gemm`, as AutoAWQ writes them: four bits with zero points.

| tensor    | dtype, shape         | what                                                                       |
|-----------|----------------------|----------------------------------------------------------------------------|
| `qweight` | I32 [K, N / 8]       | rows 8j + (0, 2, 4, 6, 1, 3, 5, 7) in word j, the first in the lowest bits |
| `qzeros`  | I32 [K / group, N/8] | packed likewise                                                            |
| `scales`  | floats [K / group, N]|                                                                            |

    w[n, k] = scales[k // group, n] · (qweight[k, n] - qzeros[k // group, n])

What AWQ scales up in a matrix it scales down in what feeds it, before it quantizes: nothing of that is stored.

Source: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py::WQLinear_GEMM.from_linear` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from qwen_rt.foreign.fields import Fields
from qwen_rt.foreign.matrix import ForeignMatrix, Part
from qwen_rt.quantization import QuantizedTensor, Scheme, pack_nibbles
from qwen_rt.strict_json import INT_MAX, show
from qwen_rt.tensor_data import FLOAT_DTYPES

__all__ = ["AwqLayout", "AwqQuantization", "read_awq"]

_BITS = 4
_PER_WORD = 8
_PLACE_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)
"""Row of a word → where its four bits stand, from the lowest: the inverse of the order above."""


@dataclass(frozen=True)
class AwqLayout:
    """How an AWQ matrix is stored.

    Attributes:
        group_size: Columns of a group; -1 for a whole row.
    """

    group_size: int

    def __str__(self) -> str:
        return f"AWQ, group_size={self.group_size}"

    @property
    def format(self) -> str:
        """See `Layout`."""
        return f"int{_BITS}"

    def parts(self, name: str, shape: tuple[int, int], present: frozenset[str]) -> Mapping[str, Part]:
        """See `Layout`."""
        rows, columns = shape
        if rows % _PER_WORD or columns % 2:
            raise UnsupportedModelError(
                f"{name} has {rows} rows and {columns} columns",
                f"a multiple of {_PER_WORD} rows, an even number of columns",
            )
        width = self._width(columns)
        check_groups(name, columns, width, self)
        return {
            "qweight": Part(("I32",), ((columns, rows // _PER_WORD),)),
            "qzeros": Part(("I32",), ((columns // width, rows // _PER_WORD),)),
            "scales": Part(FLOAT_DTYPES, ((columns // width, rows),)),
        }

    def scheme(self, matrix: ForeignMatrix) -> Scheme:
        """See `Layout`."""
        columns = matrix.shape[1]
        return integer_scheme(matrix.name, columns, self._width(columns), _BITS, self._zero(matrix), permuted=False)

    def load(self, matrix: ForeignMatrix) -> QuantizedTensor:
        """See `Layout`.

        Raises:
            CheckpointError: As `ForeignMatrix.load`.
        """
        rows, columns = matrix.shape
        scale = np.ascontiguousarray(read_scale(matrix, "scales").T)  # [N, G]
        words = matrix.read("qweight")
        octets = np.empty((rows, columns // 2), np.uint8)
        for start in range(0, rows, ROW_BLOCK):
            block = words[:, start // _PER_WORD : (start + ROW_BLOCK) // _PER_WORD]
            octets[start : start + ROW_BLOCK] = pack_nibbles(np.ascontiguousarray(_in_order(block).T))
        return finish_integers(matrix, _BITS, self._width(columns), octets, scale, self._zero(matrix))

    def _width(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def _zero(self, matrix: ForeignMatrix) -> NDArray[np.uint8]:
        """Zero points: [N, G]."""
        return np.ascontiguousarray(_in_order(matrix.read("qzeros")).T)


def _in_order(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Take words apart, rows in their order: int32 [m, n / 8] → uint8 [m, n]."""
    count = words.shape[-1] * _PER_WORD
    values = unpack_words(words, _BITS, count).reshape(*words.shape, _PER_WORD)
    return values[..., _PLACE_OF_ROW].reshape(*words.shape[:-1], count)


@dataclass(frozen=True)
class AwqQuantization:
    """An AWQ config: one layout for every module that the shards have quantized."""

    default: AwqLayout
    marks: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def layout(self, module: str) -> AwqLayout:
        """See `Quantization`."""
        return self.default

    def __str__(self) -> str:
        return "the AWQ config"


def read_awq(fields: Fields) -> AwqQuantization:
    """Read a config with `quant_method` awq.

    Raises:
        CheckpointError: A field that is missing, malformed or out of range.
        UnsupportedModelError: Bits or a layout that is not read.
    """
    bits = fields.first_of("bits", "w_bit")
    fields.require(bits, fields.integer(bits, 1, 32), _BITS)
    kind = next((key for key in ("version", "checkpoint_format", "format") if fields.has(key)), "version")
    fields.require(kind, fields.text(kind, "gemm"), "gemm")
    fields.require("pack_dtype", fields.text("pack_dtype", "int32"), "int32")
    if fields.text("backend", "auto") == "llm-awq":
        fields.require("backend", "llm-awq", "autoawq")
    fields.boolean("zero_point", True)  # the tensors say so themselves
    fields.names("modules_to_not_convert")
    key = fields.first_of("group_size", "q_group_size")
    group_size = fields.integer(key, -1, INT_MAX)
    if group_size == 0:
        raise CheckpointError(f"{fields.path}.{key}={show(0)}", "-1 for a whole row, or a number of columns")
    return AwqQuantization(AwqLayout(group_size))
