"""Every plugin op once more in torch float64, on the device: what kernels are checked against, also before timing.

The small numpy references of `qwen_rt.plugins.reference` take minutes at real shapes; these take the inputs of an op as
the kernels do, and round only where the kernel's header says that it rounds what a later op reads (q' and k').
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_rt.benchmarks.quantized_cache import KvCache, quantize_heads
from qwen_rt.benchmarks.quantized_matrices import Matrix, bf16_matrix, fp8_rows, int8_rows

__all__ = [
    "FINE_MIN_COSINE",
    "FINE_TOLERANCES",
    "FP8_MIN_COSINE",
    "FP8_TOLERANCES",
    "MIN_COSINE",
    "PREFILL_MIN_COSINE",
    "PREFILL_TOLERANCES",
    "TOLERANCES",
    "attention",
    "attention_8bit",
    "down_residual",
    "embed",
    "lm_head",
    "o_proj_residual",
    "problem_of",
    "rmsnorm_gate_up_silu",
    "rmsnorm_qkv",
    "sample",
]

TOLERANCES = {
    "rmsnorm_qkv": (2**-7, 2**-6),
    "rope_kv_append_attention": (2**-7, 2**-6),
    "o_proj_residual": (2**-7, 2**-8),
    "select_o_proj_residual": (2**-7, 2**-8),
    "rmsnorm_gate_up_silu": (2**-5, 2**-5),
    "down_residual": (2**-7, 2**-8),
    "lm_head": (0.0, 2**-6),
}
"""(relative, absolute in units of the reference's rms): |out - ref| <= relative · |ref| + absolute · rms(ref).

bf16 has u = 2^-8. Relative: the one rounding of the result, twice over. Absolute: inputs rounded on the way. Rounding
x ∘ norm_weight errs by up to u a term, uniformly, so a sum by about u / sqrt(3) of its rms: 2^-6 is seven sigma, which
less than one in 10^11 reaches. That error e of gate and up makes e / |gate| + e / |up| of their product: twice as much
where both are at their rms or above, and less than 2^-5 rms where not. Attention rounds probabilities. Residual ops
round nothing before the end; f32 sums of 29568 terms err by 2^-24 · sqrt(29568) = 10^-5 rms.
"""

MIN_COSINE = 0.99999
"""Uniform rounding by u of inputs and result leaves 1 - cos = u² / 3 = 5e-6 at most."""

PREFILL_MIN_COSINE = 0.99998
"""A prefill rounds gate and up on the way too: four roundings of the factors instead of two, and the result's."""

PREFILL_TOLERANCES = TOLERANCES | {
    "o_proj_residual": (2**-7, 2**-6),
    "rmsnorm_gate_up_silu": (2**-5, 2**-4),
    "down_residual": (2**-7, 2**-6),
}
"""As `TOLERANCES`, for rows that go to cuBLASLt. Some of its kernels round the product to bf16 before they add the
residual: half a unit in the last place of a product of up to six rms is 2^-9 · 6 = 2^-6.4. Gate and up are rounded too,
so their product may be off by twice as much."""


FINE_MIN_COSINE = 0.99998
"""Weights whose groups have less than 128 columns are rounded too, to bf16: three roundings instead of two."""

FINE_TOLERANCES = {op: (relative, max(absolute * 2, 2**-5)) for op, (relative, absolute) in PREFILL_TOLERANCES.items()}
"""For matrices that a kernel rounds to bf16 first: by u a term, uniformly, as it rounds activations. So the error of a
sum is sqrt(2) that of `TOLERANCES`, and of residual ops, which round nothing else, that of the others."""

FP8_MIN_COSINE = 0.9999
"""A prefill on fp8 matrices: see `FP8_TOLERANCES`."""

FP8_TOLERANCES = {op: (relative, 2 * max(absolute, 2**-5)) for op, (relative, absolute) in PREFILL_TOLERANCES.items()}
"""Activations are rounded to e4m3 in the reference too, but not always alike: x · (448 / max) in f32 and in f64 may
fall to either side of a tie, and in rows whose maximum is a small integer times a power of two one in sixteen is a tie.
Those rows err by up to 1 % of their rms, which is 2^-4 at six sigma; a product of gate and up by twice that."""

AnyMatrix = Tensor | Matrix


def _matrix(weight: AnyMatrix) -> Matrix:
    return bf16_matrix(weight) if isinstance(weight, Tensor) else weight


def embed(ids: Tensor, table: AnyMatrix) -> Tensor:
    """Return `table[ids]`: bf16[rows, hidden]."""
    if isinstance(table, Tensor):
        return table[ids]
    return torch.cat([table.rows(index, index + 1) for index in ids.tolist()]).float().bfloat16()


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = hidden.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.double()


def _linear(x: Tensor, weight: AnyMatrix, *, fp8: bool = False, int8: bool = False) -> Tensor:
    """X · weightᵀ in float64, a slice of the weights at a time: [rows, out]; activations as rounded to e4m3 or int8."""
    matrix, x = _matrix(weight), x.double()
    if fp8 or int8:
        x = fp8_rows(x) if fp8 else int8_rows(x)
    starts = range(0, matrix.shape[0], 16384)
    return torch.cat([x @ matrix.rows(start, min(start + 16384, matrix.shape[0])).T for start in starts], dim=-1)


def rmsnorm_qkv(
    hidden: Tensor,
    norm_weight: Tensor,
    weights: Sequence[AnyMatrix],
    biases: Sequence[Tensor | None],
    epsilon: float,
    *,
    fp8: bool = False,
    int8: bool = False,
) -> Tensor:
    """Return f64[rows, q_width + 2 kv_width]; `fp8`, `int8`: activations are rounded too, as many rows' are."""
    y = _norm(hidden, norm_weight, epsilon)
    parts = []
    for weight, bias in zip(weights, biases, strict=True):
        part = _linear(y, weight, fp8=fp8, int8=int8)
        parts.append(part if bias is None else part + bias.double())
    return torch.cat(parts, dim=-1)


def _rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, rope_scaling: float) -> Tensor:
    """Turn [rows, heads, D]; the angle is the f32 product, as everywhere."""
    return _turn(x, (positions.float()[:, None, None] * inv_freq).double(), rope_scaling)


