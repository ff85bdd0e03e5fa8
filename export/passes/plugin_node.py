"""Nodes of the plugin ops, made from the table in `qwen_rt.ops`: inputs in its order, attributes of its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qwen_rt.errors import GraphError
from qwen_rt.ops import DOMAIN, POLYMORPHIC, OpTensor, find_op

__all__ = ["ALLOWED", "DTYPES", "OPSET_VERSION", "plugin_node"]

OPSET_VERSION = 1
"""Of the domain `qwen_rt` in every graph. The ops have versions of their own, checked when their library is loaded."""

DTYPES = {
    "bf16": ir.DataType.BFLOAT16,
    "f32": ir.DataType.FLOAT,
    "f16": ir.DataType.FLOAT16,
    "f8": ir.DataType.FLOAT8E4M3FN,
    "i8": ir.DataType.INT8,
    "u8": ir.DataType.UINT8,
    "i32": ir.DataType.INT32,
    "i64": ir.DataType.INT64,
}
"""Dtype in the table → dtype in a graph."""

ALLOWED: dict[str, tuple[ir.DataType, ...]] = {name: (dtype,) for name, dtype in DTYPES.items()} | {
    kind: tuple(DTYPES[name] for name in names) for kind, names in POLYMORPHIC.items()
}
"""Dtype in the table, or a kind that stands for several → dtypes that an input may have."""

Shape = Sequence[int | str]


def plugin_node(
    op_name: str,
    path: str,
    inputs: Mapping[str, ir.Value],
    output_shapes: Sequence[Shape],
    workspace: ir.Value,
    attributes: Mapping[str, float] | None = None,
) -> ir.Node:
    """Make a node of a plugin op.

    Args:
        op_name: Which op.
        path: Name of the module that it belongs to (`/model/layers.0/mlp`).
        inputs: Name in the table → value; optional ones may be left out.
        output_shapes: Of each output; a dimension is a number or a name. Optional outputs at the end may be left out.
        workspace: uint8[W], handed to the ops that want one.
        attributes: Name in the table → value; those with a default may be left out and are written all the same.

    Returns:
        The node `{path}/{op_name}`; outputs have dtypes and shapes and are named `{node}/{output}`. One whose dtype in
        the table stands for several has that of the input whose memory it shares.

    Raises:
        GraphError: An input or attribute is missing, unknown, or of another dtype or rank than the table says.
    """
    op = find_op(op_name)
    name = f"{path}/{op.name}"
    given = dict(attributes or {})
    known = {tensor.name for tensor in op.inputs}
    wrong = [key for key in inputs if key not in known] + [key for key in given if key not in dict(op.attributes)]
    if wrong:
        raise GraphError(f"{name} was given {wrong[0]}", f"what op {op.name} takes")
    values = [_checked(name, tensor, inputs.get(tensor.name)) for tensor in op.inputs]
    if op.has_workspace:
        values.append(workspace)
    numbers = []
    for key, default in op.attributes:
        number = given.get(key, default)
        if number is None:
            raise GraphError(f"{name} lacks attribute {key}", "a number")
        numbers.append(ir.AttrFloat32(key, float(number)))
    wanted, absent = op.outputs[: len(output_shapes)], op.outputs[len(output_shapes) :]
    if not all(tensor.optional for tensor in absent):
        raise GraphError(f"{name} was given {len(output_shapes)} shapes", f"one for each output of op {op.name}")
    node = ir.Node(DOMAIN, op.name, values, numbers, num_outputs=len(wanted), name=name)
    for tensor, output, shape in zip(wanted, node.outputs, output_shapes, strict=True):
        dtype = DTYPES[tensor.dtype] if tensor.dtype in DTYPES else inputs[str(tensor.alias)].dtype
        output.name, output.type, output.shape = f"{name}/{tensor.name}", _tensor_type(dtype), ir.Shape(shape)
    return node


def _tensor_type(dtype: ir.DataType | None) -> ir.TensorType:
    return ir.TensorType(ir.DataType.UNDEFINED if dtype is None else dtype)


def _checked(name: str, tensor: OpTensor, value: ir.Value | None) -> ir.Value | None:
    if value is None:
        if not tensor.optional:
            raise GraphError(f"{name} lacks input {tensor.name}", f"{tensor.dtype}[{', '.join(tensor.shape)}]")
        return None
    allowed = ALLOWED[tensor.dtype]
    if value.dtype not in allowed or value.shape is None or len(value.shape) != len(tensor.shape):
        found, wanted = f"{value.dtype}{value.shape}", " or ".join(map(str, allowed))
        raise GraphError(f"{name}: {tensor.name} is {found}", f"{wanted}[{', '.join(tensor.shape)}]")
    return value
