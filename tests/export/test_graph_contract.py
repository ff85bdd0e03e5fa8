"""Names, dtypes and shapes at the edges of every graph; node names; the stamped layers; tracing a 72B-sized model."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
import pytest

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.portable import attach_weights
from qwen_rt.export.stamp import stamp_layers
from qwen_rt.export.trace import trace_single_layer
from qwen_rt.rope import RopeSpec
from qwen_rt.spec import ModelSpec

from ..cases import Case, Zoo
from ..checkpoints import SHAPES

QWEN2_72B = ModelSpec(
    architecture="Qwen2ForCausalLM",
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=29568,
    vocab_size=152064,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=1e6),
    tie_word_embeddings=False,
    max_position_embeddings=32768,
)


def table(spec: ModelSpec, kv_dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[list[Any], list[Any]]:
    """The table of `core/tensors.py`: (name, dtype, shape) of inputs and outputs, in order."""
    cache = (kv_dtype, ("B", spec.num_kv_heads, "Tmax", spec.head_dim))
    row = (ir.DataType.INT64, ("B",))
    pasts, presents = (
        [(name(i), *cache) for i in range(spec.num_layers) for name in pair]
        for pair in ((tensors.past_key, tensors.past_value), (tensors.present_key, tensors.present_value))
    )
    inputs = [(tensors.INPUT_IDS, ir.DataType.INT64, ("B", "S")), *pasts]
    inputs += [(name, *row) for name in (tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES)]
    return inputs, [(tensors.LOGITS, ir.DataType.FLOAT, ("B", spec.vocab_size)), *presents]


def edge(values: Any) -> list[Any]:
    found = []
    for value in values:
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        found.append((value.name, value.dtype, dims))
    return found


def graph_of(case: Case, target: str) -> ir.Model:
    folder = case.portable if target == "portable" else case.bundle
    return ir.load(Bundle.open(folder).graph_file)


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_inputs_and_outputs_are_those_of_the_table(zoo: Zoo, name: str, target: str) -> None:
    case = zoo.case(name)
    graph = graph_of(case, target).graph
    assert (edge(graph.inputs), edge(graph.outputs)) == table(Checkpoint.open(case.checkpoint).spec)


def test_the_table_holds_for_narrow_graphs_too(zoo: Zoo) -> None:
    case = zoo.case("tiny")
    graph = ir.load(Bundle.open(case.narrow("bfloat16")).graph_file).graph
    expected = table(Checkpoint.open(case.checkpoint).spec, ir.DataType.BFLOAT16)
    assert (edge(graph.inputs), edge(graph.outputs)) == expected


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_initializers_keep_their_hugging_face_names_and_shapes(zoo: Zoo, name: str, target: str) -> None:
    case = zoo.case(name)
    graph = graph_of(case, target).graph
    weights = {
        name: tuple(value.shape or ())
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert weights == Checkpoint.open(case.checkpoint).spec.parameters()
    inside = [v.const_value for v in graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    assert sum(value.nbytes for value in inside if value is not None) < 4096  # constants: frequencies, shapes


@pytest.mark.parametrize(("target", "product"), [("portable", "MatMul"), ("cpu", "Gemm")])
@pytest.mark.parametrize("name", ["odd", "heads-0.5b"])
def test_node_names_are_module_paths_of_transformers(zoo: Zoo, name: str, target: str, product: str) -> None:
    case = zoo.case(name)
    names = [str(node.name) for node in graph_of(case, target).graph]
    assert len(set(names)) == len(names)
    modules = dict(case.reference.named_modules())
    for path, module in modules.items():
        if isinstance(module, type(case.reference.lm_head)):
            node = "/" + re.sub(r"\.(?!\d)", "/", path) + f"/{product}"
            packed = target == "cpu" and re.search(r"[qkv]_proj", path)
            if packed:
                node = re.sub("[qkv]_proj", "qkv_proj", node)
            if path == "lm_head" and node not in names:
                node = "/lm_head/Gemm"
            assert node in names
    layers = {re.match(r"/?/?model/layers\.(\d+)/", n) for n in names}
    assert {int(m[1]) for m in layers if m} == set(range(case.shape.num_layers))


def structure(model: ir.Model, layer: int) -> list[Any]:
    """The nodes of one layer, its number replaced: operator, names of inputs and outputs, attributes."""

    def neutral(name: str | None) -> str:
        if name is not None and "/constant_" in name:
            return name  # shared by all layers
        return re.sub(rf"(layers|past_key_values|present)\.{layer}\b", r"\1.#", str(name))

    first = next(node for node in model.graph if node.name == f"/model/layers.{layer}/input_layernorm/RMSNormalization")
    entry = first.inputs[0]
    return [
        (
            node.domain,
            node.op_type,
            neutral(node.name),
            ["(entry)" if value is entry else None if value is None else neutral(value.name) for value in node.inputs],
            [(neutral(value.name), value.dtype, str(value.shape)) for value in node.outputs],
            {key: (attr.type, attr.value) for key, attr in node.attributes.items()},
        )
        for node in model.graph
        if str(node.name).startswith(f"/model/layers.{layer}/")
    ]


@pytest.fixture(scope="module")
def big() -> ir.Model:
    """A 72B-sized model of 80 layers, without a weight."""
    return stamp_layers(trace_single_layer(QWEN2_72B, "bfloat16"), QWEN2_72B.num_layers)


def test_all_layers_of_72b_have_one_structure(big: ir.Model) -> None:
    expected = structure(big, 0)
    assert len(expected) > 20
    for layer in range(1, QWEN2_72B.num_layers):
        assert structure(big, layer) == expected
    assert edge(big.graph.inputs) == table(QWEN2_72B, ir.DataType.BFLOAT16)[0]
    assert edge(big.graph.outputs) == table(QWEN2_72B, ir.DataType.BFLOAT16)[1]


def test_layers_of_72b_are_chained(big: ir.Model) -> None:
    """The hidden state runs through all 80: each layer reads the sum that the one before it ends with."""
    nodes = {str(node.name): node for node in big.graph}
    for layer in range(1, QWEN2_72B.num_layers):
        entry = nodes[f"/model/layers.{layer}/input_layernorm/RMSNormalization"].inputs[0]
        assert entry is not None
        producer = entry.producer()
        assert producer is not None
        assert str(producer.name).startswith(f"/model/layers.{layer - 1}/")
    last = nodes["/model/GatherND"].inputs[0]
    assert last is not None
    assert str(last.name).startswith("/model/layers.79/")


def test_tracing_72b_makes_no_storage(big: ir.Model) -> None:
    weights = {
        name: tuple(value.shape or ()) for name, value in big.graph.initializers.items() if value.const_value is None
    }
    assert weights == QWEN2_72B.parameters()
    held = sum(value.const_value.nbytes for value in big.graph.initializers.values() if value.const_value is not None)
    assert held < 4096


def test_a_weight_of_another_shape_is_refused(big: ir.Model, zoo: Zoo) -> None:
    from qwen_rt.export.portable import checkpoint_locations

    locations = checkpoint_locations(Checkpoint.open(zoo.case("odd").checkpoint))
    with pytest.raises(GraphError, match=r"model\.embed_tokens\.weight has shape \[317, 192\]"):
        attach_weights(big, locations)


def test_stamping_needs_a_traced_layer() -> None:
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}), ir_version=11)
    with pytest.raises(GraphError, match="no node below /model/layers"):
        stamp_layers(empty, 2)
