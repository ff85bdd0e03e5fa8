"""Offsets of a quantized KV cache: chosen head by head by the error that they leave, the same in every run."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.quantize import forward
from qwen_rt.export.quantize.kv import MARGIN, KvPlan, choose_kv_offsets
from qwen_rt.quantization import KV_FORMATS, key_offset_name, value_offset_name
from qwen_rt.rope import RopeSpec
from qwen_rt.spec import ModelSpec

F32 = NDArray[np.float32]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
BIASED = 1  # the head whose biases are large


def spec_of(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "architecture": "Qwen2ForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
        "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": 96, "vocab_size": 40,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "qkv_bias": True, "rope": RopeSpec(theta=1e4),
        "max_position_embeddings": 256,
    }  # fmt: skip
    return ModelSpec(**fields | changes)


class Rows:
    """A RowSource over arrays that notes what was read and how many rows of a matrix at most."""

    def __init__(self, arrays: dict[str, F32]) -> None:
        self.arrays = arrays
        self.most_rows = 0
        self.names: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def rows(self, name: str, start: int, stop: int) -> F32:
        self.names.add(name)
        if self.arrays[name].ndim == 2:
            self.most_rows = max(self.most_rows, stop - start)
        return self.arrays[name][start:stop].copy()


def arrays_of(spec: ModelSpec, bias: float, seed: int = 0) -> dict[str, F32]:
    """Products of unit size; biases of k and v that are `bias` in one head and zero in the other."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in spec.parameters().items():
        array = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("proj.weight"):
            array /= np.float32(shape[-1] ** 0.5)
        elif "norm" in name:
            array = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name.endswith(("k_proj.bias", "v_proj.bias")):
            array = (array * bias).astype(ml_dtypes.bfloat16).astype(np.float32).reshape(KV_HEADS, HEAD_DIM)
            array[1 - BIASED] = 0
            array = array.reshape(-1)
        found[name] = array
    return found


def plan_of(bias: float, kv_format: str = "fp8", **options: Any) -> KvPlan:
    spec = spec_of()
    return choose_kv_offsets(Rows(arrays_of(spec, bias)), spec, kv_format, **options)


def candidates(plan: KvPlan) -> list[list[str]]:
    return [[choice.candidate for choice in (*layer.keys, *layer.values)] for layer in plan.layers]


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_biased_head_is_split_and_the_other_is_not(kv_format: str) -> None:
    plan = plan_of(100.0, kv_format)
    assert candidates(plan) == [["none", "bias", "none", "bias"]] * LAYERS
    for layer in plan.layers:
        for choices in (layer.keys, layer.values):
            errors = choices[BIASED].errors
            assert errors["bias"] < errors["none"] * 0.1
            assert choices[1 - BIASED].errors["none"] == choices[1 - BIASED].errors["bias"], "a bias of zeros"
        exact = {"fp8": 0.026, "int8": 0.005}[kv_format]  # of 16 normal numbers by the largest: 1.8 / (127 · sqrt(12))
        assert layer.values[BIASED].errors["bias"] == pytest.approx(exact, rel=0.2)
        assert layer.values[BIASED].errors["none"] > 0.3, "little of a value is left"


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_bias_that_hardly_matters_is_left_in(kv_format: str) -> None:
    plan = plan_of(0.1, kv_format)
    assert candidates(plan) == [["none"] * 4] * LAYERS
    for layer in plan.layers:
        assert not layer.key_offset.any()
        for choice in (*layer.keys, *layer.values):
            assert choice.errors["bias"] > choice.errors["none"] * (1 - MARGIN)


def test_what_is_stored_adds_up_to_the_bias() -> None:
    arrays = arrays_of(spec_of(), 100.0)
    stored = plan_of(100.0).tensors()
    assert len(stored) == 4 * LAYERS
    for layer in range(LAYERS):
        for letter, name in (("k", key_offset_name(layer)), ("v", value_offset_name(layer))):
            bias = f"model.layers.{layer}.self_attn.{letter}_proj.bias"
            assert stored[name].shape == (KV_HEADS, HEAD_DIM)
            assert stored[name].dtype == stored[bias].dtype == np.float32
            np.testing.assert_array_equal(stored[bias] + stored[name].reshape(-1), arrays[bias])
            left = stored[bias].reshape(KV_HEADS, HEAD_DIM)
            assert not left[BIASED].any()
            assert not stored[name][1 - BIASED].any()


def test_equal_arguments_give_an_equal_plan() -> None:
    first, second = plan_of(3.0), plan_of(3.0)
    assert first.summary() == second.summary()
    for name, array in first.tensors().items():
        np.testing.assert_array_equal(array, second.tensors()[name])
    assert first.summary() != plan_of(3.0, seed=1).summary()
    assert candidates(first) == candidates(plan_of(3.0, seed=1)), "the choice should not hang on what was drawn"


