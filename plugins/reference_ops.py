"""Every op of the table in plain numpy, float64: what kernels and lowered graphs are tested against. Slow and short.

Functions take an op's inputs in the table's order, without the workspace, and its attributes by name, and return its
outputs. Nothing is written in place: caches go in and copies come out. Inputs have any floating dtype.

`bf16=True` rounds to bfloat16 where the headers of `plugins/csrc/kernels/*.cu` say that a kernel does, inside an op and
at its outputs; sums stay float64. So a chain of ops shows what the kernels' rounding alone does to a model.

| op                         | rounded inside, with `bf16=True`                                   | outputs      |
|----------------------------|--------------------------------------------------------------------|--------------|
| `embed`                    | nothing                                                            | bf16, a copy |
| `rmsnorm_qkv`              | hidden ∘ norm_weight, 1 / rms being applied to the sums; with more | bf16         |
|                            | than 64 rows the whole norm                                        |              |
| `rope_kv_append_attention` | turned q and k; exp(score - largest) before the product with v     | bf16         |
| `o_proj_residual`          | nothing                                                            | bf16         |
| `rmsnorm_gate_up_silu`     | as `rmsnorm_qkv`; with more than 64 rows gate and up too           | bf16         |
| `down_residual`            | nothing                                                            | bf16         |
| `lm_head`                  | as `rmsnorm_qkv` with few rows                                     | float32      |

The op `sample` is in `qwen_rt.plugins.reference_sample`. Shapes use the table's dims (`qwen_rt.ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx.reference.op_run import OpRun

from qwen_rt.ops import DOMAIN, MAX_ROWS, OPS, PluginOp, find_op
from qwen_rt.plugins import reference

__all__ = [
    "REFERENCES",
    "down_residual",
    "embed",
    "lm_head",
    "o_proj_residual",
    "reference_evaluator_ops",
    "rmsnorm_gate_up_silu",
    "rmsnorm_qkv",
    "rope_kv_append_attention",
    "round_bf16",
    "round_outputs",
    "select_o_proj_residual",
]

F64 = NDArray[np.float64]

_NUMPY_DTYPES: Mapping[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "i32": np.int32,
    "i64": np.int64,
}


def round_bf16(x: ArrayLike) -> F64:
    """Round to the nearest bfloat16, ties to even; the result is float64 still."""
    return np.asarray(x, np.float64).astype(ml_dtypes.bfloat16).astype(np.float64)


def round_outputs(op: PluginOp, outputs: tuple[F64, ...]) -> tuple[NDArray[Any], ...]:
    """Round outputs to the dtypes that the table gives them."""
    return tuple(array.astype(_NUMPY_DTYPES[tensor.dtype]) for array, tensor in zip(outputs, op.outputs, strict=True))


def _keep(x: F64) -> F64:
    return x


def _rounding(bf16: bool) -> Callable[[F64], F64]:
    return round_bf16 if bf16 else _keep


def _normed_linear(
    hidden: ArrayLike, norm_weight: ArrayLike, weights: list[ArrayLike], epsilon: float, bf16: bool
) -> list[F64]:
    """`weight · (hidden / rms ∘ norm_weight)` for each weight; rounded before or after the division by rms."""
    normed = reference.rms_norm(hidden, norm_weight, epsilon)  # [rows, hidden]
    if not bf16:
        return [reference.linear(normed, weight) for weight in weights]
    if len(normed) > MAX_ROWS:
        return [reference.linear(round_bf16(normed), weight) for weight in weights]
    x = np.asarray(hidden, np.float64)
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)  # [rows, 1]
    scaled = round_bf16(x * np.asarray(norm_weight, np.float64))
    return [reference.linear(scaled, weight) / rms for weight in weights]


def embed(ids: ArrayLike, table: ArrayLike, *, bf16: bool = False) -> F64:
    """Look up embeddings: `out = table[ids]`; an id outside of the table gives a row of NaN.

    Args:
        ids: int[rows].
        table: [vocab, hidden].
        bf16: Round as the kernel does: not at all.

    Returns:
        f64[rows, hidden].
    """
    found, rows = np.asarray(ids, np.int64), np.asarray(table)
    valid = (found >= 0) & (found < len(rows))
    looked_up = reference.embed(rows, np.where(valid, found, 0))
    return np.where(valid[:, None], looked_up, np.nan)


def rmsnorm_qkv(
    hidden: ArrayLike,
    norm_weight: ArrayLike,
    q_weight: ArrayLike,
    k_weight: ArrayLike,
    v_weight: ArrayLike,
    q_bias: ArrayLike | None = None,
    k_bias: ArrayLike | None = None,
    v_bias: ArrayLike | None = None,
    *,
    epsilon: float,
    bf16: bool = False,
) -> F64:
    """Normalize and project: `qkv = concat(q, k, v)(norm(hidden)) + bias`.

    Args:
        hidden: [rows, hidden].
        norm_weight: [hidden].
        q_weight: [q_width, hidden].
        k_weight: [kv_width, hidden].
        v_weight: [kv_width, hidden].
        q_bias: [q_width], or None.
        k_bias: [kv_width], or None.
        v_bias: [kv_width], or None.
        epsilon: Added to the mean square.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, q_width + 2 kv_width].
    """
    products = _normed_linear(hidden, norm_weight, [q_weight, k_weight, v_weight], epsilon, bf16)
    biases = (q_bias, k_bias, v_bias)
    parts = [x if b is None else x + np.asarray(b, np.float64) for x, b in zip(products, biases, strict=True)]
    return _rounding(bf16)(np.concatenate(parts, axis=-1))


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
    rounding = _rounding(bf16)
    mixed, places = np.asarray(qkv, np.float64), np.asarray(positions, np.int64)
    tables = np.asarray(block_tables, np.int64)
    keys, values = (np.array(cache, np.float64) for cache in (k_cache, v_cache))  # copies
    num_blocks, kv_heads, block_size, head_dim = keys.shape
    num_rows, kv_width = len(mixed), kv_heads * head_dim
    q_width = mixed.shape[1] - 2 * kv_width

    cos, sin = reference.rotary_tables(places[None], inv_freq, rope_scaling)  # [1, rows, D/2]
    flat_q, flat_k, flat_v = np.split(mixed, (q_width, q_width + kv_width), axis=-1)
    query = rounding(reference.apply_rotary(_heads(flat_q, head_dim), cos, sin))  # [1, H, rows, D]
    key = rounding(reference.apply_rotary(_heads(flat_k, head_dim), cos, sin))[0]  # [Hkv, rows, D]
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
            query[:, :, row : row + 1], own_keys, own_values, [seen - 1], scale, rounding if bf16 else None
        )
        out[row] = rounding(attended.reshape(q_width))  # [1, H, 1, D]
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


def o_proj_residual(attention: ArrayLike, weight: ArrayLike, residual: ArrayLike, *, bf16: bool = False) -> F64:
    """Project and add: `out = residual + weight · attention`.

    Args:
        attention: [rows, width].
        weight: [hidden, width].
        residual: [rows, hidden].
        bf16: Round as the kernel does.

    Returns:
        f64[rows, hidden].
    """
    return _rounding(bf16)(np.asarray(residual, np.float64) + reference.linear(attention, weight))


def select_o_proj_residual(
    attention: ArrayLike, indices: ArrayLike, weight: ArrayLike, residual: ArrayLike, *, bf16: bool = False
) -> F64:
    """Project and add one row of each sequence: `out = residual[indices] + weight · attention[indices]`.

    Args:
        attention: [rows, width].
        indices: int[sequences]; not read if rows = sequences. One that is no row gives a row of NaN.
        weight: [hidden, width].
        residual: [rows, hidden].
        bf16: Round as the kernel does.

    Returns:
        f64[sequences, hidden].
    """
    rows, stream, wanted = np.asarray(attention), np.asarray(residual), np.asarray(indices, np.int64)
    if len(rows) != len(wanted):
        rows, stream = embed(wanted, rows), embed(wanted, stream)  # lookups of rows, NaN outside of them
    return o_proj_residual(rows, weight, stream, bf16=bf16)


def rmsnorm_gate_up_silu(
    hidden: ArrayLike,
    norm_weight: ArrayLike,
    gate_weight: ArrayLike,
    up_weight: ArrayLike,
    *,
    epsilon: float,
    bf16: bool = False,
) -> F64:
    """Normalize, project twice, gate: `activation = silu(gate(norm(hidden))) · up(norm(hidden))`.

    Args:
        hidden: [rows, hidden].
        norm_weight: [hidden].
        gate_weight: [ffn, hidden].
        up_weight: [ffn, hidden].
        epsilon: Added to the mean square.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, ffn].
    """
    gate, up = _normed_linear(hidden, norm_weight, [gate_weight, up_weight], epsilon, bf16)
    if bf16 and len(gate) > MAX_ROWS:
        gate, up = round_bf16(gate), round_bf16(up)
    return _rounding(bf16)(reference.silu(gate) * up)


def down_residual(activation: ArrayLike, weight: ArrayLike, residual: ArrayLike, *, bf16: bool = False) -> F64:
    """Project and add: `out = residual + weight · activation`.

    Args:
        activation: [rows, ffn].
        weight: [hidden, ffn].
        residual: [rows, hidden].
        bf16: Round as the kernel does.

    Returns:
        f64[rows, hidden].
    """
    return o_proj_residual(activation, weight, residual, bf16=bf16)


def lm_head(hidden: ArrayLike, norm_weight: ArrayLike, weight: ArrayLike, *, epsilon: float, bf16: bool = False) -> F64:
    """Normalize, project: `logits = weight · norm(hidden)`.

    Args:
        hidden: [rows, hidden].
        norm_weight: [hidden].
        weight: [vocab, hidden].
        epsilon: Added to the mean square.
        bf16: Round as the kernel does. Logits are float32, which is not imitated.

    Returns:
        f64[rows, vocab].
    """
    return _normed_linear(np.asarray(hidden), norm_weight, [weight], epsilon, bf16)[0]


REFERENCES: Mapping[str, Callable[..., F64 | tuple[F64, ...]]] = {
    "embed": embed,
    "rmsnorm_qkv": rmsnorm_qkv,
    "rope_kv_append_attention": rope_kv_append_attention,
    "o_proj_residual": o_proj_residual,
    "select_o_proj_residual": select_o_proj_residual,
    "rmsnorm_gate_up_silu": rmsnorm_gate_up_silu,
    "down_residual": down_residual,
    "lm_head": lm_head,
}
"""Name of an op → its reference."""


def reference_evaluator_ops(bf16: bool = False) -> list[type[OpRun]]:
    """Make the classes with which `onnx.reference.ReferenceEvaluator` runs a lowered graph.

        ReferenceEvaluator(model, new_ops=reference_evaluator_ops()).run(None, feeds)

    Args:
        bf16: Round as the kernels do; outputs then have the dtypes of the table. Else everything is float64, caches
            too, and the evaluator takes float64 caches.

    Returns:
        A class for each op of the table that has a reference here. Their workspace is not looked at.
    """
    return [_op_run(op.name, bf16) for op in OPS if op.name in REFERENCES]


def _op_run(name: str, bf16: bool) -> type[OpRun]:
    """The class of one op: inputs and attributes by the table, absent optional inputs as None."""
    op, function = find_op(name), REFERENCES[name]

    def run(self: OpRun, *inputs: NDArray[Any] | None, **attributes: float) -> tuple[NDArray[Any], ...]:
        """Run the reference on what the node gives."""
        given = {key: attributes.get(key, default) for key, default in op.attributes}
        found = function(*inputs[: len(op.inputs)], **given, bf16=bf16)
        outputs = found if isinstance(found, tuple) else (found,)
        return round_outputs(op, outputs) if bf16 else outputs

    return cast("type[OpRun]", type(op.name, (OpRun,), {"op_domain": DOMAIN, "_run": run}))
