"""From integers, scales and zero points to a `QuantizedTensor`: what all foreign layouts have in common.

Integers arrive as the unsigned numbers u that all of them store, with zero points z of the same kind:
w = scale · (u - z). int4 keeps both; int8 is stored as u - 128 and z - 128. A group wider than those that this package
has is split into several with the same scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign.matrix import FIX_AGAIN, ForeignMatrix
from qwen_rt.quantization import GROUP_SIZES, QuantizedTensor, Scheme, pack_nibbles, unpack_nibbles

__all__ = [
    "ROW_BLOCK",
    "check_fp8",
    "check_groups",
    "finish_fp8",
    "finish_integers",
    "integer_scheme",
    "read_scale",
    "split_groups",
    "unpack_words",
]

ROW_BLOCK = 256
"""Rows that are repacked at a time: what a block needs beside the matrix stays within a few megabytes."""

_LARGEST_F16_LOSS = 2.0**-11
_PREFERRED_GROUP = 128
_LARGEST_SCALE = 2.0**100  # products stay far from the end of float32


def unpack_words(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """Take words of 32 bits apart, the lowest bits first: int32 [..., n] → uint8 [..., count].

    Args:
        words: Little-endian.
        bits: 4 or 8.
        count: Numbers wanted, at most 32 / bits a word.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)  # [..., 4n]
    return unpack_nibbles(octets, count) if bits == 4 else octets[..., :count]


def check_groups(name: str, columns: int, group_size: int, layout: object) -> None:
    """Refuse groups that do not divide a row.

    Raises:
        CheckpointError: They do not.
    """
    if columns % group_size:
        raise CheckpointError(
            f"group_size={group_size} does not divide the {columns} columns of {name}",
            f"a divisor of {columns} for {layout}",
            "download config.json again, or choose a checkpoint with another group size",
        )


def split_groups(name: str, columns: int, width: int, format_: str) -> int:
    """Group size to store columns with that share a scale by `width` each.

    Args:
        name: The matrix, for the message.
        columns: K.
        width: Columns of a foreign group; `columns` or more for a scale for each row.
        format_: `int4`, `int8` or `fp8`.

    Returns:
        A group size of `Scheme`: 0 where a row has one scale. int4 is given groups all the same, 128 where that
        divides: its kernels have no other way.

    Raises:
        UnsupportedModelError: No group size divides both.
    """
    if width >= columns:
        if format_ != "int4":
            return 0
        fitting = [size for size in GROUP_SIZES if columns % size == 0]
        return _PREFERRED_GROUP if _PREFERRED_GROUP in fitting else max(fitting, default=0)
    fitting = [size for size in GROUP_SIZES if width % size == 0 and columns % size == 0]
    if not fitting:
        raise UnsupportedModelError(
            f"{name} has a scale for every {width} of its {columns} columns",
            f"groups that a multiple of {GROUP_SIZES[0]} columns share",
            "choose a checkpoint with another group size",
        )
    return max(fitting)


def read_scale(matrix: ForeignMatrix, part: str) -> NDArray[np.float32]:
    """Read scales of any float dtype.

    Raises:
        CheckpointError: One is zero, infinite, no number, or beyond all reason.
    """
    scale = matrix.read_float(part)
    bad = ~(np.abs(scale) <= _LARGEST_SCALE) | (scale == 0)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise CheckpointError(
            f"{np.count_nonzero(bad)} of {scale.size} scales in {matrix.parts[part].name} are unusable, "
            f"the first {float(scale[tuple(where)]):g} at {where}",
            "finite scales other than zero, up to 1e+30",
            FIX_AGAIN,
        )
    return scale


def integer_scheme(
    name: str, columns: int, width: int, bits: int, zero: NDArray[np.uint8] | None, permuted: bool
) -> Scheme:
    """The scheme that `finish_integers` gives for the same arguments."""
    format_ = f"int{bits}"
    symmetric = zero is None or bool(np.all(zero == 1 << (bits - 1)))
    return Scheme(format_, split_groups(name, columns, width, format_), symmetric, permuted)


