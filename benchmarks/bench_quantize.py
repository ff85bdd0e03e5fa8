"""What quantizing costs: memory, time, and bytes a second beside the disk's.

Three checkpoints of random or no weights are made on the spot and built to each precision in a process of its own:

    7b     two layers of 7B's width with its whole embeddings and LM head, 3.1 GB
    72b    two layers of 72B's width with its whole embeddings and LM head, 8.5 GB
    72b-whole   all 80 layers, 145 GB of holes: no weight takes space, so what a build holds on to would show

The first two pass the gate, whose memory counts; zeros have no relative errors, so the third is built without. Before a
number is written, rows of every matrix of the bundle are compared with the checkpoint's rows, quantized here.

    python -m qwen_rt.benchmarks.bench_quantize
    python -m qwen_rt.benchmarks.bench_quantize --model 72b-whole --precision int4
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.checkpoints import QWEN2_7B, QWEN2_72B, write_random, write_sparse
from qwen_rt.benchmarks.measure import package_python, run_child
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError, VerificationError
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.quantization import FORMATS
from qwen_rt.row_reader import CheckpointRows, StoredRows

NAME = "quantize"
MODELS: dict[str, dict[str, Any]] = {
    "7b": QWEN2_7B | {"num_hidden_layers": 2},
    "72b": QWEN2_72B | {"num_hidden_layers": 2},
    "72b-whole": QWEN2_72B,
}
MAX_RSS_GB = 6.0
_PROBE_BYTES = 1 << 30
_ROWS = 3
_DONE = re.compile(r"weights: done [\d.]+ \w+ in ([\d.]+ (?:h|min|s)(?: \d+ (?:min|s))?)")
_SECONDS = {"h": 3600, "min": 60, "s": 1}


def max_rss_gb(config: dict[str, Any]) -> float:
    """The bar: 1.5 times the largest tensor in float32 and 500 MB, or `MAX_RSS_GB` if that is less."""
    largest = float(max(config["vocab_size"], config["intermediate_size"]) * config["hidden_size"] * 4)
    return min(1.5 * largest / 1e9 + 0.5, MAX_RSS_GB)


def disk_speed(folder: Path) -> dict[str, float]:
    """Write and read a gibibyte, past the page cache: GB/s each."""
    path, data = folder / "probe", np.random.default_rng(0).bytes(1 << 24)
    with path.open("wb") as file:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as reader:
        began = time.perf_counter()
        while reader.read(len(data)):
            pass
        read = time.perf_counter() - began
    path.unlink()
    return {"disk_write_gb_s": _PROBE_BYTES / 1e9 / written, "disk_read_gb_s": _PROBE_BYTES / 1e9 / read}


def check_bundle(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Compare the first, middle and last rows of every quantized matrix with the checkpoint's, quantized here."""
    source, opened = Checkpoint.open(checkpoint), Bundle.open(bundle, "size")
    quantization = opened.manifest.quantization
    if quantization is None:
        raise VerificationError(f"{bundle} holds nothing quantized", "a quantized bundle")
    num_rows, wrong = 0, []
    with CheckpointRows(source) as rows, StoredRows(opened.tensors(), quantization.weights) as stored:
        for name, scheme in quantization.weights.items():
            count = rows.shape(name)[0]
            for start in sorted({0, count // 2, count - _ROWS}):
                wanted = quantize_rows(name, rows.rows(name, start, start + _ROWS), scheme)
                found = stored.quantized_rows(name, start, start + _ROWS).parts()
                same = all(
                    np.array_equal(array.view(np.uint8), found[part].view(np.uint8))
                    for part, array in wanted.parts().items()
                )
                num_rows += _ROWS
                wrong += [] if same else [f"{name} row {start}"]
    return {
        "passed": not wrong,
        "what": "rows of every matrix equal those of the checkpoint, quantized by themselves",
        "num_rows": num_rows,
        "examples": wrong[:3],
    }


def weights_seconds(output: str) -> float:
    """Seconds that the conversion of the weights took, from the progress of a build: `3 min 05 s` are 185.

    Raises:
        QwenRtError: It does not tell.
    """
    found = _DONE.search(output)
    if found is None:
        raise QwenRtError(f"no progress of the weights in {output[-500:]!r}")
    words = found[1].split()
    return sum(float(number) * _SECONDS[unit] for number, unit in zip(words[::2], words[1::2], strict=True))


def measure(checkpoint: Path, model: str, precision: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build once; returns the check and the metrics."""
    options = ["--target", "cuda", "--precision", precision, *(["--no-gate"] if model == "72b-whole" else [])]
    command = package_python("-m", "qwen_rt", "build", str(checkpoint), "-o", str(out), *options)
    child = run_child(command, timeout_s=3600).require("build")
    check = check_bundle(checkpoint, out)
    opened = Checkpoint.open(checkpoint)
    manifest = Bundle.open(out, "size").manifest
    names = manifest.quantization.weights if manifest.quantization is not None else {}
    if manifest.gate is not None and "kl_mean" in manifest.gate:
        check |= {"gate_kl_mean": manifest.gate["kl_mean"], "gate_worst": manifest.gate["worst"]["output_error"]}
    read_bytes = sum(opened.tensors[name].nbytes for name in names)
    seconds = weights_seconds(child.output)
    return check, {
        "peak_rss_gb": child.peak_rss_bytes / 1e9,
        "wall_s": child.wall_s,
        "weights_s": seconds,
        "input_gb": read_bytes / 1e9,
        "input_gb_s": read_bytes / 1e9 / seconds,
        "output_gb": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e9,
    }


def run(model: str, precisions: Sequence[str], work: Path, results: Path | None) -> int:
    """Make a checkpoint, build it to each precision and write the rows; returns the number of missed bars."""
    started, config, missed = harness.new_run(), MODELS[model], 0
    checkpoint = work / model
    checkpoint.mkdir()
    if model == "72b-whole":
        write_sparse(checkpoint, config, 37)
    else:
        write_random(checkpoint, config)
    speed = disk_speed(work)
    for precision in precisions:
        out = work / f"{model}-{precision}"
        check, metrics = measure(checkpoint, model, precision, out)
        shutil.rmtree(out)
        bars = {"peak_rss_gb": harness.bar(metrics["peak_rss_gb"], max_rss_gb(config))}
        settings = {
            "model": f"Qwen2-{model.split('-')[0].upper()} shapes, bf16, {config['num_hidden_layers']} layers",
            "weights": "holes" if model == "72b-whole" else "random",
            "precision": precision,
            "gate": model != "72b-whole",
            "num_workers": os.cpu_count(),
        }
        used = harness.versions("ml_dtypes")
        harness.write_row(
            NAME,
            "qwen-rt",
            metrics | speed,
            settings,
            check=check,
            run=started,
            used=used,
            bars=bars,
            folder=results,
        )
        missed += sum(not item["met"] for item in bars.values())
        print(f"{model} {precision}: " + ", ".join(f"{key} {value:.3g}" for key, value in metrics.items()), flush=True)
    shutil.rmtree(checkpoint)
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Memory and speed of quantizing checkpoints of 7B's and 72B's width.")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument(
        "--precision", nargs="+", choices=FORMATS, help="default: all; of 72b-whole int4, whose output is 36 GB"
    )
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            missed = 0
            for model in args.model:
                precisions = args.precision or (["int4"] if model == "72b-whole" else FORMATS)
                missed += run(model, precisions, Path(folder), args.results)
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{missed} bars missed" if missed else "bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
