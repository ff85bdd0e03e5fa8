"""Bundles against transformers in float32, on checkpoints of many shapes and through every way of feeding tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen_rt.bundle import Bundle
from qwen_rt.runtime.session import CpuSession
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32, PARITY_RELATIVE_FP32

from ..cases import NUM_TOKENS, Case, Zoo, all_at_once, in_chunks
from ..checkpoints import SHAPES, load_reference, reference_logits
from ..compare import assert_close

ZERO = np.zeros(1, np.int64)


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    return zoo.case(request.param)


def test_the_shapes_cover_what_they_should() -> None:
    shapes = SHAPES.values()
    assert len(shapes) >= 8
    assert {s.head_dim or s.hidden_size // s.num_heads for s in shapes} >= {64, 128}
    assert {s.num_kv_heads for s in shapes} >= {1, 2, 8}
    assert {s.eps for s in shapes} == {1e-5, 1e-6}
    assert {s.rope["rope_theta"] for s in shapes} == {1e4, 1e6}
    assert {s.rope["rope_type"] for s in shapes} == {"default", "linear", "yarn"}
    assert {s.dtype for s in shapes} == {"bfloat16", "float16", "float32"}
    assert {s.tied for s in shapes} == {True, False}


def test_checkpoints_have_several_shards(case: Case) -> None:
    assert len(list(case.checkpoint.glob("*.safetensors"))) > 1 or case.shape.num_layers == 1


def test_every_position_equals_transformers(case: Case) -> None:
    assert_close(case.whole, case.logits, relative=PARITY_RELATIVE_FP32)


def test_token_by_token_equals_transformers(case: Case) -> None:
    assert_close(in_chunks(case.session, case.ids, 1), case.logits, relative=PARITY_RELATIVE_FP32)


@pytest.mark.parametrize("chunk", [2, 7, 16, NUM_TOKENS - 1, NUM_TOKENS])
def test_prefill_in_chunks_equals_prefill_in_one_go(case: Case, chunk: int) -> None:
    last = np.minimum(np.arange(chunk, NUM_TOKENS + chunk, chunk), NUM_TOKENS) - 1
    found = in_chunks(case.session, case.ids, chunk)
    assert_close(found, case.whole[last], relative=CHUNKING_RELATIVE_FP32, cosine=1 - 1e-9)


def test_decoding_after_a_prefill_equals_transformers(case: Case) -> None:
    split = 29
    cache = case.session.new_cache(1, NUM_TOKENS)
    case.session.run(cache, 0, case.ids[None, :split], ZERO, np.array([split - 1]))
    steps = [
        case.session.run(cache, 0, case.ids[None, [position]], np.array([position]), ZERO)[0].copy()
        for position in range(split, NUM_TOKENS)
    ]
    assert_close(np.stack(steps), case.logits[split:], relative=PARITY_RELATIVE_FP32)


def test_a_ragged_batch_equals_its_rows_one_by_one(case: Case) -> None:
    """Through one padded prefill and further steps at ragged positions, the padding being tokens like any other."""
    session, lengths, steps = case.session, np.array([1, 5, 17, 30, 2]), 4
    rows = np.stack([np.roll(case.ids, shift) for shift in range(len(lengths))])  # [B, S]
    longest = int(lengths.max())
    padded = np.where(np.arange(longest) < lengths[:, None], rows[:, :longest], case.shape.vocab_size - 2)
    cache = session.new_cache(len(lengths), longest + steps)
    found = [session.run(cache, 0, padded, np.zeros_like(lengths), lengths - 1).copy()]
    for step in range(steps):
        positions = lengths + step
        tokens = np.take_along_axis(rows, positions[:, None], 1)
        found.append(session.run(cache, 0, tokens, positions, np.zeros_like(positions)).copy())
    for row, length in enumerate(lengths):
        alone = session.new_cache(1, length + steps)
        expected = [session.run(alone, 0, rows[None, row, :length], ZERO, np.array([length - 1]))[0].copy()]
        for position in range(length, length + steps):
            expected.append(
                session.run(alone, 0, rows[row, position][None, None], np.array([position]), ZERO)[0].copy()
            )
        actual = np.stack([logits[row] for logits in found])
        assert_close(actual, np.stack(expected), relative=CHUNKING_RELATIVE_FP32, cosine=1 - 1e-9, what=f"row {row}")


def _nan(array: NDArray[np.float32]) -> None:
    array[:] = np.nan


def _huge(array: NDArray[np.float32]) -> None:
    array[:] = 1e30


def _infinite(array: NDArray[np.float32]) -> None:
    array[:] = np.inf


@pytest.mark.parametrize("poison", [_nan, _huge, _infinite])
@pytest.mark.parametrize("name", ["heads-0.5b", "heads-72b", "odd"])
def test_unused_cache_rows_never_matter(zoo: Zoo, name: str, poison: Callable[[NDArray[np.float32]], None]) -> None:
    case = zoo.case(name)
    lengths = np.array([3, 20, 11])
    rows = np.stack([case.ids] * 3)
    results = []
    for spoil in (poison, lambda array: None):
        cache = case.session.new_cache(3, NUM_TOKENS + 3)
        for array in (*cache.keys, *cache.values):
            spoil(array)
        logits = [case.session.run(cache, 0, rows[:, :20], np.zeros(3, np.int64), lengths - 1).copy()]
        for step in range(3):
            positions = lengths + step
            tokens = np.take_along_axis(rows, positions[:, None], 1)
            logits.append(case.session.run(cache, 0, tokens, positions, np.zeros(3, np.int64)).copy())
        chunk = rows[:1, 6:13]  # row 0 stands at 6: a chunk in the middle of a dirty cache
        logits.append(case.session.run(cache, 0, chunk, np.array([6]), np.array([6])).copy())
        results.append(np.concatenate(logits))
    assert np.array_equal(results[0], results[1])
    assert np.isfinite(results[0]).all()


def test_a_dirty_row_serves_the_next_text_as_a_fresh_one(case: Case) -> None:
    cache = case.session.new_cache(1, NUM_TOKENS)
    in_chunks(case.session, case.ids[::-1].copy(), NUM_TOKENS, cache)
    again = in_chunks(case.session, case.ids[:31], 7, cache)
    assert np.array_equal(again, in_chunks(case.session, case.ids[:31], 7))


def test_runs_are_bit_equal_when_repeated(case: Case) -> None:
    assert np.array_equal(all_at_once(case.session, case.ids), case.whole)


def test_a_bundle_built_straight_from_the_checkpoint_is_the_same(zoo: Zoo) -> None:
    case = zoo.case("yarn")
    direct = case.build("direct")
    assert (direct / "graph/rank0.onnx").read_bytes() == (case.bundle / "graph/rank0.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "precision"), [("odd", "bf16"), ("odd", "fp16"), ("yarn", "fp32"), ("one-layer", "fp32")]
)
def test_stored_precision_is_all_that_changes(zoo: Zoo, name: str, precision: str) -> None:
    """A bundle that rounds its weights equals transformers on weights rounded the same way, to float32 accuracy."""
    case = zoo.case(name)
    model = load_reference(case.checkpoint)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype).float())
    session = CpuSession(Bundle.open(case.build(precision, case.portable, precision=precision)), 1)
    expected = reference_logits(model, case.ids[None])[0]
    assert_close(all_at_once(session, case.ids), expected, relative=PARITY_RELATIVE_FP32)
    if precision != "fp32":
        with pytest.raises(AssertionError, match="out of tolerance"):  # the rounding is real
            assert_close(expected, case.logits, relative=PARITY_RELATIVE_FP32)


def test_a_self_contained_bundle_needs_no_checkpoint(zoo: Zoo) -> None:
    case = zoo.case("odd")
    bundle = Bundle.open(case.build("self-contained", case.portable, self_contained=True))
    assert all(path.is_relative_to(bundle.path.resolve()) for path in bundle.weight_files.values())
    found = all_at_once(CpuSession(bundle, 1), case.ids)
    assert np.array_equal(found, case.whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_portable_graph_of_a_narrow_dtype_gives_the_same_bundle(zoo: Zoo, dtype: str) -> None:
    """`qwen-rt export`, then `qwen-rt build` of what it wrote: nothing of the narrow dtype stays in the CPU graph."""
    case = zoo.case("tiny")
    session = CpuSession(Bundle.open(case.build(f"from-{dtype}", case.narrow(dtype))), 1)
    assert np.array_equal(all_at_once(session, case.ids), case.whole)
