"""Every plugin op once more in torch float64, on the device: what kernels are checked against, also before timing.

The small numpy references of `qwen_rt.plugins.reference` take minutes at real shapes; these take the inputs of an op as
the kernels do, and round only where the kernel's header says that it rounds what a later op reads (q' and k').
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "MIN_COSINE",
    "TOLERANCES",
    "attention",
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


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Return `table[ids]`: bf16[rows, hidden]."""
    return table[ids]


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = hidden.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.double()


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """X · weightᵀ in float64, a slice of the weights at a time: [rows, out]."""
    return torch.cat([x.double() @ part.double().T for part in torch.split(weight, 16384)], dim=-1)


def rmsnorm_qkv(
    hidden: Tensor,
    norm_weight: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    epsilon: float,
) -> Tensor:
    """Return f64[rows, q_width + 2 kv_width]."""
    y = _norm(hidden, norm_weight, epsilon)
    parts = []
    for weight, bias in zip(weights, biases, strict=True):
        part = _linear(y, weight)
        parts.append(part if bias is None else part + bias.double())
    return torch.cat(parts, dim=-1)


def _rotate(x: Tensor, position: int, inv_freq: Tensor, rope_scaling: float) -> Tensor:
    """Turn [heads, D]; the angle is the f32 product, as everywhere."""
    angle = (torch.tensor(float(position), dtype=torch.float32, device=x.device) * inv_freq).double()
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out f64[rows, heads · D], and the new keys f64 and values bf16 [rows, kv_heads, D]; idle rows are zero."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    out = torch.zeros(qkv.shape[0], heads, head_dim, dtype=torch.float64, device=qkv.device)
    new_keys = torch.zeros(qkv.shape[0], kv_heads, head_dim, dtype=torch.float64, device=qkv.device)
    new_values = torch.zeros(qkv.shape[0], kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        q, k, v = torch.split(qkv[row].view(-1, head_dim), [heads, kv_heads, kv_heads])
        q = _rotate(q, position, inv_freq, rope_scaling).bfloat16().double()
        new_keys[row] = _rotate(k, position, inv_freq, rope_scaling)
        new_values[row] = v
        blocks = block_tables[row, : position // block_size + 1].long()
        # [blocks, kv_heads, block_size, D] -> [kv_heads, tokens, D]
        keys = k_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, : position + 1].double()
        values = v_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, : position + 1].double()
        keys[:, position] = new_keys[row].bfloat16().double()
        values[:, position] = v.double()
        scores = q.view(kv_heads, -1, head_dim) @ keys.transpose(1, 2) * scale  # [kv_heads, group, tokens]
        out[row] = (scores.softmax(-1) @ values).view(heads, head_dim)
    return out.flatten(1), new_keys, new_values


def o_proj_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return f64[rows, hidden]."""
    return residual.double() + _linear(x, weight)


down_residual = o_proj_residual


def rmsnorm_gate_up_silu(hidden: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, epsilon: float) -> Tensor:
    """Return f64[rows, ffn]."""
    y = _norm(hidden, norm_weight, epsilon)
    return torch.nn.functional.silu(_linear(y, gate)) * _linear(y, up)


def lm_head(hidden: Tensor, norm_weight: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return f64[rows, vocab]."""
    return _linear(_norm(hidden, norm_weight, epsilon), weight)


def sample(logits: Tensor) -> Tensor:
    """Return i64[rows]: the largest, the lowest id among equals."""
    best = logits.max(-1, keepdim=True).values
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[1]).min(-1).values


def problem_of(op: str, out: Tensor, reference: Tensor) -> str:
    """Compare the output of an op with its reference; return what is wrong, or nothing."""
    got, want = out.double().flatten(), reference.double().flatten()
    if got.shape != want.shape:
        return f"{op}: {got.numel()} elements instead of {want.numel()}"
    if not bool(torch.isfinite(got).all()):
        return f"{op}: {int((~torch.isfinite(got)).sum())} elements of {got.numel()} are not finite"
    relative, absolute = TOLERANCES[op]
    rms = math.sqrt(float(want.square().mean()))
    error = (got - want).abs()
    excess = error - (relative * want.abs() + absolute * rms)
    worst = int(excess.argmax())
    cosine = float(got @ want / (got.norm() * want.norm()).clamp_min(1e-300))
    if float(excess[worst]) > 0 or cosine < MIN_COSINE:
        return (
            f"{op}: {int((excess > 0).sum())} of {got.numel()} out of tolerance, worst at {worst}: "
            f"{float(got[worst]):.6g} instead of {float(want[worst]):.6g} (rms {rms:.4g}, cosine {cosine:.6f})"
        )
    return ""
