"""The reference of the `sample` op against the runtime's sampler and numpy's random numbers, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen_rt.errors import UsageError
from qwen_rt.plugins.reference_sample import BAD_ROW, NUM_TOP, philox, sample
from qwen_rt.runtime.sampler import LogitsError, Sampler
from qwen_rt.runtime.sampling_params import SamplingParams

Tensors = dict[str, NDArray[Any]]
RING = 3
FOREVER = 2**31 - 1


def f32(*values: float) -> Any:
    """Settings that are the same number in float32, which the op takes, and in float64, which the sampler takes."""
    return st.sampled_from([float(np.float32(value)) for value in values])


SETTINGS = st.builds(
    SamplingParams,
    temperature=f32(0.0, 0.3, 0.7, 1.0, 2.5),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=f32(1e-9, 0.3, 0.8, 0.999, 1.0),
    min_p=f32(0.0, 0.05, 0.7, 1.0),
    repetition_penalty=f32(1.0, 1.3, 0.7),
    presence_penalty=f32(0.0, 1.5, -0.5),
    frequency_penalty=f32(0.0, 0.4, -1.0),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 2]),
    stop_token_ids=st.sampled_from([(), (0, 5)]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 5: 1.5, 7: -100.0}]),
    logprobs=st.just(NUM_TOP),
)


def tensors_of(params: list[SamplingParams], prompts: list[list[int]], vocab: int) -> Tensors:
    """What the op takes for fresh requests with these settings."""
    rows = len(params)
    edits = [
        [*((token, bias, FOREVER) for token, bias in one.logit_bias.items())]
        + [(token, -np.inf, one.min_tokens) for token in sorted(one.all_stop_token_ids)]
        for one in params
    ]
    width = 1 + max(map(len, edits))  # at least one that is unused
    padded = [row + [(-1, 9.0, FOREVER)] * (width - len(row)) for row in edits]
    counts = np.zeros((rows, vocab), np.uint32)
    for slot, prompt in zip(counts[::-1], prompts, strict=True):
        slot[prompt] = 2**31
    return {
        "positions": np.arange(rows) - 1,
        "temperature": np.array([one.temperature for one in params], np.float32),
        "top_k": np.array([one.top_k for one in params], np.int32),
        "top_p": np.array([one.top_p for one in params], np.float32),
        "min_p": np.array([one.min_p for one in params], np.float32),
        "seeds": np.array([one.seed for one in params], np.uint64).view(np.int64),
        "num_outputs": np.zeros(rows, np.int64),
        "penalties": np.array(
            [[one.repetition_penalty, one.frequency_penalty, one.presence_penalty] for one in params], np.float32
        ),
        "count_slots": np.arange(rows, dtype=np.int32)[::-1].copy(),
        "counts": counts.view(np.int32),
        "edit_ids": np.array([[edit[0] for edit in row] for row in padded], np.int32),
        "edit_values": np.array([[edit[1] for edit in row] for row in padded], np.float32),
        "edit_until": np.array([[edit[2] for edit in row] for row in padded], np.int32),
        "step": np.zeros(1, np.int64),
        "history": np.full((RING, rows), -9, np.int64),
        "logprobs": np.zeros((RING, rows), np.float32),
        "top_ids": np.zeros((RING, rows, NUM_TOP), np.int32),
        "top_logprobs": np.zeros((RING, rows, NUM_TOP), np.float32),
    }


@settings(deadline=None, max_examples=200)
@given(st.lists(SETTINGS, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([8, 60, 300]), st.booleans())
def test_against_the_sampler(params: list[SamplingParams], data_seed: int, num_tokens: int, ties: bool) -> None:
    rng = np.random.default_rng(data_seed)
    vocab = num_tokens + 4
    prompts = [rng.integers(0, num_tokens, 5).tolist() for _ in params]
    sampler = Sampler(params, vocab, prompts, num_tokens=num_tokens)
    tensors = tensors_of(params, prompts, vocab)
    for step in range(4):
        logits = rng.normal(0, 3, (len(params), vocab)).astype(np.float32)
        logits[:, num_tokens:] = 1e9  # padding
        if ties:
            logits = np.round(logits)
        want = sampler.sample(logits)
        tensors |= sample({"logits": logits, **tensors}, num_tokens)
        at = step % RING
        assert tensors["next_ids"].tolist() == want.token_ids.tolist()
        assert tensors["history"][at].tolist() == want.token_ids.tolist()
        num_top = min(NUM_TOP, num_tokens)
        for row, logprobs in enumerate(want.logprobs):
            assert logprobs is not None
            assert tensors["top_ids"][at, row].tolist() == logprobs.top_ids.tolist() + [-1] * (NUM_TOP - num_top)
            np.testing.assert_allclose(tensors["logprobs"][at, row], logprobs.logprob, atol=1e-5)
            np.testing.assert_allclose(tensors["top_logprobs"][at, row, :num_top], logprobs.top_logprobs, atol=1e-5)
    assert tensors["step"].tolist() == [4]
    assert tensors["num_outputs"].tolist() == [4] * len(params)
    assert tensors["positions"].tolist() == [-1, *(row + 3 for row in range(1, len(params)))]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 2))
def test_philox_is_that_of_numpy(seed: int, position: int) -> None:
    assert philox(seed, position) == np.random.Philox(key=seed, counter=position).random_raw()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_rows_are_those_that_the_sampler_refuses(value: float, temperature: float) -> None:
    logits = np.zeros((3, 8), np.float32)
    logits[1] = -np.inf
    logits[1, 2] = value
    params = SamplingParams(temperature=temperature, seed=1, logprobs=NUM_TOP)
    with pytest.raises(LogitsError, match="row 1 "):
        Sampler([params] * 3, 8, [[]] * 3).sample(logits)
    out = sample({"logits": logits, **tensors_of([params] * 3, [[]] * 3, 8)})
    assert (out["history"][0] == BAD_ROW).tolist() == [False, True, False]
    assert out["next_ids"][1] == 0
    assert np.isnan(out["logprobs"][0, 1])
    assert (out["top_ids"][0, 1] == -1).all()
    assert out["counts"].sum(axis=1).tolist() == [1, 0, 1]


def test_edits_may_leave_nothing_to_choose() -> None:
    params = SamplingParams(temperature=0, logit_bias={0: -100.0}, stop_token_ids=(1, 2, 3), min_tokens=2, seed=1)
    tensors = tensors_of([params], [[]], 4)
    logits = np.array([[-np.inf, 1, 2, 3]], np.float32)
    for wanted in (BAD_ROW, BAD_ROW, 3):
        tensors |= sample({"logits": logits, **tensors})
        assert tensors["history"][(tensors["step"][0] - 1) % RING, 0] == wanted


def test_greedy_needs_nothing_but_logits() -> None:
    logits = np.array([[1, 3, 3, 2], [5, 0, 0, 9]], np.float32)
    assert sample({"logits": logits})["next_ids"].tolist() == [1, 3]
    assert sample({"logits": logits}, num_tokens=3)["next_ids"].tolist() == [1, 0]


def test_what_belongs_together_is_asked_for() -> None:
    logits = np.zeros((1, 4), np.float32)
    with pytest.raises(UsageError, match="temperature without seeds"):
        sample({"logits": logits, "temperature": np.ones(1, np.float32)})
    with pytest.raises(UsageError, match="history without step"):
        sample({"logits": logits, "history": np.zeros((2, 1), np.int64)})