def test_matrices_are_read_in_blocks_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "BLOCK_BYTES", 4 * HIDDEN * 7)
    spec = spec_of()
    arrays = arrays_of(spec, 100.0)
    rows = Rows(arrays)
    plan = choose_kv_offsets(rows, spec, "fp8")
    assert rows.most_rows == 7
    parts = ("input_layernorm.weight", *(f"self_attn.{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")))
    assert rows.names == {f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in parts}
    assert candidates(plan) == candidates(plan_of(100.0))


def test_a_model_without_biases_has_no_offsets() -> None:
    spec = spec_of(qkv_bias=False)
    plan = choose_kv_offsets(Rows(arrays_of(spec, 0.0)), spec, "int8")
    assert candidates(plan) == [["none"] * 4] * LAYERS
    assert set(plan.layers[0].keys[0].errors) == {"none"}
    assert plan.layers[0].key_bias is None
    assert list(plan.tensors()) == [name(i) for i in range(LAYERS) for name in (key_offset_name, value_offset_name)]
    assert not any(array.any() for array in plan.tensors().values())


# ---------------------------------------------------------------- hidden states of a text


def hidden_states(mean: float, num_rows: int = 400) -> F32:
    """Hidden states that share a direction: keys and values then have a mean of their own."""
    rng = np.random.default_rng(8)
    shared = rng.standard_normal(HIDDEN) * mean
    return (rng.standard_normal((num_rows, HIDDEN)) + shared).astype(np.float32)


def test_a_mean_that_the_bias_lacks_is_found_in_a_text() -> None:
    """Without biases to speak of: the mean of k is taken out, which no look at the weights could have told."""
    hidden = [hidden_states(10.0)] * LAYERS
    arrays = arrays_of(spec_of(), 0.5)
    plan = choose_kv_offsets(Rows(arrays), spec_of(), "fp8", hidden=hidden)
    assert candidates(plan) == [["mean"] * 4] * LAYERS
    stored = plan.tensors()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.k_proj.bias"
        left, offset = stored[name], stored[key_offset_name(layer)].reshape(-1)
        np.testing.assert_array_equal(left, left.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_allclose(left + offset, arrays[name], atol=2**-22)
        assert np.abs(offset).max() > 1


def test_a_bias_that_the_mean_cancels_stays_with_it() -> None:
    """Weights alone say `bias`; in the text, k = W x + b is small as it is."""
    spec, arrays = spec_of(), arrays_of(spec_of(), 0.0)
    hidden = hidden_states(10.0)
    normed = hidden / np.sqrt(np.mean(hidden.astype(np.float64) ** 2, -1, keepdims=True))
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        x = normed * arrays[f"{path}.input_layernorm.weight"]
        for letter in "kv":
            mean = (x @ arrays[f"{path}.self_attn.{letter}_proj.weight"].T).mean(0)
            arrays[f"{path}.self_attn.{letter}_proj.bias"] = -mean.astype(ml_dtypes.bfloat16).astype(np.float32)
    drawn = choose_kv_offsets(Rows(arrays), spec, "int8")
    assert any(name == "bias" for names in candidates(drawn) for name in names)
    plan = choose_kv_offsets(Rows(arrays), spec, "int8", hidden=dict(enumerate([hidden, hidden])))
    assert candidates(plan) == [["none"] * 4] * LAYERS
    assert set(plan.layers[0].keys[0].errors) == {"none", "bias", "mean"}


def test_texts_of_any_shape_and_length() -> None:
    long = hidden_states(1.0, 4096)
    spec, rows = spec_of(), Rows(arrays_of(spec_of(), 10.0))
    flat = choose_kv_offsets(rows, spec, "fp8", hidden=[long] * LAYERS)
    batched = choose_kv_offsets(rows, spec, "fp8", hidden=[long.reshape(8, 512, HIDDEN)] * LAYERS)
    assert flat.summary() == batched.summary()
    few = choose_kv_offsets(rows, spec, "fp8", hidden=[long[:9]] * LAYERS, max_length=64)
    assert np.isfinite([e for layer in few.layers for c in layer.keys for e in c.errors.values()]).all()


# ---------------------------------------------------------------- refusals


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="kv_format=int4; expected one of fp8, int8"):
        plan_of(1.0, "int4")


@pytest.mark.parametrize(("letter", "what"), [("k", "keys"), ("v", "values"), ("q", "queries")])
def test_weights_that_are_no_numbers_are_refused(letter: str, what: str) -> None:
    arrays = arrays_of(spec_of(), 1.0)
    for key in arrays:
        if f"layers.1.self_attn.{letter}_proj" in key:
            arrays[key][3] = np.nan
    with pytest.raises(CheckpointError, match=f"{what} of layer 1 are not finite"):
        choose_kv_offsets(Rows(arrays), spec_of(), "fp8")


def test_weights_of_zeros_have_no_error() -> None:
    arrays = {name: np.zeros_like(array) for name, array in arrays_of(spec_of(), 0.0).items()}
    plan = choose_kv_offsets(Rows(arrays), spec_of(), "fp8")
    assert {e for layer in plan.layers for c in (*layer.keys, *layer.values) for e in c.errors.values()} == {0.0}
