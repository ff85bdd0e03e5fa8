"""What `qwen-rt export` costs for a checkpoint of Qwen2-72B's size (145 GB in 37 shards): time, memory, bytes written.

The checkpoint's files are sparse: headers as in a real one, holes for weights. An export reads only headers, so the
cost is that of the real thing, and a weight that is read or copied would show: in the memory, in the blocks of the
output, in the time. Before a number is written, the reference check opens the graph without its external data and
compares file, offset, length, dtype and shape of every initializer with the shards' headers.

    python -m qwen_rt.benchmarks.bench_export_72b
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.checkpoints import QWEN2_72B, write_sparse
from qwen_rt.benchmarks.cpu_contest import number_from
from qwen_rt.benchmarks.measure import package_python, run_child
from qwen_rt.bundle import GRAPH_FILE
from qwen_rt.errors import QwenRtError, StorageError
from qwen_rt.safetensors_header import TensorRef, read_header

NAME = "export_72b"
NUM_SHARDS = 37
MAX_WALL_S, MAX_RSS_GB, MAX_GRAPH_MB, MAX_OUTPUT_MB = 20.0, 1.0, 10.0, 10.0


def check_references(graph_file: Path, stored: Mapping[str, TensorRef]) -> dict[str, Any]:
    """Compare every initializer of a graph with the headers of the shards.

    Args:
        graph_file: A portable graph.
        stored: Hugging Face name → where its bytes are.

    Returns:
        `passed`, how many weights were compared, and what differs (the first few).
    """
    import onnx

    dtypes = {"BF16": onnx.TensorProto.BFLOAT16, "F16": onnx.TensorProto.FLOAT16, "F32": onnx.TensorProto.FLOAT}
    model = onnx.load(str(graph_file), load_external_data=False)
    wrong, seen, inline_bytes = [], set(), 0
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inline_bytes += tensor.ByteSize()
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        ref = stored.get(tensor.name)
        seen.add(tensor.name)
        found = (place["location"], int(place["offset"]), int(place["length"]), tensor.data_type, tuple(tensor.dims))
        if ref is None or found != (ref.path.name, ref.offset, ref.nbytes, dtypes[ref.dtype], ref.shape):
            wrong.append(tensor.name)
    missing = sorted(set(stored) - seen)
    return {
        "passed": not wrong and not missing and inline_bytes < 1 << 20,
        "what": "every initializer's file, offset, length, dtype and shape equal the shards' headers",
        "num_weights": len(seen),
        "num_wrong": len(wrong),
        "num_missing": len(missing),
        "inline_bytes": inline_bytes,
        "examples": (wrong + missing)[:3],
    }


def _blocks_bytes(paths: Sequence[Path]) -> int:
    """Bytes that files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def _measure(checkpoint: Path, shards: Sequence[Path], stored: Mapping[str, TensorRef], out: Path) -> dict[str, Any]:
    before = _blocks_bytes(shards)
    command = package_python("-m", "qwen_rt", "export", str(checkpoint), "-o", str(out), "--quiet")
    child = run_child(command).require("export")
    files = [path for path in out.rglob("*") if path.is_file()]
    check = check_references(out / GRAPH_FILE, stored)
    written = _blocks_bytes(files)
    check["shard_blocks_unchanged"] = _blocks_bytes(shards) == before
    check["output_under_10_mb"] = max(written, sum(path.stat().st_size for path in files)) < MAX_OUTPUT_MB * 1e6
    check["passed"] = check["passed"] and check["shard_blocks_unchanged"] and check["output_under_10_mb"]
    return {
        "check": check,
        "wall_s": child.wall_s,
        "peak_rss_gb": child.peak_rss_bytes / 1e9,
        "graph_mb": (out / GRAPH_FILE).stat().st_size / 1e6,
        "output_mb": written / 1e6,
    }


def run(folder: Path, runs: int, results: Path | None) -> int:
    """Make the checkpoint, export it `runs` times and write the row; returns the exit code."""
    started = harness.new_run()
    checkpoint = folder / "Qwen2-72B-shape"
    checkpoint.mkdir()
    shards = write_sparse(checkpoint, QWEN2_72B, NUM_SHARDS)
    stored = {name: ref for shard in shards for name, ref in read_header(shard).tensors.items()}
    apparent = sum(shard.stat().st_size for shard in shards)
    if _blocks_bytes(shards) > apparent / 100:
        raise StorageError("this file system stores holes", "one with sparse files", "choose another --work folder")
    samples = []
    for index in range(runs):
        out = folder / f"graph-{index}"
        samples.append(_measure(checkpoint, shards, stored, out))
        shutil.rmtree(out)
        print(", ".join(f"{key} {value:.3g}" for key, value in samples[-1].items() if key != "check"), flush=True)
    check = next((sample["check"] for sample in samples if not sample["check"]["passed"]), samples[0]["check"])
    metrics = {
        "wall_s": harness.summarize(sample["wall_s"] for sample in samples),
        "peak_rss_gb": harness.summarize(sample["peak_rss_gb"] for sample in samples),
        "graph_mb": samples[0]["graph_mb"],
        "output_mb": samples[0]["output_mb"],
        "checkpoint_gb": apparent / 1e9,
    }
    worst = {key: max(sample[key] for sample in samples) for key in ("wall_s", "peak_rss_gb", "graph_mb")}
    bars = {
        "wall_s": harness.bar(worst["wall_s"], MAX_WALL_S),
        "peak_rss_gb": harness.bar(worst["peak_rss_gb"], MAX_RSS_GB),
        "graph_mb": harness.bar(worst["graph_mb"], MAX_GRAPH_MB),
    }
    settings = {"model": "Qwen2-72B shapes, bf16", "num_shards": len(shards), "num_tensors": len(stored)}
    used = harness.versions("onnx-ir", "onnxscript")
    harness.write_row(
        NAME, "qwen-rt", metrics, settings, check=check, run=started, used=used, bars=bars, folder=results
    )
    missed = [name for name, item in bars.items() if not item["met"]]
    print(f"{check['num_weights']} weights checked; " + (f"bars missed: {', '.join(missed)}" if missed else "bars met"))
    return 1 if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Time, memory and bytes of exporting a checkpoint of 72B's size.")
    parser.add_argument("--runs", type=number_from(1), default=3, help="exports to measure (default: 3)")
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            return run(Path(folder), args.runs, args.results)
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
