"""Rounding to bfloat16 as the kernels do it, in float64 numbers."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["round_bf16", "rounding"]

F64 = NDArray[np.float64]


def round_bf16(x: ArrayLike) -> F64:
    """Round to the nearest bfloat16, ties to even; the result is float64 still."""
    return np.asarray(x, np.float64).astype(ml_dtypes.bfloat16).astype(np.float64)


def rounding(bf16: bool) -> Callable[[F64], F64]:
    """Return `round_bf16`, or for exact numbers a function that leaves them."""
    return round_bf16 if bf16 else np.asarray
