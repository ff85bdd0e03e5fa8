"""Bundles of target `cuda`: what is in the folder, and the graph's contract with the op table and `qwen_rt.tensors`."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from qwen_rt import tensors
from qwen_rt.bundle import GRAPH_FILE, Bundle
from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.errors import BundleError, GraphError, UnsupportedModelError, UsageError
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.export.lower import cuda_graph_bytes, graph_bytes, lowered_graph
from qwen_rt.export.passes.lower_cuda import LAST_O_PROJ, LAYER_OPS, check_cuda_shapes, lower_cuda
from qwen_rt.export.portable import checkpoint_locations
from qwen_rt.export.source import open_source
from qwen_rt.export.stamp import stamp_layers
from qwen_rt.export.trace import trace_single_layer
from qwen_rt.inspection import inspect
from qwen_rt.ops import BLOCK_SIZE, DOMAIN, POLYMORPHIC, WEIGHT_FORMATS, find_op, shape_of
from qwen_rt.runtime.session import CpuSession
from qwen_rt.safetensors_header import read_header
from qwen_rt.spec import ModelSpec

from ..cases import Zoo
from ..cli.kit import NANO_FOLDER, SHARDS, contents, copy_graph_of, copy_nano, names, rehash, shared_bundle
from .test_graph_contract import QWEN2_72B

TYPES = {
    "bf16": onnx.TensorProto.BFLOAT16,
    "f32": onnx.TensorProto.FLOAT,
    "i32": onnx.TensorProto.INT32,
    "i64": onnx.TensorProto.INT64,
}
SIZES = {"R": 11, "B": 3, "B + 1": 4, "max_blocks": 5, "blocks": 7, "W": 13}
"""A size for each symbolic dimension, all different."""


def cuda(**fields: Any) -> BuildOptions:
    return BuildOptions(target="cuda", quiet=True, **fields)


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load_model(str(folder / GRAPH_FILE), load_external_data=False)


@pytest.fixture(scope="module")
def linked(nano_portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of nano, weights in the checkpoint; no test may change it."""
    folder = tmp_path_factory.mktemp("cuda") / "nano-gpu"
    build(nano_portable, folder, cuda(max_length=1000))
    return folder


@pytest.fixture(scope="module")
def models(linked: Path, zoo: Zoo) -> dict[str, tuple[onnx.ModelProto, ModelSpec]]:
    """Tied with the default rope, untied with YaRN; both stored as bfloat16."""
    yarn = Checkpoint.open(zoo.case("yarn").checkpoint)
    exported = open_source(zoo.case("yarn").portable).load_graph()
    model = lowered_graph(yarn, "cuda", 128, checkpoint_locations(yarn), exported)
    return {
        "nano": (graph_of(linked), Checkpoint.open("nano").spec),
        "yarn": (onnx.load_model_from_string(graph_bytes(model)), yarn.spec),
    }


# ---------------------------------------------------------------- the graph


def edge(values: Any) -> list[tuple[str, int, tuple[int | str, ...]]]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)))
    return found


@pytest.mark.parametrize("name", ["nano", "yarn"])
def test_inputs_and_outputs_are_those_of_the_table(name: str, models: dict[str, Any]) -> None:
    model, spec = models[name]
    i32, i64, bf16 = TYPES["i32"], TYPES["i64"], TYPES["bf16"]
    cache = (bf16, ("blocks", spec.num_kv_heads, BLOCK_SIZE, spec.head_dim))
    layers = range(spec.num_layers)
    assert edge(model.graph.input) == [
        (tensors.INPUT_IDS, i64, ("R",)),
        (tensors.POSITIONS, i64, ("R",)),
        (tensors.QUERY_STARTS, i32, ("B + 1",)),
        (tensors.BLOCK_TABLES, i32, ("B", "max_blocks")),
        (tensors.LOGITS_INDICES, i64, ("B",)),
        (tensors.WORKSPACE, onnx.TensorProto.UINT8, ("W",)),
        *((past(i), *cache) for i in layers for past in (tensors.past_key, tensors.past_value)),
    ]
    assert edge(model.graph.output) == [
        (tensors.LOGITS, TYPES["f32"], ("B", spec.vocab_size)),
        *((present(i), *cache) for i in layers for present in (tensors.present_key, tensors.present_value)),
    ]


