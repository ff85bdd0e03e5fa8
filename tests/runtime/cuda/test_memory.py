"""Allocations that go back together, sizes of the cache, the report."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rt.errors import CapacityError, QwenRtError
from qwen_rt.runtime.cuda.memory import (
    Layout,
    MemoryReport,
    Resources,
    align,
    block_bytes,
    count_blocks,
    require_memory,
    reserve_bytes,
)
from qwen_rt.spec import ModelSpec

from ...core.configs import released_config
from .fake import FakeGpu, small_spec

SPEC = ModelSpec.from_config(released_config("7B"))
BLOCK = 2 * 28 * 4 * 128 * 2 * 64  # k and v, layers, heads, dims, bytes, tokens


def test_blocks_are_counted_by_what_they_take() -> None:
    assert block_bytes(SPEC) == BLOCK == 3_670_016
    assert count_blocks(SPEC, 8 << 30) == (8 << 30) // BLOCK == 2340
    assert count_blocks(SPEC, 10 * BLOCK + 1) == 10
    assert count_blocks(SPEC, 11 * BLOCK - 1) == 10
    assert count_blocks(SPEC, 100 * BLOCK, 33) == 33
    assert count_blocks(SPEC, 20 * BLOCK, 33) == 20
    assert count_blocks(SPEC, 2 * BLOCK, 1) == 2


@pytest.mark.parametrize("budget", [-5, 0, BLOCK, 2 * BLOCK - 1])
def test_too_few_blocks_are_refused_with_the_numbers(budget: int) -> None:
    with pytest.raises(CapacityError, match=r"kv_memory=5 is .* MB; expected at least 7\.3 MB, 2 blocks"):
        count_blocks(SPEC, budget, name="kv_memory=5")


def test_the_line_of_too_little_memory_has_all_numbers() -> None:
    parts = {"weights": 7_600_000_000, "workspace": 400_000_000, "nothing": 0}
    require_memory(8_000_000_000, parts)
    with pytest.raises(CapacityError, match=r"needs 7\.6 GB of weights and 0\.4 GB of workspace; 5\.1 GB free"):
        require_memory(5_100_000_000, parts)


def test_the_reserve_grows_with_the_device() -> None:
    assert reserve_bytes(0) == 256 << 20
    assert reserve_bytes(100 << 30) == (256 << 20) + int(0.03 * (100 << 30))


def test_pools_of_all_layers_stay_aligned() -> None:
    for spec in (SPEC, small_spec(), small_spec(num_key_value_heads=1, head_dim=2, num_attention_heads=1)):
        for blocks in (1, 3):
            assert blocks * block_bytes(spec) // (2 * spec.num_layers) % 256 == 0


def test_a_layout_keeps_its_arrays_apart(gpu: FakeGpu) -> None:
    layout = Layout({"a": (np.int64, (3,)), "b": (np.float32, (2, 33)), "c": (np.uint8, (1,))})
    assert layout.offsets == {"a": 0, "b": 256, "c": 256 + align(264)}
    assert layout.nbytes == 256 + 512 + 256
    resources = Resources(gpu.cuda)
    views = layout.views(resources.pinned(layout.nbytes))
    for value, array in enumerate(views.values(), 1):
        array[:] = value
    assert [(array.min(), array.max()) for array in views.values()] == [(1, 1), (2, 2), (3, 3)]
    assert layout.addresses(1000) == {"a": 1000, "b": 1256, "c": 1768}
    with pytest.raises(QwenRtError, match="of a pinned buffer"):
        resources.pinned(8).array(np.int64, (2,))
    resources.close()


def test_resources_go_back_once_and_in_any_case(gpu: FakeGpu) -> None:
    resources = Resources(gpu.cuda)
    first, size = resources.device(1)
    assert size == 2 << 20
    assert first % 256 == 0
    second, _ = resources.device(3 << 20)
    resources.stream()
    resources.event()
    resources.pinned(10)
    resources.release(first)
    resources.release(first)
    assert gpu.live() == {"device": 1, "pinned": 1, "stream": 1, "event": 1}
    assert second
    resources.close()
    resources.close()
    assert gpu.live() == {}


def test_a_report_adds_up() -> None:
    report = MemoryReport(weights=5, kv_cache=4, workspace=3, buffers=2, runtime=6, driver_used=25)
    assert report.total == 20
    assert report.unaccounted_share == 0.2
    assert "driver_used 0.00 GB" in str(report)
