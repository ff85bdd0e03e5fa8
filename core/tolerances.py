"""Every numeric tolerance of the project, each with its reason. Tests and `qwen-rt verify` read them from here.

Notation: u = unit roundoff of the format (float32 2⁻²⁴ ≈ 6e-8, bfloat16 2⁻⁸, float16 2⁻¹¹). Relative errors are taken
against the largest magnitude of the reference, because single logits may be near zero.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CHUNKING_RELATIVE_FP32",
    "LOWERED_BF16_CACHE_RELATIVE",
    "LOWERED_BF16_MIN_COSINE",
    "LOWERED_BF16_RELATIVE",
    "LOWERED_RELATIVE",
    "PARITY_RELATIVE_FP32",
    "PORTABLE_RELATIVE",
    "VERIFY",
    "VerifyTolerance",
    "verify_kind",
]

PARITY_RELATIVE_FP32 = 1e-4
"""float32 against float32, sums in another order: a dot product of n terms errs by about sqrt(n)·u ≈ 1e-5 at n = 29568;
layers add up to a few times that."""

CHUNKING_RELATIVE_FP32 = 1e-5
"""The same weights and the same runtime, tokens fed in other portions (chunks, batches, one by one). Not bit-equal,
because ONNX Runtime multiplies one row by another kernel than several and sums in another order: sqrt(n)·u a product
again, but at the sizes of the tests (n up to 1386, three layers) a few 1e-6; measured 2e-7 to 1.5e-6."""

PORTABLE_RELATIVE = {"float32": PARITY_RELATIVE_FP32, "float16": 5e-3, "bfloat16": 4e-2}
"""Compute dtype of a portable graph → its error against float32: about ten roundings of u a layer (each product, norm
and residual is stored in that dtype), partly averaged out; measured 1e-3 and 1.5e-2 on two layers."""

LOWERED_RELATIVE = 1e-5
"""A graph lowered to plugin ops and run in float64, against the portable graph in float32 on the same weights: what is
left is the rounding of the one float32 side, sqrt(n)·u a product (2e-6 at n = 1386, the tests' largest) over two to
four layers; measured 2e-7 to 1e-6 in logits, 6e-7 to 1.6e-6 in caches."""

LOWERED_BF16_RELATIVE = 2e-2
"""The same, rounding to bfloat16 where the kernels do: nine times a layer (norm twice, qkv, q and k, probabilities,
attention, both residuals, activation). A rounding errs evenly up to u, so by u/sqrt(3) = 2.3e-3 rms; 36 of them, in
four layers, that all reached a logit in full would come to 6 · 2.3e-3 = 1.4e-2 of its size, and the largest error is
taken against the largest logit, some three times the rms. Measured 1e-3 to 6.7e-3."""

LOWERED_BF16_MIN_COSINE = 0.9999
"""Of the logits, from the same 1.4e-2: 1 - cosine = 1.4e-2² / 2 = 1e-4. Measured 1 - 8e-6 to 1 - 3e-5."""

LOWERED_BF16_CACHE_RELATIVE = 4 * 2**-8
"""Of keys and values: the largest was rounded as part of qkv and, if a key, once more when turned, by u at most each;
as much again for what the layers before did to the hidden state. Measured 5.6e-3 to 7.3e-3."""


@dataclass(frozen=True)
class VerifyTolerance:
    """What `qwen-rt verify` demands of a bundle against transformers in float32 on the same checkpoint.

    Attributes:
        max_relative: Largest |error| of any logit over the largest |reference| logit.
        min_cosine: Of the logits of every position.
        min_top1: Share of positions whose best token is the same.
        min_greedy: Share of the greedy continuation before the first difference.
        reason: Why these numbers.
    """

    max_relative: float
    min_cosine: float
    min_top1: float
    min_greedy: float
    reason: str


VERIFY: dict[str, VerifyTolerance] = {
    "lossless": VerifyTolerance(
        max_relative=PARITY_RELATIVE_FP32,
        min_cosine=0.999999,
        min_top1=0.995,
        min_greedy=0.95,
        reason="same weights, float32 on both sides: only the order of sums differs; a top-1 may change where two "
        "logits are within 1e-4, and from there a greedy continuation may take another way",
    ),
    "rounded-fp16": VerifyTolerance(
        max_relative=1e-2,
        min_cosine=0.9999,
        min_top1=0.98,
        min_greedy=0.25,
        reason="weights rounded to float16 (u = 2^-11): errors of 5e-4 a weight, averaged over a row",
    ),
    "rounded-bf16": VerifyTolerance(
        max_relative=5e-2,
        min_cosine=0.999,
        min_top1=0.95,
        min_greedy=0.1,
        reason="weights rounded to bfloat16 (u = 2^-8): errors of 4e-3 a weight, averaged over a row",
    ),
}


def verify_kind(stored_dtypes: set[str], precision: str) -> str:
    """Return the row of `VERIFY` for a bundle.

    Args:
        stored_dtypes: safetensors dtypes of the checkpoint (`{"BF16"}`).
        precision: The bundle's `fp32`, `bf16` or `fp16`.
    """
    own = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    return "lossless" if precision == "fp32" or stored_dtypes == {own} else f"rounded-{precision}"
