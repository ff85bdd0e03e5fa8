"""What `bench latency` measures: points, the check before it, the arithmetic, rows, tables and the picture; no GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import bars, bench_latency, harness, latency, report
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.latency import Plan, check_tokens, decode_metrics, prefill_metrics, session_metrics
from qwen_rt.benchmarks.latency_report import draw_latency, latency_tables, latency_text
from qwen_rt.errors import CapacityError, QwenRtError, UsageError, VerificationError
from qwen_rt.spec import ModelSpec

from .fake_session import FakeSession
from .rows import decode_row

PLAN = Plan(rows=(1, 16), prompts=(1, 128, 30720), first_token_prompts=(6144,), steps=8, repeats=3)
BANDWIDTH = 4.57e12


def test_points_are_rows_at_one_prompt_and_prompts_at_the_fewest_rows() -> None:
    assert PLAN.points == ((1, 128), (16, 128), (1, 1), (1, 30720))
    assert Plan(rows=(4, 2), prompts=(6144,)).points == ((4, 128), (2, 128), (2, 6144))


def test_the_cache_holds_the_largest_point() -> None:
    spec = ModelSpec.from_config(SHAPES["7b"].config())
    block = 64 * spec.kv_bytes_per_token("bfloat16")
    assert PLAN.max_length >= 30720 + 2 * 8
    assert PLAN.max_length <= 32768
    assert PLAN.kv_bytes(spec) >= block * (1 + PLAN.max_length // 64)
    wide = Plan(rows=(64,), prompts=(128,))
    assert wide.kv_bytes(spec) >= block * (1 + 64 * -(-(128 + 2 * 64) // 64))
    assert wide.kv_bytes(spec) < 30e9
    assert Plan(rows=(1,), prompts=(1,)).max_rows == 2  # the check takes two


def test_the_check_passes_where_both_ways_agree() -> None:
    check = check_tokens(FakeSession())
    assert check["passed"] is True
    assert (check["equal_share"], check["worst_tie"]) == (1.0, 0.0)


def test_the_check_takes_a_tie_for_a_tie() -> None:
    check = check_tokens(FakeSession(wrong_steps=(3, 9), tie=latency.TIE / 2))
    assert check["passed"] is True
    assert check["equal_share"] == pytest.approx(26 / 30, abs=1e-3)
    assert check["worst_tie"] == pytest.approx(latency.TIE / 2)


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (FakeSession(wrong_steps=(5,)), "28 chose the token that a prefill chooses, the worst one lies inf below"),
        (FakeSession(wrong_steps=(5,), tie=2 * latency.TIE), "the worst one lies 1 below"),
        (FakeSession(wrong_steps=range(1, 16), tie=0.0), "0 chose the token"),
        (FakeSession(nan_in="decode"), "a decode step gave logits that are not finite"),
        (FakeSession(nan_in="prefill"), "a prefill gave logits that are not finite"),
    ],
)
def test_the_check_finds_a_wrong_model(session: FakeSession, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check_tokens(session)


def test_the_arithmetic_of_a_decode_point() -> None:
    """7B, 1 row at 30,720 tokens: 14.14 GB of weights, 1.76 GB of keys and values, 4.57 TB/s."""
    shape = SHAPES["7b"]
    metrics = decode_metrics(shape, shape.floor_bytes, 1, 30719, [4.0, 4.0, 5.0], [3.9], 25.0, BANDWIDTH)
    assert metrics["floor_ms"] == pytest.approx(14_140_571_648 / 4.57e9)
    assert metrics["floor_with_kv_ms"] == pytest.approx((14_140_571_648 + 1_761_607_680) / 4.57e9)
    assert metrics["itl_to_floor_ratio"] == pytest.approx(4 / 3.0942, rel=1e-4)
    assert metrics["itl_to_floor_with_kv_ratio"] == pytest.approx(4 / 3.4797, rel=1e-4)
    assert metrics["itl_ms"] == {"median": 4.0, "p10": 4.0, "p90": 4.8, "n": 3}
    assert (metrics["decode_tok_s"], metrics["host_us"]) == (250.0, 25.0)
    many = decode_metrics(shape, shape.floor_bytes, 16, 127, [4.0], [3.9], 25.0, BANDWIDTH)
    assert many["floor_ms"] == metrics["floor_ms"]
    assert many["floor_with_kv_ms"] - many["floor_ms"] == pytest.approx(16 * 128 * 57344 / 4.57e9)
    assert many["decode_tok_s"] == 4000.0
    fp8 = decode_metrics(shape, shape.floor_bytes_at("fp8"), 1, 127, [2.0], [1.9], 25.0, BANDWIDTH)
    scales = 28 * 4 * (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584)
    assert fp8["floor_ms"] == pytest.approx((6_525_288_448 + scales + 2 * 544_997_376) / 4.57e9)


def test_the_arithmetic_of_a_prefill() -> None:
    metrics = prefill_metrics(SHAPES["7b"], 6144, [139.5], [143.0, 145.0], 790e12)
    assert metrics["prefill_tflop_s"] == pytest.approx(610.0, rel=1e-3)
    assert metrics["share_of_matrix_ratio"] == pytest.approx(0.7722, rel=1e-3)
    assert (metrics["first_token_ms"]["median"], metrics["first_token_back_to_back_ms"]["median"]) == (139.5, 144.0)
    assert "matrix_tflop_s" not in prefill_metrics(SHAPES["7b"], 6144, [139.5], [143.0], None)
    assert prefill_metrics(SHAPES["7b"], 6144, [139.5], [143.0], 7e14, 1.4e15)["matrix_fp8_tflop_s"] == 1400.0


def test_memory_is_held_against_the_driver() -> None:
    metrics = session_metrics(FakeSession(), 20_200_000_000, 2.0, None, None, [20.0, 30.0])
    assert metrics["total_gb"] == pytest.approx(20.0)
    assert metrics["memory_difference_ratio"] == pytest.approx(0.2 / 20.2)
    assert metrics["slowest_host_us"] == 30.0
    assert (metrics["kv_tokens"], metrics["chunk_tokens"]) == (499 * 64, 32)
    assert metrics.keys() & {"weights_load_gb_s", "start_to_first_token_s"} == set()
    first = session_metrics(FakeSession(), 1, 2.0, 3.5, 12.0, [])
    assert (first["weights_load_gb_s"], first["start_to_first_token_s"]) == (12.0, 3.5)


class FakeCuda:
    """A device of 140 GB that loses 20 GB by the second look."""

    def __init__(self) -> None:
        self.free = [120 * 10**9, 100 * 10**9]

    def memory_info(self) -> tuple[int, int]:
        return (self.free.pop(0) if len(self.free) > 1 else self.free[0]), 140 * 10**9


def fake_gpu() -> bench_latency.Gpu:
    cuda: Any = FakeCuda()
    return bench_latency.Gpu(cuda, Path("lib.so"), {"driver": "580.1"}, "A GPU", BANDWIDTH, 700e12, 1300e12, 0.25)


def measured(session: FakeSession, source: str = "random") -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "perf_counter", lambda: session.clock_s)
        return _measured(session, source)


def _measured(session: FakeSession, source: str) -> list[dict[str, Any]]:
    @contextlib.contextmanager
    def start(gpu: bench_latency.Gpu, plan: Plan) -> Iterator[tuple[Any, float]]:
        yield session, 2.0

    rows: list[dict[str, Any]] = []
    gpu = {"name": "A GPU", "memory_gb": 140.0, "read_gb_s": 4570.0, "matrix_tflop_s": 700.0}

    def write(metrics: dict[str, Any], settings: dict[str, Any], check: dict[str, Any]) -> None:
        rows.append(harness.make_row("latency", "qwen-rt", metrics, settings, check=check, run="run-1", gpu=gpu))

    model = bench_latency.Model("7b", SHAPES["7b"], "bf16", "bf16", SHAPES["7b"].floor_bytes, source, start)
    bench_latency.measure(model, PLAN, fake_gpu(), write, begun_s=1.0, quiet=True)
    return rows


def test_every_figure_becomes_a_row_that_can_be_committed() -> None:
    session = FakeSession()
    rows = measured(session)
    assert [harness.problems_of(row) for row in rows] == [[]] * 6
    assert [row["settings"]["what"] for row in rows] == [*["decode"] * 4, "prefill", "session"]
    assert session.calls[0] == ("prefill", 128, 1)
    assert [call[:3] for call in session.calls[1:5]] == [("decode", *point) for point in PLAN.points]
    assert rows[1]["settings"] | {"model": "7b", "rows": 16, "prompt": 128, "source": "random"} == rows[1]["settings"]
    assert rows[1]["metrics"]["host_us"] == pytest.approx(36.0)
    assert rows[5]["metrics"]["slowest_host_us"] == pytest.approx(36.0)
    assert rows[5]["metrics"]["driver_gb"] == 20.0
    assert 3.25 <= rows[5]["metrics"]["start_to_first_token_s"] < 4.0
    assert [("kv_part_ms" in row["metrics"]) for row in rows[:4]] == [False, False, False, True]
    assert rows[3]["metrics"]["kv_part_ms"] == pytest.approx(0.0)  # this session's steps take as long at any prompt
    assert rows[4]["metrics"]["first_token_ms"]["median"] == pytest.approx(102.4)
    assert all(row["check"]["equal_share"] == 1.0 for row in rows)


def test_the_rows_serve_the_bars() -> None:
    rows = measured(FakeSession()) + measured(FakeSession(), source="bundle")
    states = {v.bar.id: v.state for v in bars.judge(bars.load(), rows)}
    served = {name for name, state in states.items() if state != "NO ROW"}
    third = {v.bar.id for v in bars.judge(bars.load(), [], 3)}
    assert {name: states[name] for name in served & third} == dict.fromkeys(
        ("7b-1-row", "7b-16-rows", "7b-first-token-6144", "7b-prompt-30720", "host", "load", "memory"), "PASS"
    )
    assert served - third == {"7b-bf16-1-row", "7b-bf16-16-rows"}


def test_steps_are_timed_as_the_engine_runs_them() -> None:
    session = FakeSession()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "perf_counter", lambda: session.clock_s)
        samples, host_us = latency.time_steps(session, 4, 100, 10, warm_up=3)
    assert samples == pytest.approx([3.59] * 10)
    assert host_us == pytest.approx(24.0)
    assert session.steps == session.waited == 14  # none is left under way


def test_a_wrong_model_has_no_number() -> None:
    with pytest.raises(VerificationError):
        measured(FakeSession(nan_in="decode"))


def test_the_table_of_a_terminal() -> None:
    text = latency_text(measured(FakeSession(), source="bundle"))
    lines = text.splitlines()
    assert lines[0] == "A GPU: reads 4.570 TB/s, bf16 products of 8192³ 700 TFLOP/s"
    titles = "rows prompt ms a token device, ms floor, ms × floor × floor with KV KV, ms tok/s host, µs"
    assert " ".join(lines[2].split()) == f"model weights KV cache from {titles}"
    stored = ["7b", "bf16", "bf16", "bundle"]
    point = [*stored, "16", "128", "3.71", "3.661", "3.094", "1.199", "1.189", "–", "4313", "36"]
    assert lines[4].split() == point
    assert len({len(line) for line in lines[2:7]}) == 1
    assert any(line.split()[:5] == [*stored, "6144"] for line in lines)
    assert lines[-1].split()[:5] == [*stored, "2"]


def test_the_tables_of_a_document() -> None:
    rows = [decode_row(1, 128, 3.3), decode_row(16, 128, 3.9), decode_row(1, 6144, 3.5), decode_row(1, 128, 3.2)]
    lines = report.table([*rows, decode_row(1, 128, 4.0, date="2025-01-01T00:00:00Z")], "latency").splitlines()
    titles = "rows | prompt | ms a token | floor, ms | × floor | × floor with KV"
    assert lines[0] == f"| model | weights | KV cache | from | {titles} |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")][4:7] for line in lines[2:5]]
    assert cells == [["1", "128", "3.2"], ["1", "6144", "3.5"], ["16", "128", "3.9"]]
    assert "A GPU" in lines[-1]
    assert latency_tables(rows[:1]).count("\n") == 3


def test_a_document_may_ask_for_rows_that_do_not_exist_yet() -> None:
    page = "<!-- results:latency -->\n<!-- /results -->\n<!-- results:bars -->\n<!-- /results -->\n"
    text = report.update(page, [])
    assert "No rows yet." in text
    assert text.count("| no row |") == len(bars.load())
    assert report.update(text, []) == text
    assert "No rows yet." not in report.update(text, [decode_row(1, 128, 3.3)])


def test_the_picture(tmp_path: Path) -> None:
    rows = measured(FakeSession())
    for name in ("latency.svg", "latency.png"):
        draw_latency(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    report.draw(rows, "latency", tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="no decode rows"):
        draw_latency(rows[-1:], tmp_path / "none.png")


def test_the_picture_has_every_gpu(tmp_path: Path) -> None:
    rows = [decode_row(count, 128, 3.0 + count / 16) for count in (1, 16)]
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        device = rows[0]["device"] | {"gpu": rows[0]["device"]["gpu"] | {"name": name}}
        rows += [row | {"device": device} for row in rows[:2]]
    draw_latency(rows, tmp_path / "three.svg")
    words = (tmp_path / "three.svg").read_text("utf-8")
    assert re.findall(r"<!-- one (.+?) -->", words) == ["A GPU", "NVIDIA H100 80GB HBM3", "NVIDIA H200"]


def test_one_models_single_point_can_be_drawn(tmp_path: Path) -> None:
    draw_latency([decode_row(1, 6144, 3.3)], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_named_shapes() -> None:
    full, cut = bench_latency.find_model("7b", None, 0), bench_latency.find_model("7b", 4, 0)
    assert (full.name, full.shape, full.source) == ("7b", SHAPES["7b"], "random")
    assert (cut.name, cut.shape) == ("7b-4-layers", dataclasses.replace(SHAPES["7b"], layers=4))
    assert bench_latency.find_model("7b", 28, 0).name == "7b"


def test_a_session_offers_what_is_timed() -> None:
    """The names that `measure` uses; what they mean is tested on a GPU."""
    from qwen_rt.runtime.cuda.session import CudaSession

    for name in ("time_decode", "time_prefill", "memory_report", "prefill", "set_rows", "launch_step", "wait_step"):
        assert callable(getattr(CudaSession, name))
    for name in ("load_stats", "host_seconds", "steps"):
        assert name in (CudaSession.__doc__ or "")


def test_a_model_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every model with every precision and cache; rows of those that could be measured, and one line of each other."""

    def find(name: str, layers: object, device: int, quiet: bool, stored: str, cache: str) -> bench_latency.Model:
        @contextlib.contextmanager
        def start(gpu: bench_latency.Gpu, plan: Plan) -> Iterator[tuple[Any, float]]:
            if stored == "int4":
                raise CapacityError("the model needs more")
            yield FakeSession(), 2.0

        return bench_latency.Model(name, SHAPES["7b"], stored, cache, SHAPES["7b"].floor_bytes, "random", start)

    monkeypatch.setattr(bench_latency, "find_model", find)
    monkeypatch.setattr(bench_latency, "open_gpu", lambda device, with_matrix_rate: fake_gpu())
    chosen: dict[str, Any] = {"precisions": ["int4", "fp8"], "kv_formats": ["bf16", "int8"], "quiet": True}
    with pytest.raises(QwenRtError, match="2 of 4 models failed"):
        bench_latency.run(["7b"], PLAN, output=tmp_path / "rows.jsonl", **chosen)
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if not line.startswith("warning: other programs")]
    assert errors == [f"7b, int4, {kv} KV: the model needs more" for kv in ("bf16", "int8")]
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    stored = {(row["settings"]["weights"], row["settings"]["kv_cache"]) for row in found}
    assert stored == {("fp8", "bf16"), ("fp8", "int8")}
    assert not any("start_to_first_token_s" in row["metrics"] for row in found), "an earlier model was in the way"
    with pytest.raises(CapacityError, match="the model needs more"):
        bench_latency.run(["7b"], PLAN, precisions=["int4"], quiet=True)
