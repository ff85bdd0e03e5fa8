"""Calibration: the edited model is the same one, its factors are exact, and it is rounded better."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.quantize import balance
from qwen_rt.export.quantize import calibrate as calibrate_module
from qwen_rt.export.quantize.calibrate import Calibration, calibrate
from qwen_rt.export.quantize.forward import UNITS, Forward, matrix_names, multiply
from qwen_rt.export.quantize.pieces import EditedRows
from qwen_rt.export.quantize.plan import layer_matrices
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec

from ...cases import Case, Zoo
from ...compare import assert_close
from .models import (
    ArrayRows,
    Arrays,
    RoundedRows,
    hidden_states,
    nano_texts,
    nano_weights,
    relative_error,
    with_outliers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


HEAD = "lm_head.weight"
# F = 1386 and 231 are no multiples of 16: whole rows share a scale, and an odd number of columns rules int4 out.
CASES = [
    ("heads-0.5b", Scheme("int4", 32)),
    ("heads-72b", Scheme("int4")),
    ("mha", Scheme("int4", 128)),
    ("yarn", Scheme("int4", 16, symmetric=False)),
    ("heads-1.5b", Scheme("int8")),
    ("odd", Scheme("int8")),
    ("one-layer", Scheme("int8", 0)),
]


def _loud(case: Case) -> tuple[ModelSpec, Arrays]:
    spec = Checkpoint.open(case.checkpoint).spec
    return spec, with_outliers(case.weights, spec)


def _texts(spec: ModelSpec, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.vocab_size, length).tolist() for length in (60, 37, 90)]


def _schemes(spec: ModelSpec, scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(layer_matrices(spec), scheme)


def _folded_units(found: Calibration, layer: int) -> set[str]:
    columns = {name for name, edit in found.edits.items() if edit.columns is not None}
    return {unit for unit in UNITS if set(matrix_names(layer, unit)) <= columns}


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=lambda value: str(value))
def test_the_edited_model_is_the_same(name: str, scheme: Scheme, zoo: Zoo) -> None:
    """Powers of two: not even a rounding differs but in the order of sums; 1e-5 is a hundred of float32's."""
    spec, arrays = _loud(zoo.case(name))
    rows = ArrayRows(arrays)
    found = calibrate(rows, spec, _texts(spec), _schemes(spec, scheme))
    folded = [_folded_units(found, layer) for layer in range(spec.num_layers)]
    assert {"qkv", "gate_up"} <= set.intersection(*folded), folded
    assert "down" in set.union(*folded), folded
    edited = EditedRows(rows, found.edits, found.vectors)
    for ids in _texts(spec, seed=2):
        expected = Forward(spec, rows).run(ids).numpy()
        assert_close(Forward(spec, edited).run(ids).numpy(), expected, relative=1e-5, cosine=1 - 1e-9)


def test_factors_of_o_are_shared_by_the_query_heads_of_a_group(zoo: Zoo) -> None:
    """And undone in v_proj, whose columns have factors of their own, and in its bias."""
    spec, arrays = _loud(zoo.case("heads-0.5b"))
    found = calibrate(ArrayRows(arrays), spec, _texts(spec), _schemes(spec, Scheme("int4", 32)))
    num_folded = 0
    for layer in range(spec.num_layers):
        columns = found.edits[f"model.layers.{layer}.self_attn.o_proj.weight"].columns
        value = found.edits[f"model.layers.{layer}.self_attn.v_proj.weight"]
        assert value.columns is not None
        if columns is None:
            assert value.rows is None
            continue
        num_folded += 1
        heads = columns.reshape(spec.num_kv_heads, -1, spec.head_dim)
        assert heads.shape[1] == 7
        assert (heads == heads[:, :1]).all()
        assert value.rows is not None
        assert (value.rows * heads[:, 0].reshape(-1) == 1).all()
        bias = f"model.layers.{layer}.self_attn.v_proj.bias"
        assert np.array_equal(found.vectors[bias], arrays[bias] * value.rows)
    assert num_folded


