"""Calibration of one unit: which channels get a factor, and what is sampled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen_rt.export.quantize import balance
from qwen_rt.export.quantize.balance import Limits, UnitInputs, choose_balance, sample_rows
from qwen_rt.quantization import Scheme

from .models import (
    ArrayRows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _free(channels: int) -> Limits:
    return Limits.of_vectors([], channels)


def _weights(*shapes: tuple[int, int]) -> Mapping[str, NDArray[np.float32]]:
    return {f"w{index}": _random(*shape, seed=index) for index, shape in enumerate(shapes)}


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int4", 32, symmetric=False)], ids=str)
def test_equal_channels_are_left_alone(scheme: Scheme) -> None:
    """All candidates are the same then, and the first wins the tie."""
    x = torch.from_numpy(np.sign(_random(100, 128)))
    choice = choose_balance(UnitInputs.of(x), _weights((64, 128)), scheme, _free(128))
    assert choice.alpha == 0
    assert choice.exponents is None
    assert choice.importance is None
    assert choice.error_after == choice.error_before


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8")], ids=str)
def test_a_loud_channel_gets_a_factor_and_the_error_is_that_of_the_product(scheme: Scheme) -> None:
    x = _random(100, 128)
    x[:, 17] *= 40
    inputs, weights = UnitInputs.of(torch.from_numpy(x)), _weights((64, 128), (32, 128))
    choice = choose_balance(inputs, weights, scheme, _free(128))
    assert choice.exponents is not None
    assert choice.exponents[17] == choice.exponents.max() > 0
    assert choice.exponents[17] <= {"int4": 4, "int8": 8}[scheme.format]
    assert np.median(choice.exponents) == 0
    assert choice.error_after < 0.75 * choice.error_before

    total, factors = 0.0, np.exp2(choice.exponents)
    for name, rows in weights.items():
        from qwen_rt.export.quantize.rounding import quantize_rows
        from qwen_rt.quantization import dequantize

        tensor = quantize_rows(name, (rows * factors).astype(np.float32), scheme, importance=choice.importance)
        scaled = inputs.sample.numpy() / factors
        if scheme.format == "int8":
            scale = np.abs(scaled).max(1, keepdims=True) / 127
            scaled = np.rint(scaled / scale) * scale
        exact = inputs.sample.numpy().astype(np.float64) @ rows.T
        total += float(np.square(scaled @ dequantize(tensor).T - exact).sum() / np.square(exact).sum())
    assert choice.error_after == pytest.approx((total / 2) ** 0.5, rel=1e-3)


def test_one_loud_token_does_not_decide() -> None:
    """A first token as in Qwen2: a thousand times as large, in a few channels of its own."""
    x = _random(200, 128)
    x[:, 17] *= 20
    quiet = UnitInputs.of(torch.from_numpy(x))
    x[0] = 0
    x[0, 90:93] = 5000
    loud = UnitInputs.of(torch.from_numpy(x))
    assert loud.ranges["max"] == 5000
    assert loud.largest[91] == 5000
    for before, after in ((quiet.mean, loud.mean), (quiet.squares, loud.squares)):
        assert np.abs(after / before - 1).max() < 1.5
        assert after.argmax() == 17
    assert float(loud.sample.abs().max()) < 100
    weights = _weights((64, 128))
    plain, disturbed = (choose_balance(i, weights, Scheme("int4", 32), _free(128)) for i in (quiet, loud))
    assert plain.exponents is not None
    assert disturbed.exponents is not None
    assert plain.exponents[17] == disturbed.exponents[17] > 0
    assert disturbed.error_after == pytest.approx(plain.error_after, rel=0.1)


def test_statistics_are_those_of_all_tokens() -> None:
    x = _random(700, 64) * np.linspace(0.1, 3, 64, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)  # equally loud: none is scaled down
    inputs = UnitInputs.of(torch.from_numpy(x))
    np.testing.assert_allclose(inputs.mean, np.abs(x).mean(0), rtol=1e-4)
    np.testing.assert_allclose(inputs.squares, (x**2).mean(0), rtol=1e-4)
    np.testing.assert_array_equal(inputs.largest, np.abs(x).max(0))
    assert inputs.sample.shape == (256, 64)
    assert (inputs.importance() > inputs.squares).all()
    exponents = np.arange(64, dtype=np.int32) % 3
    lifted = inputs.importance(exponents) - inputs.squares / 4.0**exponents
    assert lifted.max() < 0.0101 * (inputs.squares / 4.0**exponents).mean() * 1.01


def test_inputs_that_are_all_zero_are_no_reason_to_fail() -> None:
    inputs = UnitInputs.of(torch.zeros(5, 64))
    for scheme in (Scheme("int4", 32), Scheme("int8")):
        choice = choose_balance(inputs, _weights((8, 64)), scheme, _free(64))
        assert choice.exponents is None
        assert choice.error_before == choice.error_after == 0


def test_limits_bound_the_exponents() -> None:
    x = _random(100, 64)
    x[:, 3] *= 100
    inputs, weights = UnitInputs.of(torch.from_numpy(x)), _weights((64, 64))
    norm = np.ones(64, np.float32)
    norm[3] = 2.0**-13  # one more halving, and float16 has no bits to lose
    choice = choose_balance(inputs, weights, Scheme("int8"), Limits.of_vectors([norm], 64))
    assert choice.exponents is not None
    assert choice.exponents[3] == 1
    free = choose_balance(inputs, weights, Scheme("int8"), _free(64))
    assert free.exponents is not None
    assert free.exponents[3] > 1
    assert choose_balance(inputs, weights, Scheme("int8"), None).exponents is None


def test_rows_are_sampled_over_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ArrayRows({"w": np.arange(1003, dtype=np.float32)[:, None] * np.ones(4, np.float32)})
    assert np.array_equal(sample_rows(source, "w"), source.arrays["w"])
    monkeypatch.setattr(balance, "NUM_SAMPLE_WEIGHTS", 4 * 100)
    rows = sample_rows(source, "w")
    assert 90 < len(rows) <= 100
    assert np.array_equal(rows, sample_rows(source, "w"))
    numbers = rows[:, 0]
    assert (np.diff(numbers) > 0).all()
    assert numbers.min() < 200
    assert numbers.max() > 800
