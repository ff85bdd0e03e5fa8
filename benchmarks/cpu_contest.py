"""What the CPU benchmarks share: the floor of a step, agreement of tokens, timing rounds in turn, a row's numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.measure import Worker, num_cores, read_bandwidth
from qwen_rt.spec import ModelSpec

__all__ = [
    "GATE",
    "NO_GATE",
    "Bandwidth",
    "Samples",
    "add_common_arguments",
    "agreement",
    "decode_metrics",
    "number_from",
    "sample",
    "step_weights",
]

GATE = "greedy tokens equal those of transformers in float32"
NO_GATE = "agreement is reported, not gated"


def step_weights(spec: ModelSpec) -> int:
    """Return how many weights a decode step reads: every matrix, the LM head, but of the embedding only a row."""
    matrices = {name: shape for name, shape in spec.parameters().items() if len(shape) == 2}
    if not spec.tie_word_embeddings:
        del matrices["model.embed_tokens.weight"]
    return sum(rows * columns for rows, columns in matrices.values())


def agreement(expected: Sequence[Sequence[int]], actual: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compare generated tokens row by row; after a first difference the rest of a row counts as different."""
    same = 0
    for want, got in zip(expected, actual, strict=True):
        pairs = zip(want, got, strict=True)
        same += next((index for index, (a, b) in enumerate(pairs) if a != b), len(want))
    total = sum(map(len, expected))
    return {"num_tokens": total, "num_same": same, "share_same": round(same / total, 4)}


class Samples:
    """Seconds of one contender at one batch size: to the first token of each round, and of every later step."""

    def __init__(self) -> None:
        self.first_s: list[float] = []
        self.step_s: list[float] = []

    def add(self, answer: dict[str, Any]) -> None:
        """Take the timing of a round."""
        self.first_s.append(answer["first_s"])
        self.step_s += answer["step_s"]


def sample(
    workers: Mapping[str, Worker],
    prompts: Mapping[int, Sequence[Sequence[int]]],
    num_tokens: int,
    rounds: int,
    bandwidth: Sequence[Bandwidth] = (),
    report: Callable[[str], object] = print,
) -> dict[tuple[str, int], Samples]:
    """Time all contenders in turn, round after round: what disturbs the machine disturbs all of them.

    Args:
        workers: Contender → its process, loaded and warm.
        prompts: Batch size → prompts.
        num_tokens: Tokens to generate.
        rounds: How often each has its turn; even rounds go backwards.
        bandwidth: Measured before each round.
        report: Told once a round.

    Returns:
        (contender, batch size) → its samples.
    """
    found = {(name, batch): Samples() for name in workers for batch in prompts}
    for index in range(rounds):
        names = list(workers) if index % 2 == 0 else list(workers)[::-1]
        for meter in bandwidth:
            meter.measure()
        for batch, rows in prompts.items():
            for name in names:
                answer = workers[name].ask("generate", prompts=rows, num_tokens=num_tokens)
                found[name, batch].add(answer)
        medians = (f"{n} x{b} {1e3 * harness.percentile(s.step_s, 0.5):.2f}" for (n, b), s in found.items())
        report(f"round {index + 1} of {rounds}, median ms a step so far: {', '.join(medians)}")
    return found


def decode_metrics(samples: Samples, batch: int, floor_ms: float) -> dict[str, Any]:
    """Return the numbers of a row: time per step, tokens a second, time to the first token, ratio to the floor."""
    step = harness.summarize(1e3 * s for s in samples.step_s)
    return {
        "itl_ms": step,
        "decode_tok_s": batch * 1e3 / step["median"],
        "first_token_ms": harness.summarize(1e3 * s for s in samples.first_s),
        "floor_ms": floor_ms,
        "itl_floor_ratio": step["median"] / floor_ms,
    }


class Bandwidth:
    """How fast memory was read during a run: measured again each round, the best counts.

    Two rates: of buffers far larger than any cache, and of as many bytes as the weights of this model, again and again.
    The second is the floor of a decode step: a model that fits the cache is not read from memory each time.

    Args:
        weight_bytes: Bytes that a step reads.
        threads: As many as the contenders have.
    """

    def __init__(self, weight_bytes: int, threads: int) -> None:
        self._weight_bytes, self._threads = weight_bytes, threads
        self.memory_gb_s = self.weight_gb_s = 0.0

    def measure(self) -> None:
        """Measure both once more; takes about two seconds."""
        self.memory_gb_s = max(self.memory_gb_s, read_bandwidth(threads=self._threads, seconds=0.2)["gb_s"])
        again = read_bandwidth(self._weight_bytes, threads=self._threads, seconds=0.2)["gb_s"]
        self.weight_gb_s = max(self.weight_gb_s, again)

    def metrics(self) -> dict[str, float]:
        """The numbers of a row."""
        return {"memory_bandwidth_gb_s": self.memory_gb_s, "weight_bandwidth_gb_s": self.weight_gb_s}


def number_from(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a type of options: whole numbers from `low` to `high`; others end the command with a line."""

    def read(text: str) -> int:
        if text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high):
            return int(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number from {low} {'on' if high is None else f'to {high}'}"
        )

    return read


def add_common_arguments(parser: argparse.ArgumentParser, *, rounds: int, tokens: int) -> None:
    """Declare the options that all have."""
    parser.add_argument("--rounds", type=number_from(1), default=rounds, help="timing rounds (default: %(default)s)")
    # Ours are timed from the end of one decode step to that of the next: two steps follow the first token.
    parser.add_argument(
        "--tokens", type=number_from(3), default=tokens, help="tokens to generate, 3 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=number_from(1), default=num_cores(), help="threads of each (default: all cores)"
    )
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
