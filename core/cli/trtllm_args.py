"""What `qwen-rt build --target trtllm` takes of its own, and how it reports."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import UsageError, one_line
from qwen_rt.progress import format_count

if TYPE_CHECKING:
    from qwen_rt.export.settings import QuantizeOptions

__all__ = ["add_trtllm_arguments", "refuse_trtllm_arguments", "run_trtllm"]


def add_trtllm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the option that this target shares with compiled engines."""
    group = parser.add_argument_group("several GPUs (--target trtllm, tensorrt, tensorrt-rtx)")
    group.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="GPUs that share the model, a file or an engine for each: 1, 2, 4 or 8 (default: 1)",
    )


def refuse_trtllm_arguments(args: argparse.Namespace) -> None:
    """Refuse it for a target of one GPU.

    Raises:
        UsageError: `--tp` was given.
    """
    if args.tp is not None and args.target not in ENGINE_TARGETS:
        expected = f"--target trtllm, {' or '.join(ENGINE_TARGETS)}"
        raise UsageError(f"--tp with target {args.target}", expected, "leave --tp out")


def run_trtllm(args: argparse.Namespace, quantize: QuantizeOptions) -> int:
    """Write the checkpoint; print what was written and the command that makes an engine of it.

    Raises:
        UsageError: An option that says nothing to this target.
    """
    for flag, is_given, why in (
        ("--self-contained", args.self_contained, "a target that refers to weights: this one always copies them"),
        ("--no-gate", args.no_gate, "a target that has a gate: nothing is checked here"),
    ):
        if is_given:
            raise UsageError(f"{flag} with target trtllm", why, f"leave {flag} out")
    from qwen_rt.export.trtllm import TrtllmOptions, convert

    tp = 1 if args.tp is None else args.tp
    options = TrtllmOptions(
        precision=args.precision,
        tp=tp,
        max_length=args.max_length,
        quantize=quantize,
        num_workers=args.workers,
        overwrite=args.force,
        quiet=args.quiet,
    )
    result = convert(args.source, args.output, options)
    ranks = f"{tp} rank{'s' * (tp > 1)}"
    activations = " with int8 activations" if quantize.activations == "int8" else ""
    size = format_count(result.nbytes, "B")
    print(one_line(f"trtllm {result.precision}{activations}, {result.dtype}, {ranks}: {size} in {args.output}"))
    print("build the engine with TensorRT-LLM 1.2, on a machine that has its GPUs:")
    print(result.command if result.command.isprintable() else one_line(result.command))  # whole, to be copied
    return 0
