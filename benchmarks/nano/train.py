"""Trains the nano checkpoint from scratch on synthetic problems and writes it in the Hugging Face layout.

A few minutes on one data-centre GPU. Command line, from an install of the package:

    python -m qwen_rt.benchmarks.nano.train --output core/nano --minutes 4.5

``--steps`` instead of ``--minutes`` makes the schedule independent of the machine's speed.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from .base import KINDS
from .data import Encoder, Loader, MicroBatch, token_id
from .evaluate import evaluate, table, write_outputs
from .heldout import excluded_questions, load
from .model import Shape, build_model, save_checkpoint
from .optimise import MasterWeights, learning_rate, loss_sum, target_logits
from .problems import distinct
from .prompts import ENDOFTEXT, IM_END, instruct_prompt
from .report import model_card
from .tokenizer import save_tokenizer, train_tokenizer

VALIDATION_SEED, NUM_VALIDATION = 99, 500
NUM_WARM_UP_STEPS = 3


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        num_steps: optimizer steps done.
        num_tokens: tokens seen, padding not counted.
        num_problems: problems seen.
        elapsed_s: seconds of training.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_problems: int = 0
    elapsed_s: float = 0.0

    def fraction(self, minutes: float | None, max_steps: int | None) -> float:
        """Return how much of the run is done, 0..1, by whichever limit is nearer."""
        by_time = self.elapsed_s / (60 * minutes) if minutes else 0.0
        by_steps = self.num_steps / max_steps if max_steps else 0.0
        return max(by_time, by_steps)


def validation_batches(encoder: Encoder) -> dict[str, MicroBatch]:
    """Return one batch a kind of fresh problems: neither held out nor likely to be trained on."""
    problems = distinct(VALIDATION_SEED, NUM_VALIDATION, excluded_questions())
    return {
        kind: encoder.micro_batch(
            [instruct_prompt(item.question) + item.solution + IM_END for item in problems if item.kind == kind]
        )
        for kind in KINDS
    }


@torch.no_grad()
def all_tokens_right(model: Qwen2ForCausalLM, batches: dict[str, MicroBatch]) -> dict[str, float]:
    """Return by kind the share of solutions whose every token is the model's first choice.

    This is the share greedy decoding would reproduce word for word, at the cost of one forward pass.
    """
    shares = {}
    for kind, batch in batches.items():
        with torch.compiler.set_stance("force_eager"):  # one batch a kind is not worth a compilation
            logits, targets = target_logits(model, batch)
        wrong = (logits.argmax(-1) != targets).cpu()
        rows = torch.from_numpy(batch.positions // batch.input_ids.shape[1])
        bad = torch.zeros(len(batch.input_ids), dtype=torch.bool)
        bad[rows[wrong]] = True
        shares[kind] = 1 - bad.float().mean().item()
    return shares


def warm_up(model: Qwen2ForCausalLM, loader: Loader) -> None:
    """Compile the decoder layers (one compilation serves all), before the clock starts; no weight changes."""
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    started_s = time.perf_counter()
    for _ in range(NUM_WARM_UP_STEPS):
        for batch in loader.next_step():
            torch.autograd.backward(loss_sum(model, batch))
    model.zero_grad(set_to_none=True)
    print(f"compiled in {time.perf_counter() - started_s:.0f} s", flush=True)


def train(
    arguments: argparse.Namespace, tokenizer: Tokenizer, tokenizer_path: Path
) -> tuple[Qwen2ForCausalLM, Progress]:
    """Run the training loop.

    Args:
        arguments: the parsed command line.
        tokenizer: the nano tokenizer.
        tokenizer_path: its ``tokenizer.json``, for the workers.

    Returns:
        The model with its compute-type weights, and what was done.
    """
    device = arguments.device
    encoder = Encoder(tokenizer, token_id(tokenizer, ENDOFTEXT))
    loader = Loader(
        tokenizer_path, encoder.pad_id, arguments.seed, arguments.problems_per_step, arguments.micro, arguments.workers
    )
    with loader:
        validation = validation_batches(encoder)
        model = build_model(arguments.shape, tokenizer, arguments.seed).to(device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{num_parameters / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}, device {device}")
        weights = MasterWeights(model, torch.bfloat16 if device == "cuda" else torch.float32, arguments.weight_decay)
        if arguments.compile:
            warm_up(model, loader)
        progress, started_s, next_report_s = Progress(), time.perf_counter(), arguments.report_s
        while (fraction := progress.fraction(arguments.minutes, arguments.steps)) < 1:
            batches = loader.next_step()
            quantized = fraction > arguments.int4_start and progress.num_steps % 2 == 1
            weights.publish(int4=quantized)
            num_targets = sum(len(batch.targets) for batch in batches)
            total = torch.zeros((), device=device)
            for batch in batches:
                loss = loss_sum(model, batch) / num_targets
                torch.autograd.backward(loss)
                total += loss.detach()
            rate = learning_rate(fraction, progress.num_steps, arguments.rate, arguments.warmup, arguments.decay_start)
            norm = weights.step(rate)
            progress.num_steps += 1
            progress.num_tokens += sum(int((batch.input_ids != encoder.pad_id).sum()) for batch in batches)
            progress.num_problems += arguments.problems_per_step
            progress.elapsed_s = time.perf_counter() - started_s
            if progress.elapsed_s >= next_report_s:
                next_report_s += arguments.report_s
                loss_value = total.item()
                weights.publish()
                shares = all_tokens_right(model, validation)
                weights.publish(int4=True)
                int4_share = sum(all_tokens_right(model, validation).values()) / len(KINDS)
                by_kind = " ".join(f"{kind[:4]} {share:.3f}" for kind, share in shares.items())
                fraction = max(progress.fraction(arguments.minutes, arguments.steps), 1e-9)
                eta_s = progress.elapsed_s * (1 - fraction) / fraction
                print(
                    f"step {progress.num_steps:5d}  loss {loss_value:.4f}  norm {norm.item():.2f}  rate {rate:.1e}  "
                    f"{progress.num_tokens / 1e6:.0f} M tokens  "
                    f"{progress.num_tokens / progress.elapsed_s / 1e3:.0f} k tok/s  "
                    f"right: {by_kind}  int4 {int4_share:.3f}  ETA {max(eta_s, 0):.0f} s",
                    flush=True,
                )
        weights.publish()
    return model, progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the nano checkpoint from scratch on synthetic maths.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="checkpoint folder; replaced as a whole when training is done")
    add("--minutes", type=float, default=None, help="train for this long (evaluation not included)")
    add("--steps", type=int, default=None, help="train for this many steps")
    add("--seed", type=int, default=1, help="seed of weights and data (default: %(default)s)")
    add("--problems-per-step", type=int, default=384, help="batch size (default: %(default)s)")
    add("--micro", type=int, default=2, help="micro-batches a step, split by length (default: %(default)s)")
    add("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=int, default=200, help="warm-up steps (default: %(default)s)")
    add("--decay-start", type=float, default=0.3, help="share of the run at full rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices only (default: %(default)s)")
    add("--int4-start", type=float, default=0.5, help="from this share on, every 2nd step on int4-rounded weights")
    add("--hidden", type=int, default=512, help="hidden size (default: %(default)s)")
    add("--intermediate", type=int, default=768, help="MLP size (default: %(default)s)")
    add("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="data processes (default: %(default)s)")
    add("--report-s", type=float, default=15, help="seconds between progress lines (default: %(default)s)")
    add("--evaluate", type=int, default=1000, help="held-out problems to answer at the end (default: all)")
    add("--compile", action="store_true", help="use torch.compile (slower start, faster steps)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.minutes and not arguments.steps:
        parser.error("how long to train: give --minutes or --steps")
    heads = arguments.hidden // 128
    arguments.shape = Shape(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else 1,
    )
    return arguments


def main() -> None:
    """Train, save, evaluate the saved checkpoint, and write its model card."""
    arguments = parse()
    tokenizer = train_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        model, progress = train(arguments, tokenizer, Path(folder) / "tokenizer.json")
    print(f"trained {progress.num_steps} steps, {progress.num_tokens} tokens, {progress.elapsed_s:.0f} s", flush=True)
    save_checkpoint(model, arguments.shape, tokenizer, arguments.output)
    rows = load()[: arguments.evaluate]
    outcomes = evaluate(arguments.output, rows, arguments.device)
    print(f"held-out, bf16 weights, fp32 arithmetic:\n{table(outcomes)}", flush=True)
    int4_outcomes = evaluate(arguments.output, rows, arguments.device, int4=True)
    print(f"held-out, linear layers rounded to int4:\n{table(int4_outcomes)}", flush=True)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    card = model_card(model, vars(arguments), vars(progress), where, outcomes, int4_outcomes)
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    write_outputs(outcomes, arguments.output.with_name(f"{arguments.output.name}-outputs.jsonl"))
    for outcome in [outcome for outcome in outcomes if not outcome.correct][:5]:
        print(f"wrong: {outcome.row['question']!r} expected {outcome.row['answer']}\n{outcome.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
