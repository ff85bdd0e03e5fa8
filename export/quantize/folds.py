"""Factors that a build moved from one tensor into its neighbours before it quantized, read off the two models.

A calibrated build multiplies columns of a matrix, to round them more finely, and divides what feeds them by the same:

| columns of                  | are fed by the rows, or elements, of |
|-----------------------------|--------------------------------------|
| q_proj, k_proj, v_proj      | input_layernorm                      |
| o_proj                      | v_proj and its bias                  |
| gate_proj, up_proj          | post_attention_layernorm             |
| down_proj                   | up_proj                              |

The model computes the same, but its matrices are no longer the source's: W' = diag(rows) · W · diag(columns). Norms are
not quantized, so the ratio of their elements is the factor. All are powers of two, which round nothing. Factors of rows
show in the rows themselves and in the columns that these feed; where the two contradict each other nothing was folded,
but a scale is wrong, and is seen to be in the matrix that has it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_rt.export.quantize.forward import Forward
from qwen_rt.row_reader import RowSource

__all__ = ["LayerFolds"]

F32 = NDArray[np.float32]

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

    Attributes:
        norms: Name of each norm → what its elements were divided by, f32[C].
    """

    def __init__(self, source: Forward, quantized: Forward, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        spec = source.spec
        self.norms = {
            f"{prefix}.{norm}.weight": _norm_factors(source, quantized, f"{prefix}.{norm}.weight")
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        into_qkv, into_mlp = (_unless_ones(factors) for factors in self.norms.values())
        self._columns: dict[str, F32 | None] = {
            **{f"{prefix}.self_attn.{name}_proj.weight": into_qkv for name in "qkv"},
            **{f"{prefix}.mlp.{name}_proj.weight": into_mlp for name in ("gate", "up")},
        }
        self._value, up = f"{prefix}.self_attn.v_proj.weight", f"{prefix}.mlp.up_proj.weight"
        out, down = f"{prefix}.self_attn.o_proj.weight", f"{prefix}.mlp.down_proj.weight"
        group = spec.num_heads // spec.num_kv_heads
        self._fed_by = {out: self._value, down: up}
        # The query heads of a group share their values, so their columns have the same factors.
        self._heads = {out: (spec.num_kv_heads, group, spec.head_dim), down: (1, 1, spec.intermediate_size)}
        self._rows = {
            feeding: np.reciprocal(_column_factors(source.rows, quantized.rows, name, self._heads[name]))
            for name, feeding in self._fed_by.items()
        }
        self._of_columns = self._rows[self._value].copy()

    def columns(self, name: str) -> F32 | None:
        """Factors of a matrix's columns, f32[K]; None if all are 1. Rows that feed them have to have passed."""
        if name not in self._fed_by:
            return self._columns[name]
        kv_heads, group, width = self._heads[name]
        rows = self._rows[self._fed_by[name]].reshape(kv_heads, 1, width)
        return _unless_ones(np.reciprocal(np.repeat(rows, group, 1)).reshape(-1))

    def rows(self, name: str, start: int, before: F32, after: F32) -> F32 | None:
        """Factors of some rows, f32[n]; None if all are 1. Threads may ask for different rows side by side.

        Args:
            name: The matrix.
            start: Number of the first row.
            before: f32[n, K], the source's rows, their columns multiplied already.
            after: f32[n, K], the bundle's.
        """
        if name not in self._rows:
            return None
        expected = self._rows[name][start : start + len(before)]
        sums = (np.einsum("nk,nk->n", *pair) for pair in ((before, after), (before, before), (after, after)))
        found = _factors(*sums)
        agreed = (found == expected) | (np.isnan(expected) & ~np.isnan(found))
        expected[:] = np.where(agreed, found, 1)
        return _unless_ones(expected)

    def value_rows(self, before: F32 | None, after: F32 | None) -> F32:
        """Factors of what v_proj gives, once its rows have passed: f32[Hkv·D].

        Args:
            before: f32[Hkv·D], the source's bias; None without one.
            after: f32[Hkv·D], the bundle's, with what the cache's offset holds of it. Where rows and columns contradict
                each other it tells which of them are wrong.
        """
        rows = self._rows[self._value]
        if before is None or after is None:
            return rows
        other = np.where(np.isnan(self._of_columns), rows, self._of_columns)
        closer: F32 = np.where(np.abs(before * other - after) < np.abs(before * rows - after), other, rows)
        return closer


@np.errstate(invalid="ignore", over="ignore")
def _norm_factors(source: Forward, quantized: Forward, name: str) -> F32:
    """What a norm was divided by, to the nearest power of two; 1 where either weight is 0, or their signs differ."""
    before, after = source.vector(name).numpy(), quantized.vector(name).numpy()
    ratio = np.divide(before, after, out=np.ones_like(before), where=(before != 0) & (after != 0))
    usable = np.isfinite(ratio) & (ratio > 0)
    factors: F32 = np.exp2(np.rint(np.log2(np.where(usable, ratio, 1)))).astype(np.float32)
    return factors


@np.errstate(invalid="ignore", over="ignore")
def _column_factors(source: RowSource, quantized: RowSource, name: str, heads: tuple[int, int, int]) -> F32:
    """What columns were multiplied by, by the first rows: f32[Hkv·D], NaN where they do not tell."""
    sums = np.zeros((3, heads[0] * heads[2]), np.float32)
    for start in range(0, min(_SAMPLE_ROWS, source.shape(name)[0]), _SAMPLE_PIECE):
        before, after = (rows.rows(name, start, start + _SAMPLE_PIECE) for rows in (source, quantized))
        for total, pair in zip(sums, ((before, after), (before, before), (after, after)), strict=True):
            total += np.einsum("nk,nk->k", *pair).reshape(heads).sum(1).reshape(-1)
    return _factors(*sums)


def _factors(products: F32, before_squares: F32, after_squares: F32) -> F32:
    """Nearest power of two of ⟨before, after⟩ / ‖before‖²; NaN where the directions differ, or nothing is there."""
    believed = products > _MIN_COSINE * np.sqrt(before_squares) * np.sqrt(after_squares)
    factors = np.full_like(products, np.nan)
    np.divide(products, before_squares, out=factors, where=believed)
    np.log2(factors, out=factors, where=believed)
    result: F32 = np.exp2(np.rint(factors))
    return result


def _unless_ones(factors: F32) -> F32 | None:
    return None if (factors == 1).all() else factors
