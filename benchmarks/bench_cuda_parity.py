"""Logits of a cuda bundle beside transformers in float32, on a checkpoint of released shapes and random weights.

    python -m qwen_rt.benchmarks.bench_cuda_parity --model 7b --layers 4

Writes a checkpoint of that many layers, builds a bundle of target cuda, feeds a prompt in one call and then token by
token, and compares the logits after every one of these steps with those of transformers. The weights are the same bf16
numbers; the session rounds activations to bf16, transformers computes in float32.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.benchmarks.bench_nano_accuracy import describe_gpu
from qwen_rt.benchmarks.checkpoints import write_repeated
from qwen_rt.benchmarks.harness import new_run, versions, write_row
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.bundle import Bundle
from qwen_rt.errors import QwenRtError
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["main"]

MIN_COSINE = 0.999
PROMPT = 200
STEPS = 24
ROWS = (1, 5)
"""Rows of a decode step: the sequence alone, and beside four others."""


def reference_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return transformers' float32 logits f32[STEPS + 1, V] at the last positions of a sequence."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model.cuda().eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)[None].cuda(), logits_to_keep=STEPS + 1).logits[0]
    found: NDArray[np.float32] = logits.float().cpu().numpy()
    del model, logits
    gc.collect()
    torch.cuda.empty_cache()
    return found


def session_logits(session: CudaSession, tokens: NDArray[np.int64], num_rows: int) -> NDArray[np.float32]:
    """Return the session's logits f32[STEPS + 1, V]: first those of the prompt, then of steps fed with `tokens`."""
    prompt, fed = tokens[:PROMPT], tokens[PROMPT:]
    num_blocks = -(-len(tokens) // session.block_size) + 1
    rows = []
    for index in range(num_rows):
        blocks = tuple(range(1 + index * num_blocks, 1 + (index + 1) * num_blocks))
        rows.append(RowState(tuple(prompt.tolist()), SamplingParams(temperature=0.0), 0, blocks))
        session.prefill(rows[-1], prompt, 0, is_last=True)
    found = [session.read_logits(1)[0]]
    for step in range(STEPS):
        for row in rows:
            row.output_ids = fed[: step + 1].tolist()
        session.set_rows(rows)
        session.wait_step(session.launch_step())
        found.append(session.read_logits(num_rows)[-1])
    return np.stack(found)


def cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of every pair of rows, in float64."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write a row."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=list(SHAPES), help="shapes (default: 7b)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="layers (default: 4)")
    args = parser.parse_args(argv)
    shape = SHAPES[args.model].with_layers(args.layers)
    tokens = np.random.default_rng(5).integers(0, shape.vocab, PROMPT + STEPS)
    run = new_run()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, out = Path(scratch, "checkpoint"), Path(scratch, "bundle")
        checkpoint.mkdir()
        write_repeated(checkpoint, shape.config())
        build(checkpoint, out, BuildOptions(target="cuda", max_length=4096))
        reference = reference_logits(checkpoint, tokens)
        with CudaSession(Bundle.open(out, "size"), kv_memory=1 << 30) as session:
            found = {rows: session_logits(session, tokens, rows) for rows in ROWS}
    alone, among = (found[rows] for rows in ROWS)
    all_cosines = np.concatenate([cosines(reference, alone), cosines(reference, among)])
    same = float(np.mean(reference.argmax(1) == alone.argmax(1)))
    equal = bool(np.array_equal(alone, among))
    metrics = {
        "logits_cosine_ratio": float(all_cosines.min()),
        "logits_relative_error_ratio": float(np.linalg.norm(alone - reference) / np.linalg.norm(reference)),
        "same_best_token_ratio": same,
    }
    print(f"{args.model}, {args.layers} layers, prompt {PROMPT}, {STEPS} steps:", metrics)
    print("logits among four other rows are", "bit-equal to" if equal else "DIFFERENT from", "those alone")
    passed = bool(all_cosines.min() >= MIN_COSINE) and equal and bool(np.isfinite(alone).all())
    write_row(
        "cuda_accuracy",
        "qwen-rt",
        metrics,
        {
            "model": f"{args.model}-{args.layers}-layers",
            "precision": "bf16",
            "prompt": PROMPT,
            "steps": STEPS,
            "rows": list(ROWS),
        },
        check={"passed": passed, "what": f"every cosine >= {MIN_COSINE}; rows bit-equal alone and among others"},
        run=run,
        used=versions("onnxruntime-gpu", "torch", "transformers"),
        gpu=describe_gpu(0),
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QwenRtError as error:
        sys.exit(f"error: {error}")
