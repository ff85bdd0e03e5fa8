"""Which part of the k and v biases a quantized cache leaves out: chosen for every head by the error that it leaves.

    k = W x + b,  stored: R(position) · (k - offset) in eight bits, a scale for each token and head

Qwen2's key biases reach hundreds where `W x` is about one. Stored together, the large elements of a head set its scale
(int8) or have steps as large as everything else (fp8), and what tells one token from another is lost. The bias is the
same for every token, so it need not be stored: with `offset = b` only `W x` is, and `R(position) · b` is added exactly
to what comes back. Values need no rotation; otherwise they are alike.

| candidate | offset                                                    | tried                       |
|-----------|-----------------------------------------------------------|-----------------------------|
| `none`    | 0                                                         | always                      |
| `bias`    | the projection's bias                                     | if it has one               |
| `mean`    | the mean of k (or v), to where the rest fits a bfloat16   | with `hidden` of a text     |

Each is tried on every head, with the layer's own weights; `kv_error` says what of a rounding counts. A later candidate
is taken if it is better by `MARGIN`: an offset costs the kernels a product, so a tie goes to none.

No text is needed: hidden states are drawn from a normal distribution. That is blunt, but the question is, too: a bias
that matters is many times as large as `W x`. Those of a text, where a build has them, answer it better, because their
mean may be large and cancel a part of the bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.errors import UsageError
from qwen_rt.export.quantize.kv_error import KvSample, read_bias, sample_layer
from qwen_rt.progress import track
from qwen_rt.quantization import KV_FORMATS, fake_quantize_kv, key_offset_name, value_offset_name
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["CANDIDATES", "MARGIN", "HeadChoice", "KvLayer", "KvPlan", "choose_kv_offsets"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CANDIDATES = ("none", "bias", "mean")
"""What an offset can be, in the order in which they are tried."""

MARGIN = 0.1
"""Share of the error that a later candidate has to save."""

_DIGITS = 4  # of an error, in a report


@dataclass(frozen=True)
class HeadChoice:
    """What was chosen for one head.

    Attributes:
        candidate: One of `CANDIDATES`.
        errors: Candidate → its relative error, for each that was tried.
    """

    candidate: str
    errors: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class KvLayer:
    """What a layer's cache leaves out.

    Attributes:
        key_offset: f32[Hkv, D].
        value_offset: f32[Hkv, D].
        key_bias: f32[Hkv·D], the bias of k_proj without the offset; None if the model has no biases.
        value_bias: f32[Hkv·D], that of v_proj.
        keys: What was chosen, for each kv head.
        values: The same for values.
    """

    key_offset: F32
    value_offset: F32
    key_bias: F32 | None
    value_bias: F32 | None
    keys: tuple[HeadChoice, ...]
    values: tuple[HeadChoice, ...]


@dataclass(frozen=True, eq=False)
class KvPlan:
    """How the cache of a model is quantized.

    Attributes:
        kv_format: `fp8` or `int8`.
        layers: One for each layer.
    """

    kv_format: str
    layers: tuple[KvLayer, ...]

    def tensors(self) -> dict[str, F32]:
        """Name → what a build stores: offsets of every layer, and where there are biases those that are left."""
        found: dict[str, F32] = {}
        for index, layer in enumerate(self.layers):
            found[key_offset_name(index)], found[value_offset_name(index)] = layer.key_offset, layer.value_offset
            if layer.key_bias is not None and layer.value_bias is not None:
                found[f"model.layers.{index}.self_attn.k_proj.bias"] = layer.key_bias
                found[f"model.layers.{index}.self_attn.v_proj.bias"] = layer.value_bias
        return found

    def summary(self) -> dict[str, Any]:
        """As JSON-ready data: the format, and by layer and head what was chosen and every candidate's error."""

        def heads(choices: tuple[HeadChoice, ...]) -> list[dict[str, Any]]:
            return [{"candidate": choice.candidate, "errors": dict(choice.errors)} for choice in choices]

        return {
            "kv_format": self.kv_format,
            "layers": [{"keys": heads(layer.keys), "values": heads(layer.values)} for layer in self.layers],
        }


