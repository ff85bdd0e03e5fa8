"""Sampler: against a slow float64 reference, hand-computed numbers, and its promises about seeds and batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.errors import UsageError
from qwen_rt.runtime.sampler import F32, LogitsError, Sampler, SampleResult, uniform
from qwen_rt.runtime.sampling_params import SamplingParams

SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.8, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 2]),
    stop_token_ids=st.sampled_from([(), (0, 5)]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 7: -100.0}]),
)


def reference_edit(logits: F32, params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Bias, min_tokens and penalties, one token at a time."""
    x = [float(value) for value in logits]
    for token in range(len(x)):
        x[token] += params.logit_bias.get(token, 0.0)
        if len(output) < params.min_tokens and token in params.all_stop_token_ids:
            x[token] = -math.inf
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (token in output)
    return x


def reference_probabilities(x: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top_k, top_p and min_p, by a full sort; what is filtered out is 0."""
    top = max(x)
    if params.greedy:
        return [1.0 if token == x.index(top) else 0.0 for token in range(len(x))]
    weight = [math.exp((value - top) / params.temperature) for value in x]
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if 0 < params.top_k < len(x):
        kth = x[order[params.top_k - 1]]
        order = [token for token in order if x[token] >= kth]
    total, mass, kept = sum(weight[token] for token in order), 0.0, []
    for token in order:
        if params.top_p == 1 or mass < params.top_p * total:
            kept.append(token)
        mass += weight[token]
    kept = [token for token in kept if weight[token] >= params.min_p]
    total = sum(weight[token] for token in kept)
    return [weight[token] / total if token in kept else 0.0 for token in range(len(x))]


def reference_token(probabilities: list[float], u: float) -> tuple[int, float]:
    """Return the token, and how far u is from the nearest step of the cumulative probability."""
    cumulative = np.cumsum(probabilities)
    last = int(np.flatnonzero(probabilities)[-1])
    token = next(i for i, value in enumerate(cumulative) if value > u or i == last)
    return token, float(np.abs(cumulative - u).min())


def sampler_of(params: SamplingParams, vocab_size: int, prompt: list[int] | None = None, **options: Any) -> Sampler:
    return Sampler([params], vocab_size, [prompt or []], **options)


def draw(sampler: Sampler, logits: list[float] | F32) -> int:
    return int(sampler.sample(np.asarray([logits], dtype=np.float32)).token_ids[0])


def support(params: SamplingParams, logits: list[float], num: int = 300) -> set[int]:
    sampler = sampler_of(params, len(logits))
    return {draw(sampler, logits) for _ in range(num)}


# ---------------------------------------------------------------- against the reference


@settings(deadline=None, max_examples=250)
@given(SETTINGS, st.integers(0, 2**32), st.sampled_from([8, 60, 300]), st.booleans())
def test_against_the_reference(params: SamplingParams, data_seed: int, num_tokens: int, ties: bool) -> None:
    rng = np.random.default_rng(data_seed)
    prompt = rng.integers(0, num_tokens, 5).tolist()
    sampler = sampler_of(params, num_tokens + 7, prompt, num_tokens=num_tokens)
    output: list[int] = []
    for step in range(4):
        logits = rng.normal(0, 3, (1, num_tokens + 7)).astype(np.float32)
        logits[:, num_tokens:] = 1e9  # padded rows: never read
        if ties:
            logits = np.round(logits)
        x = reference_edit(logits[0, :num_tokens], params, prompt, output)
        probabilities = reference_probabilities(x, params)
        token, margin = reference_token(probabilities, uniform(params.seed or 0, step))
        before = logits.copy()
        chosen = int(sampler.sample(logits).token_ids[0])
        assert np.array_equal(before, logits)
        if margin > 1e-6 and _clear(x, params):
            assert chosen == token
        output.append(chosen)


def _clear(x: list[float], params: SamplingParams) -> bool:
    """Whether no filter hangs on the last bits: edits round to float32 in the sampler, and break or make ties."""
    probabilities = reference_probabilities(x, params)
    nudged = [
        reference_probabilities([value + sign * 1e-5 * (1 + token % 7) for token, value in enumerate(x)], params)
        for sign in (-1, 1)
    ]
    return all(np.array_equal(np.asarray(other) > 0, np.asarray(probabilities) > 0) for other in nudged)


def test_large_vocabulary_against_the_reference() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.5, 4.0):
        logits = rng.normal(0, spread, (1, 20_000)).astype(np.float32)
        x = logits[0].astype(float).tolist()
        for options in ({"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.5, "top_k": 5000}, {"min_p": 0.1}, {}):
            params = SamplingParams(seed=5, **options)  # type: ignore[arg-type]
            token, margin = reference_token(filtered_softmax(x, params), uniform(5, 0))
            assert margin > 1e-9
            assert draw(sampler_of(params, 20_000), logits[0]) == token


def filtered_softmax(x: list[float], params: SamplingParams) -> list[float]:
    """The reference at temperature 1, on sorted arrays: the list version is quadratic."""
    weight = np.exp(np.asarray(x) - max(x))
    order = np.argsort(-weight, kind="stable")[: params.top_k or None]
    before = np.cumsum(weight[order]) - weight[order]
    kept = order[(before < params.top_p * weight[order].sum()) & (weight[order] >= params.min_p)]
    result = np.zeros(len(x))
    result[kept] = weight[kept] / weight[kept].sum()
    return result.tolist()


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("settings_", "prompt", "output", "expected"),
    [
        ({"repetition_penalty": 2.0}, [0, 1], [2], [2.0, -2.0, 0.5, 0.5]),
        ({"presence_penalty": 0.5}, [0], [2, 2, 3], [4.0, -1.0, 0.5, 0.0]),
        ({"frequency_penalty": 0.5}, [0], [2, 2, 3], [4.0, -1.0, 0.0, 0.0]),
        (
            {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 0.5, "logit_bias": {3: 1.5}},
            [1, 1],
            [3, 3],
            [4.0, -2.0, 1.0, 0.0],  # (0.5 + 1.5) / 2 - 2 * 0.25 - 0.5
        ),
        ({"logit_bias": {1: 3.5, 0: -4.0}}, [], [], [0.0, 2.5, 1.0, 0.5]),
        ({"min_tokens": 1, "stop_token_ids": (0,)}, [], [], [-math.inf, -1.0, 1.0, 0.5]),
        ({"min_tokens": 1, "stop_token_ids": (0,)}, [], [3], [4.0, -1.0, 1.0, 0.5]),
        ({"min_tokens": 1, "eos_token_ids": (0,), "ignore_eos": True}, [], [], [4.0, -1.0, 1.0, 0.5]),
    ],
)
def test_penalties_by_hand(
    settings_: dict[str, Any], prompt: list[int], output: list[int], expected: list[float]
) -> None:
    raw = np.array([4.0, -1.0, 1.0, 0.5], dtype=np.float32)
    sampler = Sampler([], 4, [])
    row = sampler.add(SamplingParams(temperature=0, **settings_), prompt, output)
    edited = sampler._requests[row].edit(raw)
    np.testing.assert_allclose(edited, expected, rtol=1e-6)


def test_penalties_follow_the_output() -> None:
    sampler = sampler_of(SamplingParams(temperature=0, frequency_penalty=1.0), 3)
    logits = [2.5, 2.0, 0.1]
    assert [draw(sampler, logits) for _ in range(6)] == [0, 1, 0, 1, 0, 2]


def test_many_distinct_tokens_are_counted() -> None:
    sampler = sampler_of(SamplingParams(temperature=0, presence_penalty=2.0), 500, [3, 3])
    logits = np.linspace(1.9, 0.0, 500, dtype=np.float32)
    assert [draw(sampler, logits) for _ in range(500)] == list(range(500))
    assert draw(sampler, logits) == 0


def test_greedy_ties_take_the_lowest_id() -> None:
    assert draw(sampler_of(SamplingParams(temperature=0), 5), [1, 3, 3, 3, 0]) == 1


def test_top_k() -> None:
    logits = [1.0, 3.0, 2.0, 2.9]
    assert support(SamplingParams(top_k=2, seed=1), logits) == {1, 3}
    assert support(SamplingParams(top_k=1, seed=1), logits) == {1}
    assert support(SamplingParams(top_k=99, seed=1), logits) == {0, 1, 2, 3}
    assert support(SamplingParams(top_k=1, seed=1), [2.0, 2.0, 1.0]) == {0, 1}  # as probable as the k-th


def test_top_p() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125]).tolist()
    assert support(SamplingParams(top_p=1e-12, seed=1), logits) == {0}
    assert support(SamplingParams(top_p=0.49, seed=1), logits) == {0}
    assert support(SamplingParams(top_p=0.51, seed=1), logits) == {0, 1}
    assert support(SamplingParams(top_p=0.8, seed=1), logits) == {0, 1, 2}  # of equals, the lowest id
    assert support(SamplingParams(top_p=0.99, seed=1), logits) == {0, 1, 2, 3}


def test_top_p_is_of_what_top_k_leaves() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert support(SamplingParams(top_k=2, top_p=0.55, seed=1), logits) == {0}  # 0.4 / 0.7 = 0.57
    assert support(SamplingParams(top_p=0.55, seed=1), logits) == {0, 1}


def test_min_p() -> None:
    logits = np.log([0.5, 0.26, 0.14, 0.1]).tolist()
    assert support(SamplingParams(min_p=0.5, seed=1), logits) == {0, 1}
    assert support(SamplingParams(min_p=1.0, seed=1), logits) == {0}
    assert support(SamplingParams(min_p=0.3, temperature=0.5, seed=1), logits) == {0}  # 0.52 squared is 0.27


def test_masked_logits_are_never_chosen() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0]
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}, {"temperature": 0.01}):
        assert support(SamplingParams(seed=2, **options), logits) == {1, 3}  # type: ignore[arg-type]


# ---------------------------------------------------------------- distribution and seeds


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 1.5}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square below its 99.9% point: degrees of freedom at most 7, where that point is 24.3; the seed is fixed."""
    logits = [1.0, 0.5, 2.0, -0.5, 0.0, 1.5, -1.0, 0.7]
    params = SamplingParams(seed=11, **options)
    sampler, num = sampler_of(params, len(logits)), 8000
    counts = np.bincount([draw(sampler, logits) for _ in range(num)], minlength=len(logits))
    expected = num * np.array(reference_probabilities(logits, params))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 24.3


def test_uniform_is_pinned() -> None:
    """A seed's tokens must not change with a release."""
    values = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**64 - 1, 2**20)]
    assert values == [0.011546754286331562, 0.5023796042735054, 0.3035680343067586, 0.6348899859802892]
    many = np.array([uniform(seed, position) for seed in range(50) for position in range(50)])
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(many.mean() - 0.5) < 0.02


