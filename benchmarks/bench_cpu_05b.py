"""A model of Qwen2-0.5B's shapes on the CPU: qwen-rt, transformers and ONNX Runtime GenAI on the same random weights.

Every contender runs in a process of its own, a new one each round, one at a time, in turn: so load time and peak
memory are its own. In each process one generation warms up; its tokens are the reference check (all contenders that
compute in float32 must give those of transformers in float32; others report their agreement), the next one is timed.

    python -m qwen_rt.benchmarks.bench_cpu_05b --genai-python genai/bin/python

GenAI needs an environment of its own, since it brings its own ONNX Runtime:

    python -m venv genai
    genai/bin/pip install onnxruntime-genai torch transformers onnx onnx-ir
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.checkpoints import QWEN2_05B, write_random, write_tokenizer
from qwen_rt.benchmarks.cpu_contest import (
    GATE,
    NO_GATE,
    Bandwidth,
    Samples,
    add_common_arguments,
    agreement,
    decode_metrics,
    number_from,
    step_weights,
)
from qwen_rt.benchmarks.measure import Worker, package_python, run_child
from qwen_rt.errors import QwenRtError
from qwen_rt.spec import ModelSpec

NAME = "cpu_05b"
REFERENCE = "transformers fp32"


@dataclass
class Contender:
    """One way to run the checkpoint.

    Attributes:
        kind, python, options: How its worker is started.
        stored, compute: Precision of the weights on disk and of the arithmetic.
        bytes_per_weight: As a decode step reads them.
        gated: Whether its tokens must be those of the reference.
        build: The command that makes its model from the checkpoint; empty if it loads the checkpoint.
    """

    kind: str
    options: dict[str, Any]
    stored: str
    compute: str
    bytes_per_weight: float
    gated: bool
    python: str = sys.executable
    build: list[str] = field(default_factory=list)


def contenders(checkpoint: Path, folder: Path, genai: str | None, max_length: int) -> dict[str, Contender]:
    """List the contenders, ours first; those of GenAI only if its Python is given."""

    def ours(precision: str) -> Contender:
        out = str(folder / f"qwen-rt-{precision}")
        arguments = ["-m", "qwen_rt", "build", str(checkpoint), "-o", out, "--precision", precision, "--quiet"]
        command = package_python(*arguments, "--max-length", str(max_length))
        return Contender("qwen-rt", {"model": out}, precision, "fp32", 4, True, build=command)

    def peer(precision: str, stored: str, compute: str, bytes_per_weight: float, gated: bool) -> Contender:
        assert genai is not None
        out = str(folder / f"genai-{precision}")
        command = [genai, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", out]
        command += ["-p", precision, "-e", "cpu", "-c", str(folder / "genai-cache")]
        return Contender("genai", {"model": out}, stored, compute, bytes_per_weight, gated, genai, command)

    def torch(dtype: str, name: str, bytes_per_weight: float) -> Contender:
        options = {"model": str(checkpoint), "dtype": dtype}
        return Contender("transformers", options, "bf16", name, bytes_per_weight, name == "fp32")

    found = {
        "qwen-rt, bf16 stored": ours("bf16"),
        "qwen-rt, fp32 stored": ours("fp32"),
        REFERENCE: torch("float32", "fp32", 4),
        "transformers bf16": torch("bfloat16", "bf16", 2),
    }
    if genai:
        found["ORT GenAI fp32"] = peer("fp32", "fp32", "fp32", 4, True)
        # 4 bits and a float32 scale for each 32 weights.
        found["ORT GenAI int4"] = peer("int4", "int4, round to nearest, block 32", "int8 products", 0.625, False)
    return found


def _why_not(genai: str) -> str:
    """Why GenAI cannot take part; empty if it can."""
    command = [genai, "-c", "import onnxruntime_genai, torch, transformers"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class Trial:
    """What one contender gave, over all rounds."""

    def __init__(self, build: dict[str, float]) -> None:
        self.samples = Samples()
        self.build = build
        self.load_s: list[float] = []
        self.loaded_peak_gb: list[float] = []
        self.peak_gb: list[float] = []
        self.anon_gb: list[float] = []
        self.tokens: list[list[int]] = []
        self.versions: dict[str, str] = {}

    def round(self, contender: Contender, prompt: list[int], num_tokens: int, threads: int) -> None:
        """Load, warm up, time, look at the memory, end."""
        with Worker(contender.python, contender.kind, contender.options | {"threads": threads}) as worker:
            self.load_s.append(worker.loaded["load_s"])
            self.loaded_peak_gb.append(worker.loaded["peak_rss_mb"] / 1e3)
            warm = worker.ask("generate", prompts=[prompt], num_tokens=num_tokens)
            answer = worker.ask("generate", prompts=[prompt], num_tokens=num_tokens)
            if warm["tokens"] != answer["tokens"] or (self.tokens and self.tokens != answer["tokens"]):
                raise QwenRtError(f"{contender.kind}: two greedy generations differ", fix="no number then")
            self.tokens, self.versions = answer["tokens"], worker.loaded["versions"]
            self.samples.add(answer)
            memory = worker.ask("memory")
            self.peak_gb.append(memory["peak_rss_mb"] / 1e3)
            self.anon_gb.append(memory["anon_mb"] / 1e3)

    def line(self) -> str:
        """How it does so far, for a person."""
        step_ms, first_s = 1e3 * harness.percentile(self.samples.step_s, 0.5), self.samples.first_s[-1]
        spent = f"{step_ms:.1f} ms a token, first after {first_s:.2f} s, load {self.load_s[-1]:.2f} s"
        return f"{spent}, peak {self.peak_gb[-1]:.2f} GB"

    def metrics(self, floor_ms: float) -> dict[str, Any]:
        """The numbers of its row."""
        found = decode_metrics(self.samples, 1, floor_ms)
        found["load_s"] = harness.summarize(self.load_s)
        found["peak_rss_gb"] = harness.summarize(self.peak_gb)
        found["load_peak_rss_gb"] = harness.summarize(self.loaded_peak_gb)
        found["running_anonymous_gb"] = harness.summarize(self.anon_gb)
        return found | self.build


def _build(name: str, contender: Contender) -> dict[str, float]:
    """Make the contender's model; returns what that cost."""
    if not contender.build:
        return {}
    env = None if contender.python == sys.executable else {"PYTHONPATH": ""}
    child = run_child(contender.build, env).require(f"{name}: building its model")
    print(f"{name}: built in {child.wall_s:.1f} s with {child.peak_rss_bytes / 1e9:.2f} GB", flush=True)
    return {"build_s": child.wall_s, "build_peak_rss_gb": child.peak_rss_bytes / 1e9}


