"""Decode steps and prefills of a CPU bundle, by ONNX Runtime's own profiler, which adds some µs to every node.

Runs as the engine does, sampling and text included. What is between the last node of a step and the first of the next
(the end of the graph's run, the engine, the sampler) counts as `between steps`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.benchmarks.measure import num_cores, read_bandwidth
from qwen_rt.benchmarks.profile.profile import Profile, Span
from qwen_rt.benchmarks.profile.waterfall import Call, Step, make_waterfall, middle_half
from qwen_rt.bundle import Bundle
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.runtime.engine import PREFILL_CHUNK
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["matrix_bytes", "node_steps", "profile_bundle"]

_FLOAT_BYTES = 4
_BYTES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
_FOLDED = ("Cast", "Concat", "Mul", "Reshape", "Transpose")  # of a weight: done once, when the graph is loaded
_PRODUCTS = ("Gemm", "MatMul", "MatMulNBits")
_PARTS = ("lm_head", "qkv_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
_ENDING = "_kernel_time"
_WARM_UP = 10
_RATE_SIZE = 512
_PREFILLS = 5
METHOD = "ONNX Runtime's profiler"


def kind_of(node: str, op_type: str) -> str:
    """Return what a node counts as: its operator, and which projection where a model has several."""
    for part in _PARTS:
        if part in node:
            return f"{op_type} {part}"
    return op_type


# ---------------------------------------------------------------- from the profile to steps


def node_steps(
    events: Sequence[Mapping[str, Any]], num_steps: int, *, runs_each: int = 1, with_between: bool = True
) -> list[Step]:
    """Read the last steps of a profile.

    Args:
        events: As ONNX Runtime wrote them.
        num_steps: How many steps, from the end; the run before them must be there, for its end.
        runs_each: Runs of a step: chunks of a prompt.
        with_between: Whether a step begins at the end of the one before; else where its own first run begins.

    Raises:
        QwenRtError: Too few runs.
    """
    num_runs = num_steps * runs_each
    runs = [event for event in events if event.get("name") == "model_run"]
    if len(runs) <= num_runs:
        raise QwenRtError(f"the profile has {len(runs)} runs", f"more than {num_runs}")
    nodes = [event for event in events if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_ENDING)]
    nodes.sort(key=lambda event: event["ts"])
    found: list[Step] = []
    done_us = 0.0
    for run in runs[-num_runs - 1 :]:
        end = run["ts"] + run["dur"]
        calls = tuple(_call(event) for event in nodes if run["ts"] <= event["ts"] <= end)
        if not calls:
            raise QwenRtError("a run in the profile has no nodes")
        found.append(Step(done_us if with_between else float(run["ts"]), calls))
        done_us = found[-1].end_us
    parts = [found[first : first + runs_each] for first in range(1, len(found), runs_each)]
    return [Step(part[0].begin_us, tuple(call for run in part for call in run.calls)) for part in parts]


def _call(event: Mapping[str, Any]) -> Call:
    node = str(event["name"]).removesuffix(_ENDING)
    start_us, end_us = float(event["ts"]), float(event["ts"] + event["dur"])
    return Call(kind_of(node, event["args"]["op_name"]), start_us, end_us, ((node, start_us, end_us),))


# ---------------------------------------------------------------- floors


def matrix_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return for every product of a CPU graph the bytes of its matrices as they are read in a step.

    ONNX Runtime turns stored matrices into float32 when it loads them, but for those of `MatMulNBits`, which it reads
    as they are, with scales in float32.
    """
    weights = {weight.name: weight for weight in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def leaves(name: str) -> Iterator[onnx.TensorProto]:
        if name in weights:
            yield weights[name]
        elif name in makers and makers[name].op_type in _FOLDED:
            for source in makers[name].input:
                yield from leaves(source)

    def nbytes(weight: onnx.TensorProto, is_packed: bool) -> int:
        if weight.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) or len(weight.dims) < 2:
            return 0
        if not is_packed and weight.name.endswith(("_scale", "_zero_point")):
            return 0
        item_bytes = 1 if is_packed and weight.data_type in _BYTES else _FLOAT_BYTES
        return item_bytes * int(math.prod(weight.dims))

    return {
        node.name: sum(nbytes(leaf, node.op_type == "MatMulNBits") for name in node.input[1:] for leaf in leaves(name))
        for node in graph.node
        if node.op_type in _PRODUCTS
    }


def _graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load_model(str(bundle.graph_file), load_external_data=False).graph