def test_a_request_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(1)
    params = [
        SamplingParams(seed=3, top_p=0.9),
        SamplingParams(seed=3, top_k=5, repetition_penalty=1.2, logprobs=2),
        SamplingParams(temperature=0),
        SamplingParams(),
    ]
    prompts = [[1, 2], [3], [], [4]]
    steps = rng.normal(0, 2, (6, len(params), 50)).astype(np.float32)
    alone = [sampler_of(one, 50, prompt) for one, prompt in zip(params, prompts, strict=True)]
    expected = [[draw(alone[i], steps[t, i]) for t in range(6)] for i in range(3)]

    batch = Sampler(params, 50, prompts)
    for t in range(6):
        order = [int(row) for row in rng.permutation(4)]
        result = batch.sample(np.ascontiguousarray(steps[t, order]), order)
        for place, row in enumerate(order):
            if row < 3:
                assert result.token_ids[place] == expected[row][t]


def test_resumed_request_goes_on_as_if_uninterrupted() -> None:
    rng = np.random.default_rng(2)
    steps = rng.normal(0, 2, (8, 40)).astype(np.float32)
    params = SamplingParams(seed=9, top_p=0.95, frequency_penalty=0.7, min_tokens=6, stop_token_ids=(1,))
    whole = sampler_of(params, 40, [5])
    tokens = [draw(whole, row) for row in steps]
    resumed = Sampler([], 40, [])
    resumed.add(params, [5], tokens[:4])
    assert [draw(resumed, row) for row in steps[4:]] == tokens[4:]


