"""Times every plugin op and whole decode steps on one GPU, against the read bandwidth measured in the same run.

    qwen-rt bench kernels --model 7b --rows 1 16
    python -m qwen_rt.benchmarks.bench_kernels ops step --model 7b --rows 1 16

`ops` times each op alone, graph replays over enough copies of its weights that L2 never holds them; `step` times all
ops of a decode step, chained in one captured graph with the token fed back on the device. Weights are random, made on
the device. Every op is checked against its float64 reference before it is timed.

Metrics: µs (median, p10, p90, n over replays), GB/s of the bytes that the op must read, their share of the measured
read bandwidth, and the roofline's share of the time (`kernel_shapes.OpCost`; the matrix rate is that of a product of
8192³); for a step the time per token and its ratio to the floor: bytes of all linear weights and the LM head (plus keys
and values, where said) over that bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.gpu_rates import matrix_rate
from qwen_rt.benchmarks.kernel_cases import OpCases
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.kernel_step import DecodeStep, OpCaller, capture
from qwen_rt.benchmarks.latency_report import gpu_line
from qwen_rt.errors import MissingDependencyError, QwenRtError, VerificationError
from qwen_rt.ops import KV_CACHE_FORMATS, OPS, WEIGHT_FORMATS
from qwen_rt.plugins.library import NO_DEPENDENT_LAUNCH, PluginLibrary, load
from qwen_rt.progress import Progress

STEP_OPS = tuple(op.name for op in OPS)


def measure_bandwidth(library: PluginLibrary, num_bytes: int = 8 << 30) -> float:
    """Return the fastest of several plain read kernels in bytes a second, median of 12 runs each."""
    data = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_()
    sink = torch.zeros(4, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    best = 0.0
    for variant in range(6):
        samples = _event_times(
            functools.partial(library.read_probe, data.data_ptr(), num_bytes, sink.data_ptr(), variant, stream), 12
        )
        best = max(best, num_bytes / (harness.percentile(samples, 0.5) * 1e-6))
    return best


def _event_times(body: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Return microseconds of each of `repeats` runs."""
    samples = []
    for turn in range(repeats + warm_up):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        body()
        end.record()
        end.synchronize()
        if turn >= warm_up:
            samples.append(start.elapsed_time(end) * 1e3)
    return samples


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def bench_op(cases: OpCases, op: str, bandwidth: float, rate: float | None, repeats: int = 15) -> dict[str, Any]:
    """Check an op, then time it overlapping itself and alone.

    Args:
        cases: Its inputs.
        op: Which.
        bandwidth: Bytes a second of plain reads, measured in this run.
        rate: bf16 operations a second, measured in this run; None leaves arithmetic out of the roofline.
        repeats: Graph replays.

    Returns:
        Its metrics.

    Raises:
        VerificationError: The check failed.
    """
    calls, check = cases.prepare(op)
    calls[0]()
    torch.cuda.synchronize()
    if problem := check():
        raise VerificationError(problem, "the float64 reference", "no number for an op that is wrong: see its tests")
    metrics: dict[str, Any] = {}
    num_calls = max(16, len(calls))
    order = list(itertools.islice(itertools.cycle(calls), num_calls))
    for name, flags in (("time_us", 0), ("alone_us", NO_DEPENDENT_LAUNCH)):
        cases.call.flags = flags
        graph = capture(functools.partial(_run_all, order))
        cases.call.flags = 0
        samples = [us / num_calls for us in _event_times(graph.replay, repeats)]
        metrics[name] = harness.summarize(samples)
    cost, time_us = cases.cost(op), float(metrics["time_us"]["median"])
    metrics["read_gb_s"] = round(cost.read_bytes / time_us / 1e3, 1)
    metrics["share_of_bandwidth_ratio"] = round(cost.read_bytes / (time_us * 1e-6) / bandwidth, 4)
    metrics["roofline_us"] = round(cost.roofline_us(bandwidth, rate), 3)
    metrics["share_of_roofline_ratio"] = round(cost.roofline_us(bandwidth, rate) / time_us, 4)
    return metrics


