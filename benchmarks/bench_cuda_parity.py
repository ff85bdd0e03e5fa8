"""Logits of a cuda bundle beside transformers in float32, on a checkpoint of released shapes and random weights.

    python -m qwen_rt.benchmarks.bench_cuda_parity --precision bf16 fp8 int8 int4 --drawn depth-scaled
    python -m qwen_rt.benchmarks.bench_cuda_parity --through references --precision fp8 int8 int4 --drawn depth-scaled

Writes a checkpoint of that many layers, builds a bundle of target cuda in every precision, feeds a prompt in one call
and then token by token, and compares the logits after every one of these steps with those of transformers in float32,
on the checkpoint's bf16 weights. Of a quantized bundle they are also compared with transformers on the bundle's own
numbers, which tells a wrong kernel from a coarse number. The session rounds activations to bf16; a prefill on fp8
matrices rounds them to fp8. The logits of a row among four others must be bit-equal to those alone; of fp8 and int8
matrices only with QWEN_RT_BATCH_INVARIANT=1 (docs/gpu.md).

`--through references` needs no GPU: the bundle's graph runs through the numpy references of its ops, which round where
the kernels do but add up in float64 (benchmarks/reference_graph.py). Its rows say so by their contender; they show what
rounding costs, not that a kernel is right. Takes 12 GB of memory and some 40 s a precision on two cores.

How much of an error arrives at the logits is up to the weights. `plain` ones are normal, deviation 0.02, embeddings
too: every layer writes far more into the residual stream than it found there, so an error of 0.2 %, bf16's, has become
2 % behind four layers. `depth-scaled` ones are drawn as for a model of 28 layers that is to be trained: embeddings of
size 1, and o_proj and down_proj an eighth (1 / √(2 · 28) = 0.13, as GPT-2 has it), so that a layer changes the stream
by some 20 %, as in trained models.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.benchmarks.bench_nano_accuracy import describe_gpu
from qwen_rt.benchmarks.checkpoints import write_repeated
from qwen_rt.benchmarks.harness import new_run, versions, write_row
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.measure import package_python
from qwen_rt.benchmarks.reference_graph import ROUNDED, ReferenceGraph
from qwen_rt.benchmarks.verify_reference import load_reference
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.row_reader import StoredRows
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["main"]

MIN_COSINE: Mapping[str, float] = {"bf16": 0.999, "fp8": 0.998, "int8": 0.998, "int4": 0.99}
"""Precision → what the logits must reach against float32 on the checkpoint's weights."""


@dataclass(frozen=True)
class Drawn:
    """How random weights are drawn.

    Attributes:
        text: For the rows.
        factors: As for `write_repeated`.
        min_own_cosine: Logits against float32 on the bundle's own weights; without that, no row. A prefill on fp8
            matrices rounds its activations to fp8, which errs by 2.6 %; other steps round to bf16.
    """

    text: str
    factors: Mapping[str, float]
    min_own_cosine: float


_SCALED = {"o_proj.weight": 1 / 8, "down_proj.weight": 1 / 8, "embed_tokens.weight": 64.0}
DRAWN = {
    "plain": Drawn("normal, deviation 0.02; norms 1", {}, 0.97),
    "depth-scaled": Drawn(
        "normal, deviation 0.02; o_proj and down_proj 0.0025; embeddings 1.28; norms 1", _SCALED, 0.998
    ),
}
CONTENDERS = {"kernels": "qwen-rt", "references": "qwen-rt references on a CPU"}
"""What computes the logits → contender of its rows."""

_MAX_READERS = 8
PROMPT = 200
STEPS = 24
ROWS = (1, 5)
"""Rows of a decode step: the sequence alone, and beside four others."""


class Reference:
    """transformers' model of a checkpoint in float32, whose matrices may become those of a bundle.

    Args:
        checkpoint: bf16.
        tokens: The sequence that it reads.
        device: `cuda` or `cpu`.
    """

    def __init__(self, checkpoint: Path, tokens: NDArray[np.int64], device: str) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        self._model: Any = load_reference(Checkpoint.open(checkpoint)).to(device)
        self._ids = torch.from_numpy(tokens)[None].to(device)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits f32[STEPS + 1, V] at the last positions."""
        import torch

        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(self._ids, logits_to_keep=STEPS + 1).logits[0].cpu().numpy()
        return found

    def take(self, bundle: Bundle) -> None:
        """Put a bundle's quantized matrices in the place of the checkpoint's."""
        import torch

        quantization = bundle.manifest.quantization
        schemes = {} if quantization is None else quantization.weights
        num_readers = min(_MAX_READERS, os.cpu_count() or 1)  # each holds a matrix in float32, and more
        with StoredRows(bundle.tensors(), schemes) as rows, ThreadPoolExecutor(num_readers) as pool:

            def copy(name: str) -> None:
                parameter = self._model.get_parameter(name).data
                parameter.copy_(torch.from_numpy(rows.rows(name, 0, len(parameter))))

            list(pool.map(copy, schemes))


def start_builds(checkpoint: Path, precisions: Sequence[str]) -> dict[str, subprocess.Popen[str]]:
    """Start building a bundle `<precision>` beside the checkpoint for each; side by side, as each takes some cores."""
    builds = {}
    for precision in precisions:
        # The gate compares weights; here the logits themselves are compared.
        options = ["--target", "cuda", "--precision", precision, "--max-length", "4096", "--no-gate", "--quiet"]
        command = package_python("-m", "qwen_rt", "build", str(checkpoint), "-o", str(checkpoint.parent / precision))
        builds[precision] = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    return builds


def finish(build: subprocess.Popen[str]) -> None:
    """Wait for a build.

    Raises:
        QwenRtError: It failed.
    """
    told, _ = build.communicate()
    if build.returncode:
        raise QwenRtError(f"a build failed: {told.strip().splitlines()[-1] if told.strip() else build.returncode}")


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


def own_logits(bundle: Bundle, model: Reference, reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits on the bundle's own numbers in float32, which the model takes; of bf16 they are `reference`."""
    if bundle.manifest.quantization is None:
        return reference
    model.take(bundle)
    return model.logits()


