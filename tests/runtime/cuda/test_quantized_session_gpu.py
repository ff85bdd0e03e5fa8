"""Quantized bundles of nano on a real GPU: what the session makes of them, beside their CPU bundles."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qwen_rt.benchmarks.nano.heldout import load as load_problems
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION, boxed_answer
from qwen_rt.benchmarks.verify_runtime import prefill_logits, stepwise_logits
from qwen_rt.bundle import Bundle
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams

from .gpu_kit import KV_BYTES, feed, make_rows, run

pytestmark = pytest.mark.gpu

VARIANTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "fp8": ("fp8", {}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "int4-head": ("int4", {"lm_head": "int4", "embedding": "int8"}),
    "kv-fp8": ("auto", {"kv_cache": "fp8"}),
    "kv-int8": ("auto", {"kv_cache": "int8"}),
    "fp8-kv-fp8": ("fp8", {"kv_cache": "fp8"}),
    "int4-kv-int8": ("int4", {"kv_cache": "int8"}),
}
"""Name → precision and options of quantization."""

NUM_PROBLEMS = 32
MIN_SAME_ANSWERS = 31
MIN_COSINE = {"stepwise": 0.998, "prefill": 0.995}
"""Against the CPU bundle, which computes in float32: activations rounded to bf16 between steps, and to fp8 or int8 as
well in a prefill on fp8 and int8 matrices; keys and values that move to the next number of an 8-bit cache."""


def build_variant(portable: Path, name: str, target: str) -> Path:
    from qwen_rt.export.build import BuildOptions, QuantizeOptions, build

    folder = portable.parent / f"{target}-{name}"
    precision, options = VARIANTS[name]
    quantize = QuantizeOptions(**options)  # type: ignore[arg-type]
    chosen = BuildOptions(target=target, precision=precision, quantize=quantize, gate=False, overwrite=True, quiet=True)
    build(portable, folder, chosen)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_and_logits_are_those_of_the_cpu(library: PluginLibrary, nano_portable: Path, name: str) -> None:
    problems = load_problems()[:NUM_PROBLEMS]
    texts = [f"{problem['question']}\n{INSTRUCTION}" for problem in problems]
    answers, logits = [], []
    for target in ("cpu", "cuda"):
        with LLM(build_variant(nano_portable, name, target), kv_memory=KV_BYTES if target == "cuda" else None) as llm:
            encoded = [llm.encode_chat([{"role": "user", "content": text}]) for text in texts]
            outputs = llm.generate(encoded, temperature=0.0, max_tokens=400)
            answers.append([boxed_answer(output.text) for output in outputs])
            ids = [*encoded[0], *outputs[0].token_ids][:160]
            last = np.arange(len(ids) - 4, len(ids))
            logits.append((stepwise_logits(llm, ids, quiet=True), prefill_logits(llm, ids, last)))
    for kind, expected, found in zip(MIN_COSINE, *logits, strict=True):
        a, b = expected.astype(np.float64), found.astype(np.float64)
        cosines = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
        print(f"{name} {kind}: smallest cosine {cosines.min():.6f}, mean {cosines.mean():.6f}")
        assert cosines.min() > MIN_COSINE[kind], kind
    same = sum(x == y for x, y in zip(*answers, strict=True))
    print(f"{name}: {same} of {NUM_PROBLEMS} answers are the CPU's")
    assert same >= MIN_SAME_ANSWERS


@pytest.mark.parametrize("name", ["fp8", "int8", "int4-head", "kv-fp8", "kv-int8", "fp8-kv-fp8"])
def test_steps_are_those_of_prefills_and_alone(library: PluginLibrary, nano_portable: Path, name: str) -> None:
    """Steps choose what a prefill of the same tokens would, a rounding error aside, whoever their batch mates are."""
    folder = build_variant(nano_portable, name, "cuda")
    with CudaSession(Bundle.open(folder), kv_memory=KV_BYTES, quiet=True) as session:
        rows = make_rows(session, [200, 9, 70])
        for row in rows:
            feed(session, row)
        starts = [list(row.output_ids) for row in rows]
        run(session, rows, 12)
        for row, start in zip(rows, starts, strict=True):
            together, row.output_ids = row.output_ids, start
            run(session, [row], 12)
            assert row.output_ids == together
            fed = RowState((*row.prompt_ids, *row.output_ids[:-1]), row.params, 0, row.blocks)
            top = feed(session, fed).logprobs[0]
            assert top is not None
            choice = top.top_ids.tolist().index(row.output_ids[-1])
            assert top.top_logprobs[0] - top.top_logprobs[choice] < (0.5 if name.startswith(("fp8", "int8")) else 0.1)
        assert session.memory_report().unaccounted_share < 0.02


def test_sampling_from_a_quantized_bundle_repeats(library: PluginLibrary, nano_portable: Path) -> None:
    folder = build_variant(nano_portable, "int4-head", "cuda")
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=20, ignore_eos=True)
    with LLM(folder, kv_memory=KV_BYTES) as llm:
        prompt = llm.encode_chat([{"role": "user", "content": "What is 3 + 4?"}])
        first, second = (llm.generate([prompt], params)[0].token_ids for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "kv-int8", "fp8-kv-fp8"])
def test_verify_passes(library: PluginLibrary, nano_portable: Path, name: str) -> None:
    """The limits of what a quantized bundle's runtime may err by, on a GPU."""
    from qwen_rt.benchmarks.verify import verify

    folder = build_variant(nano_portable, name, "cuda")
    result = verify(folder, num_tokens=96, greedy_tokens=32, exact_match=32, quiet=True)
    print(result.table())
    assert result.passed


def test_commands_take_a_quantized_bundle(
    library: PluginLibrary,
    nano_portable: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen_rt.cli import main

    folder = str(build_variant(nano_portable, "fp8-kv-fp8", "cuda"))
    options = [folder, "--boxed", "--temperature", "0", "--kv-memory", "256MiB"]
    assert main(["generate", *options, "What is 17 + 25?"]) == 0
    assert "42" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 17 + 25?\n"))
    assert main(["chat", *options]) == 0
    assert "42" in capsys.readouterr().out
