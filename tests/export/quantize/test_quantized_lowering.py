"""Graphs over quantized matrices compute what transformers computes with the matrices that those stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.source import open_source
from qwen_rt.quantization import Scheme
from qwen_rt.tolerances import INT8_ACTIVATIONS_RELATIVE, LOWERED_RELATIVE, PARITY_RELATIVE_FP32

from ...cases import Case, Zoo
from ...compare import assert_close
from ..paged import PagedModel
from .kit import Quantized, all_matrices, reference_of, run_cpu, write_quantized

SHAPES = ["heads-0.5b", "yarn"]  # tied and untied; groups of 32 divide their widths
SCHEMES = [
    Scheme("fp8"),
    Scheme("fp8", 16),
    Scheme("int8"),
    Scheme("int8", 32),
    Scheme("int4", 16),
    Scheme("int4", 32, symmetric=False),
    Scheme("int4"),
    Scheme("int4", symmetric=False),
    Scheme("int4", 16, symmetric=False, permuted=True),
    Scheme("int8", 16, permuted=True),
]
NUM_TOKENS = 12


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    return zoo.case(request.param)


def write(case: Case, schemes: dict[str, Scheme], folder: Path, dtype: str | None = None) -> Quantized:
    return write_quantized(case.checkpoint, schemes, folder / "weights", dtype)


def layers(case: Case, scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(all_matrices(Checkpoint.open(case.checkpoint).spec), scheme)


def lower(case: Case, quantized: Quantized, target: str, activations: str = "float32") -> ir.Model:
    exported = open_source(case.portable).load_graph()
    return lowered_graph(quantized.checkpoint, target, 64, quantized.locations, exported, quantized.places, activations)


def num_nodes(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_cpu(case: Case, scheme: Scheme, tmp_path: Path) -> None:
    quantized = write(case, layers(case, scheme), tmp_path)
    model = lower(case, quantized, "cpu")
    products = 7 if scheme.permuted else 5  # of a layer: q, k and v are one, unless their inputs are permuted
    in_blocks = scheme.format == "int4" and scheme.group_size > 0
    assert num_nodes(model, "MatMulNBits") == (products * quantized.checkpoint.spec.num_layers if in_blocks else 0)
    ids = case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    assert_close(run_cpu(model, quantized, ids), wanted, relative=PARITY_RELATIVE_FP32)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int8", 32), Scheme("int4"), Scheme("int4", 32)], ids=str)
def test_cpu_with_int8_activations(case: Case, scheme: Scheme, tmp_path: Path) -> None:
    quantized = write(case, layers(case, scheme), tmp_path)
    model = lower(case, quantized, "cpu", "int8")
    assert num_nodes(model, "MatMulNBits") == 5 * quantized.checkpoint.spec.num_layers
    ids = case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    assert_close(run_cpu(model, quantized, ids), wanted, relative=INT8_ACTIVATIONS_RELATIVE, cosine=0.9995)


@pytest.mark.parametrize(
    "others",
    [
        {HEAD: Scheme("int8")},
        {HEAD: Scheme("int4", 32), EMBEDDING: Scheme("fp8")},
        {EMBEDDING: Scheme("int8", 32)},
        {EMBEDDING: Scheme("fp8")},
        {HEAD: Scheme("fp8"), EMBEDDING: Scheme("int8")},
    ],
    ids=lambda others: "+".join(f"{name.split('.')[-2]}={scheme}" for name, scheme in others.items()),
)
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_head_and_embeddings(case: Case, others: dict[str, Scheme], target: str, tmp_path: Path) -> None:
    quantized = write(case, layers(case, Scheme("int8")) | others, tmp_path, "BF16" if target == "cuda" else None)
    model = lower(case, quantized, target)
    ids = case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    if target == "cpu":
        assert_close(run_cpu(model, quantized, ids), wanted, relative=PARITY_RELATIVE_FP32)
    else:
        assert_close(run_cuda(model, quantized, ids), wanted, relative=LOWERED_RELATIVE)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_cuda(case: Case, scheme: Scheme, tmp_path: Path) -> None:
    quantized = write(case, layers(case, scheme), tmp_path, "BF16")
    model = lower(case, quantized, "cuda")
    ids = case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    assert_close(run_cuda(model, quantized, ids), wanted, relative=LOWERED_RELATIVE)


def run_cuda(model: ir.Model, quantized: Quantized, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits of every position, on the references: half of the text in one call, then token by token."""
    paged = PagedModel(model, quantized.folder, quantized.checkpoint.spec, 64)
    half = len(ids) // 2
    singles = [ids[i : i + 1] for i in range(half)]
    found = [paged.call([(0, ids)]) for ids in singles]
    other = PagedModel(model, quantized.folder, quantized.checkpoint.spec, 64)
    assert_close(other.call([(0, ids[:half])])[0], found[-1][0], relative=LOWERED_RELATIVE)
    found += [other.call([(0, ids[i : i + 1])]) for i in range(half, len(ids))]
    return np.concatenate(found)


def test_one_kernel_takes_one_format(case: Case, tmp_path: Path) -> None:
    schemes = layers(case, Scheme("int8"))
    schemes["model.layers.0.self_attn.k_proj.weight"] = Scheme("fp8")
    quantized = write(case, schemes, tmp_path, "BF16")
    with pytest.raises(GraphError, match=r"q_proj.weight is stored as int8, .*k_proj.weight as fp8"):
        lower(case, quantized, "cuda")
    ids = case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    assert_close(run_cpu(lower(case, quantized, "cpu"), quantized, ids), wanted, relative=PARITY_RELATIVE_FP32)
