"""What `qwen-rt profile` writes: tables, JSON, a trace that Perfetto can open, a picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.profile.gpu_steps import HostSpan
from qwen_rt.benchmarks.profile.on_cuda import _tracks, decode_steps
from qwen_rt.benchmarks.profile.picture import draw_profiles
from qwen_rt.benchmarks.profile.profile import SCHEMA, Profile, Span, to_document
from qwen_rt.benchmarks.profile.run import run
from qwen_rt.benchmarks.profile.saved import MOST_BYTES, read_profiles
from qwen_rt.benchmarks.profile.text import device_text, profile_text, title_of
from qwen_rt.benchmarks.profile.trace import lanes, trace_bytes, trace_events
from qwen_rt.benchmarks.profile.waterfall import CAUSES, Call, Step, make_waterfall
from qwen_rt.errors import UsageError

from . import profile_kit as kit

FLOORS = {"rmsnorm_qkv": 4.0, "o_proj_residual": 1.0, "rmsnorm_gate_up_silu": 9.0, "lm_head": 7.0}
SETTINGS = {"model": "7b", "precision": "fp8", "kv_cache": "bf16", "layers": 2, "rows": 1, "prompt": 128}


def profile(*, apart_us: float = 1.0, **changes: Any) -> Profile:
    records = kit.steps(6, 2, apart_us=apart_us)
    steps, _ = decode_steps(records, 2)
    fall = make_waterfall(steps, FLOORS, {op: 1000.0 * us for op, us in FLOORS.items()})
    tracks = _tracks(records, [HostSpan("launch", 50_000, 60_000), HostSpan("wait", 61_000, 200_000)])
    made = Profile("decode", SETTINGS, "CUPTI", fall, tuple(steps), tracks, 140.0)
    return dataclasses.replace(made, **changes)


def test_the_tables() -> None:
    text = profile_text(profile(), "one GPU, read 3000 GB/s")
    lines = text.splitlines()
    # 13 kernels of 10 µs, 12 gaps of 1 µs, 5 µs between steps.
    assert lines[0] == "decode, 7b fp8, 1 row, prompt 128: 147.0 µs a step = floor 34.0 + lost 113.0"
    assert lines[1] == "one GPU, read 3000 GB/s"
    assert lines[2] == "4 steps, 147.0 to 147.0 µs, by CUPTI; without recording 140.0 µs"
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:] if line}
    assert rows["rmsnorm_qkv"] == ["2", "20.0", "8.0", "2.0", "14.0", "12%", "40%"]
    assert rows["sample"] == ["1", "10.0", "0.0", "1.0", "11.0", "10%"]
    assert rows["whole"][1:] == ["130.0", "34.0", "17.0", "113.0", "100%", "23%"]
    for cause, us in profile().waterfall.causes.items():
        (line,) = (line for line in lines if line.startswith(CAUSES[cause]))
        assert line.split()[-3] == f"{us:.1f}"
    assert max(map(len, lines)) <= 110


def test_without_gaps_none_are_told() -> None:
    text = profile_text(profile(has_gaps=False, notes=("CUPTI was not found",)), "one GPU")
    assert "CUPTI was not found" in text
    assert CAUSES["gap"] not in text
    (line,) = (line for line in text.splitlines() if line.startswith("rmsnorm_qkv"))
    assert line.split()[4] == "-"


def test_titles() -> None:
    assert title_of(profile()) == "decode, 7b fp8, 1 row, prompt 128"
    of_cache = SETTINGS | {"kv_cache": "int8", "rows": 16}
    assert title_of(profile(settings=of_cache)) == "decode, 7b fp8, int8 KV cache, 16 rows, prompt 128"
    assert title_of(profile(phase="prefill")) == "prefill, 7b fp8, 128 tokens"


def test_the_document() -> None:
    document = to_document(
        [profile()], "qwen-rt profile 7b", "2026-01-01T00:00:00Z", {"name": "A GPU"}, {"cuda": "13.0"}
    )
    assert json.loads(json.dumps(document)) == document
    assert (document["schema"], document["kind"]) == (SCHEMA, "qwen-rt profile")
    assert {"date", "command", "device", "versions"} <= document.keys()
    (found,) = document["profiles"]
    assert found["settings"] == SETTINGS
    assert found["lost_us"] == pytest.approx(found["step_us"] - found["floor_us"])
    assert sum(cause["us"] for cause in found["causes"]) == pytest.approx(found["lost_us"], abs=0.01)
    assert [cause["cause"] for cause in found["causes"]] == list(CAUSES)
    between = next(cause["us"] for cause in found["causes"] if cause["cause"] == "between_steps")
    assert sum(op["lost_us"] for op in found["ops"]) + between == pytest.approx(found["lost_us"], abs=0.01)
    qkv = next(op for op in found["ops"] if op["op"] == "rmsnorm_qkv")
    assert (qkv["calls"], qkv["read_bytes"], qkv["kernel_us"]) == (2, 8000, 20.0)
    assert qkv["kernels"][0]["calls"] == 2
    assert found["step_without_recording_us"] == 140.0
    assert profile(alone_us=None).to_dict()["step_without_recording_us"] is None


# ---------------------------------------------------------------- trace


def span(start: float, end: float) -> Span:
    return Span("kernel", start, end, {})


def test_lanes() -> None:
    spans = [span(0, 10), span(6, 14), span(10, 20), span(12, 13), span(30, 31)]
    assert lanes(spans) == [[spans[0], spans[2], spans[4]], [spans[1]], [spans[3]]]
    assert lanes([]) == []


def slices(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name of a track → its slices."""
    events = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            found[names[event["pid"], event["tid"]]].append(event)
    return found


