"""Quantized matrices on the device, random or of a given size: what ops are called with, and what they stand for.

The layouts are those of `qwen_rt.quantization`, in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_rt.ops import WEIGHT_FORMATS
from qwen_rt.quantization import DEFAULT_SCHEMES, Scheme

__all__ = ["Matrix", "bf16_matrix", "fp8_rows", "int8_rows", "random_matrix", "scheme_of"]

_BIAS_INT4 = 8
_MAX_FP8 = 448.0
_BLOCK_ROWS = 8192  # made or worked on at a time


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of any format, as an op takes it.

    Attributes:
        format: `bf16`, `fp8`, `int8` or `int4`.
        shape: [N, K].
        weight: bf16, float8_e4m3fn or int8 [N, K], or uint8 [N, K/2].
        scale: f32, or f16 for int4, [N, G]; None for bf16.
        zero_point: int8 [N, G] or uint8 [N, ceil(G/2)]; None if symmetric.
        perm: int32 [K]; None if columns are in order.
    """

    format: str
    shape: tuple[int, int]
    weight: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    perm: Tensor | None = None

    def tensors(self, prefix: str = "") -> dict[str, Tensor | None]:
        """The inputs of an op, by name; `perm` has no prefix."""
        parts = {"weight": self.weight, "scale": self.scale, "zero_point": self.zero_point}
        named: dict[str, Tensor | None] = {prefix + name: tensor for name, tensor in parts.items()}
        return named | {"perm": self.perm}

    @property
    def weight_format(self) -> float:
        """The attribute of the op."""
        return float(WEIGHT_FORMATS[self.format])

    @property
    def nbytes(self) -> int:
        """Stored bytes, all parts."""
        parts = (self.weight, self.scale, self.zero_point, self.perm)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def clone(self) -> Matrix:
        """The same numbers elsewhere in memory; a permutation is shared."""
        weight, scale, zero = (
            None if part is None else part.clone() for part in (self.weight, self.scale, self.zero_point)
        )
        assert weight is not None
        return Matrix(self.format, self.shape, weight, scale, zero, self.perm)

    def split(self, units: Sequence[int]) -> list[Matrix]:
        """Cut into matrices of so many rows, behind each other in the same memory."""
        stops = list(itertools.accumulate(units))
        found = []
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            parts = (self.weight, self.scale, self.zero_point)
            weight, scale, zero = (None if part is None else part.narrow(0, start, stop - start) for part in parts)
            assert weight is not None
            found.append(Matrix(self.format, (stop - start, self.shape[1]), weight, scale, zero, self.perm))
        return found

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows in float64, columns in their original order: [stop - start, K]."""
        part = self.weight[start:stop]
        if self.scale is None:
            return part.double()
        count, columns = len(part), self.shape[1]
        values = _nibbles(part, columns).double() if self.format == "int4" else part.double()
        groups = self.scale.shape[1]
        grouped = values.view(count, groups, -1)
        if self.zero_point is not None:
            zero = self.zero_point[start:stop]
            grouped = grouped - (_nibbles(zero, groups) if self.format == "int4" else zero).double()[..., None]
        elif self.format == "int4":
            grouped = grouped - _BIAS_INT4
        values = (grouped * self.scale[start:stop].double()[..., None]).view(count, columns)
        if self.perm is None:
            return values
        ordered = torch.empty_like(values)
        ordered[:, self.perm.long()] = values
        return ordered


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """Undo the packing: uint8 [..., ceil(count/2)] → uint8 [..., count]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :count]


def bf16_matrix(weight: Tensor) -> Matrix:
    """A matrix that is not quantized."""
    return Matrix("bf16", (weight.shape[0], weight.shape[1]), weight)


def scheme_of(precision: str) -> Scheme | None:
    """The default scheme of a precision; None for bf16."""
    return None if precision == "bf16" else DEFAULT_SCHEMES[precision]


def random_matrix(
    scheme: Scheme | None, rows: int, columns: int, std: float = 0.02, perm: Tensor | None = None
) -> Matrix:
    """A matrix of about normal numbers on the device.

    Args:
        scheme: None for bf16.
        rows: N.
        columns: K.
        std: Deviation of what the numbers stand for.
        perm: int32 [K], if the scheme is permuted; None draws one.
    """
    if scheme is None:
        return bf16_matrix(torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(0.0, std))
    groups = scheme.num_groups(columns)
    starts = range(0, rows, _BLOCK_ROWS)
    weight = torch.cat([_numbers(scheme.format, min(_BLOCK_ROWS, rows - start), columns) for start in starts])
    size = std / {"fp8": 120.0, "int8": 36.0, "int4": 4.6}[scheme.format]  # over the deviation of the numbers
    scale = torch.empty(rows, groups, device="cuda").normal_(size, 0.15 * size).clamp_(0.7 * size, 1.3 * size)
    zero = None
    if not scheme.symmetric and scheme.format == "int4":
        zero = torch.randint(0, 256, (rows, -(-groups // 2)), dtype=torch.uint8, device="cuda")
    elif not scheme.symmetric:
        zero = torch.randint(-40, 40, (rows, groups), dtype=torch.int8, device="cuda")
    if scheme.permuted and perm is None:
        perm = torch.randperm(columns, device="cuda").int()
    if scheme.format == "int4":
        scale = scale.half()
    return Matrix(scheme.format, (rows, columns), weight, scale, zero, perm)


def _numbers(format_name: str, rows: int, columns: int) -> Tensor:
    """Random stored numbers of one format."""
    if format_name == "int4":
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    numbers = torch.empty(rows, columns, device="cuda")
    if format_name == "int8":
        return numbers.normal_(0.0, 36.0).clamp_(-128, 127).to(torch.int8)
    return numbers.normal_(0.0, 120.0).clamp_(-_MAX_FP8, _MAX_FP8).to(torch.float8_e4m3fn)


def fp8_rows(x: Tensor) -> Tensor:
    """Round activations as a prefill on fp8 matrices does, a scale for each row: f64 → f64, same shape."""
    scale = x.abs().amax(-1, keepdim=True) / _MAX_FP8
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).float().to(torch.float8_e4m3fn).double() * scale


def int8_rows(x: Tensor) -> Tensor:
    """The same in int8."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round() * scale
