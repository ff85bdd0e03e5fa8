"""How one request wants its tokens chosen and when it ends; the names are vLLM's."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_rt.errors import UsageError
from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["GREEDY_TEMPERATURE", "MAX_LOGPROBS", "SamplingParams", "resolve_stop_tokens"]

GREEDY_TEMPERATURE = 1e-5  # below it a temperature means greedy, as in vLLM
MAX_LOGPROBS = 20  # as in vLLM and the OpenAI API
MAX_BIAS = 100.0  # as in the OpenAI API
HF_DEFAULT_TOP_K = 50  # transformers samples with this where generation_config.json names no top_k


@dataclass(frozen=True)
class SamplingParams:
    """The sampling settings of one request, checked.

    Attributes:
        max_tokens: Tokens to generate at most; None: until the context is full.
        min_tokens: Tokens to generate before a stop token or stop string may end the output.
        temperature: Divides the logits; below 1e-5 (0 by custom) the choice is greedy.
        top_k: Keep the k most probable tokens, and those as probable as the k-th; 0 (or -1, None): all.
        top_p: Keep the most probable tokens until their probability reaches this; 1: all.
        min_p: Keep tokens at least this probable relative to the most probable one; 0: all.
        repetition_penalty: Above 1 makes tokens of prompt and output less likely: divides positive logits, multiplies
            negative ones.
        presence_penalty: Subtracted from the logit of every token in the output.
        frequency_penalty: Subtracted from the logit once for every occurrence in the output.
        seed: The same seed gives the same tokens from the same logits; None: a fresh one.
        stop: Strings that end the output when they appear.
        stop_token_ids: Tokens that end the output, besides the end-of-sequence tokens.
        eos_token_ids: The model's end-of-sequence tokens.
        ignore_eos: Do not let ``eos_token_ids`` end the output.
        include_stop_str_in_output: Leave the stop string at the end of the output.
        skip_special_tokens: Leave special tokens out of the text.
        logit_bias: Added to the logits of these token ids, within ±100.
        logprobs: Report the log probability of the chosen token and of so many most probable ones; None: report none.

    Raises:
        UsageError: a field of the wrong type or out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every field and store it in its one form (tuples, ints, floats, ``top_k`` 0 for off)."""
        checked: dict[str, object] = {"stop": _stop_strings(self.stop), "logit_bias": _bias(self.logit_bias)}
        for name, integers in _INTEGERS.items():
            checked[name] = integers.check(name, getattr(self, name))
        for name, numbers in _NUMBERS.items():
            checked[name] = numbers.check(name, getattr(self, name))
        for name in ("stop_token_ids", "eos_token_ids"):
            checked[name] = _token_ids(name, getattr(self, name))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r}", "True or False")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the class is frozen
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens={self.min_tokens}", f"at most max_tokens={self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """The tokens that end the output: ``stop_token_ids``, and ``eos_token_ids`` unless ``ignore_eos``."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else self.eos_token_ids)

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], *, num_prompt_tokens: int | None = None, **overrides: Any
    ) -> SamplingParams:
        """Return the settings that ``generation_config.json`` means in transformers, with overrides.

        ``do_sample`` false or absent is greedy, whatever temperature the file names; an absent ``top_k`` is 50. Top-k,
        top-p and min-p of the file are kept all the same: they take effect when an override sets a temperature.

        Args:
            config: The parsed file; ``{}`` for a checkpoint without one.
            num_prompt_tokens: Length of the prompt, which ``max_length`` includes; None: ignore ``max_length``.
            **overrides: Fields of this class; they win over the file.

        Returns:
            The settings.

        Raises:
            UsageError: a value of the file or an override cannot be used; no room is left within ``max_length``.
        """
        unknown = overrides.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            name = min(unknown)
            near = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1)
            raise UsageError(f"{name}: no such sampling parameter", fix=f"did you mean {near[0]}?" if near else "")
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        values: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
        values["top_k"] = config.get("top_k", HF_DEFAULT_TOP_K)
        if not config.get("do_sample"):
            values["temperature"] = 0.0
        eos = config.get("eos_token_id")
        values["eos_token_ids"] = () if eos is None else (eos,) if isinstance(eos, int) else eos
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        elif config.get("max_length") is not None and num_prompt_tokens is not None and "max_tokens" not in overrides:
            max_length = _MAX_LENGTH.integer("max_length", config["max_length"])
            if num_prompt_tokens >= max_length:
                raise UsageError(
                    f"prompt of {num_prompt_tokens} tokens",
                    f"fewer than max_length={max_length} of generation_config.json",
                    "shorten it or set max_tokens",
                )
            values["max_tokens"] = max_length - num_prompt_tokens
        return cls(**(values | overrides))


