"""`qwen-rt profile` of a CUDA session: on the fake GPU with made-up records, and on a real one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.bench_latency import Gpu, Model
from qwen_rt.benchmarks.kernel_shapes import SHAPES, ModelShape
from qwen_rt.benchmarks.latency import Plan
from qwen_rt.benchmarks.profile import gpu_steps, on_cuda
from qwen_rt.benchmarks.profile.cupti import Activity, CuptiError
from qwen_rt.benchmarks.profile.driver import GraphNode
from qwen_rt.benchmarks.profile.floors import (
    Rates,
    decode_floors,
    matrix_bytes_of_bundle,
    matrix_bytes_of_shape,
    prefill_floors,
)
from qwen_rt.benchmarks.profile.gpu_steps import HostSpan
from qwen_rt.benchmarks.profile.kernels import ops_of_step
from qwen_rt.benchmarks.profile.on_cuda import profile_model
from qwen_rt.benchmarks.profile.profile import Profile
from qwen_rt.benchmarks.profile.run import run
from qwen_rt.benchmarks.profile.waterfall import Call, Step, make_waterfall
from qwen_rt.bundle import Bundle
from qwen_rt.errors import UsageError

from ..runtime.cuda.fake import FakeGpu, compile_fake
from . import profile_kit as kit
from .fake_model import model_on


class Recorder:
    """In place of `Cupti`: gives what it is told to."""

    def __init__(self, *answers: Callable[[], list[Activity]]) -> None:
        self.answers = list(answers)
        self.is_on = False

    def start(self) -> None:
        assert not self.is_on
        self.is_on = True

    def stop(self) -> list[Activity]:
        assert self.is_on
        self.is_on = False
        return self.answers.pop(0)()

    def timestamp_ns(self) -> int:
        return 1_000_000


@pytest.fixture
def gpu(tmp_path: Path) -> FakeGpu:
    (tmp_path / "library").mkdir()
    return FakeGpu(compile_fake(tmp_path / "library"))


@pytest.fixture
def opened(gpu: FakeGpu, tmp_path: Path) -> tuple[Model, Gpu]:
    return model_on(gpu, tmp_path / "weights", "random"), Gpu(gpu.cuda, tmp_path, {}, "A GPU", 1e12, 1e14)


def profiled(opened: tuple[Model, Gpu], recorder: Recorder | None, **changes: Any) -> list[Any]:
    model, gpu = opened
    how = {"rows": 2, "prompt": 40, "steps": 6, "prefill": None, "quiet": True, **changes}
    return profile_model(model, gpu, matrix_bytes_of_shape(model.shape, "bf16"), cupti=recorder, **how)  # type: ignore[arg-type]


def test_a_session_is_recorded(opened: tuple[Model, Gpu], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = opened[0].shape.layers
    recorder = Recorder(lambda: kit.steps(8, layers))

    def prefills(*arguments: Any) -> tuple[list[Activity], list[HostSpan]]:
        """A prefill every 50 ms, of which the host begins 20 µs before its first kernel."""
        starts_us = [50_000.0 * number for number in range(1, 6)]
        ran = [activity for at in starts_us for activity in kit.step(at, layers, kit.PREFILL)]
        return ran, [HostSpan("prefill", round(1e3 * at) - 20_000, round(1e3 * at) + 900_000) for at in starts_us]

    monkeypatch.setattr(on_cuda, "record_prefill", prefills)
    decode, prefill = profiled(opened, recorder, prefill=20)
    assert recorder.answers == []
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    assert decode.settings == {
        "model": "tiny", "precision": "bf16", "kv_cache": "bf16", "layers": layers, "source": "random", "rows": 2,
        "prompt": 40,
    }  # fmt: skip
    assert len(decode.steps) == 6
    assert decode.waterfall.num_steps == 4
    assert {op.op: op.calls for op in decode.waterfall.ops} == {
        op: ops_of_step(layers).count(op) for op in ops_of_step(layers)
    }
    assert [span.name for span in decode.tracks["host"]].count("launch") == 8
    assert sum(decode.waterfall.causes.values()) == pytest.approx(decode.waterfall.lost_us)
    assert len(prefill.steps) == 5
    assert prefill.waterfall.between_us == pytest.approx(20)
    assert prefill.notes == ()
    assert all(count == 0 for kind, count in gpu.live().items() if kind != "event"), gpu.live()


def test_prefills_are_recorded(opened: tuple[Model, Gpu]) -> None:
    model, gpu = opened
    recorder = Recorder(lambda: [Activity("fill", 1, 2)])
    plan = Plan((1,), (40,), (100,))
    with model.start(gpu, plan) as (session, _):
        ran, host = gpu_steps.record_prefill(session, 100, 3, recorder)  # type: ignore[arg-type]
        chunks = -(-100 // session.chunk_tokens)
    assert ran == [Activity("fill", 1, 2)]
    assert [span.name for span in host] == ["prefill"] * 3 * chunks
    assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(host))


def test_records_that_make_no_step(opened: tuple[Model, Gpu]) -> None:
    layers = opened[0].shape.layers
    with pytest.raises(CuptiError, match="no step of 6 has all its kernels among CUPTI's"):
        profiled(opened, Recorder(lambda: kit.without(kit.step(0, layers), 3)))
    with pytest.raises(CuptiError, match="no prefill of 20 tokens"):
        profiled(opened, Recorder(lambda: kit.steps(8, layers), list[Activity]), prefill=20)


def test_missing_steps_are_told(opened: tuple[Model, Gpu]) -> None:
    records = kit.steps(8, opened[0].shape.layers)
    (decode,) = profiled(opened, Recorder(lambda: kit.without(records, len(records) - 2)))
    assert decode.notes == ("1 steps left out: records of kernels are missing",)


def test_a_prefill_needs_cupti(opened: tuple[Model, Gpu]) -> None:
    with pytest.raises(UsageError, match="--prefill 20 needs CUPTI: it is not here"):
        profiled(opened, None, prefill=20, why_not="it is not here")


def test_steps_cut_short(opened: tuple[Model, Gpu], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of the driver are made up; each graph that is timed has one op less."""
    layers = opened[0].shape.layers
    names = [name for op in ops_of_step(layers) for name in kit.DECODE[op]]
    left = [len(names)]
    timed: list[int] = []

    def destroy(node: GraphNode) -> None:
        left[0] -= 1

    instantiate = type(gpu.cuda).graph_instantiate

    def counted(self: Any, graph: int) -> int:
        timed.append(left[0])
        return instantiate(self, graph)

    monkeypatch.setattr(gpu_steps, "graph_nodes", lambda graph: [GraphNode(at, name) for at, name in enumerate(names)])
    monkeypatch.setattr(gpu_steps, "destroy_node", destroy)
    monkeypatch.setattr(type(gpu.cuda), "graph_instantiate", counted)
    monkeypatch.setattr(type(gpu.cuda), "elapsed_ms", lambda self, start, stop: 0.01 * left[0])
    (decode,) = profiled(opened, None, why_not="CUPTI was not found")
    assert timed[-len(names) :] == list(range(len(names), 0, -1))
    assert not decode.has_gaps
    assert decode.notes[0].startswith("CUPTI was not found; each op has what it adds")
    assert all(op.busy_us == pytest.approx(10.0 * op.calls) for op in decode.waterfall.ops)
    assert sum(decode.waterfall.causes.values()) == pytest.approx(decode.waterfall.lost_us)


