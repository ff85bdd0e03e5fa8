"""Sampling options of `generate` and `chat`; what is not given comes from the model's generation_config.json."""

from __future__ import annotations

import argparse
from typing import Any

from qwen_rt.errors import UsageError

__all__ = ["add_sampling_arguments", "sampling_overrides"]

_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("--max-tokens", int, "tokens to generate at most"),
    ("--min-tokens", int, "tokens before a stop token or stop string counts"),
    ("--temperature", float, "0 is greedy"),
    ("--top-k", int, "keep the k most probable tokens; 0 keeps all"),
    ("--top-p", float, "keep the most probable tokens until they have this probability"),
    ("--min-p", float, "keep tokens at least this probable relative to the best"),
    ("--repetition-penalty", float, "above 1 makes tokens of prompt and output less likely"),
    ("--presence-penalty", float, "taken from the logit of every token in the output"),
    ("--frequency-penalty", float, "taken once for each occurrence in the output"),
    ("--seed", int, "makes sampling repeatable"),
    ("--logprobs", int, "report log probabilities, and those of the N best tokens (with --json)"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sampling options."""
    group = parser.add_argument_group("sampling (default: the model's generation_config.json)")
    for flag, kind, text in _NUMBERS:
        group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--stop-token", action="append", metavar="TOKEN", help="end at this token (text or id)")
    group.add_argument("--logit-bias", action="append", metavar="ID:X", help="add X to the logit of token ID")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence tokens")


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given sampling options as fields of `SamplingParams`."""
    given = {flag[2:].replace("-", "_"): getattr(args, flag[2:].replace("-", "_")) for flag, _, _ in _NUMBERS}
    overrides = {name: value for name, value in given.items() if value is not None}
    if args.stop:
        overrides["stop"] = tuple(args.stop)
    if args.stop_token:
        overrides["stop_token_ids"] = [int(t) if t.isascii() and t.isdigit() else t for t in args.stop_token]
    if args.logit_bias:
        overrides["logit_bias"] = dict(_bias(text) for text in args.logit_bias)
    if args.ignore_eos:
        overrides["ignore_eos"] = True
    return overrides


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text}", "TOKEN_ID:NUMBER, such as 17:-5") from None
