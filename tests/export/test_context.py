"""Long positions: YaRN beyond the context of training, exact limits of `max_length`, angles far out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import UsageError
from qwen_rt.plugins import reference
from qwen_rt.runtime.session import CpuSession
from qwen_rt.tolerances import PARITY_RELATIVE_FP32

from ..cases import Zoo, in_chunks
from ..checkpoints import SHAPES, random_ids, reference_logits
from ..compare import assert_close

YARN = [name for name, shape in SHAPES.items() if shape.rope["rope_type"] == "yarn"]
ZERO = np.zeros(1, np.int64)


@pytest.mark.parametrize("name", YARN)
def test_yarn_equals_transformers_up_to_the_last_position(zoo: Zoo, name: str) -> None:
    """32 original positions times 4: positions 32 to 127 exist only by YaRN."""
    case = zoo.case(name)
    spec = Checkpoint.open(case.checkpoint).spec
    assert spec.rope.original_max_position_embeddings == 32
    assert case.session.max_length == spec.context_length == 128
    ids = random_ids(case.shape, 128)
    expected = reference_logits(case.reference, ids[None])[0]
    assert_close(in_chunks(case.session, ids, 1), expected, relative=PARITY_RELATIVE_FP32)
    assert_close(in_chunks(case.session, ids, 32), expected[31::32], relative=PARITY_RELATIVE_FP32)


@pytest.mark.parametrize("max_length", [1, 2, 17])
def test_a_bundle_reaches_its_max_length_exactly(zoo: Zoo, max_length: int) -> None:
    """The last position is right; the cache is full to its last row; one token more has nowhere to go."""
    case = zoo.case("yarn")
    folder = case.build(f"max-{max_length}", case.portable, max_length=max_length)
    bundle = Bundle.open(folder)
    session = CpuSession(bundle, 1)
    assert session.max_length == bundle.manifest.max_length == max_length
    found = in_chunks(session, case.ids[:max_length], 1)
    assert_close(found, case.logits[:max_length], relative=PARITY_RELATIVE_FP32)
    whole = in_chunks(session, case.ids[:max_length], max_length)
    assert_close(whole[0], case.logits[max_length - 1], relative=PARITY_RELATIVE_FP32)


@pytest.mark.parametrize("max_length", [0, -1, 129, 10**9])
def test_max_length_beyond_the_context_is_refused(zoo: Zoo, max_length: int) -> None:
    with pytest.raises(UsageError, match=f"max-length={max_length}; expected 1 to 128"):
        zoo.case("yarn").build("never", max_length=max_length)


def test_the_end_of_a_context_of_32768_equals_the_exact_formula_and_transformers(zoo: Zoo) -> None:
    """The last positions, over a cache of noise that both sides are given."""
    case = zoo.case("one-layer")
    spec, last, num_tokens = Checkpoint.open(case.checkpoint).spec, 32768, 6
    start = last - num_tokens
    assert case.session.max_length == last
    ids = case.ids[:num_tokens]
    cache = case.session.new_cache(1, last)
    rng = np.random.default_rng(0)
    for array in (*cache.keys, *cache.values):
        array[:, :, :start] = rng.standard_normal((1, spec.num_kv_heads, start, spec.head_dim), np.float32)
    keys, values = cache.keys[0].copy(), cache.values[0].copy()
    steps = [
        case.session.run(cache, 0, ids[None, [i]], np.array([start + i]), ZERO)[0].copy() for i in range(num_tokens)
    ]
    exact, _, _ = reference.decode(spec, case.weights, ids[None], [keys], [values], [start])
    assert_close(np.stack(steps), exact[0], relative=PARITY_RELATIVE_FP32)
    one_early, _, _ = reference.decode(spec, case.weights, ids[None], [keys], [values], [start - 1])
    with pytest.raises(AssertionError, match="out of tolerance"):  # a position off by one would show
        assert_close(one_early[0], exact[0], relative=10 * PARITY_RELATIVE_FP32)
    past = DynamicCache(config=case.reference.config)
    past.update(torch.from_numpy(keys[:, :, :start]), torch.from_numpy(values[:, :, :start]), 0)
    with torch.no_grad():
        logits = case.reference(torch.from_numpy(ids[None]), past_key_values=past).logits[0].numpy()
    assert_close(np.stack(steps), logits, relative=PARITY_RELATIVE_FP32)