def test_without_a_seed_requests_differ() -> None:
    sampler = Sampler([SamplingParams()] * 2, 10_000, [[], []])
    result = [sampler.sample(np.zeros((2, 10_000), dtype=np.float32)).token_ids for _ in range(3)]
    assert {int(tokens[0]) for tokens in result} != {int(tokens[1]) for tokens in result}


# ---------------------------------------------------------------- log probabilities


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.array([[2.0, 1.0, 1.0, 0.0]], dtype=np.float32)
    params = SamplingParams(temperature=0, logit_bias={3: 50.0}, logprobs=3)
    result: SampleResult = sampler_of(params, 4).sample(logits)
    log_softmax = logits[0] - np.log(np.exp(logits[0].astype(float)).sum())
    (logprobs,) = result.logprobs
    assert logprobs is not None
    assert result.token_ids.tolist() == [3]
    assert logprobs.logprob == pytest.approx(log_softmax[3], abs=1e-6)
    assert logprobs.top_ids.tolist() == [0, 1, 2]
    assert logprobs.top_logprobs == pytest.approx(log_softmax[:3], abs=1e-6)


def test_logprobs_asked_and_not_asked() -> None:
    params = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=20)]
    result = Sampler(params, 8, [[]] * 3, num_tokens=5).sample(np.zeros((3, 8), dtype=np.float32))
    assert result.logprobs[0] is None
    assert result.logprobs[1] is not None
    assert result.logprobs[1].top_ids.tolist() == []
    assert result.logprobs[2] is not None
    assert result.logprobs[2].top_ids.tolist() == [0, 1, 2, 3, 4]
    assert result.logprobs[2].logprob == pytest.approx(-math.log(5))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_logits_name_the_row_and_change_nothing(value: float) -> None:
    sampler = Sampler([SamplingParams(seed=1, frequency_penalty=1)] * 3, 4, [[]] * 3)
    good = np.zeros((3, 4), dtype=np.float32)
    bad = good.copy()
    bad[1] = value
    with pytest.raises(LogitsError, match="logits of row 1 hold NaN") as caught:
        sampler.sample(bad)
    assert caught.value.rows == (1,)
    fresh = Sampler([SamplingParams(seed=1, frequency_penalty=1)] * 3, 4, [[]] * 3)
    assert sampler.sample(good).token_ids.tolist() == fresh.sample(good).token_ids.tolist()


