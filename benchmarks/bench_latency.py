"""Times whole models on one GPU, against the read bandwidth measured in the same run.

    qwen-rt bench latency 1.5b 7b
    qwen-rt bench latency BUNDLE --rows 1 16 --prompts 128 6144

A model is a shape with random weights, made on the device (its graph comes from a checkpoint of sparse files), or a
bundle of target cuda, whose files are read once before, so that its load is one from page cache. Before anything is
timed, the greedy tokens of decode steps are compared with those that a prefill of the same tokens chooses: two ways
through the model that share no matrix kernel.

Rows of `latency.jsonl`, by `settings.what`:
    decode     one for each point: ms a token as the engine gets them, the step alone on the device, the ratio to the
               floor (bytes of all linear weights and the LM head over the bandwidth; `_with_kv`: and of the keys and
               values), tok/s of all rows, host µs of a step; for long prompts what their keys and values add
    prefill    one for each prompt: ms from its start to the first token, TFLOP/s, and the rates of products of 8192³
    session    one: seconds to load and to the first token, tokens of the cache, memory by use, and what the driver says
               that it lost
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.checkpoints import random_offsets, write_sparse
from qwen_rt.benchmarks.gpu_rates import gpu_read_bandwidth, matrix_rates_of_child
from qwen_rt.benchmarks.kernel_shapes import SHAPES, ModelShape
from qwen_rt.benchmarks.latency import (
    BASE_PROMPT,
    Plan,
    TimedSession,
    check_tokens,
    decode_metrics,
    prefill_metrics,
    session_metrics,
    tie_of,
    time_first_tokens,
    time_steps,
)
from qwen_rt.benchmarks.latency_report import draw_latency, latency_text, load_pyplot
from qwen_rt.benchmarks.measure import process_seconds
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.machine import Started, gpu_probe_command, read_gpus
from qwen_rt.plugins.library import load
from qwen_rt.progress import Progress, progress
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.graph import split_weights

__all__ = ["Gpu", "Model", "Plan", "find_model", "measure", "open_gpu", "run"]

Write = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]
"""Takes metrics, settings and check, and makes a row."""


@dataclass(frozen=True)
class Gpu:
    """The opened device, its kernels, and what was measured of it: bytes and bf16 operations a second."""

    cuda: Cudart
    library: Path
    versions: Mapping[str, str]
    name: str
    bandwidth: float
    matrix_rate: float | None
    matrix_rate_fp8: float | None = None
    open_s: float = 0.0
    """Seconds until the device was open and the library loaded, without the measuring."""

    def describe(self) -> dict[str, Any]:
        """Return what a row says of it."""
        rates = {"matrix_tflop_s": self.matrix_rate, "matrix_fp8_tflop_s": self.matrix_rate_fp8}
        memory_gb = round(self.cuda.memory_info()[1] / 1e9, 1)
        found = {"name": self.name, "memory_gb": memory_gb, "read_gb_s": round(self.bandwidth / 1e9, 1)}
        return found | {name: round(rate / 1e12, 1) for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class Model:
    """What is to be timed.

    Attributes:
        name: As in the rows.
        shape: Its sizes.
        precision: Of its layers' matrices.
        kv_format: Of its KV cache.
        floor_bytes: Stored bytes of all linear weights and the LM head.
        source: `random` or `bundle`.
        start: Loads it on a GPU; gives the session, and the seconds that it took.
    """

    name: str
    shape: ModelShape
    precision: str
    kv_format: str
    floor_bytes: int
    source: str
    start: Callable[[Gpu, Plan], contextlib.AbstractContextManager[tuple[TimedSession, float]]]


def open_gpu(device: int, *, with_matrix_rate: bool) -> Gpu:
    """Open a device, find the plugin library for it, and measure bandwidth and matrix rate.

    Raises:
        MissingDependencyError: No driver, GPU, CUDA runtime or plugin library; the message says how to get it.
        UsageError: No GPU of that number.
    """
    started = time.perf_counter()
    cuda = Cudart()
    sm = cuda.open_device(device)
    library = load(sm=sm)
    open_s = time.perf_counter() - started
    gpus = read_gpus(Started(gpu_probe_command()))
    name = gpus.gpus[device].name if device < len(gpus.gpus) else f"GPU of SM {sm}"
    runtime = cuda.runtime_version
    used = {
        "driver": gpus.driver or "unknown",
        "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "nvcc": library.build_info.get("nvcc", "unknown"),
        "plugins": library.build_info.get("sources", "unknown"),
    }
    rates = matrix_rates_of_child(device) if with_matrix_rate else {}
    bandwidth = gpu_read_bandwidth(cuda, library)
    return Gpu(cuda, library.path, used, name, bandwidth, rates.get("bf16"), rates.get("fp8"), open_s)


def find_model(
    name: str,
    layers: int | None,
    device: int,
    quiet: bool = False,
    precision: str | None = None,
    kv_format: str | None = None,
) -> Model:
    """Find a named shape or a bundle; opens no device.

    Args:
        name: A key of `SHAPES`, or a path.
        layers: Of a shape, if fewer than it has.
        device: The GPU's number.
        quiet: No progress on stderr.
        precision: Of a shape's layers, in its default scheme; None for bf16. Embedding and LM head are bf16.
        kv_format: Of a shape's KV cache; None for bf16. The others have offsets.

    Raises:
        UsageError: Neither, layers, a precision or a cache of a bundle, or a bundle of another target.
        BundleError: A bundle that is not whole.
    """
    if name in SHAPES:
        shape = SHAPES[name].with_layers(layers)
        full = name if shape == SHAPES[name] else f"{name}-{shape.layers}-layers"
        stored = precision or "bf16"
        cache = kv_format or "bf16"
        start = functools.partial(_start_random, shape, stored, cache, device, quiet)
        return Model(full, shape, stored, cache, shape.floor_bytes_at(stored), "random", start)
    for option, value in (("--layers", layers), ("--precision", precision), ("--kv-cache", kv_format)):
        if value is not None:
            raise UsageError(f"{option} {value} with {name}", f"one of {', '.join(SHAPES)}", "a bundle has its own")
    if not Path(name).exists():
        raise UsageError(f"model {name!r}", f"one of {', '.join(SHAPES)}, or a bundle", "check the name or the path")
    bundle = Bundle.open(name)
    if bundle.manifest.target != "cuda":
        raise UsageError(f"{name} is of target {bundle.manifest.target}", "target cuda", "build it with --target cuda")
    shape = ModelShape.from_spec(bundle.manifest.model)
    known = next((key for key, value in SHAPES.items() if value == shape), Path(name).resolve().name)
    cache = (bundle.manifest.quantization and bundle.manifest.quantization.kv_format) or "bf16"
    start = functools.partial(_start_bundle, bundle, cache, device, quiet)
    return Model(known, shape, bundle.manifest.precision, cache, floor_bytes_of(bundle), "bundle", start)


def floor_bytes_of(bundle: Bundle) -> int:
    """Stored bytes of a bundle's matrices and what belongs to them, but for an embedding that is not the head."""
    spec = bundle.manifest.model
    _, weights = split_weights(bundle.graph_file.read_bytes(), spec.num_layers)
    table = "" if spec.tie_word_embeddings else "model.embed_tokens."
    matrices = [weight for weight in weights if len(weight.shape) > 1 and not weight.name.endswith(".kv_offset")]
    return sum(weight.nbytes for weight in matrices if not (table and table in weight.name))


