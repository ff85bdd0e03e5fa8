"""Attention over a paged cache in plain numpy, float64: the reference of the op `rope_kv_append_attention`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.plugins import reference
from qwen_rt.plugins.reference_rounding import rounding

__all__ = ["rope_kv_append_attention"]

F64 = NDArray[np.float64]


def rope_kv_append_attention(
    qkv: ArrayLike,
    positions: ArrayLike,
    query_starts: ArrayLike,
    inv_freq: ArrayLike,
    block_tables: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    *,
    scale: float,
    rope_scaling: float = 1.0,
    max_length: float = 0.0,
    bf16: bool = False,
) -> tuple[F64, F64, F64]:
    """Turn q and k, append k and v to the paged cache, attend causally over each sequence.

    A row at position p sees the cached tokens 0 … p of its sequence, those of this call among them, and nothing else
    is read: other blocks and later slots may hold anything, NaN too.

    Args:
        qkv: [rows, q_width + 2 kv_heads · head_dim]: all q heads, then k, then v.
        positions: int[rows]. Negative: the row is idle, its output is 0 and it appends nothing. Beyond what the block
            table can hold: its output is NaN and it appends nothing.
        query_starts: int[sequences + 1], first row of each sequence, then rows; not read if rows = sequences.
        inv_freq: [half_dim], radians per position.
        block_tables: int[sequences, max_blocks], the cache block of tokens i · block_size … of a sequence. Entries
            behind the one of the last token are not read.
        k_cache: [num_blocks, kv_heads, block_size, head_dim].
        v_cache: [num_blocks, kv_heads, block_size, head_dim].
        scale: head_dim**-0.5.
        rope_scaling: YaRN's attention factor, on cos and sin.
        max_length: Longest sequence that will occur, from which a kernel plans; without effect here.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, q_width], and copies of both caches with the new tokens, f64.

    Raises:
        IndexError: `query_starts` is not an ascending division of the rows, or a table names no block of the cache.
    """
    rounded = rounding(bf16)
    mixed, places = np.asarray(qkv, np.float64), np.asarray(positions, np.int64)
    tables = np.asarray(block_tables, np.int64)
    keys, values = (np.array(cache, np.float64) for cache in (k_cache, v_cache))  # copies
    num_blocks, kv_heads, block_size, head_dim = keys.shape
    num_rows, kv_width = len(mixed), kv_heads * head_dim
    q_width = mixed.shape[1] - 2 * kv_width

    cos, sin = reference.rotary_tables(places[None], inv_freq, rope_scaling)  # [1, rows, D/2]
    flat_q, flat_k, flat_v = np.split(mixed, (q_width, q_width + kv_width), axis=-1)
    query = rounded(reference.apply_rotary(_heads(flat_q, head_dim), cos, sin))  # [1, H, rows, D]
    key = rounded(reference.apply_rotary(_heads(flat_k, head_dim), cos, sin))[0]  # [Hkv, rows, D]
    value = _heads(flat_v, head_dim)[0]

    capacity = tables.shape[1] * block_size
    blocks_of: dict[int, NDArray[np.int64]] = {}  # row → the blocks that it sees
    for row, sequence in enumerate(_sequence_of_rows(query_starts, num_rows, len(tables))):
        if 0 <= places[row] < capacity:
            blocks = tables[sequence, : places[row] // block_size + 1]
            if blocks.min() < 0 or blocks.max() >= num_blocks:
                raise IndexError(f"row {row}: blocks {blocks.tolist()}, expected 0 to {num_blocks - 1}")
            slot = places[row] % block_size
            keys[blocks[-1], :, slot], values[blocks[-1], :, slot] = key[:, row], value[:, row]
            blocks_of[row] = blocks

    out = np.where(places < 0, 0.0, np.nan)[:, None].repeat(q_width, axis=1)  # [rows, q_width]
    for row, blocks in blocks_of.items():
        seen = int(places[row]) + 1
        own_keys, own_values = (_contiguous(cache, blocks)[None, :, :seen] for cache in (keys, values))
        attended = reference.attention(
            query[:, :, row : row + 1], own_keys, own_values, [seen - 1], scale, rounded if bf16 else None
        )
        out[row] = rounded(attended.reshape(q_width))  # [1, H, 1, D]
    return out, keys, values


def _heads(flat: F64, head_dim: int) -> F64:
    """Split [rows, heads · D] into [1, heads, rows, D]."""
    return flat.reshape(len(flat), -1, head_dim).transpose(1, 0, 2)[None]


def _contiguous(cache: F64, blocks: NDArray[np.int64]) -> F64:
    """The tokens of some blocks behind each other: [kv_heads, blocks · block_size, D]."""
    chosen = cache[blocks].transpose(1, 0, 2, 3)  # [kv_heads, blocks, block_size, D]
    return chosen.reshape(len(chosen), -1, cache.shape[-1])


def _sequence_of_rows(query_starts: ArrayLike, num_rows: int, num_sequences: int) -> NDArray[np.int64]:
    """Which sequence each row belongs to: int64[rows]."""
    if num_rows == num_sequences:
        return np.arange(num_rows)
    starts = np.asarray(query_starts, np.int64)
    lengths = np.diff(starts)
    if len(lengths) != num_sequences or starts[0] != 0 or starts[-1] != num_rows or (lengths < 0).any():
        raise IndexError(f"query_starts={starts.tolist()}, expected {num_sequences} ascending parts of {num_rows} rows")
    return np.repeat(np.arange(num_sequences), lengths)
