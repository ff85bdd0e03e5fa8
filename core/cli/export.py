"""Write the portable ONNX graph of a checkpoint.

Standard operators at opset 24, KV cache as inputs and outputs, weights by reference into the checkpoint's own shards:
no weight is read or copied, so a 72B checkpoint takes seconds and well under 1 GB of memory. The graph is what every
target is lowered from; `build` makes it on its own, so this command is for those who want the graph itself.

With `--layout`, the folder is one that another runtime loads: optimum's ORTModelForCausalLM, or ONNX Runtime GenAI. It
holds a graph for the CPU, the tokenizer, and the checkpoint's shards as hard links, which take no more space on disk.
"""

from __future__ import annotations

import argparse

from qwen_rt.cli.build_args import add_build_arguments, report
from qwen_rt.errors import UsageError, one_line
from qwen_rt.progress import format_count

HELP = "checkpoint → portable ONNX graph, weights by reference"
EPILOG = """\
example:
  qwen-rt export Qwen2-Math-7B-Instruct -o math-7b-onnx
  qwen-rt inspect math-7b-onnx --layers
  qwen-rt export Qwen2-Math-7B-Instruct -o math-7b-optimum --layout optimum
  qwen-rt export Qwen2-Math-7B-Instruct -o math-7b-genai --layout genai --max-length 2048
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
    parser.add_argument(
        "--layout",
        choices=["optimum", "genai"],
        help="instead, a folder that optimum's ORTModelForCausalLM or ONNX Runtime GenAI loads on a CPU",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written."""
    if args.layout is not None:
        return _export_layout(args)
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


def _export_layout(args: argparse.Namespace) -> int:
    if args.dtype not in ("auto", "float32"):
        raise UsageError(f"--dtype {args.dtype} with --layout", "float32, in which it computes", "leave --dtype out")
    from qwen_rt.export.layouts.folder import export_layout

    done = export_layout(
        args.source,
        args.output,
        args.layout,
        max_length=args.max_length,
        self_contained=args.self_contained,
        overwrite=args.force,
        quiet=args.quiet,
    )
    line = f"layout {done.layout}, {done.num_layers} layers: {format_count(done.own_nbytes, 'B')} in {args.output}"
    if done.linked_nbytes:
        line += f", {format_count(done.linked_nbytes, 'B')} of weights shared by hard links"
    if done.copied_nbytes:
        because = f" ({done.copied_because})" if done.copied_because else ""
        line += f", {format_count(done.copied_nbytes, 'B')} of weights copied{because}"
    print(one_line(line))
    return 0
