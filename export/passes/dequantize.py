"""Quantized matrices for TensorRT: DequantizeLinear on weights as stored, which its builder fuses into the product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.graph_tools import stored_elements
from qwen_rt.export.passes.graph_writer import GraphWriter
from qwen_rt.export.portable import QuantizedLocation, external_value
from qwen_rt.quantization import Scheme, part_name

__all__ = ["BLOCK_SIZES", "StoredMatrix", "check_tensorrt_scheme", "dequantized"]

BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Columns of an int4 row that can share a scale."""

_FLIP_SIGNS = 0x88
"""Turns nibbles that stand for themselves minus 8 into two's complement."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix on its bytes.

    Attributes:
        name: Hugging Face name.
        scheme: Its scheme.
        shape: [N, K].
        parts: Name of each part, as in `Scheme.parts` → a tensor; its name is that of the initializer.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, ir.TensorProtocol]

    @classmethod
    def of(cls, name: str, place: QuantizedLocation) -> StoredMatrix:
        """The whole matrix, by reference."""
        parts = {}
        for part, at in place.parts.items():
            tensor = external_value(part_name(name, part), at).const_value
            assert tensor is not None
            parts[part] = tensor
        return cls(name, place.scheme, place.shape, parts)


def check_tensorrt_scheme(name: str, scheme: Scheme, columns: int) -> None:
    """Refuse a form that TensorRT lacks, or for which its builder would write the whole matrix out in every call.

    Raises:
        UsageError: Zero points; int8 or fp8 in groups; int4 whose columns no group size divides.
    """
    fix = "build with --target cuda, or keep that matrix at another precision with --overrides"
    if not scheme.symmetric:
        raise UsageError(f"{name} is stored as {scheme}", "no zero points: TensorRT has none", fix)
    if scheme.format != "int4" and scheme.group_size:
        raise UsageError(f"{name} is stored as {scheme}", f"{scheme.format} with one scale for each row", fix)
    if scheme.format == "int4" and all(columns % size for size in BLOCK_SIZES):
        raise UsageError(f"{name} is int4 with {columns} columns", "a multiple of 16 for target tensorrt", fix)


def dequantized(writer: GraphWriter, matrix: StoredMatrix, dtype: ir.DataType, path: str) -> ir.Value:
    """Write the nodes that make a matrix of a dtype out of its stored numbers.

        values int8, fp8 [N, K], scale float32 [N] ─ DequantizeLinear(axis 0)
        values int4 [N, K], scale [N, G] ─ DequantizeLinear(axis 1, block_size)

    Scales of int4 are cast to `dtype` first, since the builder takes no others there: in bfloat16 each may err by
    2⁻⁹ of itself. A scale for a whole int4 row is repeated for each block, as nothing but blocks is fused.

    Args:
        writer: Where to.
        matrix: One that `check_tensorrt_scheme` takes.
        dtype: Of the result.
        path: Module that reads it; the last node is `{path}/DequantizeLinear`. A matrix read by two gets two.

    Returns:
        [N, K].
    """
    rows, columns = matrix.shape
    if matrix.scheme.format == "int4":
        return _in_blocks(writer, matrix, dtype, path)
    values = writer.stored(matrix.parts["weight"])
    scale = writer.stored(_flat(matrix.parts["scale"], rows))
    attributes = {"axis": 0}
    if dtype != scale.dtype:
        attributes["output_dtype"] = int(dtype)
    return writer.node(
        "DequantizeLinear", [values, scale], f"{path}/DequantizeLinear", dtype, [rows, columns], attributes
    )


def _in_blocks(writer: GraphWriter, matrix: StoredMatrix, dtype: ir.DataType, path: str) -> ir.Value:
    rows, columns = matrix.shape
    size = matrix.scheme.group_size or next(size for size in BLOCK_SIZES if columns % size == 0)
    values = writer.stored(_signed(matrix.parts["weight"], matrix.shape))
    scale = writer.cast(writer.stored(matrix.parts["scale"]), dtype, f"{path}/scale")
    if not matrix.scheme.group_size:
        shape = [rows, columns // size]
        scale = writer.node("Expand", [scale, writer.integers(*shape)], f"{path}/scales", dtype, shape)
    attributes = {"axis": 1, "block_size": size}
    return writer.node(
        "DequantizeLinear", [values, scale], f"{path}/DequantizeLinear", dtype, [rows, columns], attributes
    )


def _flat(scale: ir.TensorProtocol, rows: int) -> ir.TensorProtocol:
    """Scales [N, 1] as [N], on the same bytes."""
    if isinstance(scale, ir.ExternalTensor):
        return ir.ExternalTensor(
            scale.location, scale.offset, scale.length, scale.dtype, shape=ir.Shape([rows]), name=scale.name,
            base_dir=scale.base_dir,
        )  # fmt: skip
    return ir.LazyTensor(
        lambda: ir.tensor(scale.numpy().reshape(rows)), scale.dtype, ir.Shape([rows]), name=str(scale.name)
    )


def _signed(values: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.LazyTensor:
    """Nibbles as int4 in two's complement, made when somebody asks for them."""

    def make() -> ir.TensorProtocol:
        flipped = np.bitwise_xor(stored_elements(values), np.uint8(_FLIP_SIGNS)).reshape(-1)
        return ir.PackedTensor(flipped, ir.DataType.INT4, shape=shape, name=values.name)

    return ir.LazyTensor(make, ir.DataType.INT4, ir.Shape(shape), name=str(values.name))
