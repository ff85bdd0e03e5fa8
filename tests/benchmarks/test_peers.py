"""Other engines: the protocol of their worker, its failures, rows and tables. No engine is installed, no GPU used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import bench_latency, bench_peers, harness, peers, report
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.latency import Plan
from qwen_rt.benchmarks.peers import PEERS, Peer, events_of, find_python, task_of
from qwen_rt.benchmarks.peers_report import peers_rows, peers_text
from qwen_rt.errors import MissingDependencyError, QwenRtError, UsageError

from .fake_engines import FAKE_GENAI, FAKE_VLLM, write_package, write_worker
from .rows import decode_row, gpu_row

PLAN = Plan(rows=(1, 4), prompts=(128,), first_token_prompts=(128,), steps=8, repeats=2)
VLLM, GENAI = PEERS["vllm"], PEERS["ort-genai"]
TINY = dataclasses.replace(SHAPES["0.5b"], hidden=64, layers=1, heads=1, kv_heads=1, ffn=64)


def events(
    tmp_path: Path, body: str | None, peer: Peer = VLLM, timeout_s: float = 60.0, precision: str = "bf16"
) -> list[dict[str, Any]]:
    """All events of a made-up worker; None: of the real one."""
    folder = tmp_path / "model"
    folder.mkdir()
    worker = peers.WORKER if body is None else write_worker(tmp_path, body)
    task = task_of(peer, TINY, precision, PLAN, folder)
    log = tmp_path / "log"
    return list(events_of(peer, sys.executable, task, log, timeout_s=timeout_s, worker=worker))


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds, but not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_does_its_task(tmp_path: Path) -> None:
    found = events(tmp_path, "ready(); points(); answer('done')")
    assert [event["event"] for event in found] == ["progress", "ready", "decode", "decode", "first_token"]
    assert [event.get("rows") for event in found[2:4]] == [1, 4]
    assert (tmp_path / "log").read_text() == "loading\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("answer('failed', message='out of memory')", "vllm: out of memory; see .*log"),
        ("ready(); print('a library says hello', flush=True)", "worker said 'a library says hello'; expected events"),
        ("print('[1]', flush=True)", r"worker said '\[1\]'"),
        ("answer('other')", "worker said"),
        ("print('no such kernel', file=sys.stderr); sys.exit(3)", "vllm: ended with 3: no such kernel; see .*log"),
        ("ready(); points()", "vllm: ended with 0: loading"),
        ("sys.exit(0)", "vllm: ended with 0: it printed nothing"),
        ("os.kill(os.getpid(), 9)", "vllm: ended with -9"),
    ],
)
def test_a_worker_that_fails_is_told_in_a_line(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(QwenRtError, match=message) as caught:
        events(tmp_path, body)
    assert "\n" not in str(caught.value)


def test_a_worker_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    body = f"""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    ready()
    time.sleep(600)
    """
    start = time.monotonic()
    with pytest.raises(QwenRtError, match=r"vllm: not done after 3 s; see .*log"):
        events(tmp_path, body, timeout_s=3)
    assert time.monotonic() - start < 30
    wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_a_worker_ends_when_nobody_is_there_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker with an engine that hangs; its parent is killed."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    hang = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(hang, encoding="utf-8")
    parent = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, sys.argv[1], "vllm"], stdin=subprocess.PIPE, start_new_session=True)
worker.stdin.write(b'{"config": {}, "precision": "bf16", "points": [], "folder": "' + sys.argv[2].encode() + b'"}\\n')
worker.stdin.flush()
time.sleep(600)
"""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with subprocess.Popen([sys.executable, "-c", parent, str(peers.WORKER), str(tmp_path)]) as running:
        pid = tmp_path / "pid"
        wait_for(lambda: pid.exists() and pid.read_text() != "")
        running.send_signal(signal.SIGKILL)
    wait_for(lambda: not is_running(int(pid.read_text())))


def test_a_worker_is_ended_when_its_events_are_not_wanted_any_more(tmp_path: Path) -> None:
    worker = write_worker(tmp_path, "ready(); time.sleep(600)")
    task = task_of(VLLM, TINY, "bf16", PLAN, tmp_path)
    running = events_of(VLLM, sys.executable, task, tmp_path / "log", timeout_s=60, worker=worker)
    assert next(running)["event"] == "progress"
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < 20


