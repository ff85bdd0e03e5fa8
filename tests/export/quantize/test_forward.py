"""The streaming forward pass beside transformers in float32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, QwenRtError, UsageError
from qwen_rt.export.quantize import forward as module
from qwen_rt.export.quantize.forward import UNITS, Forward, matrix_names, multiply, read_blocks
from qwen_rt.quantization import fake_quantize_kv, key_offset_name, value_offset_name
from qwen_rt.row_reader import StoredRows
from qwen_rt.tolerances import PARITY_RELATIVE_FP32

from ...cases import Zoo
from ...checkpoints import SHAPES, load_reference, reference_logits
from ...compare import assert_close
from .broken import ArrayRows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, ragged at the end, so that small matrices come in many."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 50_000)


def _opened(folder: Path | str) -> tuple[Checkpoint, StoredRows]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, StoredRows(checkpoint.tensors)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name: str, zoo: Zoo) -> None:
    case = zoo.case(name)
    checkpoint, rows = _opened(case.checkpoint)
    with rows:
        logits = Forward(checkpoint.spec, rows).run(case.ids)
    assert_close(logits.numpy(), case.logits, relative=PARITY_RELATIVE_FP32, what=name)


def test_nano_is_as_transformers_computes_it() -> None:
    checkpoint, rows = _opened("nano")
    ids = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, 150)
    expected = reference_logits(load_reference(checkpoint.path), ids[None])[0]
    with rows:
        assert_close(Forward(checkpoint.spec, rows).run(ids).numpy(), expected, relative=PARITY_RELATIVE_FP32)


def test_several_texts_at_once_are_each_as_alone(zoo: Zoo) -> None:
    case = zoo.case("heads-1.5b")
    checkpoint, rows = _opened(case.checkpoint)
    forward = Forward(checkpoint.spec, rows)
    texts = np.stack([case.ids, case.ids[::-1]])
    together = forward.run(texts)
    for text, logits in zip(texts, together, strict=True):
        assert_close(logits.numpy(), forward.run(text).numpy(), relative=1e-5)
    rows.close()


def test_a_layer_steps_through_its_units_and_takes_overrides(zoo: Zoo) -> None:
    """Replacing each matrix by itself changes nothing, by zero what it should."""
    case = zoo.case("odd")
    checkpoint, rows = _opened(case.checkpoint)
    forward = Forward(checkpoint.spec, rows)
    hidden = forward.embed(case.ids)
    before = hidden.clone()
    seen: dict[str, torch.Tensor] = {}
    plain = forward.run_layer(0, hidden, observe=seen.__setitem__)
    assert torch.equal(hidden, before)
    assert list(seen) == list(UNITS)
    names = [name for unit in UNITS for name in matrix_names(0, unit)]
    assert {unit: x.shape[-1] for unit, x in seen.items()} == {
        unit: case.weights[matrix_names(0, unit)[0]].shape[1] for unit in UNITS
    }
    itself: Any = {name: case.weights[name] for name in names}
    assert_close(forward.run_layer(0, hidden, itself).numpy(), plain.numpy(), relative=1e-6)
    writes = {
        name: np.zeros_like(case.weights[name])
        for name in names
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    assert len(writes) == 2
    assert torch.equal(forward.run_layer(0, hidden, writes), hidden)
    rows.close()


@pytest.mark.parametrize("kv_format", ["fp8", "int8"])
def test_keys_and_values_are_rounded_as_the_cache_rounds_them(kv_format: str, zoo: Zoo) -> None:
    """The reference is `plugins/reference.py` in float64, with the contract's formula written out for one layer."""
    from qwen_rt.plugins import reference

    case = zoo.case("yarn")
    spec = Checkpoint.open(case.checkpoint).spec
    arrays = dict(case.weights)
    prefix = "model.layers.0.self_attn"
    heads = (spec.num_kv_heads, spec.head_dim)
    for proj, name in (("k_proj", key_offset_name(0)), ("v_proj", value_offset_name(0))):
        bias = arrays[f"{prefix}.{proj}.bias"]
        arrays[name] = (0.75 * bias).reshape(heads)
        arrays[f"{prefix}.{proj}.bias"] = bias - 0.75 * bias
    source = Forward(spec, ArrayRows(case.weights))
    hidden = source.embed(case.ids)
    step = Forward(spec, ArrayRows(arrays), kv_format).layer(0, hidden)
    products = [multiply(ArrayRows(arrays), name, step.x) for name in step.names]
    step.advance(products)

    tables = reference.rotary_tables(
        np.arange(40)[None], spec.rope.inv_freq(spec.head_dim), spec.rope.attention_scaling
    )

    def split(array: Any, num_heads: int) -> Any:
        return np.asarray(array, np.float64).reshape(1, 40, num_heads, spec.head_dim).transpose(0, 2, 1, 3)

    def turn(x: Any) -> Any:
        return reference.apply_rotary(x, *tables)

    q, k, v = (p.numpy() + arrays[f"{prefix}.{n}_proj.bias"] for p, n in zip(products, "qkv", strict=True))
    k_offset = np.broadcast_to(arrays[key_offset_name(0)][None, :, None], (1, heads[0], 40, heads[1]))
    keys = fake_quantize_kv(turn(split(k, heads[0])), kv_format) + turn(k_offset)
    values = fake_quantize_kv(split(v, heads[0]), kv_format) + arrays[value_offset_name(0)][None, :, None]
    expected = reference.attention(
        turn(split(q, spec.num_heads)), keys, values, np.zeros(1, np.int64), spec.head_dim**-0.5
    )
    found = step.x.reshape(40, spec.num_heads, spec.head_dim).transpose(0, 1).numpy()
    # A value on the edge of two codes may fall to the other side in float32: one step of one element among 40 keys.
    assert_close(found, expected[0], relative=2e-3, cosine=0.99999)
    exact = source.layer(0, hidden)
    exact.advance([multiply(ArrayRows(case.weights), name, exact.x) for name in exact.names])
    difference = float((step.x - exact.x).norm() / exact.x.norm())
    assert 1e-4 < difference < 0.1, difference


