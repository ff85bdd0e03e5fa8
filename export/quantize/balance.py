"""Factors for the inputs of one unit of a layer: which columns of its matrices to round more finely, found by trying.

    x Wᵀ = (x / s) (W · s)ᵀ,   s[k] a power of two

The product stays; its rounding does not. Candidates, all centred on the median so that most channels stay as they are:

| scheme | s[k], rounded to a power of two       | grid of α      | error that is measured                          |
|--------|---------------------------------------|----------------|-------------------------------------------------|
| int4   | mean|x[k]|^α                          | `INT4_ALPHAS`  | of the product with the rounded weights         |
| int8   | max|x[k]|^α / max|w[k]|^(1-α)         | `INT8_ALPHAS`  | the same, inputs rounded to int8 token by token |

and s = 1 for both (α = 0 in reports). int4 also tries to choose its scales by the inputs' mean squares (`importance` of
`quantize_rows`). The error is ‖x' W'ᵀ - x Wᵀ‖ / ‖x Wᵀ‖, over a sample of tokens and rows, root mean square over the
unit's matrices; a candidate has to beat what came before it by `MARGIN`, so that a tie leaves the weights alone. fp8
has nothing to gain: a power of two moves the exponent of its numbers and leaves their rounding.

Before anything is measured, tokens louder than the median one are scaled down to it: a first token may be a thousand
times as large as all others in Qwen2, and would decide alone.

Source: int4 after AWQ (arXiv:2306.00978, section 3.2); int8 after SmoothQuant (arXiv:2211.10438, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.quantize.texts import evenly
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.row_reader import RowSource

__all__ = ["INT4_ALPHAS", "INT8_ALPHAS", "MARGIN", "Balance", "Limits", "UnitInputs", "choose_balance", "sample_rows"]

F32 = NDArray[np.float32]

INT4_ALPHAS = tuple(step / 10 for step in range(1, 11))
INT8_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

MARGIN = 0.005
"""Share of the error that a candidate has to save."""

NUM_SAMPLE_TOKENS = 256
NUM_SAMPLE_WEIGHTS = 1 << 22
"""Of a matrix: 1170 rows of 7B's q_proj, all of a matrix as small as nano's."""

_ROWS_TOGETHER = 8
_MAX_EXPONENT = {"int4": 4, "int8": 8}
"""Of int4 a column that is smaller than its group by more than this is rounded to nothing; int8 has to take away what
the largest of Qwen2's input channels are above the others, about a hundredfold."""

_DAMPING = 0.01  # mean squares are lifted by this share of their mean: a channel that was silent here may speak later
_QUANTILE = 0.999


@dataclass(frozen=True, eq=False)
class Limits:
    """Exponents that what makes the input can take in: int32[K] each."""

    low: NDArray[np.int32]
    high: NDArray[np.int32]

    @classmethod
    def of_vectors(cls, vectors: list[F32], num_channels: int) -> Limits:
        """Limits within which elements divided by 2^e stay exact in float16, the narrowest exponent range there is.

        Args:
            vectors: float32 [K] each; may be none.
            num_channels: K.
        """
        low, high = np.full(num_channels, -64, np.int32), np.full(num_channels, 64, np.int32)
        for vector in vectors:
            _, exponent = np.frexp(vector)  # |v| in [2^(e - 1), 2^e)
            used = vector != 0
            low = np.where(used, np.maximum(low, np.minimum(exponent - 15, 0)), low)
            high = np.where(used, np.minimum(high, np.maximum(exponent + 13, 0)), high)
        return cls(low, high)


