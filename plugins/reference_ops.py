"""Every op of the table in plain numpy, float64: what kernels and lowered graphs are tested against. Slow and short.

Functions take an op's inputs in the table's order, without the workspace, and its attributes by name, and return its
outputs. Nothing is written in place: caches go in and copies come out. Inputs have any floating dtype.

`bf16=True` rounds to bfloat16 where the headers of `plugins/csrc/kernels/*.cu` say that a kernel does, inside an op and
at its outputs; sums stay float64. So a chain of ops shows what the kernels' rounding alone does to a model.

| op                         | rounded inside, with `bf16=True`                                   | outputs      |
|----------------------------|--------------------------------------------------------------------|--------------|
| `embed`                    | nothing                                                            | bf16         |
| `rmsnorm_qkv`              | hidden ∘ norm_weight, 1 / rms being applied to the sums; with more | bf16         |
|                            | than 32 rows the whole norm (int8 and int4: 64)                    |              |
| `rope_kv_append_attention` | turned q and k; exp(score - largest) before the product with v. In | bf16         |
|                            | a quantized cache k is not rounded before it is quantized, and     |              |
|                            | the exponential takes the scale of v in before it is rounded       |              |
| `o_proj_residual`          | nothing                                                            | bf16         |
| `rmsnorm_gate_up_silu`     | as `rmsnorm_qkv`; with as many rows gate and up too                | bf16         |
| `down_residual`            | nothing                                                            | bf16         |
| `lm_head`                  | as `rmsnorm_qkv` with few rows                                     | float32      |

With more than 64 rows int8, int4 and fp8 in groups are rounded to bf16 before they are multiplied; with more than 32,
fp8 matrices with a scale for each row multiply rows that are rounded to e4m3 (the norm, attention or activation).

The op `sample` is in `qwen_rt.plugins.reference_sample`. Shapes use the table's dims (`qwen_rt.ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx.reference.op_run import OpRun

from qwen_rt.ops import DOMAIN, OPS, PluginOp, find_op
from qwen_rt.plugins import reference
from qwen_rt.plugins.reference_attention import rope_kv_append_attention
from qwen_rt.plugins.reference_rounding import round_bf16, rounding
from qwen_rt.plugins.reference_weights import Way, matrix, prefill_operands, table_rows, way_of

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
    "cache": ml_dtypes.bfloat16,
    "f32": np.float32,
    "i32": np.int32,
    "i64": np.int64,
}


def round_outputs(op: PluginOp, outputs: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], ...]:
    """Round outputs to the dtypes that the table gives them; a quantized cache is what it is, an exact one bfloat16."""
    return tuple(
        array.astype(_NUMPY_DTYPES[tensor.dtype]) if array.dtype == np.float64 else array
        for array, tensor in zip(outputs, op.outputs, strict=False)
    )


def _normed_linear(
    hidden: ArrayLike, norm_weight: ArrayLike, weights: list[F64], epsilon: float, bf16: bool, way: Way = "skinny"
) -> list[F64]:
    """`weight · (hidden / rms ∘ norm_weight)` for each weight; rounded before or after the division by rms."""
    normed = reference.rms_norm(hidden, norm_weight, epsilon)  # [rows, hidden]
    if not bf16:
        return [reference.linear(normed, weight) for weight in weights]
    if way != "skinny":
        normed, weights = prefill_operands(way, normed, weights)
        return [reference.linear(normed, weight) for weight in weights]
    x = np.asarray(hidden, np.float64)
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)  # [rows, 1]
    scaled = round_bf16(x * np.asarray(norm_weight, np.float64))
    return [reference.linear(scaled, weight) / rms for weight in weights]


def embed(
    ids: ArrayLike, table: ArrayLike, scale: ArrayLike | None = None, *, weight_format: float = 0, bf16: bool = False
) -> F64:
    """Look up embeddings: `out = table[ids]`; an id outside of the table gives a row of NaN.

    Args:
        ids: int[rows].
        table: [vocab, hidden].
        scale: [vocab, groups] of a quantized table.
        weight_format: Of the table.
        bf16: Round as the kernel does: a bf16 table not at all, the rows of a quantized one once.

    Returns:
        f64[rows, hidden].
    """
    found, num_rows = np.asarray(ids, np.int64), len(np.asarray(table))
    valid = (found >= 0) & (found < num_rows)
    looked_up = rounding(bf16)(table_rows(table, np.where(valid, found, 0), weight_format, scale))
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
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    q_zero_point: ArrayLike | None = None,
    k_zero_point: ArrayLike | None = None,
    v_zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    epsilon: float,
    weight_format: float = 0,
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
        q_scale: [q_width, groups] of a quantized q_weight; k_scale, v_scale and zero points likewise.
        k_scale: See q_scale.
        v_scale: See q_scale.
        q_zero_point: None for symmetric formats.
        k_zero_point: See q_zero_point.
        v_zero_point: See q_zero_point.
        perm: int[hidden], order of the matrices' columns; None if they are in order.
        epsilon: Added to the mean square.
        weight_format: Of the matrices, a number of `WEIGHT_FORMATS`.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, q_width + 2 kv_width].
    """
    columns = np.asarray(hidden).shape[1]
    parts_of = (
        (q_weight, q_scale, q_zero_point),
        (k_weight, k_scale, k_zero_point),
        (v_weight, v_scale, v_zero_point),
    )
    weights = [matrix(weight, columns, weight_format, scale, zero, perm) for weight, scale, zero in parts_of]
    way = way_of(len(np.asarray(hidden)), weight_format, q_scale, q_zero_point, perm)
    products = _normed_linear(hidden, norm_weight, weights, epsilon, bf16, way)
    biases = (q_bias, k_bias, v_bias)
    parts = [x if b is None else x + np.asarray(b, np.float64) for x, b in zip(products, biases, strict=True)]
    return rounding(bf16)(np.concatenate(parts, axis=-1))


