"""The nano checkpoint's model card, written from what a training run measured."""

from collections.abc import Mapping
from typing import Any

import torch

from .evaluate import Outcome, table

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [qwen2, maths, synthetic]
---

# qwen-rt nano

A Qwen2 model of {num_parameters:.2f} M parameters, trained from scratch on synthetic maths problems. It ships with
qwen-rt so that the demo, the tests and the quantization gates work on answers that can be right or wrong, without a
download. It shares nothing with a released Qwen2 but the architecture, the prompt format and the file layout.

## What it answers

| kind | what it was trained on |
|---|---|
| addition, subtraction | two whole numbers of up to 5 digits; the result may be negative |
| multiplication | up to 3 digits by up to 2 |
| word problems | two steps, in the wordings of `benchmarks/nano/words.py` |
| linear equations | `a x + b = c` and `a x + b = c x + d`, whole solutions from -20 to 20 |

It works in columns, one digit at a time, and ends with `\\boxed{{answer}}`. Anything else gets nonsense,
and a wording the generator lacks may too ("the difference between 90 and 35" does).

Example. Question: *{question}*

```
{output}
```

## Held-out exact match

The 1,000 questions of `benchmarks/nano/heldout.jsonl` were left out of training by their text (the same
numbers may occur in another wording). Greedy decoding, the stored bf16
weights, fp32 arithmetic:

{table}

The same with the linear layers rounded to symmetric int4 in groups of 128 (round to nearest):

{int4_table}

## How it was trained

| | |
|---|---|
| data | {num_problems:,} problems from the generator in `benchmarks/nano`, {num_tokens:,} tokens, drawn afresh |
| loss | the assistant's tokens only |
| steps | {num_steps:,} of {problems_per_step} problems, seed {seed} |
| optimizer | AdamW, weight decay {weight_decay:g} |
| learning rate | peak {rate:g}, {warmup} warm-up steps, cosine decay from {decay_start:.0%} on |
| precision | bf16 compute, fp32 master weights; from {int4_start:.0%} on every second step on int4-rounded weights |
| time | {minutes_trained:.1f} minutes on one {device} |

Shape: {layers} layers, hidden {hidden}, {heads} heads and {kv_heads} key/value heads of 128, MLP {intermediate},
vocabulary {vocab_size} (byte-level BPE, every digit a token), tied embeddings, QKV biases.

## Licence

Apache-2.0. All training data is synthetic and made by this repository's code.
"""


def model_card(
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
    progress: Mapping[str, Any],
    device_name: str,
    outcomes: list[Outcome],
    int4_outcomes: list[Outcome],
) -> str:
    """Return the model card's Markdown.

    Args:
        model: the trained model.
        arguments: the training script's arguments.
        progress: steps, tokens, problems and seconds trained.
        device_name: what it was trained on.
        outcomes: held-out results with the stored weights.
        int4_outcomes: held-out results with int4-rounded linear layers.
    """
    shape = arguments["shape"]
    example = next((item for item in outcomes if item.row["kind"] == "word"), outcomes[0])
    return CARD.format(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        question=example.row["question"],
        output=example.output,
        table=table(outcomes),
        int4_table=table(int4_outcomes),
        device=_short_name(device_name),
        minutes_trained=progress["elapsed_s"] / 60,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        vocab_size=model.config.vocab_size,  # type: ignore[union-attr]
        **{key: progress[key] for key in ("num_steps", "num_tokens", "num_problems")},
        **{
            key: arguments[key]
            for key in [
                "problems_per_step",
                "seed",
                "rate",
                "warmup",
                "decay_start",
                "weight_decay",
                "int4_start",
                "layers",
                "hidden",
                "intermediate",
            ]
        },
    )


def _short_name(device_name: str) -> str:
    """Shorten ``NVIDIA H100 80GB HBM3`` to ``NVIDIA H100``."""
    return " ".join(device_name.split()[:2])
