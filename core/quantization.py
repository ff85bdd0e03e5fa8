"""How quantized matrices and KV caches are stored: formats, tensors, packing, and what the numbers mean.

A matrix `w: [N, K]` (N output channels, K inputs) named `X.weight` is stored as

| tensor                | fp8             | int8            | int4                                                     |
|-----------------------|-----------------|-----------------|----------------------------------------------------------|
| `X.weight`            | F8_E4M3 [N, K]  | I8 [N, K]       | U8 [N, K/2], column 2i in the low four bits, 2i+1 above  |
| `X.weight_scale`      | F32 [N, G]      | F32 [N, G]      | F16 [N, G]                                               |
| `X.weight_zero_point` | –               | I8 [N, G]       | U8 [N, ceil(G/2)], packed as the weight                  |
| `X.weight_perm`       | –               | I32 [K]         | I32 [K]                                                  |

    w[n, perm[k]] = scale[n, k // group_size] · (value[n, k] - zero_point[n, k // group_size])

G = K / group_size groups of columns share a scale; with `group_size=0` the whole row does, and G = 1. Without zero
points (symmetric) a value of 8 stands for zero in int4, 0 in the others. Without a permutation `perm[k] = k`; one
comes from GPTQ's act-order, whose groups are not made of neighbours. Every target reads these bytes as they are.

A quantized KV cache holds one byte an element. What is stored of a token's head vector is

    value = round(x / scale),  scale = max|x| / largest      (a scale for each token and head, float32)

with x = R(position) · (k - offset) for keys and v - offset for values. The offset, per layer f32 [Hkv, D], is a part
of the projection's bias that does not depend on the token: Qwen2's key biases are so large that nothing else would be
left of a key in eight bits. It is added again, exactly: R(position) · offset to the keys, offset to the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UsageError

__all__ = [
    "DEFAULT_SCHEMES",
    "FORMATS",
    "GROUP_SIZES",
    "KV_FORMATS",
    "KV_LARGEST",
    "MAX_FP8",
    "QuantizedTensor",
    "Scheme",
    "check_scheme",
    "decode_fp8",
    "dequantize",
    "fake_quantize_kv",
    "key_offset_name",
    "pack_nibbles",
    "part_name",
    "round_fp8",
    "unpack_nibbles",
    "value_offset_name",
]

FORMATS = ("fp8", "int8", "int4")
"""Formats of quantized matrices."""

KV_FORMATS = ("fp8", "int8")
"""Formats of quantized KV caches; both take one byte an element, and a float32 scale for each token and head."""

KV_LARGEST: Mapping[str, float] = {"fp8": 448.0, "int8": 127.0}
"""The magnitude that the largest element of a head vector is stored as."""

MAX_FP8 = 448.0
"""The largest e4m3 number."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Columns that can share a scale; else the whole row does."""

_ZERO_INT4 = 8

