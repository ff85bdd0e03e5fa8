"""Exact match on the held-out problems by batched greedy generation with transformers.

The reference for every other way to run the checkpoint: fp32 arithmetic on the stored bf16 weights.

Command line: ``python -m qwen_rt.benchmarks.nano.evaluate core/nano --output outputs.jsonl``.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .base import KINDS
from .heldout import HELDOUT_PATH, load
from .model import is_quantizable, round_int4
from .prompts import INSTRUCTION, boxed_answer


@dataclass(frozen=True)
class Outcome:
    """One problem's result.

    Attributes:
        row: the held-out problem.
        output: the generated text.
        output_ids: the generated tokens, with the end token if there was one.
        correct: whether the boxed answer is the expected one.
    """

    row: dict[str, str]
    output: str
    output_ids: list[int]
    correct: bool


def messages(question: str) -> list[dict[str, str]]:
    """Return the chat of one question in the Qwen2-Math instruct format."""
    return [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], batch_size: int = 250, max_new_tokens: int = 400
) -> Iterator[Outcome]:
    """Answer problems greedily.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        rows: problems with ``question`` and ``answer``.
        batch_size: how many are generated at once, left-padded.
        max_new_tokens: after this many tokens an answer is cut off.

    Yields:
        The outcomes, in the order of ``rows``.
    """
    tokenizer.padding_side = "left"
    ends = model.generation_config.eos_token_id
    for low in range(0, len(rows), batch_size):
        batch = rows[low : low + batch_size]
        prompts = [
            tokenizer.apply_chat_template(messages(row["question"]), tokenize=False, add_generation_prompt=True)
            for row in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        outputs = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for row, ids in zip(batch, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))
            text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
            yield Outcome(row, text, ids[:stop], boxed_answer(text) == "".join(row["answer"].split()))


def table(outcomes: list[Outcome]) -> str:
    """Return exact match by kind as a Markdown table."""
    lines = ["| kind | problems | right | exact match |", "|---|---|---|---|"]
    for kind in (*KINDS, "all"):
        chosen = [outcome for outcome in outcomes if kind in ("all", outcome.row["kind"])]
        if chosen:
            right = sum(outcome.correct for outcome in chosen)
            lines.append(f"| {kind} | {len(chosen)} | {right} | {100 * right / len(chosen):.1f} % |")
    return "\n".join(lines)


def write_outputs(outcomes: list[Outcome], path: Path) -> None:
    """Write one JSON object a line: id, kind, answer, found, correct, output, output_ids."""
    with path.open("w", encoding="utf-8") as file:
        for outcome in outcomes:
            row: dict[str, Any] = {key: outcome.row[key] for key in ("id", "kind", "answer")}
            row |= {"found": boxed_answer(outcome.output), "correct": outcome.correct}
            row |= {"output": outcome.output, "output_ids": outcome.output_ids}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_model(checkpoint_dir: Path, device: str, *, int4: bool = False) -> Any:
    """Load a checkpoint in fp32; with ``int4`` its linear layers are rounded to int4 in groups of 128."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    model = model.to(device).eval()
    if int4:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_quantizable(name):
                    parameter.copy_(round_int4(parameter))
    return model


def evaluate(checkpoint_dir: Path, rows: list[dict[str, str]], device: str, *, int4: bool = False) -> list[Outcome]:
    """Load a checkpoint and answer all problems."""
    model = load_model(checkpoint_dir, device, int4=int4)
    return list(generate(model, AutoTokenizer.from_pretrained(checkpoint_dir), rows))


def main() -> None:
    """Evaluate a checkpoint and print exact match by kind."""
    parser = argparse.ArgumentParser(description="Exact match of a checkpoint on the held-out problems.")
    parser.add_argument("checkpoint_dir", type=Path, help="folder in the Hugging Face layout")
    parser.add_argument("--problems", type=Path, default=HELDOUT_PATH, help="problems to answer (default: held-out)")
    parser.add_argument("--limit", type=int, default=None, help="answer only the first N problems")
    parser.add_argument("--output", type=Path, default=None, help="write every output to this JSONL file")
    parser.add_argument("--int4", action="store_true", help="round the linear layers to int4, groups of 128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    rows = load(arguments.problems)[: arguments.limit]
    outcomes = evaluate(arguments.checkpoint_dir, rows, arguments.device, int4=arguments.int4)
    if arguments.output:
        write_outputs(outcomes, arguments.output)
    print(table(outcomes))
    num_tokens = sum(len(outcome.output_ids) for outcome in outcomes)
    print(f"{num_tokens} tokens in {time.perf_counter() - started_s:.1f} s on {arguments.device}")


if __name__ == "__main__":
    main()
