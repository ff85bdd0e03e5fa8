"""Every step of Qwen2 in plain numpy, float64: slow, short, and what the fast kernels are tested against.

Each function takes arrays of any floating dtype and computes in float64, so that its own rounding never counts in a
comparison. Nothing is fused and nothing is written in place: a cache goes in and a new one comes out.

Shapes use the legend of `qwen_rt.tensors`.

Source of all formulas: Hugging Face transformers 5.23.0, `models/qwen2/modeling_qwen2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.spec import ModelSpec

__all__ = [
    "apply_rotary",
    "attention",
    "decode",
    "decoder_layer",
    "embed",
    "linear",
    "mlp",
    "rms_norm",
    "rotary_tables",
    "silu",
    "write_cache",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def _f64(array: ArrayLike) -> F64:
    return np.asarray(array, np.float64)


def embed(weight: ArrayLike, input_ids: ArrayLike) -> F64:
    """Look up token embeddings: `y[b, s] = weight[input_ids[b, s]]`.

    Args:
        weight: [V, C].
        input_ids: int[B, S].

    Returns:
        f64[B, S, C].

    Source: `Qwen2Model.embed_tokens`.
    """
    return _f64(np.asarray(weight)[np.asarray(input_ids, np.int64)])


def rms_norm(x: ArrayLike, weight: ArrayLike, eps: float) -> F64:
    """Normalize: `y = x / sqrt(mean(x²) + eps) · weight` over the last axis.

    Args:
        x: [..., C].
        weight: [C].
        eps: Added to the mean square.

    Returns:
        f64[..., C].

    Source: `Qwen2RMSNorm`.
    """
    values = _f64(x)
    deviation: F64 = np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + eps)
    return values / deviation * _f64(weight)


def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> F64:
    """Multiply by a matrix stored as [out, in]: `y = x · weightᵀ + bias`.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.

    Returns:
        f64[..., out].

    Source: `torch.nn.Linear`.
    """
    product = _f64(x) @ _f64(weight).T
    return product if bias is None else product + _f64(bias)


def silu(x: ArrayLike) -> F64:
    """Apply `y = x · sigmoid(x) = x / (1 + exp(-x))`, without overflow for any finite x.

    Args:
        x: [...].

    Returns:
        f64[...].

    Source: `torch.nn.functional.silu`.
    """
    values = _f64(x)
    small = np.exp(-np.abs(values))  # in (0, 1]
    return values * np.where(values >= 0, 1.0, small) / (1.0 + small)


def mlp(x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike) -> F64:
    """Apply the gated MLP: `y = down(silu(gate(x)) · up(x))`.

    Args:
        x: [..., C].
        gate: [F, C].
        up: [F, C].
        down: [C, F].

    Returns:
        f64[..., C].

    Source: `Qwen2MLP`.
    """
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def rotary_tables(positions: ArrayLike, inv_freq: ArrayLike, scaling: float = 1.0) -> tuple[F64, F64]:
    """Compute cos and sin of every token: `angle[b, s, i] = positions[b, s] · inv_freq[i]`, both times `scaling`.

    Args:
        positions: int[B, S].
        inv_freq: [D/2], radians per position (`RopeSpec.inv_freq`).
        scaling: YaRN's attention factor (`RopeSpec.attention_scaling`).

    Returns:
        cos and sin, f64[B, S, D/2] each.

    Source: `Qwen2RotaryEmbedding`, which repeats the D/2 values to fill D.
    """
    angles = _f64(positions)[..., None] * _f64(inv_freq)  # [B, S, D/2]
    return np.cos(angles) * scaling, np.sin(angles) * scaling


def apply_rotary(x: ArrayLike, cos: ArrayLike, sin: ArrayLike) -> F64:
    """Turn each head's pairs (i, i + D/2): `y1 = x1 · cos - x2 · sin`, `y2 = x2 · cos + x1 · sin`.

    Args:
        x: [B, heads, S, D].
        cos: [B, S, D/2].
        sin: [B, S, D/2].

    Returns:
        f64[B, heads, S, D].

    Source: `apply_rotary_pos_emb` with `rotate_half`.
    """
    first, second = np.split(_f64(x), 2, axis=-1)  # [B, heads, S, D/2] each
    c, s = _f64(cos)[:, None], _f64(sin)[:, None]  # [B, 1, S, D/2]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def write_cache(cache: ArrayLike, new: ArrayLike, write_indices: ArrayLike) -> F64:
    """Put new rows into a cache: `y[b, h, write_indices[b] + s] = new[b, h, s]`; every other row stays.

    Args:
        cache: [B, Hkv, Tmax, D].
        new: [B, Hkv, S, D].
        write_indices: int[B].

    Returns:
        f64[B, Hkv, Tmax, D], a copy.

    Raises:
        IndexError: A row would be written beyond Tmax.

    Source: `StaticLayer.update` of transformers' `cache_utils.py`; ONNX `TensorScatter`.
    """
    written, rows = _f64(cache).copy(), _f64(new)
    num_tokens, capacity = rows.shape[2], written.shape[2]
    for row, start in enumerate(np.asarray(write_indices, np.int64)):
        if start < 0 or start + num_tokens > capacity:
            raise IndexError(f"row {row}: {num_tokens} tokens from {start}, expected within 0 to {capacity}")
        written[row, :, start : start + num_tokens] = rows[row]
    return written


def attention(
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    write_indices: ArrayLike,
    scale: float,
    rounding: Callable[[F64], F64] | None = None,
    value_scales: ArrayLike | None = None,
) -> F64:
    """Attend causally over a cache: token s of row b sees cache rows 0 to `write_indices[b] + s`, and no other.

        y[b, h, s] = softmax_t(scale · q[b, h, s] · k[b, g, t]) · v[b, g, t]        g = h // (H / Hkv)

    Rows that a token does not see are not read: they may hold anything, NaN too.

    Args:
        query: [B, H, S, D].
        keys: [B, Hkv, Tmax, D], the new rows written already.
        values: [B, Hkv, Tmax, D].
        write_indices: int[B], position of each row's first token.
        scale: D**-0.5.
        rounding: Applied to `exp(score - largest score)` before the product with the values, as a kernel rounds what
            its matrix unit takes; their sum, by which the product is divided, is not rounded.
        value_scales: [B, Hkv, Tmax], what each row of `values` is to be multiplied by; taken into the exponentials, as
            a kernel does, before these are rounded.

    Returns:
        f64[B, H, S, D].

    Source: `eager_attention_forward` with `repeat_kv`.
    """
    q, k, v = _f64(query), _f64(keys), _f64(values)
    heads, num_tokens = q.shape[1:3]
    group = heads // k.shape[1]
    scales = np.ones(v.shape[:3]) if value_scales is None else _f64(value_scales)
    out = np.empty_like(q)
    for row, start in enumerate(np.asarray(write_indices, np.int64)):
        for token in range(num_tokens):
            visible = int(start) + token + 1
            for head in range(heads):
                scores = scale * (k[row, head // group, :visible] @ q[row, head, token])  # [T]
                weights = np.exp(scores - scores.max())
                scaled = weights * scales[row, head // group, :visible]
                taken = scaled if rounding is None else rounding(scaled)
                out[row, head, token] = taken @ v[row, head // group, :visible] / weights.sum()
    return out


def decoder_layer(
    spec: ModelSpec,
    weights: Mapping[str, ArrayLike],
    index: int,
    x: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    past_key: ArrayLike,
    past_value: ArrayLike,
    write_indices: ArrayLike,
) -> tuple[F64, F64, F64]:
    """Run one decoder layer: `h = x + attention(norm(x))`, `y = h + mlp(norm(h))`.

    Args:
        spec: The model.
        weights: Hugging Face tensor name → array.
        index: Which layer.
        x: [B, S, C].
        cos: [B, S, D/2].
        sin: [B, S, D/2].
        past_key: [B, Hkv, Tmax, D].
        past_value: [B, Hkv, Tmax, D].
        write_indices: int[B].

    Returns:
        f64[B, S, C], and keys and values with the new rows, f64[B, Hkv, Tmax, D] each.

    Source: `Qwen2DecoderLayer`, `Qwen2Attention`.
    """
    layer = f"model.layers.{index}"
    hidden = _f64(x)
    batch, num_tokens, _ = hidden.shape
    normed = rms_norm(hidden, weights[f"{layer}.input_layernorm.weight"], spec.rms_norm_eps)

    def heads(name: str, num_heads: int) -> F64:
        proj = f"{layer}.self_attn.{name}_proj"
        flat = linear(normed, weights[f"{proj}.weight"], weights[f"{proj}.bias"] if spec.qkv_bias else None)
        return flat.reshape(batch, num_tokens, num_heads, spec.head_dim).transpose(0, 2, 1, 3)  # [B, heads, S, D]

    query = apply_rotary(heads("q", spec.num_heads), cos, sin)
    keys = write_cache(past_key, apply_rotary(heads("k", spec.num_kv_heads), cos, sin), write_indices)
    values = write_cache(past_value, heads("v", spec.num_kv_heads), write_indices)
    attended = attention(query, keys, values, write_indices, spec.head_dim**-0.5)
    merged = attended.transpose(0, 2, 1, 3).reshape(batch, num_tokens, spec.num_heads * spec.head_dim)  # [B, S, H·D]
    hidden = hidden + linear(merged, weights[f"{layer}.self_attn.o_proj.weight"])
    normed_again = rms_norm(hidden, weights[f"{layer}.post_attention_layernorm.weight"], spec.rms_norm_eps)
    projections = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return hidden + mlp(normed_again, *projections), keys, values


def decode(
    spec: ModelSpec,
    weights: Mapping[str, ArrayLike],
    input_ids: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    write_indices: ArrayLike,
) -> tuple[F64, list[F64], list[F64]]:
    """Run the whole model over new tokens.

    Args:
        spec: The model.
        weights: Hugging Face tensor name → array, as `spec.parameters()` names them.
        input_ids: int[B, S].
        keys: Per layer [B, Hkv, Tmax, D].
        values: Per layer [B, Hkv, Tmax, D].
        write_indices: int[B], position of each row's first token.

    Returns:
        Logits of every token f64[B, S, V], and keys and values of every layer with the new rows.

    Source: `Qwen2ForCausalLM`.
    """
    ids = np.asarray(input_ids, np.int64)
    positions: I64 = np.asarray(write_indices, np.int64)[:, None] + np.arange(ids.shape[1])  # [B, S]
    cos, sin = rotary_tables(positions, spec.rope.inv_freq(spec.head_dim), spec.rope.attention_scaling)
    hidden = embed(weights["model.embed_tokens.weight"], ids)
    new_keys: list[Any] = []
    new_values: list[Any] = []
    for index in range(spec.num_layers):
        hidden, key, value = decoder_layer(
            spec, weights, index, hidden, cos, sin, keys[index], values[index], write_indices
        )
        new_keys.append(key)
        new_values.append(value)
    normed = rms_norm(hidden, weights["model.norm.weight"], spec.rms_norm_eps)
    head = weights["model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"]
    return linear(normed, head), new_keys, new_values
