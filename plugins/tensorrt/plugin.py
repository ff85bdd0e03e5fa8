"""A class of TensorRT plugins for an op, made from its row in the table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_rt.errors import UsageError
from qwen_rt.ops import COUNTER_BYTES, DOMAIN, MAX_ROWS, POLYMORPHIC, OpTensor, PluginOp
from qwen_rt.plugins.library import NO_DEPENDENT_LAUNCH, PluginLibrary
from qwen_rt.plugins.tensorrt.shapes import ExprArithmetic, output_shapes, untold_outputs

__all__ = ["INPUT_NAMES", "OUTPUT_NAMES", "NodeSettings", "make_field", "plugin_class"]

INPUT_NAMES, OUTPUT_NAMES = "input_names", "output_names"
"""Fields that say which inputs and outputs a node has: their names in the table, in order, joined by commas."""

_TYPES = {
    "bf16": ("BF16",),
    "f32": ("FLOAT",),
    "f16": ("HALF",),
    "i32": ("INT32",),
    "i64": ("INT64",),
    "f8": ("FP8",),
    "i8": ("INT8",),
    "u8": ("UINT8", "INT8"),  # of packed numbers only the bytes count
}
"""Dtype of the table → names of trt.DataType."""

_SIZES_TRIED = 256
_NO_ALIAS = -1


@dataclass(frozen=True)
class NodeSettings:
    """One node of an op: which tensors it has, and its attributes.

    Attributes:
        op: The op.
        inputs: Those that are there, in the table's order.
        outputs: Those that are there, in the table's order.
        attributes: Values in the table's order.
    """

    op: PluginOp
    inputs: tuple[OpTensor, ...]
    outputs: tuple[OpTensor, ...]
    attributes: tuple[float, ...]

    @classmethod
    def from_fields(cls, op: PluginOp, fields: Mapping[str, str | float]) -> NodeSettings:
        """Check what a node says of itself.

        Args:
            op: The op.
            fields: Attributes, and `INPUT_NAMES` and `OUTPUT_NAMES`; without these a node has what is not optional.

        Raises:
            UsageError: An attribute or tensor that the op does not have, or lacks; an output whose shape nothing tells.
        """
        known = {*dict(op.attributes), INPUT_NAMES, OUTPUT_NAMES}
        if unknown := sorted(fields.keys() - known):
            raise UsageError(f"{op.name}: field {unknown[0]!r}", f"one of {', '.join(sorted(known))}")
        values = []
        for name, default in op.attributes:
            value = fields.get(name, default)
            if value is None or isinstance(value, str):
                raise UsageError(f"{op.name}: field {name} is {'missing' if value is None else 'a text'}", "a number")
            values.append(float(value))
        inputs = _named(op, op.inputs, fields.get(INPUT_NAMES))
        outputs = _named(op, op.outputs, fields.get(OUTPUT_NAMES))
        if untold := sorted({tensor.name for tensor in outputs} & set(untold_outputs(op))):
            raise UsageError(f"{op.name}: output {untold[0]}", "one whose shape the inputs tell", "leave it out")
        return cls(op, inputs, outputs, tuple(values))

    def fields(self) -> dict[str, str | float]:
        """Return what `from_fields` makes the same settings of."""
        texts = {
            INPUT_NAMES: ",".join(tensor.name for tensor in self.inputs),
            OUTPUT_NAMES: ",".join(tensor.name for tensor in self.outputs),
        }
        return {**texts, **{name: value for (name, _), value in zip(self.op.attributes, self.attributes, strict=True)}}

    def dims(self, inputs: Sequence[Sequence[int]]) -> dict[str, int]:
        """Return the op's dims for shapes of the inputs that are there."""
        shapes = {tensor.name: tuple(shape) for tensor, shape in zip(self.inputs, inputs, strict=True)}
        return dict(zip(self.op.dims, self.op.dims_of(shapes), strict=True))

    def alias_of(self, output: int) -> int:
        """Return which input's memory an output must have; -1 for one with memory of its own."""
        tensor = self.outputs[output]
        if tensor.alias is None or tensor.may_alias:
            return _NO_ALIAS
        return next(index for index, one in enumerate(self.inputs) if one.name == tensor.alias)


def _named(op: PluginOp, tensors: Sequence[OpTensor], names: object) -> tuple[OpTensor, ...]:
    """Take the named tensors, or all that are not optional."""
    if names is None:
        return tuple(tensor for tensor in tensors if not tensor.optional)
    wanted = [name for name in str(names).split(",") if name]
    found = tuple(tensor for tensor in tensors if tensor.name in wanted)
    if [tensor.name for tensor in found] != wanted:
        raise UsageError(f"{op.name}: tensors {names!r}", f"names in the order of {[t.name for t in tensors]}")
    if lacking := [tensor.name for tensor in tensors if not tensor.optional and tensor.name not in wanted]:
        raise UsageError(f"{op.name} lacks {lacking[0]}", "all tensors that are not optional")
    return found


