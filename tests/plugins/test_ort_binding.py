"""The custom ops of ONNX Runtime, compiled for its CPU provider around a stub of the kernels: real sessions, no GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_rt import tensors
from qwen_rt.ops import OPS, POLYMORPHIC, OpTensor, PluginOp, find_op
from qwen_rt.plugins import build

from .ort_stub.kit import (
    WORKSPACE,
    Case,
    Stub,
    node,
    open_session,
    required_attributes,
    sum_of_inputs,
    untold,
)

CACHE_PAIRS = ((tensors.present_key, tensors.past_key), (tensors.present_value, tensors.past_value))


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text.strip(), "more than one line"
    return text


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_node_hands_over_its_tensors_dims_and_attributes_in_table_order(stub: Stub, op: PluginOp) -> None:
    case = Case(op, absent=untold(op))
    attributes = {name: 0.5 + i for i, (name, _) in enumerate(op.attributes)}
    session = case.open(stub, **attributes)
    before = {name: data.copy() for name, data in case.buffers.data.items()}
    case.buffers.run(session)
    call = stub.call()
    assert call["op"] == op.name
    assert call["abi"] == build.ABI
    assert call["flags"] == 0
    assert call["dims"] == case.dims
    assert call["tensors"] == case.addresses
    assert call["attributes"] == list(attributes.values())
    assert call["workspace"] == ([case.buffers.address("workspace"), 96] if op.has_workspace else [0, 0])
    total = sum_of_inputs(op, before, case)
    for i, tensor in enumerate(case.outputs):
        expected = before[tensor.name] + np.uint8(1) if tensor.alias and not tensor.may_alias else (total + i) % 256
        np.testing.assert_array_equal(case.buffers.data[tensor.name], expected, err_msg=tensor.name)


QUANTIZED = {
    "fp8": {"weight": "f8", "scale": "f32"},
    "int8": {"weight": "i8", "scale": "f32", "zero": "i8"},
    "int4": {"weight": "u8", "scale": "f16", "zero": "u8"},
    "bf16": {"weight": "bf16"},
}


@pytest.mark.parametrize("types", QUANTIZED.values(), ids=list(QUANTIZED))
@pytest.mark.parametrize(
    "op", [op for op in OPS if any(t.dtype == "weight" for t in op.inputs)], ids=lambda op: op.name
)
def test_matrices_of_every_format_reach_the_kernel(stub: Stub, op: PluginOp, types: dict[str, str]) -> None:
    """Inputs of several types in one node, optional ones of them absent."""
    dtypes = {tensor.name: types[tensor.dtype] for tensor in op.inputs if tensor.dtype in types}
    absent = [t.name for t in op.inputs if t.dtype in POLYMORPHIC and t.dtype not in types]
    absent += ["perm"] if "zero" not in types else []
    case = Case(op, absent, dtypes=dtypes)
    case.buffers.run(case.open(stub, weight_format=2, **required_attributes(op)))
    call = stub.call()
    assert call["tensors"] == case.addresses
    assert call["dims"] == case.dims
    assert call["dims"][-1] == (0 if "scale" not in types else case.buffers.shapes[scale_name(op)][1])
    assert call["attributes"][-1] == 2


def scale_name(op: PluginOp) -> str:
    return next(tensor.name for tensor in op.inputs if tensor.dtype == "scale")


@pytest.mark.parametrize("trim", [False, True], ids=["named empty", "left out"])
@pytest.mark.parametrize("op", [op for op in OPS if any(t.optional for t in op.tensors)], ids=lambda op: op.name)
def test_absent_optional_tensors_are_null(stub: Stub, op: PluginOp, trim: bool) -> None:
    case = Case(op, absent=[tensor.name for tensor in op.tensors if tensor.optional], workspace_bytes=None)
    case.buffers.run(case.open(stub, trim, **required_attributes(op)))
    call = stub.call()
    assert call["tensors"] == case.addresses
    assert 0 in call["tensors"]
    assert call["dims"] == case.dims
    assert call["workspace"] == [0, 0]


def test_a_present_tensor_behind_an_absent_one_keeps_its_place(stub: Stub) -> None:
    case = Case(find_op("rmsnorm_qkv"), absent=["q_bias", "v_bias"])
    case.buffers.run(case.open(stub, epsilon=1e-6))
    assert stub.call()["tensors"] == case.addresses
    assert stub.call()["workspace"] == [case.buffers.address("workspace"), 96]


def test_an_empty_workspace_is_none(stub: Stub) -> None:
    case = Case(find_op("lm_head"), workspace_bytes=0)
    case.buffers.run(case.open(stub, epsilon=1e-6))
    assert stub.call()["workspace"] == [0, 0]


def test_attributes_have_the_defaults_of_the_table(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"))
    case.buffers.run(case.open(stub, scale=0.125))
    assert stub.call()["attributes"] == [0.125, 1.0, 0.0, 0.0]


def test_an_integer_attribute_is_a_number(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"))
    case.buffers.run(case.open(stub, scale=2, max_length=32768))
    assert stub.call()["attributes"] == [2.0, 1.0, 32768.0, 0.0]


@pytest.mark.parametrize("op", [op for op in OPS if required_attributes(op)], ids=lambda op: op.name)
def test_a_missing_attribute_is_refused_when_the_session_is_made(stub: Stub, op: PluginOp) -> None:
    (name,) = required_attributes(op)
    with pytest.raises(Exception, match=f"{op.name}: attribute {name} is missing; expected a number") as error:
        Case(op, absent=untold(op)).open(stub)
    message_of(error)


def test_rows_may_change_from_call_to_call(stub: Stub) -> None:
    op = find_op("down_residual")
    session = Case(op).open(stub)
    for rows in (1, 40, 2):
        case = Case(op, dims={"rows": rows})
        case.buffers.run(session)
        assert stub.calls()[-1]["dims"] == [rows, *case.dims[1:]]
        assert stub.calls()[-1]["tensors"] == case.addresses


# ---- memory that is shared ----


def test_a_cache_bound_elsewhere_is_refused(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"))
    session = case.open(stub, scale=0.125)
    case.buffers.data["present_v"] = np.zeros_like(case.buffers.data["v_cache"])
    with pytest.raises(Exception, match="rope_kv_append_attention") as error:
        case.buffers.run(session)
    assert "present_v is not in the memory of v_cache; bind present_v to the memory of v_cache" in message_of(error)
    assert stub.calls() == []


def test_a_cache_that_is_not_bound_at_all_is_refused(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"))
    session = case.open(stub, scale=0.125)
    io = session.io_binding()
    for value in session.get_inputs():
        case.buffers.bind(io.bind_input, value.name)
    for value in session.get_outputs():
        io.bind_output(value.name)
    with pytest.raises(Exception, match="bind present_k to the memory of k_cache"):
        session.run_with_iobinding(io)


def test_an_output_in_place_of_an_absent_input_is_refused(stub: Stub) -> None:
    case = Case(find_op("sample"), absent=[*untold(find_op("sample")), "counts", "count_slots", "next_counts"])
    case.outputs = [tensor for tensor in find_op("sample").outputs if tensor.name not in untold(find_op("sample"))]
    counts = find_op("sample").outputs[3]
    case.buffers.tensors["next_counts"], case.buffers.shapes["next_counts"] = counts, (0, 5)
    case.buffers.data["next_counts"] = np.zeros(1, np.uint8)
    with pytest.raises(Exception, match="next_counts"):
        case.buffers.run(case.open(stub))
    assert stub.calls() == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_residual_may_be_written_in_place(stub: Stub, in_place: bool) -> None:
    case = Case(find_op("o_proj_residual"))
    if in_place:
        case.buffers.share("out", "residual")
    case.buffers.run(case.open(stub))
    call = stub.call()
    assert (call["tensors"][2] == call["tensors"][-1]) is in_place


def test_onnx_runtime_writes_a_residual_in_place_where_it_knows_the_shape(stub: Stub) -> None:
    op = find_op("down_residual")
    case = Case(op)
    x, weight, residual = op.inputs[:3]
    chain = [("residual", "inner"), ("inner", "next"), ("next", "out")]
    nodes = [node(op, ["activation", "weight", a, "", "", "", "workspace"], [b]) for a, b in chain]
    inputs = {"activation": x, "weight": weight, "residual": residual, "workspace": WORKSPACE}
    shapes = {name: (residual, ["rows", 7]) for name in ("inner", "next")}
    case.buffers.run(open_session(stub, nodes, inputs, {"out": op.outputs[0]}, shapes))
    first, second, third = (call["tensors"] for call in stub.calls())
    assert first[-1] == second[2] == second[-1] == third[2]
    assert first[2] == case.buffers.address("residual")
    assert first[-1] not in (first[2], third[-1])


def test_a_cache_goes_through_two_nodes_in_place(stub: Stub) -> None:
    op = find_op("rope_kv_append_attention")
    case = Case(op)
    names = [tensor.name for tensor in op.inputs]
    caches = ["k_cache", "v_cache", "k_scales", "v_scales"]
    second = [f"inner_{name}" if name in caches else name for name in names]
    nodes = [
        node(op, [*names, "workspace"], ["unused", *(f"inner_{name}" for name in caches)], scale=0.5),
        node(op, [*second, "workspace"], [tensor.name for tensor in op.outputs], scale=0.5),
    ]
    inputs = {tensor.name: tensor for tensor in op.inputs} | {"workspace": WORKSPACE}
    case.buffers.run(open_session(stub, nodes, inputs, {tensor.name: tensor for tensor in op.outputs}))
    pools = [case.buffers.address(name) for name in ("k_cache", "v_cache", "k_scales", "v_scales")]
    assert [call["tensors"][5:9] for call in stub.calls()] == [pools, pools]
    assert [call["tensors"][-4:] for call in stub.calls()] == [pools, pools]


@pytest.mark.parametrize("dtype", POLYMORPHIC["cache"])
def test_a_cache_of_every_type_reaches_the_kernel(stub: Stub, dtype: str) -> None:
    op = find_op("rope_kv_append_attention")
    absent = [tensor.name for tensor in op.tensors if tensor.optional] if dtype == "bf16" else []
    case = Case(op, absent, dtypes={tensor.name: dtype for tensor in op.tensors if tensor.dtype == "cache"})
    case.buffers.run(case.open(stub, scale=0.5, kv_format=1))
    assert stub.call()["tensors"] == case.addresses
    assert stub.call()["dims"] == case.dims


def test_caches_of_two_types_in_one_node_are_refused(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"), dtypes={"v_cache": "f8", "present_v": "f8"})
    with pytest.raises(Exception, match=r"Type Error|no kernel def matches|Type parameter"):
        case.open(stub, scale=0.5)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("residual", (4, 7), "down_residual: residual has rows = 4; expected 3"),
        ("perm", (6,), "down_residual: perm has ffn = 6; expected 5"),
        ("weight", (7, 5, 1), "down_residual: weight has 3 axes; expected [hidden, columns]"),
        ("activation", (15,), "down_residual: activation has 1 axes; expected [rows, ffn]"),
    ],
)
def test_wrong_shapes_are_refused(stub: Stub, name: str, shape: tuple[int, ...], message: str) -> None:
    case = Case(find_op("down_residual"))
    session = case.open(stub)
    case.buffers.shapes[name] = shape
    case.buffers.data[name] = np.zeros(4 * math.prod(shape), np.uint8)
    with pytest.raises(Exception, match="down_residual") as error:
        case.buffers.run(session)
    assert message in message_of(error)
    assert stub.calls() == []


def test_a_width_that_is_too_small_for_its_parts_is_refused(stub: Stub) -> None:
    case = Case(find_op("rope_kv_append_attention"), dims={"q_width": 0})
    rows, width = case.buffers.shapes["qkv"]
    session = case.open(stub, scale=0.5)
    case.buffers.shapes["qkv"] = (rows, width - 2)
    with pytest.raises(Exception, match="the shapes give q_width = -2; expected 0 or more"):
        case.buffers.run(session)


def test_a_bound_output_of_another_shape_is_refused(stub: Stub) -> None:
    case = Case(find_op("down_residual"))
    session = case.open(stub)
    case.buffers.shapes["out"] = (3, 8)
    case.buffers.data["out"] = np.zeros(48, np.uint8)
    with pytest.raises(Exception, match="down_residual: out: ") as error:
        case.buffers.run(session)
    assert "{3,7}" in message_of(error)


def test_an_output_of_a_size_that_no_input_tells_is_refused(stub: Stub) -> None:
    case = Case(find_op("sample"), dims={"ring": 0})
    with pytest.raises(Exception, match="sample: no input tells ring of history; leave that output out of the graph"):
        case.buffers.run(case.open(stub))


@pytest.mark.parametrize("status", [1, 2, 3], ids=["invalid", "unsupported", "driver"])
def test_what_a_kernel_refuses_reaches_the_caller_in_one_line(stub: Stub, status: int) -> None:
    case = Case(find_op("o_proj_residual"))
    session = case.open(stub)
    stub.fail("o_proj_residual", status, "rows=65; expected 1 to 64")
    with pytest.raises(Exception, match=r"o_proj_residual: rows=65; expected 1 to 64") as error:
        case.buffers.run(session)
    message_of(error)


def test_a_status_without_a_message_is_told_by_number(stub: Stub) -> None:
    case = Case(find_op("embed"))
    session = case.open(stub)
    stub.fail("embed", 3, "")
    with pytest.raises(Exception, match="embed: status 3"):
        case.buffers.run(session)


def test_a_wrong_dtype_is_refused_when_the_session_is_made(stub: Stub) -> None:
    op = find_op("embed")
    inputs = {"ids": OpTensor("ids", "i32", ("rows",)), "table": op.inputs[1]}
    with pytest.raises(Exception, match=r"Type Error|no kernel def matches"):
        open_session(stub, [node(op, ["ids", "table"], ["out"])], inputs, {"out": op.outputs[0]})