def kernel_logits(bundle: Bundle, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the logits f32[STEPS + 1, V] of a sequence alone, and facts for the check."""
    with CudaSession(bundle, kv_memory=1 << 30) as session:
        alone, among = (session_logits(session, tokens, rows) for rows in ROWS)
    return alone, {"rows_bit_equal": bool(np.array_equal(alone, among))}


def reference_logits(bundle: Bundle, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the same through the references of the ops."""
    graph = ReferenceGraph(bundle, len(tokens))
    prompt = graph.prefill(tokens[:PROMPT])
    quantization = bundle.manifest.quantization
    precision = "bf16" if quantization is None else next(iter(quantization.weights.values())).format
    return np.concatenate([prompt[None], graph.steps(tokens[PROMPT:])]), {"rounded": ROUNDED[precision]}


def compare(
    found: NDArray[np.float32], own: NDArray[np.float32], reference: NDArray[np.float32], min_own: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compare a bundle's logits, f32[STEPS + 1, V] each.

    Args:
        found: Of the bundle.
        own: float32 on the bundle's own weights.
        reference: float32 on the checkpoint's weights.
        min_own: Least cosine with `own`.

    Returns:
        Metrics, and the check.
    """
    with_own = cosines(own, found)
    metrics = {
        "logits_cosine_ratio": float(cosines(reference, found).min()),
        "logits_relative_error_ratio": float(np.linalg.norm(found - reference) / np.linalg.norm(reference)),
        "same_best_token_ratio": float(np.mean(reference.argmax(1) == found.argmax(1))),
        "own_weights_cosine_ratio": float(with_own.min()),
        "own_weights_prefill_cosine_ratio": float(with_own[0]),
    }
    passed = bool(np.isfinite(found).all()) and metrics["own_weights_cosine_ratio"] >= min_own
    return metrics, {"passed": passed, "what": f"cosines with float32 on the bundle's own weights >= {min_own}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the rows; returns 1 if a check failed or a cosine is below its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=list(SHAPES), help="shapes (default: 7b)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="layers (default: 4)")
    parser.add_argument(
        "--precision", nargs="+", default=["bf16"], choices=list(MIN_COSINE), help="of the bundles (default: bf16)"
    )
    parser.add_argument(
        "--drawn", nargs="+", default=["plain"], choices=list(DRAWN), help="how weights are drawn (default: plain)"
    )
    parser.add_argument(
        "--through",
        default="kernels",
        choices=list(CONTENDERS),
        help="what runs the graph: kernels on a GPU, or their references on the CPU (default: kernels)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the rows (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="write no result rows")
    args = parser.parse_args(argv)
    shape = SHAPES[args.model].with_layers(args.layers)
    tokens = np.random.default_rng(5).integers(0, shape.vocab, PROMPT + STEPS)
    run, missed, name = new_run(), 0, f"{args.model}-{args.layers}-layers"
    on_gpu = args.through == "kernels"
    for drawn in args.drawn:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch, "checkpoint")
            checkpoint.mkdir()
            write_repeated(checkpoint, shape.config(), factors=DRAWN[drawn].factors)
            builds = start_builds(checkpoint, args.precision)
            bundles, owns = {}, {}
            try:
                model = Reference(checkpoint, tokens, "cuda" if on_gpu else "cpu")
                reference = model.logits()
                for precision, build in builds.items():
                    finish(build)
                    bundles[precision] = Bundle.open(checkpoint.parent / precision, "size")
                    owns[precision] = own_logits(bundles[precision], model, reference)
                del model
            finally:
                for build in builds.values():
                    build.kill()
                    build.wait()
            for precision, bundle in bundles.items():
                found, facts = (kernel_logits if on_gpu else reference_logits)(bundle, tokens)
                metrics, check = compare(found, owns[precision], reference, DRAWN[drawn].min_own_cosine)
                check |= facts
                value, limit = metrics["logits_cosine_ratio"], MIN_COSINE[precision]
                print(f"{name}, {drawn}, {precision}: {metrics}", flush=True)
                if on_gpu:
                    equal = check["rows_bit_equal"]
                    if precision not in ("fp8", "int8") or os.environ.get("QWEN_RT_BATCH_INVARIANT") == "1":
                        check["what"] += "; rows bit-equal alone and among others"
                        check["passed"] &= equal
                    print("logits among four others:", "bit-equal" if equal else "DIFFERENT", flush=True)
                missed += value < limit or not check["passed"]
                if args.dry_run or not check["passed"]:
                    continue
                settings = {"model": name, "precision": precision, "prompt": PROMPT, "steps": STEPS}
                settings |= {"rows": list(ROWS) if on_gpu else [1], "target": "cuda"}
                settings |= {"drawn": drawn, "weights": DRAWN[drawn].text}
                write_row(
                    "cuda_accuracy",
                    CONTENDERS[args.through],
                    metrics,
                    settings,
                    check=check,
                    run=run,
                    used=versions("onnxruntime-gpu" if on_gpu else "ml_dtypes", "torch", "transformers"),
                    gpu=describe_gpu(0) if on_gpu else None,
                    bars={"logits_cosine": {"limit": limit, "value": round(value, 5), "met": value >= limit}},
                    file=args.output,
                )
    print(f"FAILED: {missed} comparisons" if missed else "passed")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QwenRtError as error:
        sys.exit(f"error: {error}")