def _floors(
    bundle: Bundle, rows: int, tokens: int, length: float, bandwidth: float, rate: float | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return floor in µs and bytes of a call of every op.

    Args:
        bundle: The bundle.
        rows: Sequences.
        tokens: New ones of each.
        length: Tokens of each that attention reads.
        bandwidth: Bytes a second.
        rate: Float32 operations a second; None leaves arithmetic out.
    """
    graph = _graph_of(bundle)
    sums: dict[str, list[int]] = {}
    matrices = matrix_bytes(graph)
    for node in graph.node:
        if node.name in matrices:
            sums.setdefault(kind_of(node.name, node.op_type), []).append(matrices[node.name])
    read = {op: statistics.fmean(sizes) for op, sizes in sums.items()}
    shape = ModelShape.from_spec(bundle.manifest.model)
    read["GroupQueryAttention"] = rows * length * 2 * shape.kv_heads * shape.head_dim * _FLOAT_BYTES
    floors = {op: 1e6 * size / bandwidth for op, size in read.items()}
    if rate is not None:
        parameters = {"qkv_proj": shape.layer_parameters["rmsnorm_qkv"], "lm_head": shape.hidden * shape.vocab}
        parameters["o_proj"] = shape.layer_parameters["o_proj_residual"]
        parameters |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.hidden * shape.ffn)
        for op in floors:
            count = parameters.get(op.split(" ")[-1], 0) * (rows if op.endswith("lm_head") else rows * tokens)
            flops = 2 * count
            if op == "GroupQueryAttention":
                flops = int(2 * rows * tokens * (2 * length - tokens) * shape.heads * shape.head_dim)
            floors[op] = max(floors[op], 1e6 * flops / rate)
    return floors, read


def _prefill_floors(
    bundle: Bundle, tokens: int, bandwidth: float, rate: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the same of a prompt of one row that is read in chunks: the mean of an op's calls in all of them."""
    chunks = [
        _floors(bundle, 1, min(PREFILL_CHUNK, tokens - at), min(at + PREFILL_CHUNK, tokens), bandwidth, rate)
        for at in range(0, tokens, PREFILL_CHUNK)
    ]
    floors = {op: statistics.fmean(us[op] for us, _ in chunks) for op in chunks[0][0]}
    return floors, {op: statistics.fmean(read[op] for _, read in chunks) for op in chunks[0][1]}


def matrix_rate(seconds: float = 1.0) -> float:
    """Measure float32 products of NumPy, on all cores: operations a second, the fastest in that time."""
    left, right = (np.random.default_rng(0).standard_normal((_RATE_SIZE, _RATE_SIZE), np.float32) for _ in range(2))
    fastest_s, stop = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < stop:
        left @ right
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return 2 * _RATE_SIZE**3 / fastest_s


# ---------------------------------------------------------------- running


@contextlib.contextmanager
def _profiled(folder: Path) -> Iterator[list[Any]]:
    """Let every session that is made inside write a profile; yields the list of them."""
    made: list[Any] = []
    original = ort.InferenceSession

    class Profiled(original):  # type: ignore[misc, valid-type]  # sessions of the runtime have no option for it
        def __init__(self, model: Any, options: Any, **more: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "ort")
            super().__init__(model, options, **more)
            made.append(self)

    ort.InferenceSession = Profiled
    try:
        yield made
    finally:
        ort.InferenceSession = original


def _generate(llm: LLM, rows: int, prompt: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, llm.tokenizer.vocab_size, (rows, prompt)).tolist()
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))


