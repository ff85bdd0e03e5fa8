"""The benchmark of quantized nano bundles: which variants a target has, and its rows for target cuda without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_rt.benchmarks import bench_nano_accuracy, bench_nano_quantized, harness
from qwen_rt.benchmarks.bench_nano_quantized import VARIANTS, main, variants_of

from ..runtime.cuda_bundle import install


def test_rounded_activations_are_the_cpus() -> None:
    assert variants_of("cpu") == list(VARIANTS)
    left_out = set(VARIANTS) - set(variants_of("cuda"))
    assert left_out == {"int8, int8 activations", "int4, int8 activations"}


def test_rows_of_target_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The session of this test has the checkpoint's weights, whatever was quantized."""
    made = install(monkeypatch)
    rows: list[dict[str, Any]] = []
    gpu = {"name": "A GPU", "memory_gb": 80.0}
    monkeypatch.setattr(bench_nano_quantized, "describe_gpu", lambda device: gpu)
    monkeypatch.setattr(bench_nano_accuracy, "MAX_TOKENS", 4)  # no answer, but the same of both
    monkeypatch.setattr(harness, "append_row", lambda row, file: rows.append(row))
    assert main(["--target", "cuda", "--limit", "2", "--variant", "fp8"]) == 0
    assert len(made) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    assert [row["benchmark"] for row in rows] == ["nano_quantized_cuda"] * 2
    assert [harness.problems_of(row) for row in rows] == [[], []]
    assert [row["settings"]["variant"] for row in rows] == ["bf16", "fp8"]
    assert rows[1]["metrics"]["lost_ratio"] == 0.0
    assert rows[1]["device"]["gpu"] == gpu
    assert rows[1]["bars"]["lost_points"]["met"] is True
