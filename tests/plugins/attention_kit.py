"""Sequences over a quantized cache, and a look at what was stored. Needs torch and a GPU."""

from __future__ import annotations

from typing import Any

import torch

from qwen_rt.benchmarks import kernel_references as references
from qwen_rt.benchmarks.kernel_step import OpCaller, random_bf16
from qwen_rt.benchmarks.quantized_cache import KvCache, quantize_heads, random_cache

from .gpu_kit import nan_bf16

OP = "rope_kv_append_attention"
SCALING = 1.2
POISON = {"fp8": 0x7F, "int8": 0x80}
"""Bytes that no kernel writes: NaN, and -128."""


class Paged:
    """Sequences over a paged cache whose unused slots and scales hold poison, and the inputs of calls.

    Args:
        heads: Heads, kv heads, head_dim.
        cached: Tokens in the cache, for each sequence.
        new: New tokens of each sequence; None: one each.
        kv_format: `fp8` or `int8`.
        offset: Size of the offsets, 0 for none.
        block_size: Of the cache.
    """

    def __init__(
        self,
        heads: tuple[int, int, int],
        cached: list[int],
        new: list[int] | None = None,
        *,
        kv_format: str,
        offset: float = 3.0,
        block_size: int = 64,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads
        new = [1] * len(cached) if new is None else new
        sequences, needed = len(cached), [-(-(a + b) // block_size) for a, b in zip(cached, new, strict=True)]
        width = max(*needed, 1) + 1
        num_blocks = sequences * width + 3
        self.cache = random_cache(kv_format, num_blocks, self.kv_heads, block_size, self.head_dim, offset=offset)
        order = torch.randperm(num_blocks, device="cuda").int()
        self.tables = order[: sequences * width].view(sequences, width).contiguous()
        self.block_size, self.format = block_size, kv_format
        is_used = torch.zeros(num_blocks, block_size, dtype=torch.bool, device="cuda")
        for row, count in enumerate(cached):
            at = torch.arange(max(count, 0), device="cuda")
            is_used[self.tables[row].long()[at // block_size], at % block_size] = True
            self.tables[row, needed[row] :] = 2**30  # never to be read
        unused = ~is_used[:, None].expand(-1, self.kv_heads, -1)
        for pool, scales in ((self.cache.keys, self.cache.key_scales), (self.cache.values, self.cache.value_scales)):
            pool.view(torch.uint8)[unused] = POISON[kv_format]
            scales[unused] = float("nan")
        rows = sum(new)
        self.qkv = random_bf16(rows, (self.heads + 2 * self.kv_heads) * self.head_dim)
        places = [torch.arange(a, a + b) for a, b in zip(cached, new, strict=True)]
        self.positions = torch.cat(places).cuda()
        self.query_starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cuda") / self.head_dim
        self.inv_freq = (1e6**-exponents).float()

    def run(
        self, call: OpCaller, rows: slice = slice(None), sequences: slice = slice(None), **attributes: float
    ) -> torch.Tensor:
        """The output; the cache is changed in place."""
        starts = self.query_starts[sequences.start : None if sequences.stop is None else sequences.stop + 1]
        qkv = self.qkv[rows].contiguous()
        out = nan_bf16(len(qkv), self.heads * self.head_dim)
        tensors: dict[str, Any] = {
            "qkv": qkv,
            "positions": self.positions[rows].contiguous(),
            "query_starts": (starts - starts[0]).contiguous(),
            "inv_freq": self.inv_freq,
            "block_tables": self.tables[sequences].contiguous(),
            "out": out,
            **self.cache.tensors(),
        }
        given = {"scale": self.head_dim**-0.5, "rope_scaling": SCALING, "kv_format": self.cache.kv_format}
        call(OP, tensors, **given, **attributes)
        return out

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return references.attention_8bit(
            self.qkv,
            self.positions,
            self.inv_freq,
            self.tables,
            self.cache,
            self.head_dim**-0.5,
            SCALING,
            self.query_starts,
        )

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and place of every new token, of those that have one."""
        counts = self.query_starts.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(counts), device="cuda"), counts)
        at = self.positions.clamp_min(0)
        return self.tables[sequence, at // self.block_size].long(), at % self.block_size


def bits_of(cache: KvCache) -> list[torch.Tensor]:
    """All that a call may change: bits of numbers and scales, [num_blocks, kv_heads, block_size, ...]."""
    pools = [pool.view(torch.uint8) for pool in (cache.keys, cache.values)]
    return pools + [scales.view(torch.int32) for scales in (cache.key_scales, cache.value_scales)]


def check_stored(case: Paged, news: tuple[torch.Tensor, torch.Tensor], before: KvCache) -> None:
    """New tokens stand in the cache, rounded once, and nothing else has changed.

    Quotients are f32, so one close to the middle between two numbers may fall to either side. In int8 such are common:
    half of the largest is 63.5 times the scale, and one in some hundred elements of bf16 is another ratio like that.
    """
    blocks, places = case.slots()
    busy = case.positions >= 0
    blocks, places = blocks[busy], places[busy]
    pools = ((case.cache.keys, case.cache.key_scales), (case.cache.values, case.cache.value_scales))
    for (pool, scales), new in zip(pools, news, strict=True):
        numbers, wanted = quantize_heads(new[busy], case.format)
        torch.testing.assert_close(scales[blocks, :, places], wanted, rtol=2e-6, atol=0)
        found = pool.view(torch.uint8)[blocks, :, places].view(pool.dtype).float()
        different = found != numbers.float()
        assert int(different.sum()) <= 1 + different.numel() // 50
        step = (numbers.float().abs() * 2**-3).clamp_min(2**-9) if case.format == "fp8" else 1.0
        assert ((found - numbers.float()).abs() <= step).all()
    for after, old in zip(bits_of(case.cache), bits_of(before), strict=True):
        kept = after.clone()
        kept[blocks, :, places] = old[blocks, :, places]
        assert torch.equal(kept, old), "another token was written"