_VALUE_DTYPES = {"fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}
_SCALE_DTYPES = {"fp8": "F32", "int8": "F32", "int4": "F16"}
_ZERO_DTYPES = {"int8": "I8", "int4": "U8"}


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized.

    Attributes:
        format: `fp8` (e4m3), `int8` or `int4`.
        group_size: Columns that share a scale: 16, 32, 64, 128 or 256; 0 for the whole row.
        symmetric: No zero points.
        permuted: The columns are stored in another order, which the tensor `_perm` gives.
    """

    format: str
    group_size: int = 0
    symmetric: bool = True
    permuted: bool = False

    def num_groups(self, columns: int) -> int:
        """G: scales of a row of `columns` elements."""
        return columns // self.group_size if self.group_size else 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name of each stored part → (safetensors dtype, shape), for a matrix of `shape` [N, K].

        The parts are `weight`, `scale`, and where the scheme has them `zero_point` and `perm`.
        """
        rows, columns = shape
        groups = self.num_groups(columns)
        packed = self.format == "int4"
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": (_VALUE_DTYPES[self.format], (rows, columns // 2 if packed else columns)),
            "scale": (_SCALE_DTYPES[self.format], (rows, groups)),
        }
        if not self.symmetric:
            found["zero_point"] = (_ZERO_DTYPES[self.format], (rows, -(-groups // 2) if packed else groups))
        if self.permuted:
            found["perm"] = ("I32", (columns,))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; `Scheme(**data)` is the way back."""
        return dict(vars(self))

    def __str__(self) -> str:
        text = self.format if not self.group_size else f"{self.format} g{self.group_size}"
        return text + ("" if self.symmetric else " asymmetric") + (" permuted" if self.permuted else "")


DEFAULT_SCHEMES: Mapping[str, Scheme] = {"fp8": Scheme("fp8"), "int8": Scheme("int8"), "int4": Scheme("int4", 128)}
"""Precision → scheme that `qwen-rt build` quantizes to unless told otherwise."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix in memory, in the stored layout.

    Attributes:
        name: Hugging Face name of the matrix (`model.layers.0.mlp.up_proj.weight`).
        scheme: Its scheme.
        shape: [N, K].
        values: uint8 bits [N, K] for fp8, int8 [N, K], or uint8 [N, K/2] for int4.
        scale: float32 [N, G]; float16 for int4.
        zero_point: int8 [N, G] or uint8 [N, ceil(G/2)]; None if symmetric.
        perm: int32[K]; None if the columns are in order.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    values: NDArray[Any]
    scale: NDArray[Any]
    zero_point: NDArray[Any] | None = None
    perm: NDArray[np.int32] | None = None

    def parts(self) -> dict[str, NDArray[Any]]:
        """Name of each stored part → its array, in the order of `Scheme.parts`."""
        found = {"weight": self.values, "scale": self.scale}
        if self.zero_point is not None:
            found["zero_point"] = self.zero_point
        if self.perm is not None:
            found["perm"] = self.perm
        return found

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Some of the rows, as views."""
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        values, scale = self.values[start:stop], self.scale[start:stop]
        return QuantizedTensor(self.name, self.scheme, (values.shape[0], self.shape[1]), values, scale, zero, self.perm)


def part_name(name: str, part: str) -> str:
    """Name under which a part of the matrix `name` is stored: `X.weight`, `X.weight_scale` and so on."""
    return name if part == "weight" else f"{name}_{part}"


def key_offset_name(layer: int) -> str:
    """Name of the offset of a layer's quantized keys: f32 [Hkv, D]."""
    return f"model.layers.{layer}.self_attn.k_proj.kv_offset"


def value_offset_name(layer: int) -> str:
    """Name of the offset of a layer's quantized values: f32 [Hkv, D]."""
    return f"model.layers.{layer}.self_attn.v_proj.kv_offset"


def check_scheme(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Refuse a scheme that a matrix cannot be stored in.

    Raises:
        UsageError: An unknown format, a group size that is none of 16 to 256 or does not divide the columns, fp8 with
            zero points, or int4 with an odd number of columns.
    """
    if scheme.format not in FORMATS:
        raise UsageError(f"format={scheme.format}", f"one of {', '.join(FORMATS)}")
    columns = shape[-1]
    if scheme.group_size and scheme.group_size not in GROUP_SIZES:
        raise UsageError(f"group_size={scheme.group_size}", f"0 (a whole row) or one of {GROUP_SIZES}")
    if scheme.group_size and columns % scheme.group_size:
        fits = [size for size in GROUP_SIZES if columns % size == 0]
        wanted = f"one of {', '.join(map(str, fits))}" if fits else "a whole row (0)"
        raise UsageError(
            f"group_size={scheme.group_size} does not divide the {columns} columns of {name}",
            wanted,
            "choose another --group-size, or keep that matrix at another precision with --overrides",
        )
    if scheme.format == "fp8" and not scheme.symmetric:
        raise UsageError("fp8 with zero points", "symmetric fp8")
    if scheme.format == "int4" and columns % 2:
        raise UsageError(f"{name} has {columns} columns", "an even number for int4", "choose another precision")


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put two numbers of 0 to 15 into a byte, the first in the low four bits; an odd last one gets 0 beside it.

    Args:
        values: uint8 [..., n].

    Returns:
        uint8 [..., ceil(n/2)].
    """
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    low, high = values[..., 0::2], np.left_shift(values[..., 1::2], 4, dtype=np.uint8)
    return np.bitwise_or(low, high, dtype=np.uint8)


def unpack_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Undo `pack_nibbles`: uint8 [..., ceil(count/2)] → uint8 [..., count]."""
    values: NDArray[np.uint8] = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=values[..., 0::2])
    np.right_shift(packed, 4, out=values[..., 1::2])
    return values[..., :count]


def _fp8_table() -> NDArray[np.float32]:
    """Every e4m3 number by its bits. Source: "FP8 Formats for Deep Learning" (arXiv:2209.05433), table 1."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits >= 128, -magnitude, magnitude).astype(np.float32)


_FP8 = _fp8_table()


def decode_fp8(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers that e4m3 bits stand for, float32 of the same shape."""
    return _FP8[bits]


def round_fp8(x: NDArray[Any]) -> NDArray[Any]:
    """Round to the nearest e4m3 number, ties to even; beyond ±448 the result is ±448. Same shape and dtype."""
    clipped = np.clip(x, -MAX_FP8, MAX_FP8)
    _, exponent = np.frexp(clipped)  # |x| = m · 2^exponent, 0.5 <= m < 1
    step = np.ldexp(np.ones_like(clipped), np.maximum(exponent - 1, -6) - 3)
    rounded: NDArray[Any] = np.rint(clipped / step) * step
    return rounded


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """The matrix that a quantized tensor stands for: float32 [N, K], columns in their original order.

    Raises:
        CheckpointError: A permutation that is none.
    """
    rows, columns = tensor.shape
    scheme = tensor.scheme
    groups = scheme.num_groups(columns)
    if scheme.format == "fp8":
        values = decode_fp8(tensor.values.view(np.uint8))
    elif scheme.format == "int8":
        values = tensor.values.astype(np.float32)
    else:
        values = unpack_nibbles(tensor.values, columns).astype(np.float32)
    grouped = values.reshape(rows, groups, -1)
    if tensor.zero_point is not None:
        zero = tensor.zero_point if scheme.format == "int8" else unpack_nibbles(tensor.zero_point, groups)
        grouped -= zero.astype(np.float32)[..., None]
    elif scheme.format == "int4":
        grouped -= np.float32(_ZERO_INT4)
    grouped *= tensor.scale.astype(np.float32)[..., None]
    if tensor.perm is None:
        return values
    if not np.array_equal(np.sort(tensor.perm), np.arange(columns)):
        raise CheckpointError(f"the column order of {tensor.name} is no permutation", f"0 to {columns - 1}, each once")
    ordered = np.empty_like(values)
    ordered[:, tensor.perm] = values
    return ordered


def fake_quantize_kv(x: NDArray[Any], kv_format: str) -> NDArray[Any]:
    """What a quantized cache gives back for head vectors: rounded to eight bits with a scale for each.

    Args:
        x: [..., D], offsets taken out and keys turned.
        kv_format: `fp8` or `int8`.

    Returns:
        Same shape and dtype. A vector of zeros stays one.
    """
    largest = KV_LARGEST[kv_format]
    scale = np.abs(x).max(-1, keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1).astype(np.float32).astype(x.dtype)
    scaled = x / scale
    rounded = round_fp8(scaled) if kv_format == "fp8" else np.rint(scaled)
    product: NDArray[Any] = rounded * scale
    return product
