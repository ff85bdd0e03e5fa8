"""Rounding of rows: the error that theory gives, exact ties, what is refused, and columns that count more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.quantize import rounding
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.quantization import GROUP_SIZES, Scheme, dequantize, round_fp8, unpack_nibbles

ROW_SCHEMES = [
    Scheme("fp8"),
    Scheme("int8"),
    Scheme("int4"),
    Scheme("int4", symmetric=False),
    *(Scheme(name, size) for name in ("fp8", "int8", "int4") for size in GROUP_SIZES),
    *(Scheme("int4", size, symmetric=False) for size in GROUP_SIZES),
]


def _normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.05)


def _relative(rows: NDArray[np.float32], scheme: Scheme) -> float:
    return float(np.linalg.norm(dequantize(quantize_rows("w", rows, scheme)) - rows) / np.linalg.norm(rows))


def test_int8_leaves_the_error_of_uniform_rounding() -> None:
    """Steps of `scale` leave scale / √12."""
    rows = _normal(64, 2048)
    tensor = quantize_rows("w", rows, Scheme("int8"))
    errors = (dequantize(tensor) - rows) / tensor.scale
    assert np.sqrt((errors**2).mean()) == pytest.approx(12**-0.5, rel=0.01)
    assert np.abs(errors).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(tensor.scale[:, 0], np.abs(rows).max(1) / 127, rtol=1e-6)


def test_fp8_leaves_the_error_of_three_bits_of_mantissa() -> None:
    """Within [1, 2) steps of 1/8 leave 1/8/√12 of numbers whose mean square is 3/2 / ln 2, if their exponents are
    evenly spread: 0.0245. Those of a normal distribution nearly are."""
    assert _relative(_normal(64, 2048), Scheme("fp8")) == pytest.approx(
        (1 / 8) / 12**0.5 / (1.5 / np.log(2)) ** 0.5, rel=0.08
    )


def test_int4_leaves_less_than_the_largest_weight_alone_would() -> None:
    """Uniform steps of max / 7, with max of 128 normal numbers about 2.6, leave 2.6 / 7 / √12 = 0.107 and a little
    more; a scale that is searched for leaves less. 15 steps over the range of a group leave (2 · 2.6 / 15) / √12."""
    rows = _normal(64, 2048)
    grouped = rows.reshape(64, -1, 128)
    scale = np.abs(grouped).max(-1, keepdims=True) / 7
    plain = np.clip(np.rint(grouped / scale), -8, 7) * scale - grouped
    searched = _relative(rows, Scheme("int4", 128))
    assert searched == pytest.approx(0.102, rel=0.02)
    assert searched < 0.9 * np.linalg.norm(plain) / np.linalg.norm(rows)
    spread = grouped.max(-1) - grouped.min(-1)
    expected = np.sqrt((spread**2).mean()) / 15 / 12**0.5 / rows.std()
    assert _relative(rows, Scheme("int4", 128, symmetric=False)) == pytest.approx(expected, rel=0.02)


def test_halves_go_to_the_even_number_and_representable_weights_stay() -> None:
    """Scales of exactly 1: what is on the grid comes back, what is between goes to even."""
    ints = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]], np.float32)
    assert quantize_rows("w", ints, Scheme("int8")).values.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]
    nibbles = np.array([[15, 0, 0.5, 1.5, 2.5, 7.5, 14.5, 8]], np.float32)
    stored = quantize_rows("w", nibbles, Scheme("int4", symmetric=False))
    assert unpack_nibbles(stored.values, 8).tolist() == [[15, 0, 0, 2, 2, 8, 14, 8]]
    floats = np.array([[448, 17, 19, -17, 1.0625, 1.1875, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 240]], np.float32)
    stored = quantize_rows("w", floats, Scheme("fp8"))
    assert stored.scale.tolist() == [[1]]
    expected = [[448, 16, 20, -16, 1, 1.25, 2.0**-9, 0, 2.0**-8, 240]]
    assert dequantize(stored).tolist() == expected
    assert round_fp8(floats).tolist() == expected


@pytest.mark.parametrize("scheme", [Scheme("fp8", 16), Scheme("int8"), Scheme("int8", 16)], ids=str)
def test_what_has_been_rounded_stays_as_it_is(scheme: Scheme) -> None:
    once = dequantize(quantize_rows("w", _normal(5, 64), scheme))
    np.testing.assert_allclose(dequantize(quantize_rows("w", once, scheme)), once, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", ROW_SCHEMES, ids=str)
def test_groups_are_rounded_each_as_alone(scheme: Scheme) -> None:
    """Shapes, dtypes, and that neither other groups nor other rows have a say."""
    rows = _normal(7, 512)
    rows[3] *= 100
    tensor = quantize_rows("w", rows, scheme)
    assert tensor.shape == rows.shape
    parts = tensor.parts()
    assert {name: array.shape for name, array in parts.items()} == {
        name: shape for name, (_, shape) in scheme.parts(rows.shape).items()
    }
    size = scheme.group_size or 512
    alone = Scheme(scheme.format, 0, scheme.symmetric)
    whole = dequantize(tensor)
    for start in range(0, 512, size):
        group = quantize_rows("w", np.ascontiguousarray(rows[4:5, start : start + size]), alone)
        assert np.array_equal(dequantize(group), whole[4:5, start : start + size])


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8"), Scheme("fp8")], ids=str)
def test_blocks_of_rows_and_powers_of_two_change_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _normal(13, 96)
    whole = quantize_rows("w", rows, scheme)
    scaled = quantize_rows("w", rows * np.float32(0.25), scheme)
    assert np.array_equal(scaled.values, whole.values)
    assert np.array_equal(scaled.scale, whole.scale / 4)
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 100)
    again = quantize_rows("w", rows, scheme)
    assert np.array_equal(again.values, whole.values)
    assert np.array_equal(again.scale, whole.scale)


@pytest.mark.parametrize("scheme", ROW_SCHEMES[:4], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (1, 4864), (3, 18)])
def test_odd_shapes(scheme: Scheme, shape: tuple[int, int]) -> None:
    rows = _normal(*shape, seed=3)
    found = dequantize(quantize_rows("w", rows, scheme))
    assert np.abs(found - rows).max() <= np.abs(rows).max() / 7


def test_odd_numbers_of_columns_and_groups() -> None:
    rows = _normal(3, 19)
    assert np.abs(dequantize(quantize_rows("w", rows, Scheme("int8"))) - rows).max() < 0.01 * np.abs(rows).max()
    tensor = quantize_rows("w", _normal(3, 48), Scheme("int4", 16, symmetric=False))  # 3 zero points in 2 bytes
    assert tensor.zero_point is not None
    assert tensor.zero_point.shape == (3, 2)
    assert np.isfinite(dequantize(tensor)).all()


@pytest.mark.parametrize("scheme", ROW_SCHEMES, ids=str)
def test_zeros_stay_zeros_and_tiny_weights_do_no_harm(scheme: Scheme) -> None:
    rows = _normal(3, 256)
    rows[1] = 0
    found = dequantize(quantize_rows("w", rows, scheme))
    assert not found[1].any()
    rows[1] = 1e-12  # int4: too small for a float16 scale
    found = dequantize(quantize_rows("w", rows, scheme))
    assert np.isfinite(found).all()
    assert np.abs(found[1]).max() <= 2e-12


@pytest.mark.parametrize("scheme", ROW_SCHEMES[:4], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_its_place(scheme: Scheme, bad: float) -> None:
    rows = _normal(5, 32)
    rows[2, 7] = bad
    rows[3, 1] = -bad
    with pytest.raises(CheckpointError, match=rf"tensor w holds {bad} in row 102, column 7; expected finite weights"):
        quantize_rows("w", rows, scheme, first_row=100)


def test_large_but_finite_sums_are_no_reason_to_refuse() -> None:
    rows = np.full((2, 32), 3e37, np.float32)  # the sum overflows, no element does
    assert np.allclose(dequantize(quantize_rows("w", rows, Scheme("int8"))), rows)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_beyond_the_scales_of_int4_are_refused(symmetric: bool) -> None:
    rows = _normal(5, 32)
    rows[2, 7] = 2e6
    with pytest.raises(UsageError, match=r"row 12 of w holds 2e\+06; expected at most .*; keep that matrix at int8"):
        quantize_rows("w", rows, Scheme("int4", 16, symmetric), first_row=10)
    quantize_rows("w", rows, Scheme("int8"))


def _weighted(rows: Any, importance: Any, tensor: Any) -> float:
    return float(((dequantize(tensor) - rows) ** 2 * importance).sum())


def test_columns_that_count_more_are_rounded_better() -> None:
    """Where the largest weights do not count, they are clipped for those that do."""
    rows, scheme = _normal(32, 256), Scheme("int4", 64)
    importance = np.full(256, 1.0, np.float32)
    importance[::2] = 1e-3
    rows[:, ::2] *= 1.6
    plain, chosen = quantize_rows("w", rows, scheme), quantize_rows("w", rows, scheme, importance=importance)
    assert _weighted(rows, importance, chosen) < 0.85 * _weighted(rows, importance, plain)
    assert _weighted(rows, 1, plain) < _weighted(rows, 1, chosen)
    assert chosen.scale.mean() < plain.scale.mean()


@pytest.mark.parametrize("scheme", [Scheme("int4", 64), Scheme("int4")], ids=str)
def test_equal_importance_is_none(scheme: Scheme) -> None:
    rows = _normal(32, 256)
    plain = quantize_rows("w", rows, scheme)
    for value in (1.0, 0.25):
        same = quantize_rows("w", rows, scheme, importance=np.full(256, value, np.float32))
        assert np.array_equal(same.values, plain.values)
        assert np.array_equal(same.scale, plain.scale)


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int8"), Scheme("int4", 64, symmetric=False)], ids=str)
def test_formats_without_a_choice_of_scales_do_not_heed_importance(scheme: Scheme) -> None:
    rows = _normal(4, 128)
    importance = np.linspace(0, 1, 128, dtype=np.float32)
    plain, same = quantize_rows("w", rows, scheme), quantize_rows("w", rows, scheme, importance=importance)
    assert np.array_equal(plain.values, same.values)
    assert np.array_equal(plain.scale, same.scale)
