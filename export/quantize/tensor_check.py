"""Measure one matrix beside the source's while both pass by in blocks of rows, and guess what is wrong with it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.export.quantize.folds import LayerFolds
from qwen_rt.gate_result import TensorError
from qwen_rt.quantization import Scheme
from qwen_rt.tolerances import gate_limit, gate_scale_limit

__all__ = ["MatrixCheck", "mean_relative_error"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_SAME_DIRECTION = 0.9  # mean cosine of the groups; int4 leaves 0.99
_PIECE_ELEMENTS = 1 << 18  # temporaries of a piece stay in a core's cache


class MatrixCheck:
    """Sums over the rows of one matrix.

    Args:
        name: The matrix.
        scheme: How it is stored; None if it is not quantized.
        shape: [N, K].
        num_tokens: T.
    """

    def __init__(self, name: str, scheme: Scheme | None, shape: tuple[int, ...], num_tokens: int) -> None:
        self._name, self._scheme = name, scheme
        num_rows, self._columns = shape
        self._num_groups = 1 if scheme is None else scheme.num_groups(self._columns)
        self._error_squares = torch.zeros(num_tokens, dtype=torch.float64)
        self._output_squares = torch.zeros(num_tokens, dtype=torch.float64)
        # Of every group ⟨ŵ, w⟩, ⟨w, w⟩, ⟨ŵ, ŵ⟩ and max|w|, of every row ‖ŵ - w‖². Made at once: small pieces that are
        # made between blocks and stay would break up the memory.
        self._sums = np.zeros((4, num_rows, self._num_groups), np.float32)
        self._differences = np.zeros(num_rows, np.float32)

    @np.errstate(invalid="ignore", over="ignore")  # what is not finite is found, and said
    def add_rows(
        self, start: int, source: F32, quantized: F32, columns: F32 | None, folds: LayerFolds | None
    ) -> Tensor | None:
        """Take some rows. Threads may do so side by side.

        Args:
            start: Number of the first.
            source: f32[n, K], as the checkpoint has them.
            quantized: f32[n, K], as the bundle has them.
            columns: f32[K], what the bundle's columns are multiplied by; None for 1.
            folds: Factors of the layer, which find those of the rows; None where there are none.

        Returns:
            f32[n], what the bundle's rows are multiplied by; None for 1.
        """
        step = max(1, _PIECE_ELEMENTS // self._columns)
        factors = np.ones(len(source), np.float32)
        for low in range(0, len(source), step):
            before, after = source[low : low + step], quantized[low : low + step]
            if columns is not None:
                before = before * columns
            rows = None if folds is None else folds.rows(self._name, start + low, before, after)
            if rows is not None:
                before = before * rows[:, None]
                factors[low : low + step] = rows
            part = slice(start + low, start + low + len(before))
            difference = after - before
            self._differences[part] = np.einsum("nk,nk->n", difference, difference)
            shape = (len(before), self._num_groups, -1)
            b, a = before.reshape(shape), after.reshape(shape)
            for sums, pair in zip(self._sums, ((b, a), (b, b), (a, a)), strict=False):
                np.einsum("ngk,ngk->ng", *pair, out=sums[part])
            np.maximum(b.max(-1), -b.min(-1), out=self._sums[3, part])
        return None if (factors == 1).all() else torch.from_numpy(factors)

    def add_outputs(self, expected: Tensor, found: Tensor) -> None:
        """Take what the source's input becomes with those rows as they should be and as they are: f32[T, n] each."""
        self._error_squares += (found - expected).square().sum(-1, dtype=torch.float64)
        self._output_squares += expected.square().sum(-1, dtype=torch.float64)

    def result(self) -> TensorError:
        """The errors, and what seems to be wrong if they are out of limits."""
        products, before, after, largest = self._sums.astype(np.float64)
        total = float(before.sum())
        gains = np.divide(products, before, out=np.ones_like(before), where=before > 0)
        scale_error = _ratio(float((before * (gains - 1) ** 2).sum()), total)
        found = TensorError(
            name=self._name,
            scheme=str(self._scheme) if self._scheme is not None else "kept",
            output_error=mean_relative_error(self._error_squares, self._output_squares),
            limit=gate_limit(self._scheme, self._columns),
            weight_error=_ratio(float(self._differences.sum(dtype=np.float64)), total),
            scale_error=scale_error,
            scale_limit=gate_scale_limit(self._scheme, self._columns),
        )
        if found.passed:
            return found
        return TensorError(**{**vars(found), "cause": _cause(products, before, after, largest)})


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


def _cause(products: F64, before: F64, after: F64, largest: F64) -> str:
    """Say what seems to be wrong with a matrix, from the sums of its groups: f64[N, G] each.

    Where groups point the right way only their scales can be wrong. A scale is in proportion to the largest number of
    its group, so what each group's came out as is the gain times that; if these are the right ones in another order,
    so are the scales. Where groups point elsewhere, their numbers are others, or stand in another order.
    """
    if not np.isfinite(after).all():
        return "holds NaN or infinity"
    if not after.any():
        return "all zeros"
    if not before.any():
        return "other values: the source has zeros"
    empty = (after.sum(1) == 0) & (before.sum(1) > 0)
    if empty.any():
        return f"{int(empty.sum())} of {len(after)} rows are zeros"
    if products.sum() < _SAME_DIRECTION * np.sqrt(before * after).sum():
        # However the numbers are ordered, their total stays.
        same_total = abs(math.sqrt(after.sum() / before.sum()) - 1) < 0.2
        return "values in another order, or another matrix" if same_total else "other values"
    used = before > 0
    gains = products[used] / before[used]
    median = float(np.median(gains))
    if np.median(np.abs(gains - median)) < 0.02 < abs(median - 1):
        return f"all scaled by {median:.3g}"
    wanted = largest[used]
    implied = gains * wanted
    in_order = _apart(np.sort(implied), np.sort(wanted)) < 0.5 * _apart(implied, wanted)
    return "scales in another order" if in_order else "rounded too coarsely, or scales wrong"


def _apart(a: F64, b: F64) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
