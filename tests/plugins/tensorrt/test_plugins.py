"""The classes of TensorRT plugins, called as TensorRT would call them, on the real base classes of TensorRT-RTX.

TensorRT-RTX has the classes and the registry but takes no plugins, so no network is built here.
"""

from __future__ import annotations

import dataclasses
import inspect
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_rt import tensors
from qwen_rt.errors import GraphError, MissingDependencyError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.ops import COUNTER_BYTES, DOMAIN, OPS, POLYMORPHIC, PluginOp, find_op
from qwen_rt.plugins.library import NO_DEPENDENT_LAUNCH
from qwen_rt.plugins.tensorrt.creator import read_fields, register, register_with, takes_plugins, unregister
from qwen_rt.plugins.tensorrt.graph import mark_plugins
from qwen_rt.plugins.tensorrt.plugin import INPUT_NAMES, OUTPUT_NAMES, NodeSettings, make_field, plugin_class
from qwen_rt.plugins.tensorrt.shapes import untold_outputs

from ..ort_stub.kit import Case, required_attributes, sum_of_inputs, untold
from .kit import ExprBuilder, Layer, Stub, compile_library, exprs, fields_of, with_exprs

pytestmark = pytest.mark.trt
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return compile_library(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(library: Stub) -> Iterator[Stub]:
    library.clear()
    yield library
    library.clear()


def absent_optional(op: PluginOp) -> list[str]:
    return [tensor.name for tensor in op.tensors if tensor.optional]


# ---------------------------------------------------------------- run


@pytest.mark.parametrize("lean", [False, True], ids=["all tensors", "no optional ones"])
@EVERY_OP
def test_a_layer_hands_over_its_tensors_dims_and_attributes_in_table_order(
    op: PluginOp, lean: bool, stub: Stub, trt: Any
) -> None:
    case = Case(op, absent=absent_optional(op) if lean else untold(op))
    attributes = {name: 0.5 + i for i, (name, _) in enumerate(op.attributes)}
    layer = Layer(trt, stub, case, **attributes)
    before = {name: data.copy() for name, data in case.buffers.data.items()}
    layer.enqueue(workspace=1 << 20, stream=77)
    call = stub.call()
    assert (call["op"], call["dims"], call["tensors"]) == (op.name, case.dims, case.addresses)
    assert (call["attributes"], call["stream"], call["flags"]) == (list(attributes.values()), 77, NO_DEPENDENT_LAUNCH)
    if op.has_workspace:
        needed = stub.workspace_bytes(op.name, case.dims)
        assert call["workspace"] == [1 << 20, needed]
        assert layer.fills == [(1 << 20, 0, COUNTER_BYTES, 77)]
    else:
        assert call["workspace"] == [0, 0]
        assert layer.fills == []
    if lean:
        return
    total = sum_of_inputs(op, before, case)
    for index, tensor in enumerate(op.outputs):
        if tensor in case.outputs:
            in_place = tensor.alias and not tensor.may_alias
            expected = before[tensor.name] + np.uint8(1) if in_place else (total + index) % 256
            np.testing.assert_array_equal(case.buffers.data[tensor.name], expected, err_msg=tensor.name)


@pytest.mark.parametrize(
    "types", [{"weight": "f8"}, {"weight": "i8", "zero": "i8"}, {"weight": "u8", "scale": "f16", "zero": "u8"}], ids=str
)
@EVERY_OP
def test_matrices_of_every_format_are_taken(op: PluginOp, types: dict[str, str], stub: Stub, trt: Any) -> None:
    dtypes = {tensor.name: types[tensor.dtype] for tensor in op.inputs if tensor.dtype in types}
    case = Case(op, untold(op), dtypes=dtypes)
    layer = Layer(trt, stub, case)
    descs = [layer.dynamic(tensor) for tensor in (*case.inputs, *case.outputs)]
    assert all(layer.plugin.supports_format_combination(i, descs, len(case.inputs)) for i in range(len(descs)))
    layer.enqueue()
    assert stub.call()["tensors"] == case.addresses


def test_what_a_launcher_refuses_is_raised(stub: Stub, trt: Any) -> None:
    layer = Layer(trt, stub, Case(find_op("embed")))
    stub.fail("embed", 2, "no kernel for this shape")
    with pytest.raises(UnsupportedModelError, match="embed: no kernel for this shape"):
        layer.enqueue()


# ---------------------------------------------------------------- build


@EVERY_OP
def test_output_shapes_and_dtypes(op: PluginOp, stub: Stub, trt: Any) -> None:
    case = Case(op, absent=untold(op))
    layer = Layer(with_exprs(trt), stub, case)
    shapes = layer.plugin.get_output_shapes(
        [exprs(case.buffers.shapes[tensor.name]) for tensor in case.inputs], [], ExprBuilder(trt)
    )
    assert [[size.value for size in shape] for shape in shapes] == [
        list(case.buffers.shapes[tensor.name]) for tensor in case.outputs
    ]
    types = layer.plugin.get_output_data_types([layer.describe(tensor).type for tensor in case.inputs])
    assert types == [layer.describe(tensor).type for tensor in case.outputs]
    assert layer.plugin.num_outputs == len(case.outputs)


@EVERY_OP
def test_what_is_in_place_is_told(op: PluginOp, stub: Stub, trt: Any) -> None:
    case = Case(op, absent=untold(op))
    plugin = Layer(trt, stub, case).plugin
    names = [tensor.name for tensor in case.inputs]
    for index, tensor in enumerate(case.outputs):
        wanted = -1 if tensor.alias is None or tensor.may_alias else names.index(tensor.alias)
        assert plugin.get_aliased_input(index) == wanted


@EVERY_OP
def test_other_formats_and_dtypes_are_not_supported(op: PluginOp, stub: Stub, trt: Any) -> None:
    case = Case(op, absent=untold(op))
    layer = Layer(trt, stub, case)
    given = [*case.inputs, *case.outputs]
    for index in range(len(given)):
        descs = [layer.dynamic(one) for one in given]
        descs[index].desc.format = trt.TensorFormat.CHW32
        assert not layer.plugin.supports_format_combination(index, descs, len(case.inputs))
        descs[index].desc.format = trt.TensorFormat.LINEAR
        assert layer.plugin.supports_format_combination(index, descs, len(case.inputs))
        descs[index].desc.type = trt.DataType.BOOL
        assert not layer.plugin.supports_format_combination(index, descs, len(case.inputs))


def test_matrices_of_a_node_are_alike(stub: Stub, trt: Any) -> None:
    case = Case(find_op("rmsnorm_qkv"), untold(find_op("rmsnorm_qkv")))
    layer = Layer(trt, stub, case)
    descs = [layer.dynamic(tensor) for tensor in (*case.inputs, *case.outputs)]
    matrices = [i for i, tensor in enumerate(case.inputs) if tensor.name.endswith("_weight") and i > 1]
    descs[matrices[1]].desc.type = trt.DataType.INT8
    supported = [layer.plugin.supports_format_combination(i, descs, len(case.inputs)) for i in matrices]
    assert supported == [True, False, True]


def test_the_workspace_is_the_most_that_fewer_rows_want(stub: Stub, trt: Any) -> None:
    for op in OPS:
        case = Case(op, absent=untold(op))
        layer = Layer(trt, stub, case)
        descs = [layer.dynamic(tensor) for tensor in case.inputs]
        layer.plugin.configure_plugin(descs, [])
        wanted = 65536 + (4096 if case.dims[0] >= 3 and op.dims[0] == "rows" else 256)
        assert layer.plugin.get_workspace_size(descs, []) == (wanted if op.has_workspace else 0)


def test_shapes_that_contradict_each_other_are_refused(stub: Stub, trt: Any) -> None:
    case = Case(find_op("down_residual"), untold(find_op("down_residual")))
    layer = Layer(trt, stub, case)
    descs = [layer.dynamic(tensor) for tensor in case.inputs]
    residual = [tensor.name for tensor in case.inputs].index("residual")
    descs[residual].max = trt.Dims((1, 1))
    with pytest.raises(UsageError, match="down_residual"):
        layer.plugin.configure_plugin(descs, [])
    narrow = Layer(with_exprs(trt), stub, case)
    with pytest.raises(UsageError, match="has 1 axes"):
        narrow.plugin.get_output_shapes([exprs((1,)) for _ in case.inputs], [], ExprBuilder(trt))


@EVERY_OP
def test_every_method_is_one_of_tensorrt(op: PluginOp, stub: Stub, trt: Any) -> None:
    """A method under another name would never be called; required ones must be there."""
    made = plugin_class(trt, op, stub, lambda *arguments: None)
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    own = {name for name, value in vars(made).items() if inspect.isfunction(value) and not name.startswith("_")}
    known = {name for base in bases for name in dir(base)}
    assert own <= known
    assert {
        "clone", "get_capability_interface", "get_output_data_types", "get_output_shapes", "enqueue",
        "supports_format_combination", "configure_plugin", "on_shape_change", "attach_to_context",
        "get_fields_to_serialize",
    } <= own  # fmt: skip
    assert made.__name__ == {"lm_head": "LmHeadPlugin", "embed": "EmbedPlugin"}.get(op.name, made.__name__)


# ---------------------------------------------------------------- fields


def test_settings_come_back_from_their_fields() -> None:
    op = find_op("rmsnorm_qkv")
    settings = NodeSettings.from_fields(op, fields_of(op, Case(op, ["k_bias", "perm"]), weight_format=2))
    assert NodeSettings.from_fields(op, settings.fields()) == settings
    lean = NodeSettings.from_fields(op, {"epsilon": 1e-6})
    assert all(not tensor.optional for tensor in (*lean.inputs, *lean.outputs))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lm_head", {}, "field epsilon is missing"),
        ("lm_head", {"epsilon": "small"}, "field epsilon is a text"),
        ("lm_head", {"epsilon": 1e-6, "eps": 1.0}, "field 'eps'"),
        ("embed", {INPUT_NAMES: "table,ids"}, "names in the order of"),
        ("embed", {INPUT_NAMES: "ids,table,perm"}, "names in the order of"),
        ("embed", {INPUT_NAMES: "ids"}, "embed lacks table"),
        ("sample", {OUTPUT_NAMES: "next_ids,history"}, "output history"),
    ],
)
def test_nodes_that_cannot_be(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NodeSettings.from_fields(find_op(name), fields)


def test_outputs_that_no_input_tells() -> None:
    assert {op.name: untold_outputs(op) for op in OPS if untold_outputs(op)} == {
        "sample": ("history", "logprobs", "top_ids", "top_logprobs")
    }


# ---------------------------------------------------------------- creators


def test_creators_in_the_real_registry(stub: Stub, trt: Any) -> None:
    registry = trt.get_plugin_registry()
    creators = register_with(registry, trt, stub, lambda *arguments: None)
    try:
        assert [creator.name for creator in creators] == [op.name for op in OPS]
        with pytest.raises(QwenRtError, match="a plugin embed of version 2 is registered already"):
            register_with(registry, trt, stub, lambda *arguments: None)
        for op in OPS:
            creator = registry.get_creator(op.name, str(op.version), DOMAIN)
            named = [field.name for field in creator.field_names]
            assert named == [INPUT_NAMES, OUTPUT_NAMES, *(name for name, _ in op.attributes)]
            case = Case(op, absent=untold(op))
            kept = [make_field(trt, name, value) for name, value in fields_of(op, case).items()]
            kept.append(make_field(trt, "plugin_version", str(op.version)))  # as the ONNX parser does
            made = creator.create_plugin("/node", trt.PluginFieldCollection(kept), trt.TensorRTPhase.BUILD)
            assert (made.plugin_name, made.plugin_version, made.plugin_namespace) == (op.name, str(op.version), DOMAIN)
            assert made.get_capability_interface(trt.PluginCapabilityType.BUILD) is made
            # An engine keeps the fields and hands them to the creator again.
            again = creator.create_plugin("/node", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
            assert rounded(again.settings) == rounded(made.settings)
            assert made.attach_to_context(None).settings == made.clone().settings == made.settings
    finally:
        unregister(registry, creators)
    assert all(registry.get_creator(op.name, str(op.version), DOMAIN) is None for op in OPS)


def rounded(settings: NodeSettings) -> NodeSettings:
    """Fields of numbers are float32."""
    return dataclasses.replace(settings, attributes=tuple(float(np.float32(x)) for x in settings.attributes))


def test_fields_are_read_as_they_are_written(trt: Any) -> None:
    given = {INPUT_NAMES: "ids,table", "scale": 0.5, OUTPUT_NAMES: ""}
    fields = [make_field(trt, name, value) for name, value in given.items() if value != ""]
    assert read_fields(trt, trt.PluginFieldCollection(fields)) == {INPUT_NAMES: "ids,table", "scale": 0.5}


def test_tensorrt_rtx_is_never_given_creators(stub: Stub, trt: Any) -> None:
    """Its ONNX parser ends the process when a node names one."""
    assert not takes_plugins(trt)
    with pytest.raises(MissingDependencyError, match=r"tensorrt_rtx .* takes no plugins; expected the full TensorRT"):
        register(trt, stub, lambda *arguments: None)
    assert DOMAIN not in {creator.plugin_namespace for creator in trt.get_plugin_registry().all_creators}


PARSE = """
import resource
import onnx, tensorrt_rtx as trt
from onnx import helper
from qwen_rt.plugins.tensorrt import creator
from qwen_rt.plugins.tensorrt.graph import mark_plugins
from qwen_rt.plugins.tensorrt.plugin import NodeSettings

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
made = NodeSettings.from_fields
def show(op, fields):
    print(op.name, sorted(fields.items()), flush=True)
    return made(op, fields)
creator.NodeSettings.from_fields = show
class Library:
    launch = workspace_bytes = None
kept = creator.register_with(trt.get_plugin_registry(), trt, Library(), None)
node = helper.make_node("embed", ["ids", "table", "", ], ["out"], "/embed", domain="qwen_rt", weight_format=1.0)
values = [helper.make_tensor_value_info(n, t, s) for n, t, s in (("ids", 7, ["R"]), ("table", 16, [9, 8]))]
out = helper.make_tensor_value_info("out", 16, ["R", 8])
opsets = [helper.make_opsetid("", 23), helper.make_opsetid("qwen_rt", 1)]
model = helper.make_model(helper.make_graph([node], "g", values, [out]), opset_imports=opsets, ir_version=11)
mark_plugins(model)
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(0)
trt.OnnxParser(network, log).parse(model.SerializeToString())
"""


@pytest.mark.usefixtures("trt")
def test_the_real_parser_finds_the_creator_and_hands_it_the_node_s_fields() -> None:
    """In a process of its own, which TensorRT-RTX ends when it gets the plugin."""
    done = subprocess.run([sys.executable, "-c", PARSE], capture_output=True, text=True, check=False, timeout=120)
    expected = [(INPUT_NAMES, "ids,table"), (OUTPUT_NAMES, "out"), ("weight_format", 1.0)]
    assert f"embed {expected}" in done.stdout, done.stderr
    assert done.returncode == -signal.SIGABRT, "it takes plugins now: let `takes_plugins` say so"


# ---------------------------------------------------------------- graphs


def test_a_lowered_graph_is_made_ready_for_the_parser(nano_portable: Path) -> None:
    import onnx_ir as ir

    from qwen_rt.checkpoint import Checkpoint
    from qwen_rt.export.passes.lower_cuda import lower_cuda
    from qwen_rt.export.source import open_source

    model = open_source(nano_portable).load_graph()
    assert model is not None
    proto: onnx.ModelProto = ir.serde.serialize_model(lower_cuda(model, Checkpoint.open("nano").spec, 256))
    mark_plugins(proto)
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    assert len(nodes) == 1 + 4 * 5 + 1
    assert tensors.WORKSPACE not in {name for node in nodes for name in node.input}
    assert tensors.WORKSPACE not in {value.name for value in proto.graph.input}
    for node in nodes:
        given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        version, namespace = given.pop("plugin_version"), given.pop("plugin_namespace")
        assert (version.decode(), namespace.decode()) == (str(find_op(node.op_type).version), DOMAIN)
        texts = {name: value.decode() if isinstance(value, bytes) else value for name, value in given.items()}
        settings = NodeSettings.from_fields(find_op(node.op_type), texts)
        assert (len(settings.inputs), len(settings.outputs)) == (len(node.input), len(node.output))
        assert all(node.input)
        assert not {tensor.dtype for tensor in settings.inputs} & set(POLYMORPHIC) - {"weight", "cache"}


def test_a_node_with_more_tensors_than_its_op() -> None:
    node = onnx.helper.make_node("embed", ["a", "b", "c", "d"], ["e"], domain=DOMAIN)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(GraphError, match="has 4 inputs; expected at most 3"):
        mark_plugins(model)


def test_required_attributes_are_those_without_a_default() -> None:
    assert set(required_attributes(find_op("rope_kv_append_attention"))) == {"scale"}