def test_blocks_cover_every_row_once_in_order(zoo: Zoo) -> None:
    case = zoo.case("odd")
    source = ArrayRows(case.weights)
    names = matrix_names(1, "qkv")
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    for block in read_blocks((source, source), names):
        assert block.start == sum(map(len, found[block.name]))
        assert torch.equal(*block.rows)
        found[block.name].append(block.rows[0].numpy())
    assert len(found[names[0]]) > 2
    for name in names:
        assert np.array_equal(np.concatenate(found[name]), case.weights[name])


def test_errors_of_a_reader_reach_the_caller_and_no_one_reads_on(zoo: Zoo) -> None:
    class Broken(ArrayRows):
        def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            if start:
                raise CheckpointError("the disk is gone")
            return super().rows(name, start, stop)

    case = zoo.case("odd")
    spec = Checkpoint.open(case.checkpoint).spec
    with pytest.raises(CheckpointError, match="the disk is gone"):
        Forward(spec, Broken(case.weights)).run([1, 2])
    reading = 0

    class Counting(ArrayRows):
        def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            nonlocal reading
            reading += 1
            time.sleep(0.01)
            found = super().rows(name, start, stop)
            reading -= 1
            return found

    blocks = read_blocks((Counting(case.weights),), matrix_names(0, "gate_up"))
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert reading == 0


def test_refusals(zoo: Zoo) -> None:
    case = zoo.case("odd")
    spec = Checkpoint.open(case.checkpoint).spec
    source = ArrayRows(case.weights)
    forward = Forward(spec, source)
    for ids in ([], [-1], [spec.vocab_size]):
        with pytest.raises(UsageError, match="token ids"):
            forward.embed(ids)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"up_proj.weight has shape \[231, 192\]; expected 7 columns"):
        multiply(source, name, torch.ones(2, 7))
    other = ArrayRows(case.weights | {name: case.weights[name][:-1]})
    with pytest.raises(QwenRtError, match="has shapes"):
        list(read_blocks((source, other), (name,)))
