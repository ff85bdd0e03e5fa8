"""The portable graph: standard ONNX that other runtimes run to the same logits, weights by reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import PARITY_RELATIVE_FP32, PORTABLE_RELATIVE

from ..cases import Case, Zoo
from ..checkpoints import SHAPES
from ..compare import assert_close
from .graphs import all_positions, cache_feeds, portable_session, reference_evaluator


def spec_of(case: Case) -> ModelSpec:
    return Checkpoint.open(case.checkpoint).spec


@pytest.mark.parametrize("name", SHAPES)
def test_onnx_runtime_alone_equals_transformers(zoo: Zoo, name: str) -> None:
    case = zoo.case(name)
    found = portable_session(case.portable).run([tensors.LOGITS], all_positions(spec_of(case), case.ids))[0]
    assert_close(found, case.logits, relative=PARITY_RELATIVE_FP32)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def tiny(request: pytest.FixtureRequest, zoo: Zoo) -> tuple[Path, str]:
    return zoo.case("tiny").narrow(request.param), request.param


def test_the_reference_evaluator_equals_transformers(zoo: Zoo, tiny: tuple[Path, str]) -> None:
    (folder, dtype), case = tiny, zoo.case("tiny")
    feeds = all_positions(spec_of(case), case.ids, dtype=dtype)
    outputs: Any = reference_evaluator(folder).run([tensors.LOGITS], feeds)
    found = outputs[0]
    assert found.dtype == np.float32
    assert_close(found, case.logits, relative=PORTABLE_RELATIVE[dtype], cosine=1 - PORTABLE_RELATIVE[dtype] / 20)


def test_the_checker_and_strict_shape_inference_accept_it(zoo: Zoo, tiny: tuple[Path, str]) -> None:
    (folder, dtype), spec = tiny, spec_of(zoo.case("tiny"))
    graph = Bundle.open(folder).graph_file
    onnx.checker.check_model(str(graph), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(graph)), check_type=True, strict_mode=True)
    ranks = {
        value.name: (len(value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type)
        for value in inferred.graph.value_info
    }
    element = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}.get(
        dtype, onnx.TensorProto.BFLOAT16
    )
    for layer in range(spec.num_layers):
        path = f"/model/layers.{layer}"
        assert ranks[f"{path}/self_attn/Attention/output_0"] == (4, element)
        assert ranks[f"{path}/self_attn/o_proj/MatMul/output_0"] == (3, element)
        assert ranks[f"{path}/input_layernorm/RMSNormalization/output_0"] == (3, element)
    assert ranks["/model/rotary_emb/Cos/output_0"][1] == onnx.TensorProto.FLOAT  # angles never leave float32


def test_chunks_through_present_and_past_equal_transformers(zoo: Zoo) -> None:
    """As a runtime without shared buffers feeds them: what comes out as present goes in as past."""
    case = zoo.case("odd")
    spec, session = spec_of(case), portable_session(case.portable)
    names = [output.name for output in session.get_outputs()]
    feeds = cache_feeds(spec, 1, len(case.ids))
    start = 0
    for stop in (9, 10, 31, len(case.ids)):
        outputs = dict(
            zip(
                names,
                session.run(
                    names,
                    feeds
                    | {
                        tensors.INPUT_IDS: case.ids[None, start:stop],
                        tensors.WRITE_INDICES: np.array([start]),
                        tensors.KV_LENGTHS: np.array([stop]),
                        tensors.LOGITS_INDICES: np.array([stop - start - 1]),
                    },
                ),
                strict=True,
            )
        )
        assert_close(outputs[tensors.LOGITS][0], case.logits[stop - 1], relative=PARITY_RELATIVE_FP32)
        feeds = {
            past(i): outputs[present(i)]
            for i in range(spec.num_layers)
            for past, present in (
                (tensors.past_key, tensors.present_key),
                (tensors.past_value, tensors.present_value),
            )
        }
        start = stop


def test_no_weight_is_copied_and_none_is_inside(zoo: Zoo) -> None:
    case = zoo.case("heads-7b")
    assert not list(case.portable.rglob("*.safetensors"))
    graph = Bundle.open(case.portable).graph_file
    assert graph.stat().st_size < 100_000
    model = onnx.load(str(graph), load_external_data=False)
    external = {i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    assert external == set(spec_of(case).parameters())
    opened = Checkpoint.open(case.checkpoint)
    for initializer in model.graph.initializer:
        if initializer.name in external:
            entries = {entry.key: entry.value for entry in initializer.external_data}
            ref = opened.tensors[initializer.name]
            assert (entries["location"], int(entries["offset"]), int(entries["length"])) == (
                ref.path.name,
                ref.offset,
                ref.nbytes,
            )


def test_only_standard_operators_at_opset_24(zoo: Zoo) -> None:
    model = onnx.load(str(Bundle.open(zoo.case("yarn").portable).graph_file), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version >= 11
    assert not model.functions


def test_a_portable_graph_changes_its_dtype_as_if_traced_in_it(zoo: Zoo) -> None:
    """From float32 to a narrower dtype the angles and the logits must stay float32."""
    case = zoo.case("tiny")
    again = case.build("again", case.portable, target="portable", dtype="bfloat16", self_contained=True)
    direct = case.narrow("bfloat16")
    assert Bundle.open(again).graph_file.read_bytes() == Bundle.open(direct).graph_file.read_bytes()


def test_onnx_runtime_version_is_one_that_the_tests_speak_of() -> None:
    assert tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 23)
