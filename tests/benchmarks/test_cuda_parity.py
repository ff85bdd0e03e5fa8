"""The logits benchmark without a GPU: the graph through the references of its ops, and the whole of it to a row."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwen_rt.benchmarks import bars, bench_cuda_parity
from qwen_rt.benchmarks.bench_cuda_parity import CONTENDERS, MIN_COSINE, compare, main
from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.benchmarks.reference_graph import ROUNDED, ReferenceGraph
from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError
from qwen_rt.export.build import BuildOptions, build

from ..export.paged import PagedModel

TINY = ModelShape(hidden=128, layers=2, heads=1, kv_heads=1, head_dim=128, ffn=256, vocab=151680)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_the_graph_as_the_evaluator_of_onnx_runs_it(precision: str, nano_portable: Path, tmp_path: Path) -> None:
    """A prompt beyond a block and beyond the rows of skinny kernels, then steps: all at once as one by one."""
    build(
        nano_portable,
        tmp_path / "cuda",
        BuildOptions(target="cuda", precision=precision, quiet=True, self_contained=True),
    )
    bundle = Bundle.open(tmp_path / "cuda")
    tokens = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, 78)
    graph = ReferenceGraph(bundle, len(tokens))
    found = np.stack([graph.prefill(tokens[:73]), *graph.steps(tokens[73:])])

    proto = ir.serde.deserialize_model(onnx.load(str(bundle.graph_file), load_external_data=False))
    paged = PagedModel(proto, bundle.graph_file.parent, bundle.manifest.model, len(tokens), bf16=True)
    wanted = [paged.call([(0, tokens[:73])]), *(paged.call([(0, tokens[i : i + 1])]) for i in range(73, 78))]
    # Sums of another number of rows may differ by a float64 rounding, and so may then, seldom, a bf16 one.
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=2**-8 * np.abs(found).max())


def test_a_bundle_of_another_target_is_refused(nano_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has target cpu"):
        ReferenceGraph(Bundle.open(nano_bundle), 8)


def test_from_checkpoint_to_rows_through_the_references(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setitem(bench_cuda_parity.SHAPES, "7b", TINY)
    monkeypatch.setattr(bench_cuda_parity, "write_row", lambda *given, **named: rows.append({"given": given} | named))
    options = ["--through", "references", "--layers", "2", "--drawn", "depth-scaled"]
    assert main([*options, "--precision", "bf16", "int4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    assert [row["given"][3]["precision"] for row in rows] == ["bf16", "int4"]
    for row in rows:
        benchmark, contender, metrics, settings = row["given"]
        assert (benchmark, contender) == ("cuda_accuracy", CONTENDERS["references"])
        assert (settings["model"], settings["target"], settings["rows"]) == ("7b-2-layers", "cuda", [1])
        assert row["gpu"] is None
        assert row["check"]["passed"]
        assert row["check"]["rounded"] == ROUNDED[settings["precision"]]
        assert MIN_COSINE[settings["precision"]] <= metrics["logits_cosine_ratio"] < 1 - 1e-7, "bf16 was rounded to"
    bf16, int4 = (row["given"][2] for row in rows)
    assert bf16["own_weights_cosine_ratio"] == bf16["logits_cosine_ratio"]
    assert int4["own_weights_cosine_ratio"] > int4["logits_cosine_ratio"]


@pytest.mark.parametrize(
    ("precision", "is_equal", "variable", "passes"),
    [
        ("int4", True, "", True),
        ("int4", False, "", False),
        ("fp8", False, "", True),
        ("fp8", False, "1", False),
        ("fp8", True, "1", True),
    ],
)
def test_through_kernels_rows_have_to_be_bit_equal(
    monkeypatch: pytest.MonkeyPatch, precision: str, is_equal: bool, variable: str, passes: bool
) -> None:
    """All but the GPU: float32 and the kernels agree here."""
    monkeypatch.setenv("QWEN_RT_BATCH_INVARIANT", variable)
    rows: list[dict[str, Any]] = []
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    model = types.SimpleNamespace(logits=lambda: logits, take=lambda bundle: None)
    facts = {"rows_bit_equal": is_equal}
    monkeypatch.setitem(bench_cuda_parity.SHAPES, "7b", TINY)
    monkeypatch.setattr(bench_cuda_parity, "Reference", lambda checkpoint, tokens, device: model)
    monkeypatch.setattr(bench_cuda_parity, "kernel_logits", lambda bundle, tokens: (logits, facts))
    monkeypatch.setattr(bench_cuda_parity, "describe_gpu", lambda device: {"name": "none"})
    monkeypatch.setattr(bench_cuda_parity, "write_row", lambda *given, **named: rows.append({"given": given} | named))
    assert main(["--layers", "1", "--precision", precision]) == (0 if passes else 1)
    assert len(rows) == passes
    if passes:
        benchmark, contender, metrics, settings = rows[0]["given"]
        assert (benchmark, contender, settings["rows"]) == ("cuda_accuracy", "qwen-rt", [1, 5])
        assert metrics["own_weights_cosine_ratio"] == pytest.approx(1)
        is_told = rows[0]["check"]["what"].endswith("rows bit-equal alone and among others")
        assert is_told == is_equal
        assert rows[0]["gpu"] == {"name": "none"}


def test_what_is_far_from_its_own_weights_or_not_finite_does_not_pass() -> None:
    reference = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    metrics, check = compare(reference, reference, reference, 0.99)
    assert check["passed"]
    assert (metrics["logits_cosine_ratio"], metrics["same_best_token_ratio"]) == (pytest.approx(1), 1)
    assert not compare(-reference, reference, reference, 0.99)[1]["passed"]
    assert not compare(np.where(reference > 2, np.nan, reference), reference, reference, 0.99)[1]["passed"]


def test_the_bars_take_kernels_first_and_references_where_there_are_none() -> None:
    chosen = [bar for bar in bars.load() if bar.id.startswith("7b-4-layers-") and bar.issue == 5]
    assert {bar.id.rsplit("-", 1)[1]: bar.limit for bar in chosen} == {
        k: v for k, v in MIN_COSINE.items() if k != "bf16"
    }
    for bar in chosen:
        assert [source.contender for source in bar.sources] == list(CONTENDERS.values())
        assert "through their references on a CPU" in bar.text
