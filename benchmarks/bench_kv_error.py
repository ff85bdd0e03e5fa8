"""What eight bits do to keys and values, with and without the offsets that a quantized KV cache has.

    python -m qwen_rt.benchmarks.bench_kv_error
    python -m qwen_rt.benchmarks.bench_kv_error --checkpoint Qwen2-7B-Instruct

Every layer of a model is given hidden states, and its keys and values are rounded in four ways:

    qwen-rt      the build's offsets, a scale for each token and head
    no offset    a scale for each token and head
    per tensor   one scale for all tokens and heads, the best there is, as for a calibrated per-tensor cache
    bfloat16     no scale: a cache of bfloat16

The errors are those that attention sees (`export/quantize/kv_error.py`), as the median and the largest of all heads of
all layers. `nano` has small key biases; it is also measured with them multiplied, because released Qwen2 models have
key biases up to hundreds. No model is run, and nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_rt.benchmarks import harness
from qwen_rt.checkpoint import NANO, Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.export.quantize.kv import MARGIN, KvPlan, choose_kv_offsets
from qwen_rt.export.quantize.kv_error import KvSample, sample_layer
from qwen_rt.quantization import KV_FORMATS, KV_LARGEST, fake_quantize_kv, round_fp8
from qwen_rt.row_reader import CheckpointRows, RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["ScaledKeyBias", "main", "measure"]

NAME = "kv_error"
NANO_FACTORS = (1, 30, 300)
"""What the key biases of nano are multiplied by: up to 0.9, 26 and 260."""

F64 = NDArray[np.float64]


class ScaledKeyBias:
    """A `RowSource` whose key biases are multiplied by a factor.

    Args:
        source: The parameters.
        factor: Of every k_proj.bias.
    """

    def __init__(self, source: RowSource, factor: float) -> None:
        self._source, self._factor = source, np.float32(factor)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `RowSource`."""
        return self._source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `RowSource`."""
        found = self._source.rows(name, start, stop)
        return found * self._factor if name.endswith("k_proj.bias") else found


def _per_tensor(x: F64, kv_format: str) -> F64:
    scale = max(float(np.abs(x).max()), float(np.finfo(np.float32).tiny)) / KV_LARGEST[kv_format]
    rounded: F64 = (round_fp8(x / scale) if kv_format == "fp8" else np.rint(x / scale)) * scale
    return rounded


def _bfloat16(x: F64) -> F64:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _with_scales(x: F64, kv_format: str) -> F64:
    rounded: F64 = fake_quantize_kv(x, kv_format)
    return rounded


WAYS: dict[str, Callable[[F64, str], F64]] = {
    "qwen-rt": _with_scales,
    "no offset": _with_scales,
    "per tensor": _per_tensor,
    "bfloat16": lambda x, kv_format: _bfloat16(x),
}
"""Contender → (vectors, format) → what comes back of them. Only the first one takes offsets out."""


def measure(spec: ModelSpec, rows: RowSource, plan: KvPlan) -> dict[str, dict[str, float]]:
    """Return the metrics of every contender: medians and maxima over heads and layers."""
    errors: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in WAYS}
    for index in range(spec.num_layers):
        sample = sample_layer(rows, spec, index)
        for name, way in WAYS.items():
            keys, values = errors[name]
            key_errors, value_errors = _errors_of(sample, plan, index, name == "qwen-rt", way)
            keys += key_errors
            values += value_errors
    return {
        name: {
            "key_error_ratio": float(np.median(keys)),
            "largest_key_error_ratio": max(keys),
            "value_error_ratio": float(np.median(values)),
            "largest_value_error_ratio": max(values),
        }
        for name, (keys, values) in errors.items()
    }


def _errors_of(
    sample: KvSample, plan: KvPlan, index: int, takes_offsets: bool, way: Callable[[F64, str], F64]
) -> tuple[list[float], list[float]]:
    """Errors of the keys and of the values of each head of a layer."""

    def rounding(x: F64) -> F64:
        return way(x, plan.kv_format)

    layer = plan.layers[index]
    offsets = (layer.key_offset, layer.value_offset) if takes_offsets else (0.0, 0.0)
    keys, values = sample.key_errors(rounding, offsets[0]), sample.value_errors(rounding, offsets[1])
    return keys.tolist(), values.tolist()


def check_plan(plan: KvPlan, again: KvPlan) -> dict[str, Any]:
    """Compare two plans of one model, and what was chosen with what was tried."""
    choices = [choice for layer in plan.layers for choice in (*layer.keys, *layer.values)]
    same = plan.summary() == again.summary() and all(
        np.array_equal(array, again.tensors()[name]) for name, array in plan.tensors().items()
    )
    best = all(c.errors[c.candidate] * (1 - MARGIN) <= min(c.errors.values()) for c in choices)
    return {
        "passed": same and best,
        "what": "chosen twice, equal offsets; on no head would another candidate have been better by the margin",
        "num_heads": len(choices),
        "num_split": sum(c.candidate != "none" for c in choices),
    }


def _largest_bias(spec: ModelSpec, rows: RowSource) -> float:
    names = [f"model.layers.{index}.self_attn.k_proj.bias" for index in range(spec.num_layers) if spec.qkv_bias]
    return max((float(np.abs(rows.rows(name, 0, rows.shape(name)[0])).max()) for name in names), default=0.0)


def run(name: str, spec: ModelSpec, rows: RowSource, run_name: str, results: Path | None, dry: bool) -> None:
    """Measure a model in every format, print a table, and write a row for each contender."""
    bias = float(f"{_largest_bias(spec, rows):.3g}")
    for kv_format in KV_FORMATS:
        plan = choose_kv_offsets(rows, spec, kv_format)
        check = check_plan(plan, choose_kv_offsets(rows, spec, kv_format))
        split = f"{check['num_split']} of {check['num_heads']} heads split"
        print(f"{name}, {kv_format}, key biases up to {bias:g}: {split}")
        for contender, metrics in measure(spec, rows, plan).items():
            print(f"  {contender:<12} " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()), flush=True)
            if not dry:
                settings = {"model": name, "kv_format": kv_format, "largest_key_bias": bias}
                harness.write_row(NAME, contender, metrics, settings, check=check, run=run_name, folder=results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="What eight bits do to keys and values, with offsets and without.")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="further models to measure")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="write no rows")
    args = parser.parse_args(argv)
    started = harness.new_run()
    try:
        nano = Checkpoint.open(NANO)
        for factor in NANO_FACTORS:
            run(NANO, nano.spec, ScaledKeyBias(CheckpointRows(nano), factor), started, args.results, args.dry)
        for folder in args.checkpoint:
            opened = Checkpoint.open(folder)
            run(folder.name, opened.spec, CheckpointRows(opened), started, args.results, args.dry)
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