def _turn_exactly(x: Tensor, positions: Tensor, inv_freq: Tensor, rope_scaling: float) -> Tensor:
    """Turn [rows, heads, D] by the exact product of position and frequency."""
    return _turn(x, positions.double()[:, None, None] * inv_freq.double(), rope_scaling)


def _turn(x: Tensor, angle: Tensor, rope_scaling: float) -> Tensor:
    """Turn [rows, heads, D] by `angle`, f64[rows, 1, D / 2]."""
    cos, sin = angle.cos() * rope_scaling, angle.sin() * rope_scaling
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(
    qkv: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    block_tables: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    rope_scaling: float = 1.0,
    query_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend causally over the cache and the new tokens.

    Args:
        qkv: bf16[rows, (heads + 2 kv_heads) · D].
        positions: i64[rows]; negative: the row is idle.
        inv_freq: f32[D / 2].
        block_tables: i32[sequences, max_blocks].
        k_cache: bf16[num_blocks, kv_heads, block_size, D], left as it is.
        v_cache: Likewise.
        scale: Factor of the scores.
        rope_scaling: Factor of cosines and sines.
        query_starts: i32[sequences + 1]: the first row of each sequence; None for one row each.

    Returns:
        out f64[rows, heads · D], the new keys f64 and values bf16 [rows, kv_heads, D]; idle rows are zero.
    """
    _, kv_heads, block_size, head_dim = k_cache.shape
    rows, heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads
    starts = list(range(rows + 1)) if query_starts is None else query_starts.tolist()
    is_busy = (positions >= 0)[:, None, None]
    q, k, v = torch.split(qkv.view(rows, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    turned = _rotate(q, positions, inv_freq, rope_scaling).bfloat16().double()
    new_keys = torch.where(is_busy, _rotate(k, positions, inv_freq, rope_scaling), 0.0)
    new_values = torch.where(is_busy, v, torch.zeros_like(v))
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float64, device=qkv.device)
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts)):
        busy = torch.arange(begin, end, device=qkv.device)[positions[begin:end] >= 0]
        if not len(busy):
            continue
        at = positions[busy]
        length = int(at.max()) + 1
        blocks = block_tables[sequence, : (length - 1) // block_size + 1].long()
        # [blocks, kv_heads, block_size, D] -> [kv_heads, tokens, D]
        keys = k_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length].double()
        values = v_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length].double()
        keys[:, at] = new_keys[busy].bfloat16().double().transpose(0, 1)
        values[:, at] = new_values[busy].double().transpose(0, 1)
        is_later = torch.arange(length, device=qkv.device) > at[:, None]  # [rows, tokens]
        group = heads // kv_heads
        for head in range(heads):
            scores = turned[busy, head] @ keys[head // group].T * scale
            out[busy, head] = scores.masked_fill(is_later, -math.inf).softmax(-1) @ values[head // group]
    return out.flatten(1), new_keys, new_values


def attention_8bit(
    qkv: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    block_tables: Tensor,
    cache: KvCache,
    scale: float,
    rope_scaling: float = 1.0,
    query_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` over a quantized cache: new tokens are seen as it gives them back, and nothing else is rounded.

    Args:
        qkv: bf16[rows, (heads + 2 kv_heads) · D].
        positions: i64[rows]; negative: the row is idle.
        inv_freq: f32[D / 2].
        block_tables: i32[sequences, max_blocks].
        cache: Left as it is.
        scale: Factor of the scores.
        rope_scaling: Factor of cosines and sines.
        query_starts: i32[sequences + 1]: the first row of each sequence; None for one row each.

    Returns:
        out f64[rows, heads · D]; the new keys, turned, and values, not rounded, f64[rows, kv_heads, D]; idle rows are
        zero.
    """
    _, kv_heads, block_size, head_dim = cache.keys.shape
    rows, heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads
    starts = list(range(rows + 1)) if query_starts is None else query_starts.tolist()
    q, k, v = torch.split(qkv.double().view(rows, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    turned = _turn_exactly(q, positions, inv_freq, rope_scaling)
    news = (_turn_exactly(k, positions, inv_freq, rope_scaling), v)
    seen = []
    for new in news:
        numbers, scales = quantize_heads(new, cache.format)
        seen.append(numbers.to(torch.float32).double() * scales.double()[..., None])
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float64, device=qkv.device)
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts)):
        busy = torch.arange(begin, end, device=qkv.device)[positions[begin:end] >= 0]
        if not len(busy):
            continue
        at = positions[busy]
        length = int(at.max()) + 1
        keys, values = cache.read(block_tables[sequence, : (length - 1) // block_size + 1].long(), length)
        keys[:, at], values[:, at] = (new[busy].transpose(0, 1) for new in seen)
        if cache.key_offset is not None:
            tokens = torch.arange(length, device=qkv.device)
            offsets = cache.key_offset.expand(length, kv_heads, head_dim)
            keys = keys + _turn_exactly(offsets, tokens, inv_freq, rope_scaling).transpose(0, 1)
        if cache.value_offset is not None:
            values = values + cache.value_offset.double()[:, None]
        group = heads // kv_heads
        grouped = turned[busy].view(len(busy), kv_heads, group, head_dim)
        scores = torch.einsum("qhgd,htd->hgqt", grouped, keys) * scale
        is_later = torch.arange(length, device=qkv.device) > at[:, None]  # [rows, tokens]
        weights = scores.masked_fill(is_later, -math.inf).softmax(-1)
        out[busy] = torch.einsum("hgqt,htd->qhgd", weights, values).flatten(1, 2)
    is_busy = (positions >= 0)[:, None, None]
    return out.flatten(1), torch.where(is_busy, news[0], 0.0), torch.where(is_busy, news[1], 0.0)


def o_proj_residual(x: Tensor, weight: AnyMatrix, residual: Tensor, *, fp8: bool = False, int8: bool = False) -> Tensor:
    """Return f64[rows, hidden]."""
    return residual.double() + _linear(x, weight, fp8=fp8, int8=int8)


down_residual = o_proj_residual


def rmsnorm_gate_up_silu(
    hidden: Tensor,
    norm_weight: Tensor,
    gate: AnyMatrix,
    up: AnyMatrix,
    epsilon: float,
    *,
    fp8: bool = False,
    int8: bool = False,
) -> Tensor:
    """Return f64[rows, ffn]."""
    y = _norm(hidden, norm_weight, epsilon)
    gated = torch.nn.functional.silu(_linear(y, gate, fp8=fp8, int8=int8))
    return gated * _linear(y, up, fp8=fp8, int8=int8)


def lm_head(hidden: Tensor, norm_weight: Tensor, weight: AnyMatrix, epsilon: float) -> Tensor:
    """Return f64[rows, vocab]; `hidden` holds the chosen rows only."""
    return _linear(_norm(hidden, norm_weight, epsilon), weight)


def sample(logits: Tensor) -> Tensor:
    """Return i64[rows]: the largest, the lowest id among equals."""
    best = logits.max(-1, keepdim=True).values
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[1]).min(-1).values


def problem_of(
    op: str,
    out: Tensor,
    reference: Tensor,
    *,
    is_prefill: bool = False,
    is_fine: bool = False,
    is_fp8: bool = False,
) -> str:
    """Compare the output of an op with its reference; return what is wrong, or nothing.

    Args:
        op: Which.
        out: Of the kernel.
        reference: float64.
        is_prefill: Of cuBLASLt: more than 64 rows, or of bf16 matrices more than 32.
        is_fine: Of matrices that the kernel rounds to bf16 first.
        is_fp8: Of activations that are rounded to e4m3 or int8.
    """
    min_cosine, tolerances = MIN_COSINE, TOLERANCES
    if is_fp8:
        min_cosine, tolerances = FP8_MIN_COSINE, FP8_TOLERANCES
    elif is_fine:
        min_cosine, tolerances = FINE_MIN_COSINE, FINE_TOLERANCES
    elif is_prefill:
        min_cosine, tolerances = PREFILL_MIN_COSINE, PREFILL_TOLERANCES
    got, want = out.double().flatten(), reference.double().flatten()
    if got.shape != want.shape:
        return f"{op}: {got.numel()} elements instead of {want.numel()}"
    if not bool(torch.isfinite(got).all()):
        return f"{op}: {int((~torch.isfinite(got)).sum())} elements of {got.numel()} are not finite"
    relative, absolute = tolerances[op]
    rms = math.sqrt(float(want.square().mean()))
    error = (got - want).abs()
    excess = error - (relative * want.abs() + absolute * rms)
    worst = int(excess.argmax())
    cosine = float(got @ want / (got.norm() * want.norm()).clamp_min(1e-300))
    if float(excess[worst]) > 0 or cosine < min_cosine:
        return (
            f"{op}: {int((excess > 0).sum())} of {got.numel()} out of tolerance, worst at {worst}: "
            f"{float(got[worst]):.6g} instead of {float(want[worst]):.6g} (rms {rms:.4g}, cosine {cosine:.6f})"
        )
    return ""