def test_an_engine_that_is_not_installed(tmp_path: Path) -> None:
    """The real worker, in a Python that has no vLLM."""
    with pytest.raises(MissingDependencyError) as caught:
        events(tmp_path, None)
    assert str(caught.value) == (
        f"vllm: not installed in {sys.executable}; pip install vllm in a venv of its own and name it with --vllm-python"
    )


def test_the_python_of_a_peer(tmp_path: Path) -> None:
    assert find_python(VLLM, None) == sys.executable
    assert find_python(VLLM, sys.executable) == sys.executable
    with pytest.raises(UsageError, match=r"--ort-genai-python .*none is no program; expected a Python interpreter"):
        find_python(GENAI, str(tmp_path / "none"))


def test_vllm_is_driven_through_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_package(tmp_path / "site", FAKE_VLLM)))
    found = events(tmp_path, None)
    assert [event["event"] for event in found] == ["progress", "ready", "decode", "first_token", "decode"]
    assert found[1]["engine"]["compilation_config"] == {"cudagraph_capture_sizes": [1, 4]}
    assert [event["rows"] for event in found[2::2]] == [1, 4]
    assert all(len(event["step_ms"]) == 8 and event["equal_share"] == 1.0 for event in found[2::2])
    assert (len(found[3]["ms"]), found[3]["equal_share"]) == (2, 1.0)
    assert "vllm prints on stdout" in (tmp_path / "log").read_text()


def test_what_vllm_gets_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_package(tmp_path / "site", FAKE_VLLM)))
    monkeypatch.setenv("FAKE_TOKEN", "151936")
    with pytest.raises(QwenRtError, match="vllm: WrongOutputError: a token lies outside the vocabulary"):
        events(tmp_path, None)
    monkeypatch.setenv("FAKE_FAILURE", "1")
    (tmp_path / "model").rename(tmp_path / "first")
    with pytest.raises(QwenRtError, match="vllm: RuntimeError: no kernel for float-quantized"):
        events(tmp_path, None, precision="fp8")


def test_ort_genai_is_driven_through_its_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_package(tmp_path / "site", FAKE_GENAI)))
    found = events(tmp_path, None, GENAI)
    assert [event["event"] for event in found] == ["progress", "progress", "ready", "decode", "first_token", "decode"]
    assert "built bf16" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_a_batch_that_an_engine_cannot_run_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_package(tmp_path / "site", FAKE_GENAI)))
    monkeypatch.setenv("FAKE_NO_BATCH", "1")
    found = events(tmp_path, None, GENAI)
    assert [event["event"] for event in found[2:]] == ["ready", "decode", "first_token", "refused"]
    assert found[-1] == {"event": "refused", "rows": 4, "prompt": 128, "message": "RuntimeError: batch_size must be 1"}
    assert "4 rows, prompt 128: RuntimeError: batch_size must be 1" in (tmp_path / "log").read_text()


class FakeCuda:
    """A device of 80 GB."""

    def memory_info(self) -> tuple[int, int]:
        return 70 * 10**9, 80 * 10**9


def run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, **options: Any
) -> tuple[int, list[dict[str, Any]]]:
    """`bench peers` of 7B without a GPU, with our session left out and a made-up worker for every peer."""
    cuda: Any = FakeCuda()
    versions = {"driver": "580.1", "cuda": "13.0"}
    gpu = bench_latency.Gpu(cuda, Path("lib.so"), versions, "A GPU", 3.1e12, 700e12)
    worker = write_worker(tmp_path, body)

    def ours(model: Any, plan: Plan, gpu: Any, write: Any, *, quiet: bool) -> None:
        settings = {"model": model.name, "weights": model.precision, "kv_cache": "bf16", "source": "random"}
        settings |= {"layers": model.shape.layers, "what": "decode", "rows": 1, "prompt": 128}
        write({"itl_ms": harness.summarize([5.0]), "itl_to_floor_ratio": 1.1}, settings, {"passed": True})

    monkeypatch.setattr(bench_peers, "open_gpu", lambda device, with_matrix_rate: gpu)
    monkeypatch.setattr(bench_peers, "measure", ours)
    monkeypatch.setattr(peers, "WORKER", worker)
    monkeypatch.setattr(
        bench_peers,
        "task_of",
        lambda peer, shape, precision, plan, folder: task_of(
            dataclasses.replace(peer, needs_checkpoint=False), shape, precision, plan, folder
        ),
    )
    output = tmp_path / "rows.jsonl"
    code = bench_peers.run(["7b"], ["bf16"], PLAN, output=output, logs=tmp_path / "logs", quiet=True, **options)
    return code, [json.loads(line) for line in output.read_text().splitlines()]


