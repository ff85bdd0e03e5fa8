"""Attention over a paged cache in plain numpy, float64: the reference of the op `rope_kv_append_attention`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.ops import KV_CACHE_FORMATS
from qwen_rt.plugins import reference
from qwen_rt.plugins.reference_rounding import rounding
from qwen_rt.quantization import KV_LARGEST, decode_fp8, round_fp8

__all__ = ["quantize_kv", "rope_kv_append_attention"]

F64 = NDArray[np.float64]

_FORMAT_OF = {number: name for name, number in KV_CACHE_FORMATS.items()}


def rope_kv_append_attention(
    qkv: ArrayLike,
    positions: ArrayLike,
    query_starts: ArrayLike,
    inv_freq: ArrayLike,
    block_tables: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k_scales: ArrayLike | None = None,
    v_scales: ArrayLike | None = None,
    k_offset: ArrayLike | None = None,
    v_offset: ArrayLike | None = None,
    *,
    scale: float,
    rope_scaling: float = 1.0,
    max_length: float = 0.0,
    kv_format: float = 0,
    bf16: bool = False,
) -> tuple[NDArray[Any], ...]:
    """Turn q and k, append k and v to the paged cache, attend causally over each sequence.

        key_t = R(t) · (k_t + k_offset)        value_t = v_t + v_offset

    A row at position p sees the cached tokens 0 … p of its sequence, those of this call among them, and nothing else
    is read: other blocks and later slots may hold anything, NaN too. What a row sees of its own call comes out of the
    cache as well, so that it does not depend on how a prompt was cut.

    Args:
        qkv: [rows, q_width + 2 kv_heads · head_dim]: all q heads, then k, then v.
        positions: int[rows]. Negative: the row is idle, its output is 0 and it appends nothing. Beyond what the block
            table can hold: its output is NaN and it appends nothing.
        query_starts: int[sequences + 1], first row of each sequence, then rows; not read if rows = sequences.
        inv_freq: [half_dim], radians per position.
        block_tables: int[sequences, max_blocks], the cache block of tokens i · block_size … of a sequence. Entries
            behind the one of the last token are not read.
        k_cache: [num_blocks, kv_heads, block_size, head_dim]; quantized it holds int8, or float8 or its bits.
        v_cache: [num_blocks, kv_heads, block_size, head_dim], likewise.
        k_scales: f32[num_blocks, kv_heads, block_size] of a quantized cache.
        v_scales: f32[num_blocks, kv_heads, block_size], likewise.
        k_offset: [kv_heads, head_dim], what k lacks; None for zero. It is turned but never stored.
        v_offset: [kv_heads, head_dim], what v lacks; None for zero.
        scale: head_dim**-0.5.
        rope_scaling: YaRN's attention factor, on cos and sin.
        max_length: Longest sequence that will occur, from which a kernel plans; without effect here.
        kv_format: Of the cache, a number of `KV_CACHE_FORMATS`.
        bf16: Round as the kernel does. A key that is quantized is rounded once, to eight bits. Those are exact in
            bfloat16; the scale of a key is applied to its score, the scale of a value to its exponential, and that
            product is what is rounded. Offsets are exact. The kernel of a quantized cache rounds at the same places to
            three bits more, and a query not at all where it meets an offset; a prefill adds offsets in float16.

    Returns:
        f64[rows, q_width]; copies of both caches with the new tokens, f64, or as they came if quantized; then copies
        of both scales, f32, where the cache is quantized.

    Raises:
        IndexError: `query_starts` is not an ascending division of the rows, or a table names no block of the cache.
        ValueError: A quantized cache without scales.
    """
    rounded = rounding(bf16)
    mixed, places = np.asarray(qkv, np.float64), np.asarray(positions, np.int64)
    tables = np.asarray(block_tables, np.int64)
    keys, values = _Pool(k_cache, k_scales, kv_format), _Pool(v_cache, v_scales, kv_format)
    num_blocks, kv_heads, block_size, head_dim = keys.stored.shape
    num_rows, kv_width = len(mixed), kv_heads * head_dim
    q_width = mixed.shape[1] - 2 * kv_width

    cos, sin = reference.rotary_tables(places[None], inv_freq, rope_scaling)  # [1, rows, D/2]
    flat_q, flat_k, flat_v = np.split(mixed, (q_width, q_width + kv_width), axis=-1)
    query = rounded(reference.apply_rotary(_heads(flat_q, head_dim), cos, sin))  # [1, H, rows, D]
    key = reference.apply_rotary(_heads(flat_k, head_dim), cos, sin)[0]  # [Hkv, rows, D]
    key = key if keys.is_quantized else rounded(key)
    value = _heads(flat_v, head_dim)[0]

    capacity = tables.shape[1] * block_size
    turned_offset = _turned_offset(k_offset, capacity, inv_freq, rope_scaling)  # [Hkv, capacity, D]
    value_offset = 0.0 if v_offset is None else np.repeat(np.asarray(v_offset, np.float64), q_width // kv_width, axis=0)
    blocks_of: dict[int, NDArray[np.int64]] = {}  # row → the blocks that it sees
    for row, sequence in enumerate(_sequence_of_rows(query_starts, num_rows, len(tables))):
        if 0 <= places[row] < capacity:
            blocks = tables[sequence, : places[row] // block_size + 1]
            if blocks.min() < 0 or blocks.max() >= num_blocks:
                raise IndexError(f"row {row}: blocks {blocks.tolist()}, expected 0 to {num_blocks - 1}")
            slot = int(places[row] % block_size)
            keys.write(int(blocks[-1]), slot, key[:, row])
            values.write(int(blocks[-1]), slot, value[:, row])
            blocks_of[row] = blocks

    out = np.where(places < 0, 0.0, np.nan)[:, None].repeat(q_width, axis=1)  # [rows, q_width]
    for row, blocks in blocks_of.items():
        seen = int(places[row]) + 1
        (own_keys, key_scales), (own_values, value_scales) = (pool.read(blocks, seen) for pool in (keys, values))
        whole_keys = own_keys * key_scales[..., None] + turned_offset[:, :seen]
        attended = reference.attention(
            query[:, :, row : row + 1],
            whole_keys[None],
            own_values[None],
            [seen - 1],
            scale,
            rounded if bf16 else None,
            value_scales[None],
        )
        out[row] = rounded(attended[0, :, 0] + value_offset).reshape(q_width)  # [H, D]
    scales = (keys.scales, values.scales) if keys.is_quantized else ()
    return out, keys.stored, values.stored, *scales


def quantize_kv(x: ArrayLike, kv_format: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Round head vectors to eight bits, with a scale for each: `value = round(x / scale)`.

    Args:
        x: [..., D].
        kv_format: `fp8` or `int8`.

    Returns:
        float8_e4m3fn or int8 [..., D], and scales float32 [...]. The scale of a vector of zeros is 0, and so is the
        vector; a vector that holds NaN or infinity has no finite scale.
    """
    vectors, largest = np.asarray(x, np.float64), KV_LARGEST[kv_format]
    scales = (np.abs(vectors).max(-1) / largest).astype(np.float32)
    divisors = np.where(scales == 0, np.float32(1), scales).astype(np.float64)[..., None]
    with np.errstate(invalid="ignore"):
        scaled = vectors / divisors
        if kv_format == "fp8":
            return round_fp8(scaled).astype(ml_dtypes.float8_e4m3fn), scales
        return np.clip(np.rint(np.nan_to_num(scaled)), -largest, largest).astype(np.int8), scales