@pytest.mark.parametrize("name", ["nano", "yarn"])
def test_every_node_is_as_the_op_table_says(name: str, models: dict[str, Any]) -> None:
    """Inputs in order, the workspace last, dtypes, ranks, and shapes that agree with each other through the op."""
    model, _ = models[name]
    graph = model.graph
    known: dict[str, tuple[int, tuple[int, ...]]] = {
        value: (dtype, tuple(SIZES.get(str(dim), dim) for dim in shape))  # type: ignore[misc]
        for value, dtype, shape in edge([*graph.input, *graph.output, *graph.value_info])
    }
    known |= {value.name: (value.data_type, tuple(value.dims)) for value in graph.initializer}
    for node in graph.node:
        op = find_op(node.op_type)
        assert node.domain == DOMAIN
        assert len(node.input) == len(op.inputs) + op.has_workspace
        assert not op.has_workspace or node.input[-1] == tensors.WORKSPACE
        absent = [""] * (len(op.outputs) - len(node.output))  # at the end they are left out
        shapes = {}
        for tensor, value in zip(op.tensors, [*node.input[: len(op.inputs)], *node.output, *absent], strict=True):
            if not value:
                assert tensor.optional, f"{node.name}: {tensor.name}"
                continue
            dtype, shape = known[value]
            allowed = [TYPES[kind] for kind in POLYMORPHIC.get(tensor.dtype, (tensor.dtype,)) if kind in TYPES]
            assert dtype in allowed, f"{node.name}: {tensor.name}"
            assert len(shape) == len(tensor.shape), f"{node.name}: {tensor.name}"
            shapes[tensor.name] = shape
        dims = dict(zip(op.dims, op.dims_of(shapes), strict=True))
        assert all(value for dim, value in dims.items() if dim not in ("groups", "scale_blocks")), node.name
        for tensor in op.outputs:
            if tensor.name not in shapes:
                continue
            assert shape_of(tensor.shape, dims) == shapes[tensor.name], f"{node.name}: {tensor.name}"
        assert [attribute.name for attribute in node.attribute] == [key for key, _ in op.attributes]
        assert {attribute.type for attribute in node.attribute} <= {onnx.AttributeProto.FLOAT}


@pytest.mark.parametrize("name", ["nano", "yarn"])
def test_attributes_and_constants_are_those_of_the_model(name: str, models: dict[str, Any]) -> None:
    model, spec = models[name]
    max_length = {"nano": 1000, "yarn": 128}[name]
    wanted = {
        "epsilon": spec.rms_norm_eps,
        "scale": spec.head_dim**-0.5,
        "rope_scaling": spec.rope.attention_scaling,
        "max_length": max_length,
        "weight_format": 0,
        "kv_format": 0,
    }
    assert name != "yarn" or spec.rope.attention_scaling > 1.1
    found: Counter[str] = Counter()
    for node in model.graph.node:
        for attribute in node.attribute:
            assert attribute.f == np.float32(wanted[attribute.name]), f"{node.name}: {attribute.name}"
            found[attribute.name] += 1
    layers = spec.num_layers
    of_attention = dict.fromkeys(("scale", "rope_scaling", "max_length", "kv_format"), layers)
    assert found == {"epsilon": 2 * layers + 1, "weight_format": 4 * layers + 2, **of_attention}
    inside = [i for i in model.graph.initializer if i.data_location != onnx.TensorProto.EXTERNAL]
    assert [i.name for i in inside] == ["/model/rotary_emb/inv_freq"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(inside[0]), spec.rope.inv_freq(spec.head_dim))


@pytest.mark.parametrize("name", ["nano", "yarn"])
def test_nodes_follow_the_module_paths_and_are_chained(name: str, models: dict[str, Any]) -> None:
    model, spec = models[name]
    modules = ("self_attn", "self_attn", "self_attn", "mlp", "mlp")
    last_ops = tuple(LAST_O_PROJ if op == "o_proj_residual" else op for op in LAYER_OPS)
    layers = [
        f"/model/layers.{layer}/{module}/{op}"
        for layer in range(spec.num_layers)
        for module, op in zip(modules, last_ops if layer == spec.num_layers - 1 else LAYER_OPS, strict=True)
    ]
    nodes = list(model.graph.node)
    assert [node.name for node in nodes] == ["/model/embed_tokens/embed", *layers, "/lm_head/lm_head"]
    stream = nodes[0].output[0]
    for index in range(1, len(nodes) - 1, 5):
        qkv, attention, o_proj, gate_up, down = nodes[index : index + 5]
        assert (qkv.input[0], o_proj.input[3 if o_proj.op_type == LAST_O_PROJ else 2]) == (stream, stream)
        assert (attention.input[0], o_proj.input[0]) == (qkv.output[0], attention.output[0])
        assert (gate_up.input[0], down.input[2]) == (o_proj.output[0], o_proj.output[0])
        assert down.input[0] == gate_up.output[0]
        stream = down.output[0]
    assert nodes[-1].input[0] == stream
    head = "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
    assert nodes[-1].input[2] == head