@pytest.mark.parametrize("apart_us", [1.0, -4.0])
def test_the_trace(apart_us: float) -> None:
    made = profile(apart_us=apart_us)
    document = trace_events([made], "A GPU")
    assert json.loads(trace_bytes([made], "A GPU")) == document
    tracks = slices(document)
    streams = ["stream 7", "stream 7, overlapping"] if apart_us < 0 else ["stream 7"]
    assert list(tracks) == ["host", "steps", "ops", *streams]
    for events in tracks.values():  # slices of a track are apart, or Perfetto draws them wrongly
        for before, after in itertools.pairwise(events):
            assert after["ts"] >= before["ts"] + before["dur"] - 2e-3
    kernels = [event for name in streams for event in tracks[name]]
    assert len(kernels) == 6 * 13
    assert {event["dur"] for event in kernels} == {10.0}
    assert min(event["ts"] for events in tracks.values() for event in events) == 0
    assert len(tracks["steps"]) == 4
    ops = [event for event in tracks["ops"] if event["name"] not in ("gap", "before the first op")]
    assert len(ops) == 4 * 13
    assert sum(event["dur"] for event in tracks["ops"]) == pytest.approx(4 * made.waterfall.step_us, abs=0.1)
    between_us = 4 * made.waterfall.between_us
    assert sum(event["args"]["lost_us"] for event in ops) + between_us == pytest.approx(
        4 * made.waterfall.lost_us, abs=0.1
    )
    names = {event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"}
    assert names == {"decode on A GPU"}
    kernel = tracks["stream 7"][0]
    assert kernel["name"] == "embed_kernel"
    assert {"kernel", "grid", "block", "shared_bytes", "registers"} <= kernel["args"].keys()


def test_phases_are_processes() -> None:
    document = trace_events([profile(), profile(phase="prefill")], "A GPU")
    assert {event["pid"] for event in document["traceEvents"]} == {1, 2}


# ---------------------------------------------------------------- picture


def faster_than_its_floor() -> Profile:
    step = Step(0, (Call("rmsnorm_qkv", 0, 3), Call("sample", 3, 4)))
    return profile(waterfall=make_waterfall([step], {"rmsnorm_qkv": 5.0}), steps=(step,))


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_picture(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    draw_profiles([profile(), faster_than_its_floor()], "one GPU", file)
    data = file.read_bytes()
    if name.endswith("png"):
        assert data.startswith(b"\x89PNG")
        return
    ElementTree.fromstring(data)
    draw_profiles([profile(), faster_than_its_floor()], "one GPU", file)
    assert b"<dc:date>" not in file.read_bytes()


def test_many_small_ops_are_one_bar(tmp_path: Path) -> None:
    from qwen_rt.benchmarks.profile.picture import _rows

    calls = [Call(f"op{index}", index, index + 1) for index in range(8)] + [Call("Gemm", 8, 2000)]
    step = Step(0, tuple(calls))
    fall = make_waterfall([step], {})
    rows = _rows(fall.ops, fall.step_us)
    assert [row[0] for row in rows] == ["Gemm  × 1", "8 small ops  × 8"]
    assert sum(sum(row[1:]) for row in rows) == pytest.approx(fall.step_us)


# ---------------------------------------------------------------- read back

DEVICE = {"name": "A GPU", "read_gb_s": 3000.0}


def saved(folder: Path, *profiles: Profile, device: dict[str, Any] = DEVICE) -> Path:
    document = to_document(profiles, "qwen-rt profile 7b", "2026-01-01T00:00:00Z", device, {"cuda": "13.0"})
    file = folder / "profile.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


def test_a_saved_profile_prints_and_draws_as_the_measured_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [profile(), profile(phase="prefill", has_gaps=False, alone_us=None, notes=("CUPTI was not found",))]
    device = DEVICE | {"matrix_tflop_s": 700.0}
    file = saved(tmp_path, *made, device=device)
    title = device_text(device, made)
    assert title == "one A GPU, read 3000 GB/s, bf16 products 700 TFLOP/s"
    run(str(file), picture=tmp_path / "again.svg")
    assert capsys.readouterr().out == "\n\n".join(profile_text(one, title) for one in made) + "\n"
    draw_profiles(made, title, tmp_path / "first.svg")
    words = [re.findall("<!-- (.+?) -->", (tmp_path / f"{name}.svg").read_text("utf-8")) for name in ("first", "again")]
    assert words[0] == words[1]
    assert "whole step" in words[0]


def test_a_saved_profile_of_a_cpu(tmp_path: Path) -> None:
    device = {"cpu": "A CPU", "num_cores": 8, "read_gb_s": 20.5}
    profiles, title = read_profiles(saved(tmp_path, profile(settings=SETTINGS | {"threads": 2}), device=device))
    assert title == "A CPU, 2 threads, read 20.5 GB/s"
    assert len(profiles) == 1


def test_the_committed_profiles_can_be_read() -> None:
    files = sorted(harness.RESULTS_FOLDER.glob("profile*.json"))
    assert files
    for file in files:
        (made,), title = read_profiles(file)
        assert made.waterfall.lost_us == pytest.approx(sum(made.waterfall.causes.values()), abs=0.1)
        assert title.startswith("one NVIDIA ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON; expected a profile"),
        ("[" * 100_000, "is no JSON"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "is no JSON"),
        ("[]", "is no profile; expected kind 'qwen-rt profile'"),
        ('{"kind": "qwen-rt gate"}', "is no profile"),
        ('{"kind": "qwen-rt profile", "schema": 9}', "has schema 9; expected 1; profile again"),
        ('{"kind": "qwen-rt profile", "schema": 1}', "lacks 'profiles'"),
        ('{"kind": "qwen-rt profile", "schema": 1, "profiles": [], "device": {}}', "damaged|lacks|has no profiles"),
        ('{"kind": "qwen-rt profile", "schema": 1, "profiles": [7], "device": {}}', "is damaged"),
        ('{"kind": "qwen-rt profile", "schema": 1, "profiles": [{"ops": []}], "device": {}}', "lacks 'step_range_us'"),
        (" " * (MOST_BYTES + 1), "has more than 16 MiB"),
    ],
)
def test_files_that_are_no_profile(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        run(str(file))


def test_a_saved_profile_is_not_measured(tmp_path: Path) -> None:
    file = saved(tmp_path, profile())
    with pytest.raises(UsageError, match=r"could not be read: No such file"):
        run(str(tmp_path / "none.json"))
    for option, wanted in (("json_file", "--json"), ("trace", "--trace")):
        options: dict[str, Any] = {option: tmp_path / "new.json"}
        with pytest.raises(UsageError, match=f"{wanted} .*new.json with .*; expected something to measure"):
            run(str(file), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
