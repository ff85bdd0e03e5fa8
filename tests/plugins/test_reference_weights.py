"""Ops on quantized matrices compute what they compute on the matrices that those stand for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.ops import WEIGHT_FORMATS
from qwen_rt.plugins import reference
from qwen_rt.plugins import reference_ops as ops
from qwen_rt.plugins.reference_rounding import round_bf16, round_fp8_rows
from qwen_rt.plugins.reference_weights import matrix, way_of
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize, pack_nibbles

ROWS, C, N, F, V = 3, 64, 40, 96, 50
SCHEMES = [
    Scheme("fp8"),
    Scheme("fp8", 32),
    Scheme("int8"),
    Scheme("int8", 16, symmetric=False),
    Scheme("int4", 32),
    Scheme("int4", 16, symmetric=False),
    Scheme("int4", 32, symmetric=False, permuted=True),
]


def random_matrix(scheme: Scheme, rows: int, columns: int, seed: int) -> QuantizedTensor:
    """A matrix of random stored numbers."""
    rng = np.random.default_rng(seed)
    groups = scheme.num_groups(columns)
    zero: NDArray[np.generic] | None = None
    if scheme.format == "fp8":
        values = rng.normal(0, 100, (rows, columns)).clip(-440, 440).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    elif scheme.format == "int8":
        values = rng.integers(-128, 128, (rows, columns), np.int8)
        zero = rng.integers(-9, 9, (rows, groups), np.int8)
    else:
        values = pack_nibbles(rng.integers(0, 16, (rows, columns), np.uint8))
        zero = pack_nibbles(rng.integers(0, 16, (rows, groups), np.uint8))
    scale = rng.uniform(0.01, 0.02, (rows, groups)).astype(np.float16 if scheme.format == "int4" else np.float32)
    # One order for all matrices of an op, as they share their input.
    perm = np.random.default_rng(99).permutation(columns).astype(np.int32) if scheme.permuted else None
    found = None if scheme.symmetric else zero
    return QuantizedTensor("w", scheme, (rows, columns), values, scale, found, perm)


def options(scheme: Scheme) -> dict[str, float]:
    return {"weight_format": WEIGHT_FORMATS[scheme.format]}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
class TestOps:
    def test_qkv(self, scheme: Scheme) -> None:
        rng = np.random.default_rng(5)
        x, norm, biases = rng.normal(size=(ROWS, C)), rng.normal(size=C), [rng.normal(size=N) for _ in range(3)]
        found = [random_matrix(scheme, N, C, seed) for seed in range(3)]
        scales, zeros = [m.scale for m in found], [m.zero_point for m in found]
        got = ops.rmsnorm_qkv(
            x,
            norm,
            *(m.values for m in found),
            *biases,
            *scales,
            *zeros,
            found[0].perm,
            epsilon=1e-6,
            **options(scheme),
        )
        wanted = ops.rmsnorm_qkv(x, norm, *(dequantize(m) for m in found), *biases, epsilon=1e-6)
        np.testing.assert_array_equal(got, wanted)

    def test_gate_up(self, scheme: Scheme) -> None:
        rng = np.random.default_rng(5)
        x, norm = rng.normal(size=(ROWS, C)), rng.normal(size=C)
        gate, up = (random_matrix(scheme, F, C, seed) for seed in range(2))
        parts = (gate.scale, up.scale, gate.zero_point, up.zero_point, gate.perm)
        got = ops.rmsnorm_gate_up_silu(x, norm, gate.values, up.values, *parts, epsilon=1e-6, **options(scheme))
        np.testing.assert_array_equal(
            got, ops.rmsnorm_gate_up_silu(x, norm, dequantize(gate), dequantize(up), epsilon=1e-6)
        )

    def test_projections(self, scheme: Scheme) -> None:
        rng = np.random.default_rng(5)
        x, residual = rng.normal(size=(ROWS, F)), rng.normal(size=(ROWS, C))
        weight = random_matrix(scheme, C, F, 0)
        parts = (weight.scale, weight.zero_point, weight.perm)
        for function in (ops.o_proj_residual, ops.down_residual):
            got = function(x, weight.values, residual, *parts, **options(scheme))
            np.testing.assert_allclose(got, function(x, dequantize(weight), residual), rtol=1e-12, atol=1e-12)
        one = ops.select_o_proj_residual(x, [1], weight.values, residual, *parts, **options(scheme))
        np.testing.assert_allclose(one, got[1:2], rtol=1e-12, atol=1e-12)  # one row is summed in another order

    def test_head(self, scheme: Scheme) -> None:
        rng = np.random.default_rng(5)
        x, norm = rng.normal(size=(ROWS, C)), rng.normal(size=C)
        weight = random_matrix(scheme, V, C, 0)
        parts = (weight.scale, weight.zero_point, weight.perm)
        got = ops.lm_head(x, norm, weight.values, *parts, epsilon=1e-6, **options(scheme))
        np.testing.assert_array_equal(got, ops.lm_head(x, norm, dequantize(weight), epsilon=1e-6))


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int8"), Scheme("int8", 16)], ids=str)
def test_a_quantized_embedding(scheme: Scheme) -> None:
    table = random_matrix(scheme, V, C, 0)
    got = ops.embed([3, 0, V], table.values, table.scale, **options(scheme))
    np.testing.assert_array_equal(got[:2], dequantize(table)[[3, 0]])
    assert np.isnan(got[2]).all()


def test_fp8_may_come_as_numbers_or_as_bits() -> None:
    found = random_matrix(Scheme("fp8"), N, C, 0)
    typed = found.values.view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(matrix(typed, C, 1, found.scale), matrix(found.values, C, 1, found.scale))


def test_a_matrix_without_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="format int8 has no scale"):
        matrix(np.zeros((2, 16), np.int8), 16, 2)


PLAIN = {name: Scheme(name, 0 if name != "int4" else 32) for name in ("fp8", "int8", "int4")}


@pytest.mark.parametrize("format_name", PLAIN)
def test_what_many_rows_are_multiplied_as(format_name: str) -> None:
    """Skinny kernels multiply stored numbers; beyond them fp8 rows meet fp8, and other matrices become bf16."""
    scheme, rng = PLAIN[format_name], np.random.default_rng(6)
    stored = random_matrix(scheme, N, C, 0)
    weight = dequantize(stored).astype(np.float64)
    most = 32 if format_name == "fp8" else 64
    x, residual = round_bf16(rng.normal(size=(most + 1, C))), round_bf16(rng.normal(size=(most + 1, N)))

    def run(num_rows: int) -> NDArray[np.float64]:
        given = (x[:num_rows], stored.values, residual[:num_rows], stored.scale)
        return ops.o_proj_residual(*given, bf16=True, **options(scheme))

    exact = round_bf16(residual + reference.linear(x, weight))
    np.testing.assert_array_equal(run(most), exact[:most])
    many = run(most + 1)
    assert (many != exact).any()
    rows, matrix_of = (round_fp8_rows(x), weight) if format_name == "fp8" else (x, round_bf16(weight))
    np.testing.assert_array_equal(many, round_bf16(residual + reference.linear(rows, matrix_of)))
    np.testing.assert_array_equal(  # the norm is rounded alike
        ops.rmsnorm_gate_up_silu(
            x, np.ones(C), stored.values, stored.values, stored.scale, stored.scale,
            epsilon=1e-6, bf16=True, **options(scheme),
        ),
        _gated(x, weight, is_fp8=format_name == "fp8"),
    )  # fmt: skip


def _gated(x: NDArray[np.float64], weight: NDArray[np.float64], *, is_fp8: bool) -> NDArray[np.float64]:
    normed = reference.rms_norm(x, np.ones(C), 1e-6)
    rows, matrix_of = (round_fp8_rows(normed), weight) if is_fp8 else (round_bf16(normed), round_bf16(weight))
    gate = round_bf16(reference.linear(rows, matrix_of))
    return round_bf16(reference.silu(gate) * gate)


def test_rows_in_fp8() -> None:
    """As ml_dtypes casts them; the largest of a row is 448, and a row of zeros stays."""
    x = np.random.default_rng(7).normal(size=(5, C))
    x[2] = 0
    got = round_fp8_rows(x)
    np.testing.assert_array_equal(got[2], 0)
    scales = (np.abs(x).max(-1, keepdims=True) / 448).astype(np.float32).astype(np.float64)
    scales[2] = 1
    np.testing.assert_array_equal(got, (x / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales)


def test_matrices_in_groups_have_no_fp8_products() -> None:
    scale = np.ones((N, 2), np.float32)
    assert way_of(33, WEIGHT_FORMATS["bf16"]) == "bf16"
    assert way_of(33, WEIGHT_FORMATS["fp8"], scale[:, :1]) == "fp8"
    assert way_of(64, WEIGHT_FORMATS["fp8"], scale) == "skinny"
    assert way_of(65, WEIGHT_FORMATS["fp8"], scale) == "bf16"
    assert way_of(65, WEIGHT_FORMATS["fp8"], scale[:, :1], perm=np.arange(C)) == "bf16"
