"""What quantization costs nano on the 1,000 held-out problems: exact match of every precision beside bf16.

    python -m qwen_rt.benchmarks.bench_nano_quantized
    python -m qwen_rt.benchmarks.bench_nano_quantized --target cuda

Every variant is a bundle built in this run and answers all problems greedily. The bars are the points that a precision
may lose; a variant that loses more writes its row too, and the command exits 1. Half of nano's training ran on
int4-rounded weights, so a loss here means a broken quantizer, or a broken kernel, rather than a coarse number.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.bench_nano_accuracy import MAX_TOKENS, answer_all, describe_gpu, exact_match
from qwen_rt.benchmarks.nano.heldout import HELDOUT_PATH, load
from qwen_rt.errors import QwenRtError
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.ops import MAX_ROWS
from qwen_rt.runtime.llm import LLM

NAMES = {"cpu": "nano_quantized", "cuda": "nano_quantized_cuda"}
"""Target → benchmark."""
CALIBRATION = "calibration"
"""Stands for the file of calibration problems, which are drawn from the generator and none of the held-out ones."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any], float]] = {
    "bf16": ("bf16", {}, 0.0),
    "fp8": ("fp8", {}, 0.5),
    "int8": ("int8", {}, 0.5),
    "int8, int8 activations": ("int8", {"activations": "int8"}, 0.5),
    "int8 calibrated": ("int8", {"calibrate": CALIBRATION}, 0.5),
    "int4": ("int4", {}, 2.0),
    "int4 asymmetric": ("int4", {"symmetric": False}, 2.0),
    "int4, int8 activations": ("int4", {"activations": "int8"}, 2.0),
    "int4 calibrated": ("int4", {"calibrate": CALIBRATION}, 1.0),
    "int4, head int4": ("int4", {"lm_head": "int4", "embedding": "int8"}, 2.0),
    "bf16, fp8 KV": ("bf16", {"kv_cache": "fp8"}, 0.5),
    "bf16, int8 KV": ("bf16", {"kv_cache": "int8"}, 0.5),
    "int4, fp8 KV": ("int4", {"kv_cache": "fp8"}, 2.0),
    "fp8, fp8 KV": ("fp8", {"kv_cache": "fp8"}, 0.5),
}
"""Name → precision, options of quantization, and the points of exact match that it may lose against bf16."""

_NUM_CALIBRATION = 100
_CALIBRATION_SEED = 77


def write_calibration(path: Path) -> None:
    """Write problems and their solutions as text; none of them is held out."""
    from qwen_rt.benchmarks.nano.heldout import excluded_questions
    from qwen_rt.benchmarks.nano.problems import distinct, normalise

    excluded = excluded_questions()
    problems = [p for p in distinct(_CALIBRATION_SEED, _NUM_CALIBRATION) if normalise(p.question) not in excluded]
    path.write_text("\n\n".join(f"{p.question}\n\n{p.solution}" for p in problems), encoding="utf-8")


def variants_of(target: str) -> list[str]:
    """The names of the variants that a target has: rounded activations are the CPU's."""
    return [name for name, (_, options, _) in VARIANTS.items() if target == "cpu" or "activations" not in options]


def measure(
    source: Path, name: str, rows: Sequence[dict[str, str]], folder: Path, target: str = "cpu", device: int = 0
) -> dict[str, Any]:
    """Build a variant and let it answer: exact match in points, the gate's KL, and the speed."""
    precision, options, _ = VARIANTS[name]
    given: dict[str, Any] = {
        key: folder / "calibration.txt" if value == CALIBRATION else value for key, value in options.items()
    }
    out = folder / "bundle"
    quantize = QuantizeOptions(**given)
    chosen = BuildOptions(target=target, precision=precision, quantize=quantize, overwrite=True, quiet=True)
    manifest = build(source, out, chosen)
    more: dict[str, Any] = {"max_num_seqs": MAX_ROWS, "device": device} if target == "cuda" else {}
    with LLM(out, **more) as llm:
        if target == "cuda":
            answer_all(llm, rows[:MAX_ROWS])  # what is made at the first use is not timed
        began = time.perf_counter()
        outputs = answer_all(llm, rows)
        seconds = time.perf_counter() - began
    found: dict[str, Any] = dict(exact_match(rows, outputs))
    found["throughput_tok_s"] = sum(len(output.token_ids) for output in outputs) / seconds
    found["weights_mb"] = sum(e.nbytes for n, e in manifest.files.items() if n.endswith(".safetensors")) / 1e6
    if manifest.gate is not None:
        found["gate_kl_mean"] = manifest.gate["kl_mean"]
        found["gate_top1_ratio"] = manifest.gate["top1"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table, write the rows; returns 1 if a precision loses too much."""
    parser = argparse.ArgumentParser(description="Exact match of quantized nano bundles on the held-out problems.")
    parser.add_argument("--target", default="cpu", choices=list(NAMES), help="of the bundles (default: cpu)")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), help="default: all; bf16 always takes part")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="target cuda: which GPU (default: 0)")
    parser.add_argument("--limit", type=int, help="only the first N problems")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the rows (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="write no result rows")
    args = parser.parse_args(argv)
    problems = load(HELDOUT_PATH)[: args.limit]
    names = ["bf16", *(name for name in args.variant or variants_of(args.target) if name != "bf16")]
    started, best, missed = harness.new_run(), 0.0, 0
    try:
        gpu = describe_gpu(args.device) if args.target == "cuda" else None
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            write_calibration(folder / "calibration.txt")
            build("nano", folder / "portable", BuildOptions(target="portable", quiet=True))
            for name in names:
                found = measure(folder / "portable", name, problems, folder, args.target, args.device)
                best = found["exact_match_ratio"] if name == "bf16" else best
                lost = 100 * (best - found["exact_match_ratio"])
                limit = VARIANTS[name][2]
                print(f"{name:<24} {100 * found['exact_match_ratio']:6.1f} %  lost {lost:4.1f} of {limit}", flush=True)
                missed += lost > limit
                if not args.dry_run:
                    _write(name, found, len(problems), lost, limit, started, gpu, args.output)
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"FAILED: {missed} lose more than they may" if missed else "passed")
    return 1 if missed else 0


def _write(
    name: str,
    found: Mapping[str, Any],
    num_problems: int,
    lost: float,
    limit: float,
    run: str,
    gpu: Mapping[str, Any] | None,
    file: Path | None,
) -> None:
    precision, options, _ = VARIANTS[name]
    target = "cpu" if gpu is None else "cuda"
    settings = {"variant": name, "precision": precision, **options, "num_problems": num_problems}
    settings |= {"model": "nano", "max_tokens": MAX_TOKENS, "decoding": "greedy", "target": target}
    metrics = {key: value for key, value in found.items() if not key.startswith("gate_")}
    metrics["lost_ratio"] = lost / 100
    check = {"passed": True, "what": "the build's gate" if "gate_kl_mean" in found else "none: nothing is quantized"}
    check |= {key: value for key, value in found.items() if key.startswith("gate_")}
    bars = {"lost_points": {"limit": limit, "value": round(lost, 3), "met": lost <= limit}}
    used = harness.versions() if gpu is None else harness.versions("onnxruntime-gpu")
    harness.write_row(
        NAMES[target], "qwen-rt", metrics, settings, check=check, run=run, used=used, bars=bars, gpu=gpu, file=file
    )


if __name__ == "__main__":
    sys.exit(main())
