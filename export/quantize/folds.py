"""Factors that a build moved from one tensor into its neighbours before it quantized, read off the two models.

A calibrated build multiplies columns of a matrix, to round them more finely, and divides what feeds them by the same:

| columns of                  | are fed by the rows, or elements, of |
|-----------------------------|--------------------------------------|
| q_proj, k_proj, v_proj      | input_layernorm                      |
| o_proj                      | v_proj and its bias                  |
| gate_proj, up_proj          | post_attention_layernorm             |
| down_proj                   | up_proj                              |

The model computes the same, but its matrices are no longer the source's: W' = diag(rows) · W · diag(columns). Norms are
not quantized, so the ratio of their elements is the factor. Factors of rows are powers of two. They show in the rows
themselves and in the columns that these feed; where the two contradict each other nothing was folded, but a scale is
wrong, and is seen to be in the matrix that has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_rt.export.quantize.forward import Forward
from qwen_rt.row_reader import RowSource

__all__ = ["LayerFolds"]

_SAMPLE_ROWS = 256
"""Of o_proj and down_proj, to see the factors of their columns: roundings cancel over that many."""

_SAMPLE_PIECE = 32

_MIN_COSINE = 0.8
"""Of a row or a column in the two models, to believe its factor. int4 leaves a row 0.99 and a column of the sample as
much, unless the column is small beside the others of its groups; columns that have nothing to do with each other have
1/16 in 256 rows, and 0.3 by chance."""


class LayerFolds:
    """The factors of one layer; those of v_proj and up_proj are found as their rows pass by.

    Args:
        source: The model as it was.
        quantized: The same model as the bundle has it.
        layer: Which layer.
    """

    def __init__(self, source: Forward, quantized: Forward, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        spec = source.spec
        into_qkv = _norm_factors(source, quantized, f"{prefix}.input_layernorm.weight")
        into_mlp = _norm_factors(source, quantized, f"{prefix}.post_attention_layernorm.weight")
        self._columns: dict[str, Tensor | None] = {
            **{f"{prefix}.self_attn.{name}_proj.weight": into_qkv for name in "qkv"},
            **{f"{prefix}.mlp.{name}_proj.weight": into_mlp for name in ("gate", "up")},
        }
        value, up = f"{prefix}.self_attn.v_proj.weight", f"{prefix}.mlp.up_proj.weight"
        out, down = f"{prefix}.self_attn.o_proj.weight", f"{prefix}.mlp.down_proj.weight"
        group = spec.num_heads // spec.num_kv_heads
        heads = (spec.num_kv_heads, group, spec.head_dim)  # the query heads of a group share their values
        self._fed_by = {out: value, down: up}
        self._group = {out: heads, down: (1, 1, spec.intermediate_size)}
        self._rows = {
            fed_by: _column_factors(source.rows, quantized.rows, name, self._group[name]).reciprocal()
            for name, fed_by in self._fed_by.items()
        }

    def columns(self, name: str) -> Tensor | None:
        """Factors of a matrix's columns, f32[K]; None if all are 1. Rows that feed them have to have passed."""
        if name not in self._fed_by:
            return self._columns[name]
        kv_heads, group, width = self._group[name]
        rows = self._rows[self._fed_by[name]].view(kv_heads, 1, width)
        return _unless_ones(rows.expand(-1, group, -1).reshape(-1).reciprocal())

    def rows(self, name: str, start: int, before: Tensor, after: Tensor) -> Tensor | None:
        """Factors of some rows, f32[n]; None if all are 1.

        Args:
            name: The matrix.
            start: Number of the first row.
            before: f32[n, K], the source's rows, their columns multiplied already.
            after: f32[n, K], the bundle's.
        """
        if name not in self._rows:
            return None
        expected = self._rows[name][start : start + len(before)]
        found = _factors((before * after).sum(1), before.square().sum(1), after.square().sum(1))
        agreed = (found == expected) | (torch.isnan(expected) & ~torch.isnan(found))
        expected.copy_(torch.where(agreed, found, torch.ones_like(found)))
        return _unless_ones(expected)

    def value_rows(self, layer: int) -> Tensor:
        """Factors of v_proj's rows, once they have passed: f32[Hkv·D]."""
        return self._rows[f"model.layers.{layer}.self_attn.v_proj.weight"]


def _norm_factors(source: Forward, quantized: Forward, name: str) -> Tensor | None:
    """What a norm was divided by; 1 where either weight is 0."""
    before, after = source.vector(name), quantized.vector(name)
    return _unless_ones(torch.where((before != 0) & (after != 0), before / after, torch.ones_like(before)))


def _column_factors(source: RowSource, quantized: RowSource, name: str, heads: tuple[int, int, int]) -> Tensor:
    """What columns were multiplied by, by the first rows: f32[Hkv·D], NaN where they do not tell."""
    sums = [torch.zeros(heads[0] * heads[2]) for _ in range(3)]
    for start in range(0, min(_SAMPLE_ROWS, source.shape(name)[0]), _SAMPLE_PIECE):
        before, after = (
            torch.from_numpy(rows.rows(name, start, start + _SAMPLE_PIECE)) for rows in (source, quantized)
        )
        for total, product in zip(sums, (before * after, before.square(), after.square()), strict=True):
            total += product.sum(0).view(heads).sum(1).reshape(-1)
    return _factors(*sums)


def _factors(products: Tensor, before_squares: Tensor, after_squares: Tensor) -> Tensor:
    """Nearest power of two of ⟨before, after⟩ / ‖before‖²; NaN where the directions differ, or nothing is there."""
    believed = products > _MIN_COSINE * (before_squares * after_squares).sqrt()
    return torch.where(believed, torch.exp2(torch.log2(products / before_squares).round()), torch.nan)


def _unless_ones(factors: Tensor) -> Tensor | None:
    return None if bool((factors == 1).all()) else factors