@contextlib.contextmanager
def _start_random(
    shape: ModelShape, precision: str, kv_format: str, device: int, quiet: bool, gpu: Gpu, plan: Plan
) -> Iterator[tuple[TimedSession, float]]:
    from qwen_rt.export.lower import cuda_graph_bytes
    from qwen_rt.runtime.cuda.session import CudaSession
    from qwen_rt.runtime.cuda.weights import RandomWeights

    with tempfile.TemporaryDirectory(prefix="qwen-rt-bench-") as folder:
        write_sparse(Path(folder), shape.config(), num_shards=4)
        checkpoint = Checkpoint.open(folder)
        kv = random_offsets(checkpoint.spec, kv_format)
        quantized = None if precision == "bf16" else precision
        graph = cuda_graph_bytes(checkpoint, plan.max_length, kv=kv, precision=quantized)
    start = time.perf_counter()
    with CudaSession.from_graph(
        graph,
        checkpoint.spec,
        plan.max_length,
        weights=RandomWeights(gpu.library),
        device=device,
        max_rows=plan.max_rows,
        kv_memory=plan.kv_bytes(checkpoint.spec, kv_format),
        quiet=quiet,
    ) as session:
        yield session, time.perf_counter() - start


@contextlib.contextmanager
def _start_bundle(
    bundle: Bundle, kv_format: str, device: int, quiet: bool, gpu: Gpu, plan: Plan
) -> Iterator[tuple[TimedSession, float]]:
    from qwen_rt.runtime.cuda.session import CudaSession

    if plan.max_length > bundle.manifest.max_length:
        raise UsageError(
            f"{bundle.path.name} reaches {bundle.manifest.max_length} positions",
            f"{plan.max_length} for these prompts",
            "shorten --prompts and --ttft, or build it with a larger --max-length",
        )
    read_files(list(bundle.weight_files.values()), quiet)
    kv_memory = plan.kv_bytes(bundle.manifest.model, kv_format)
    start = time.perf_counter()
    with CudaSession(bundle, device=device, max_rows=plan.max_rows, kv_memory=kv_memory, quiet=quiet) as session:
        yield session, time.perf_counter() - start


def read_files(files: Sequence[Path], quiet: bool) -> None:
    """Read files into the page cache."""
    with progress(sum(file.stat().st_size for file in files), "page cache", "B", quiet=quiet) as advance:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := len(stream.read(64 << 20)):
                    advance.update(count)


