"""The accuracy benchmark: how answers are compared, and the whole of it for target cuda without a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qwen_rt.benchmarks import bench_nano_accuracy
from qwen_rt.benchmarks.bench_nano_accuracy import agreement, exact_match, main
from qwen_rt.runtime.outputs import RequestMetrics, RequestOutput

from ..runtime.cuda_bundle import install


def output(tokens: list[int], text: str) -> RequestOutput:
    return RequestOutput((1, 2), text, tuple(tokens), "stop", None, RequestMetrics(0.1, 0.2))


def test_agreement_counts_answers_and_tokens() -> None:
    ours = [output([1, 2, 3, 4], "\\boxed{1}"), output([5, 6, 7], "\\boxed{2}"), output([8, 9], "\\boxed{3}")]
    theirs = [output([1, 2, 3, 4], "\\boxed{1}"), output([5, 0, 7, 8], "\\boxed{2}"), output([8], "\\boxed{4}")]
    found = agreement(ours, theirs)
    assert found["same_answers_as_cpu_ratio"] == pytest.approx(2 / 3)
    assert found["same_tokens_as_cpu_ratio"] == pytest.approx(1 / 3)
    assert found["tokens_before_difference_ratio"] == pytest.approx((4 + 1 + 1) / (4 + 4 + 2))
    assert set(agreement(ours, ours).values()) == {1.0}


def test_exact_match_in_all_and_by_kind() -> None:
    rows = [{"kind": "a", "answer": "1"}, {"kind": "a", "answer": "2"}, {"kind": "b", "answer": "3"}]
    outputs = [output([1], f"so \\boxed{{{answer}}}") for answer in ("1", "5", "3")]
    assert exact_match(rows, outputs) == {
        "exact_match_a_ratio": 0.5,
        "exact_match_b_ratio": 1.0,
        "exact_match_ratio": pytest.approx(2 / 3),
    }


def test_target_cuda_from_checkpoint_to_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = install(monkeypatch)
    rows: list[dict[str, Any]] = []
    gpu = {"name": "none"}
    monkeypatch.setattr(bench_nano_accuracy, "describe_gpu", lambda device: gpu)
    monkeypatch.setattr(bench_nano_accuracy, "write_row", lambda *given, **named: rows.append({"given": given} | named))
    assert main(["--target", "cuda", "--limit", "3", "--batch", "2"]) == 0
    (session,) = made
    assert session.is_closed
    assert max(call[1] for call in session.calls if call[0] == "set_rows") == 2
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "passed"
    ((benchmark, contender, metrics, facts),) = [row["given"] for row in rows]
    assert (benchmark, contender) == ("nano_accuracy_cuda", "qwen-rt")
    assert metrics["same_tokens_as_cpu_ratio"] == 1.0  # the executor of this test computes in float64
    assert (facts["batch"], facts["num_problems"]) == (2, 3)
    assert rows[0]["gpu"] is gpu


def test_without_a_gpu_target_cuda_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_nano_accuracy, "load", lambda path: [])
    assert main(["--target", "cuda", "--device", "99"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: device=99; expected one of ")
    assert line.count("\n") == 1


def test_transformers_is_not_needed_to_compare_targets() -> None:
    code = "import sys; import qwen_rt.benchmarks.bench_nano_accuracy; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