@dataclass(frozen=True, eq=False)
class UnitInputs:
    """What is known of a unit's inputs.

    Attributes:
        sample: f32[m, K]: some tokens, loud ones scaled down.
        mean: f32[K], mean|x| over all tokens, loud ones scaled down.
        squares: f32[K], mean x² likewise.
        largest: f32[K], max|x|, loud or not.
        ranges: `max`, `mean`, `rms` and `p99.9` of |x| as it is; the last over the sample's tokens.
    """

    sample: Tensor
    mean: F32
    squares: F32
    largest: F32
    ranges: Mapping[str, float]

    @classmethod
    def of(cls, x: Tensor) -> UnitInputs:
        """Collect from the inputs of all tokens, f32[n, K]."""
        sizes = torch.linalg.vector_norm(x, dim=-1)  # [n]
        median = sizes.median()  # the lower of the middle two: among a few tokens a loud one does not raise it
        shrink = (median / sizes.clamp_min(1e-30)).clamp_max(1) if median > 0 else torch.ones_like(sizes)
        chosen = torch.from_numpy(evenly(len(x), NUM_SAMPLE_TOKENS))
        mean, squares, largest = (x.new_zeros(x.shape[1]) for _ in range(3))
        total = total_squares = 0.0
        for part, factor in zip(torch.split(x, 256), torch.split(shrink, 256), strict=True):
            magnitude = part.abs()
            torch.maximum(largest, magnitude.amax(0), out=largest)
            total += float(magnitude.sum(dtype=torch.float64))
            total_squares += float(part.square().sum(dtype=torch.float64))
            mean += factor @ magnitude / len(x)
            squares += factor.square() @ magnitude.square() / len(x)
        magnitudes = x[chosen].abs().numpy().reshape(-1)
        place = int(_QUANTILE * (magnitudes.size - 1))
        ranges = {
            "max": float(largest.max()),
            "mean": total / x.numel(),
            "rms": (total_squares / x.numel()) ** 0.5,
            "p99.9": float(np.partition(magnitudes, place)[place]),
        }
        sample = x[chosen] * shrink[chosen, None]
        return cls(sample, mean.numpy(), squares.numpy(), largest.numpy(), ranges)

    def importance(self, exponents: NDArray[np.int32] | None = None) -> F32:
        """Mean squares of `x / 2^exponents`, damped: float32 [K]."""
        squares = self.squares if exponents is None else np.ldexp(self.squares, -2 * exponents)
        lifted: F32 = (squares + _DAMPING * squares.mean()).astype(np.float32)
        return lifted


@dataclass(frozen=True, eq=False)
class Balance:
    """What was chosen for a unit.

    Attributes:
        alpha: Of the grid; 0 leaves the matrices as they are.
        exponents: int32[K]: columns times 2^e; None if all are 0.
        importance: float32[K] to choose scales by; None for the weights alone.
        error_before: With neither.
        error_after: With both.
    """

    alpha: float
    exponents: NDArray[np.int32] | None
    importance: F32 | None
    error_before: float
    error_after: float


def choose_balance(
    inputs: UnitInputs,
    weights: Mapping[str, F32],
    scheme: Scheme,
    limits: Limits | None,
    shared: int = 1,
    width: int = 1,
) -> Balance:
    """Choose factors for the columns of a unit's matrices, and how to choose scales.

    Args:
        inputs: What the matrices are multiplied by.
        weights: Name → some rows of each matrix, float32 [n, K].
        scheme: Of all of them, int4 or int8.
        limits: What can be folded into whatever makes the input; None if nothing can.
        shared: Query heads that share a factor, the heads of a kv group; 1 outside `o`.
        width: Channels of a head; 1 outside `o`.

    Returns:
        The choice.
    """
    trial = _Trial(inputs.sample, weights, scheme)
    before = trial.error(None, None)
    best = Balance(0.0, None, None, before, before)
    for alpha, exponents in _candidates(inputs, weights, scheme, limits, shared, width):
        importance = inputs.importance(exponents) if scheme.format == "int4" and scheme.symmetric else None
        error = trial.error(exponents, importance)
        if error < best.error_after * (1 - MARGIN):
            best = Balance(alpha, exponents, importance, before, error)
    return best


