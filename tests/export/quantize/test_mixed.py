"""Mixed precision: errors as plain runs give them, choices as good as can be, budgets kept, the file of overrides."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.quantize import forward as forward_module
from qwen_rt.export.quantize.forward import UNITS, Forward, matrix_names
from qwen_rt.export.quantize.mixed import (
    MixedOption,
    MixedUnit,
    choose_mixed,
    raise_greedily,
    stored_bytes,
    to_toml,
)
from qwen_rt.export.quantize.plan import SchemeOptions, layer_matrices, plan_schemes
from qwen_rt.progress import format_count
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec

from ...cases import Zoo
from .models import ArrayRows, Arrays, RoundedRows, hidden_states, nano_texts, nano_weights, relative_error

INT4, INT8 = Scheme("int4", 32), Scheme("int8")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


def _model(zoo: Zoo, name: str = "yarn") -> tuple[ModelSpec, Arrays]:
    case = zoo.case(name)
    return Checkpoint.open(case.checkpoint).spec, dict(case.weights)


def _texts(spec: ModelSpec, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.vocab_size, length).tolist() for length in (40, 17, 60)]


def _bytes(spec: ModelSpec, scheme: Scheme | None, head: Scheme | None = None) -> int:
    """Of the layers' matrices and the head, by the parts that are stored."""
    shapes = spec.parameters()
    head_shape = shapes[EMBEDDING]
    return sum(stored_bytes(scheme, shapes[name]) for name in layer_matrices(spec)) + stored_bytes(head, head_shape)


def test_stored_bytes() -> None:
    assert stored_bytes(None, (10, 64)) == 1280
    assert stored_bytes(None, (10, 64), 4) == 2560
    assert stored_bytes(Scheme("int8"), (10, 64)) == 640 + 40
    assert stored_bytes(Scheme("int4", 32), (10, 64)) == 320 + 2 * 20
    assert stored_bytes(Scheme("int4", 16, symmetric=False), (10, 64)) == 320 + 2 * 40 + 20


@pytest.mark.parametrize("name", ["yarn", "heads-72b"])
def test_errors_are_those_of_a_layer_with_only_that_unit_rounded(
    name: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_module, "BLOCK_BYTES", 100_000)
    spec, arrays = _model(zoo, name)
    base = INT4 if name == "yarn" else Scheme("int4")
    rows = ArrayRows(arrays)
    texts = _texts(spec)
    choice = choose_mixed(rows, spec, texts, base, _bytes(spec, base), [None, INT8])
    assert choice.num_tokens == 117
    assert len(choice.units) == 4 * spec.num_layers
    states = [Forward(spec, rows).embed(ids) for ids in texts]
    for layer in range(spec.num_layers):
        after = [Forward(spec, rows).run_layer(layer, hidden) for hidden in states]
        for unit in choice.units[4 * layer : 4 * layer + 4]:
            assert unit.layer == layer
            assert unit.names == matrix_names(layer, unit.unit)
            assert [option.scheme for option in unit.options] == [base, INT8, None]
            for option in unit.options:
                changed = Forward(spec, RoundedRows(rows, dict.fromkeys(unit.names, option.scheme)))
                found = [changed.run_layer(layer, hidden) for hidden in states]
                expected = relative_error(torch.cat(found), torch.cat(after))
                assert option.error == pytest.approx(expected, rel=1e-3, abs=1e-7), (unit.unit, option.scheme)
        states = after


@pytest.mark.parametrize("name", ["heads-0.5b", "yarn"])
def test_the_error_of_the_head_is_that_of_centred_logits(name: str, zoo: Zoo) -> None:
    """Tied or not: a tied head is a copy of the embeddings, and takes part as one."""
    spec, arrays = _model(zoo, name)
    rows, ids = ArrayRows(arrays), _texts(spec)[0]
    choice = choose_mixed(rows, spec, [ids], INT4, _bytes(spec, INT4, INT4), head=True)
    unit = choice.units[-1]
    assert (unit.layer, unit.unit, unit.names) == (None, "lm_head", (HEAD,))
    assert choice.schemes[HEAD] == INT4
    source = EMBEDDING if spec.tie_word_embeddings else HEAD
    logits = Forward(spec, rows).run(ids)
    hidden = hidden_states(rows, spec, [ids])
    rounded = Forward(spec, RoundedRows(rows, {source: INT4})).logits(hidden)
    expected = relative_error(*(y - y.mean(-1, keepdim=True) for y in (rounded - logits + logits, logits)))
    assert unit.options[0].error == pytest.approx(expected, rel=2e-3)
    assert unit.options[-1] == MixedOption(None, 2 * spec.vocab_size * spec.hidden_size, 0)


