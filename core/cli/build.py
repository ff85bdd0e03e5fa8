"""Build a deployment bundle from a checkpoint or a portable graph.

A bundle is a folder: the lowered graph, the tokenizer, a manifest with hashes, and the weights that had to change.
Weights that are stored as they were stay in the checkpoint and are referred to; --self-contained copies them. The
folder appears when it is whole. A build that was killed goes on where it stopped when it is run again.

With --precision fp8, int8 or int4 the matrices of the layers are quantized while they pass by; memory stays bounded
whatever the size of the model. Without calibration nothing but the weights is needed. The result is then compared with
the checkpoint, matrix by matrix and in its logits: a build whose errors are beyond the limits of its precision fails
and names the worst matrix. A checkpoint that is quantized already (GPTQ, AWQ, compressed-tensors, fp8) is taken over
number by number.

--overrides takes a TOML file of names and precisions, of which later lines win:

  "model.layers.0.*" = "bf16"
  "*.mlp.down_proj" = { precision = "int4", group_size = 64 }

--target tensorrt-rtx and tensorrt compile engines, weights inside: one for each of --tp GPUs, for prompts and for
single tokens, with a card that says which library and GPUs they are for. TensorRT-RTX needs no GPU to compile. A graph
that the library does not take, or takes apart, is refused with the layer's name. Ctrl-C stops at the library's next
step.

--target trtllm writes no bundle but a checkpoint for TensorRT-LLM (config.json, a file for each of --tp GPUs), and
prints the trtllm-build command that makes engines of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rt.cli.build_args import add_build_arguments, report
from qwen_rt.cli.engine_args import add_engine_arguments, engine_options, library_silenced, report_card
from qwen_rt.cli.trtllm_args import add_trtllm_arguments, refuse_trtllm_arguments, run_trtllm
from qwen_rt.engine_card import ENGINE_TARGETS

HELP = "checkpoint or portable graph → bundle"
EPILOG = """\
example:
  qwen-rt build nano -o nano-cpu
  qwen-rt build nano -o nano-gpu --target cuda
  qwen-rt build nano -o nano-int4 --precision int4 --kv-cache int8
  qwen-rt build Qwen2-Math-1.5B-Instruct -o math-1.5b --precision fp32 --max-length 2048
  qwen-rt build Qwen2-Math-7B-Instruct -o math-7b --target cuda --precision int4 --calibrate book.txt
  qwen-rt build Qwen2-Math-72B-Instruct -o math-72b --target cuda --precision int4 --size-budget 48GB
  qwen-rt build Qwen2-Math-7B-Instruct -o math-7b-rtx --target tensorrt-rtx --compute-capability 8.9 --max-length 4096
  qwen-rt build Qwen2-Math-72B-Instruct -o math-72b-trtllm --target trtllm --precision fp8 --tp 4
  qwen-rt build Qwen2-Math-7B-Instruct -o sq --target trtllm --precision int8 --activations int8 --calibrate book.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt build`."""
    add_build_arguments(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=["cpu", "cuda", "tensorrt", "tensorrt-rtx", "trtllm"],
        help="what runs the bundle: cpu is ONNX Runtime; cuda is ONNX Runtime with this package's kernels, on an "
        "NVIDIA GPU of compute capability 8.0 or newer; tensorrt and tensorrt-rtx are compiled engines; trtllm is a "
        "checkpoint for trtllm-build (default: cpu)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4"],
        help="how weights are stored. fp32, bf16, fp16: as floats; the cpu target computes in float32 from any of "
        "them, the cuda target takes bf16 only, engines compute in them. fp8 (e4m3), int8: a scale for each output "
        "channel; int4: a scale for "
        "128 inputs (default: auto, as the checkpoint stores them, so that none is copied; for cuda bf16)",
    )
    group = parser.add_argument_group("quantization")
    group.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale; 0: all (int4: 128)")
    group.add_argument("--asymmetric", action="store_true", help="int4 with zero points")
    group.add_argument("--lm-head", choices=["fp8", "int8", "int4"], help="quantize the LM head too (default: kept)")
    group.add_argument("--embedding", choices=["fp8", "int8"], help="quantize the embeddings too (default: kept)")
    group.add_argument("--overrides", type=Path, metavar="FILE", help="TOML file, precision by name of the matrix")
    group.add_argument(
        "--size-budget",
        metavar="SIZE",
        help="bytes that all matrices and the LM head may take, such as 4.5GB: those whose error counts most get a "
        "higher precision than --precision",
    )
    group.add_argument(
        "--write-overrides",
        type=Path,
        metavar="FILE",
        help="write what --size-budget chose, as a file for --overrides to be edited and used again",
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="UTF-8 text; its activations decide how channels are scaled before rounding (int4: activation-aware, "
        "int8: balanced between weights and activations)",
    )
    group.add_argument(
        "--kv-cache",
        default="auto",
        choices=["auto", "fp8", "int8"],
        help="how keys and values are stored; on the cpu target they are rounded so and held as float32 (default: "
        "auto, as activations)",
    )
    group.add_argument(
        "--activations",
        default="float32",
        choices=["float32", "int8"],
        help="what quantized matrices are multiplied by; int8 is faster and less exact. cpu target: for int8 and int4. "
        "trtllm with --precision int8: SmoothQuant (W8A8), smoothed by the text of --calibrate (default: float32; on "
        "GPUs the dtype of the model)",
    )
    group.add_argument("--no-gate", action="store_true", help="do not compare with the checkpoint; it is recorded")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="threads that convert (default: all cores)")
    add_engine_arguments(parser)
    add_trtllm_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build, and print what was written."""
    from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
    from qwen_rt.sizes import parse_size

    quantize = QuantizeOptions(
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        lm_head=args.lm_head,
        embedding=args.embedding,
        overrides=args.overrides,
        size_budget=None if args.size_budget is None else parse_size(args.size_budget, "--size-budget"),
        write_overrides=args.write_overrides,
        calibrate=args.calibrate,
        kv_cache=None if args.kv_cache == "auto" else args.kv_cache,
        activations=args.activations,
    )
    engine = engine_options(args)
    if args.target == "trtllm":
        return run_trtllm(args, quantize)
    refuse_trtllm_arguments(args)
    options = BuildOptions(
        target=args.target,
        precision=args.precision,
        max_length=args.max_length,
        quantize=quantize,
        gate=not args.no_gate,
        num_workers=args.workers,
        self_contained=args.self_contained,
        engine=engine,
        overwrite=args.force,
        quiet=args.quiet,
    )
    with library_silenced(args):
        manifest = build(args.source, args.output, options)
    code = report(manifest, args.output)
    if args.target in ENGINE_TARGETS:
        report_card(args.output)
    return code
