"""The references of the ops: shapes by the table, one decoder layer of the plain reference, and what is not read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.ops import BLOCK_SIZE, OPS, find_op, shape_of
from qwen_rt.plugins import reference, reference_ops
from qwen_rt.plugins.reference_ops import REFERENCES, round_bf16, round_outputs
from qwen_rt.rope import RopeSpec
from qwen_rt.spec import ModelSpec

F64 = NDArray[np.float64]

HEAD_DIM, EPSILON, SCALING = 16, 1e-6, 1.25
DIMS = {
    "rows": 5, "hidden": 32, "vocab": 40, "q_width": 64, "kv_width": 32, "width": 64, "ffn": 48, "kv_heads": 2,
    "head_dim": HEAD_DIM, "num_blocks": 7, "block_size": BLOCK_SIZE, "sequences": 2, "max_blocks": 3, "half_dim": 8,
}  # fmt: skip
ATTRIBUTES = {
    "weight_format": 0.0,
    "epsilon": EPSILON,
    "scale": HEAD_DIM**-0.5,
    "rope_scaling": SCALING,
    "max_length": 100.0,
    "kv_format": 0.0,
}
COLUMNS = {"o_proj_residual": "width", "select_o_proj_residual": "width", "down_residual": "ffn"}
INTEGERS = {
    "ids": [3, 0, 39, 7, 7],
    "indices": [1, 4],
    "positions": [62, 63, 64, 0, 1],
    "query_starts": [0, 3, 5],
    "block_tables": [[5, 2, -9], [6, 99, 99]],
}


def inputs_of(name: str, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Random inputs of an op, bfloat16 values where the table says so; nothing is quantized."""
    rng = np.random.default_rng(seed)
    dims = DIMS | {"columns": DIMS[COLUMNS.get(name, "hidden")]}
    found: dict[str, NDArray[np.generic]] = {}
    for tensor in find_op(name).inputs:
        if tensor.name in INTEGERS:
            found[tensor.name] = np.array(INTEGERS[tensor.name])
        elif not tensor.optional or tensor.name.endswith("_bias"):
            found[tensor.name] = rng.standard_normal(shape_of(tensor.shape, dims)).astype(ml_dtypes.bfloat16)
    return found


def run(name: str, inputs: dict[str, NDArray[np.generic]], **options: bool) -> tuple[F64, ...]:
    """The outputs of a reference."""
    attributes = {key: ATTRIBUTES[key] for key, _ in find_op(name).attributes}
    found = REFERENCES[name](*inputs.values(), **attributes, **options)
    return found if isinstance(found, tuple) else (found,)


def test_every_op_of_a_graph_has_a_reference() -> None:
    assert list(REFERENCES) == [op.name for op in OPS if op.name != "sample"]
    classes = reference_ops.reference_evaluator_ops()
    assert [(c.op_domain, c.__name__) for c in classes] == [("qwen_rt", name) for name in REFERENCES]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_shapes_are_those_of_the_table_and_inputs_stay(name: str, bf16: bool) -> None:
    op, inputs = find_op(name), inputs_of(name)
    before = {key: array.copy() for key, array in inputs.items()}
    outputs = run(name, inputs, bf16=bf16)
    wanted = [tensor for tensor in op.outputs if not tensor.optional]
    for tensor, array, rounded in zip(wanted, outputs, round_outputs(op, outputs), strict=True):
        assert array.dtype == np.float64
        assert array.shape == shape_of(tensor.shape, DIMS)
        assert np.isfinite(array).all()
        assert rounded.dtype == (np.float32 if tensor.dtype == "f32" else ml_dtypes.bfloat16)
        if bf16 and tensor.dtype == "bf16":
            np.testing.assert_array_equal(round_bf16(array), array)
    for key, array in inputs.items():
        np.testing.assert_array_equal(array, before[key], err_msg=f"{key} was written")


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "embed"])
def test_rounding_changes_every_op_a_little(name: str) -> None:
    exact, rounded = (run(name, inputs_of(name), bf16=bf16)[0] for bf16 in (False, True))
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 2**-16 < error < 2**-6, "u = 2**-8 a rounding, a few of them"