def sample_rows(source: RowSource, name: str) -> F32:
    """Some rows of a matrix, drawn over all of it in runs of a few: float32 [n, K]."""
    rows, columns = source.shape(name)
    num_runs, wanted = -(-rows // _ROWS_TOGETHER), max(1, NUM_SAMPLE_WEIGHTS // (columns * _ROWS_TOGETHER))
    if num_runs <= wanted:
        return source.rows(name, 0, rows)
    runs = np.sort(np.random.default_rng(0).choice(num_runs, wanted, replace=False)) * _ROWS_TOGETHER
    return np.concatenate([source.rows(name, start, min(start + _ROWS_TOGETHER, rows)) for start in runs.tolist()])


class _Trial:
    """Measures candidates on one sample."""

    def __init__(self, x: Tensor, weights: Mapping[str, F32], scheme: Scheme) -> None:
        self._x, self._weights, self._scheme = x, weights, scheme
        self._products = {name: x @ torch.from_numpy(rows).T for name, rows in weights.items()}

    def error(self, exponents: NDArray[np.int32] | None, importance: F32 | None) -> float:
        x, total = self._x, 0.0
        if exponents is not None:
            x = x * torch.from_numpy(np.ldexp(np.float32(1), -exponents))
        if self._scheme.format == "int8":
            x = _round_int8(x)
        for name, rows in self._weights.items():
            scaled = rows if exponents is None else np.ldexp(rows, exponents)
            rounded = dequantize(quantize_rows(name, scaled, self._scheme, 0, importance))
            product = self._products[name]
            difference = float((x @ torch.from_numpy(rounded).T - product).square().sum())
            total += difference / max(float(product.square().sum()), 1e-30)
        return float((total / len(self._weights)) ** 0.5)


def _round_int8(x: Tensor) -> Tensor:
    """Inputs as a W8A8 product takes them, with a scale for each token: f32[m, K]."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round_().mul_(scale)


def _candidates(
    inputs: UnitInputs, weights: Mapping[str, F32], scheme: Scheme, limits: Limits | None, shared: int, width: int
) -> Iterator[tuple[float, NDArray[np.int32] | None]]:
    """(α, exponents) to try, the plainest first."""
    if scheme.format == "int4":
        yield 0.0, None
    if limits is None:
        return

    def pooled(values: F32, largest: bool) -> F32:
        heads = values.reshape(-1, shared, width)  # [Hkv, H/Hkv, D]
        over = heads.max(1, keepdims=True) if largest else heads.mean(1, keepdims=True)
        return np.broadcast_to(over, heads.shape).reshape(-1)

    if scheme.format == "int4":
        mean = pooled(inputs.mean, False)
        used = mean > 0
        for alpha in INT4_ALPHAS:
            yield alpha, _exponents(alpha * _log2(mean, used), used, limits, "int4")
    elif scheme.format == "int8":
        columns = np.max([np.abs(rows).max(0) for rows in weights.values()], axis=0)
        x, w = pooled(inputs.largest, True), pooled(columns, True)
        used = (x > 0) & (w > 0)
        for alpha in INT8_ALPHAS:
            log = alpha * _log2(x, used) - (1 - alpha) * _log2(w, used)
            yield alpha, _exponents(log, used, limits, "int8")


def _log2(values: F32, used: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.log2(np.where(used, values, 1), dtype=np.float64)


def _exponents(
    log: NDArray[np.float64], used: NDArray[np.bool_], limits: Limits, scheme_format: str
) -> NDArray[np.int32] | None:
    """Round base-2 logarithms to exponents whose median is 0; None if all are."""
    if not used.any():
        return None
    largest = _MAX_EXPONENT[scheme_format]
    centred = np.rint(log - np.median(log[used])).clip(-largest, largest).clip(limits.low, limits.high)
    found = np.where(used, centred, 0).astype(np.int32)
    return found if found.any() else None
