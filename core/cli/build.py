"""Build a deployment bundle from a checkpoint or a portable graph.

A bundle is a folder: the lowered graph, the tokenizer, a manifest with hashes, and the weights that had to change.
Weights that are stored as they were stay in the checkpoint and are referred to; --self-contained copies them. The
folder appears when it is whole. A build that was killed goes on where it stopped when it is run again.
"""

from __future__ import annotations

import argparse

from qwen_rt.cli.build_args import add_build_arguments, report

HELP = "checkpoint or portable graph → bundle"
EPILOG = """\
example:
  qwen-rt build nano -o nano-cpu
  qwen-rt build nano -o nano-gpu --target cuda
  qwen-rt build Qwen2-Math-1.5B-Instruct -o math-1.5b --precision fp32 --max-length 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt build`."""
    add_build_arguments(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=["cpu", "cuda"],
        help="what runs the bundle: cpu is ONNX Runtime; cuda is ONNX Runtime with this package's kernels, on an "
        "NVIDIA GPU of compute capability 8.0 or newer (default: cpu)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="how weights are stored; the cpu target computes in float32 from any of them, the cuda target takes bf16 "
        "only (default: auto, as the checkpoint stores them, so that none is copied; for cuda bf16)",
    )


def run(args: argparse.Namespace) -> int:
    """Build, and print what was written."""
    from qwen_rt.export.build import BuildOptions, build

    options = BuildOptions(
        target=args.target,
        precision=args.precision,
        max_length=args.max_length,
        self_contained=args.self_contained,
        overwrite=args.force,
        quiet=args.quiet,
    )
    return report(build(args.source, args.output, options), args.output)