@pytest.mark.parametrize("name", ["rmsnorm_qkv", "rmsnorm_gate_up_silu"])
def test_many_rows_are_rounded_as_a_prefill_rounds_them(name: str) -> None:
    """From 33 rows on, cuBLASLt takes a norm that is rounded as a whole, and gives gate and up rounded."""
    inputs = inputs_of(name)
    few = run(name, inputs, bf16=True)[0]
    hidden = np.tile(np.array(inputs["hidden"]), (13, 1))
    skinny = run(name, inputs | {"hidden": hidden[:32]}, bf16=True)[0]
    many = run(name, inputs | {"hidden": hidden}, bf16=True)[0]
    np.testing.assert_array_equal(skinny[:5], few)
    assert (many[:5] != few).any()
    assert np.abs(many[:5] - few).max() < 2**-5 * np.abs(few).max()
    normed = round_bf16(reference.rms_norm(hidden, inputs["norm_weight"], EPSILON))
    weights = list(inputs.values())[2:5] if name == "rmsnorm_qkv" else list(inputs.values())[2:4]
    products = [reference.linear(normed, weight) for weight in weights]
    if name == "rmsnorm_qkv":
        biases = np.concatenate([np.array(inputs[f"{letter}_bias"], float) for letter in "qkv"])
        wanted = np.concatenate(products, axis=-1) + biases
    else:
        wanted = reference.silu(round_bf16(products[0])) * round_bf16(products[1])
    np.testing.assert_array_equal(many, round_bf16(wanted))


def test_bf16_rounds_to_nearest_even() -> None:
    one, step = 1.0, 2**-7
    values = [one + step / 2, one + 3 * step / 2, one + step / 2 + 2**-20, -one - step / 2]
    np.testing.assert_array_equal(round_bf16(values), [one, one + 2 * step, one + step, -one])


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_ops_of_a_layer_are_the_layer(has_bias: bool) -> None:
    """Two sequences on scattered blocks, chunk by chunk, against the dense reference in one go."""
    spec = ModelSpec(
        architecture="Qwen2ForCausalLM", hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM,
        intermediate_size=48, vocab_size=40, rms_norm_eps=EPSILON, tie_word_embeddings=True, qkv_bias=has_bias,
        rope=RopeSpec(theta=1e4), max_position_embeddings=256,
    )  # fmt: skip
    rng = np.random.default_rng(4)
    weights = {name: rng.standard_normal(shape) * 0.3 for name, shape in spec.parameters().items()}
    inv_freq, num_tokens = spec.rope.inv_freq(HEAD_DIM), 70
    ids = rng.integers(0, 40, (2, num_tokens))
    hidden = reference.embed(weights["model.embed_tokens.weight"], ids)
    tables = reference.rotary_tables(np.tile(np.arange(num_tokens), (2, 1)), inv_freq, SCALING)
    empty = np.full((2, 2, num_tokens, HEAD_DIM), np.nan)
    expected, _, _ = reference.decoder_layer(spec, weights, 0, hidden, *tables, empty, empty, [0, 0])

    def weight(name: str) -> F64:
        return weights[f"model.layers.0.{name}"]

    keys = values = np.full((6, 2, BLOCK_SIZE, HEAD_DIM), np.nan)
    block_tables = np.array([[4, 2], [5, 1]])
    biases = [weight(f"self_attn.{name}_proj.bias") for name in "qkv"] if has_bias else []
    for parts in ([(0, 50), (0, 3)], [(50, 69), (3, 69)], [(69, 70), (69, 70)]):
        positions = np.concatenate([np.arange(start, stop) for start, stop in parts])
        rows = np.concatenate([ids[b, start:stop] for b, (start, stop) in enumerate(parts)])
        starts = np.cumsum([0, *(stop - start for start, stop in parts)])
        stream = reference_ops.embed(rows, weights["model.embed_tokens.weight"])
        projections = [weight(f"self_attn.{name}_proj.weight") for name in "qkv"]
        qkv = reference_ops.rmsnorm_qkv(
            stream, weight("input_layernorm.weight"), *projections, *biases, epsilon=EPSILON
        )
        attended, keys, values = reference_ops.rope_kv_append_attention(
            qkv, positions, starts, inv_freq, block_tables, keys, values, scale=HEAD_DIM**-0.5, rope_scaling=SCALING
        )
        stream = reference_ops.o_proj_residual(attended, weight("self_attn.o_proj.weight"), stream)
        activation = reference_ops.rmsnorm_gate_up_silu(
            stream,
            weight("post_attention_layernorm.weight"),
            weight("mlp.gate_proj.weight"),
            weight("mlp.up_proj.weight"),
            epsilon=EPSILON,
        )
        found = reference_ops.down_residual(activation, weight("mlp.down_proj.weight"), stream)
        wanted = np.concatenate([expected[b, start:stop] for b, (start, stop) in enumerate(parts)])
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    assert np.isnan(keys[[0, 3]]).all(), "blocks of nobody"
    assert np.isnan(keys[[2, 1], :, num_tokens - BLOCK_SIZE :]).all(), "slots behind the last token"


# ---------------------------------------------------------------- attention


