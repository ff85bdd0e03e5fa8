"""The comparison that all numeric tests rest on."""

from __future__ import annotations

import numpy as np
import pytest

from .compare import assert_close

EXPECTED = np.linspace(-2.0, 2.0, 101).reshape(1, 101)


def test_equal_arrays_pass_even_with_no_tolerance() -> None:
    assert_close(EXPECTED, EXPECTED, relative=0.0, cosine=1.0 - 1e-12)


def test_errors_count_against_the_largest_magnitude_not_against_the_element() -> None:
    actual = EXPECTED.copy()
    actual[0, 50] = 1.9e-4  # the reference is 0 there
    assert_close(actual, EXPECTED, relative=1e-4)


def test_one_element_out_of_bounds_is_found_although_the_cosine_is_fine() -> None:
    actual = EXPECTED.copy()
    actual[0, 7] += 0.003
    with pytest.raises(AssertionError, match=r"logits: cosine 0\.99.*1 of 101 elements.*worst at \(0, 7\)"):
        assert_close(actual, EXPECTED, relative=1e-3, what="logits")


def test_a_wrong_direction_is_found_although_every_element_is_within_bounds() -> None:
    expected = np.full(1000, 1e-3)
    expected[0] = 1.0
    with pytest.raises(AssertionError, match="cosine"):
        assert_close(-expected, expected, relative=10.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_first_on_either_side(value: float) -> None:
    bad = EXPECTED.copy()
    bad[0, 3] = value
    with pytest.raises(AssertionError, match=r"actual has 1 of 101 elements not finite, first at \(0, 3\)"):
        assert_close(bad, EXPECTED, relative=1e9, cosine=-1.0)
    with pytest.raises(AssertionError, match="expected has 1 of 101"):
        assert_close(EXPECTED, bad, relative=1e9, cosine=-1.0)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(bad, bad, relative=1e9, cosine=-1.0)


def test_other_shapes_and_empty_arrays_are_no_comparison() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EXPECTED[0], EXPECTED, relative=1.0)
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_close(EXPECTED[:0], EXPECTED[:0], relative=1.0)


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros = np.zeros(4)
    assert_close(zeros, zeros, relative=1e-3)
    with pytest.raises(AssertionError, match="cosine"):
        assert_close(zeros + 1e-9, zeros, relative=1e-3)


def test_the_cosine_is_taken_in_float64() -> None:
    """A float32 sum of 152,064 squares errs by more than the bound that is asked for here."""
    rng = np.random.default_rng(0)
    expected = rng.standard_normal(152_064).astype(np.float32)
    actual = expected * np.float32(1 + 1e-6)
    assert_close(actual, expected, relative=1e-5, cosine=1 - 1e-11)