def finish_integers(
    matrix: ForeignMatrix,
    bits: int,
    width: int,
    octets: NDArray[np.uint8],
    scale: NDArray[np.float32],
    zero: NDArray[np.uint8] | None,
    perm: NDArray[np.int32] | None = None,
) -> QuantizedTensor:
    """Put together an int4 or int8 matrix.

    Args:
        matrix: Where it comes from.
        bits: 4 or 8.
        width: Columns that share a scale; K or more for a whole row.
        octets: uint8 [N, K · bits / 8], unsigned numbers; of int4 two to a byte as `pack_nibbles` has them.
        scale: [N, ceil(K / width)].
        zero: Unsigned zero points of that shape; None for 2^(bits-1) everywhere.
        perm: int32[K], as `QuantizedTensor.perm`.

    Raises:
        CheckpointError: int4 scales that float16 cannot hold.
        UnsupportedModelError: Groups that no group size of this package divides.
    """
    columns = matrix.shape[1]
    scheme = integer_scheme(matrix.name, columns, width, bits, zero, perm is not None)
    repeat = _repetitions(columns, width, scheme)
    # [N, G]
    spread = np.repeat(scale, repeat, axis=1)
    if bits == 8:
        zeros = None if scheme.symmetric or zero is None else _signed(np.repeat(zero, repeat, axis=1))
        return QuantizedTensor(matrix.name, scheme, matrix.shape, _signed(octets), spread, zeros, perm)
    packed = None if scheme.symmetric or zero is None else pack_nibbles(np.repeat(zero, repeat, axis=1))
    return QuantizedTensor(matrix.name, scheme, matrix.shape, octets, _to_float16(matrix, spread), packed, perm)


def check_fp8(matrix: ForeignMatrix, part: str) -> NDArray[np.uint8]:
    """Read e4m3 numbers: uint8 [N, K].

    Raises:
        CheckpointError: One is no number.
    """
    bits: NDArray[np.uint8] = matrix.read(part)
    wrong = (bits & 0x7F) == 0x7F
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise CheckpointError(
            f"{np.count_nonzero(wrong)} of {bits.size} numbers in {matrix.parts[part].name} are nan, the first at "
            f"[{row}, {column}]",
            "numbers",
            FIX_AGAIN,
        )
    return bits


def finish_fp8(
    matrix: ForeignMatrix, bits: NDArray[np.uint8], scale: NDArray[np.float32], height: int, width: int
) -> QuantizedTensor:
    """Put together an fp8 matrix.

    Args:
        matrix: Where it comes from.
        bits: uint8 [N, K].
        scale: [ceil(N / height), ceil(K / width)].
        height: Rows that share a scale; N or more for all.
        width: Columns that share a scale; K or more for all.

    Raises:
        UnsupportedModelError: Groups that no group size of this package divides.
    """
    rows, columns = matrix.shape
    size = split_groups(matrix.name, columns, width, "fp8")
    by_column = np.arange(0, columns, size or columns) // width  # block of each group
    by_row = np.arange(rows) // height
    return QuantizedTensor(
        matrix.name, Scheme("fp8", size), matrix.shape, bits, scale[by_row[:, None], by_column[None, :]]
    )


def _repetitions(columns: int, width: int, scheme: Scheme) -> int:
    """Stored groups of each foreign one."""
    return min(width, columns) // (scheme.group_size or columns)


def _signed(octets: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Subtract 128: uint8 → int8 of the same shape."""
    return np.bitwise_xor(octets, np.uint8(0x80)).view(np.int8)


def _to_float16(matrix: ForeignMatrix, scale: NDArray[np.float32]) -> NDArray[Any]:
    """Round scales to float16 where that loses no more than rounding does within its normal range."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = scale.astype(np.float16)
    lost = np.abs(narrow.astype(np.float32) - scale) > _LARGEST_F16_LOSS * np.abs(scale)
    if lost.any():
        raise CheckpointError(
            f"{np.count_nonzero(lost)} of {scale.size} scales of {matrix.name} do not fit float16, the first "
            f"{float(scale[lost][0]):g}",
            "scales of magnitude 6.1e-05 to 65504, in which int4 matrices are stored",
            "choose a checkpoint in float16 or with eight bits",
        )
    return narrow
