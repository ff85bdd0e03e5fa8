"""SamplingParams: every field checked, generation_config.json read as transformers means it, stop tokens resolved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import UsageError
from qwen_rt.runtime.sampling_params import SamplingParams, resolve_stop_tokens

from .byte_tokenizer import byte_tokenizer


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not params.greedy
    assert params.all_stop_token_ids == frozenset()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", "7"),
        ("stop", ("",)),
        ("stop", (7,)),
        ("stop", 7),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", "<|im_end|>"),
        ("eos_token_ids", (None,)),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", None),
        ("skip_special_tokens", "yes"),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.what.startswith(name)
    assert caught.value.expected


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(UsageError, match="min_tokens=5; expected at most max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_fields_take_one_form() -> None:
    values: dict[str, Any] = {"stop": "END", "stop_token_ids": [np.int64(3)], "top_k": None, "temperature": 1}
    params = SamplingParams(**values)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3,)
    assert type(params.stop_token_ids[0]) is int
    assert params.top_k == SamplingParams(top_k=-1).top_k == 0
    assert type(params.temperature) is float
    assert params == SamplingParams(stop=("END",), stop_token_ids=(3,))
    assert hash(params) == hash(SamplingParams(stop=("END",), stop_token_ids=(3,)))


def test_the_callers_bias_is_copied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


def test_stop_ids_with_and_without_eos() -> None:
    assert SamplingParams(stop_token_ids=(5,), eos_token_ids=(1, 2)).all_stop_token_ids == {1, 2, 5}
    assert SamplingParams(stop_token_ids=(5,), eos_token_ids=(1, 2), ignore_eos=True).all_stop_token_ids == {5}


QWEN2_7B_INSTRUCT = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def test_generation_config_of_qwen2_instruct() -> None:
    assert SamplingParams.from_generation_config(QWEN2_7B_INSTRUCT) == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, eos_token_ids=(151645, 151643)
    )


@pytest.mark.parametrize("do_sample", [{"do_sample": False}, {"do_sample": None}, {}])
def test_without_do_sample_it_is_greedy(do_sample: dict[str, Any]) -> None:
    config = {"temperature": 0.7, "top_p": 0.8, "eos_token_id": 151643, "max_new_tokens": 2048} | do_sample
    params = SamplingParams.from_generation_config(config)
    assert params.greedy
    assert params.eos_token_ids == (151643,)
    assert params.max_tokens == 2048
    sampled = SamplingParams.from_generation_config(config, temperature=0.5)
    assert (sampled.greedy, sampled.temperature, sampled.top_p) == (False, 0.5, 0.8)


@pytest.mark.parametrize(("value", "top_k"), [(0, 0), (-1, 0), (None, 0), (7, 7)])
def test_top_k_of_the_file(value: int | None, top_k: int) -> None:
    assert SamplingParams.from_generation_config({"do_sample": True, "top_k": value}).top_k == top_k


def test_absent_values_are_transformers_defaults() -> None:
    assert SamplingParams.from_generation_config({"do_sample": True}) == SamplingParams(temperature=1.0, top_k=50)
    assert SamplingParams.from_generation_config({}).greedy


def test_max_length_includes_the_prompt() -> None:
    config = {"max_length": 20}
    assert SamplingParams.from_generation_config(config).max_tokens is None
    assert SamplingParams.from_generation_config(config, num_prompt_tokens=15).max_tokens == 5
    assert SamplingParams.from_generation_config(config | {"max_new_tokens": 9}, num_prompt_tokens=15).max_tokens == 9
    assert SamplingParams.from_generation_config(config, num_prompt_tokens=25, max_tokens=3).max_tokens == 3
    with pytest.raises(UsageError, match="prompt of 20 tokens"):
        SamplingParams.from_generation_config(config, num_prompt_tokens=20)


def test_bad_values_of_the_file_are_refused() -> None:
    with pytest.raises(UsageError, match="top_p"):
        SamplingParams.from_generation_config({"top_p": 3})
    with pytest.raises(UsageError, match="eos_token_ids"):
        SamplingParams.from_generation_config({"eos_token_id": "<|im_end|>"})
    with pytest.raises(UsageError, match="max_length"):
        SamplingParams.from_generation_config({"max_length": "long"}, num_prompt_tokens=1)


def test_unknown_override_suggests_a_name() -> None:
    with pytest.raises(UsageError, match="temprature: no such sampling parameter; did you mean temperature"):
        SamplingParams.from_generation_config({}, temprature=1)


def test_resolve_stop_tokens() -> None:
    tokenizer = byte_tokenizer()
    im_end = tokenizer.special_tokens["<|im_end|>"]
    newline = tokenizer.encode("\n")[0]
    assert resolve_stop_tokens(tokenizer, ["<|im_end|>", im_end, "\n", 5]) == (im_end, newline, 5)
    assert resolve_stop_tokens(tokenizer, "<|im_end|>") == (im_end,)
    with pytest.raises(UsageError, match=r"did you mean <\|im_end\|>"):
        resolve_stop_tokens(tokenizer, ["<|imend|>"])
    with pytest.raises(UsageError, match="is 3 tokens; expected a single token"):
        resolve_stop_tokens(tokenizer, ["qqq"])
    with pytest.raises(UsageError, match=f"stop token 9999 is not in the vocabulary; expected 0 to {im_end}"):
        resolve_stop_tokens(tokenizer, [9999])
    with pytest.raises(UsageError, match="stop token"):
        resolve_stop_tokens(tokenizer, [1.5])  # type: ignore[list-item]
