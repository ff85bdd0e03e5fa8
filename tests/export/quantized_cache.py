"""A model whose keys and values are rounded to eight bits, in numpy: the formula of `qwen_rt.quantization` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt import tensors
from qwen_rt.export.quantize.kv import KvPlan
from qwen_rt.plugins import reference
from qwen_rt.quantization import fake_quantize_kv, round_fp8
from qwen_rt.spec import ModelSpec

from .paged import Chunk

F64 = NDArray[np.float64]
Rounding = Callable[[F64, F64], F64]
"""(vectors [..., D] without their offset, offset) → what comes back of them, the offset not added."""


def as_planned(kv: KvPlan) -> Rounding:
    """Eight bits with a scale for each token and head."""
    return lambda x, offset: fake_quantize_kv(x, kv.kv_format)


def per_tensor_fp8(x: F64, offset: F64) -> F64:
    """What a cache does that knows neither offsets nor heads: one scale for the whole tensor, the best there is."""
    whole = x + offset
    scale = np.abs(whole).max() / 448
    return round_fp8(whole / scale) * scale - offset


class NumpyModel:
    """The decoder in float64, chunk after chunk; each sequence has a cache of its own.

    Args:
        spec: The model.
        weights: Its parameters, biases whole.
        kv: Offsets of its cache; None for zeros.
        rounding: What the cache does to keys and values.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, ArrayLike], kv: KvPlan | None, rounding: Rounding | None = None
    ) -> None:
        self.spec, self.weights, self.kv = spec, weights, kv
        if rounding is None:
            rounding = as_planned(kv) if kv is not None else lambda x, offset: x
        self.rounding = rounding
        self.keys: dict[int, list[F64]] = {}
        self.values: dict[int, list[F64]] = {}
        self.rounded: dict[tuple[int, str], list[F64]] = {}

    def call(self, chunks: Sequence[Chunk]) -> F64:
        """Feed chunks one after the other; logits after each, [B, V]."""
        return np.stack([self.logits(sequence, ids)[-1] for sequence, ids in chunks])

    def logits(self, sequence: int, ids: NDArray[np.int64]) -> F64:
        """Feed a chunk; logits of all its tokens, [S, V]."""
        spec, weights = self.spec, self.weights
        empty = np.zeros((spec.num_kv_heads, 0, spec.head_dim))
        keys = self.keys.setdefault(sequence, [empty] * spec.num_layers)
        values = self.values.setdefault(sequence, [empty] * spec.num_layers)
        positions = keys[0].shape[1] + np.arange(len(ids))
        tables = reference.rotary_tables(
            positions[None], spec.rope.inv_freq(spec.head_dim), spec.rope.attention_scaling
        )
        hidden = reference.embed(weights["model.embed_tokens.weight"], ids)  # [S, C]
        for index in range(spec.num_layers):
            name = f"model.layers.{index}"
            normed = reference.rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], spec.rms_norm_eps)
            query = self._turn(self._heads(index, "q", normed), tables)
            key, value = self._cached(sequence, index, normed, tables)
            keys[index] = np.concatenate([keys[index], key], axis=1)
            values[index] = np.concatenate([values[index], value], axis=1)
            attended = self._attend(query, keys[index], values[index], positions)
            hidden = hidden + reference.linear(attended, weights[f"{name}.self_attn.o_proj.weight"])
            normed = reference.rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], spec.rms_norm_eps)
            mlp = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            hidden = hidden + reference.mlp(normed, *mlp)
        normed = reference.rms_norm(hidden, weights["model.norm.weight"], spec.rms_norm_eps)
        head = weights["model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"]
        return reference.linear(normed, head)

    def _heads(self, index: int, letter: str, normed: F64) -> F64:
        """q, k or v with the whole bias, [heads, S, D]."""
        name = f"model.layers.{index}.self_attn.{letter}_proj"
        bias = self.weights[f"{name}.bias"] if self.spec.qkv_bias else None
        flat = reference.linear(normed, self.weights[f"{name}.weight"], bias)
        return flat.reshape(len(normed), -1, self.spec.head_dim).swapaxes(0, 1)

    def _turn(self, x: F64, tables: tuple[F64, F64]) -> F64:
        return reference.apply_rotary(x[None], *tables)[0]

    def cached(self, sequence: int) -> dict[str, F64]:
        """Past name → what a sequence's cache gives back, without offsets: [Hkv, T, D]."""
        return {name: np.concatenate(parts, 1) for (of, name), parts in self.rounded.items() if of == sequence}

    def _cached(self, sequence: int, index: int, normed: F64, tables: tuple[F64, F64]) -> tuple[F64, F64]:
        """New keys and values, [Hkv, S, D] each, as the cache gives them back."""
        key, value = (self._heads(index, letter, normed) for letter in "kv")
        key_offset, value_offset = np.zeros_like(key), np.zeros_like(value)
        if self.kv is not None:
            key_offset += self.kv.layers[index].key_offset[:, None]
            value_offset += self.kv.layers[index].value_offset[:, None]
        turned = self._turn(key_offset, tables)
        key = self.rounding(self._turn(key - key_offset, tables), turned)
        value = self.rounding(value - value_offset, value_offset)
        for name, rounded in ((tensors.past_key(index), key), (tensors.past_value(index), value)):
            self.rounded.setdefault((sequence, name), []).append(rounded)
        return key + turned, value + value_offset

    def _attend(self, query: F64, keys: F64, values: F64, positions: NDArray[np.int64]) -> F64:
        """Causal attention of some tokens, [S, H·D]."""
        group = len(query) // len(keys)
        scores = query @ np.repeat(keys, group, axis=0).swapaxes(1, 2) * self.spec.head_dim**-0.5  # [H, S, T]
        scores = np.where(np.arange(keys.shape[1]) <= positions[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights @ np.repeat(values, group, axis=0) / weights.sum(-1, keepdims=True)
        return attended.swapaxes(0, 1).reshape(len(positions), -1)
