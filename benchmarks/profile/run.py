"""The command `qwen-rt profile`: what to measure and how, and where the results go."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.profile.picture import draw_profiles
from qwen_rt.benchmarks.profile.profile import Profile, to_document
from qwen_rt.benchmarks.profile.saved import read_profiles
from qwen_rt.benchmarks.profile.text import device_text, profile_text
from qwen_rt.benchmarks.profile.trace import trace_bytes
from qwen_rt.benchmarks.verify_picture import check_picture
from qwen_rt.bundle import Bundle
from qwen_rt.errors import UsageError
from qwen_rt.storage import atomic_write_bytes

__all__ = ["METHODS", "run"]

METHODS = ("auto", "cupti", "cut")
"""How a GPU's steps are recorded: by CUPTI where it can be had, by it alone, or by steps cut short."""


def run(
    name: str,
    *,
    rows: int = 1,
    prompt: int = 128,
    steps: int = 16,
    prefill: int | None = None,
    layers: int | None = None,
    precision: str | None = None,
    kv_format: str | None = None,
    method: str = "auto",
    threads: int = 0,
    device: int = 0,
    json_file: Path | None = None,
    trace: Path | None = None,
    picture: Path | None = None,
    quiet: bool = False,
) -> None:
    """Profile a bundle or a shape; print the tables and write what is asked for.

    Args:
        name: A bundle, a key of `SHAPES`, or a document that `json_file` got, which is printed and drawn again.
        rows: Rows that decode at once.
        prompt: Tokens of each before the first step.
        steps: Decode steps that are recorded.
        prefill: Tokens of a prompt whose prefill is profiled too; None: none.
        layers: Of a shape, if fewer than it has.
        precision: Of a shape's layers; None for bf16.
        kv_format: Of a shape's KV cache; None for bf16.
        method: One of `METHODS`; for a GPU.
        threads: Of a CPU; 0 for all cores.
        device: The GPU's number.
        json_file: Gets the figures.
        trace: Gets the trace.
        picture: Gets the drawing, .svg or .png.
        quiet: No progress on stderr.

    Raises:
        QwenRtError: Something is absent, does not fit or is not correct; one line.
    """
    if picture is not None:
        check_picture(picture)
    for option, file in (("--json", json_file), ("--trace", trace), ("--picture", picture)):
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{option} {file}", "a folder that exists", f"make {file.parent}")
    if name.endswith(".json"):
        for option, wanted in (("--json", json_file), ("--trace", trace), ("--prefill", prefill)):
            if wanted is not None:
                raise UsageError(f"{option} {wanted} with {name}", "something to measure", "name a bundle or a shape")
        profiles, title = read_profiles(Path(name))
        print("\n\n".join(profile_text(profile, title) for profile in profiles), flush=True)
        if picture is not None:
            draw_profiles(profiles, title, picture)
        return
    bundle = None
    used: Mapping[str, str] = {}
    if name not in SHAPES:
        if not Path(name).exists():
            raise UsageError(f"{name!r}", f"a bundle, or one of {', '.join(SHAPES)}", "check the path")
        bundle = Bundle.open(name)
    if bundle is not None and bundle.manifest.target == "cpu":
        for option, value in (("--layers", layers), ("--precision", precision), ("--kv-cache", kv_format)):
            if value is not None:
                raise UsageError(f"{option} {value} with {name}", "a shape", "a bundle has its own")
        from qwen_rt.benchmarks.profile.on_cpu import profile_bundle

        profiles, described = profile_bundle(bundle, rows, prompt, steps, prefill, threads)
    else:
        if threads:
            raise UsageError(f"--threads {threads}", "a bundle of target cpu", "leave it out")
        plan = {"rows": rows, "prompt": prompt, "steps": steps, "prefill": prefill}
        which = (name, bundle, layers, precision, kv_format)
        profiles, described, used = _on_cuda(*which, method=method, device=device, quiet=quiet, plan=plan)
    title = device_text(described, profiles)
    print("\n\n".join(profile_text(profile, title) for profile in profiles), flush=True)
    if json_file is not None:
        versions = harness.versions(*(("onnxruntime-gpu",) if used else ())) | dict(used)
        document = to_document(profiles, harness.command_line(), harness.now(), described, versions)
        atomic_write_bytes(json_file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    if trace is not None:
        atomic_write_bytes(trace, trace_bytes(profiles, title))
    if picture is not None:
        draw_profiles(profiles, title, picture)


def _on_cuda(
    name: str,
    bundle: Bundle | None,
    layers: int | None,
    precision: str | None,
    kv_format: str | None,
    *,
    method: str,
    device: int,
    quiet: bool,
    plan: Mapping[str, Any],
) -> tuple[list[Profile], dict[str, Any], Mapping[str, str]]:
    """Profile on a GPU; returns profiles, the device and versions."""
    from qwen_rt.benchmarks.bench_latency import find_model, open_gpu
    from qwen_rt.benchmarks.profile.cupti import Cupti, CuptiError
    from qwen_rt.benchmarks.profile.floors import matrix_bytes_of_bundle, matrix_bytes_of_shape
    from qwen_rt.benchmarks.profile.on_cuda import profile_model

    model = find_model(name, layers, device, quiet, precision, kv_format)
    matrices = matrix_bytes_of_shape(model.shape, model.precision) if bundle is None else matrix_bytes_of_bundle(bundle)
    cupti, why_not = None, "--method cut"
    refused: CuptiError | None = None
    if method != "cut":
        try:
            cupti = Cupti()  # before there is a CUDA context
        except CuptiError as error:
            refused, why_not = error, str(error)
    gpu = open_gpu(device, with_matrix_rate=plan["prefill"] is not None)  # says what is missing without a GPU
    if refused is not None and method == "cupti":
        raise refused
    if refused is not None and not quiet:
        print(f"qwen-rt: {why_not}; timing steps that are cut short instead", file=sys.stderr)
    profiles = profile_model(model, gpu, matrices, cupti=cupti, why_not=why_not, quiet=quiet, **plan)
    versions = dict(gpu.versions) | ({} if cupti is None else {"cupti": str(cupti.version)})
    return profiles, gpu.describe(), versions
