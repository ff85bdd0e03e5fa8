"""Decoding on the CPU: the nano checkpoint as a bundle beside transformers' `generate`, on the same cores, in turn.

Every contender has a process of its own with the same number of threads. All continue the same prompts greedily by the
same number of tokens (end tokens do not end anything), and take turns round after round. Before the timing, the tokens
of the bundle must be those of transformers in float32, all of them; bfloat16 rounds differently, so its agreement is
reported and gates nothing.

    python -m qwen_rt.benchmarks.bench_cpu_decode
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.cpu_contest import (
    GATE,
    NO_GATE,
    Bandwidth,
    add_common_arguments,
    agreement,
    decode_metrics,
    number_from,
    sample,
    step_weights,
)
from qwen_rt.benchmarks.measure import Worker
from qwen_rt.benchmarks.nano.heldout import NUM_HELDOUT, load
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.runtime.chat_template import ChatTemplate
from qwen_rt.runtime.tokenizer import Tokenizer

NAME = "cpu_decode"
OURS, REFERENCE, HALF = "qwen-rt", "transformers fp32", "transformers bf16"
COMPUTE_BYTES = {OURS: 4, REFERENCE: 4, HALF: 2}
PRECISION = {
    OURS: "weights stored bf16, computed fp32",
    REFERENCE: "weights held fp32, computed fp32",
    HALF: "weights held bf16, computed bf16",
}


def nano_prompts(folder: Path, count: int) -> list[list[int]]:
    """Return the first held-out questions as prompts of the checkpoint in `folder`."""
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_tokenizer(tokenizer)
    return [
        template.encode(tokenizer, [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}])
        for row in load()[:count]
    ]


def run(args: argparse.Namespace, folder: Path) -> None:
    """Build the bundle, check, time, and write one row per contender and batch size."""
    started = harness.new_run()
    manifest = build("nano", folder / "nano-cpu", BuildOptions(quiet=True))
    checkpoint = Path(manifest.checkpoint.path)
    spec = Checkpoint.open(checkpoint).spec
    prompts = {batch: nano_prompts(checkpoint, batch) for batch in args.batch}
    num_weights = step_weights(spec)
    with contextlib.ExitStack() as stack:

        def start(kind: str, **options: Any) -> Worker:
            return stack.enter_context(Worker(sys.executable, kind, options | {"threads": args.threads}))

        workers = {
            OURS: start("qwen-rt", model=str(folder / "nano-cpu")),
            REFERENCE: start("transformers", model=str(checkpoint), dtype="float32"),
            HALF: start("transformers", model=str(checkpoint), dtype="bfloat16"),
        }
        checks = _check(workers, prompts, args.tokens)
        meters = {size: Bandwidth(size * num_weights, args.threads) for size in (2, 4)}
        found = sample(workers, prompts, args.tokens, args.rounds, list(meters.values()))
        used = {name: harness.versions() | worker.loaded["versions"] for name, worker in workers.items()}
    for (name, batch), samples in found.items():
        weight_bytes = COMPUTE_BYTES[name] * num_weights
        meter = meters[COMPUTE_BYTES[name]]
        floor_ms = weight_bytes / meter.weight_gb_s / 1e6
        settings = {
            "model": f"nano, {sum(map(math.prod, spec.parameters().values())) / 1e6:.1f} M parameters",
            "batch": batch,
            "prompt_tokens": [len(prompt) for prompt in prompts[batch]],
            "new_tokens": args.tokens,
            "threads": args.threads,
            "precision": PRECISION[name],
        }
        metrics = decode_metrics(samples, batch, floor_ms) | {"weights_mb": weight_bytes / 1e6} | meter.metrics()
        harness.write_row(
            NAME, name, metrics, settings, check=checks[name, batch], run=started, used=used[name], folder=args.results
        )


def _check(
    workers: dict[str, Worker], prompts: dict[int, list[list[int]]], num_tokens: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """Generate once with every contender, which also warms it up, and compare with transformers in float32.

    Raises:
        QwenRtError: The bundle's tokens are others.
    """
    checks = {}
    for batch, rows in prompts.items():
        tokens = {
            name: worker.ask("generate", prompts=rows, num_tokens=num_tokens)["tokens"]
            for name, worker in workers.items()
        }
        for name in workers:
            found = agreement(tokens[REFERENCE], tokens[name])
            gated = name != HALF
            passed = found["num_same"] == found["num_tokens"] or not gated
            checks[name, batch] = {"passed": passed, "what": GATE if gated else NO_GATE} | found
            print(f"check, batch {batch}: {name} gives {found['num_same']} of {found['num_tokens']} tokens")
            if not passed:
                raise QwenRtError(f"{name}, batch {batch}: other greedy tokens than {REFERENCE}", fix="no number then")
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Decoding of the nano checkpoint beside transformers, on the CPU.")
    parser.add_argument(
        "--batch", type=number_from(1, NUM_HELDOUT), nargs="+", default=[1, 8], help="batch sizes (default: 1 8)"
    )
    add_common_arguments(parser, rounds=7, tokens=128)
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            run(args, Path(folder))
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
