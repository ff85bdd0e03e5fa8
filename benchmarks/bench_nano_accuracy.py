"""Exact match of a nano bundle on the 1,000 held-out problems, beside another implementation of the same checkpoint.

    python -m qwen_rt.benchmarks.bench_nano_accuracy
    python -m qwen_rt.benchmarks.bench_nano_accuracy --target cuda

The bundle answers all problems greedily, in batches. transformers (float32) then reads every prompt with the bundle's
answer behind it: if its best token is the bundle's at every position, its own greedy answer is the same, token for
token. Where they differ, it generates its answer, and the boxed results are compared. A bundle of target cuda is
compared with the answers of the CPU bundle instead, and needs no transformers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.harness import new_run, versions, write_row
from qwen_rt.benchmarks.nano.heldout import HELDOUT_PATH, load
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION, boxed_answer
from qwen_rt.bundle import Manifest
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.machine import Started, gpu_probe_command, read_gpus
from qwen_rt.ops import MAX_ROWS
from qwen_rt.progress import track
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.outputs import RequestOutput

__all__ = ["agreement", "answer_all", "describe_gpu", "exact_match", "main", "same_tokens"]

MAX_TOKENS = 400

MIN_EXACT_MATCH = 0.95
MIN_SAME_AS_TRANSFORMERS = 0.995
MIN_SAME_AS_CPU = 0.98
"""Lower than beside transformers: the CUDA bundle rounds activations to bf16, so near ties fall the other way."""


@dataclass(frozen=True)
class Measured:
    """What a run found: metrics, the least that some of them must reach, and what was measured."""

    benchmark: str
    manifest: Manifest
    batch: int
    metrics: Mapping[str, float]
    bars: Mapping[str, float]
    gpu: Mapping[str, Any] | None = None

    def write(self, num_problems: int) -> None:
        """Append the row of a run that reached its bars."""
        settings = {
            "model": "nano",
            "precision": self.manifest.precision,
            "batch": self.batch,
            "num_problems": num_problems,
            "compute_dtype": self.manifest.compute_dtype,
            "max_tokens": MAX_TOKENS,
            "decoding": "greedy",
        }
        what = ", ".join(f"{name} >= {least}" for name, least in self.bars.items())
        write_row(
            self.benchmark,
            "qwen-rt",
            self.metrics,
            settings,
            check={"passed": True, "what": what},
            run=new_run(),
            used=versions("onnxruntime-gpu") if self.gpu else versions(),
            gpu=self.gpu,
        )


def answer_all(llm: LLM, rows: Sequence[dict[str, str]]) -> list[RequestOutput]:
    """Answer problems greedily in the Qwen2-Math instruct format."""
    prompts = [llm.encode_chat([{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}]) for row in rows]
    return llm.generate(prompts, temperature=0.0, max_tokens=MAX_TOKENS)


def is_right(row: dict[str, str], text: str) -> bool:
    """Whether the last boxed answer of a text is the problem's."""
    return boxed_answer(text) == "".join(row["answer"].split())