def test_every_contender_has_rows_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run_with(tmp_path, monkeypatch, "ready(); points(); answer('done')")
    assert code == 0
    assert [harness.problems_of(row) for row in rows] == [[]] * 9
    assert [row["contender"] for row in rows] == ["qwen-rt", *["vllm"] * 4, *["ort-genai"] * 4]
    assert len({row["run"] for row in rows}) == 1
    assert {row["benchmark"] for row in rows} == {"latency"}
    session, first, second, prefill = rows[1:5]
    assert (session["settings"]["what"], session["metrics"]) == ("session", {"load_s": 2.5})
    assert rows[0]["settings"].keys() | {"engine"} == first["settings"].keys()
    assert first["metrics"]["itl_ms"] == {"median": 4.0, "p10": 4.0, "p90": 4.0, "n": 8}
    floor_ms = SHAPES["7b"].floor_bytes / 3.1e9
    assert first["metrics"]["itl_to_floor_ratio"] == pytest.approx(4.0 / floor_ms, rel=1e-3)
    assert second["metrics"]["decode_tok_s"] == 1000.0
    assert prefill["metrics"]["first_token_ms"]["n"] == 2
    assert [row["check"].get("equal_share") for row in rows[1:5]] == [None, 0.5, 0.5, 1.0]
    assert "first_token_back_to_back_ms" not in prefill["metrics"]
    assert first["versions"]["vllm"] == "9.8"
    assert (first["versions"]["driver"], first["device"]["gpu"]["read_gb_s"]) == ("580.1", 3100.0)
    shown = capsys.readouterr()
    assert "7b bf16, vllm: loading" in shown.err
    assert "vLLM, 1.25 ×" not in shown.out  # two peers with the same times
    assert shown.out.endswith("the lowest share of its points: vLLM 0.5, ORT GenAI 0.5.\n")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"vllm-7b-bf16.log", "ort-genai-7b-bf16.log"}


def test_points_without_a_figure_are_told_in_a_line_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = """
    ready()
    answer('decode', rows=1, prompt=128, step_ms=[4.0], num_tokens=2, equal_share=1.0)
    for rows in (16, 64):
        answer('refused', rows=rows, prompt=128, message='RuntimeError: one row\\nonly')
    answer('done')
    """
    code, rows = run_with(tmp_path, monkeypatch, body, peers=["ort-genai"])
    assert code == 1
    assert [row["settings"].get("rows") for row in rows] == [1, None, 1]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no figure" in line]
    points = "16 rows at 128 tokens, 64 rows at 128 tokens: RuntimeError: one row only"
    assert line.startswith(f"ort-genai, 7b bf16: no figure for {points}; see ")


@pytest.mark.parametrize(
    ("body", "options", "code", "message"),
    [
        ("answer('missing')", {}, 0, "vllm: not installed in"),
        ("answer('missing')", {"peers": ["vllm"]}, 1, "vllm: not installed in"),
        ("ready(); answer('failed', message='full')", {}, 1, "vllm: full"),
        ("ready(); answer('decode', rows=1)", {"peers": ["vllm"]}, 1, "event 'decode' lacks 'prompt'"),
        (
            "ready(); answer('first_token', prompt=128, ms=[], equal_share=1.0)",
            {"peers": ["vllm"]},
            1,
            r"vllm: its worker gave \[\] as times; expected positive numbers",
        ),
    ],
)
def test_a_peer_without_numbers_leaves_ours(
    body: str,
    options: dict[str, Any],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, rows = run_with(tmp_path, monkeypatch, body, **options)
    assert found == code
    assert rows[0]["contender"] == "qwen-rt"
    assert all(row["settings"]["what"] == "session" for row in rows[1:])
    err = capsys.readouterr().err
    assert re.search(message, err)


def test_a_precision_that_a_peer_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "find_model", lambda *given: bench_latency.find_model(*given[:4], "fp8"))
    _, rows = run_with(tmp_path, monkeypatch, "ready(); points(); answer('done')")
    assert {row["contender"] for row in rows} == {"qwen-rt", "vllm"}
    assert "ort-genai: not timed at fp8, only at bf16, int4" in capsys.readouterr().err