def test_a_model_without_biases(zoo: Zoo) -> None:
    spec, arrays = _loud(zoo.case("yarn"))
    spec = dataclasses.replace(spec, qkv_bias=False)
    rows = ArrayRows({name: array for name, array in arrays.items() if not name.endswith(".bias")})
    found = calibrate(rows, spec, _texts(spec), _schemes(spec, Scheme("int4", 32)))
    assert any(edit.rows is not None for name, edit in found.edits.items() if "v_proj" in name)
    assert all("norm" in name for name in found.vectors)
    edited = EditedRows(rows, found.edits, found.vectors)
    ids = _texts(spec, seed=2)[0]
    expected = Forward(spec, rows).run(ids).numpy()
    assert_close(Forward(spec, edited).run(ids).numpy(), expected, relative=1e-5)


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8")], ids=str)
def test_folds_are_exact_in_every_dtype(scheme: Scheme, zoo: Zoo) -> None:
    spec, arrays = _loud(zoo.case("yarn"))
    arrays = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in arrays.items()}
    name = "model.layers.0.input_layernorm.weight"
    arrays[name][:4] = (2.0**-13, 2.0**-20, 0, 60000)  # the edges of float16, and below it
    arrays[name] = arrays[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    found = calibrate(ArrayRows(arrays), spec, _texts(spec), _schemes(spec, scheme))
    for edit in found.edits.values():
        for factors in (edit.rows, edit.columns):
            if factors is not None:
                mantissas, _ = np.frexp(factors)
                assert (mantissas == 0.5).all()
    assert name in found.vectors
    for vector, values in found.vectors.items():
        assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values), vector
        original = arrays[vector]
        exact = original.astype(np.float16).astype(np.float32) == original
        assert exact.sum() > 0.9 * exact.size
        assert (values.astype(np.float16).astype(np.float32) == values)[exact].all(), vector


@pytest.mark.parametrize(
    ("scheme", "at_most"), [(Scheme("int4", 32), 0.8), (Scheme("int4", 32, symmetric=False), 0.85)], ids=str
)
def test_int4_loses_less_of_a_model_with_outliers(scheme: Scheme, at_most: float, zoo: Zoo) -> None:
    """On other text than it was calibrated on."""
    spec, arrays = _loud(zoo.case("heads-0.5b"))
    rows, schemes = ArrayRows(arrays), _schemes(spec, scheme)
    found = calibrate(rows, spec, _texts(spec), schemes)
    texts = _texts(spec, seed=2)
    expected = hidden_states(rows, spec, texts)
    before = relative_error(hidden_states(RoundedRows(rows, schemes), spec, texts), expected)
    edited = EditedRows(rows, found.edits, found.vectors)
    after = relative_error(hidden_states(RoundedRows(edited, schemes, found.edits), spec, texts), expected)
    assert after < at_most * before, (before, after)
    assert all(unit["error_after"] <= unit["error_before"] for unit in found.report["units"])


def _w8a8(rows: RoundedRows, spec: ModelSpec, texts: list[list[int]]) -> torch.Tensor:
    """Output of the last layer with inputs rounded to int8, a scale for each token."""
    forward, found = Forward(spec, rows), []
    for ids in texts:
        hidden = forward.embed(ids)
        for layer in range(spec.num_layers):
            step = forward.layer(layer, hidden)
            while step.unit:
                scale = step.x.abs().amax(-1, keepdim=True) / 127
                x = (step.x / scale).round() * scale
                step.advance([multiply(rows, name, x) for name in step.names])
            hidden = step.hidden
        found.append(hidden)
    return torch.cat(found)


def test_int8_loses_less_where_inputs_are_rounded_too(zoo: Zoo) -> None:
    spec, arrays = _loud(zoo.case("heads-0.5b"))
    rows, schemes = ArrayRows(arrays), _schemes(spec, Scheme("int8"))
    found = calibrate(rows, spec, _texts(spec), schemes)
    texts = _texts(spec, seed=2)
    expected = hidden_states(rows, spec, texts)
    before = relative_error(_w8a8(RoundedRows(rows, schemes), spec, texts), expected)
    edited = EditedRows(rows, found.edits, found.vectors)
    after = relative_error(_w8a8(RoundedRows(edited, schemes, found.edits), spec, texts), expected)
    assert after < 0.6 * before, (before, after)
    assert all(edit.importance is None for edit in found.edits.values())


