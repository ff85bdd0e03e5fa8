"""How weights should reach ONNX Runtime on the CPU: time and memory of making a session, and speed of the products.

    python -m qwen_rt.benchmarks.bench_ort_weights

A chain of 20 products of 4864 x 3584 (bf16 stored: 0.7 GB, float32: 1.4 GB), every variant in its own process:

    source    folder      external references that ONNX Runtime reads itself, tensor by tensor
              mapped      the mapped file handed over (add_external_initializers_from_files_in_memory)
              values      numpy arrays handed over (add_external_initializers); float32 only
    product   gemm        Gemm(transB=1) on the stored [out, in] layout
              matmul      MatMul on Transpose(W), which is folded while the session is made
    stored    bf16, fp32  bf16 is cast to float32 while the session is made
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from qwen_rt.benchmarks.harness import new_run, write_row
from qwen_rt.benchmarks.measure import package_python, read_bandwidth, run_child
from qwen_rt.errors import QwenRtError

__all__ = ["main"]

NUM_PRODUCTS, OUT, IN = 20, 4864, 3584
STORED = {"bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16), "fp32": (TensorProto.FLOAT, np.float32)}
FILE = "weights.bin"


def _graph(product: str, stored: str) -> onnx.ModelProto:
    """X ─ product ─ mean ─ add to x ─ product …: every product reads its own weight and none can be skipped."""
    elem_type, dtype = STORED[stored]
    nbytes = OUT * IN * np.dtype(dtype).itemsize
    nodes, weights, x = [], [], "x0"
    for index in range(NUM_PRODUCTS):
        weight = TensorProto(name=f"w{index}", data_type=elem_type, dims=(OUT, IN), data_location=TensorProto.EXTERNAL)
        for key, value in (("location", FILE), ("offset", index * nbytes), ("length", nbytes)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        name = weight.name
        if stored == "bf16":
            nodes.append(helper.make_node("Cast", [name], [f"c{index}"], to=TensorProto.FLOAT))
            name = f"c{index}"
        if product == "matmul":
            nodes.append(helper.make_node("Transpose", [name], [f"t{index}"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [x, f"t{index}"], [f"y{index}"]))
        else:
            nodes.append(helper.make_node("Gemm", [x, name], [f"y{index}"], transB=1))
        nodes.append(helper.make_node("ReduceMean", [f"y{index}"], [f"m{index}"], keepdims=1))
        nodes.append(helper.make_node("Add", [x, f"m{index}"], [f"x{index + 1}"]))
        x = f"x{index + 1}"
    shape: list[str | int | None] = ["M", IN]
    inputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializer=weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _child(folder: Path, source: str, product: str, stored: str, rows: int) -> dict[str, Any]:
    """Make the session one way, run it, and measure this process."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    file = folder / stored / FILE
    keep: list[Any] = []
    start = time.perf_counter()
    if source == "folder":
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    elif source == "mapped":
        mapped = np.memmap(file, np.uint8, mode="r")
        options.add_external_initializers_from_files_in_memory([FILE], [mapped], [mapped.size])
    else:
        whole = np.fromfile(file, np.float32).reshape(NUM_PRODUCTS, OUT, IN)
        keep = [ort.OrtValue.ortvalue_from_numpy(w) for w in whole]
        options.add_external_initializers([f"w{i}" for i in range(NUM_PRODUCTS)], keep)
    session = ort.InferenceSession(_graph(product, stored).SerializeToString(), options)
    create_s = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    x = np.ones((rows, IN), np.float32)
    result = session.run(None, {"x0": x})[0]
    times = []
    for _ in range(12):
        start = time.perf_counter()
        session.run(None, {"x0": x})
        times.append(time.perf_counter() - start)
    return {
        "create_s": create_s,
        "peak_rss_mb": peak_mb,
        "chain_ms": 1e3 * statistics.median(times),
        "result": float(result.mean()),
    }


def main() -> int:
    """Run every variant, print a table, write rows."""
    parser = argparse.ArgumentParser(description="Ways of handing weights to ONNX Runtime on the CPU.")
    parser.add_argument("--rows", type=int, default=1, help="rows of the activation (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="write no result rows")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, source, product, stored = args.child
        print(json.dumps(_child(Path(folder), source, product, stored, args.rows)))
        return 0
    run, found = new_run(), []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for stored in STORED:
            (Path(folder) / stored).mkdir()
        with (Path(folder) / "bf16" / FILE).open("wb") as narrow, (Path(folder) / "fp32" / FILE).open("wb") as wide:
            for _ in range(NUM_PRODUCTS):
                weight = (0.01 * rng.standard_normal((OUT, IN), np.float32)).astype(ml_dtypes.bfloat16)
                weight.tofile(narrow)
                weight.astype(np.float32).tofile(wide)
        bandwidth = read_bandwidth()
        for source, product, stored in itertools.product(("folder", "mapped", "values"), ("gemm", "matmul"), STORED):
            if source == "values" and stored == "bf16":
                continue
            command = ["-m", "qwen_rt.benchmarks.bench_ort_weights", "--rows", str(args.rows), "--child"]
            done = run_child(package_python(*command, folder, source, product, stored))
            done.require(f"{source} {product} {stored}")
            measured = json.loads(done.output.splitlines()[-1])
            found.append(({"source": source, "product": product, "stored": stored}, measured))
    expected = found[0][1]["result"]
    weight_gb = NUM_PRODUCTS * OUT * IN * 4 / 1e9
    print(f"{'source':<8} {'product':<8} {'stored':<7} {'create s':>9} {'peak MB':>9} {'chain ms':>9} {'GB/s':>7}")
    for settings, measured in found:
        close = abs(measured.pop("result") - expected) <= 1e-4 * abs(expected)
        measured["weights_read_gb_s"] = weight_gb / (measured["chain_ms"] / 1e3)
        measured["read_bandwidth_gb_s"] = bandwidth["gb_s"]
        print(
            f"{settings['source']:<8} {settings['product']:<8} {settings['stored']:<7} {measured['create_s']:>9.2f} "
            f"{measured['peak_rss_mb']:>9.0f} {measured['chain_ms']:>9.1f} {measured['weights_read_gb_s']:>7.1f}"
        )
        if not args.dry_run:
            write_row(
                "ort_weights",
                " ".join(settings.values()),
                measured,
                settings | {"products": f"{NUM_PRODUCTS} of {OUT}x{IN}", "rows": args.rows},
                check={"passed": close, "what": "equal results of all variants, relative 1e-4"},
                run=run,
            )
    print(f"read bandwidth {bandwidth['gb_s']} GB/s ({bandwidth['reader']})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QwenRtError as error:
        sys.exit(f"error: {error}")