def test_only_shapes_have_peers() -> None:
    with pytest.raises(UsageError, match=r"model 'bundle'; expected one of 0\.5b"):
        bench_peers.run(["bundle"], ["bf16"], PLAN)


def peer_row(contender: str, itl_ms: float, rows: int = 1, **more: Any) -> dict[str, Any]:
    return decode_row(rows, 128, itl_ms, **more) | {"contender": contender}


def first_row(contender: str, first_ms: float) -> dict[str, Any]:
    row = gpu_row(
        "latency", contender, {"first_token_ms": first_ms}, weights="bf16", layers=28, what="prefill", prompt=6144
    )
    row["settings"]["source"] = "random"
    return row


ROWS = [
    peer_row("qwen-rt", 3.3),
    peer_row("vllm", 4.29),
    peer_row("ort-genai", 4.5),
    peer_row("qwen-rt", 7.0, 64),
    peer_row("vllm", 5.0, 64),
    first_row("qwen-rt", 140.0),
    first_row("vllm", 140.1),
]


def test_contenders_stand_side_by_side_and_the_fastest_is_named() -> None:
    lines = report.table(ROWS, "peers").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][4:8] == ["floor, ms", "qwen-rt, ms a token", "vLLM, ms a token", "ORT GenAI, ms a token"]
    assert cells[2] == ["7b", "bf16", "1", "128", "3", "3.3", "4.29", "4.5", "1.1", "1.43", "1.5", "qwen-rt, 1.30 ×"]
    assert cells[3] == ["7b", "bf16", "64", "128", "3", "7", "5", "–", "2.333", "1.667", "–", "vLLM, 1.40 ×"]
    assert cells[7] == ["7b", "bf16", "6144", "140", "140.1", "–", "equal"]
    assert "A GPU" in lines[-1]
    text = peers_text(ROWS).splitlines()
    assert text[0].startswith("A GPU: reads 4.500 TB/s")
    assert text[3].split()[-3:] == ["qwen-rt,", "1.30", "×"]


def test_rows_of_other_runs_stay_out() -> None:
    alone = [peer_row("qwen-rt", 2.0, run="run-2", date="2027-01-01T00:00:00Z")]
    assert report.table([*ROWS, *alone], "peers") == report.table(ROWS, "peers")
    newer = [row | {"run": "run-3", "date": "2027-02-01T00:00:00Z"} for row in ROWS[:2]]
    chosen = peers_rows([*ROWS, *newer])
    assert [(row["contender"], row["run"]) for row in chosen] == [
        ("qwen-rt", "run-1"),
        ("vllm", "run-1"),
        ("qwen-rt", "run-1"),
        ("vllm", "run-1"),
        ("qwen-rt", "run-3"),
        ("vllm", "run-3"),
    ]


def test_the_table_of_our_latency_has_only_ours() -> None:
    table = report.table([*ROWS, peer_row("qwen-rt", 3.2, run="run-2")], "latency")
    assert "| 3.2 |" in table
    assert "4.29" not in table


def test_a_document_may_ask_for_peers_before_there_are_any() -> None:
    page = "<!-- results:peers -->\n<!-- /results -->\n"
    assert "No rows yet." in report.update(page, ROWS[:1])
    assert "vLLM" in report.update(page, ROWS)


def test_the_worker_needs_nothing_of_ours() -> None:
    text = peers.WORKER.read_text(encoding="utf-8")
    assert "import qwen_rt" not in text
    assert "from qwen_rt" not in text
    assert os.access(peers.WORKER, os.R_OK)
