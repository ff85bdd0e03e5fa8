"""Show where the time of a decode step or a prefill goes, op by op.

For every op of a step: its calls, its time, its floor (the bytes that it must read over the read bandwidth measured in
the same run), the gap before it, and what is lost, which is time and gap beyond the floor; then what is lost to which
cause. All lost time adds up to the step less its floor.

MODEL is a bundle, of target cpu or cuda, or a shape with random weights on a GPU (0.5b, 1.5b, 7b, 72b). The name of a
.json that --json wrote prints that profile again, and draws it, on any machine.

On a GPU kernels are recorded by CUPTI while captured steps run as in `generate`. Where CUPTI is missing or not allowed
(it says why), decode steps that end after the first op, the second, and so on are timed instead: slower, and gaps count
as time of the op behind them. On a CPU it is ONNX Runtime's own profiler.
A trace opens in https://ui.perfetto.dev and stays on this machine. docs/profile.md explains every figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rt.cli import bench
from qwen_rt.ops import KV_CACHE_FORMATS

HELP = "where the time of a step goes, op by op"
EPILOG = """\
example:
  qwen-rt profile nano-cpu
  qwen-rt profile math-7b --rows 16 --prompt 1024 --prefill 6144 --trace trace.json
  qwen-rt profile 7b --precision fp8 --json profile.json --picture profile.svg
  qwen-rt profile profile.json --picture again.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt profile`."""
    shapes = ", ".join(bench.MODELS)
    parser.add_argument("bundle", metavar="MODEL", help=f"folder that `qwen-rt build` wrote, or {shapes}, or a .json")
    what = parser.add_argument_group("what is profiled")
    what.add_argument(
        "--rows", type=bench.rows_of, default=1, metavar="N", help="rows that decode at once (default: 1)"
    )
    what.add_argument(
        "--prompt", type=bench.tokens_of, default=128, metavar="N", help="tokens of each row before (default: 128)"
    )
    what.add_argument(
        "--steps",
        type=bench.steps_of,
        default=16,
        metavar="N",
        help="decode steps that are recorded, 1 to 64; figures are means of the middle half (default: 16)",
    )
    what.add_argument("--prefill", type=bench.tokens_of, metavar="N", help="also profile the prefill of N tokens")
    what.add_argument(
        "--method",
        choices=("auto", "cupti", "cut"),
        default="auto",
        help="target cuda: recorded by CUPTI, by steps cut short, or by CUPTI where it can be had (default: auto)",
    )
    shape = parser.add_argument_group("of a shape")
    shape.add_argument("--layers", type=bench.tokens_of, metavar="N", help="fewer layers than the shape has")
    shape.add_argument(
        "--precision",
        choices=bench.PRECISIONS,
        help="of its layers, random weights; embedding and LM head stay bf16 (default: bf16)",
    )
    shape.add_argument(
        "--kv-cache",
        choices=list(KV_CACHE_FORMATS),
        help="of its keys and values, with random offsets where they are quantized (default: bf16)",
    )
    loading = parser.add_argument_group("loading")
    loading.add_argument("--threads", type=int, default=0, metavar="N", help="target cpu: threads (default: all cores)")
    loading.add_argument("--device", type=int, default=0, metavar="N", help="target cuda: which GPU (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    output.add_argument("--trace", type=Path, metavar="FILE", help="also write a trace for ui.perfetto.dev, JSON")
    output.add_argument("--picture", type=Path, metavar="FILE", help="also draw the waterfall, .svg or .png")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from qwen_rt.benchmarks.profile import run as command

    command.run(
        args.bundle,
        rows=args.rows,
        prompt=args.prompt,
        steps=args.steps,
        prefill=args.prefill,
        layers=args.layers,
        precision=args.precision,
        kv_format=args.kv_cache,
        method=args.method,
        threads=args.threads,
        device=args.device,
        json_file=args.json,
        trace=args.trace,
        picture=args.picture,
        quiet=args.quiet,
    )
    return 0