def measure(
    model: Model, plan: Plan, gpu: Gpu, write: Write, *, begun_s: float | None = None, quiet: bool = False
) -> None:
    """Load, check and time one model.

    Args:
        model: From `find_model`.
        plan: What is timed.
        gpu: From `open_gpu`.
        write: Gets every figure as soon as it is there.
        begun_s: Seconds that the process took until it opened the device, if this is its first model: then the time
            from its start to a first token is known.
        quiet: No progress on stderr.

    Raises:
        VerificationError: The check failed; nothing was written.
        CapacityError: It does not fit.
    """
    settings: dict[str, Any] = {"model": model.name, "weights": model.precision, "kv_cache": model.kv_format}
    settings |= {"source": model.source, "layers": model.shape.layers}
    free_before, _ = gpu.cuda.memory_info()
    with model.start(gpu, plan) as (session, load_s):
        started = time.perf_counter()
        session.time_prefill(BASE_PROMPT, 1)
        first_s = None if begun_s is None else begun_s + gpu.open_s + load_s + time.perf_counter() - started
        check = check_tokens(session, tie=tie_of(model.precision, model.kv_format))
        host_us: list[float] = []
        base_ms: dict[int, float] = {}
        count = len(plan.points) + len(plan.first_token_prompts)
        with Progress(count, f"{model.name} points", quiet=quiet) as done:
            for rows, prompt in plan.points:
                device_ms = session.time_decode(rows, prompt, plan.steps)
                samples, step_us = time_steps(session, rows, prompt, plan.steps)
                host_us.append(step_us)
                metrics = decode_metrics(
                    model.shape,
                    model.floor_bytes,
                    rows,
                    prompt,
                    samples,
                    device_ms,
                    step_us,
                    gpu.bandwidth,
                    model.kv_format,
                )
                itl_ms = metrics["itl_ms"]["median"]
                if prompt == BASE_PROMPT:
                    base_ms[rows] = itl_ms
                elif prompt > BASE_PROMPT:
                    metrics["kv_part_ms"] = itl_ms - base_ms[rows]
                write(metrics, settings | {"what": "decode", "rows": rows, "prompt": prompt}, check)
                done.update()
            for prompt in plan.first_token_prompts:
                requests, back_to_back = time_first_tokens(session, prompt, plan.repeats)
                rates = gpu.matrix_rate, gpu.matrix_rate_fp8
                metrics = prefill_metrics(model.shape, prompt, requests, back_to_back, *rates)
                write(metrics, settings | {"what": "prefill", "prompt": prompt}, check)
                done.update()
        driver_bytes = free_before - gpu.cuda.memory_info()[0]
        rate = session.load_stats.gb_s if model.source == "bundle" else None
        metrics = session_metrics(session, driver_bytes, load_s, first_s, rate, host_us)
        write(metrics, settings | {"what": "session", "max_length": plan.max_length}, check)


def run(
    names: Sequence[str],
    plan: Plan,
    *,
    layers: int | None = None,
    precisions: Sequence[str | None] = (None,),
    kv_formats: Sequence[str | None] = (None,),
    device: int = 0,
    output: Path | None = None,
    picture: Path | None = None,
    quiet: bool = False,
) -> None:
    """Time models one after another; print a table of each and append its rows.

    Args:
        names: Shapes and bundles.
        plan: What is timed.
        layers: Of shapes, if fewer than they have.
        precisions: Of shapes' layers, each with every one of `kv_formats`; None for bf16.
        kv_formats: Of shapes' KV caches; None for bf16.
        device: The GPU's number.
        output: The file of rows; None writes none.
        picture: A drawing of the ratios, .svg or .png.
        quiet: No progress on stderr.

    Raises:
        QwenRtError: Something is absent, does not fit or is not correct; one line. Of several models each is told of
            on stderr, and the others are timed all the same.
    """
    begun_s = process_seconds()
    variants = itertools.product(names, precisions, kv_formats)
    models = [find_model(name, layers, device, quiet, stored, cache) for name, stored, cache in variants]
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture {picture.name}", "a name ending in .svg or .png", "rename it")
    if picture is not None:
        load_pyplot()  # what is missing is told before an hour of timing, not after it
    gpu = open_gpu(device, with_matrix_rate=bool(plan.first_token_prompts))
    described = gpu.describe()
    run_name = harness.new_run()
    rows: list[dict[str, Any]] = []

    def write(metrics: dict[str, Any], settings: dict[str, Any], check: dict[str, Any]) -> None:
        rows.append(
            harness.make_row(
                "latency",
                "qwen-rt",
                metrics,
                settings,
                check=check,
                run=run_name,
                used=harness.versions("onnxruntime-gpu") | dict(gpu.versions),
                gpu=described,
            )
        )
        if output is not None:
            harness.append_row(rows[-1], output)

    failed = 0
    for model in models:
        first = len(rows)
        try:
            measure(model, plan, gpu, write, begun_s=begun_s if model is models[0] else None, quiet=quiet)
        except QwenRtError as error:
            if len(models) == 1:
                raise
            failed += 1
            print(f"{model.name}, {model.precision}, {model.kv_format} KV: {error}", file=sys.stderr, flush=True)
        if len(rows) > first:
            print(latency_text(rows[first:]), flush=True)
    if picture is not None and rows:
        draw_latency(rows, picture)
    if failed:
        raise QwenRtError(f"{failed} of {len(models)} models failed", "figures of all", "see the lines above")
