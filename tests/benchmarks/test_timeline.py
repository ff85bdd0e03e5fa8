"""`bench timeline` without a GPU: gaps, leads, summary and picture of made-up times; a real session on the fake GPU."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qwen_rt.benchmarks import bars, bench_latency, harness, timeline
from qwen_rt.benchmarks.timeline import Timeline, timeline_metrics, timeline_text
from qwen_rt.benchmarks.timeline_picture import _tick_us, draw_timeline
from qwen_rt.errors import UsageError, VerificationError
from qwen_rt.runtime.cuda.bench import StepTimes, record_steps

from ..runtime.cuda.fake import FakeGpu, compile_fake
from ..runtime.cuda.kit import open_session
from .fake_model import model_on

SVG = "{http://www.w3.org/2000/svg}"


def steady(count: int, *, gap: float = 2.0, busy: float = 998.0) -> Timeline:
    """`count` steps and two more: the host wakes 5 µs after a step, reads for 7, launches the one after next in 10."""

    def end(index: int) -> float:
        return index * (busy + gap) + busy

    times = []
    for index in range(count + 2):
        launched = end(index - 2) + 13.0
        awake = end(index) + 5.0
        times.append(
            StepTimes(
                launched, launched + 10.0, end(index - 1) + 24.0, awake, awake + 7.0, end(index) - busy, end(index)
            )
        )
    return Timeline(tuple(times), 3.0)


def late() -> Timeline:
    """One step told; the next is launched 20 to 30 µs after its end, the event before it came at once."""
    return Timeline(
        (
            StepTimes(-20, -10, -9, 105, 110, 0, 100),
            StepTimes(120, 130, 131, 235, 240, 101, 230),
            StepTimes(131, 132, 241, 331, 333, 232, 330),
        ),
        1.0,
    )


def test_steady_steps() -> None:
    steps = steady(4)
    assert len(steps.steps) == 4
    assert steps.idle_us == pytest.approx([2.0] * 4)
    assert steps.idle_share == pytest.approx(0.002)
    assert steps.device_us == pytest.approx([998.0] * 4)
    assert (steps.launch_us, steps.read_us) == (pytest.approx([10.0] * 4), pytest.approx([7.0] * 4))
    assert steps.host_us == pytest.approx([17.0] * 4)
    assert steps.itl_ms == pytest.approx([1.0] * 4)
    # Step 2 is launched 23 µs after the end of step 0, 1000 µs before that of step 1.
    assert steps.lead_us == pytest.approx([977.0] * 4)


def test_a_gap_before_one_step() -> None:
    steps = steady(4)
    moved = [
        step if index < 2 else StepTimes(*(value + 40.0 for value in vars(step).values()))
        for index, step in enumerate(steps.times)
    ]
    steps = Timeline(tuple(moved), 3.0)
    assert steps.idle_us == pytest.approx([2.0, 42.0, 2.0, 2.0])
    assert steps.idle_share == pytest.approx(48.0 / 4040.0)


def test_a_step_launched_too_late_is_idle_time_until_its_launch_has_returned() -> None:
    steps = late()
    assert steps.lead_us == [-30.0]
    assert steps.idle_us == [30.0]
    assert steps.idle_share == pytest.approx(30.0 / 130.0)


def test_a_launch_that_returns_after_its_step_counts_to_the_end_of_that() -> None:
    first, second, third = late().times
    second = StepTimes(**{**vars(second), "launch_end_us": 400.0})
    assert Timeline((first, second, third), 1.0).idle_us == [130.0]


def test_overlapping_events_are_no_negative_time() -> None:
    steps = steady(2, gap=-0.5)
    assert steps.idle_us == [0.0, 0.0]
    assert steps.idle_share == 0.0


def row_of(steps: Timeline, **settings: Any) -> dict[str, Any]:
    metrics = timeline_metrics(steps, [0.99, 1.0, 1.01], [0.98])
    given = {"model": "1.5b", "weights": "bf16", "source": "random", "layers": 28, "rows": 1, "prompt": 128}
    return harness.make_row(
        "timeline", "qwen-rt", metrics, given | settings, check={"passed": True}, run="run-1", gpu={"name": "A GPU"}
    )


def test_a_row_serves_the_bar() -> None:
    row = row_of(steady(8))
    metrics = row["metrics"]
    assert metrics["idle_us"] == {"median": 2.0, "p10": 2.0, "p90": 2.0, "n": 8}
    assert (metrics["idle_max_us"], metrics["host_max_us"], metrics["lead_min_us"]) == (2.0, 17.0, 977.0)
    assert metrics["itl_ms"]["n"] == 8
    assert (metrics["itl_without_events_ms"]["median"], metrics["device_ms"]["n"]) == (1.0, 1)

    def verdict(*rows: dict[str, Any]) -> bars.Verdict:
        return {found.bar.id: found for found in bars.judge(bars.load(), rows)}["idle"]

    assert (verdict(row).state, verdict(row).value) == ("PASS", pytest.approx(0.002))
    assert verdict(row_of(late())).state == "SHORT"
    assert verdict(row_of(steady(8), rows=16), row_of(steady(8), model="7b")).state == "NO ROW"


def test_the_table_has_a_line_for_each_step_and_a_summary() -> None:
    steps = steady(3)
    text = timeline_text(steps, "1.5b bf16, 1 row", timeline_metrics(steps, [1.25], [0.75])).splitlines()
    assert text[0] == "1.5b bf16, 1 row; µs, host and device within ±3.0"
    assert text[2].split() == ["1", "-979.0", "0.0", "998.0", "998.0", "2.0", "977.0", "10.0", "7.0"]
    assert [line.split()[0] for line in text[2:5]] == ["1", "2", "3"]
    assert text[5] == "device idle between steps: median 2.0 µs, max 2.0 µs, 0.20% of the time"
    assert "median 17.0 µs, max 17.0 µs; launched 977.0 µs or more before" in text[6]
    assert text[7] == "ms a token: 1.0000 with events, 1.2500 without; the device alone 0.7500"


# ---------------------------------------------------------------- picture


def parse(steps: Timeline, title: str = "1.5b bf16, 1 row") -> tuple[ElementTree.Element, list[str]]:
    root = ElementTree.fromstring(draw_timeline(steps.times, steps.idle_us, steps.clock_us, title))
    return root, [text.text or "" for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("count", [2, 8, 64])
def test_the_picture_has_a_box_for_all_that_happened(count: int) -> None:
    root, _ = parse(steady(count))
    boxes: dict[str, list[float]] = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            x, width = float(rect.get("x", "")), float(rect.get("width", ""))
            assert x >= 80
            assert width >= 1
            assert x + width <= 1131
            boxes.setdefault(title.text or "", []).append(width)
    for number in range(1, count + 1):
        assert f"step {number}: 998.0 µs" in boxes
        assert f"idle after step {number}: 2.0 µs" in boxes
        assert f"reading step {number}: 7.0 µs" in boxes
        assert f"wait for step {number}: 981.0 µs" in boxes
        assert f"launch of step {number + 2}: 10.0 µs" in boxes
    # Boxes of the overview are as long as what they stand for.
    scale = 1050 / (count * 1000 + 21)
    assert boxes["step 2: 998.0 µs"][0] == pytest.approx(998 * scale, abs=0.01)


def test_the_picture_says_what_it_shows() -> None:
    root, texts = parse(steady(8), "a <model> & more")
    assert "Decode steps: a <model> & more" in texts
    assert any("agree within ±3.0 µs" in text for text in texts)
    assert texts.count("host") == texts.count("device") == 2
    assert {"host launches a step", "host reads its tokens", "host waits", "device computes", "device idle"} <= {*texts}
    assert "µs since the first step's start on the device" in texts
    assert "8000" in texts
    assert "device idle: 2.0 µs" in texts
    assert "host awake 5.0 µs after the end of step 1" in texts
    assert "launch of step 3: 10.0 µs, done 977.0 µs before its turn" in texts
    assert sum("each is launched before" in text for text in texts) == 1
    height = float(root.get("height", ""))
    assert all(float(text.get("y", "")) < height for text in root.iter(f"{SVG}text"))
    document = ElementTree.tostring(root, encoding="unicode")
    assert set(re.findall(r'https?://[^"]*', document)) == {"http://www.w3.org/2000/svg"}


def test_a_late_launch_is_told_in_the_picture() -> None:
    _, texts = parse(late())
    assert "1 steps: some are launched too late" in texts
    assert "device idle: 30.0 µs" in texts


@pytest.mark.parametrize(("span", "tick"), [(10.0, 1), (11.5, 2), (54.0, 5), (99.0, 10), (8832.0, 1000), (0.5, 0.05)])
def test_ticks_are_round(span: float, tick: float) -> None:
    assert _tick_us(span) == pytest.approx(tick)


# ---------------------------------------------------------------- on a session


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The fake GPU runs work when it is given; its events get the host's time here."""
    (tmp_path / "library").mkdir()
    gpu = FakeGpu(compile_fake(tmp_path / "library"))
    passed: dict[int, float] = {}
    record = gpu.cuda.event_record

    def event_record(event: int, stream: int) -> None:
        record(event, stream)
        passed[event] = time.perf_counter()

    monkeypatch.setattr(gpu.cuda, "event_record", event_record)
    monkeypatch.setattr(gpu.cuda, "elapsed_ms", lambda start, stop: 1e3 * (passed[stop] - passed[start]))
    return gpu


