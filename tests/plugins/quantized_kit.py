"""Quantized matrices of the kernel tests: the schemes, and the ops called on them. Needs torch and a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from qwen_rt.benchmarks.quantized_matrices import Matrix, random_matrix
from qwen_rt.quantization import Scheme

from .gpu_kit import EPSILON, MODELS, nan_bf16, residual_rows

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

SCHEMES = (
    Scheme("fp8"),
    Scheme("fp8", 128),
    Scheme("fp8", 32),
    Scheme("int8"),
    Scheme("int8", symmetric=False),
    Scheme("int8", 128, symmetric=False),
    Scheme("int8", 64),
    Scheme("int4", 128),
    Scheme("int4", 128, symmetric=False),
    Scheme("int4", 128, symmetric=False, permuted=True),
    Scheme("int4", 64, symmetric=False),
    Scheme("int4", 32),
    Scheme("int4", 16, symmetric=False),
    Scheme("int4", 256),
    Scheme("int4"),
    Scheme("int8", permuted=True),
)
MAIN = (Scheme("fp8"), Scheme("int8"), Scheme("int4", 128), Scheme("int4", 128, symmetric=False))
ROWS = (1, 3, 7, 16, 19, 32, 64)
FEW_MODELS = ("nano", "0.5b", "1.5b", "7b")


def fits(scheme: Scheme, *columns: int) -> bool:
    return all(scheme.group_size == 0 or count % scheme.group_size == 0 for count in columns)


def is_fine(scheme: Scheme) -> bool:
    """Whether the kernel rounds the weights to bf16."""
    return 0 < scheme.group_size < (128 if scheme.format == "int4" else 64)


def hidden_rows(rows: int, hidden: int) -> torch.Tensor:
    """As `residual_rows`, but no channel is so large that its rounding alone decides the error of a sum."""
    x = residual_rows(rows, hidden)
    x[:, 5] *= 0.02
    return x


def cases(models: tuple[str, ...], schemes: tuple[Scheme, ...]) -> list[Any]:
    return [pytest.param(m, s, id=f"{m} {s}") for m in models for s in schemes]


def qkv_of(model: str, scheme: Scheme | None) -> list[Matrix]:
    s = MODELS[model]
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    q = random_matrix(scheme, q_width, s.hidden)
    return [q, *(random_matrix(scheme, kv_width, s.hidden, perm=q.perm) for _ in range(2))]


def pair_of(model: str, scheme: Scheme) -> list[Matrix]:
    s = MODELS[model]
    gate = random_matrix(scheme, s.ffn, s.hidden)
    return [gate, random_matrix(scheme, s.ffn, s.hidden, perm=gate.perm)]


def run_qkv(
    call: OpCaller,
    hidden: Any,
    norm: Any,
    matrices: list[Matrix],
    biases: list[Any],
    weight_format: float | None = None,
) -> Any:
    out = nan_bf16(hidden.shape[0], sum(m.shape[0] for m in matrices))
    tensors: dict[str, Any] = {"hidden": hidden, "norm_weight": norm, "qkv": out}
    for name, matrix, bias in zip("qkv", matrices, biases, strict=True):
        tensors |= matrix.tensors(f"{name}_") | {f"{name}_bias": bias}
    kind = matrices[0].weight_format if weight_format is None else weight_format
    call("rmsnorm_qkv", tensors, epsilon=EPSILON, weight_format=kind)
    return out


def run_pair(call: OpCaller, hidden: Any, norm: Any, matrices: list[Matrix], weight_format: float | None = None) -> Any:
    out = nan_bf16(hidden.shape[0], matrices[0].shape[0])
    tensors = {"hidden": hidden, "norm_weight": norm, "activation": out}
    tensors |= matrices[0].tensors("gate_") | matrices[1].tensors("up_")
    kind = matrices[0].weight_format if weight_format is None else weight_format
    call("rmsnorm_gate_up_silu", tensors, epsilon=EPSILON, weight_format=kind)
    return out


def run_residual(
    call: OpCaller,
    op: str,
    x: Any,
    matrix: Matrix,
    residual: Any,
    out: Any = None,
    weight_format: float | None = None,
) -> Any:
    out = nan_bf16(*residual.shape) if out is None else out
    name = "attention" if op == "o_proj_residual" else "activation"
    tensors = {name: x, "residual": residual, "out": out} | matrix.tensors()
    call(op, tensors, weight_format=matrix.weight_format if weight_format is None else weight_format)
    return out


def run_head(call: OpCaller, hidden: Any, norm: Any, matrix: Matrix) -> Any:
    out = torch.full((hidden.shape[0], matrix.shape[0]), float("nan"), device="cuda")
    tensors = {"hidden": hidden, "norm_weight": norm, "logits": out} | matrix.tensors()
    call("lm_head", tensors, epsilon=EPSILON, weight_format=matrix.weight_format)
    return out