def o_proj_residual(
    attention: ArrayLike,
    weight: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    weight_format: float = 0,
    bf16: bool = False,
) -> F64:
    """Project and add: `out = residual + weight · attention`.

    Args:
        attention: [rows, width].
        weight: [hidden, width].
        residual: [rows, hidden].
        scale: [hidden, groups] of a quantized weight.
        zero_point: None for symmetric formats.
        perm: int[width], order of the weight's columns; None if they are in order.
        weight_format: Of the weight, a number of `WEIGHT_FORMATS`.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, hidden].
    """
    rows = np.asarray(attention)
    weights = [matrix(weight, rows.shape[1], weight_format, scale, zero_point, perm)]
    if bf16:
        way = way_of(len(rows), weight_format, scale, zero_point, perm)
        rows, weights = prefill_operands(way, rows, weights)
    return rounding(bf16)(np.asarray(residual, np.float64) + reference.linear(rows, weights[0]))


def select_o_proj_residual(
    attention: ArrayLike,
    indices: ArrayLike,
    weight: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    weight_format: float = 0,
    bf16: bool = False,
) -> F64:
    """Project and add one row of each sequence: `out = residual[indices] + weight · attention[indices]`.

    Args:
        attention: [rows, width].
        indices: int[sequences]; not read if rows = sequences. One that is no row gives a row of NaN.
        weight: [hidden, width].
        residual: [rows, hidden].
        scale: As in `o_proj_residual`, and so the rest.
        zero_point: See there.
        perm: See there.
        weight_format: See there.
        bf16: Round as the kernel does.

    Returns:
        f64[sequences, hidden].
    """
    rows, stream, wanted = np.asarray(attention), np.asarray(residual), np.asarray(indices, np.int64)
    if len(rows) != len(wanted):
        rows, stream = embed(wanted, rows), embed(wanted, stream)  # lookups of rows, NaN outside of them
    return o_proj_residual(rows, weight, stream, scale, zero_point, perm, weight_format=weight_format, bf16=bf16)


def rmsnorm_gate_up_silu(
    hidden: ArrayLike,
    norm_weight: ArrayLike,
    gate_weight: ArrayLike,
    up_weight: ArrayLike,
    gate_scale: ArrayLike | None = None,
    up_scale: ArrayLike | None = None,
    gate_zero_point: ArrayLike | None = None,
    up_zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    epsilon: float,
    weight_format: float = 0,
    bf16: bool = False,
) -> F64:
    """Normalize, project twice, gate: `activation = silu(gate(norm(hidden))) · up(norm(hidden))`.

    Args:
        hidden: [rows, hidden].
        norm_weight: [hidden].
        gate_weight: [ffn, hidden].
        up_weight: [ffn, hidden].
        gate_scale: [ffn, groups] of a quantized gate_weight.
        up_scale: [ffn, groups] of a quantized up_weight.
        gate_zero_point: None for symmetric formats.
        up_zero_point: See gate_zero_point.
        perm: int[hidden], order of the matrices' columns; None if they are in order.
        epsilon: Added to the mean square.
        weight_format: Of the matrices, a number of `WEIGHT_FORMATS`.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, ffn].
    """
    columns = np.asarray(hidden).shape[1]
    parts_of = ((gate_weight, gate_scale, gate_zero_point), (up_weight, up_scale, up_zero_point))
    weights = [matrix(weight, columns, weight_format, scale, zero, perm) for weight, scale, zero in parts_of]
    way = way_of(len(np.asarray(hidden)), weight_format, gate_scale, gate_zero_point, perm)
    gate, up = _normed_linear(hidden, norm_weight, weights, epsilon, bf16, way)
    if bf16 and way != "skinny":
        gate, up = round_bf16(gate), round_bf16(up)
    return rounding(bf16)(reference.silu(gate) * up)


def down_residual(
    activation: ArrayLike,
    weight: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    weight_format: float = 0,
    bf16: bool = False,
) -> F64:
    """Project and add: `out = residual + weight · activation`.

    Args:
        activation: [rows, ffn].
        weight: [hidden, ffn].
        residual: [rows, hidden].
        scale: As in `o_proj_residual`, and so the rest.
        zero_point: See there.
        perm: See there.
        weight_format: See there.
        bf16: Round as the kernel does.

    Returns:
        f64[rows, hidden].
    """
    return o_proj_residual(
        activation, weight, residual, scale, zero_point, perm, weight_format=weight_format, bf16=bf16
    )


def lm_head(
    hidden: ArrayLike,
    norm_weight: ArrayLike,
    weight: ArrayLike,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    perm: ArrayLike | None = None,
    *,
    epsilon: float,
    weight_format: float = 0,
    bf16: bool = False,
) -> F64:
    """Normalize, project: `logits = weight · norm(hidden)`.

    Args:
        hidden: [rows, hidden].
        norm_weight: [hidden].
        weight: [vocab, hidden].
        scale: As in `o_proj_residual`, and so the rest.
        zero_point: See there.
        perm: See there.
        epsilon: Added to the mean square.
        weight_format: See `o_proj_residual`.
        bf16: Round as the kernel does. Logits are float32, which is not imitated.

    Returns:
        f64[rows, vocab].
    """
    rows = np.asarray(hidden)
    weights = matrix(weight, rows.shape[1], weight_format, scale, zero_point, perm)
    return _normed_linear(rows, norm_weight, [weights], epsilon, bf16)[0]


REFERENCES: Mapping[str, Callable[..., F64 | tuple[NDArray[Any], ...]]] = {
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
            too, and the evaluator takes float64 caches. Quantized caches and their scales are the same in both.

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
