"""Exact match of a nano bundle on the 1,000 held-out problems, beside transformers on the same checkpoint.

    python -m qwen_rt.benchmarks.bench_nano_accuracy

The bundle answers all problems greedily, in batches. transformers (float32) then reads every prompt with the bundle's
answer behind it: if its best token is the bundle's at every position, its own greedy answer is the same, token for
token. Where they differ, it generates its answer, and the boxed results are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.harness import new_run, versions, write_row
from qwen_rt.benchmarks.nano.heldout import HELDOUT_PATH, load
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION, boxed_answer
from qwen_rt.progress import track
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.outputs import RequestOutput

__all__ = ["answer_all", "main", "same_tokens"]

MAX_TOKENS = 400


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


def main() -> int:
    """Run, print a table, write a row; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Exact match of a nano bundle on the held-out problems.")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the bundle")
    parser.add_argument("--batch", type=int, default=32, help="problems at once (default: 32)")
    parser.add_argument("--limit", type=int, help="only the first N problems")
    parser.add_argument("--dry-run", action="store_true", help="write no result row")
    args = parser.parse_args()
    rows = load(HELDOUT_PATH)[: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        from qwen_rt.export.build import BuildOptions, build

        manifest = build("nano", Path(folder) / "bundle", BuildOptions(precision=args.precision, quiet=True))
        llm = LLM(Path(folder) / "bundle", max_num_seqs=args.batch)
        start = time.perf_counter()
        outputs = answer_all(llm, rows)
        elapsed_s = time.perf_counter() - start
        checkpoint = Path(manifest.checkpoint.path)
        same = same_tokens(checkpoint, outputs)
        same_answers = _same_answers(checkpoint, rows, outputs, same)
    right = [is_right(row, output.text) for row, output in zip(rows, outputs, strict=True)]
    kinds = sorted({row["kind"] for row in rows})
    metrics: dict[str, Any] = {
        f"exact_match_{kind}_ratio": _share([r for r, row in zip(right, rows, strict=True) if row["kind"] == kind])
        for kind in kinds
    }
    num_tokens = sum(len(output.token_ids) for output in outputs)
    metrics |= {
        "exact_match_ratio": _share(right),
        "same_answers_as_transformers_ratio": same_answers / len(rows),
        "same_tokens_as_transformers_ratio": _share(same),
        "throughput_tok_s": num_tokens / elapsed_s,
        "generate_s": elapsed_s,
    }
    for name, value in metrics.items():
        print(f"{name:<40} {value:10.4f}")
    passed = metrics["exact_match_ratio"] >= 0.95 and metrics["same_answers_as_transformers_ratio"] >= 0.995
    print("passed" if passed else "FAILED: exact match below 0.95 or agreement below 0.995")
    if passed and not args.dry_run:
        settings = {"model": "nano", "precision": manifest.precision, "batch": args.batch, "num_problems": len(rows)}
        write_row(
            "nano_accuracy",
            "qwen-rt",
            metrics,
            settings | {"compute_dtype": manifest.compute_dtype, "max_tokens": MAX_TOKENS, "decoding": "greedy"},
            check={"passed": True, "what": "exact match >= 0.95, same answers as transformers float32 >= 0.995"},
            run=new_run(),
            used=versions(),
        )
    return 0 if passed else 1


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


if __name__ == "__main__":
    sys.exit(main())
