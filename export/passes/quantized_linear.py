"""Products with quantized matrices on ONNX Runtime's CPU provider, and look-ups in quantized embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.passes.graph_tools import CONTRIB_DOMAIN, constant, insert, nodes_of_type, prune, replace_value
from qwen_rt.export.portable import QuantizedLocation, WeightLocation, external_value
from qwen_rt.quantization import decode_fp8, part_name

__all__ = ["quantize_linear"]

_BLOCK_SIZES = (128, 64, 32, 16)
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level


def quantize_linear(
    model: ir.Model, quantized: Mapping[str, QuantizedLocation], activations: str = "float32"
) -> ir.Model:
    """Multiply by stored numbers.

        Gemm(x, W, b)      → MatMulNBits(x, values, scales, zero points, b)          int4; int8 with int8 activations
                           → Gemm(x, (values - zero points) · scales, b)             the others
        Gather(table, ids) → (Gather(values, ids)) · Gather(scales, ids)

    ONNX Runtime works the second kind's matrix out while it loads, so it takes four bytes a weight in memory: its CPU
    provider has no product with 8-bit floats, and its product of int8 with float32 activations is far slower than one
    in float32. A permuted matrix gets its activations permuted.

    Args:
        model: A graph after `fuse_linear`, computing in float32, whose quantized matrices have no data; changed in
            place.
        quantized: Name of each quantized matrix → where its parts lie.
        activations: `float32`, or `int8` to round activations to int8 in blocks where MatMulNBits multiplies.

    Returns:
        The same object.
    """
    for gemm in nodes_of_type(model, "Gemm"):
        name = _weight_name(gemm.inputs[1])
        if name == EMBEDDING and HEAD in quantized:
            name = HEAD
        if name in quantized:
            _Product(model, gemm, name, quantized[name], activations).replace()
    if EMBEDDING in quantized:
        for gather in nodes_of_type(model, "Gather"):
            if gather.inputs[0] is not None and gather.inputs[0].name == EMBEDDING:
                _look_up(model, gather, quantized[EMBEDDING])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return prune(model)


class _Product:
    """One Gemm on its way to a quantized matrix."""

    def __init__(self, model: ir.Model, gemm: ir.Node, name: str, place: QuantizedLocation, activations: str) -> None:
        self.model, self.gemm, self.name, self.place, self.activations = model, gemm, name, place, activations
        self.scheme = place.scheme
        self.rows, self.columns = place.shape
        self.scope = str(gemm.name).rsplit("/", 1)[0]
        self.parts = {part: _initializer(model, name, part, at) for part, at in place.parts.items()}

    def replace(self) -> None:
        block_size = self._block_size()
        x, *_ = self.gemm.inputs
        assert x is not None
        if "perm" in self.parts:
            x = self._node("Gather", [x, self.parts["perm"]], "permuted", {"axis": 1})
        if block_size:
            self._multiply_in_blocks(x, block_size)
        else:
            self.gemm.replace_input_with(0, x)
            self.gemm.replace_input_with(1, self._dense())

    def _block_size(self) -> int:
        """Of MatMulNBits; 0 where the matrix is worked out instead."""
        if self.scheme.format == "fp8" or (self.scheme.format == "int8" and self.activations == "float32"):
            return 0
        if self.scheme.group_size:
            return self.scheme.group_size
        if not self.scheme.symmetric or self.activations == "float32":  # a row's zero point would have to be repeated
            return 0
        return next((size for size in _BLOCK_SIZES if self.columns % size == 0), 0)

    def _multiply_in_blocks(self, x: ir.Value, block_size: int) -> None:
        groups, bits = self.columns // block_size, 4 if self.scheme.format == "int4" else 8
        values = self.parts["weight"] if bits == 4 else self._unsigned("weight")
        blocks = self._node("Reshape", [values, self._shape(self.rows, groups, block_size * bits // 8)], "blocks")
        scale = self._float("scale")
        if self.scheme.num_groups(self.columns) != groups:
            scale = self._node("Expand", [scale, self._shape(self.rows, groups)], "scales")
        inputs: list[ir.Value | None] = [x, blocks, scale]
        if "zero_point" in self.parts:
            inputs.append(self.parts["zero_point"] if bits == 4 else self._unsigned("zero_point"))
        if len(self.gemm.inputs) == 3:
            inputs += [None] * (5 - len(inputs))
            inputs.append(self.gemm.inputs[2])
        attributes = {"K": self.columns, "N": self.rows, "bits": bits, "block_size": block_size}
        if self.activations == "int8":
            attributes["accuracy_level"] = _INT8_ACTIVATIONS
        product = insert(
            self.gemm, "MatMulNBits", inputs, f"{self.scope}/MatMulNBits", attributes, domain=CONTRIB_DOMAIN
        )
        replace_value(self.model, self.gemm.outputs[0], product.outputs[0])

    def _dense(self) -> ir.Value:
        """The matrix itself, float32 [N, K], by nodes on constants."""
        groups = self.scheme.num_groups(self.columns)
        values, zero = self._numbers("weight", self.columns), None
        if "zero_point" in self.parts:
            zero = self._numbers("zero_point", groups)
        elif self.scheme.format == "int4":
            zero = constant(self.model.graph, "/quantized/eight", np.array(8, np.float32))
        scale = self._float("scale")
        if groups > 1:
            values = self._node("Reshape", [values, self._shape(self.rows, groups, -1)], "grouped")
            axis = constant(self.model.graph, "/quantized/last_axis", np.array([-1], np.int64))
            scale = self._node("Unsqueeze", [scale, axis], "scale_column")
            if "zero_point" in self.parts:
                zero = self._node("Unsqueeze", [zero, axis], "zero_column")
        if zero is not None:
            values = self._node("Sub", [values, zero], "centred")
        values = self._node("Mul", [values, scale], "scaled")
        if groups > 1:
            values = self._node("Reshape", [values, self._shape(self.rows, self.columns)], "matrix")
        return values

    def _numbers(self, part: str, count: int) -> ir.Value:
        """Stored numbers as float32 [N, count], taken out of their bytes where two share one."""
        stored = self.parts[part]
        if self.scheme.format != "int4":
            return self._float(part)
        graph = self.model.graph
        mask = constant(graph, "/quantized/mask", np.array(15, np.uint8))
        four = constant(graph, "/quantized/four", np.array(4, np.uint8))
        axis = constant(graph, "/quantized/last_axis", np.array([-1], np.int64))
        halves = [
            self._node("BitwiseAnd", [stored, mask], f"{part}_low"),
            self._node("BitShift", [stored, four], f"{part}_high", {"direction": "RIGHT"}),
        ]
        columns = [
            self._node("Unsqueeze", [half, axis], f"{part}_{place}")
            for half, place in zip(halves, ("lows", "highs"), strict=True)
        ]
        pairs = self._node("Concat", columns, f"{part}_pairs", {"axis": -1})
        flat = self._node("Reshape", [pairs, self._shape(self.rows, -1)], f"{part}_flat")
        floats = self._node("Cast", [flat], f"{part}_float", {"to": int(ir.DataType.FLOAT)})
        if count % 2 == 0:
            return floats
        bounds = [constant(graph, f"/quantized/{n}", np.array([n], np.int64)) for n in (0, count, 1)]
        return self._node("Slice", [floats, bounds[0], bounds[1], bounds[2]], f"{part}_all")

    def _float(self, part: str) -> ir.Value:
        value = self.parts[part]
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self._node("Cast", [value], f"{part}_float", {"to": int(ir.DataType.FLOAT)})

    def _unsigned(self, part: str) -> ir.Value:
        """Int8 numbers plus 128, as MatMulNBits wants them."""
        offset = constant(self.model.graph, "/quantized/offset", np.array(128, np.int32))
        wide = self._node("Cast", [self.parts[part]], f"{part}_wide", {"to": int(ir.DataType.INT32)})
        moved = self._node("Add", [wide, offset], f"{part}_moved")
        return self._node("Cast", [moved], f"{part}_unsigned", {"to": int(ir.DataType.UINT8)})

    def _shape(self, *sizes: int) -> ir.Value:
        return constant(self.model.graph, f"/quantized/shape_{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        name: str,
        attributes: Mapping[str, int | str] | None = None,
    ) -> ir.Value:
        return insert(self.gemm, op_type, list(inputs), f"/{self.name}/{name}", attributes).outputs[0]


def _weight_name(value: ir.Value | None) -> str:
    """The initializer behind a Gemm's matrix: a tied head reads a cast of the embeddings."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return "" if value is None else str(value.name)


