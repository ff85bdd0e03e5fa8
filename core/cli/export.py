"""Write the portable ONNX graph of a checkpoint.

Standard operators at opset 24, KV cache as inputs and outputs, weights by reference into the checkpoint's own shards:
no weight is read or copied, so a 72B checkpoint takes seconds and well under 1 GB of memory. The graph is what every
target is lowered from; `build` makes it on its own, so this command is for those who want the graph itself.
"""

from __future__ import annotations

import argparse

from qwen_rt.cli.build_args import add_build_arguments, report

HELP = "checkpoint → portable ONNX graph, weights by reference"
EPILOG = """\
example:
  qwen-rt export Qwen2-Math-7B-Instruct -o math-7b-onnx
  qwen-rt inspect math-7b-onnx --layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt export`."""
    add_build_arguments(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of activations and KV cache; weights stay as stored and are cast in the graph "
        "(default: auto, the checkpoint's)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written."""
    from qwen_rt.export.build import BuildOptions, build

    options = BuildOptions(
        target="portable",
        dtype=args.dtype,
        max_length=args.max_length,
        self_contained=args.self_contained,
        overwrite=args.force,
        quiet=args.quiet,
    )
    return report(build(args.source, args.output, options), args.output)
