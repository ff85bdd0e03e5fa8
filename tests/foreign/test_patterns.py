"""Patterns of quantization configs: as Python's `re` where they are read, and quick where they are hostile."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from qwen_rt.errors import QwenRtError
from qwen_rt.foreign.patterns import Pattern

TEXTS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.gate_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
    "aab",
    "",
]


@pytest.mark.parametrize(
    "pattern",
    [
        *(".*lm_head", "lm_head", ".*self_attn.*", r".*\.mlp\..*", r"model\.layers\.(0|1|2)\..*", ".*proj$", "^lm"),
        *(r".*layers\.[0-9]+\.mlp\.(gate|up)_proj$", r".*\d{2}\..*", r"(?:model\.)?layers", "a*", "a+b", "(a|b)*$"),
        *("[^m]*$", "[a-z_]+$", r"[\w.]+$", "(?=lm).*", "(?!.*mlp).*", "x?y?", "a{2}", "a{1,2}b", ".{3,}$"),
        *("(a*)*b", "(a|aa)+$", "a*?b", "|a", "[]a]+", "[a-]+", "", "()", "$", r"\S+\s?", r"\W", "(?=.*q_)model"),
    ],
)
def test_agrees_with_re(pattern: str) -> None:
    for text in TEXTS:
        assert Pattern(pattern).matches(text) == bool(re.match(pattern, text)), text


def test_agrees_with_re_on_random_patterns() -> None:
    rng = random.Random(5)
    pieces = [
        "a",
        "b",
        "c",
        ".",
        "[ab]",
        "[^a]",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2}",
        "{1,3}",
        "^",
        "$",
        "(?:",
        "(?=",
        "(?!",
    ]
    num_read = 0
    for _ in range(20_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 9)))
        subject = "".join(rng.choice("abc") for _ in range(rng.randint(0, 7)))
        try:
            found = Pattern(text).matches(subject)
            theirs = bool(re.match(text, subject))
        except (QwenRtError, re.error):
            continue
        num_read += 1
        assert found == theirs, (text, subject)
    assert num_read > 3000


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)", "[", "[a", "*", "a**", "a{", "a{,3}", "a{x}", "a{9999}", "a{3,2}", "\\", r"\1", r"\b"),
        *(r"\Ax", "(?P<n>a)", "(?<=a)b", "(?i)a", "a*+", "[z-a]", "]", "}", r"[\W]", r"[\d-z]", "(?#a)"),
        *("(" * 50 + ")" * 50, "a" * 2000),
    ],
)
def test_refused(pattern: str) -> None:
    with pytest.raises(QwenRtError, match="of the quantization config has"):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", ".*.*.*.*.*.*.*.*x", "((((a*)*)*)*)*$", "(((a{100}){100}){100}){100}",
     "((((.?){99}){99}){99}){99}x", "(((((^){100}){100}){100}){100}){100}", "(a?){100}a{100}"],
)  # fmt: skip
def test_hostile_patterns_are_quick(pattern: str) -> None:
    start = time.perf_counter()
    compiled = Pattern(pattern)
    for _ in range(10):
        with contextlib.suppress(QwenRtError):  # too many repetitions
            compiled.matches("a" * 60 + "b")
    assert time.perf_counter() - start < 2
