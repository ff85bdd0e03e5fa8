"""Quantized matrices in the graph for TensorRT: what they stand for, and the forms that it does not have."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import UsageError
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.source import open_source
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import PARITY_RELATIVE_FP32

from ..cases import Case, Zoo
from ..compare import assert_close
from .quantize.kit import Quantized, all_matrices, reference_of, write_quantized
from .ragged import RaggedModel
from .test_lower_tensorrt import CAPACITY, on_ort

SCHEMES = [
    Scheme("fp8"),
    Scheme("int8"),
    Scheme("int4", 16),
    Scheme("int4", 32),
    Scheme("int4"),
    Scheme("int8", permuted=True),
    Scheme("int4", 16, permuted=True),
]
NUM_TOKENS = 12


@pytest.fixture(params=["heads-0.5b", "yarn"])
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    """Tied and untied; groups of 32 divide their widths."""
    return zoo.case(request.param)


def layers(case: Case, scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(all_matrices(Checkpoint.open(case.checkpoint).spec), scheme)


def lower(case: Case, quantized: Quantized, dtype: str = "float32") -> ir.Model:
    exported = open_source(case.portable).load_graph()
    places = quantized.places
    return lowered_graph(quantized.checkpoint, "tensorrt", CAPACITY, quantized.locations, exported, places, dtype=dtype)


def logits_of(model: ir.Model, quantized: Quantized, spec: ModelSpec, ids: NDArray[np.int64]) -> dict[int, NDArray]:
    """Position → logits: rows with prefixes of one text, then decode steps of two of them."""
    ragged = RaggedModel(on_ort(model, quantized.folder), spec, 3, CAPACITY, true_lengths=True)
    prefixes = (4, 7, NUM_TOKENS)
    logits = ragged.call([(row, ids[:size]) for row, size in enumerate(prefixes)])
    found = {size - 1: row for size, row in zip(prefixes, logits, strict=True)}
    for step in range(3):
        logits = ragged.call([(row, ids[prefixes[row] + step :][:1]) for row in (1, 0)])
        found |= {prefixes[row] + step: logits[index] for index, row in enumerate((1, 0))}
    return found


def assert_parity(case: Case, schemes: dict[str, Scheme], folder: Path) -> ir.Model:
    """The graph against transformers on the matrices that the stored numbers stand for."""
    quantized = write_quantized(case.checkpoint, schemes, folder / "weights")
    model, ids = lower(case, quantized), case.ids[:NUM_TOKENS]
    wanted = reference_of(case.reference, quantized, ids)
    for position, logits in logits_of(model, quantized, quantized.checkpoint.spec, ids).items():
        assert_close(logits, wanted[position], relative=PARITY_RELATIVE_FP32, what=f"logits of token {position}")
    return model


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_matrix_of_the_layers(case: Case, scheme: Scheme, tmp_path: Path) -> None:
    model = assert_parity(case, layers(case, scheme), tmp_path)
    found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(found) == len(layers(case, scheme))
    for node in found:
        (use,) = node.outputs[0].uses()
        assert use.node.op_type == "Gemm"
        assert use.idx == 1
    names = {str(node.name).rsplit("/", 1)[0] for node in found}
    assert "/model/layers.0/self_attn/q_proj" in names
    assert "/model/layers.1/mlp/down_proj" in names


@pytest.mark.parametrize(
    "others",
    [
        {HEAD: Scheme("int8")},
        {HEAD: Scheme("int4", 32), EMBEDDING: Scheme("fp8")},
        {EMBEDDING: Scheme("int8")},
        {HEAD: Scheme("fp8"), EMBEDDING: Scheme("int4", 16)},
    ],
    ids=lambda others: "+".join(f"{name.split('.')[-2]}={scheme}" for name, scheme in others.items()),
)
def test_head_and_embeddings(case: Case, others: dict[str, Scheme], tmp_path: Path) -> None:
    assert_parity(case, layers(case, Scheme("int8")) | others, tmp_path)


def test_formats_may_be_mixed(case: Case, tmp_path: Path) -> None:
    schemes = layers(case, Scheme("int8"))
    schemes["model.layers.0.self_attn.k_proj.weight"] = Scheme("fp8")
    schemes["model.layers.0.mlp.up_proj.weight"] = Scheme("int4", 32)
    del schemes["model.layers.1.mlp.down_proj.weight"]
    assert_parity(case, schemes, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int8"), Scheme("int4", 32)], ids=str)
def test_dtypes_around_a_matrix(scheme: Scheme, dtype: str, zoo: Zoo, tmp_path: Path) -> None:
    """Scales of a row stay float32 as stored, those of a group are cast; the matrix gets the activations' dtype."""
    case = zoo.case("yarn")
    quantized = write_quantized(case.checkpoint, layers(case, scheme), tmp_path / "weights")
    model = lower(case, quantized, dtype)
    wanted = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}[dtype]
    name = "model.layers.0.mlp.up_proj.weight"
    node = next(node for node in model.graph if node.name == "/model/layers.0/mlp/up_proj/DequantizeLinear")
    values, scale = node.inputs
    assert values is not None
    assert scale is not None
    assert (values.name, node.outputs[0].dtype) == (name, wanted)
    stored = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[scheme.format]
    assert values.dtype == stored
    if scheme.group_size:
        assert scale.dtype == wanted
        assert (node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()) == (1, 32)
        source = model.graph.initializers[f"{name}_scale"]
        assert source.dtype == ir.DataType.FLOAT16
    else:
        assert (scale.name, scale.dtype) == (f"{name}_scale", ir.DataType.FLOAT)
        assert (node.attributes["axis"].as_int(), node.attributes["output_dtype"].as_int()) == (0, wanted)
        assert isinstance(scale.const_value, ir.ExternalTensor)
        assert isinstance(values.const_value, ir.ExternalTensor)


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (Scheme("int4", 32, symmetric=False), "no zero points"),
        (Scheme("int8", 32), "int8 with one scale for each row"),
        (Scheme("fp8", 16), "fp8 with one scale for each row"),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_what_tensorrt_lacks_is_refused_by_name(scheme: Scheme, why: str, zoo: Zoo, tmp_path: Path) -> None:
    case, name = zoo.case("yarn"), "model.layers.1.mlp.up_proj.weight"
    quantized = write_quantized(case.checkpoint, {name: scheme}, tmp_path / "weights")
    with pytest.raises(UsageError, match=rf"{re.escape(name)} is stored as {scheme}; expected .*{why}") as caught:
        lower(case, quantized)
    assert "\n" not in str(caught.value)
    assert "--overrides" in str(caught.value)


def test_an_int4_row_that_no_block_divides_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    case = zoo.case("odd")
    name = "model.layers.0.mlp.gate_proj.weight"
    quantized = write_quantized(case.checkpoint, {name: Scheme("int4")}, tmp_path / "weights")
    narrow = dataclasses.replace(quantized.places[name], shape=(231, 24))
    with pytest.raises(UsageError, match=rf"{re.escape(name)} is int4 with 24 columns; expected a multiple of 16"):
        lower(case, dataclasses.replace(quantized, places={name: narrow}))