def choose_kv_offsets(
    rows: RowSource,
    spec: ModelSpec,
    kv_format: str,
    *,
    hidden: Sequence[ArrayLike] | Mapping[int, ArrayLike] | None = None,
    max_length: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> KvPlan:
    """Choose the offsets of every layer and head.

    Args:
        rows: The parameters, biases whole. Matrices are read in blocks; of k, v and q no more than a layer's are held.
        spec: The model.
        kv_format: `fp8` or `int8`.
        hidden: Layer → hidden states of a text before it (before its norm), f32[..., C]; 256 of them are taken, evenly.
            None draws them, and does not try `mean`.
        max_length: Positions are drawn below it; None for the model's context length.
        seed: Of what is drawn.
        quiet: Report no progress on stderr.

    Returns:
        The plan; equal arguments give an equal one.

    Raises:
        UsageError: An unknown format.
        CheckpointError: Queries, keys or values of a layer are not finite.
    """
    if kv_format not in KV_FORMATS:
        raise UsageError(f"kv_format={kv_format}", f"one of {', '.join(KV_FORMATS)}")
    layers = []
    for index in track(range(spec.num_layers), "KV offsets", quiet=quiet):
        sample = sample_layer(rows, spec, index, None if hidden is None else hidden[index], max_length, seed)
        layers.append(_choose_layer(rows, spec, kv_format, index, sample, hidden is not None))
    return KvPlan(kv_format, tuple(layers))


def _choose_layer(
    rows: RowSource, spec: ModelSpec, kv_format: str, index: int, sample: KvSample, has_text: bool
) -> KvLayer:
    def rounding(x: F64) -> F64:
        rounded: F64 = fake_quantize_kv(x, kv_format)
        return rounded

    chosen = []
    for letter, vectors, errors_of in (
        ("k", sample.keys, sample.key_errors),
        ("v", sample.values, sample.value_errors),
    ):
        bias = read_bias(rows, spec, index, letter)
        offsets = _candidates(bias, vectors.mean(0), has_text)
        errors = {name: errors_of(rounding, offset) for name, offset in offsets.items()}
        offset, choices = _choose(offsets, errors)
        chosen.append((offset, None if bias is None else bias - offset.reshape(-1), choices))
    (key_offset, key_bias, keys), (value_offset, value_bias, values) = chosen
    return KvLayer(key_offset, value_offset, key_bias, value_bias, keys, values)


def _candidates(bias: F32 | None, mean: F64, has_text: bool) -> dict[str, F32]:
    """Offsets to try, f32[Hkv, D] each; `mean` is that of the keys or values, f64[Hkv, D]."""
    found = {"none": np.zeros(mean.shape, np.float32)}
    if bias is None:  # nothing that an offset could be taken out of
        return found
    found["bias"] = bias.reshape(mean.shape)
    if has_text:
        rest = (found["bias"] - mean).astype(ml_dtypes.bfloat16)  # what the build stores as the bias
        found["mean"] = found["bias"] - rest.astype(np.float32)
    return found


def _choose(offsets: Mapping[str, F32], errors: Mapping[str, F64]) -> tuple[F32, tuple[HeadChoice, ...]]:
    """The offset of each head, f32[Hkv, D], and why."""
    chosen, choices = np.zeros_like(offsets["none"]), []
    for head in range(len(chosen)):
        found = {name: float(f"{values[head]:.{_DIGITS}g}") for name, values in errors.items()}
        best = "none"
        for name in CANDIDATES[1:]:
            if name in found and found[name] < found[best] * (1 - MARGIN):
                best = name
        chosen[head] = offsets[best][head]
        choices.append(HeadChoice(best, found))
    return chosen, tuple(choices)