@pytest.mark.parametrize("name", ["nano", "yarn"])
def test_the_checker_accepts_it(name: str, models: dict[str, Any], zoo: Zoo, tmp_path: Path) -> None:
    model, _ = models[name]
    for shard in (NANO_FOLDER if name == "nano" else zoo.case(name).checkpoint).glob("*.safetensors"):
        shutil.copy(shard, tmp_path)  # beside the graph, where the checker looks for them
    onnx.save(model, str(tmp_path / "graph.onnx"))
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 24), (DOMAIN, 1)}
    assert model.ir_version == 11
    assert not model.functions


def test_weights_are_references_in_the_stored_layout(linked: Path) -> None:
    checkpoint = Checkpoint.open("nano")
    external = {i.name: i for i in graph_of(linked).graph.initializer if i.name in checkpoint.spec.parameters()}
    assert set(external) == set(checkpoint.spec.parameters())
    for name, initializer in external.items():
        ref = checkpoint.tensors[name]
        entries = {entry.key: entry.value for entry in initializer.external_data}
        found = (entries["location"], int(entries["offset"]), int(entries["length"]))
        assert found == (ref.path.name, ref.offset, ref.nbytes)
        assert (initializer.data_type, tuple(initializer.dims)) == (TYPES["bf16"], ref.shape)


# ---------------------------------------------------------------- the folder


def test_the_manifest_says_what_the_graph_computes(linked: Path) -> None:
    manifest = Bundle.open(linked, "full").manifest
    assert (manifest.target, manifest.precision, manifest.max_length) == ("cuda", "bf16", 1000)
    assert manifest.compute_dtype == manifest.kv_dtype == "bfloat16"
    assert set(manifest.checkpoint.shards) == set(SHARDS)
    assert not any(name.endswith(".safetensors") for name in manifest.files)
    assert manifest.model == Checkpoint.open("nano").spec


def test_a_bundle_is_the_same_whatever_it_is_built_from(linked: Path, nano_portable: Path, tmp_path: Path) -> None:
    build(nano_portable, tmp_path / "float32 graph", BuildOptions(target="portable", dtype="float32", quiet=True))
    build("nano", tmp_path / "checkpoint", cuda(max_length=1000))
    build(tmp_path / "float32 graph", tmp_path / "wide", cuda(max_length=1000, precision="bf16"))
    for name in ("checkpoint", "wide"):
        assert contents(tmp_path / name) == contents(linked)


def test_weights_of_another_dtype_are_converted(zoo: Zoo, tmp_path: Path) -> None:
    case = zoo.case("mha")
    manifest = build(case.portable, tmp_path / "out", cuda())
    assert (manifest.precision, manifest.checkpoint.shards) == ("bf16", {})
    own = sorted((tmp_path / "out" / "graph").glob("*.safetensors"))
    stored = Checkpoint.open(tmp_path / "out", own)
    for name, array in case.weights.items():
        assert stored.tensors[name].dtype == "BF16"
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(to_float32(stored.tensors[name], stored.read(name)), rounded)
    external = {i.name for i in graph_of(tmp_path / "out").graph.initializer if i.external_data}
    assert external == set(case.weights)
    onnx.load(str(tmp_path / "out" / GRAPH_FILE))  # every reference leads to bytes


