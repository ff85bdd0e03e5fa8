"""KV caches of any format on the device: what attention is called with, and the numbers that it stands for.

The layout is that of `qwen_rt.quantization`, in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_rt.ops import KV_CACHE_FORMATS
from qwen_rt.quantization import KV_LARGEST

__all__ = ["KvCache", "quantize_heads", "random_cache"]

_BLOCKS_AT_ONCE = 1024  # made in float64
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, eq=False)
class KvCache:
    """The cache of one layer.

    Attributes:
        format: `bf16`, `fp8` or `int8`.
        keys: bf16, float8_e4m3fn or int8 [num_blocks, kv_heads, block_size, D].
        values: Likewise.
        key_scales: f32[num_blocks, kv_heads, block_size]; None for bf16.
        value_scales: Likewise.
        key_offset: f32[kv_heads, D]; None for zeros.
        value_offset: Likewise.
    """

    format: str
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_offset: Tensor | None = None
    value_offset: Tensor | None = None

    @property
    def kv_format(self) -> float:
        """The attribute of the op."""
        return float(KV_CACHE_FORMATS[self.format])

    def tensors(self) -> dict[str, Tensor | None]:
        """The inputs of the op, by name."""
        scales = {"k_scales": self.key_scales, "v_scales": self.value_scales}
        offsets = {"k_offset": self.key_offset, "v_offset": self.value_offset}
        return {"k_cache": self.keys, "v_cache": self.values, **scales, **offsets}

    def clone(self) -> KvCache:
        """The same cache elsewhere in memory; offsets are shared."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        return KvCache(
            self.format,
            self.keys.clone(),
            self.values.clone(),
            copy(self.key_scales),
            copy(self.value_scales),
            self.key_offset,
            self.value_offset,
        )

    def read(self, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of some blocks, without offsets: keys and values f64[kv_heads, count, D]."""

        def part(numbers: Tensor, scales: Tensor | None) -> Tensor:
            # [blocks, kv_heads, block_size, D] -> [kv_heads, tokens, D]
            chosen = numbers.view(torch.uint8)[blocks].view(numbers.dtype) if self.format == "fp8" else numbers[blocks]
            whole = chosen.to(torch.float32).double()
            if scales is not None:
                whole = whole * scales[blocks].double()[..., None]
            return whole.transpose(0, 1).flatten(1, 2)[:, :count]

        return part(self.keys, self.key_scales), part(self.values, self.value_scales)


def quantize_heads(x: Tensor, kv_format: str) -> tuple[Tensor, Tensor]:
    """Round head vectors to eight bits, as `qwen_rt.plugins.reference_attention.quantize_kv` does.

    Args:
        x: [..., D].
        kv_format: `fp8` or `int8`.

    Returns:
        float8_e4m3fn or int8 [..., D], and scales f32 [...].
    """
    vectors, largest = x.double(), KV_LARGEST[kv_format]
    scales = (vectors.abs().amax(-1) / largest).float()
    divisors = scales.double().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    scaled = (vectors / divisors).clamp(-largest, largest)
    if kv_format == "fp8":
        return scaled.float().to(torch.float8_e4m3fn), scales
    return scaled.round().to(torch.int8), scales


def random_cache(
    kv_format: str, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, *, offset: float = 0.0
) -> KvCache:
    """Draw a full cache of normal numbers, and offsets of that size for a quantized one (0: none)."""
    shape = (num_blocks, kv_heads, block_size, head_dim)
    if kv_format == "bf16":
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
        return KvCache(kv_format, keys, values)
    pools, scales = [], []
    for _ in range(2):
        counts = [min(_BLOCKS_AT_ONCE, num_blocks - first) for first in range(0, num_blocks, _BLOCKS_AT_ONCE)]
        parts = [quantize_heads(torch.empty((n, *shape[1:]), device="cuda").normal_(), kv_format) for n in counts]
        pools.append(torch.cat([numbers.view(torch.uint8) for numbers, _ in parts]).view(_DTYPES[kv_format]))
        scales.append(torch.cat([part for _, part in parts]))
    drawn = [torch.empty(kv_heads, head_dim, device="cuda").normal_() * offset if offset else None for _ in range(2)]
    return KvCache(kv_format, *pools, *scales, *drawn)
