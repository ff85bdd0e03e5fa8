"""What rounding does to the keys and values of a layer, with its own weights: the error that attention gets to see.

    keys    |q · (k' - k)| / |q · R(place) (k - mean of k)|, a query's mean over its visible keys taken off both
    values  |v' - v| / |v - mean of v|

Scores are all that softmax sees of keys, and it does not see their mean over the keys of a query. The denominators are
what tells one token from another: with a bias of any size they stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qwen_rt.errors import CheckpointError
from qwen_rt.export.quantize.forward import multiply
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["KvSample", "Rounding", "read_bias", "sample_layer"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Rounding = Callable[[F64], F64]
"""What a cache gives back for head vectors [N, Hkv, D]."""

NUM_TOKENS = 256
_TOKENS_PER_QUERY = 4  # every fourth token asks; the first query sees four keys


@dataclass(frozen=True, eq=False)
class KvSample:
    """Queries, keys and values of some tokens of a layer, biases and all.

    Attributes:
        queries: Turned, f64[M, H, D].
        keys: Not turned, f64[N, Hkv, D].
        values: f64[N, Hkv, D].
        places: Positions of keys and values, ascending, int64[N].
        visible: Which keys each query sees, bool[M, N].
        inv_freq: f64[D/2].
    """

    queries: F64
    keys: F64
    values: F64
    places: NDArray[np.int64]
    visible: NDArray[np.bool_]
    inv_freq: F64

    def key_errors(self, rounding: Rounding, offset: ArrayLike = 0.0) -> F64:
        """Relative error of the scores of each kv head, f64[Hkv], if `R(place) · (k - offset)` is rounded."""
        whole = self._scores_size(_turn(self.keys - self.keys.mean(0), self.places, self.inv_freq))
        turned = _turn(self.keys - np.asarray(offset), self.places, self.inv_freq)
        return _ratio(self._scores_size(rounding(turned) - turned), whole)

    def value_errors(self, rounding: Rounding, offset: ArrayLike = 0.0) -> F64:
        """Relative error of the values of each kv head, f64[Hkv], if `v - offset` is rounded."""
        stored = self.values - np.asarray(offset)
        error, whole = rounding(stored) - stored, self.values - self.values.mean(0)
        return _ratio(np.sqrt((error**2).sum((0, 2))), np.sqrt((whole**2).sum((0, 2))))

    def _scores_size(self, keys: F64) -> F64:
        """Norm of the scores of turned keys [N, Hkv, D], their mean over visible keys taken off: f64[Hkv]."""
        (num_queries, _, head_dim), kv_heads = self.queries.shape, keys.shape[1]
        queries = self.queries.reshape(num_queries, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        scores = queries @ keys.transpose(1, 2, 0)[:, None]  # [Hkv, H/Hkv, M, N]
        mean = np.where(self.visible, scores, 0).sum(-1, keepdims=True) / self.visible.sum(-1, keepdims=True)
        centred = np.where(self.visible, scores - mean, 0).reshape(kv_heads, -1)
        norms: F64 = np.linalg.norm(centred, axis=-1)
        return norms


def sample_layer(
    rows: RowSource,
    spec: ModelSpec,
    index: int,
    hidden: ArrayLike | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> KvSample:
    """Compute queries, keys and values of some tokens at random positions.

    Args:
        rows: The parameters, biases whole. Matrices are read in blocks.
        spec: The model.
        index: The layer.
        hidden: Hidden states of a text before the layer (before its norm), f32[..., C], of which at most 256 are
            taken, evenly. None draws 256 from a normal distribution.
        max_length: Positions are below it; None for the model's context length.
        seed: Of what is drawn, together with `index`.

    Raises:
        CheckpointError: Queries, keys or values are not finite.
    """
    rng = np.random.default_rng([seed, index])
    drawn = rng.standard_normal((NUM_TOKENS, spec.hidden_size))
    x = _norm(rows, spec, index, drawn if hidden is None else _evenly(np.asarray(hidden, np.float64)))
    is_query = np.arange(len(x)) % _TOKENS_PER_QUERY == _TOKENS_PER_QUERY - 1
    is_query[-1] = True
    places = np.sort(rng.integers(0, spec.context_length if max_length is None else max_length, len(x)))
    inv_freq = spec.rope.inv_freq(spec.head_dim).astype(np.float64)
    k, v = (_project(rows, spec, index, letter, x) for letter in "kv")
    q = _turn(_project(rows, spec, index, "q", x[is_query]), places[is_query], inv_freq)
    for name, array in (("keys", k), ("values", v), ("queries", q)):
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{name} of layer {index} are not finite", "finite weights and biases", "download the checkpoint again"
            )
    return KvSample(q, k, v, places, places <= places[is_query, None], inv_freq)


def read_bias(rows: RowSource, spec: ModelSpec, index: int, letter: str) -> F32 | None:
    """The bias of q, k or v of a layer, f32[heads · D]; None if the model has none."""
    if not spec.qkv_bias:
        return None
    name = f"model.layers.{index}.self_attn.{letter}_proj.bias"
    return rows.rows(name, 0, rows.shape(name)[0])


def _norm(rows: RowSource, spec: ModelSpec, index: int, hidden: F64) -> F32:
    """Outputs of the layer's first norm, which q, k and v are made of: f32[N, C]."""
    weight = rows.rows(f"model.layers.{index}.input_layernorm.weight", 0, spec.hidden_size)
    normed: F64 = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + spec.rms_norm_eps) * weight
    return normed.astype(np.float32)


def _project(rows: RowSource, spec: ModelSpec, index: int, letter: str, x: F32) -> F64:
    """q, k or v of some tokens, bias and all: [N, heads, D]."""
    product = multiply(rows, f"model.layers.{index}.self_attn.{letter}_proj.weight", torch.from_numpy(x))
    bias = read_bias(rows, spec, index, letter)
    whole = product.numpy().astype(np.float64) + (0.0 if bias is None else bias)
    return whole.reshape(len(x), -1, spec.head_dim)


def _turn(x: F64, places: NDArray[np.int64], inv_freq: F64) -> F64:
    """`R(place) · x` for [N, heads, D]; YaRN's factor is left out, which no relative error shows."""
    angles = (places[:, None] * inv_freq)[:, None]  # [N, 1, D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _ratio(error: F64, whole: F64) -> F64:
    """`error / whole`; 0 where both are."""
    found: F64 = np.where(error > 0, error / np.maximum(whole, np.finfo(np.float64).tiny), 0.0)
    return found


def _evenly(hidden: F64) -> F64:
    """At most `NUM_TOKENS` of the rows [..., C], evenly spaced: [N, C]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) <= NUM_TOKENS:
        return flat
    return flat[np.linspace(0, len(flat) - 1, NUM_TOKENS).round().astype(np.int64)]
