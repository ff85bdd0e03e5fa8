"""`qwen-rt profile` of a CPU bundle: the profiler's events, the bytes of matrices, the nano model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from qwen_rt.benchmarks.cpu_contest import step_weights
from qwen_rt.benchmarks.profile import on_cpu
from qwen_rt.benchmarks.profile.on_cpu import kind_of, matrix_bytes, node_steps, profile_bundle
from qwen_rt.bundle import Bundle
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.runtime import engine


def run(at: int, *nodes: tuple[str, str, int, int]) -> list[dict[str, Any]]:
    """A run as ONNX Runtime notes it: the nodes first."""
    events: list[dict[str, Any]] = [
        {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": us, "args": {"op_name": op}}
        for name, op, start, us in nodes
    ]
    events.append({"cat": "Node", "name": f"{nodes[0][0]}_fence_before", "ts": at, "dur": 0, "args": {}})
    end = nodes[-1][2] + nodes[-1][3] + 5
    return [*events, {"cat": "Session", "name": "model_run", "ts": at, "dur": end - at, "args": {}}]


def three_runs() -> list[dict[str, Any]]:
    return [
        event
        for at in (0, 100, 200)
        for event in run(
            at, ("/model/layers.0/self_attn/qkv_proj/Gemm", "Gemm", at + 10, 20), ("/lm_head/Gemm", "Gemm", at + 32, 8)
        )
    ]


def test_steps_of_a_profile() -> None:
    steps = node_steps(three_runs(), 2)
    assert [step.begin_us for step in steps] == [40.0, 140.0]
    assert [call.op for call in steps[0].calls] == ["Gemm qkv_proj", "Gemm lm_head"]
    assert steps[0].shares() == [(70.0, 20.0), (2.0, 8.0)]
    own = node_steps(three_runs(), 2, with_between=False)
    assert own[0].shares() == [(10.0, 20.0), (2.0, 8.0)]
    with pytest.raises(QwenRtError, match="the profile has 3 runs; expected more than 3"):
        node_steps(three_runs(), 3)


def test_runs_of_a_prompt_in_chunks_are_one_step() -> None:
    (step,) = node_steps(three_runs(), 1, runs_each=2, with_between=False)
    assert (step.begin_us, step.end_us, len(step.calls)) == (100.0, 240.0, 4)
    with pytest.raises(QwenRtError, match="the profile has 3 runs; expected more than 4"):
        node_steps(three_runs(), 2, runs_each=2)


def test_kinds() -> None:
    assert kind_of("/model/layers.0/mlp/gate_up_proj/Gemm", "Gemm") == "Gemm gate_up_proj"
    assert kind_of("/model/layers.0/mlp/up_proj/Gemm", "Gemm") == "Gemm up_proj"
    assert kind_of("/model/norm/Mul", "Mul") == "Mul"


def test_bytes_of_matrices() -> None:
    def weight(name: str, kind: int, *dims: int) -> onnx.TensorProto:
        return onnx.TensorProto(name=name, data_type=kind, dims=dims)

    nodes = [
        helper.make_node("Cast", ["q"], ["q_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_float", "q_scale"], ["q_scaled"]),
        helper.make_node("Concat", ["q_scaled", "k"], ["qk"], axis=0),
        helper.make_node("Gemm", ["x", "qk", "bias"], ["y"], name="qkv"),
        helper.make_node("Cast", ["n_scale"], ["n_scale_float"], to=TensorProto.FLOAT),
        helper.make_node("MatMulNBits", ["y", "n", "n_scale_float"], ["z"], name="packed", K=64, N=4, block_size=32),
        helper.make_node("MatMul", ["z", "y"], ["w"], name="no weights"),
    ]
    weights = [
        weight("q", TensorProto.INT8, 16, 64),
        weight("q_scale", TensorProto.FLOAT, 16, 1),
        weight("k", TensorProto.BFLOAT16, 8, 64),
        weight("bias", TensorProto.BFLOAT16, 24),
        weight("n", TensorProto.UINT8, 4, 2, 16),
        weight("n_scale", TensorProto.FLOAT16, 4, 2),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    graph.initializer.extend(weights)
    assert matrix_bytes(graph) == {"qkv": 4 * 24 * 64, "packed": 4 * 32 + 4 * 8, "no weights": 0}


def test_nano(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "read_bandwidth", lambda nbytes, threads: {"gb_s": 10.0})
    monkeypatch.setattr(on_cpu, "matrix_rate", lambda: 1e11)
    bundle = Bundle.open(nano_bundle)
    (decode, prefill), described = profile_bundle(bundle, 2, 16, 8, 32, 1)
    assert (described["read_gb_s"], described["matrix_gflop_s"]) == (10.0, 100.0)
    assert (len(decode.steps), decode.waterfall.num_steps) == (8, 4)
    of_op = {op.op: op for op in decode.waterfall.ops}
    assert (of_op["Gemm qkv_proj"].calls, of_op["Gemm lm_head"].calls) == (bundle.manifest.model.num_layers, 1)
    read = sum(op.read_bytes for op in decode.waterfall.ops if op.op.startswith("Gemm"))
    assert read == 4 * step_weights(bundle.manifest.model)
    assert sum(decode.waterfall.causes.values()) == pytest.approx(decode.waterfall.lost_us)
    assert decode.waterfall.between_us > 0
    assert decode.alone_us is not None
    assert decode.notes[0].startswith("of the latter graph ")
    assert len(decode.tracks["nodes"]) == sum(len(step.calls) for step in decode.steps)
    assert len(prefill.steps) == on_cpu._PREFILLS
    assert prefill.settings["prompt"] == 32
    floors = {op.op: op.floor_us for op in prefill.waterfall.ops}
    shape = bundle.manifest.model
    flops = 2 * 32 * shape.hidden_size * shape.intermediate_size * shape.num_layers
    assert floors["Gemm down_proj"] == pytest.approx(max(1e6 * flops / 1e11, floors["Gemm down_proj"] * 0))


def test_a_prefill_in_chunks(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every profile of it has all chunks, and its floor is that of the whole prompt."""
    monkeypatch.setattr(on_cpu, "read_bandwidth", lambda nbytes, threads: {"gb_s": 1000.0})
    monkeypatch.setattr(on_cpu, "matrix_rate", lambda: 1e11)
    monkeypatch.setattr(on_cpu, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 32)
    bundle, tokens = Bundle.open(nano_bundle), 80
    (_, prefill), _ = profile_bundle(bundle, 1, 8, 4, tokens, 1)
    spec, of_op = bundle.manifest.model, {op.op: op for op in prefill.waterfall.ops}
    assert len(prefill.steps) == on_cpu._PREFILLS
    calls = of_op["Gemm qkv_proj"].calls, of_op["Gemm lm_head"].calls
    assert calls == pytest.approx((3 * spec.num_layers, 3))
    flops = 2 * tokens * spec.hidden_size * spec.intermediate_size * spec.num_layers
    assert of_op["Gemm down_proj"].floor_us == pytest.approx(1e6 * flops / 1e11)
    attention = 2 * tokens**2 * spec.num_heads * spec.head_dim * spec.num_layers
    assert of_op["GroupQueryAttention"].floor_us == pytest.approx(1e6 * attention / 1e11)


def test_too_long(nano_bundle: Path) -> None:
    with pytest.raises(UsageError, match="positions; expected at most"):
        profile_bundle(Bundle.open(nano_bundle), 1, 10**6, 8, None, 1)
