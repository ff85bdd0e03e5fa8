"""`bench latency` drives the real session, which stands on the fake GPU of the session's own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import bench_latency, harness
from qwen_rt.benchmarks.latency import Plan
from qwen_rt.benchmarks.latency_report import latency_text

from ..runtime.cuda.fake import FakeGpu, compile_fake
from .fake_model import model_on

PLAN = Plan(rows=(1, 2, 5), prompts=(1, 100), first_token_prompts=(150,), steps=8, repeats=2)


@pytest.fixture
def gpu(tmp_path: Path) -> FakeGpu:
    (tmp_path / "library").mkdir()
    return FakeGpu(compile_fake(tmp_path / "library"))


def test_every_point_is_measured_on_a_session(gpu: FakeGpu, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    def write(metrics: dict[str, Any], settings: dict[str, Any], check: dict[str, Any]) -> None:
        device = {"name": "A GPU", "read_gb_s": 1000.0}
        rows.append(harness.make_row("latency", "qwen-rt", metrics, settings, check=check, run="run-1", gpu=device))

    before = gpu.live()
    opened = bench_latency.Gpu(gpu.cuda, tmp_path, {}, "A GPU", 1e12, 7e14)
    model = model_on(gpu, tmp_path / "weights", "bundle")
    bench_latency.measure(model, PLAN, opened, write, quiet=True)
    assert gpu.live() == before

    points = [(row["settings"]["rows"], row["settings"]["prompt"]) for row in rows[:-2]]
    assert points == [(1, 128), (2, 128), (5, 128), (1, 1), (1, 100)]
    for row in rows[:-2]:
        metrics = row["metrics"]
        assert metrics["itl_ms"]["n"] == metrics["device_ms"]["n"] == PLAN.steps
        assert 0 < metrics["host_us"] < 1e6
    assert rows[0]["check"]["equal_share"] == 1.0
    assert rows[-1]["metrics"]["weights_load_gb_s"] > 0
    assert rows[-1]["metrics"]["weights_gb"] > 0
    assert [line.split()[0] for line in latency_text(rows).splitlines() if "bundle" in line] == ["tiny"] * 7