def test_self_contained_bundles_hold_their_weights(nano_portable: Path, tmp_path: Path) -> None:
    build(nano_portable, tmp_path / "out", cuda(self_contained=True))
    manifest = Bundle.open(tmp_path / "out", "full").manifest
    assert manifest.checkpoint.shards == {}
    assert {f"graph/{name}" for name in SHARDS} <= set(manifest.files)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_are_refused(precision: str, nano_portable: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"precision={precision} for target cuda; expected bf16, .*; leave out"):
        build(nano_portable, tmp_path / "out", cuda(precision=precision))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("odd", r"intermediate_size=231 for target cuda; expected a multiple of 64; build with --target cpu"),
        ("heads-0.5b", r"intermediate_size=608 for target cuda"),
    ],
)
def test_shapes_that_the_kernels_do_not_take_are_refused(shape: str, message: str, zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build(zoo.case(shape).checkpoint, tmp_path / "out", cuda())
    assert names(tmp_path) == set()


def test_released_shapes_are_taken_and_others_are_not() -> None:
    check_cuda_shapes(QWEN2_72B)
    fields = QWEN2_72B.to_dict()
    for changes, message in (
        ({"head_dim": 96}, "head_dim=96"),
        ({"num_heads": 64, "num_kv_heads": 2}, "32 heads on each key/value head"),
        ({"hidden_size": 8200}, "hidden_size=8200"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            check_cuda_shapes(ModelSpec.from_dict(fields | changes))


def test_the_cpu_session_refuses_it(linked: Path) -> None:
    with pytest.raises(BundleError, match="has target cuda; expected a bundle of target cpu"):
        CpuSession(Bundle.open(linked))


def test_a_bundle_is_no_source(linked: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is a bundle of target cuda; expected a checkpoint or a portable graph"):
        build(linked, tmp_path / "out", cuda())


def test_inspect_tells_of_it(linked: Path) -> None:
    found = inspect(linked)
    assert found.kind == "bundle"
    assert found.facts["target"] == "cuda (NVIDIA GPU of compute capability 8.0 or newer), tensor parallel 1"
    assert found.facts["computes in"] == "bfloat16"
    assert found.facts["KV cache"] == "bfloat16, 4.1 kB a token, 4.1 MB for 1000 tokens, in blocks of 64"
    counts = dict.fromkeys(LAYER_OPS, 4) | {"o_proj_residual": 3, LAST_O_PROJ: 1, "embed": 1, "lm_head": 1}
    assert found.operators == counts
    assert [row.num_nodes for row in found.layers] == [2, 5, 5, 5, 5]
    assert [row.dtypes for row in found.layers] == [{"BF16"}] * 5
    assert "in blocks of" not in inspect(shared_bundle()).facts["KV cache"]


# ---------------------------------------------------------------- the graph alone


def test_the_graph_alone_is_that_of_the_bundle_and_reads_no_weight(linked: Path, tmp_path: Path) -> None:
    """From shards that are a header and a hole: nothing looks at their bytes."""
    sparse = copy_nano(tmp_path / "sparse")
    for shard in SHARDS:
        header = read_header(NANO_FOLDER / shard)
        start = min(ref.offset for ref in header.tensors.values())
        with (sparse / shard).open("r+b") as file:
            file.truncate(start)
            file.truncate(header.nbytes)
    assert cuda_graph_bytes(Checkpoint.open(sparse), 1000) == (linked / GRAPH_FILE).read_bytes()


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_a_graph_of_quantized_weights_without_their_file(precision: str) -> None:
    """What a loader that makes weights up needs: names, types, shapes, and sizes of the parts."""
    checkpoint = Checkpoint.open("nano")
    model = onnx.load_from_string(cuda_graph_bytes(checkpoint, 64, precision=precision))
    parts = [i for i in model.graph.initializer if "_proj.weight" in i.name]
    assert len(parts) == 2 * 7 * checkpoint.spec.num_layers, "numbers and scales of every matrix"
    places = [{entry.key: entry.value for entry in part.external_data} for part in parts]
    assert {place["location"] for place in places} == {"quantized.safetensors"}
    ends = sorted((int(place["offset"]), int(place["length"])) for place in places)
    assert all(start + size == following for (start, size), (following, _) in itertools.pairwise(ends))
    formats = {a.f for node in model.graph.node for a in node.attribute if a.name == "weight_format"}
    assert formats == {0.0, float(WEIGHT_FORMATS[precision])}


def test_the_graph_alone_refuses_what_it_cannot_refer_to(zoo: Zoo) -> None:
    with pytest.raises(GraphError, match="stored as FLOAT; expected BFLOAT16; build with --precision bf16"):
        cuda_graph_bytes(Checkpoint.open(zoo.case("mha").checkpoint), 64)
    with pytest.raises(UnsupportedModelError, match="intermediate_size=231"):
        cuda_graph_bytes(Checkpoint.open(zoo.case("odd").checkpoint), 64)


def test_a_portable_graph_that_was_changed_is_refused(tmp_path: Path) -> None:
    """On disk, under a manifest that was made to agree: the build ends in one line and leaves nothing."""
    portable = copy_graph_of(copy_nano(tmp_path / "checkpoint"), tmp_path / "portable")
    model = onnx.load_model(str(portable / GRAPH_FILE), load_external_data=False)
    norm = next(node for node in model.graph.node if node.name == "/model/norm/RMSNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-3
    (portable / GRAPH_FILE).write_bytes(model.SerializeToString())
    rehash(portable, GRAPH_FILE)
    before = names(tmp_path)
    with pytest.raises(GraphError, match=r"/model/norm/RMSNormalization: epsilon=0\.001"):
        build(portable, tmp_path / "out", cuda())
    assert names(tmp_path) == before


def test_a_72b_sized_graph_is_made_without_a_weight() -> None:
    model = stamp_layers(trace_single_layer(QWEN2_72B, "bfloat16"), QWEN2_72B.num_layers)
    lowered = lower_cuda(model, QWEN2_72B, 32768)
    assert len(lowered.graph) == 2 + 5 * 80
    weights = {name: tuple(v.shape or ()) for name, v in lowered.graph.initializers.items() if v.const_value is None}
    assert weights == QWEN2_72B.parameters()
