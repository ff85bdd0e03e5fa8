"""Measure one matrix beside the source's while both pass by in blocks of rows, and guess what is wrong with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen_rt.gate_result import TensorError
from qwen_rt.quantization import Scheme
from qwen_rt.tolerances import gate_limit, gate_scale_limit

__all__ = ["MatrixCheck", "mean_relative_error"]


class MatrixCheck:
    """Sums over the rows of one matrix.

    Args:
        name: The matrix.
        scheme: How it is stored; None if it is not quantized.
        columns: K.
        num_tokens: T, of all texts together.
    """

    def __init__(self, name: str, scheme: Scheme | None, columns: int, num_tokens: int) -> None:
        self._name, self._scheme, self._columns = name, scheme, columns
        self._width = scheme.group_size or columns if scheme is not None else columns
        self._error_squares = torch.zeros(num_tokens, dtype=torch.float64)
        self._output_squares = torch.zeros(num_tokens, dtype=torch.float64)
        self._weight_error = 0.0
        self._products: list[Tensor] = []  # ⟨ŵ, w⟩ of each group: f32[n, G] a block; and so on
        self._source_squares: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, source: Tensor, quantized: Tensor, x: Tensor, output: Tensor) -> None:
        """Take some rows.

        Args:
            source: f32[n, K], as the bundle should have them.
            quantized: f32[n, K], as it has them.
            x: f32[T, K], what the source's rows are multiplied by.
            output: f32[T, n], x times them.
        """
        difference = quantized - source
        self._error_squares += (x @ difference.T).square().sum(-1, dtype=torch.float64)
        self._output_squares += output.square().sum(-1, dtype=torch.float64)
        self._weight_error += float(difference.square().sum(dtype=torch.float64))
        shape = (len(source), -1, self._width)
        for sums, values in (
            (self._products, source * quantized),
            (self._source_squares, source.square()),
            (self._squares, quantized.square()),
        ):
            sums.append(values.view(shape).sum(-1))

    def result(self) -> TensorError:
        """The errors, and what seems to be wrong if they are out of limits."""
        products, before, after = (torch.cat(p).double() for p in (self._products, self._source_squares, self._squares))
        total = float(before.sum())
        used = before > 0
        gains = products[used] / before[used]
        scale_error = _ratio(float((before[used] * (gains - 1).square()).sum()), total)
        found = TensorError(
            name=self._name,
            scheme=str(self._scheme) if self._scheme is not None else "kept",
            output_error=mean_relative_error(self._error_squares, self._output_squares),
            limit=gate_limit(self._scheme, self._columns),
            weight_error=_ratio(self._weight_error, total),
            scale_error=scale_error,
            scale_limit=gate_scale_limit(self._scheme, self._columns),
        )
        if found.passed:
            return found
        return TensorError(**{**vars(found), "cause": _cause(products, before, after)})


def mean_relative_error(error_squares: Tensor, reference_squares: Tensor) -> float:
    """Mean over the tokens of `sqrt(error / reference)`, f64[T] each: every token counts alike, a huge one not more.

    A token of which nothing was to come, and nothing came, has no error.
    """
    nothing = (reference_squares == 0) & (error_squares == 0)
    ratios = torch.where(nothing, torch.zeros_like(error_squares), (error_squares / reference_squares).sqrt())
    return float(ratios.mean())


def _ratio(squares: float, reference_squares: float) -> float:
    if not reference_squares:
        return 0.0 if squares == 0 else math.inf if squares > 0 else math.nan
    return math.sqrt(squares / reference_squares) if squares >= 0 else math.nan


def _cause(products: Tensor, before: Tensor, after: Tensor) -> str:
    """Say what seems to be wrong with a matrix, from the sums of its groups: f64[N, G] each.

    Where groups point the right way, only their scales can be wrong; if the lengths are those of other groups, the
    scales are there but in another order. Where they do not, the numbers are others, or stand elsewhere.
    """
    if not torch.isfinite(after).all():
        return "holds NaN or infinity"
    if not after.any():
        return "all zeros"
    if not after.sum(1).all() and before.sum(1).all():
        return f"{int((after.sum(1) == 0).sum())} of {len(after)} rows are zeros"
    lengths, wanted = after.sqrt(), before.sqrt()
    cosine = float(products.sum() / (lengths * wanted).sum())
    same_lengths = _apart(lengths.flatten().sort()[0], wanted.flatten().sort()[0]) < 0.5 * _apart(lengths, wanted)
    if cosine < _SAME_DIRECTION:
        # Of a permuted matrix the total length is that of the source, whatever the order of its groups.
        same_total = abs(float((after.sum() / before.sum()).sqrt()) - 1) < 0.2
        return "values in another order, or another matrix" if same_total else "other values"
    gains = products[before > 0] / before[before > 0]
    median = float(gains.median())
    if float((gains - median).abs().median()) < 0.02 and abs(median - 1) > 0.02:
        return f"all scaled by {median:.3g}"
    return "scales in another order" if same_lengths else "rounded too coarsely, or scales wrong"


_SAME_DIRECTION = 0.9


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