# ---------------------------------------------------------------- the command


@pytest.fixture
def refused(opened: tuple[Model, Gpu], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """CUPTI refuses, everything else is there; gives what `profile_model` is asked for."""
    model, gpu = opened
    asked: list[dict[str, Any]] = []

    def refuse() -> None:
        raise CuptiError("CUPTI refuses cuptiActivityEnable: NOT_ALLOWED (35)")

    def profile(*arguments: Any, **how: Any) -> list[Profile]:
        asked.append(how)
        step = Step(0, (Call("embed", 1, 3), Call("sample", 3, 9)))
        settings = {"model": "tiny", "precision": "bf16", "kv_cache": "bf16", "layers": 1, "rows": 1, "prompt": 8}
        return [Profile("decode", settings, "a test", make_waterfall([step], {}), (step,), {}, notes=(how["why_not"],))]

    monkeypatch.setattr("qwen_rt.benchmarks.profile.cupti.Cupti", refuse)
    monkeypatch.setattr("qwen_rt.benchmarks.bench_latency.find_model", lambda *arguments: model)
    monkeypatch.setattr("qwen_rt.benchmarks.bench_latency.open_gpu", lambda device, **how: gpu)
    monkeypatch.setattr("qwen_rt.benchmarks.profile.on_cuda.profile_model", profile)
    return asked


def test_without_cupti_a_line_says_so(
    refused: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.json"
    run("7b", json_file=file)
    told = capsys.readouterr()
    assert told.err == (
        "qwen-rt: CUPTI refuses cuptiActivityEnable: NOT_ALLOWED (35); timing steps that are cut short instead\n"
    )
    assert told.out.startswith(
        "decode, tiny bf16, 1 row, prompt 8: 9.0 µs a step = floor 0.0 + lost 9.0\none A GPU, read"
    )
    document = json.loads(file.read_text(encoding="utf-8"))
    assert "cupti" not in document["versions"]
    assert document["device"]["read_gb_s"] == 1000.0
    run("7b", method="cut")
    assert capsys.readouterr().err == ""
    assert [how["cupti"] for how in refused] == [None, None]
    assert refused[1]["why_not"] == "--method cut"


def test_cupti_or_nothing(refused: list[dict[str, Any]]) -> None:
    with pytest.raises(CuptiError, match="NOT_ALLOWED"):
        run("7b", method="cupti")
    assert refused == []


# ---------------------------------------------------------------- floors


def test_floors_of_a_decode_step_are_those_of_the_benchmarks() -> None:
    shape = SHAPES["7b"]
    for precision, kv_format in itertools.product(("bf16", "fp8", "int4"), ("bf16", "fp8")):
        floors = decode_floors(shape, matrix_bytes_of_shape(shape, precision), kv_format, 4, 1000, Rates(3e12))
        calls = {op: ops_of_step(shape.layers).count(op) for op in ops_of_step(shape.layers)}
        read = {op: count * floors.read_bytes[op] for op, count in calls.items()}
        small = read.pop("embed") + read.pop("sample")
        assert sum(read.values()) == shape.floor_bytes_at(precision) + shape.kv_bytes(4000, kv_format)
        assert small < 4 * 4 * 160_000
        assert floors.us["lm_head"] == pytest.approx(1e6 * floors.read_bytes["lm_head"] / 3e12)


def test_floors_of_a_prefill_add_up_to_its_operations() -> None:
    shape = SHAPES["7b"]
    matrices = matrix_bytes_of_shape(shape, "bf16")
    rates = Rates(1e15, 1e15, 2e15)  # bytes cost nothing
    ops = ops_of_step(shape.layers)

    def total(floors: Any, chunks: int) -> float:
        return sum(floors.us[op] * (chunks if op != "sample" else 1) for op in ops)

    whole = total(prefill_floors(shape, matrices, "bf16", "bf16", [(0, 6144)], rates), 1)
    assert whole == pytest.approx(1e6 * shape.prefill_flops(6144) / 1e15, rel=2e-3)
    chunked = total(prefill_floors(shape, matrices, "bf16", "bf16", [(0, 4096), (4096, 2048)], rates), 2)
    assert chunked == pytest.approx(whole, rel=5e-3)
    of_fp8 = prefill_floors(shape, matrices, "fp8", "bf16", [(0, 6144)], rates)
    of_bf16 = prefill_floors(shape, matrices, "bf16", "bf16", [(0, 6144)], rates)
    assert of_fp8.us["rmsnorm_qkv"] == pytest.approx(of_bf16.us["rmsnorm_qkv"] / 2)
    unknown = prefill_floors(shape, matrices, "bf16", "bf16", [(0, 6144)], Rates(1e12))
    assert unknown.us["rmsnorm_qkv"] == pytest.approx(1e6 * matrices["rmsnorm_qkv"] / 1e12)
    one_layer = prefill_floors(shape.with_layers(1), matrices, "bf16", "bf16", [(0, 100)], rates)
    assert one_layer.us["o_proj_residual"] == 0.0


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_bytes_of_a_bundle(precision: str, nano_portable: Path, tmp_path: Path) -> None:
    from qwen_rt.export.build import BuildOptions, build

    build(nano_portable, tmp_path / "cuda", BuildOptions(target="cuda", quiet=True, precision=precision))
    bundle = Bundle.open(tmp_path / "cuda")
    found = matrix_bytes_of_bundle(bundle)
    expected = matrix_bytes_of_shape(ModelShape.from_spec(bundle.manifest.model), precision)
    assert found == expected


# ---------------------------------------------------------------- a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["auto", "cut"])
def test_on_a_gpu(method: str, library: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    trace = tmp_path / "trace.json"
    run("0.5b", layers=4, method=method, steps=8, json_file=file, trace=trace, quiet=True)
    (found,) = json.loads(file.read_text(encoding="utf-8"))["profiles"]
    calls = {op["op"]: op["calls"] for op in found["ops"] if op["op"] != "other"}
    assert calls == {op: ops_of_step(4).count(op) for op in ops_of_step(4)}
    assert sum(cause["us"] for cause in found["causes"]) == pytest.approx(found["lost_us"], abs=0.1)
    assert found["floor_us"] < found["step_us"] < 3 * found["step_without_recording_us"]
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert "whole step" in capfd.readouterr().out


@pytest.mark.gpu
def test_both_methods_agree(library: Any, tmp_path: Path) -> None:
    """Large ops take the same whichever way they are told: within a fifth, as recording slows a step a little."""
    found = []
    for method in ("cupti", "cut"):
        file = tmp_path / f"{method}.json"
        with contextlib.suppress(CuptiError):
            run("7b", layers=4, method=method, json_file=file, quiet=True)
        if not file.exists():
            pytest.skip("CUPTI is not to be had here")
        (profile,) = json.loads(file.read_text(encoding="utf-8"))["profiles"]
        found.append({op["op"]: op["busy_us"] + op["gap_us"] for op in profile["ops"]})
    recorded, cut = found
    for op in ("rmsnorm_gate_up_silu", "down_residual", "lm_head"):
        assert recorded[op] == pytest.approx(cut[op], rel=0.2)
