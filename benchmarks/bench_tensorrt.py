"""What compiling an engine costs: peak memory beside the bytes of the weights, and time.

Checkpoints of random weights are made on the spot and built by the command line in a process of its own:

    7b     one layer of 7B's width, 0.48 GB
    72b    four layers of 72B's width, 7.1 GB

Both with 1,024 rows of embedding and LM head, so that layers are what is measured. Before a number is written, the
engine is searched for pieces of every matrix of the checkpoint (floats; quantized ones are compared as the accuracy
gate of the build does it).

    python -m qwen_rt.benchmarks.bench_tensorrt
    python -m qwen_rt.benchmarks.bench_tensorrt --model 7b --precision bf16 int8
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.checkpoints import QWEN2_7B, QWEN2_72B, write_random
from qwen_rt.benchmarks.measure import package_python, run_child
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import CARD_FILE, EngineCard, engine_file
from qwen_rt.errors import QwenRtError

NAME = "tensorrt"
_SMALL: dict[str, Any] = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "7b": QWEN2_7B | _SMALL | {"num_hidden_layers": 1},
    "72b": QWEN2_72B | _SMALL | {"num_hidden_layers": 4},
}
PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")
MAX_RSS_RATIO = 1.5
MAX_LENGTH = 4096
_PROBE_BYTES = 4096


def check_engine(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Search an engine for the first, middle and last bytes of every matrix of its checkpoint."""
    opened, missing, num_probes, last = Checkpoint.open(checkpoint), [], 0, 0
    manifest = Bundle.open(bundle, "full").manifest
    is_float = manifest.quantization is None
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context((bundle / engine_file(0)).open("rb"))
        mapped = stack.enter_context(mmap.mmap(engine.fileno(), 0, access=mmap.ACCESS_READ))
        for name, ref in opened.tensors.items() if is_float else ():
            if len(ref.shape) != 2:
                continue
            for at in (0, ref.nbytes // 2, ref.nbytes - _PROBE_BYTES):
                with ref.path.open("rb") as shard:
                    shard.seek(ref.offset + at)
                    num_probes += 1
                    piece = shard.read(_PROBE_BYTES)
                if manifest.compute_dtype == "float16":
                    piece = np.frombuffer(piece, ml_dtypes.bfloat16).astype(np.float32).astype(np.float16).tobytes()
                found = mapped.find(piece, last)  # mostly they stand in the order of the graph
                found = mapped.find(piece, 0, last) if found < 0 else found
                if found < 0:
                    missing.append(f"{name} at {at}")
                else:
                    last = found
    gate = dict(manifest.gate or {})
    what = "pieces of every matrix are in the engine" if is_float else "the accuracy gate of the build"
    passed = not missing and (num_probes > 0 if is_float else "kl_mean" in gate)
    return {"passed": passed, "what": what, "num_probes": num_probes, "examples": missing[:3]}


def measure(checkpoint: Path, precision: str, out: Path, capabilities: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Build once; returns check, metrics and the card's facts."""
    options = ["--target", "tensorrt-rtx", "--precision", precision, "--max-length", str(MAX_LENGTH)]
    options += ["--compute-capability", *capabilities, "--quiet"]
    command = package_python("-m", "qwen_rt", "build", str(checkpoint), "-o", str(out), *options)
    child = run_child(command, timeout_s=3600).require("build")
    weights = sum(ref.nbytes for ref in Checkpoint.open(checkpoint).tensors.values())
    card = EngineCard.from_json((out / CARD_FILE).read_bytes())
    facts = {
        "library": f"{card.flavour} {card.version}",
        "layers": {name: sum(layers.values()) for name, layers in card.engine.items()},
    }
    return (
        check_engine(checkpoint, out),
        {
            "peak_rss_gb": child.peak_rss_bytes / 1e9,
            "weights_gb": weights / 1e9,
            "rss_to_weights_ratio": child.peak_rss_bytes / weights,
            "engine_gb": (out / engine_file(0)).stat().st_size / 1e9,
            "wall_s": child.wall_s,
        },
        facts,
    )


def run(model: str, precisions: Sequence[str], capabilities: Sequence[str], work: Path, results: Path | None) -> int:
    """Make a checkpoint, build it in each precision and write the rows; returns the number of missed bars."""
    started, config, missed = harness.new_run(), MODELS[model], 0
    checkpoint = work / model
    checkpoint.mkdir()
    write_random(checkpoint, config, num_shards=4)
    for precision in precisions:
        out = work / f"{model}-{precision}"
        chosen = [one for one in capabilities if precision != "fp8" or one not in ("8.0", "8.6")]
        check, metrics, facts = measure(checkpoint, precision, out, chosen)
        shutil.rmtree(out)
        bars = {}
        if (model, precision) == ("72b", "bf16"):  # beside one layer the libraries themselves weigh as much
            bars["rss_to_weights_ratio"] = harness.bar(metrics["rss_to_weights_ratio"], MAX_RSS_RATIO)
        settings = {
            "width": model,
            "model": f"Qwen2-{model.upper()} shapes, {config['num_hidden_layers']} layers, small vocabulary",
            "weights": "random",
            "precision": precision,
            "compute_capabilities": chosen,
            "max_length": MAX_LENGTH,
            "num_workers": os.cpu_count(),
            "executed": False,
            **facts,
        }
        used = harness.versions("onnx", "onnx-ir", "ml_dtypes", "tensorrt-rtx")
        harness.write_row(
            NAME, "qwen-rt", metrics, settings, check=check, run=started, used=used, bars=bars, folder=results
        )
        missed += sum(not item["met"] for item in bars.values())
        print(f"{model} {precision}: " + ", ".join(f"{key} {value:.3g}" for key, value in metrics.items()), flush=True)
    shutil.rmtree(checkpoint)
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Memory and time of compiling engines of 7B's and 72B's width.")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="default: bf16")
    parser.add_argument(
        "--compute-capability", nargs="+", default=["8.0", "8.9", "12.0"], help="default: 8.0 8.9 12.0; fp8: no 8.0"
    )
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            missed = sum(
                run(model, args.precision, args.compute_capability, Path(folder), args.results) for model in args.model
            )
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
