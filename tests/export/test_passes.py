"""Every pass leaves the outputs equal: the graph before and after it, on ONNX Runtime, over caches of noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.activation import fuse_silu
from qwen_rt.export.passes.attention import fuse_group_query_attention
from qwen_rt.export.passes.compute_dtype import set_compute_dtype
from qwen_rt.export.passes.flatten import flatten_tokens
from qwen_rt.export.passes.linear import fuse_linear, pack_qkv
from qwen_rt.export.passes.lower_cpu import lower_cpu
from qwen_rt.export.passes.norm import fuse_norm
from qwen_rt.export.source import open_source
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32

from ..cases import Case, Zoo
from ..compare import assert_close
from .graphs import Feeds, all_positions, ragged_step, run_model

Pass = Callable[[ir.Model, ModelSpec], object]

LOWERING: dict[str, Pass] = {
    "compute_dtype": lambda model, _: set_compute_dtype(model, "float32"),
    "attention": lambda model, spec: fuse_group_query_attention(model, spec, 128),
    "flatten": lambda model, _: flatten_tokens(model),
    "linear": lambda model, _: fuse_linear(model),
    "pack_qkv": lambda model, _: pack_qkv(model),
    "norm": lambda model, _: fuse_norm(model),
    "activation": lambda model, _: fuse_silu(model),
}
ORDER = list(LOWERING)
NAMES = ["odd", "linear-rope", "one-layer"]  # stored as float32, bfloat16, float16: without and with casts


def load(case: Case, *passes: str) -> ir.Model:
    """The portable float32 graph of a case after some passes."""
    model = open_source(case.portable).load_graph()
    assert model is not None
    spec = spec_of(case)
    for name in passes:
        LOWERING[name](model, spec)
    return model


def spec_of(case: Case) -> ModelSpec:
    return Checkpoint.open(case.checkpoint).spec


def feeds_of(case: Case) -> dict[str, Feeds]:
    """What `lower_cpu` allows: a prefill of several rows, a ragged step of one token, a chunk of one row."""
    spec, vocab_size = spec_of(case), case.shape.vocab_size
    return {
        "prefill": all_positions(spec, case.ids[:13]),
        "decode": ragged_step(spec, vocab_size, [0, 20, 7, 15], 1, 21),
        "chunk": ragged_step(spec, vocab_size, [5], 6, 19),
    }


def assert_same_outputs(case: Case, before: ir.Model, after: ir.Model) -> None:
    assert [v.name for v in before.graph.inputs] == [v.name for v in after.graph.inputs]
    assert [v.name for v in before.graph.outputs] == [v.name for v in after.graph.outputs]
    for what, feeds in feeds_of(case).items():
        expected, actual = (run_model(model, case.checkpoint, feeds) for model in (before, after))
        for name, array in expected.items():
            found = actual[name]
            if name != tensors.LOGITS:  # rows beyond a sequence's length hold nothing that anyone reads
                seen = np.arange(array.shape[2]) < feeds[tensors.KV_LENGTHS][:, None]  # [B, Tmax]
                array, found = (np.where(seen[:, None, :, None], x, 0) for x in (array, found))
            assert_close(found, array, relative=CHUNKING_RELATIVE_FP32, cosine=1 - 1e-9, what=f"{what}: {name}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", range(len(ORDER)), ids=ORDER)
def test_a_pass_of_the_lowering_keeps_the_outputs(zoo: Zoo, name: str, step: int) -> None:
    case = zoo.case(name)
    assert_same_outputs(case, load(case, *ORDER[:step]), load(case, *ORDER[: step + 1]))


@pytest.mark.parametrize("alone", ["norm", "activation", "attention"])
def test_a_pass_alone_on_the_portable_graph_keeps_the_outputs(zoo: Zoo, alone: str) -> None:
    case = zoo.case("odd")
    assert_same_outputs(case, load(case), load(case, alone))


@pytest.mark.parametrize("name", NAMES)
def test_the_steps_above_are_lower_cpu(zoo: Zoo, name: str) -> None:
    case = zoo.case(name)
    whole = load(case)
    lower_cpu(whole, spec_of(case), 128)
    stepwise, direct = (
        ir.serde.serialize_model(m).SerializeToString(deterministic=True) for m in (load(case, *ORDER), whole)
    )
    assert stepwise == direct


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compute_dtype_widens_a_graph_that_was_traced_narrow(zoo: Zoo, dtype: str) -> None:
    case = zoo.case("tiny")
    source = open_source(case.narrow(dtype))
    narrow = source.load_graph()
    assert narrow is not None
    widened = set_compute_dtype(narrow, "float32")
    assert_same_outputs(case, load(case), widened)
    assert not any(
        node.op_type == "Cast" and node.attributes["to"].as_int() != ir.DataType.FLOAT for node in widened.graph
    )


def test_compute_dtype_refuses_to_narrow_a_float32_graph(zoo: Zoo) -> None:
    with pytest.raises(GraphError, match="float32 graph cannot become bfloat16"):
        set_compute_dtype(load(zoo.case("odd")), "bfloat16")


def test_passes_without_their_pattern_change_nothing(zoo: Zoo) -> None:
    model = load(zoo.case("odd"), *ORDER)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    for again in ("compute_dtype", "linear", "pack_qkv", "norm", "activation"):
        LOWERING[again](model, spec_of(zoo.case("odd")))
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


# ---------------------------------------------------------------- what the lowered graph looks like


def lowered(case: Case) -> ir.Model:
    model = load(case)
    return lower_cpu(model, spec_of(case), 128)


def depends_on_tokens(model: ir.Model) -> set[ir.Node]:
    """Nodes that run in every step: those that no runtime can fold at load."""
    live: set[ir.Value] = set(model.graph.inputs)
    nodes: set[ir.Node] = set()
    for node in model.graph:
        if any(value in live for value in node.inputs if value is not None):
            nodes.add(node)
            live.update(node.outputs)
    return nodes


@pytest.mark.parametrize("name", [*NAMES, "heads-0.5b", "yarn"])
def test_twelve_nodes_a_layer_run_in_a_step(zoo: Zoo, name: str) -> None:
    model = lowered(zoo.case(name))
    live = depends_on_tokens(model)
    for layer in range(zoo.case(name).shape.num_layers):
        first_norm = "SimplifiedLayerNormalization" if layer == 0 else "SkipSimplifiedLayerNormalization"
        expected = Counter({"Gemm": 5, "Reshape": 2, "GroupQueryAttention": 1, "QuickGelu": 1, "Mul": 1})
        expected.update([first_norm, "SkipSimplifiedLayerNormalization"])
        assert expected.total() == 12
        if layer == zoo.case(name).shape.num_layers - 1:
            expected["Add"] = 1  # its residual: the rows are gathered before the final norm could take it in
        found = Counter(node.op_type for node in live if str(node.name).startswith(f"/model/layers.{layer}/"))
        assert found == expected


def test_the_whole_lowered_graph_node_by_node(zoo: Zoo) -> None:
    """Stored as float32, so without casts. Concat packs q, k and v; Range to Sin make the rope tables."""
    model, layers = lowered(zoo.case("odd")), 3
    assert Counter(node.op_type for node in model.graph) == {
        "Gemm": 5 * layers + 1,
        "GroupQueryAttention": layers,
        "QuickGelu": layers,
        "Mul": layers + 3,
        "Reshape": 2 * layers + 2,
        "SkipSimplifiedLayerNormalization": 2 * layers - 1,
        "SimplifiedLayerNormalization": 2,
        "Concat": 2 * layers + 1,
        "Add": 1,
        "Gather": 1,
        "GatherND": 1,
        "Shape": 1,
        "Cast": 1,
        "Sub": 1,
        "ReduceMax": 1,
        "Range": 1,
        "Unsqueeze": 2,
        "Cos": 1,
        "Sin": 1,
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_slow_is_left(zoo: Zoo, name: str) -> None:
    kinds = {node.op_type for node in lowered(zoo.case(name)).graph}
    assert not kinds & {"MatMul", "Transpose", "TensorScatter", "Attention", "RotaryEmbedding", "RMSNormalization"}
