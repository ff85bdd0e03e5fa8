"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: four or eight bits, any group size, act-order.

| tensor    | dtype, shape               | what                                                                     |
|-----------|----------------------------|--------------------------------------------------------------------------|
| `qweight` | I32 [K · bits / 32, N]     | consecutive columns in a word, the first in the lowest bits              |
| `qzeros`  | I32 [G, N · bits / 32]     | consecutive rows in a word; less one in the layout `gptq`                |
| `scales`  | floats [G, N]              |                                                                          |
| `g_idx`   | I32 [K], may be missing    | group of each column; k // group_size unless groups follow an act-order  |

    w[n, k] = scales[g_idx[k], n] · (qweight[k, n] - qzeros[g_idx[k], n])

Layout `gptq` subtracts one from every zero point as words are packed, so a zero point of 0 borrows from its
neighbour; adding the same constant to whole words undoes that exactly. `gptq_v2` stores zero points as they are.

Source: GPTQModel 7.7.0, `gptqmodel/utils/model.py::convert_gptq_v1_to_v2_format_module` and
`nn_modules/qlinear/__init__.py::pack_original`; AutoGPTQ 0.7.1, `nn_modules/qlinear/qlinear_cuda_old.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign.assemble import (
    ROW_BLOCK,
    check_groups,
    finish_integers,
    integer_scheme,
    read_scale,
    unpack_words,
)
from qwen_rt.foreign.fields import Fields
from qwen_rt.foreign.matrix import FIX_AGAIN, ForeignMatrix, Part
from qwen_rt.foreign.patterns import Pattern
from qwen_rt.quantization import QuantizedTensor, Scheme, pack_nibbles
from qwen_rt.safetensors_header import TensorRef
from qwen_rt.strict_json import INT_MAX, show
from qwen_rt.tensor_data import FLOAT_DTYPES

__all__ = ["GptqLayout", "GptqQuantization", "read_gptq"]

_ONES = {4: 0x11111111, 8: 0x01010101}
"""Bits → the constant that `gptq` subtracts from a word of zero points."""


@dataclass(frozen=True)
class GptqLayout:
    """How a GPTQ matrix is stored.

    Attributes:
        bits: 4 or 8.
        group_size: Columns of a group; -1 for a whole row.
        zeros_less_one: Layout `gptq`; `gptq_v2` otherwise.
    """

    bits: int
    group_size: int
    zeros_less_one: bool

    def __str__(self) -> str:
        return f"GPTQ of {self.bits} bits, group_size={self.group_size}"

    @property
    def format(self) -> str:
        """See `Layout`."""
        return f"int{self.bits}"

    def parts(self, name: str, shape: tuple[int, int], present: frozenset[str]) -> Mapping[str, Part]:
        """See `Layout`."""
        rows, columns = shape
        per_word = 32 // self.bits
        for size, what in ((columns, "columns"), (rows, "rows")):
            if size % per_word:
                raise UnsupportedModelError(
                    f"{name} has {size} {what}, {per_word} to a word of {self}", f"a multiple of {per_word}"
                )
        check_groups(name, columns, self._width(columns), self)
        groups = columns // self._width(columns)
        return {
            "qweight": Part(("I32",), ((columns // per_word, rows),)),
            "qzeros": Part(("I32",), ((groups, rows // per_word),)),
            "scales": Part(FLOAT_DTYPES, ((groups, rows),)),
            "g_idx": Part(("I32",), ((columns,),), required=False),
        }

    def scheme(self, matrix: ForeignMatrix) -> Scheme:
        """See `Layout`."""
        columns = matrix.shape[1]
        permuted = self._order(matrix) is not None
        return integer_scheme(matrix.name, columns, self._width(columns), self.bits, self._zero(matrix), permuted)

    def load(self, matrix: ForeignMatrix) -> QuantizedTensor:
        """See `Layout`.

        Raises:
            CheckpointError: As `ForeignMatrix.load`.
        """
        rows, columns = matrix.shape
        scale = np.ascontiguousarray(read_scale(matrix, "scales").T)  # [N, G]
        zero, perm = self._zero(matrix), self._order(matrix)
        words = matrix.read("qweight")
        octets = np.empty((rows, columns * self.bits // 8), np.uint8)
        for start in range(0, rows, ROW_BLOCK):
            block = np.ascontiguousarray(words[:, start : start + ROW_BLOCK].T)  # [b, words of a row]
            if perm is None:
                octets[start : start + ROW_BLOCK] = block.view(np.uint8)
                continue
            values = unpack_words(block, self.bits, columns)[:, perm]
            octets[start : start + ROW_BLOCK] = pack_nibbles(values) if self.bits == 4 else values
        return finish_integers(matrix, self.bits, self._width(columns), octets, scale, zero, perm)

    def _width(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def _zero(self, matrix: ForeignMatrix) -> NDArray[np.uint8]:
        """Zero points, unsigned: [N, G]."""
        words = matrix.read("qzeros").view(np.uint32)
        if self.zeros_less_one:
            words = words + np.uint32(_ONES[self.bits])  # wraps, as it did when they were packed
        zero = unpack_words(words.view(np.int32), self.bits, matrix.shape[0])  # [G, N]
        return np.ascontiguousarray(zero.T)

    def _order(self, matrix: ForeignMatrix) -> NDArray[np.int32] | None:
        """Columns in the order of their groups, int32[K]; None if they are in order already."""
        columns = matrix.shape[1]
        width = self._width(columns)
        if "g_idx" not in matrix.parts:
            return None
        return column_order(matrix.parts["g_idx"], matrix.read("g_idx"), width)


def column_order(ref: TensorRef, group: NDArray[np.int32], width: int) -> NDArray[np.int32] | None:
    """Bring columns into the order of their groups.

    Args:
        ref: Where `group` is stored, for messages.
        group: int32[K], group of each column.
        width: Columns that each group must have; divides K.

    Returns:
        int32[K], what `QuantizedTensor.perm` is; None if groups are made of neighbours, in order.

    Raises:
        CheckpointError: A group that there is not, or groups of other sizes.
    """
    columns = group.size
    if np.array_equal(group, np.arange(columns) // width):
        return None
    groups = columns // width
    outside = (group < 0) | (group >= groups)
    if outside.any():
        at = int(np.argmax(outside))
        raise CheckpointError(
            f"{ref.name} puts column {at} into group {int(group[at])}", f"0 to {groups - 1}", FIX_AGAIN
        )
    sizes = np.bincount(group, minlength=groups)
    if (sizes != width).any():
        at = int(np.argmax(sizes != width))
        raise CheckpointError(
            f"{ref.name} puts {int(sizes[at])} columns into group {at}", f"group_size={width} in each", FIX_AGAIN
        )
    return np.argsort(group, kind="stable").astype(np.int32)


@dataclass(frozen=True)
class _Rule:
    """What GPTQModel's `dynamic` says of the modules that a pattern matches; no layout leaves them as they were."""

    pattern: Pattern
    layout: GptqLayout | None


@dataclass(frozen=True)
class GptqQuantization:
    """A GPTQ config: one layout for all modules, but for those that a rule matches, the first of them."""

    default: GptqLayout
    rules: tuple[_Rule, ...] = ()
    marks: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def layout(self, module: str) -> GptqLayout | None:
        """See `Quantization`."""
        for rule in self.rules:
            if rule.pattern.matches(module):
                return rule.layout
        return self.default

    def __str__(self) -> str:
        return "the GPTQ config"


def read_gptq(fields: Fields) -> GptqQuantization:
    """Read a config with `quant_method` gptq.

    Raises:
        CheckpointError: A field that is missing, malformed or out of range.
        UnsupportedModelError: Bits, a layout or an extension that is not read.
    """
    layout_key = fields.first_of("checkpoint_format", "format")
    kind = fields.text(layout_key, "gptq")
    if fields.boolean("is_marlin_format", False):
        kind = "marlin"
    fields.require(layout_key, kind, "gptq", "gptq_v2")
    fields.require("pack_dtype", fields.text("pack_dtype", "int32"), "int32")
    for key in ("adapter", "rotation"):
        if fields.data.get(key):
            raise UnsupportedModelError(f"{fields.path}.{key}", "a checkpoint without", "take another checkpoint")
    for key in ("desc_act", "sym"):  # the tensors say both themselves
        fields.boolean(key, False)
    default = _read_layout(fields, GptqLayout(0, 0, kind == "gptq"))
    rules = []
    if fields.has("dynamic"):
        dynamic = fields.child("dynamic")
        for key in dynamic.data:
            layout = None if key.startswith("-:") else _read_layout(dynamic.child(key), default)
            rules.append(_Rule(Pattern(key.removeprefix("-:").removeprefix("+:")), layout))
    return GptqQuantization(default, tuple(rules))


def _read_layout(fields: Fields, default: GptqLayout) -> GptqLayout:
    """Read bits and group size; those of `default` stand in for missing ones unless they are 0."""
    bits = fields.integer("bits", 1, 32, default.bits or None)
    fields.require("bits", bits, 4, 8)
    group_size = fields.integer("group_size", -1, INT_MAX, default.group_size or None)
    if group_size == 0:
        raise CheckpointError(f"{fields.path}.group_size={show(0)}", "-1 for a whole row, or a number of columns")
    return replace(default, bits=bits, group_size=group_size)