def _events(bundle: Bundle, rows: int, threads: int, lengths: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Generate under the profiler: (prompt, new tokens) one after another."""
    with tempfile.TemporaryDirectory(prefix="qwen-rt-profile-") as folder:
        with _profiled(Path(folder)) as made:
            llm = LLM(bundle.path, num_threads=threads, max_num_seqs=rows)
        for prompt, num_tokens in lengths:
            _generate(llm, rows, prompt, num_tokens)
        events: list[dict[str, Any]] = json.loads(Path(made[0].end_profiling()).read_text(encoding="utf-8"))
        return events


def _step_times(bundle: Bundle, rows: int, prompt: int, num_steps: int, threads: int) -> dict[str, float]:
    """Return medians of decode steps without the profiler, µs: the graph, the session, the whole step."""
    llm = LLM(bundle.path, num_threads=threads, max_num_seqs=rows)
    session: Any = llm.session
    graph, outer = _Clock(session._session.run_with_iobinding), _Clock(session.run)
    session._session, session.run = _Graph(session._session, graph), outer
    _generate(llm, rows, prompt, num_steps + _WARM_UP)
    ends = [end for _, end in outer.times[-num_steps - 1 :]]

    def median_us(times: Sequence[tuple[float, float]]) -> float:
        return 1e6 * statistics.median(end - start for start, end in times[-num_steps:])

    whole_us = 1e6 * statistics.median(after - before for before, after in itertools.pairwise(ends))
    return {"graph": median_us(graph.times), "session": median_us(outer.times), "step": whole_us}


class _Clock:
    """A function that notes when it began and ended."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.times: list[tuple[float, float]] = []

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self._function(*arguments)
        self.times.append((start, time.perf_counter()))
        return result


class _Graph:
    """Stands in for the ONNX Runtime session, whose methods cannot be replaced."""

    def __init__(self, session: Any, run: Callable[..., Any]) -> None:
        self._session, self.run_with_iobinding = session, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def profile_bundle(
    bundle: Bundle, rows: int, prompt: int, steps: int, prefill: int | None, threads: int = 0
) -> tuple[list[Profile], dict[str, Any]]:
    """Profile a CPU bundle.

    Args:
        bundle: An opened bundle of target `cpu`.
        rows: Sequences of a decode step.
        prompt: Tokens of each before the first step.
        steps: Decode steps that are recorded.
        prefill: Tokens of a prompt whose prefill is recorded too; None: none.
        threads: 0 for all cores.

    Returns:
        A profile for each phase; what was measured of the machine.

    Raises:
        UsageError: Prompt and steps do not fit the bundle's length.
    """
    manifest = bundle.manifest
    threads = threads or num_cores()
    longest = max(prompt + _WARM_UP + steps, (prefill or 0) + 1)
    if longest > manifest.max_length:
        raise UsageError(
            f"{longest} positions", f"at most {manifest.max_length}, the bundle's", "shorten the prompt or --steps"
        )
    nbytes = sum(matrix_bytes(_graph_of(bundle)).values())
    bandwidth = 1e9 * float(read_bandwidth(nbytes, threads)["gb_s"])
    cache = (manifest.quantization and manifest.quantization.kv_format) or "fp32"
    settings: dict[str, Any] = {"model": bundle.path.resolve().name, "precision": manifest.precision, "kv_cache": cache}
    settings |= {"layers": manifest.model.num_layers, "threads": threads, "source": "bundle"}
    alone = _step_times(bundle, rows, prompt, steps, threads)
    outside_us = alone["step"] - alone["session"]
    note = (
        f"of the latter graph {alone['graph']:.1f} µs, session around it {alone['session'] - alone['graph']:.1f}, "
        f"engine, sampler and text {outside_us:.1f}"
    )
    events = _events(bundle, rows, threads, [(prompt, steps + _WARM_UP)])
    floors, read = _floors(bundle, rows, 1, prompt + _WARM_UP + steps / 2, bandwidth, None)
    of_decode = settings | {"rows": rows, "prompt": prompt}
    decode = _profile("decode", of_decode, node_steps(events, steps), floors, read, alone["step"], (note,))
    described: dict[str, Any] = harness.device() | {"read_gb_s": round(bandwidth / 1e9, 2)}
    if prefill is None:
        return [decode], described
    rate = matrix_rate()
    described["matrix_gflop_s"] = round(rate / 1e9, 1)
    events = _events(bundle, 1, threads, [(prefill, 1)] * (_PREFILLS + 1))
    floors, read = _prefill_floors(bundle, prefill, bandwidth, rate)
    found = node_steps(events, _PREFILLS, runs_each=-(-prefill // PREFILL_CHUNK), with_between=False)
    return [decode, _profile("prefill", settings | {"rows": 1, "prompt": prefill}, found, floors, read)], described


def _profile(
    phase: str,
    settings: Mapping[str, Any],
    steps: Sequence[Step],
    floors: Mapping[str, float],
    read: Mapping[str, float],
    alone_us: float | None = None,
    notes: tuple[str, ...] = (),
) -> Profile:
    nodes = [
        Span(name, start_us, end_us, {"op": call.op})
        for step in steps
        for call in step.calls
        for name, start_us, end_us in call.kernels
    ]
    fall = make_waterfall(middle_half(steps), floors, read)
    return Profile(phase, settings, METHOD, fall, tuple(steps), {"nodes": tuple(nodes)}, alone_us, notes=notes)
