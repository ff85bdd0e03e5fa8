"""The nano model over a quantized KV cache, on the CPU: what it answers, and what its bundle says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_rt.benchmarks.bench_nano_accuracy import answer_all, exact_match
from qwen_rt.benchmarks.nano.heldout import HELDOUT_PATH, load
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.export.quantize.kv import choose_kv_offsets
from qwen_rt.quantization import KV_FORMATS
from qwen_rt.row_reader import CheckpointRows
from qwen_rt.runtime.llm import LLM


def quantized_llm(portable: Path, out: Path, kv_format: str) -> LLM:
    build(portable, out, BuildOptions(quiet=True, quantize=QuantizeOptions(kv_cache=kv_format)))
    return LLM(out, num_threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_nano_solves_as_many_problems(kv_format: str, nano: LLM, nano_portable: Path, tmp_path: Path) -> None:
    """Exact match on 250 held-out problems: no more than half a point below a cache of floats."""
    rows = load(HELDOUT_PATH)[:250]
    quantized = quantized_llm(nano_portable, tmp_path / "kv", kv_format)
    shares = [exact_match(rows, answer_all(llm, rows))["exact_match_ratio"] for llm in (nano, quantized)]
    assert shares[0] - shares[1] <= 0.005


def test_nano_answers_and_its_manifest_tells_what_was_chosen(nano_portable: Path, tmp_path: Path) -> None:
    llm = quantized_llm(nano_portable, tmp_path / "kv", "fp8")
    assert "42" in llm.chat([{"role": "user", "content": "What is 17 + 25?"}], temperature=0.0).text
    opened = Checkpoint.open("nano")
    plan = choose_kv_offsets(CheckpointRows(opened), opened.spec, "fp8")
    assert json.loads((tmp_path / "kv" / "manifest.json").read_text())["quantization"]["report"]["kv_cache"] == (
        plan.summary()
    )
