"""Inputs and checks of the kernel tests. Needs torch and a GPU."""

from __future__ import annotations

import torch

from qwen_rt.benchmarks import kernel_references as references
from qwen_rt.benchmarks.kernel_shapes import SHAPES, ModelShape
from qwen_rt.benchmarks.kernel_step import random_bf16
from qwen_rt.ops import MAX_ROWS, SKINNY_ROWS
from qwen_rt.quantization import Scheme

NANO = ModelShape(512, 4, 4, 2, 128, 768, 1152, True)
MODELS = {**SHAPES, "nano": NANO, "padded-72b": ModelShape(8192, 80, 64, 8, 128, 29696, 152064)}
EPSILON = 1e-6

ALIKE = ((64, (1, 5, 8, 9, 13, 16, 17, 32, 33, 63)),)
ALIKE_WITH_PRODUCTS = ((32, (1, 5, 8, 9, 13, 16, 17, 31)), (64, (33, 41, 63)))
"""Rows → fewer rows that give a row the same bits: where all go to the skinny kernels, and where some do not."""


def alike(scheme: Scheme | None) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Rows → fewer rows that give a row the same bits; `scheme` None: bf16."""
    has_products = takes_products(64, scheme)
    if scheme not in (Scheme("fp8"), Scheme("int8")) or torch.cuda.get_device_capability() != (9, 0):
        return ALIKE_WITH_PRODUCTS if has_products else ALIKE
    few, more = (2, (1,)), (3, 5, 8, 9, 13, 16, 17, 31)
    return (few, (32, more), (64, (33, 41, 63))) if has_products else (few, (64, (*more, 33, 63)))


def nan_bf16(*shape: int) -> torch.Tensor:
    """An output that nobody has written."""
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")


def takes_products(rows: int, scheme: Scheme | None) -> bool:
    """Whether so many rows go to cuBLASLt; `scheme` None: bf16."""
    if rows > MAX_ROWS:
        return True
    is_direct = scheme is None or (scheme == Scheme("fp8") and torch.cuda.get_device_capability() == (9, 0))
    return rows > SKINNY_ROWS and is_direct


def check(op: str, out: torch.Tensor, reference: torch.Tensor, **kind: bool) -> None:
    """Compare an output with its reference; `kind` as in `kernel_references.problem_of`."""
    problem = references.problem_of(op, out, reference, **kind)
    assert not problem, problem


def residual_rows(rows: int, hidden: int) -> torch.Tensor:
    """Rows as the residual stream has them: each of another size, and a few channels far above the others."""
    x = random_bf16(rows, hidden) * torch.logspace(-2, 2, rows, device="cuda").bfloat16()[:, None]
    x[:, 5] *= 50
    return x


def norm_weight(hidden: int) -> torch.Tensor:
    """Weights of a norm around 1."""
    return 1 + random_bf16(hidden, std=0.2)
