"""What the table of plugin ops (`ops.py`) is made of: numbers that all ops share, a tensor, an op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_rt.errors import UsageError

__all__ = [
    "BLOCK_SIZE",
    "COUNTER_BYTES",
    "DOMAIN",
    "INT8_ROWS",
    "KV_CACHE_FORMATS",
    "MAX_ROWS",
    "POLYMORPHIC",
    "SKINNY_ROWS",
    "WEIGHT_FORMATS",
    "OpTensor",
    "PluginOp",
    "shape_of",
]

DOMAIN = "qwen_rt"
"""The operator-set domain of the ops in a graph."""

MAX_ROWS = 64
"""Most sequences of one call, and most rows that the skinny matrix kernels take; more rows go to cuBLASLt."""

SKINNY_ROWS = 32
"""Most rows that go to the skinny kernels whatever the matrices; more, up to `MAX_ROWS`, go to cuBLASLt if those are
bf16, or fp8 with a scale for each row. A row's result is bit for bit the same on either side of it, not across."""

BLOCK_SIZE = 64
"""Tokens of a cache block, as the runtime allocates them."""

COUNTER_BYTES = 64 * 1024
"""The part of a workspace, at its start, that is zeroed once and always left zero."""

WEIGHT_FORMATS: Mapping[str, int] = {"bf16": 0, "fp8": 1, "int8": 2, "int4": 3}
"""Format of a matrix → value of the attribute `weight_format`."""

INT8_ROWS = 4
"""Value of `weight_format` for int8 matrices whose prefills may round activations to int8 too, a scale for each row.
Faster by a third to a half, but a few large channels of a row leave little precision to the others."""

KV_CACHE_FORMATS: Mapping[str, int] = {"bf16": 0, "fp8": 1, "int8": 2}
"""Format of a KV cache → value of the attribute `kv_format`."""

POLYMORPHIC: Mapping[str, tuple[str, ...]] = {
    "weight": ("bf16", "f8", "i8", "u8"),
    "scale": ("f32", "f16"),
    "zero": ("i8", "u8"),
    "cache": ("bf16", "f8", "i8"),
}
"""Dtype in the table that stands for several → those that a tensor may have."""


@dataclass(frozen=True)
class OpTensor:
    """An input or output of an op.

    Attributes:
        name: As in the kernel's header comment.
        dtype: `bf16`, `f32`, `i32` or `i64`, or a key of `POLYMORPHIC`.
        shape: One symbolic size per axis.
        optional: Whether it may be absent.
        alias: For an output: the input whose memory it shares, in place; for `may_alias`, if the caller wants it.
        may_alias: Whether `alias` is allowed rather than required.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    optional: bool = False
    alias: str | None = None
    may_alias: bool = False


@dataclass(frozen=True)
class PluginOp:
    """One row of the table.

    Attributes:
        name: The stem of everything that belongs to the op.
        version: Raised whenever tensors, dims, attributes or meaning change.
        dims: Symbolic dimensions in the order that the launcher takes them.
        inputs: In order.
        outputs: In order, after the inputs.
        attributes: Names in order, with their defaults (None: must be given).
        has_workspace: Whether the launcher may want a workspace; `qwen_rt_workspace_bytes` says how much.
    """

    name: str
    version: int
    dims: tuple[str, ...]
    inputs: tuple[OpTensor, ...]
    outputs: tuple[OpTensor, ...]
    attributes: tuple[tuple[str, float | None], ...] = ()
    has_workspace: bool = False

    @property
    def tensors(self) -> tuple[OpTensor, ...]:
        """Inputs, then outputs: the order of pointers."""
        return self.inputs + self.outputs

    def dims_of(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Work the dims out from the shapes of the inputs (and of outputs, where they are known).

        Args:
            shapes: Tensor name → shape; absent optional tensors left out.

        Returns:
            The values of `dims`, in order; 0 where only absent optional tensors would tell.

        Raises:
            UsageError: An input missing, or shapes that contradict each other.
        """
        found: dict[str, int] = {}
        sizes: list[tuple[str, int, str]] = []
        for tensor in self.tensors:
            if tensor.name not in shapes:
                if tensor in self.inputs and not tensor.optional:
                    raise UsageError(f"{self.name} lacks {tensor.name}", "all its inputs", "pass it")
                continue
            shape = shapes[tensor.name]
            if len(shape) != len(tensor.shape):
                raise UsageError(f"{self.name}: {tensor.name} has {len(shape)} axes", f"[{', '.join(tensor.shape)}]")
            sizes += [(tensor.name, int(value), size) for value, size in zip(shape, tensor.shape, strict=True)]
        for _, value, size in sorted(sizes, key=lambda item: not item[2].isidentifier()):
            unknown = [term for term in size.split(" + ") if term.isidentifier() and term not in found]
            if len(unknown) == 1:
                found[unknown[0]] = value - shape_of((size,), found | {unknown[0]: 0})[0]
        for name, value, size in sizes:
            if shape_of((size,), found)[0] != value:
                raise UsageError(f"{self.name}: {name} has {size} = {value}", f"{shape_of((size,), found)[0]}")
        return tuple(found.get(dim, 0) for dim in self.dims)


def shape_of(sizes: Sequence[str], dims: Mapping[str, int]) -> tuple[int, ...]:
    """Evaluate symbolic sizes: sums of products of dims and integers (`"heads * head_dim + 2 * width"`)."""

    def factor(text: str) -> int:
        text = text.strip()
        return int(text) if text.isdecimal() else dims[text]

    shape = []
    for size in sizes:
        total = 0
        for term in size.split("+"):
            product = 1
            for text in term.split("*"):
                product *= factor(text)
            total += product
        shape.append(total)
    return tuple(shape)