class _Pool:
    """The cache of keys or of values: a copy of what was given, its slots written and read as numbers.

    Attributes:
        stored: [num_blocks, kv_heads, block_size, head_dim], f64, or the given dtype if quantized.
        scales: f32[num_blocks, kv_heads, block_size]; ones if not quantized.
    """

    def __init__(self, cache: ArrayLike, scales: ArrayLike | None, kv_format: float) -> None:
        self._format = _FORMAT_OF[int(kv_format)]
        self.is_quantized = self._format in KV_LARGEST
        if not self.is_quantized:
            self.stored: NDArray[Any] = np.array(cache, np.float64)
            self.scales = np.ones(self.stored.shape[:3], np.float32)
            return
        if scales is None:
            raise ValueError(f"a cache of format {self._format} has no scales")
        self.stored, self.scales = np.array(cache), np.array(scales, np.float32)

    def write(self, block: int, slot: int, x: F64) -> None:
        """Store a token's vectors, [kv_heads, head_dim]."""
        if not self.is_quantized:
            self.stored[block, :, slot] = x
            return
        numbers, self.scales[block, :, slot] = quantize_kv(x, self._format)
        self.stored[block, :, slot] = numbers.view(self.stored.dtype)

    def read(self, blocks: NDArray[np.int64], count: int) -> tuple[F64, F64]:
        """The first tokens of some blocks: numbers [kv_heads, count, D], and their scales [kv_heads, count]."""
        numbers, scales = (_contiguous(array, blocks)[:, :count] for array in (self.stored, self.scales))
        if self._format == "fp8":
            numbers = decode_fp8(numbers.view(np.uint8))
        return numbers.astype(np.float64), scales.astype(np.float64)


def _turned_offset(offset: ArrayLike | None, length: int, inv_freq: ArrayLike, scaling: float) -> F64:
    """`R(t) · offset` of the positions 0 … length - 1: [kv_heads, length, D]; zeros [1, length, 1] without one."""
    if offset is None:
        return np.zeros((1, length, 1))
    heads = np.asarray(offset, np.float64)
    tables = reference.rotary_tables(np.arange(length)[None], inv_freq, scaling)
    turned: F64 = reference.apply_rotary(np.repeat(heads[None, :, None], length, axis=2), *tables)[0]
    return turned


def _heads(flat: F64, head_dim: int) -> F64:
    """Split [rows, heads · D] into [1, heads, rows, D]."""
    return flat.reshape(len(flat), -1, head_dim).transpose(1, 0, 2)[None]


def _contiguous(cache: NDArray[Any], blocks: NDArray[np.int64]) -> NDArray[Any]:
    """The tokens of some blocks behind each other: [kv_heads, blocks · block_size, …]."""
    chosen = cache[blocks].swapaxes(0, 1)  # [kv_heads, blocks, block_size, …]
    return chosen.reshape(len(chosen), -1, *cache.shape[3:])


def _sequence_of_rows(query_starts: ArrayLike, num_rows: int, num_sequences: int) -> NDArray[np.int64]:
    """Which sequence each row belongs to: int64[rows]."""
    if num_rows == num_sequences:
        return np.arange(num_rows)
    starts = np.asarray(query_starts, np.int64)
    lengths = np.diff(starts)
    if len(lengths) != num_sequences or starts[0] != 0 or starts[-1] != num_rows or (lengths < 0).any():
        raise IndexError(f"query_starts={starts.tolist()}, expected {num_sequences} ascending parts of {num_rows} rows")
    return np.repeat(np.arange(num_sequences), lengths)