def test_one_nan_is_enough() -> None:
    with pytest.raises(LogitsError, match="row 0"):
        draw(sampler_of(SamplingParams(), 4), [0.0, 1.0, math.nan, 5.0])


@pytest.mark.parametrize("options", [{"repetition_penalty": 1e-60}, {"min_tokens": 3, "stop_token_ids": (0,)}])
def test_penalties_that_leave_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(LogitsError, match="penalised logits of row 0"):
        draw(sampler_of(SamplingParams(**options), 3, [0]), [1.0, -math.inf, -math.inf])


@pytest.mark.parametrize("logits", [np.zeros((1, 5), np.float32), np.zeros((2, 4), np.float32), np.zeros((1, 4))])
def test_wrong_shape_or_dtype(logits: Any) -> None:
    with pytest.raises(LogitsError, match=r"expected float32\[1, 4\]"):
        sampler_of(SamplingParams(), 4).sample(logits)


def test_rows_come_and_go() -> None:
    sampler = Sampler([SamplingParams(temperature=0)], 4, [[]])
    row = sampler.add(SamplingParams(temperature=0), [])
    sampler.remove(0)
    assert sampler.sample(np.eye(1, 4, 2, dtype=np.float32)).token_ids.tolist() == [2]
    assert sampler.add(SamplingParams(), []) == row + 1
    for rows in ([0], [row, row], [7]):
        with pytest.raises(UsageError, match="rows="):
            sampler.sample(np.zeros((len(rows), 4), dtype=np.float32), rows)
    with pytest.raises(UsageError, match="row=0"):
        sampler.remove(0)
    assert Sampler([], 4, []).sample(np.zeros((0, 4), dtype=np.float32)).token_ids.shape == (0,)


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"logit_bias": {9: 1.0}}, [], "logit_bias token 9 is outside the vocabulary; expected 0 to 7"),
        ({"stop_token_ids": (10,)}, [], "stop token 10"),
        ({}, [10], "prompt token 10"),
        ({}, [-1], "prompt token -1"),
        ({"min_tokens": 1, "stop_token_ids": tuple(range(8))}, [], "every token a stop token"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], prompt: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_of(SamplingParams(**options), 10, prompt, num_tokens=8)


def test_constructor_arguments() -> None:
    with pytest.raises(UsageError, match="1 prompts for 2 requests"):
        Sampler([SamplingParams()] * 2, 4, [[]])
    with pytest.raises(UsageError, match="num_tokens=0"):
        Sampler([], 4, [], num_tokens=0)
