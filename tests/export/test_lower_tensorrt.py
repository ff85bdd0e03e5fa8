"""The graph for TensorRT computes what the portable graph computes, on ragged batches over one cache."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import GraphError, UsageError
from qwen_rt.export.lower import graph_bytes, lowered_graph
from qwen_rt.export.passes.compute_dtype import FLOAT_TYPES, set_compute_dtype
from qwen_rt.export.passes.lower_tensorrt import HIDDEN_SCORE, lower_tensorrt
from qwen_rt.export.portable import checkpoint_locations, portable_graph
from qwen_rt.export.quantize.kv import KvPlan
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32, PORTABLE_RELATIVE

from ..cases import Zoo
from ..compare import assert_close
from .graphs import Feeds, ort_session
from .paged import Chunk, DenseModel, proto_of
from .ragged import RaggedModel, Run
from .test_lower_cuda import NANO_SHARDS, Source, nano_source, zoo_source

__all__ = ["nano_source"]  # the fixture

CAPACITY, NUM_ROWS = 80, 4
SHAPES = [
    *("heads-0.5b", "heads-1.5b", "heads-7b", "heads-72b", "mha", "odd"),
    *("one-layer", "yarn", "yarn-options", "yarn-mscale", "linear-rope"),
]
DTYPES = list(FLOAT_TYPES)


def on_ort(model: ir.Model, weights: Path) -> Run:
    """The graph on ONNX Runtime's CPU provider."""
    session = ort_session(proto_of(model).SerializeToString(), weights)
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def calls_of(vocab_size: int, num_steps: int = 3) -> list[list[Chunk]]:
    """Prefill of three rows at once with one idle, a chunk of one beside the prefill of the fourth, decode steps.

    Row 3 sits out the second decode step; row 1 is prefilled in two chunks.
    """
    lengths = {0: 23, 1: 51, 2: 1, 3: 20}
    ids = {row: np.random.default_rng(row).integers(0, vocab_size, size + num_steps) for row, size in lengths.items()}
    calls = [
        [(0, ids[0][:23]), (1, ids[1][:31]), (2, ids[2][:1])],
        [(1, ids[1][31:51]), (3, ids[3][:20])],
    ]
    fed = dict(lengths)
    for step in range(num_steps):
        rows = [2, 0, 1] if step == 1 else [2, 0, 3, 1]
        calls.append([(row, ids[row][fed[row] : fed[row] + 1]) for row in rows])
        fed |= {row: fed[row] + 1 for row in rows}
    return calls


def assert_equal(source: Source, run: Run, dtype: str = "float32", relative: float = CHUNKING_RELATIVE_FP32) -> None:
    """Logits of every call and all caches, against each sequence alone through the portable graph in float32."""
    calls = calls_of(source.spec.vocab_size)
    dense = DenseModel(source.portable(), source.weights, source.spec, CAPACITY)
    expected = [dense.call(chunks) for chunks in calls]
    for true_lengths, padding in ((False, 0), (True, 3)):
        ragged = RaggedModel(run, source.spec, NUM_ROWS, CAPACITY, dtype, true_lengths)
        for number, (chunks, logits) in enumerate(zip(calls, expected, strict=True)):
            found = ragged.call(chunks, padding)
            assert found.dtype == np.float32
            assert_close(found, logits, relative=relative, what=f"logits of call {number}, {true_lengths=}")
        for row in dense.lengths:
            for name, rows in dense.cached(row).items():
                found = ragged.cached(row)[name]
                assert_close(found.astype(np.float32), rows, relative=relative, what=f"{name} of row {row}")


