"""The gate names what is broken: one matrix or many, quantized or kept."""

from __future__ import annotations

import numpy as np
import pytest

from ...cases import Zoo
from . import broken
from .broken import SCHEMES, ArrayRows, Damage, Model, QuantizedRows, schemes_for

DOWN = "model.layers.2.mlp.down_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def nano() -> Model:
    return Model("nano")


BROKEN: dict[str, tuple[Damage, str]] = {
    "scales permuted": (broken.scales_permuted, "scales in another order"),
    "all zeros": (broken.zeroed, "all zeros"),
    "some rows zero": (broken.rows_zeroed, "of 512 rows are zeros"),
    "a NaN scale": (broken.scale_is_nan, "holds NaN or infinity"),
    "scales doubled": (broken.scales_doubled, "all scaled by 2"),
    "transposed": (broken.transposed, "values in another order, or another matrix"),
}


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("fp8", DOWN),
        ("fp8", "model.layers.0.self_attn.v_proj.weight"),
        ("int8", OUT),
        ("int8", "model.layers.3.mlp.up_proj.weight"),
        ("int4", "model.layers.0.self_attn.q_proj.weight"),
        ("int4", DOWN),
        ("int4-row", "model.layers.3.mlp.up_proj.weight"),
        ("int4-row", OUT),
    ],
)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_matrix_is_caught_and_named(kind: str, scheme: str, name: str, nano: Model) -> None:
    damage, cause = BROKEN[kind]
    result = nano.gate(SCHEMES[scheme], {name: damage})
    assert not result.passed
    assert result.worst.name == name, result.table()
    assert result.failures[0].startswith(f"{name}: "), result.failures
    if kind == "some rows zero":
        cause = cause.replace("512", str(len(nano.arrays[name])))
    assert cause in result.failures[0], result.failures
    layer = int(name.split(".")[2])
    assert result.layers[layer].worst.name == name
    assert all(other.worst.passed for other in result.layers if other.index != layer), result.table()
    assert "OUT OF LIMITS" in result.table()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [(broken.scales_shifted, "scales in another order"), (broken.nibbles_swapped, "values in another order")],
)
def test_mistakes_of_int4_are_caught_and_named(damage: Damage, cause: str, nano: Model) -> None:
    result = nano.gate(SCHEMES["int4-g32"], {OUT: damage})
    assert result.failures[0].startswith(f"{OUT}: ")
    assert cause in result.failures[0]


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("shape", ["heads-0.5b", "heads-72b", "odd"])
def test_permuted_scales_are_caught_where_rows_are_alike(shape: str, scheme: str, zoo: Zoo) -> None:
    """Rows of random weights differ little in their scales, so that little is wrong: the hardest case."""
    model = Model(zoo.case(shape).checkpoint)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        result = model.gate(SCHEMES[scheme], {name: broken.scales_permuted})
        assert not result.passed
        assert result.failures[0].startswith(f"{name}: "), result.table()
        assert "scales" in result.failures[0]


def test_a_zeroed_layer_is_named_with_all_its_matrices(nano: Model) -> None:
    names = [name for name in nano.arrays if name.startswith("model.layers.1.") and nano.arrays[name].ndim == 2]
    result = nano.gate(SCHEMES["int4"], dict.fromkeys(names, broken.zeroed))
    assert result.num_failures >= 7
    for line in result.failures[:7]:
        assert line.startswith("model.layers.1."), result.failures
        assert "output error 1 > " in line
        assert "all zeros" in line
    assert result.failure().endswith(f"(and {result.num_failures - 1} more)")
    assert [layer.index for layer in result.layers if not layer.worst.passed] == [1]


def test_numbers_that_are_not_finite_are_named_without_a_warning(nano: Model) -> None:
    for value in (np.inf, -np.inf, np.nan, 3e38):
        quantized = ArrayRows(nano.arrays)
        quantized.arrays[DOWN] = nano.arrays[DOWN].copy()
        quantized.arrays[DOWN][7, 3:9] = value
        result = nano.compare(quantized, {})
        assert result.failures[0].startswith(f"{DOWN}: "), result.failures
        assert "holds NaN or infinity" in result.failures[0]
        assert not result.passed


def test_a_matrix_of_zeros_in_the_source(nano: Model) -> None:
    model = Model("nano")
    model.arrays[DOWN] = np.zeros_like(model.arrays[DOWN])
    schemes = schemes_for(model.spec, SCHEMES["int8"])
    assert model.compare(QuantizedRows(model.arrays, schemes), schemes).passed
    result = model.compare(QuantizedRows(nano.arrays, schemes), schemes)
    assert f"{DOWN}: output error inf > 0.0453" in result.failures[0]
    assert "the source has zeros" in result.failures[0]


def test_two_matrices_exchanged_are_both_named(nano: Model) -> None:
    first, second = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    schemes = schemes_for(nano.spec, SCHEMES["int8"])
    swapped = QuantizedRows({**nano.arrays, first: nano.arrays[second], second: nano.arrays[first]}, schemes)
    result = nano.compare(swapped, schemes)
    assert {line.split(":")[0] for line in result.failures[:2]} == {first, second}
    assert all("values in another order, or another matrix" in line for line in result.failures[:2])


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.2.self_attn.k_proj.bias",
        "model.embed_tokens.weight",
    ],
)
def test_what_is_not_quantized_is_compared_too(name: str, nano: Model) -> None:
    schemes = schemes_for(nano.spec, SCHEMES["fp8"])
    quantized = QuantizedRows(nano.arrays, schemes)
    quantized.arrays[name] = quantized.arrays[name] * np.float32(1.1)
    result = nano.compare(quantized, schemes)
    assert not result.passed
    assert f"{name}: output error 0.1 > 0.00781" in " ".join(result.failures), result.failures
