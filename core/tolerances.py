"""Every numeric tolerance of the project, each with its reason. Tests and `qwen-rt verify` read them from here.

Notation: u = unit roundoff of the format (float32 2⁻²⁴ ≈ 6e-8, bfloat16 2⁻⁸, float16 2⁻¹¹). Relative errors are taken
against the largest magnitude of the reference, because single logits may be near zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import NormalDist

from qwen_rt.quantization import Scheme

__all__ = [
    "CHUNKING_RELATIVE_FP32",
    "GATE_KV_ERROR",
    "GATE_MIN_CONFIDENT",
    "GATE_VECTOR_ERROR",
    "INT8_ACTIVATIONS_RELATIVE",
    "KV_BF16_CACHE_RELATIVE",
    "KV_BF16_MIN_COSINE",
    "KV_BF16_RELATIVE",
    "KV_FP32_RELATIVE",
    "KV_LOGITS_MIN_COSINE",
    "KV_LOGITS_RELATIVE",
    "KV_STEP",
    "LOWERED_BF16_CACHE_RELATIVE",
    "LOWERED_BF16_MIN_COSINE",
    "LOWERED_BF16_RELATIVE",
    "LOWERED_RELATIVE",
    "PARITY_RELATIVE_FP32",
    "PORTABLE_RELATIVE",
    "RUNTIME",
    "VERIFY",
    "RuntimeTolerance",
    "VerifyTolerance",
    "gate_kl_limit",
    "gate_limit",
    "gate_scale_limit",
    "gate_top1_limit",
    "rounding_error",
    "verify_kind",
    "verify_quantized",
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

INT8_ACTIVATIONS_RELATIVE = 4e-2
"""Activations rounded to int8 in blocks before a product, in float32 otherwise: an element errs evenly by up to half of
max|x| / 127, 0.7 % rms of normal numbers; 7 products a layer, of which 4 follow each other, in two layers, and the
largest error is some four times the rms. Measured 5e-3 to 1.6e-2."""

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

KV_STEP = {"fp8": 32 / 448, "int8": 1 / 127}
"""Format of a KV cache → largest distance of two numbers that it can hold, over the largest of them. A key or value
that two computations leave on two sides of the middle between them differs by that much."""

KV_FP32_RELATIVE = {"fp8": 5e-3, "int8": 1e-3}
"""Logits over a quantized cache, float32 against float64. Noise is 1e-6 (PARITY: sqrt(n) · u) and seldom changes what
is stored, but where it does, an element of a value differs by KV_STEP = s of the largest, some 3 sigma. That is
3 s / sqrt(H D) of an early token's attention, 1.3e-2 or 1.5e-3 at H D = 256, and about half of a logit. Measured 2.3e-3
and 1.7e-4."""

KV_BF16_RELATIVE = {"fp8": 4e-2, "int8": 2.5e-2}
"""The same with activations rounded to bfloat16: d = 2.3e-3 rms, so sqrt(d s) = 1.3e-2 and 4e-3, of keys and of values
in two layers each, on top of LOWERED_BF16_RELATIVE. Measured 2.4e-2 and 9e-3."""

KV_BF16_MIN_COSINE = {"fp8": 0.999, "int8": 0.9998}
"""From e = 2 · 1.3e-2 and 2 · 4e-3 beside the 1.4e-2 of LOWERED_BF16_RELATIVE: e² / 2 = 4e-4 and 1.3e-4, for logits and
for what the cache of a second layer holds. Measured 1 - 5e-4 and 1 - 6e-5."""

KV_BF16_CACHE_RELATIVE = {name: step + LOWERED_BF16_CACHE_RELATIVE for name, step in KV_STEP.items()}
"""Of what the cache gives back: one step, and what LOWERED_BF16_CACHE_RELATIVE allows for. Measured 7.3e-2 and 1e-2."""

KV_LOGITS_MIN_COSINE = {"fp8": 0.997, "int8": 0.9998}
"""Logits over a quantized cache against one of floats, random weights, two layers. Eight bits leave a normal vector
with an error of 2.6 % (fp8) or 0.6 % (int8, 127 steps to about 2.8 sigma): values as much, scores q · k / sqrt(D) of
unit size as much of one, which is as much of a probability. Together 1.4 times that, for two layers 2 times: e = 0.074
if the stream were all attention, and 1 - e² / 2 = 0.997; 0.018 and 0.9998. Biases of any size must not show in it.
Measured 1 - 1.9e-3 and 1 - 1e-4 with key biases of 360."""

KV_LOGITS_RELATIVE = {"fp8": 0.15, "int8": 0.04}
"""From the same e: the largest error is some three to four times the rms, the largest logit about three; twice that
where scores are large, so that attention hangs on few keys. Measured 0.09 and 0.027."""


@dataclass(frozen=True)
class VerifyTolerance:
    """What `qwen-rt verify` demands of a bundle against transformers in float32 on the same checkpoint.

    Attributes:
        max_relative: Largest |error| of any logit over the largest |reference| logit.
        min_cosine: Of the logits of every position.
        min_top1: Share of positions whose best token is the same.
        min_confident: The same share of the positions at which the reference gives its best token half or more.
        max_kl: Mean KL(reference ‖ bundle) of the next token, nats: with an error d of the logits, some d² / 2.
        min_greedy: Share of the greedy continuation before the first difference; 0 where it does not decide.
        min_exact: Share of the nano problems answered right; bf16 answers all.
        reason: Why these numbers.
    """

    max_relative: float
    min_cosine: float
    min_top1: float
    min_confident: float
    max_kl: float
    min_greedy: float
    min_exact: float
    reason: str


VERIFY: dict[str, VerifyTolerance] = {
    "lossless": VerifyTolerance(
        max_relative=PARITY_RELATIVE_FP32,
        min_cosine=0.999999,
        min_top1=0.995,
        min_confident=1.0,
        max_kl=1e-5,
        min_greedy=0.95,
        min_exact=0.99,
        reason="same weights, float32 on both sides: only the order of sums differs; a top-1 may change where two "
        "logits are within 1e-4, and from there a greedy continuation may take another way",
    ),
    "rounded-fp16": VerifyTolerance(
        max_relative=1e-2,
        min_cosine=0.9999,
        min_top1=0.98,
        min_confident=0.99,
        max_kl=1e-3,
        min_greedy=0.25,
        min_exact=0.98,
        reason="weights rounded to float16 (u = 2^-11): errors of 5e-4 a weight, averaged over a row",
    ),
    "rounded-bf16": VerifyTolerance(
        max_relative=5e-2,
        min_cosine=0.999,
        min_top1=0.95,
        min_confident=0.97,
        max_kl=2e-2,
        min_greedy=0.1,
        min_exact=0.98,
        reason="weights rounded to bfloat16 (u = 2^-8): errors of 4e-3 a weight, averaged over a row",
    ),
}


def verify_kind(stored_dtypes: set[str], precision: str) -> str:
    """Return the row of `VERIFY` for a bundle of floats.

    Args:
        stored_dtypes: safetensors dtypes of the checkpoint (`{"BF16"}`).
        precision: The bundle's `fp32`, `bf16` or `fp16`.
    """
    own = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    return "lossless" if precision == "fp32" or stored_dtypes == {own} else f"rounded-{precision}"


@dataclass(frozen=True)
class RuntimeTolerance:
    """What `qwen-rt verify` demands of a quantized bundle's runtime against float32 on the weights that it stores.

    Attributes:
        max_relative: Largest |error| of any logit over the largest |reference| logit.
        max_mean: Mean |error| of all logits over the same.
        min_cosine: Mean over the positions of the cosine of their logits.
        reason: Why these numbers.
    """

    max_relative: float
    max_mean: float
    min_cosine: float
    reason: str


RUNTIME: dict[str, RuntimeTolerance] = {
    "float32": RuntimeTolerance(
        PARITY_RELATIVE_FP32, 1e-5, 0.999999, "the same weights, float32 on both sides: only the order of sums differs"
    ),
    "bfloat16": RuntimeTolerance(5e-2, 1e-2, 0.999, "activations rounded to bfloat16 (u = 2^-8) between steps"),
    "int8": RuntimeTolerance(
        0.3,
        1e-2,
        0.98,
        "activations rounded to int8 in blocks: 0.7 % a product, five times that behind some tens of them",
    ),
    "float32-fp8": RuntimeTolerance(
        2e-2, 1e-3, 0.9995, "sums in another order move a few keys and values to the next number of the fp8 cache"
    ),
    "float32-int8": RuntimeTolerance(
        2e-2, 2e-4, 0.9999, "sums in another order move a few keys and values to the next number of the int8 cache"
    ),
    "bfloat16-fp8": RuntimeTolerance(
        0.15,
        1e-2,
        0.997,
        "activations rounded to bfloat16, which moves keys and values to the next number of the cache",
    ),
    "bfloat16-int8": RuntimeTolerance(
        8e-2,
        1e-2,
        0.998,
        "activations rounded to bfloat16, which moves keys and values to the next number of the cache",
    ),
}
"""Activations, then the format of a quantized cache → tolerance. The caches' are four times `KV_FP32_RELATIVE` and
`KV_BF16_RELATIVE`, which were measured on two layers: errors of layers add up as the root of their number, and models
have 28 to 80. Only the largest error with an int8 cache is bounded as with fp8: a number that falls to the other side
moves by max|x| / 127 there, and where all else hangs on little that is 5.5e-3 of the largest logit (nano in int4); it
is the mean that tells a wrong kernel. Measured on nano: 1.2e-5 (float32), 5e-3 and 7e-4 (its caches), 0.03 to 0.1 (int8
activations, mean 3e-3): the largest of many errors where the text is not what nano was trained on, so that all else
hangs on little."""


def verify_quantized(formats: Collection[str], kv_format: str | None, activations: str) -> VerifyTolerance:
    """What `qwen-rt verify` demands of a quantized bundle against its source.

    KL and confident top-1 are the gate's, and a tenth of a nat and two positions in a hundred more where activations
    are rounded as well. What single logits are off by says little, and a greedy text parts with the source's at the
    first pair of tokens that are nearly alike; they are reported.

    Args:
        formats: Of the matrices.
        kv_format: Of the cache, or None.
        activations: `float32`, `bfloat16` or `int8`.
    """
    named = {*formats, *(() if kv_format is None else (kv_format,))}
    rounded = activations != "float32"
    what = "+".join(sorted(formats)) or "no matrix"
    return VerifyTolerance(
        max_relative=math.inf,
        min_cosine=-1.0,
        min_top1=0.0,
        min_confident=gate_top1_limit(formats, kv_format) - 0.02 * rounded,
        max_kl=gate_kl_limit(formats, kv_format) + 0.1 * rounded,
        min_greedy=0.0,
        min_exact=min((_EXACT[name] for name in named), default=0.99),
        reason=f"{what} quantized" + ("" if kv_format is None else f", KV cache in {kv_format}"),
    )


_EXACT = {"int8": 0.98, "fp8": 0.98, "int4": 0.95}
"""Half of nano's training ran on int4-rounded weights, and every format answers all 1,000 problems right. Of
200, one in a hundred is two problems, which near ties may cost any rounding."""


_LEVELS = {"int8": 127, "int4": 7}
_FP8_ERROR = 2.6e-2
_GATE_FACTOR = {"fp8": 2.5, "int8": 6.0, "int4": 3.0}
_KEPT_ERROR = 2**-7


def rounding_error(scheme: Scheme, columns: int) -> float:
    """Expected ‖Ŵ - W‖ / ‖W‖ of a normally distributed matrix that is rounded to nearest.

        fp8      0.026, whatever the scale: three bits of mantissa leave an error of 1/8 / sqrt(12) in a binade, whose
                 numbers are 1.4 rms, and a little more where a normal distribution is dense
        int8, 4  a / (levels · sqrt(12)), a = max|w| / sigma of the numbers that share a scale: the median of a maximum,
                 2.8 of 128 and 3.7 of 3584; levels = 127 or 7

    0.0085 for int8 at K = 3584, 0.115 for int4 g128, and 0.154 for int4 with a scale for a whole row of 3584.
    """
    if scheme.format == "fp8":
        return _FP8_ERROR
    count = scheme.group_size or columns
    largest = NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)
    return largest / (_LEVELS[scheme.format] * math.sqrt(12))


def gate_limit(scheme: Scheme | None, columns: int) -> float:
    """Largest output error, mean of ‖(Ŵ - W) x‖ / ‖W x‖ over the tokens, that the gate accepts of a matrix.

    If x has nothing to do with the rounding, that is `rounding_error`, as nano and random weights confirm (0.026, 0.008
    and 0.10). The limit is a multiple, for what real matrices do to it. fp8 x 2.5: its error hardly depends on the
    distribution, but W x may cancel. int4 x 3: that too, and a group of 128 may hold a number of 5 sigma. int8 x 6:
    rows of thousands hold numbers of 10 to 20 sigma, of which it feels each.

    A matrix of zeros errs by 1, another matrix by 1.4, scales in another order by how much they differ: by 0.1 and more
    in normally distributed rows, and where that is below the limit of int4, `gate_scale_limit` sees it. A matrix that
    is not quantized (None) may have been rounded to bfloat16, u = 2^-8, and errs by less than 2^-7.
    """
    return _KEPT_ERROR if scheme is None else _GATE_FACTOR[scheme.format] * rounding_error(scheme, columns)


def gate_scale_limit(scheme: Scheme | None, columns: int) -> float:
    """Largest scale error (see `gate_result.TensorError`) that the gate accepts of a matrix.

    With the rounding error e, ⟨ŵ, w⟩ / ⟨w, w⟩ of a group of n numbers is off by e / sqrt(n), and by e² where the
    rounding shrinks, as a clipped scale does; measured 0.014 for int4 g128 and 0.002 for fp8. The limit is four times
    that: where it costs the output nothing, a calibration may err by three e. 0.067 for int4 g128, whose scales differ
    by 0.13 from group to group in normally distributed rows, so that another group's is off by 0.18. At least 0.02.
    """
    if scheme is None:
        return 0.02
    error = rounding_error(scheme, columns)
    return max(0.02, 4 * math.hypot(error / math.sqrt(scheme.group_size or columns), error * error))


GATE_VECTOR_ERROR = 2**-7
"""Of biases and norms, ‖b̂ - b‖ / ‖b‖: rounded to bfloat16, perhaps twice, once as an offset of the cache."""

GATE_KV_ERROR = {"fp8": 0.15, "int8": 0.05}
"""Format of the cache → error of a layer's attention when only its keys and values are rounded. Values err by 0.026 and
by 0.006 (128 numbers share a scale: 2.8 / (127 · sqrt(12))), and attention averages that; scores, of a few units, err
by as much of a key. Random models give 0.029 and 0.007 at most if the offsets take the biases out, 0.057 and 0.017 if
they take nothing; a key whose bias is a hundred times the rest loses that rest, and the error is near 1."""

_GATE_KL = {"int8": 0.03, "fp8": 0.08, "int4": 0.5}
_GATE_KL_KV = {"fp8": 0.15, "int8": 0.03}
_GATE_TOP1 = {"int8": 0.97, "fp8": 0.95, "int4": 0.85}

GATE_MIN_CONFIDENT = 16
"""Confident positions below which the top-1 agreement on them does not decide: of 15, one is 7 %."""


def gate_kl_limit(formats: Iterable[str], kv_format: str | None = None) -> float:
    """Largest mean KL(source ‖ quantized) of the next token that the gate accepts, in nats.

    Logits that are off by d have a KL of about half the variance of d; with an error e of the last hidden state and
    logits of the standard deviation s, that is (e s)² / 2. Random models have s = 0.9 and e = 0.013, 0.045 and 0.17
    with int8, fp8 and int4 g128: 7e-5, 8e-4 and 0.012, and measured are 9e-5, 1e-3 and 0.016. Trained models have s = 2
    to 3, and e grows with the layers: nano gives 8e-4, 5e-3 and 0.08. The limits are six (int4) to forty times (int8)
    as much. Half a nat says that a token of the source keeps 60 % of its probability: int4 may cost a small model
    nearly that, a model with one broken layer costs more. A quantized cache costs nano 0.034 (fp8) and 1.2e-3 (int8).
    """
    weights = max((_GATE_KL[name] for name in formats), default=1e-3)
    return weights + (_GATE_KL_KV[kv_format] if kv_format is not None else 0.0)


def gate_top1_limit(formats: Iterable[str], kv_format: str | None = None) -> float:
    """Smallest share of the confident positions (source's p >= 0.5) with the same best token that the gate accepts.

    There the next best token has less than half, and mostly a small part of it: its logit is several units lower. int8
    and fp8 move logits by a tenth, int4 by up to one. The limits leave room for one position in 33, 20 and 7. Without
    confident positions the best of many equal tokens changes with any rounding, so that top-1 says nothing.
    """
    named = {*formats, *(() if kv_format is None else (kv_format,))}
    return min((_GATE_TOP1[name] for name in named), default=0.99)