def _with_fragile(arrays: Arrays, name: str) -> Arrays:
    """Columns of a matrix that are large where its inputs are small: the product stays as large as it was, but the
    groups of those columns are rounded to nothing else."""
    found = {key: array.copy() for key, array in arrays.items()}
    columns = np.ones(found[name].shape[1], np.float32)
    columns[::16] = 40
    found[name] *= columns
    norm = {"q": "input_layernorm", "g": "post_attention_layernorm"}
    maker = name.split(".")[-2]
    if maker in ("q_proj", "gate_proj"):
        found[f"{name.rsplit('.', 3)[0]}.{norm[maker[0]]}.weight"] /= columns
    else:
        found[name.replace("down_proj", "up_proj")] /= columns[:, None]
    return found


def test_a_fragile_unit_is_raised_and_beats_every_uniform_choice_of_that_size(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    fragile = "model.layers.1.mlp.down_proj.weight"
    rows = ArrayRows(_with_fragile(arrays, fragile))
    shapes, least = spec.parameters(), _bytes(spec, INT4)
    one_more = stored_bytes(INT8, shapes[fragile]) - stored_bytes(INT4, shapes[fragile])
    choice = choose_mixed(rows, spec, _texts(spec), INT4, least + one_more)
    raised = {name for name, scheme in choice.schemes.items() if scheme != INT4}
    assert raised == {fragile}
    assert choice.schemes[fragile] == INT8
    assert choice.stored_bytes == least + one_more

    texts = _texts(spec, seed=2)
    expected = hidden_states(rows, spec, texts)

    def error(schemes: dict[str, Scheme | None]) -> float:
        return relative_error(hidden_states(RoundedRows(rows, schemes), spec, texts), expected)

    names = layer_matrices(spec)
    mixed = error(choice.schemes)
    assert mixed < 0.6 * error(dict.fromkeys(names, INT4))
    finer = Scheme("int4", 16)
    assert _bytes(spec, finer) > choice.stored_bytes
    assert mixed < 0.8 * error(dict.fromkeys(names, finer))
    for other in names:
        unit = next(unit for unit in choice.units if other in unit.names)
        if other != fragile and len(unit.names) == 1 and shapes[other] == shapes[fragile]:
            assert mixed < 0.6 * error(dict.fromkeys(names, INT4) | {other: INT8})


def test_nano_is_closer_to_itself_than_in_any_uniform_scheme_of_that_size() -> None:
    spec, arrays = nano_weights()
    rows = ArrayRows(arrays)
    seen, held_out = nano_texts()
    names = layer_matrices(spec)
    expected = hidden_states(rows, spec, held_out)

    def error(schemes: Mapping[str, Scheme | None]) -> float:
        return relative_error(hidden_states(RoundedRows(rows, schemes), spec, held_out), expected)

    for finer in (Scheme("int4", 32), Scheme("int4", 16)):
        choice = choose_mixed(rows, spec, seen, Scheme("int4", 128), _bytes(spec, finer))
        assert 0.99 * _bytes(spec, finer) < choice.stored_bytes <= _bytes(spec, finer)
        assert choice.schemes["model.layers.0.mlp.down_proj.weight"] == INT8  # the largest error by far
        mixed = error(choice.schemes)
        assert mixed < 0.95 * error(dict.fromkeys(names, finer))
        assert choice.error == pytest.approx(mixed, rel=0.15)  # errors of units are about independent


def test_the_budget_is_kept_to_the_byte_and_its_ends_are_uniform(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    rows, texts = ArrayRows(arrays), [[1, 2, 3, 4, 5]]
    least, most = _bytes(spec, INT4), _bytes(spec, None)
    assert set(choose_mixed(rows, spec, texts, INT4, least).schemes.values()) == {INT4}
    assert set(choose_mixed(rows, spec, texts, INT4, most).schemes.values()) == {None}
    errors = []
    for budget in np.linspace(least, most, 9).astype(int).tolist():
        choice = choose_mixed(rows, spec, texts, INT4, budget)
        sizes = (stored_bytes(scheme, spec.parameters()[name]) for name, scheme in choice.schemes.items())
        assert choice.stored_bytes == sum(sizes) + stored_bytes(None, arrays[EMBEDDING].shape) <= budget
        errors.append(choice.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert errors[1] < 0.9 * errors[0]


def test_budgets_that_cannot_be_met(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    rows, texts = ArrayRows(arrays), [[1, 2, 3]]
    least, most = _bytes(spec, INT4), _bytes(spec, None)
    with pytest.raises(UsageError) as low:
        choose_mixed(rows, spec, texts, INT4, least - 1)
    assert f"({least - 1:,} bytes) does not hold the matrices and the LM head in int4 g32" in str(low.value)
    assert f"expected at least {format_count(least, 'B')} ({least:,})" in str(low.value)
    with pytest.raises(UsageError) as high:
        choose_mixed(rows, spec, texts, INT4, most + 1)
    assert f"({most + 1:,} bytes) holds all matrices and the LM head in bf16" in str(high.value)
    assert f"expected at most {format_count(most, 'B')} ({most:,}); build with --precision bf16" in str(high.value)
    with pytest.raises(UsageError, match=r"in the highest precision; expected at most .*; leave it out and choose"):
        choose_mixed(rows, spec, texts, INT4, most, [INT8])


def test_what_the_head_counts_as(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    rows, texts = ArrayRows(arrays), [[1, 2, 3]]
    for scheme in (INT4, INT8, None):
        least = _bytes(spec, INT4, scheme)
        choice = choose_mixed(rows, spec, texts, INT4, least, head_scheme=scheme)
        assert choice.stored_bytes == least
        assert HEAD not in choice.schemes
        with pytest.raises(UsageError, match="does not hold"):
            choose_mixed(rows, spec, texts, INT4, least - 1, head_scheme=scheme)
    assert choose_mixed(rows, spec, texts, INT4, _bytes(spec, INT4, INT4), head=True).schemes[HEAD] == INT4


def test_candidates(zoo: Zoo) -> None:
    """Those that are no larger than the base, or do not fit a matrix, are left out; a base that does not fit is not."""
    spec, arrays = _model(zoo, "odd")  # C = 192, F = 231
    rows, texts = ArrayRows(arrays), [[1, 2, 3]]
    budget = _bytes(spec, None) - 1
    with pytest.raises(
        UsageError, match=r"model.layers.0.mlp.down_proj.weight has 231 columns; expected an even number"
    ):
        choose_mixed(rows, spec, texts, Scheme("int4"), budget)
    grouped = Scheme("int8", 64)
    choice = choose_mixed(rows, spec, texts, INT8, budget, [None, Scheme("int4"), Scheme("fp8"), grouped, INT8])
    offered = {unit.unit: [option.scheme for option in unit.options] for unit in choice.units}
    assert offered == {
        "qkv": [INT8, grouped, None],
        "o": [INT8, grouped, None],
        "gate_up": [INT8, grouped, None],
        "down": [INT8, None],
    }
    for unit in choice.units:
        sizes = [option.nbytes for option in unit.options]
        assert sizes == sorted(sizes)
        assert unit.options[-1].error == 0
    for base in (INT8, Scheme("fp8")):
        choice = choose_mixed(rows, spec, texts, base, budget)
        assert [option.scheme for option in choice.units[0].options] == [base, None]


def test_weights_that_are_not_finite_are_refused(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    broken = {name: array.copy() for name, array in arrays.items()}
    broken["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds nan in row 3, column 4"):
        choose_mixed(ArrayRows(broken), spec, [[1, 2]], INT4, _bytes(spec, INT4))
    broken = dict(arrays) | {"model.layers.0.self_attn.v_proj.bias": np.full(128, np.inf, np.float32)}
    with pytest.raises(CheckpointError, match="the output of layer 0 is not finite"):
        choose_mixed(ArrayRows(broken), spec, [[1, 2]], INT4, _bytes(spec, INT4))


@pytest.mark.parametrize("head", [False, True])
def test_the_file_of_overrides_gives_the_same_schemes(head: bool, zoo: Zoo, tmp_path: Path) -> None:
    spec, arrays = _model(zoo)
    base = Scheme("int4", 32, symmetric=False)
    budget = (_bytes(spec, base, base) + _bytes(spec, None)) // 2
    choice = choose_mixed(ArrayRows(arrays), spec, _texts(spec), base, budget, head=head)
    assert {str(scheme) for scheme in choice.schemes.values()} >= {"int8", "None"}
    text = to_toml(choice)
    file = tmp_path / "overrides.toml"
    file.write_text(text, encoding="utf-8")
    for precision in ("int4", "fp8"):
        planned = plan_schemes(spec, SchemeOptions(precision, group_size=None, overrides=file))
        assert planned == {name: scheme for name, scheme in choice.schemes.items() if scheme is not None}
    assert f"{choice.stored_bytes:,} bytes of {budget:,}" in text
    assert text.count(" = ") == 7 * spec.num_layers + head + text.count("precision =") + text.count("group_size =") + (
        text.count("symmetric =")
    )


def test_the_report_is_json_and_says_why(zoo: Zoo) -> None:
    spec, arrays = _model(zoo)
    choices = [
        choose_mixed(ArrayRows(arrays), spec, _texts(spec), INT4, 2 * _bytes(spec, INT4) // 1, head=True, max_tokens=50)
        for _ in range(2)
    ]
    report = choices[0].report
    assert report == choices[1].report
    assert json.loads(json.dumps(report)) == report
    assert report["base"] == "int4 g32"
    assert report["num_tokens"] == choices[0].num_tokens <= 50
    assert report["error"] < report["error_of_base"]
    assert sum(row["bytes"] for row in report["units"]) == report["stored_bytes"] <= report["budget_bytes"]
    for row in report["units"]:
        assert list(row["errors"]) == ["int4 g32", "int8", "bf16"]
        assert row["chosen"] in row["errors"]
        assert row["errors"]["int4 g32"] > row["errors"]["int8"] > row["errors"]["bf16"] == 0
    assert [row["unit"] for row in report["units"]] == [*list(UNITS) * spec.num_layers, "lm_head"]


# ── The choice alone ─────────────────────────────────────────────────────────────────────────────────────────────────


def _drawn(rng: np.random.Generator, count: int) -> list[MixedUnit]:
    units = []
    for index in range(count):
        size, error = int(rng.integers(10, 60)), float(rng.uniform(0.01, 0.2))
        options = (
            MixedOption(INT4, size, error),
            MixedOption(INT8, 2 * size, error * float(rng.uniform(0.02, 0.9))),
            MixedOption(None, 4 * size, 0.0),
        )
        units.append(MixedUnit(index, "o", (f"w{index}",), options))
    return units


def _squares(units: Sequence[MixedUnit]) -> float:
    return sum(unit.choice.error**2 for unit in units)


def _size(units: Sequence[MixedUnit]) -> int:
    return sum(unit.choice.nbytes for unit in units)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_as_good_as_trying_everything(seed: int) -> None:
    """Optimal for the size it arrives at before a raise is passed over; within one raise of the optimum of a budget."""
    units = _drawn(np.random.default_rng(seed), 6)
    every = [
        [MixedUnit(u.layer, u.unit, u.names, u.options, c) for u, c in zip(units, numbers, strict=True)]
        for numbers in itertools.product(range(3), repeat=6)
    ]
    least, most = _size(units), 4 * _size(units)
    largest = max(
        one.error**2 - other.error**2 for unit in units for one, other in itertools.combinations(unit.options, 2)
    )
    for budget in np.linspace(least, most, 20).astype(int).tolist():
        found = raise_greedily(units, budget - least)
        assert _size(found) <= budget
        best = min(_squares(tried) for tried in every if _size(tried) <= budget)
        assert _squares(found) <= best + largest
        same_size = min(_squares(tried) for tried in every if _size(tried) <= _size(found))
        assert _squares(found) <= 1.6 * same_size + 1e-12
    assert _squares(raise_greedily(units, most)) == 0


def test_equal_gains_go_to_the_earlier_unit_and_no_raise_is_made_for_nothing() -> None:
    options = (MixedOption(INT4, 10, 0.1), MixedOption(INT8, 20, 0.01), MixedOption(None, 40, 0.02))
    units = [MixedUnit(index, "o", ("w",), options) for index in range(3)]
    assert [unit.chosen for unit in raise_greedily(units, 25)] == [1, 1, 0]
    assert [unit.chosen for unit in raise_greedily(units, 1000)] == [1, 1, 1]
