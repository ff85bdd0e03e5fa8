"""Sizes of memory as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_rt.errors import UsageError
from qwen_rt.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("24GB", 24 * 10**9),
        (" 1.5 gib ", 3 << 29),
        ("0.1KB", 100),
        ("1.0009kb", 1000),
        ("512MiB", 512 << 20),
        ("2tib", 2 << 40),
        ("3 TB", 3 * 10**12),
        ("7", 7),
        ("7B", 7),
        (123456, 123456),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8G", "8 gigs", "-1GB", "1e9", "1_000", "0x10", "1.GB", "\u0663GB", "8GiB8"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"kv_memory=.*expected bytes, or a number with KB.*; write it like 8GiB"):
        parse_size(text, "kv_memory")


@pytest.mark.parametrize("value", [True, 1.5, None, [1]])
def test_what_is_no_text(value: Any) -> None:
    with pytest.raises(UsageError, match=r"size=.*expected bytes"):
        parse_size(value)


@pytest.mark.parametrize("value", [0, -5, "0", "0GiB", "0.2B"])
def test_nothing_is_too_little(value: int | str) -> None:
    with pytest.raises(UsageError, match="at least one byte"):
        parse_size(value)
