"""The benchmark of what eight bits do to keys and values: rows, and that biases of any size do not show in ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_rt.benchmarks import bench_kv_error, harness
from qwen_rt.benchmarks.bench_kv_error import WAYS, check_plan, main
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.quantize.kv import KvPlan, choose_kv_offsets
from qwen_rt.quantization import KV_FORMATS
from qwen_rt.row_reader import CheckpointRows


def test_rows_of_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "_busy_share", lambda: 0.0)
    monkeypatch.setattr(harness, "git_state", lambda: ("0" * 40, False))
    monkeypatch.setattr(bench_kv_error, "NANO_FACTORS", (1, 300))
    assert main(["--results", str(tmp_path)]) == 0
    rows = harness.read_rows(tmp_path)
    assert [row["contender"] for row in rows] == [*WAYS] * len(KV_FORMATS) * 2
    assert {row["settings"]["kv_format"] for row in rows} == set(KV_FORMATS)
    error = {
        (row["contender"], row["settings"]["kv_format"], row["settings"]["largest_key_bias"]): row["metrics"]
        for row in rows
    }
    small, large = sorted({bias for _, _, bias in error})
    assert large > 200
    for kv_format in KV_FORMATS:
        ours = [error["qwen-rt", kv_format, bias]["largest_key_error_ratio"] for bias in (small, large)]
        assert max(ours) < 1.1 * min(ours), "the size of a bias should not show"
        for contender in ("no offset", "per tensor"):
            assert error[contender, kv_format, large]["key_error_ratio"] > 20 * ours[1]
    assert "8 of 16 heads split" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kv_error, "NANO_FACTORS", (1,))
    assert main(["--results", str(tmp_path), "--dry"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench_kv_error, "NANO_FACTORS", ())
    assert main(["--dry", "--checkpoint", str(tmp_path / "none")]) > 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_plans_that_differ_do_not_pass() -> None:
    opened = Checkpoint.open("nano")
    plans = [choose_kv_offsets(CheckpointRows(opened), opened.spec, "fp8", seed=seed) for seed in (0, 1)]
    assert check_plan(plans[0], KvPlan("fp8", plans[0].layers))["passed"]
    assert not check_plan(*plans)["passed"]