def lower(source: Source, dtype: str = "float32") -> ir.Model:
    return lower_tensorrt(source.portable(), source.spec, CAPACITY, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_the_lowered_graph_equals_the_portable_one(name: str, zoo: Zoo) -> None:
    source = zoo_source(zoo, name)
    assert_equal(source, on_ort(lower(source), source.weights))


def test_nano_equals_its_portable_graph(nano_source: Source) -> None:
    assert_equal(nano_source, on_ort(lower(nano_source), NANO_SHARDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["heads-1.5b", "one-layer", "yarn-mscale", "odd"])
def test_a_narrow_graph_is_the_float32_one_with_other_dtypes(name: str, dtype: str, zoo: Zoo) -> None:
    """Widened again it equals the portable graph: stored as bfloat16, float16 and float32, with and without casts."""
    source = zoo_source(zoo, name)
    narrow = lower(source, dtype)
    assert_equal(source, on_ort(set_compute_dtype(narrow, "float32"), source.weights))


def test_float16_as_it_is(zoo: Zoo) -> None:
    """ONNX Runtime has float16 on the CPU, and no bfloat16."""
    source = zoo_source(zoo, "one-layer")
    run = on_ort(lower(source, "float16"), source.weights)
    assert_equal(source, run, "float16", PORTABLE_RELATIVE["float16"])


# ---------------------------------------------------------------- what the graph looks like


@pytest.mark.parametrize("name", ["heads-1.5b", "odd", "one-layer"])
def test_node_by_node(name: str, zoo: Zoo) -> None:
    """Stored in the dtype that it computes in, so without casts of weights."""
    source = zoo_source(zoo, name)
    dtype = Checkpoint.open(zoo.case(name).checkpoint).spec.dtype
    layers = source.spec.num_layers
    shapes = len({source.spec.num_heads, source.spec.num_kv_heads})
    wanted = Counter(
        {
            "Gemm": 7 * layers + 1,
            "RMSNormalization": 2 * layers + 1,
            "RotaryEmbedding": 2 * layers,
            "TensorScatter": 2 * layers,
            "Attention": layers,
            "Transpose": 4 * layers,
            "Reshape": 4 * layers + 1,
            "Sigmoid": layers,
            "Mul": 2 * layers + 4,  # angles, scaled cosines and sines, first tokens of rows
            "Add": 2 * layers + 3,  # positions, wanted rows, ends of what is seen
            "Gather": 3,  # embeddings; hidden state and attention of the wanted rows
            "Cast": 7 if dtype != "float32" else 1,  # positions; two cosines, two sines, mask, logits
            "Concat": shapes,
            "Unsqueeze": 5,
            "Range": 3,
            "Shape": 2,
            "Squeeze": 2,
        }
    ) + Counter(("Cos", "Sin", "Max", "Min", "Less", "Where"))
    assert Counter(node.op_type for node in lower(source, dtype).graph) == wanted


def test_each_operator_is_a_standard_one_and_every_value_is_typed(zoo: Zoo) -> None:
    model = lower(zoo_source(zoo, "yarn-mscale"), "bfloat16")
    assert model.opset_imports == {"": 24}
    for node in model.graph:
        assert node.domain == ""
        for value in node.outputs:
            assert value.dtype is not None, value.name
            assert value.shape is not None, value.name
    assert not model.graph.inputs[0].shape.is_static()  # type: ignore[union-attr]


def test_attention_reads_one_mask_and_scaled_angles(zoo: Zoo) -> None:
    source = zoo_source(zoo, "yarn-mscale")
    model = lower(source)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len({node.inputs[3] for node in attentions}) == 1
    for node in attentions:
        assert {key: attribute.value for key, attribute in node.attributes.items()} == {"scale": 1.0}
    scale = model.graph.initializers["/model/rotary_emb/query/scale"].const_value
    assert scale is not None
    wanted = source.spec.rope.attention_scaling * source.spec.head_dim**-0.5
    assert scale.numpy() == np.float32(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs(dtype: str, zoo: Zoo) -> None:
    source = zoo_source(zoo, "one-layer")
    spec, model = source.spec, lower(source, dtype)
    cache = (FLOAT_TYPES[dtype], f"[B,{spec.num_kv_heads},{CAPACITY},{spec.head_dim}]")
    i64 = ir.DataType.INT64

    def table(values: list[ir.Value]) -> dict[str | None, tuple[ir.DataType | None, str]]:
        return {value.name: (value.dtype, str(value.shape)) for value in values}

    assert table(list(model.graph.inputs)) == {
        tensors.INPUT_IDS: (i64, "[B,S]"),
        tensors.past_key(0): cache,
        tensors.past_value(0): cache,
        tensors.WRITE_INDICES: (i64, "[B]"),
        tensors.KV_LENGTHS: (i64, "[B]"),
        tensors.LOGITS_INDICES: (i64, "[B]"),
    }
    assert table(list(model.graph.outputs)) == {
        tensors.LOGITS: (ir.DataType.FLOAT, f"[B,{spec.vocab_size}]"),
        tensors.present_key(0): cache,
        tensors.present_value(0): cache,
    }


def test_weights_are_references(nano_source: Source) -> None:
    model = lower(nano_source, "bfloat16")
    names = set(nano_source.spec.parameters())
    for name, value in model.graph.initializers.items():
        assert isinstance(value.const_value, ir.ExternalTensor) == (name in names), name
        if name not in names:
            assert value.const_value is not None
            assert value.const_value.nbytes <= 4 * nano_source.spec.head_dim
    assert len(graph_bytes(model)) < 1 << 17


def test_hidden_scores_are_finite_in_their_dtype() -> None:
    for name, number in HIDDEN_SCORE.items():
        held = np.array(number, {"bfloat16": ml_dtypes.bfloat16}.get(name, name))
        assert np.isfinite(held)
        assert np.exp(np.float64(held)) == 0


@pytest.mark.parametrize("target", ENGINE_TARGETS)
@pytest.mark.parametrize("traced", DTYPES)
def test_equal_models_give_equal_graphs(target: str, traced: str, nano_source: Source) -> None:
    checkpoint = Checkpoint.open("nano")
    locations = checkpoint_locations(checkpoint)
    exported = portable_graph(checkpoint, traced, locations)
    found = lowered_graph(checkpoint, target, CAPACITY, locations, exported, dtype="float16")
    assert graph_bytes(found) == graph_bytes(lower(nano_source, "float16"))


def test_the_portable_graph_is_left_as_it_was(nano_source: Source) -> None:
    model = nano_source.portable()
    before = graph_bytes(model)
    lower_tensorrt(model, nano_source.spec, CAPACITY)
    assert graph_bytes(model) == before


def test_another_graph_is_refused(nano_source: Source) -> None:
    model = nano_source.portable()
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)
    with pytest.raises(GraphError, match="epsilon"):
        lower_tensorrt(model, nano_source.spec, CAPACITY)


def test_a_quantized_cache_is_refused(nano_source: Source) -> None:
    kv = KvPlan("int8", ())
    with pytest.raises(UsageError, match=r"kv-cache=int8 for target tensorrt; expected none.*leave out --kv-cache"):
        lower_tensorrt(nano_source.portable(), nano_source.spec, CAPACITY, kv=kv)
