"""One comparison for all numeric tests: finiteness, then direction, then every element."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def assert_close(
    actual: ArrayLike, expected: ArrayLike, *, relative: float, cosine: float = 0.999999, what: str = "array"
) -> None:
    """Demand that `actual` is `expected` up to rounding.

        finite:       both arrays
        cosine:       <actual, expected> / (|actual| · |expected|) >= cosine
        elementwise:  |actual - expected| <= relative · max |expected|

    The bound is relative to the largest magnitude because single elements may be near zero. Both measures count: a few
    wild elements hide in a cosine, and a small array in a wrong direction can hide below a bound. The cosine is taken
    in float64: in float32 the rounding of the sums over a vocabulary is as large as what is looked for.

    Args:
        actual: What was computed.
        expected: The reference, of the same shape.
        relative: Bound of the largest error; 0 demands equality.
        cosine: Smallest cosine of the two as vectors.
        what: Name for the message.

    Raises:
        AssertionError: With worst index, both values there, maxima, and how many elements are out.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    assert e.size, f"{what}: nothing to compare"
    for name, array in (("actual", a), ("expected", e)):
        bad = ~np.isfinite(array)
        if bad.any():
            raise AssertionError(
                f"{what}: {name} has {bad.sum()} of {bad.size} elements not finite, first at {_first(bad)}"
            )
    x, y = a.astype(np.float64), e.astype(np.float64)
    error = np.abs(x - y)
    scale = float(np.abs(y).max())
    out = error > relative * scale
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    found = float((x * y).sum() / norms) if norms else float(not error.any())
    if not out.any() and found >= cosine:
        return
    worst = np.unravel_index(int(error.argmax()), error.shape)
    raise AssertionError(
        f"{what}: cosine {found:.9f} (at least {cosine}), {out.sum()} of {out.size} elements out of tolerance; "
        f"worst at {_index(worst)}: {x[worst]:.9g}, expected {y[worst]:.9g}; "
        f"largest error {error.max():.3g} = {error.max() / scale if scale else np.inf:.3g} of max|expected| "
        f"{scale:.6g} (at most {relative:g}); max|actual| {np.abs(x).max():.6g}"
    )


def _index(index: tuple[np.intp, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return _index(np.unravel_index(int(mask.argmax()), mask.shape))