def plugin_class(trt: Any, op: PluginOp, library: PluginLibrary, fill: Callable[[int, int, int, int], None]) -> Any:
    """Make the class of an op.

    TensorRT gives a plugin workspace of its own in every call, with anything in it. So the counters that an op expects
    to be zero are cleared in front of it; that is one node more in a captured graph.

    Args:
        trt: TensorRT's module.
        op: The op.
        library: Launches it.
        fill: Enqueues setting bytes: (address, value, bytes, stream), as `Cudart.fill` does.

    Returns:
        A class whose instances take a `NodeSettings`.
    """

    class Plugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuildV2,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, settings: NodeSettings) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuildV2.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.settings = settings
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, str(op.version), DOMAIN
            self.num_outputs = len(settings.outputs)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.settings)

        # ---------------------------------------------------------------- build

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            given = dict(zip((tensor.name for tensor in self.settings.inputs), input_types, strict=True))
            return [
                given[tensor.alias]
                if tensor.dtype in POLYMORPHIC and tensor.alias is not None
                else getattr(trt.DataType, _TYPES[tensor.dtype][0])
                for tensor in self.settings.outputs
            ]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            named = {
                tensor.name: [dims[axis] for axis in range(len(dims))]
                for tensor, dims in zip(self.settings.inputs, inputs, strict=True)
            }
            shapes = output_shapes(op, named, self.settings.outputs, ExprArithmetic(trt, builder))
            return [_dims_exprs(trt, shape) for shape in shapes]

        def get_aliased_input(self, output_index: int) -> int:
            return self.settings.alias_of(output_index)

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensors = self.settings.inputs + self.settings.outputs
            tensor, found = tensors[pos], in_out[pos].desc
            if found.format != trt.TensorFormat.LINEAR:
                return False
            if tensor.dtype not in POLYMORPHIC:
                return bool(found.type == getattr(trt.DataType, _TYPES[tensor.dtype][0]))
            # Those of one kind are alike in a node: its format is one number.
            for index in range(pos):
                if tensors[index].dtype == tensor.dtype:
                    return bool(found.type == in_out[index].desc.type)
            names = {name for dtype in POLYMORPHIC[tensor.dtype] for name in _TYPES[dtype]}
            return any(found.type == getattr(trt.DataType, name) for name in names)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self.settings.dims([desc.max for desc in inputs])  # shapes that contradict each other raise here

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            if not op.has_workspace:
                return 0
            most = self.settings.dims([desc.max for desc in inputs])
            return max(library.workspace_bytes(op.name, list(dims.values())) for dims in _calls(most))

        def get_valid_tactics(self) -> list[int]:
            return []

        # ---------------------------------------------------------------- run

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            self._kept = [make_field(trt, name, value) for name, value in self.settings.fields().items()]
            return trt.PluginFieldCollection(self._kept)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            settings = self.settings
            dims = list(settings.dims([desc.dims for desc in input_desc]).values())
            there = zip(settings.inputs + settings.outputs, (*inputs, *outputs), strict=True)
            addresses = {tensor.name: int(address) for tensor, address in there}
            needed = library.workspace_bytes(op.name, dims) if op.has_workspace else 0
            if needed:
                fill(workspace, 0, min(COUNTER_BYTES, needed), stream)
            library.launch(
                op.name,
                [addresses.get(tensor.name) for tensor in op.tensors],
                dims,
                settings.attributes,
                stream=stream,
                workspace=workspace if needed else None,
                workspace_bytes=needed,
                flags=NO_DEPENDENT_LAUNCH,  # what runs in front is TensorRT's own and releases nothing early
            )

    Plugin.__name__ = Plugin.__qualname__ = "".join(part.title() for part in op.name.split("_")) + "Plugin"
    return Plugin


def make_field(trt: Any, name: str, value: str | float) -> Any:
    """Make a plugin field of a text or a number; it refers to memory that it keeps alive itself."""
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR)
    return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)


def _dims_exprs(trt: Any, shape: Sequence[Any]) -> Any:
    made = trt.DimsExprs(len(shape))
    for axis, size in enumerate(shape):
        made[axis] = size
    return made


def _calls(most: Mapping[str, int]) -> list[dict[str, int]]:
    """Return dims that together show the largest workspace: it need not grow with the rows.

    Decode steps of every number of rows, and prefills of one sequence and of as many as there can be.
    """
    rows, sequences = most.get("rows", 1), most.get("sequences", most.get("rows", 1))
    calls = {(count, count) for count in range(1, min(rows, sequences, MAX_ROWS) + 1)}
    for count in (*range(1, rows + 1, max(1, rows // _SIZES_TRIED)), rows):
        calls |= {(count, 1), (count, min(count, sequences))}
    replaced = functools.partial(_replace, most)
    return [replaced(count, many) for count, many in sorted(calls)]


def _replace(most: Mapping[str, int], rows: int, sequences: int) -> dict[str, int]:
    given = {"rows": rows, "sequences": sequences}
    return {name: given.get(name, value) for name, value in most.items()}