def bench_step(step: DecodeStep, rows: int, prompt: int, bandwidth: float) -> dict[str, Any]:
    """Time a whole decode step; return its metrics."""
    step.prepare(rows, prompt)
    samples = step.time()
    floor_us = step.shape.floor_bytes_at(step.precision) / bandwidth * 1e6
    kv_us = step.shape.kv_bytes(rows * (prompt + 1), step.kv_format) / bandwidth * 1e6
    itl = harness.percentile(samples, 0.5)
    return {
        "itl_us": harness.summarize(samples, 5),
        "floor_us": round(floor_us, 1),
        "floor_with_kv_us": round(floor_us + kv_us, 1),
        "itl_to_floor_ratio": round(itl / floor_us, 4),
        "itl_to_floor_with_kv_ratio": round(itl / (floor_us + kv_us), 4),
    }


def gpu_device(bandwidth: float, rate: float | None) -> dict[str, Any]:
    """Describe the GPU of this run."""
    properties = torch.cuda.get_device_properties(0)
    measured = {} if rate is None else {"matrix_tflop_s": round(rate / 1e12, 1)}
    return {
        "name": properties.name,
        "num_sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "read_gb_s": round(bandwidth / 1e9, 1),
    } | measured


def require_gpu() -> None:
    """Check that torch can use a GPU.

    Raises:
        MissingDependencyError: It cannot.
    """
    if torch.version.cuda is None:
        raise MissingDependencyError(
            f"torch {torch.__version__} is a CPU build", "a CUDA build", "pip install torch, on a machine with a GPU"
        )
    if not torch.cuda.is_available():
        raise MissingDependencyError("torch finds no GPU", "an NVIDIA GPU with its driver", "see `qwen-rt doctor`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["ops", "step", "waterfall"])
    parser.add_argument("--model", nargs="+", default=["1.5b", "7b"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", nargs="+", type=int, default=[127])
    parser.add_argument("--op", nargs="+", default=list(STEP_OPS), choices=list(STEP_OPS))
    parser.add_argument("--precision", default="bf16", choices=list(WEIGHT_FORMATS))
    parser.add_argument("--kv-cache", default="bf16", choices=list(KV_CACHE_FORMATS))
    parser.add_argument("--output", type=Path, help="file of rows (default: benchmarks/results/kernels.jsonl)")
    parser.add_argument("--dry", action="store_true", help="print, but write no rows")
    arguments = parser.parse_args(argv)
    try:
        run(
            arguments.what,
            arguments.model,
            arguments.rows,
            arguments.prompt,
            arguments.op,
            precision=arguments.precision,
            kv_format=arguments.kv_cache,
            output=None if arguments.dry else harness.results_file("kernels", arguments.output),
        )
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(
    what: Collection[str],
    models: Sequence[str],
    rows: Sequence[int],
    prompts: Sequence[int],
    ops: Sequence[str],
    *,
    output: Path | None,
    precision: str = "bf16",
    kv_format: str = "bf16",
    quiet: bool = False,
) -> None:
    """Measure; print a table for each model and append a row for each figure.

    Args:
        what: Some of `ops`, `step` and `waterfall`.
        models: Names in `SHAPES`.
        rows: Decode rows, each.
        prompts: Tokens of every row before the new one, each.
        ops: Names in `STEP_OPS`.
        output: The file of rows; None writes none.
        precision: Of the layers' matrices, random and in its default scheme; embedding and LM head are bf16.
        kv_format: Of the KV cache; `fp8` and `int8` have offsets.
        quiet: No progress on stderr.

    Raises:
        MissingDependencyError: No GPU, or no plugin library for it.
        VerificationError: An op is not what its reference says.
    """
    require_gpu()
    torch.manual_seed(1)
    major, minor = torch.cuda.get_device_capability()
    call = OpCaller(load(sm=10 * major + minor))
    bandwidth = measure_bandwidth(call.library)
    rate = matrix_rate()
    device, name_of_run = gpu_device(bandwidth, rate), harness.new_run()
    print(gpu_line(device), flush=True)
    used = {"cuda": str(torch.version.cuda), "nvcc": call.library.build_info["nvcc"], "torch": torch.__version__}

    def write(contender: str, metrics: dict[str, Any], settings: dict[str, Any], check: str) -> None:
        if output is not None:
            harness.write_row(
                "kernels",
                contender,
                metrics,
                {**settings, "sources": call.library.build_info["sources"]},
                check={"passed": True, "what": check},
                run=name_of_run,
                used=used,
                gpu=device,
                file=output,
            )

    points = list(itertools.product(rows, prompts))
    for model in models:
        shape = SHAPES[model]
        if "ops" in what:
            lines = []
            with Progress(len(points) * len(ops), f"{model} ops", quiet=quiet) as progress:
                for num_rows, prompt in points:
                    cases = OpCases(call, shape, num_rows, prompt + 1, precision, kv_format)
                    for op in ops:
                        metrics = bench_op(cases, op, bandwidth, rate)
                        num_bytes = cases.cost(op).read_bytes
                        lines.append(op_line(model, num_rows, prompt, op, num_bytes, metrics))
                        settings = {
                            "model": model,
                            "weights": precision,
                            "kv_cache": kv_format,
                            "rows": num_rows,
                            "prompt": prompt,
                            "bytes": num_bytes,
                        }
                        write(op, metrics, settings, "float64 reference, this op and shape")
                        progress.update()
                    del cases
                    torch.cuda.empty_cache()
            print("\n".join(["", OP_TITLES, *lines]), flush=True)
        if "step" in what or "waterfall" in what:
            _run_steps(
                DecodeStep(call, shape, precision=precision, kv_format=kv_format),
                model,
                points,
                bandwidth,
                write,
                waterfall="waterfall" in what,
            )
            torch.cuda.empty_cache()


OP_TITLES = (
    f"{'model':5} {'rows':>4} {'prompt':>6} {'op':24} {'µs':>9} {'alone µs':>9} {'MB':>9} {'GB/s':>7} "
    f"{'% read':>6} {'% roof':>6}"
)


def op_line(model: str, rows: int, prompt: int, op: str, num_bytes: int, metrics: Mapping[str, Any]) -> str:
    """Return a line of the table: the time next to others of its kind and alone, bytes, and what share it reaches."""
    return (
        f"{model:5} {rows:4} {prompt:6} {op:24} {metrics['time_us']['median']:9.2f} "
        f"{metrics['alone_us']['median']:9.2f} {num_bytes / 1e6:9.2f} {metrics['read_gb_s']:7.1f} "
        f"{100 * metrics['share_of_bandwidth_ratio']:6.1f} {100 * metrics['share_of_roofline_ratio']:6.1f}"
    )


def _run_steps(
    step: DecodeStep,
    model: str,
    points: Sequence[tuple[int, int]],
    bandwidth: float,
    write: Callable[[str, dict[str, Any], dict[str, Any], str], None],
    *,
    waterfall: bool,
) -> None:
    """Time whole steps, and for a waterfall each without one op."""
    for rows, prompt in points:
        metrics = bench_step(step, rows, prompt, bandwidth)
        print(
            f"{model:5} rows {rows:2} prompt {prompt:6} step {metrics['itl_us']['median']:9.1f} us, "
            f"floor {metrics['floor_us']:8.1f} us, ratio {metrics['itl_to_floor_ratio']:.3f}, "
            f"with kv {metrics['itl_to_floor_with_kv_ratio']:.3f}",
            flush=True,
        )
        settings = {
            "model": model,
            "weights": step.precision,
            "kv_cache": step.kv_format,
            "rows": rows,
            "prompt": prompt,
        }
        write("step", metrics, settings, "every op by the tests marked gpu")
        if waterfall:
            whole = metrics["itl_us"]["median"]
            for op in STEP_OPS:
                left = harness.percentile(step.time(without=(op,)), 0.5)
                print(f"      without {op:25} {left:9.1f} us: {whole - left:8.1f} us in the step", flush=True)


if __name__ == "__main__":
    sys.exit(main())