def resolve_stop_tokens(tokenizer: Tokenizer, items: Iterable[str | int]) -> tuple[int, ...]:
    r"""Return the ids of stop tokens given as ids or as text.

    Args:
        tokenizer: The vocabulary.
        items: Ids; or strings, each a token (``"<|im_end|>"``) or text that encodes to a single one (``"\n"``).

    Returns:
        The ids, in order, each once.

    Raises:
        UsageError: an id that is no token, or text that is not a single token; names the nearest added tokens. Or
            neither ids nor texts.
    """
    if not isinstance(items, Iterable | int):
        raise UsageError(f"stop tokens {items!r}", "a list of token ids or texts")
    found: dict[int, None] = {}
    for item in [items] if isinstance(items, str | int) else items:
        if isinstance(item, str):
            found[_stop_token_of_text(tokenizer, item)] = None
        else:
            token_id = _TOKEN_ID.integer("stop token", item)
            if tokenizer.id_to_token(token_id) is None:
                raise UsageError(f"stop token {token_id} is not in the vocabulary", f"0 to {tokenizer.vocab_size - 1}")
            found[token_id] = None
    return tuple(found)


def _stop_token_of_text(tokenizer: Tokenizer, text: str) -> int:
    token_id = tokenizer.token_to_id(text)
    if token_id is not None:
        return token_id
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    near = difflib.get_close_matches(text, tokenizer.added_tokens, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "pass longer text as a stop string"
    raise UsageError(f"stop token {text!r} is {len(ids)} tokens", "a single token of the vocabulary", hint)


# ---------------------------------------------------------------- checks


@dataclass(frozen=True)
class _Integers:
    """The integers that a field takes, and the values that stand for "not set" with what is stored for them."""

    wanted: str
    low: int
    high: int | None = None
    unset: tuple[object, ...] = ()
    stored_unset: int | None = None

    def check(self, name: str, value: Any) -> int | None:
        if value in self.unset and not isinstance(value, bool):
            return self.stored_unset
        return self.integer(name, value)

    def integer(self, name: str, value: Any) -> int:
        number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None
        if number is None or number < self.low or (self.high is not None and number > self.high):
            raise UsageError(f"{name}={value!r}", self.wanted)
        return number


@dataclass(frozen=True)
class _Numbers:
    """The finite numbers that a field takes."""

    wanted: str
    low: float
    high: float = math.inf
    above_low: bool = False  # low itself is refused

    def check(self, name: str, value: Any) -> float:
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        in_range = self.low <= number <= self.high and not (self.above_low and number == self.low)
        if not (math.isfinite(number) and in_range):
            raise UsageError(f"{name}={value!r}", self.wanted)
        return number


_INTEGERS = {
    "max_tokens": _Integers("an integer of at least 1, or None", 1, unset=(None,)),
    "min_tokens": _Integers("an integer of at least 0", 0),
    "top_k": _Integers("an integer of at least 1, or 0 for off", 0, unset=(None, -1), stored_unset=0),
    "seed": _Integers("an integer from 0 to 2**64 - 1, or None", 0, 2**64 - 1, unset=(None,)),
    "logprobs": _Integers(f"an integer from 0 to {MAX_LOGPROBS}, or None", 0, MAX_LOGPROBS, unset=(None,)),
}
_NUMBERS = {
    "temperature": _Numbers("a finite number of at least 0", 0.0),
    "top_p": _Numbers("a number above 0 and at most 1", 0.0, 1.0, above_low=True),
    "min_p": _Numbers("a number from 0 to 1", 0.0, 1.0),
    "repetition_penalty": _Numbers("a finite number above 0", 0.0, above_low=True),
    "presence_penalty": _Numbers("a number from -2 to 2", -2.0, 2.0),
    "frequency_penalty": _Numbers("a number from -2 to 2", -2.0, 2.0),
}
_BIAS = _Numbers(f"a number from -{MAX_BIAS:g} to {MAX_BIAS:g}", -MAX_BIAS, MAX_BIAS)
_TOKEN_ID = _Integers("a token id of at least 0", 0)
_MAX_LENGTH = _Integers("an integer of at least 1", 1)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(item, str) and item for item in strings):
        raise UsageError(f"stop={value!r}", "strings of at least one character")
    return tuple(strings)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise UsageError(f"{name}={value!r}", "a list of token ids")
    return tuple(_TOKEN_ID.integer(name, item) for item in value)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias={value!r}", "a dict of token id to bias")
    return {
        _TOKEN_ID.integer("logit_bias token", token): _BIAS.check(f"logit_bias[{token}]", amount)
        for token, amount in value.items()
    }