def same_tokens(
    folder: Path, outputs: Sequence[RequestOutput], batch_size: int = 32, quiet: bool = False
) -> list[bool]:
    """Whether transformers' greedy decoding would give the same tokens, for each output.

    Args:
        folder: The checkpoint.
        outputs: Prompts and greedy answers.
        batch_size: Texts that transformers reads at once, right-padded.
        quiet: No progress.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    order = sorted(range(len(outputs)), key=lambda i: len(outputs[i].prompt_token_ids) + len(outputs[i].token_ids))
    same = [False] * len(outputs)
    starts = range(0, len(order), batch_size)
    for start in track(starts, "transformers reads the answers", quiet=quiet):
        batch = order[start : start + batch_size]
        texts = [[*outputs[i].prompt_token_ids, *outputs[i].token_ids] for i in batch]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        with torch.inference_mode():
            best = model(ids, attention_mask=mask).logits.argmax(-1).tolist()
        for row, index in enumerate(batch):
            first = len(outputs[index].prompt_token_ids)
            same[index] = best[row][first - 1 : len(texts[row]) - 1] == list(outputs[index].token_ids)
    return same


def _same_answers(
    folder: Path, rows: Sequence[dict[str, str]], outputs: Sequence[RequestOutput], same: Sequence[bool]
) -> int:
    """How many boxed answers are those of transformers, which generates only where a token differs."""
    differing = [index for index, equal in enumerate(same) if not equal]
    if not differing:
        return len(rows)
    from qwen_rt.benchmarks.nano.evaluate import evaluate

    theirs = evaluate(folder, [rows[index] for index in differing], "cpu")
    equal = sum(
        boxed_answer(outputs[index].text) == boxed_answer(outcome.output)
        for index, outcome in zip(differing, theirs, strict=True)
    )
    return len(rows) - len(differing) + equal


def describe_gpu(device: int) -> dict[str, Any]:
    """Describe the GPU as its driver does, and as the CUDA runtime counts it."""
    found = read_gpus(Started(gpu_probe_command()))
    if not 0 <= device < len(found.gpus):
        raise UsageError(f"device={device}", f"one of {len(found.gpus)} GPUs", found.reason or "")
    gpu = found.gpus[device]
    return {
        "name": gpu.name,
        "memory_gb": round(gpu.memory_bytes / 1e9, 1),
        "compute_capability": gpu.compute_capability,
        "driver": found.driver,
        "cuda": found.cuda,
    }


def exact_match(rows: Sequence[dict[str, str]], outputs: Sequence[RequestOutput]) -> dict[str, float]:
    """Return the share of right answers, in all and for each kind of problem, as metrics."""
    right = [is_right(row, output.text) for row, output in zip(rows, outputs, strict=True)]
    shares = {
        f"exact_match_{kind}_ratio": _share([r for r, row in zip(right, rows, strict=True) if row["kind"] == kind])
        for kind in sorted({row["kind"] for row in rows})
    }
    return shares | {"exact_match_ratio": _share(right)}


def agreement(ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]) -> dict[str, float]:
    """Compare greedy answers to the same prompts token by token.

    Returns:
        `same_answers_as_cpu_ratio`: share of equal boxed answers; `same_tokens_as_cpu_ratio`: share of answers that
        are equal in every token; `tokens_before_difference_ratio`: tokens before the first that differs, of all.
    """
    pairs = list(zip(ours, theirs, strict=True))
    before = sum(
        next(
            (i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y),
            min(len(a.token_ids), len(b.token_ids)),
        )
        for a, b in pairs
    )
    return {
        "same_answers_as_cpu_ratio": _share([boxed_answer(a.text) == boxed_answer(b.text) for a, b in pairs]),
        "same_tokens_as_cpu_ratio": _share([a.token_ids == b.token_ids for a, b in pairs]),
        "tokens_before_difference_ratio": before / sum(max(len(a.token_ids), len(b.token_ids)) for a, b in pairs),
    }


def _timed(llm: LLM, rows: Sequence[dict[str, str]]) -> tuple[list[RequestOutput], dict[str, float]]:
    start = time.perf_counter()
    outputs = answer_all(llm, rows)
    elapsed_s = time.perf_counter() - start
    num_tokens = sum(len(output.token_ids) for output in outputs)
    return outputs, {"throughput_tok_s": num_tokens / elapsed_s, "generate_s": elapsed_s}


def _run_cpu(rows: Sequence[dict[str, str]], args: argparse.Namespace, folder: Path) -> Measured:
    """The CPU bundle beside transformers."""
    manifest = build("nano", folder / "cpu", BuildOptions(precision=args.precision, quiet=True))
    with LLM(folder / "cpu", max_num_seqs=args.batch or 32) as llm:
        outputs, timing = _timed(llm, rows)
    checkpoint = Path(manifest.checkpoint.path)
    same = same_tokens(checkpoint, outputs)
    metrics = exact_match(rows, outputs) | {
        "same_answers_as_transformers_ratio": _same_answers(checkpoint, rows, outputs, same) / len(rows),
        "same_tokens_as_transformers_ratio": _share(same),
    }
    bars = {"exact_match_ratio": MIN_EXACT_MATCH, "same_answers_as_transformers_ratio": MIN_SAME_AS_TRANSFORMERS}
    return Measured("nano_accuracy", manifest, args.batch or 32, metrics | timing, bars)


def _run_cuda(rows: Sequence[dict[str, str]], args: argparse.Namespace, folder: Path) -> Measured:
    """The CUDA bundle beside the CPU bundle; transformers is not needed."""
    gpu = describe_gpu(args.device)
    build("nano", folder / "portable", BuildOptions(target="portable", quiet=True))
    build(folder / "portable", folder / "cpu", BuildOptions(quiet=True))
    manifest = build(
        folder / "portable", folder / "cuda", BuildOptions(target="cuda", precision=args.precision, quiet=True)
    )
    batch = args.batch or MAX_ROWS
    with LLM(folder / "cuda", max_num_seqs=batch, device=args.device, kv_memory=args.kv_memory) as llm:
        answer_all(llm, rows[:batch])  # what is made at the first use is not timed
        outputs, timing = _timed(llm, rows)
    with LLM(folder / "cpu") as llm:
        expected = answer_all(llm, rows)
    metrics = exact_match(rows, outputs) | agreement(outputs, expected)
    bars = {"exact_match_ratio": MIN_EXACT_MATCH, "same_answers_as_cpu_ratio": MIN_SAME_AS_CPU}
    return Measured("nano_accuracy_cuda", manifest, batch, metrics | timing, bars, gpu)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table, write a row; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Exact match of a nano bundle on the held-out problems.")
    parser.add_argument("--target", default="cpu", choices=["cpu", "cuda"], help="of the bundle (default: cpu)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the bundle")
    parser.add_argument("--batch", type=int, help="problems at once (default: 32; target cuda: 64)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="target cuda: which GPU (default: 0)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="target cuda: memory of the KV cache, such as 8GiB")
    parser.add_argument("--limit", type=int, help="only the first N problems")
    parser.add_argument("--dry-run", action="store_true", help="write no result row")
    args = parser.parse_args(argv)
    rows = load(HELDOUT_PATH)[: args.limit]
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = (_run_cuda if args.target == "cuda" else _run_cpu)(rows, args, Path(folder))
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in measured.metrics.items():
        print(f"{name:<40} {value:10.4f}")
    missed = [f"{name} below {least}" for name, least in measured.bars.items() if measured.metrics[name] < least]
    print(f"FAILED: {', '.join(missed)}" if missed else "passed")
    if not missed and not args.dry_run:
        measured.write(len(rows))
    return 1 if missed else 0


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


if __name__ == "__main__":
    sys.exit(main())
