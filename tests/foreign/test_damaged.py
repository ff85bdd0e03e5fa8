"""Damage at random to configs and tensors: what is read still fits, everything else is refused in a line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import QwenRtError
from qwen_rt.foreign import ForeignMatrix
from qwen_rt.quantization import dequantize

from . import layouts
from .kit import find_matrix, write_matrix
from .layouts import Written

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 4, 8, 16, 32, 48, 64, 128, 2**31, 2**63, 10**19, 1.5, 1e308, float("nan")),
    *("", "gptq", "fp8", "int", "group", "gemm", "pack-quantized", "re:", "re:(a+)+$", "Linear", "a\nb", "\x00"),
    *("x" * 300, [], {}, [[]], [None], ["re:.*"], [128, 128], ["Linear"] * 300, {"a": {}}, {"": []}),
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        found.append((value, key))
        found += places(child)
    return found


def read_or_refused(case: str, find: Callable[[], ForeignMatrix]) -> bool:
    """Whether a matrix is found and loaded; anything but that and one line of refusal fails the test."""
    message = ""
    try:
        matrix = find()
        tensor = matrix.load()
    except QwenRtError as error:
        message = str(error)
    except Exception as error:
        pytest.fail(f"{case}: {type(error).__name__}: {error}")
    else:
        assert tensor.scheme == matrix.scheme, case
        assert np.isfinite(dequantize(tensor)).all(), case
        return True
    assert message.isprintable(), case
    assert len(message) < 1500, case
    return False


@pytest.mark.parametrize(
    "write",
    [
        lambda: layouts.gptq(16, 64, act_order=True),
        lambda: layouts.awq(16, 64),
        lambda: layouts.compressed_integers(16, 64, symmetric=False),
        lambda: layouts.compressed_integers(16, 64, bits=8, packed=False),
        lambda: layouts.compressed_fp8(16, 64, strategy="block"),
        lambda: layouts.fp8(16, 64),
    ],
)
def test_damaged_configs_are_read_or_refused_in_a_line(tmp_path: Path, write: Callable[[], Written]) -> None:
    """What is read after damage still fits its tensors; everything else is refused, and nothing else is raised."""
    rng = random.Random(9)
    written = write()
    written.config.setdefault("dynamic", {})
    write_matrix(tmp_path, written)
    good = json.dumps(written.config)
    keys = [*sorted({key for _, key in places(written.config) if isinstance(key, str)}), "format", "dynamic"]
    num_read = 0
    for i in range(1000):
        config = json.loads(good)
        for _ in range(rng.randint(1, 3)):
            spots = places(config)
            if not spots:
                break
            container, key = rng.choice(spots)
            action = rng.randrange(4)
            if action == 0:
                del container[key]
            elif action == 1 and isinstance(container, dict):
                container[rng.choice(keys)] = container.pop(key)
            else:
                container[key] = json.loads(json.dumps(rng.choice(HOSTILE)))
        written.config = config
        num_read += read_or_refused(f"case {i}: {config}", lambda: find_matrix(tmp_path, written))
    assert 20 < num_read < 900


def test_damaged_tensors_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    """Random bytes in every part: no other exception, and never a number that is none."""
    rng = np.random.default_rng(4)
    for i, write in enumerate(
        [
            lambda: layouts.gptq(16, 64, act_order=True),
            lambda: layouts.awq(16, 64),
            lambda: layouts.compressed_integers(16, 64, symmetric=False),
            lambda: layouts.compressed_integers(16, 64, bits=8, packed=False),
            lambda: layouts.fp8(16, 64),
        ]
    ):
        for case in range(60):
            written = write()
            part = list(written.tensors)[case % len(written.tensors)]
            dtype, array = written.tensors[part]
            raw = np.frombuffer(array.tobytes(), np.uint8).copy()
            raw[rng.integers(0, raw.size, 3)] = rng.integers(0, 256, 3)
            written.tensors[part] = (dtype, raw.view(array.dtype).reshape(array.shape))
            read_or_refused(f"{i} {part}", partial(write_matrix, tmp_path / str(i), written))