def test_steps_are_recorded_one_ahead(gpu: FakeGpu, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with open_session(gpu, tmp_path / "weights") as session:
        before = gpu.live()
        times, clock_us = record_steps(session, 3, 40, 5)
        after = gpu.live()
        assert after.pop("exec") - before.pop("exec", 0) == 1  # the captured step stays
        assert after == before
        assert len(times) == 5
        assert clock_us > 0
        for step in times:
            assert step.launch_start_us <= step.launch_end_us <= step.wait_start_us <= step.read_start_us
            assert step.read_start_us < step.read_end_us
            assert step.device_start_us <= step.launch_start_us + clock_us
            assert step.launch_end_us <= step.device_end_us + clock_us
        for step, following in pairwise(times):
            assert following.launch_end_us <= step.wait_start_us
            assert step.read_end_us <= following.wait_start_us
        assert session.graph == 0
        assert record_steps(session, 1, 40, 1)[0][0].device_end_us > 0
        with pytest.raises(UsageError, match="steps=0"):
            record_steps(session, 1, 40, 0)
        with pytest.raises(UsageError, match="rows=0"):
            record_steps(session, 0, 40, 1)
    with pytest.raises(UsageError, match="the session is closed"):
        record_steps(session, 1, 40, 1)


@pytest.fixture
def opened(gpu: FakeGpu, tmp_path: Path) -> tuple[bench_latency.Model, bench_latency.Gpu]:
    model = model_on(gpu, tmp_path / "weights", "random")
    return model, bench_latency.Gpu(gpu.cuda, tmp_path, {}, "A GPU", 1e12, None)


@pytest.fixture
def found(opened: tuple[bench_latency.Model, bench_latency.Gpu], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`timeline.run` finds the tiny model and the fake GPU."""
    monkeypatch.setattr(timeline, "find_model", lambda *_: opened[0])
    monkeypatch.setattr(timeline, "open_gpu", lambda *_, **__: opened[1])
    return


@pytest.mark.parametrize(("rows", "prompt", "steps"), [(1, 128, 8), (5, 60, 3), (1, 1, 1)])
@pytest.mark.usefixtures("found")
def test_a_run_writes_a_row_a_table_and_a_picture(
    rows: int, prompt: int, steps: int, gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = gpu.live()
    output, picture = tmp_path / "rows" / "timeline.jsonl", tmp_path / "timeline.svg"
    timeline.run("tiny", rows, prompt, steps, output=output, picture=picture, quiet=True)
    assert gpu.live() == before
    (row,) = harness.read_rows(output.parent)
    assert harness.problems_of(row) == []
    assert (row["benchmark"], row["contender"], row["check"]["equal_share"]) == ("timeline", "qwen-rt", 1.0)
    assert (row["settings"]["rows"], row["settings"]["prompt"]) == (rows, prompt)
    assert row["device"]["gpu"]["name"] == "A GPU"
    metrics = row["metrics"]
    samples = ("idle_us", "host_us", "lead_us", "device_step_us", "itl_ms", "itl_without_events_ms", "device_ms")
    assert [metrics[name]["n"] for name in samples] == [steps] * len(samples)
    assert 0 < metrics["idle_ratio"] < 1  # work is done within its launch: the fake device waits for every one
    assert 0 < metrics["host_us"]["median"] <= metrics["host_max_us"]
    texts = [text.text for text in ElementTree.parse(picture).iter(f"{SVG}text")]
    plural = "s" if rows > 1 else ""
    assert f"Decode steps: tiny bf16, {rows} row{plural}, prompt {prompt}, one A GPU" in texts
    shown = capsys.readouterr().out
    assert shown.startswith(f"tiny bf16, {rows} row{plural}, prompt {prompt}, one A GPU; µs")
    assert len(shown.splitlines()) == 5 + steps


@pytest.mark.usefixtures("found")
def test_a_row_says_what_is_stored(
    opened: tuple[bench_latency.Model, bench_latency.Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stored = dataclasses.replace(opened[0], precision="int4", kv_format="int8")
    monkeypatch.setattr(timeline, "find_model", lambda *_: stored)
    timeline.run("tiny", 1, 128, 2, output=tmp_path / "rows" / "timeline.jsonl", quiet=True)
    (row,) = harness.read_rows(tmp_path / "rows")
    assert (row["settings"]["weights"], row["settings"]["kv_cache"]) == ("int4", "int8")
    assert capsys.readouterr().out.startswith("tiny int4, int8 KV cache, 1 row, prompt 128")


@pytest.mark.usefixtures("found")
def test_nothing_is_written_without_a_passed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu
) -> None:
    def refuse(session: object, **_: Any) -> dict[str, Any]:
        raise VerificationError("other tokens")

    monkeypatch.setattr(timeline, "check_tokens", refuse)
    before = gpu.live()
    output, picture = tmp_path / "timeline.jsonl", tmp_path / "timeline.svg"
    with pytest.raises(VerificationError, match="other tokens"):
        timeline.run("tiny", 1, 128, 2, output=output, picture=picture, quiet=True)
    assert gpu.live() == before
    assert not output.exists()
    assert not picture.exists()


@pytest.mark.usefixtures("found")
def test_without_output_and_picture_only_the_table_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    timeline.run("tiny", 1, 128, 2, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert "device idle between steps" in capsys.readouterr().out