def _initializer(model: ir.Model, name: str, part: str, place: WeightLocation) -> ir.Value:
    """The initializer of a stored part, made on first use."""
    full, initializers = part_name(name, part), model.graph.initializers
    if full not in initializers or initializers[full].const_value is None:
        made = external_value(full, place)
        if full in initializers:
            held = initializers[full]
            held.const_value, held.type, held.shape = made.const_value, made.type, made.shape
        else:
            initializers[full] = made
    return initializers[full]


def _look_up(model: ir.Model, gather: ir.Node, place: QuantizedLocation) -> None:
    """Gather stored rows and their scales, and multiply.

    There is no Gather of 8-bit floats: their rows are looked up as bytes, and each byte in a table of all 256 numbers.
    """
    ids, path = gather.inputs[1], str(gather.name)
    is_fp8 = place.scheme.format == "fp8"
    at = place.parts["weight"]
    if is_fp8:
        table = _initializer(model, EMBEDDING, "bits", replace(at, dtype="U8"))  # a tied head reads them as numbers
    else:
        table = _initializer(model, EMBEDDING, "weight", at)
    scales = _initializer(model, EMBEDDING, "scale", place.parts["scale"])
    values = insert(gather, "Gather", [table, ids], f"{path}/values").outputs[0]
    if is_fp8:
        numbers = constant(model.graph, "/quantized/fp8", decode_fp8(np.arange(256, dtype=np.uint8)))
        bits = insert(gather, "Cast", [values], f"{path}/bits", {"to": int(ir.DataType.INT32)}).outputs[0]
        floats = insert(gather, "Gather", [numbers, bits], f"{path}/float").outputs[0]
    else:
        floats = insert(gather, "Cast", [values], f"{path}/float", {"to": int(ir.DataType.FLOAT)}).outputs[0]
    scale = insert(gather, "Gather", [scales, ids], f"{path}/scale").outputs[0]
    if place.scheme.group_size:
        shape = constant(model.graph, f"{path}/grouped", np.array([0, -1, place.scheme.group_size], np.int64))
        back = constant(model.graph, f"{path}/flat", np.array([0, place.shape[1]], np.int64))
        axis = constant(model.graph, "/quantized/last_axis", np.array([-1], np.int64))
        grouped = insert(gather, "Reshape", [floats, shape], f"{path}/groups").outputs[0]
        column = insert(gather, "Unsqueeze", [scale, axis], f"{path}/scale_column").outputs[0]
        product = insert(gather, "Mul", [grouped, column], f"{path}/scaled").outputs[0]
        result = insert(gather, "Reshape", [product, back], f"{path}/rows").outputs[0]
    else:
        result = insert(gather, "Mul", [floats, scale], f"{path}/scaled").outputs[0]
    replace_value(model, gather.outputs[0], result)
