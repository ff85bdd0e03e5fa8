"""Floors and rooflines against numbers worked out by hand."""

from __future__ import annotations

import pytest

from qwen_rt.benchmarks.kernel_shapes import SHAPES, ModelShape
from qwen_rt.ops import OPS
from qwen_rt.spec import ModelSpec

# 7B: C 3584, 28 layers, 28 / 4 heads of 128, F 18944, V 152064.
QKV_7B = 3584 * (3584 + 512 + 512)
O_7B = 3584 * 3584
GATE_UP_7B = 2 * 3584 * 18944
DOWN_7B = 18944 * 3584
HEAD_7B = 3584 * 152064


def test_the_floor_of_7b_is_its_linear_weights_and_head() -> None:
    shape = SHAPES["7b"]
    assert shape.floor_bytes == 2 * (28 * (QKV_7B + O_7B + GATE_UP_7B + DOWN_7B) + HEAD_7B) == 14_140_571_648
    assert shape.floor_bytes / 4.57e12 == pytest.approx(3.094e-3, rel=1e-3)  # one NVIDIA H200 that reads 4.57 TB/s
    assert shape.stored_bytes - shape.floor_bytes == 2 * HEAD_7B  # the embedding is not the head


def test_a_tied_head_is_stored_once() -> None:
    assert SHAPES["1.5b"].stored_bytes == SHAPES["1.5b"].floor_bytes
    assert SHAPES["1.5b"].floor_bytes / 4.57e12 == pytest.approx(0.68e-3, rel=0.01)


def test_keys_and_values_of_7b() -> None:
    assert SHAPES["7b"].kv_bytes(1) == 2 * 2 * 28 * 4 * 128
    assert SHAPES["7b"].kv_bytes(30720) == 1_761_607_680


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_and_its_config_are_the_same_model(name: str) -> None:
    spec = ModelSpec.from_config(SHAPES[name].config())
    assert ModelShape.from_spec(spec) == SHAPES[name]
    matrices = sum(shape[0] * shape[1] for shape in spec.parameters().values() if len(shape) == 2)
    assert SHAPES[name].stored_bytes == 2 * matrices
    assert SHAPES[name].kv_bytes(1) == spec.kv_bytes_per_token("bfloat16")


def test_fewer_layers() -> None:
    assert SHAPES["7b"].with_layers(4).layers == 4
    assert SHAPES["7b"].with_layers(None) is SHAPES["7b"]
    assert SHAPES["7b"].with_layers(28) == SHAPES["7b"]


def test_the_operations_of_a_prefill() -> None:
    layer = 2 * 6144 * (QKV_7B + O_7B + GATE_UP_7B + DOWN_7B)
    attention = 4 * 28 * 128 * (6144 * 6144 // 2)  # q·k and p·v, 2 operations each, half of them masked
    spared = 2 * 6143 * (O_7B + GATE_UP_7B + DOWN_7B)  # the last layer goes on with one row behind its attention
    assert SHAPES["7b"].prefill_flops(6144) == 28 * (layer + attention) - spared + 2 * HEAD_7B


@pytest.mark.parametrize("op", [op.name for op in OPS])
@pytest.mark.parametrize("name", SHAPES)
def test_every_op_moves_at_least_what_it_reads(name: str, op: str) -> None:
    one, many = (SHAPES[name].op_cost(op, rows, 128) for rows in (1, 64))
    assert one.moved_bytes >= one.read_bytes > 0
    assert many.moved_bytes > one.moved_bytes
    assert many.flops >= one.flops


def test_costs_of_7b_ops_by_hand() -> None:
    shape = SHAPES["7b"]
    down = shape.op_cost("down_residual", 16, 128)
    assert (down.read_bytes, down.flops) == (2 * DOWN_7B, 2 * 16 * DOWN_7B)
    assert down.moved_bytes == 2 * DOWN_7B + 16 * 2 * (18944 + 3584 + 3584)
    assert shape.op_cost("lm_head", 1, 128).moved_bytes == 2 * HEAD_7B + 2 * 3584 + 4 * 152064
    attention = shape.op_cost("rope_kv_append_attention", 2, 100)
    assert attention.read_bytes == 2 * 100 * 2 * 4 * 128 * 2  # rows, tokens, k and v, heads, head dim, bytes
    assert attention.flops == 2 * 100 * 4 * 28 * 128


def test_the_roofline_is_the_slower_of_bytes_and_arithmetic() -> None:
    cost = SHAPES["7b"].op_cost("down_residual", 1, 128)
    assert cost.roofline_us(4.57e12, None) == pytest.approx(1e6 * cost.moved_bytes / 4.57e12)
    assert cost.roofline_us(4.57e12, 790e12) == cost.roofline_us(4.57e12, None)
    assert cost.roofline_us(4.57e12, 1e9) == pytest.approx(1e6 * cost.flops / 1e9)


def test_an_unknown_op_has_no_cost() -> None:
    with pytest.raises(KeyError):
        SHAPES["7b"].op_cost("softmax", 1, 1)