def test_nano_is_rounded_better_on_problems_it_has_not_seen() -> None:
    """Its last training steps were taken on rounded weights, so that there is little to win: an eighth."""
    spec, arrays = nano_weights()
    seen, held_out = nano_texts()
    rows, schemes = ArrayRows(arrays), _schemes(spec, Scheme("int4", 128))
    found = calibrate(rows, spec, seen, schemes)
    assert 1000 < found.report["num_tokens"] <= 2048
    edited = EditedRows(rows, found.edits, found.vectors)
    expected = hidden_states(rows, spec, held_out)
    assert_close(hidden_states(edited, spec, held_out).numpy(), expected.numpy(), relative=1e-5)
    before = relative_error(hidden_states(RoundedRows(rows, schemes), spec, held_out), expected)
    after = relative_error(hidden_states(RoundedRows(edited, schemes, found.edits), spec, held_out), expected)
    assert after < 0.95 * before, (before, after)


def test_fp8_is_left_alone_and_measured(zoo: Zoo) -> None:
    spec, arrays = _loud(zoo.case("odd"))
    rows = ArrayRows(arrays)
    found = calibrate(rows, spec, _texts(spec), _schemes(spec, Scheme("fp8")))
    assert not found.edits
    assert not found.vectors
    assert not found.report["units"]
    assert [(entry["layer"], entry["unit"]) for entry in found.ranges] == [
        *((layer, unit) for layer in range(spec.num_layers) for unit in UNITS),
        (None, "lm_head"),
    ]
    seen: dict[str, list[torch.Tensor]] = {}
    for ids in _texts(spec):
        forward = Forward(spec, rows)
        forward.run_layer(0, forward.embed(ids), observe=lambda unit, x: seen.setdefault(unit, []).append(x))
    for entry in found.ranges[:4]:
        x = torch.cat(seen[entry["unit"]]).abs()
        assert entry["max"] == pytest.approx(float(x.max()), rel=1e-4)
        assert entry["mean"] == pytest.approx(float(x.mean()), rel=1e-4)
        assert entry["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
        assert entry["p99.9"] == pytest.approx(float(np.quantile(x.numpy(), 0.999)), rel=0.1)  # of a sample's


def test_matrices_that_stay_as_they_are_are_not_touched(zoo: Zoo) -> None:
    """down_proj cannot be scaled without up_proj, o_proj not without v_proj; clipping by importance needs neither."""
    spec, arrays = _loud(zoo.case("yarn"))
    scheme = Scheme("int4", 32)
    schemes = {
        name: scheme
        for name in layer_matrices(spec)
        if not name.endswith(("gate_proj.weight", "up_proj.weight"))
        and not (
            name.startswith("model.layers.1.") and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        )
    }
    rows = ArrayRows(arrays)
    found = calibrate(rows, spec, _texts(spec), schemes)
    assert set(found.edits) <= set(schemes)
    assert _folded_units(found, 0) >= {"qkv"}
    assert not _folded_units(found, 0) & {"gate_up", "down"}
    assert not _folded_units(found, 1)
    assert found.edits["model.layers.0.mlp.down_proj.weight"].importance is not None
    assert not [name for name in found.vectors if "post_attention" in name or name.startswith("model.layers.1.")]
    edited = EditedRows(rows, found.edits, found.vectors)
    ids = _texts(spec, seed=2)[0]
    expected = Forward(spec, rows).run(ids).numpy()
    assert_close(Forward(spec, edited).run(ids).numpy(), expected, relative=1e-5)


@pytest.mark.parametrize("name", ["heads-0.5b", "mha"])
def test_the_head_is_clipped_by_importance_and_not_scaled(name: str, zoo: Zoo) -> None:
    """Of a tied model it is a copy of the embeddings, which have no edit."""
    spec, arrays = _loud(zoo.case(name))
    arrays["model.norm.weight"][::16] *= 12
    found = calibrate(ArrayRows(arrays), spec, _texts(spec), {HEAD: Scheme("int4", 128)})
    assert set(found.edits) == {HEAD}
    edit = found.edits[HEAD]
    assert edit.rows is None
    assert edit.columns is None
    assert edit.importance is not None
    assert edit.importance.shape == (spec.hidden_size,)
    assert not found.vectors
    (unit,) = found.report["units"]
    assert (unit["layer"], unit["unit"]) == (None, "lm_head")
    assert unit["error_after"] < unit["error_before"]


def test_equal_arguments_give_equal_calibrations_and_reports_are_json(zoo: Zoo) -> None:
    spec, arrays = _loud(zoo.case("yarn"))

    def run() -> Calibration:
        return calibrate(ArrayRows(arrays), spec, _texts(spec), _schemes(spec, Scheme("int4", 32)))

    one, two = run(), run()
    assert one.edits.keys() == two.edits.keys()
    for name in one.edits:
        for part in ("rows", "columns", "importance"):
            a, b = getattr(one.edits[name], part), getattr(two.edits[name], part)
            assert (a is None and b is None) or np.array_equal(a, b)
    assert one.report == two.report
    assert json.loads(json.dumps([one.ranges, one.report])) == [one.ranges, one.report]
    unit = one.report["units"][0]
    assert unit["scheme"] == "int4 g32"
    assert unit["alpha"] in (0, *balance.INT4_ALPHAS)
    assert 1 / 16 <= unit["smallest_factor"] <= 1 <= unit["largest_factor"] <= 16


def test_layer_inputs_for_whoever_chooses_offsets(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, arrays = _loud(zoo.case("yarn"))
    rows, texts = ArrayRows(arrays), _texts(spec)
    found = calibrate(rows, spec, texts, _schemes(spec, Scheme("fp8")))
    assert len(found.hidden) == spec.num_layers
    forward = Forward(spec, rows)
    states = [forward.embed(ids) for ids in texts]
    for layer in range(spec.num_layers):
        assert_close(found.hidden[layer], torch.cat(states).numpy(), relative=1e-5)
        states = [forward.run_layer(layer, hidden) for hidden in states]
    monkeypatch.setattr(calibrate_module, "_MAX_HIDDEN_BYTES", 50 * 4 * spec.num_layers * spec.hidden_size)
    fewer = calibrate(rows, spec, texts, {})
    assert [states.shape for states in fewer.hidden] == [(50, spec.hidden_size)] * spec.num_layers
    assert np.array_equal(fewer.hidden[1][[0, -1]], found.hidden[1][[0, -1]])


def test_refusals(zoo: Zoo) -> None:
    case = zoo.case("odd")
    spec, schemes = Checkpoint.open(case.checkpoint).spec, {}
    for token_ids in ([], [[]]):
        with pytest.raises(UsageError, match="has no tokens"):
            calibrate(ArrayRows(case.weights), spec, token_ids, schemes)
    with pytest.raises(UsageError, match="token ids"):
        calibrate(ArrayRows(case.weights), spec, [[spec.vocab_size]], schemes)
    broken = {name: array.copy() for name, array in case.weights.items()}
    broken["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    with pytest.raises(CheckpointError, match="inputs of down of layer 1 are not finite; expected finite weights"):
        calibrate(ArrayRows(broken), spec, [[1, 2, 3]], schemes)


def test_a_wide_model_is_calibrated_on_samples(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a few rows and tokens instead of all the choice is hardly worse."""
    spec, arrays = _loud(zoo.case("yarn"))
    rows, schemes = ArrayRows(arrays), _schemes(spec, Scheme("int4", 32))
    texts, held_out = _texts(spec), _texts(spec, seed=2)
    expected = hidden_states(rows, spec, held_out)

    def error(found: Calibration | None) -> Any:
        edits, vectors = ({}, {}) if found is None else (found.edits, found.vectors)
        edited = EditedRows(rows, edits, vectors)
        return relative_error(hidden_states(RoundedRows(edited, schemes, edits), spec, held_out), expected)

    whole = error(calibrate(rows, spec, texts, schemes))
    monkeypatch.setattr(balance, "NUM_SAMPLE_WEIGHTS", 1 << 15)
    monkeypatch.setattr(balance, "NUM_SAMPLE_TOKENS", 32)
    sampled = error(calibrate(rows, spec, texts, schemes))
    assert sampled < 1.15 * whole < error(None)