def run(args: argparse.Namespace, folder: Path) -> None:
    """Make the checkpoint and all models, time them in turn, write a row each."""
    started = harness.new_run()
    genai = str(args.genai_python.absolute()) if args.genai_python else None
    reason = _why_not(genai) if genai else "no --genai-python"
    if reason:
        print(f"skipped: ORT GenAI: {reason}")
        genai = None
    checkpoint = folder / "Qwen2-0.5B-shape"
    checkpoint.mkdir()
    write_random(checkpoint, QWEN2_05B, seed=0)
    write_tokenizer(checkpoint, QWEN2_05B["vocab_size"])
    prompt = np.random.default_rng(1).integers(0, 151643, args.prompt_tokens).tolist()
    field_of = contenders(checkpoint, folder, genai, 2 * (args.prompt_tokens + args.tokens))
    trials = {name: Trial(_build(name, contender)) for name, contender in field_of.items()}
    num_weights = step_weights(ModelSpec.from_config(QWEN2_05B))
    meter = Bandwidth(4 * num_weights, args.threads)
    for index in range(args.rounds):
        meter.measure()
        for name in list(field_of)[:: 1 if index % 2 == 0 else -1]:
            trials[name].round(field_of[name], prompt, args.tokens, args.threads)
            print(f"round {index + 1}: {name}: {trials[name].line()}", flush=True)
    checks = {name: _check(name, field_of[name], trials) for name in trials}
    for name, trial in trials.items():
        contender = field_of[name]
        weight_bytes = contender.bytes_per_weight * num_weights
        settings = {
            "model": "Qwen2-0.5B shapes, random weights",
            "batch": 1,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.tokens,
            "threads": args.threads,
            "precision": f"stored {contender.stored}; computed {contender.compute}",
        }
        floor_ms = weight_bytes / meter.memory_gb_s / 1e6
        metrics = trial.metrics(floor_ms) | {"weights_gb": weight_bytes / 1e9} | meter.metrics()
        mine = contender.python == sys.executable
        used = (harness.versions() if mine else {}) | trial.versions
        harness.write_row(
            NAME, name, metrics, settings, check=checks[name], run=started, used=used, folder=args.results
        )


def _check(name: str, contender: Contender, trials: dict[str, Trial]) -> dict[str, Any]:
    """Compare a contender's tokens with those of the reference.

    Raises:
        QwenRtError: It computes in float32, and its tokens differ.
    """
    expected = trials[REFERENCE].tokens
    found = agreement(expected, trials[name].tokens) | {"num_distinct": len(set(expected[0]))}
    passed = not contender.gated or found["num_same"] == found["num_tokens"]
    print(f"check: {name} gives {found['num_same']} of {found['num_tokens']} tokens of {REFERENCE}")
    if not passed:
        raise QwenRtError(f"{name}: greedy tokens differ from {REFERENCE}", fix="no number then")
    return {"passed": passed, "what": GATE if contender.gated else NO_GATE} | found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="A model of Qwen2-0.5B's shapes on the CPU, beside its peers.")
    parser.add_argument("--genai-python", type=Path, help="Python of an environment with onnxruntime-genai")
    parser.add_argument("--prompt-tokens", type=number_from(1), default=128, help="length of the prompt (default: 128)")
    add_common_arguments(parser, rounds=5, tokens=32)
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
