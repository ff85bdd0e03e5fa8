"""The shortest time of every op on a GPU: bytes over the measured bandwidth, operations over the measured rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.bundle import Bundle
from qwen_rt.runtime.cuda.graph import split_weights

__all__ = ["Floors", "Rates", "decode_floors", "matrix_bytes_of_bundle", "prefill_floors"]

_PARTS = {
    "rmsnorm_qkv": ("q_proj.", "k_proj.", "v_proj."),
    "o_proj_residual": ("o_proj.",),
    "rmsnorm_gate_up_silu": ("gate_proj.", "up_proj."),
    "down_residual": ("down_proj.",),
}
_ATTENTION = "rope_kv_append_attention"


@dataclass(frozen=True)
class Rates:
    """What was measured of the device in the same run.

    Attributes:
        bandwidth: Bytes a second.
        matrix: bf16 operations a second; None: not known, floors are those of bytes.
        matrix_fp8: The same of fp8.
    """

    bandwidth: float
    matrix: float | None = None
    matrix_fp8: float | None = None


@dataclass(frozen=True)
class Floors:
    """Op → µs and bytes of a call, on average over a step's calls."""

    us: Mapping[str, float]
    read_bytes: Mapping[str, float]


def matrix_bytes_of_bundle(bundle: Bundle) -> dict[str, float]:
    """Return op → stored bytes of its matrices and what belongs to them, the mean of all layers, and the LM head's."""
    spec = bundle.manifest.model
    _, weights = split_weights(bundle.graph_file.read_bytes(), spec.num_layers)
    matrices = [weight for weight in weights if len(weight.shape) > 1 and not weight.name.endswith(".kv_offset")]
    found = {
        op: sum(weight.nbytes for weight in matrices if any(part in weight.name for part in parts)) / spec.num_layers
        for op, parts in _PARTS.items()
    }
    head = "embed_tokens." if spec.tie_word_embeddings else "lm_head."
    return found | {"lm_head": float(sum(weight.nbytes for weight in matrices if head in weight.name))}


def matrix_bytes_of_shape(shape: ModelShape, precision: str) -> dict[str, float]:
    """Return the same for random weights of a shape in a precision's default scheme, with an LM head in bf16."""
    of_layer = {op: float(nbytes) for op, nbytes in shape.layer_bytes(precision).items()}
    return of_layer | {"lm_head": 2.0 * shape.hidden * shape.vocab}


def decode_floors(
    shape: ModelShape, matrices: Mapping[str, float], kv_format: str, rows: int, length: float, rates: Rates
) -> Floors:
    """Return the floors of a decode step: its bytes over the bandwidth; no op of it is bound by arithmetic.

    Args:
        shape: The model's sizes.
        matrices: Op → bytes of a call's matrices.
        kv_format: Of the KV cache.
        rows: B.
        length: Tokens of every row.
        rates: Of the device.
    """
    read = {**matrices, "select_o_proj_residual": matrices["o_proj_residual"]}
    read[_ATTENTION] = shape.with_layers(1).kv_bytes(1, kv_format) * rows * length
    read["embed"] = 2.0 * rows * shape.hidden
    read["sample"] = 4.0 * rows * shape.vocab
    return Floors({op: 1e6 * nbytes / rates.bandwidth for op, nbytes in read.items()}, read)


def prefill_floors(
    shape: ModelShape,
    matrices: Mapping[str, float],
    precision: str,
    kv_format: str,
    chunks: Sequence[tuple[int, int]],
    rates: Rates,
) -> Floors:
    """Return the floors of a prefill of one request: the longer of bytes over bandwidth and operations over rate.

    Behind attention the last layer works for one row.

    Args:
        shape: The model's sizes.
        matrices: Op → bytes of a call's matrices.
        precision: fp8 products count with the rate of fp8.
        kv_format: Of the KV cache.
        chunks: Tokens that are in the cache before each chunk, and its own.
        rates: Of the device.
    """
    rate = rates.matrix_fp8 if precision == "fp8" and rates.matrix_fp8 else rates.matrix
    us: dict[str, float] = {}
    read: dict[str, float] = {}
    calls: dict[str, int] = {}

    def add(op: str, count: int, nbytes: float, flops: float, matrix_rate: float | None) -> None:
        floor_s = max(nbytes / rates.bandwidth, flops / matrix_rate if matrix_rate else 0.0)
        us[op] = us.get(op, 0.0) + count * 1e6 * floor_s
        read[op] = read.get(op, 0.0) + count * nbytes
        calls[op] = calls.get(op, 0) + count

    parameters = shape.layer_parameters
    for before, tokens in chunks:
        add("embed", 1, 2.0 * tokens * shape.hidden, 0.0, None)
        pairs = tokens * before + tokens * (tokens + 1) / 2
        kv_bytes = shape.with_layers(1).kv_bytes(before + tokens, kv_format)
        add(_ATTENTION, shape.layers, kv_bytes, 4.0 * pairs * shape.heads * shape.head_dim, rates.matrix)
        add("rmsnorm_qkv", shape.layers, matrices["rmsnorm_qkv"], 2.0 * tokens * parameters["rmsnorm_qkv"], rate)
        for op in ("o_proj_residual", "rmsnorm_gate_up_silu", "down_residual"):
            add(op, shape.layers - 1, matrices[op], 2.0 * tokens * parameters[op], rate)
            of_last = "select_o_proj_residual" if op == "o_proj_residual" else op
            add(of_last, 1, matrices[op], 2.0 * parameters[op], rate)
        add("lm_head", 1, matrices["lm_head"], 2.0 * shape.hidden * shape.vocab, None)
    add("sample", 1, 4.0 * shape.vocab, 0.0, None)
    return Floors(
        {op: us[op] / calls[op] if calls[op] else 0.0 for op in us},
        {op: read[op] / calls[op] if calls[op] else 0.0 for op in read},
    )