def test_only_visible_tokens_are_read_and_only_new_ones_written() -> None:
    inputs = inputs_of("rope_kv_append_attention")
    wide = {"k_cache": np.array(inputs["k_cache"], float), "v_cache": np.array(inputs["v_cache"], float)}
    expected = run("rope_kv_append_attention", inputs | wide)[0]
    visible = np.zeros((7, BLOCK_SIZE), bool)
    visible[5, :62] = True  # sequence 0 has tokens 0 … 61 in block 5; 62 … 64 and all of sequence 1 are new
    written = np.zeros_like(visible)
    written[5, 62:], written[2, 0], written[6, :2] = True, True, True
    for cache in wide.values():
        cache.swapaxes(1, 2)[~visible] = np.nan
    out, *presents = run("rope_kv_append_attention", inputs | wide)
    np.testing.assert_array_equal(out, expected)
    for present, cache in zip(presents, wide.values(), strict=True):
        after, before = present.swapaxes(1, 2), cache.swapaxes(1, 2)
        np.testing.assert_array_equal(after[~written], before[~written])
        assert np.isfinite(after[written]).all()


def test_a_decode_step_is_a_prefill_of_one_token_each() -> None:
    inputs = inputs_of("rope_kv_append_attention")
    step = inputs | {"qkv": inputs["qkv"][:2], "positions": np.array([64, 3])}
    one_each = run("rope_kv_append_attention", step | {"query_starts": np.array([-1, 99, 5])})
    rows = inputs | {"qkv": inputs["qkv"][[0, 0, 1]], "positions": np.array([64, 64, 3])}
    several = run("rope_kv_append_attention", rows | {"query_starts": np.array([0, 2, 3])})
    np.testing.assert_array_equal(one_each[0], several[0][1:])
    for one, other in zip(one_each[1:], several[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_idle_rows_and_rows_beyond_the_table() -> None:
    inputs = inputs_of("rope_kv_append_attention")
    capacity = DIMS["max_blocks"] * BLOCK_SIZE
    step = inputs | {"qkv": inputs["qkv"][:2], "positions": np.array([-1, capacity])}
    out, keys, values = run("rope_kv_append_attention", step)
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(keys, np.array(inputs["k_cache"], float))
    np.testing.assert_array_equal(values, np.array(inputs["v_cache"], float))


def test_an_empty_sequence_takes_no_row() -> None:
    inputs = inputs_of("rope_kv_append_attention") | {"positions": np.array([0, 1, 2, 3, 4])}
    found = run("rope_kv_append_attention", inputs | {"query_starts": np.array([0, 0, 5])})[0]
    alone = {"block_tables": inputs["block_tables"][1:], "query_starts": np.array([0, 5])}
    np.testing.assert_array_equal(found, run("rope_kv_append_attention", inputs | alone)[0])


@pytest.mark.parametrize("starts", [[0, 6, 5], [1, 3, 5], [0, 3, 4], [0, 5]])
def test_starts_that_do_not_divide_the_rows(starts: list[int]) -> None:
    inputs = inputs_of("rope_kv_append_attention") | {"query_starts": np.array(starts)}
    with pytest.raises(IndexError, match=r"query_starts=\[.*expected 2 ascending parts of 5 rows"):
        run("rope_kv_append_attention", inputs)


@pytest.mark.parametrize("block", [-1, 7])
def test_a_block_that_is_not_in_the_cache(block: int) -> None:
    inputs = inputs_of("rope_kv_append_attention")
    tables = np.array([[5, block, 0], [6, 99, 99]])
    with pytest.raises(IndexError, match=rf"row 2: blocks \[5, {block}\], expected 0 to 6"):
        run("rope_kv_append_attention", inputs | {"block_tables": tables})


# ---------------------------------------------------------------- lookups


def test_unknown_ids_give_nan() -> None:
    inputs = inputs_of("embed") | {"ids": np.array([-1, 40, 39])}
    found = run("embed", inputs)[0]
    assert np.isnan(found[:2]).all()
    np.testing.assert_array_equal(found[2], np.array(inputs["table"][39], float))


def test_the_last_projection_takes_the_rows_that_indices_name() -> None:
    inputs = inputs_of("select_o_proj_residual")
    every = run("select_o_proj_residual", inputs | {"indices": np.full(5, 1 << 40)})[0]  # as many as rows: not read
    np.testing.assert_allclose(run("select_o_proj_residual", inputs)[0], every[[1, 4]], rtol=1e-12)
    astray = run("select_o_proj_residual", inputs | {"indices": np.array([-1, 4, 5])})[0]
    assert np.isnan(astray[[0, 2]]).all()
    np.testing.assert_allclose(astray[1], every[4], rtol=1e-12)
