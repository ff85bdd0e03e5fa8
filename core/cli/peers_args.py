"""Options of `qwen-rt bench peers`, and what they start."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rt.cli import bench

__all__ = ["TEXTS", "add_peers_arguments", "run_peers"]

TEXTS = (
    "qwen-rt, vLLM and ONNX Runtime GenAI on the same GPU in the same run",
    "Time our session and other engines at the same shapes, lengths and greedy settings: ms a token, time to the\n"
    "first token, ratio to the floor, and who is fastest. Each engine runs in a Python of its own, if it is installed\n"
    "there; one that is missing or fails is told in a line. Weights are random.",
    """\
example:
  qwen-rt bench peers 1.5b 7b --vllm-python ../vllm/bin/python --ort-genai-python ../genai/bin/python
  qwen-rt bench peers 7b --precision bf16 fp8 --rows 1 16 64 --prompts 128 6144 --peer vllm
""",
)
"""In the list of benchmarks, over the options, and under them."""

_PRECISIONS = ("bf16", "fp8", "int4")


def add_peers_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from qwen_rt.benchmarks.peers import PEERS

    models = ", ".join(bench.MODELS)
    parser.add_argument(
        "models", nargs="*", default=["1.5b", "7b"], metavar="MODEL", help=f"{models} (default: 1.5b 7b)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=list(PEERS),
        default=[],
        metavar="NAME",
        help=f"{' or '.join(PEERS)}, may be repeated; exits 1 if it is missing (default: all that are installed)",
    )
    for peer in PEERS.values():
        text = f"the Python that has {peer.package} (default: the one that runs this)"
        parser.add_argument(f"--{peer.name}-python", metavar="PATH", help=text)
    text = "rows that decode at once, at a prompt of 128 tokens (default: 1 16 64)"
    parser.add_argument("--rows", nargs="+", type=bench.rows_of, default=[1, 16, 64], metavar="N", help=text)
    text = "prompt lengths, with the fewest rows; and to the first token (default: 128 6144)"
    parser.add_argument("--prompts", nargs="+", type=bench.tokens_of, default=[128, 6144], metavar="N", help=text)
    text = "of the layers' matrices (default: bf16)"
    parser.add_argument("--precision", nargs="+", choices=_PRECISIONS, default=["bf16"], help=text)
    parser.add_argument("--layers", type=bench.tokens_of, metavar="N", help="fewer layers than the shape has")
    text = "tokens of a figure after the first (default: 128)"
    parser.add_argument("--steps", type=bench.tokens_of, default=128, metavar="N", help=text)
    text = "for one model in one peer, its start included (default: 900)"
    parser.add_argument("--timeout", type=bench.tokens_of, default=900, metavar="SECONDS", help=text)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="for what peers print (default: a temporary one)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    bench.add_output(parser, "latency")


def run_peers(args: argparse.Namespace, output: Path | None) -> int:
    """Time all contenders; `output` takes the rows."""
    from qwen_rt.benchmarks import bench_peers

    prompts = tuple(sorted(set(args.prompts)))
    return bench_peers.run(
        args.models,
        args.precision,
        bench_peers.Plan(tuple(sorted(set(args.rows))), prompts, prompts, args.steps),
        peers=args.peer,
        pythons={"vllm": args.vllm_python, "ort-genai": args.ort_genai_python},
        layers=args.layers,
        timeout_s=args.timeout,
        logs=args.logs,
        device=args.device,
        output=output,
        quiet=args.quiet,
    )
