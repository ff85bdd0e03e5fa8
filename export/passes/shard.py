"""Tensor parallel: what one rank of several holds of a model's weights, and the model that it then looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.passes.dequantize import StoredMatrix
from qwen_rt.export.passes.graph_tools import stored_elements
from qwen_rt.export.tensor_parallel import check_tp, parameter_parts
from qwen_rt.quantization import Scheme, part_name
from qwen_rt.spec import ModelSpec

__all__ = ["Shard", "shard_spec", "shard_weights"]

Weights = Mapping[str, ir.TensorProtocol]
Matrices = Mapping[str, StoredMatrix]


@dataclass(frozen=True)
class Shard:
    """One rank of several: `rank` of 0 … `num_ranks` - 1."""

    rank: int = 0
    num_ranks: int = 1

    def has_part_of_head(self, spec: ModelSpec) -> bool:
        """Whether the rank multiplies by a part of the LM head: if all parts are of one size."""
        return self.num_ranks > 1 and spec.vocab_size % self.num_ranks == 0


def shard_spec(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The model whose layers a rank computes: its share of the heads and of the MLP's width.

    Raises:
        UsageError: A number of ranks that the model cannot be split over, or a rank beyond it.
    """
    check_tp(spec, shard.num_ranks)
    if not 0 <= shard.rank < shard.num_ranks:
        raise UsageError(f"rank={shard.rank}", f"0 to {shard.num_ranks - 1}")
    return dataclasses.replace(
        spec,
        num_heads=spec.num_heads // shard.num_ranks,
        num_kv_heads=max(1, spec.num_kv_heads // shard.num_ranks),
        intermediate_size=spec.intermediate_size // shard.num_ranks,
    )


def shard_weights(
    weights: Weights, matrices: Matrices, spec: ModelSpec, shard: Shard
) -> tuple[dict[str, ir.TensorProtocol], dict[str, StoredMatrix]]:
    """Take a rank's part of every parameter, as `parameter_parts` deals them out.

    Rows lie behind each other in their file, so a part of them is a reference as the whole was. A part of the columns
    (o_proj, down_proj) is no range of bytes: it is copied out when somebody asks for its bytes, and only then, so a
    builder that takes one tensor after the other holds one at a time.

    The embedding is whole on every rank: a call reads a few rows of it. The LM head is read from end to end in every
    call and would add 14 % to what a rank of eight reads of the 72B model, so it is dealt out by rows, unless the
    vocabulary does not divide. Of a tied model `lm_head.weight` is then a part of the embedding, copied out like
    columns: TensorRT takes no two constants of different sizes that begin at one address.

    Args:
        weights: Parameters that are stored as floats.
        matrices: Those that are stored quantized.
        spec: The whole model.
        shard: Which rank.

    Returns:
        The same for the rank.

    Raises:
        UsageError: A quantized matrix whose columns cannot be split where the ranks' parts meet.
    """
    new_weights: dict[str, ir.TensorProtocol] = {}
    new_matrices: dict[str, StoredMatrix] = {}
    parts = parameter_parts(spec, shard.num_ranks, spec.intermediate_size)
    is_tied = spec.tie_word_embeddings and HEAD not in matrices
    for name in dict.fromkeys([*weights, *matrices, HEAD]):
        if name == HEAD and not shard.has_part_of_head(spec):
            if not is_tied:
                _copy(name, weights, new_weights, matrices, new_matrices)
            continue
        source, is_copy = (EMBEDDING, True) if name == HEAD and is_tied else (name, False)
        part = parts[name]
        start, stop = part.rows(shard.rank)
        columns = (shard.rank * part.num_columns, (shard.rank + 1) * part.num_columns) if part.num_columns else None
        if source in matrices:
            new_matrices[name] = _matrix_part(matrices[source], name, (start, stop), columns, is_copy)
        elif columns is None:
            new_weights[name] = _rows(weights[source], start, stop, name, is_copy)
        else:
            new_weights[name] = _columns(weights[source], *columns, name)
    return new_weights, new_matrices


def _copy(
    name: str,
    weights: Weights,
    new_weights: dict[str, ir.TensorProtocol],
    matrices: Matrices,
    new_matrices: dict[str, StoredMatrix],
) -> None:
    if name in matrices:
        new_matrices[name] = matrices[name]
    else:
        new_weights[name] = weights[name]


def check_columns(name: str, scheme: Scheme, num_columns: int) -> int:
    """Refuse a quantized matrix that cannot be cut between columns; return how many belong together.

    Args:
        name: Hugging Face name.
        scheme: How it is stored.
        num_columns: Of each rank.

    Raises:
        UsageError: Columns that are not in order, or a group or byte that two ranks would share.
    """
    unit = scheme.group_size or (2 if scheme.format == "int4" else 1)
    if scheme.permuted or num_columns % unit:
        raise UsageError(
            f"{name} is stored as {scheme}, {num_columns} columns for each rank",
            "columns in order" if scheme.permuted else f"a multiple of {unit} columns for each rank",
            "choose a smaller --tp, or keep that matrix at another precision with --overrides",
        )
    return unit


def _matrix_part(
    matrix: StoredMatrix, name: str, rows: tuple[int, int], columns: tuple[int, int] | None, is_copy: bool
) -> StoredMatrix:
    """Rows or columns of a quantized matrix, stored as it is."""
    scheme, parts = matrix.scheme, matrix.parts
    if columns is None:
        cut = {
            part: tensor if part == "perm" else _rows(tensor, *rows, part_name(name, part), is_copy)
            for part, tensor in parts.items()
        }
        return StoredMatrix(name, scheme, (rows[1] - rows[0], matrix.shape[1]), cut)
    first, last = columns
    unit = check_columns(name, scheme, last - first)
    packing = 2 if scheme.format == "int4" else 1
    values = _columns(parts["weight"], first // packing, last // packing, name)
    scale = parts["scale"]
    if scheme.group_size:
        scale = _columns(scale, first // unit, last // unit, part_name(name, "scale"))
    return StoredMatrix(name, scheme, (matrix.shape[0], last - first), {"weight": values, "scale": scale})


def _rows(tensor: ir.TensorProtocol, start: int, stop: int, name: str, is_copy: bool = False) -> ir.TensorProtocol:
    """Rows of a tensor under another name, by reference unless they are to be copied when somebody asks for them."""
    num_rows, *rest = tensor.shape.numpy()
    shape = ir.Shape([stop - start, *rest])
    if isinstance(tensor, ir.ExternalTensor) and not is_copy:
        assert tensor.length is not None
        num_bytes = tensor.length // num_rows
        return ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + start * num_bytes,
            (stop - start) * num_bytes,
            tensor.dtype,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )

    def make() -> ir.TensorProtocol:
        return ir.tensor(stored_elements(tensor)[start:stop].copy(), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(make, tensor.dtype, shape, name=name)


def _columns(tensor: ir.TensorProtocol, start: int, stop: int, name: str) -> ir.LazyTensor:
    """Columns of a matrix under another name, copied when somebody asks for them."""

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(stored_elements(tensor)[:, start:stop]), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(make, tensor.dtype, ir.Shape([tensor.shape.numpy()[0], stop - start]), name=name)
