"""Build the shipped nano checkpoint into a CPU bundle and let it solve a maths problem.

The whole way of a model in a few seconds: checkpoint, traced graph, lowering, bundle, tokens, answer. The nano model
is small but real: 8 million parameters, trained on synthetic school arithmetic, so its answer can be right or wrong
(and will be wrong for wordings that it has not learnt). Exits 1 if it is wrong.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qwen_rt.cli.generate import BOXED

HELP = "build the shipped nano model and let it solve a problem"
EPILOG = """\
example:
  qwen-rt demo
  qwen-rt demo --output /tmp/nano-cpu
"""

QUESTION = "Grace buys 23 cards at $6 each and pays with $200. How much change does Grace get?"
ANSWER = "62"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt demo`."""
    default = Path("demo/nano-cpu")
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, default=default, help=f"bundle to make or replace (default: {default})"
    )


def run(args: argparse.Namespace) -> int:
    """Build, ask, print; exit code 0 if the answer is right."""
    from qwen_rt.export.build import BuildOptions, build
    from qwen_rt.runtime.llm import LLM

    start = time.perf_counter()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"1. build   qwen-rt build nano -o {args.output}", flush=True)
    manifest = build("nano", args.output, BuildOptions(overwrite=True, quiet=True))
    spec = manifest.model
    print(
        f"   {spec.num_parameters / 1e6:.1f} M parameters, {spec.num_layers} layers, {manifest.precision} weights, "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )
    start = time.perf_counter()
    llm = LLM(args.output)
    print(f"2. load    {1e3 * (time.perf_counter() - start):.0f} ms", flush=True)
    print(f"3. ask     {QUESTION}\n", flush=True)
    pieces, num_tokens = [], 0
    start = time.perf_counter()
    for chunk in llm.stream([{"role": "user", "content": QUESTION + BOXED}]):
        pieces.append(chunk.text)
        num_tokens += 1
        print(chunk.text, end="", flush=True)
    elapsed_s = time.perf_counter() - start
    right = f"\\boxed{{{ANSWER}}}" in "".join(pieces)
    print(f"\n\n{num_tokens} tokens in {elapsed_s:.2f} s. The answer is {ANSWER}: {'right' if right else 'WRONG'}.")
    return 0 if right else 1
