"""SmoothQuant W8A8: int8 matrices times activations that the engine rounds to int8, `--activations int8`.

    y[t, n] = a[t] · c[n] · Σₖ q[t, k] · w[n, k],   q[t, k] = round(x[t, k] / s[k] / a[t]),   a[t] = max|x[t] / s| / 127

c is `per_channel_scale`, max|w| / 127 of a row; a is found anew for each token, so no ranges of activations are stored.
Of a matrix whose columns are split, `dense` and `proj`, each rank takes the maximum over its own columns.

| tensor of a rank                                              | dtype, shape | what it is                           |
|---------------------------------------------------------------|--------------|--------------------------------------|
| `X.weight`                                                    | I8 [N, K]    | rows as in a linear of floats        |
| `X.per_channel_scale`                                         | F32 [1, N]   | c                                    |
| `attention.dense.smoother`, `mlp.proj.smoother`               | F32 [1, K]   | s, ones here                         |
| `input_layernorm.scale_to_int`, `post_layernorm.scale_to_int` | F32 [1]      | one: demanded, without effect here   |

What smooths is in the matrices and norms already: a calibration multiplies columns by powers of two and divides what
feeds them, the norm, the rows of v or the rows of up. So s is 1 everywhere, also for `qkv`, `fc` and `gate`, which have
no tensor for it. `act_scale` and `quantization_scaling_factor` belong to static scales and must not be there.

Source: TensorRT-LLM 1.2, `quantization/layers.py` (`SmoothQuantLinear`, `SmoothQuantRowLinear`, `SmoothQuantRmsNorm`,
`SmoothQuantAttention`, `SmoothQuantGatedMLP`), `models/qwen/convert.py`, `plugins/smoothQuantGemmPlugin`; the method
itself is SmoothQuant's (arXiv:2211.10438).
"""

from __future__ import annotations

import math

import numpy as np

from qwen_rt.errors import UsageError
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.export.trtllm.encoding import Tensors
from qwen_rt.export.trtllm.layout import Target
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec

__all__ = [
    "QUANT_ALGO",
    "check_options",
    "check_scheme",
    "check_widths",
    "ffn_width",
    "is_smoothquant",
    "ones_bytes",
    "ones_of",
]

QUANT_ALGO = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
"""The most exact of its four: a scale for each channel of the weights and for each token of the activations."""

_INNER = 16  # its int8 products read 16 bytes of K at a time, and write 8 elements of N
_OUTER = 8

_NORMS = (".input_layernorm.weight", ".post_layernorm.weight")


def is_smoothquant(scheme: Scheme | None) -> bool:
    """Whether matrices are stored for int8 products; int8 for weights alone is stored as floats, without a scheme."""
    return scheme is not None and scheme.format == "int8"


def check_options(precision: str, options: QuantizeOptions, is_quantized: bool) -> None:
    """Refuse int8 activations with anything but int8 matrices, and without a text to smooth by.

    Args:
        precision: As it was asked for.
        options: The rest.
        is_quantized: The checkpoint is: its matrices are taken as they are, and smoothed no further.

    Raises:
        UsageError: As said.
    """
    if options.activations not in ("float32", "int8"):
        raise UsageError(f"activations={options.activations}", "one of float32, int8")
    if options.activations == "float32":
        return
    if precision != "int8" and not (precision == "auto" and is_quantized):
        raise UsageError(
            f"--activations int8 with precision={precision} for target trtllm",
            "--precision int8, or a checkpoint of int8 matrices",
            "leave --activations out",
        )
    if options.calibrate is None and not is_quantized:
        raise UsageError(
            "--activations int8 without --calibrate for target trtllm",
            "a text whose activations are smoothed: a few loud channels leave the others no precision",
            "add --calibrate FILE, or leave --activations out",
        )


def check_scheme(name: str, scheme: Scheme) -> None:
    """Refuse a checkpoint's scheme that its int8 products do not take.

    Raises:
        UsageError: Any but symmetric int8 by rows.
    """
    if scheme != Scheme("int8"):
        raise UsageError(
            f"{name} in {scheme} with --activations int8 for target trtllm",
            "int8 with a scale a row and no zero points",
            "leave --activations out, or take a checkpoint of floats",
        )


def ones_of(target: Target, scheme: Scheme | None) -> Tensors:
    """(name, safetensors dtype, shape) of the tensors of ones that stand behind a target; none without SmoothQuant."""
    if not is_smoothquant(scheme):
        return ()
    stem = target.name.removesuffix(".weight")
    if target.name.endswith(_NORMS):
        return ((f"{stem}.scale_to_int", "F32", (1,)),)
    if target.is_linear and target.parts[0].num_columns:
        return ((f"{stem}.smoother", "F32", (1, target.shape[1])),)
    return ()


def ones_bytes(shape: tuple[int, ...]) -> bytes:
    """float32 ones, as they are stored."""
    return np.ones(math.prod(shape), "<f4").tobytes()


def ffn_width(spec: ModelSpec, tp: int) -> int:
    """Width of the MLP as it is stored: a whole number of reads of its products on every rank, zeros behind it."""
    multiple = tp * _INNER
    return -(-spec.intermediate_size // multiple) * multiple


def check_widths(spec: ModelSpec, tp: int) -> None:
    """Refuse sides that its int8 products cannot read.

    Raises:
        UsageError: A side of a rank's matrix that is no multiple of 16 inputs, or 8 outputs.
    """
    query_width = spec.num_heads * spec.head_dim // tp
    kv_width = max(1, spec.num_kv_heads // tp) * spec.head_dim
    sides = {
        "hidden size": (spec.hidden_size, _INNER),
        "query width": (query_width, _INNER),
        "width of q, k and v": (query_width + 2 * kv_width, _OUTER),
    }
    for what, (size, multiple) in sides.items():
        if size % multiple:
            raise UsageError(
                f"--activations int8 over {tp} rank{'s' * (tp > 1)} with a {what} of {size} on each",
                f"a multiple of {multiple}",
                "choose fewer ranks, or leave --activations out",
            )
