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

Each is tried on every head, with the layer's own weights. The error that counts is that of the scores, because softmax
sees nothing else, and of them without their mean over the keys of a query, because softmax does not see that either:

    error = |q · (k' - k), its mean over the visible keys taken off| / |q · k, likewise|      over queries and heads
    error = |v' - v| / |v - mean of v|                                                        for values

A later candidate is taken if it is better by `MARGIN`: an offset costs the kernels a product, so a tie goes to none.

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
import torch
from numpy.typing import ArrayLike, NDArray

from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.quantize.forward import multiply
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

_NUM_TOKENS = 256
_TOKENS_PER_QUERY = 4  # every fourth token asks; the first query sees four keys
_DIGITS = 4


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
    length = spec.context_length if max_length is None else max_length
    chooser = _Chooser(rows, spec, kv_format, length, seed)
    layers = track(range(spec.num_layers), "KV offsets", quiet=quiet)
    return KvPlan(kv_format, tuple(chooser.layer(i, None if hidden is None else hidden[i]) for i in layers))


class _Chooser:
    def __init__(self, rows: RowSource, spec: ModelSpec, kv_format: str, max_length: int, seed: int) -> None:
        self._rows, self._spec, self._format = rows, spec, kv_format
        self._max_length, self._seed = max_length, seed
        self._inv_freq = spec.rope.inv_freq(spec.head_dim).astype(np.float64)  # [D/2]

    def layer(self, index: int, given: ArrayLike | None) -> KvLayer:
        rng = np.random.default_rng([self._seed, index])
        drawn = rng.standard_normal((_NUM_TOKENS, self._spec.hidden_size))
        x = self._norm(index, drawn if given is None else _evenly(np.asarray(given, np.float64), _NUM_TOKENS))
        is_query = np.arange(len(x)) % _TOKENS_PER_QUERY == _TOKENS_PER_QUERY - 1
        is_query[-1] = True
        places = np.sort(rng.integers(0, self._max_length, len(x)))
        k, v = self._project(index, "k", x), self._project(index, "v", x)  # [N, Hkv, D]
        q = self._turn(self._project(index, "q", x[is_query]), places[is_query])  # [M, H, D]
        visible = places <= places[is_query, None]  # [M, N]
        for name, array in (("keys", k), ("values", v), ("queries", q)):
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{name} of layer {index} are not finite", "finite weights and biases", "download it again"
                )
        key_offsets = self._candidates(index, "k", None if given is None else k)
        value_offsets = self._candidates(index, "v", None if given is None else v)
        key_errors = self._key_errors(q, k, places, visible, key_offsets)
        value_errors = self._value_errors(v, value_offsets)
        key_offset, keys = _choose(key_offsets, key_errors)
        value_offset, values = _choose(value_offsets, value_errors)
        key_bias, value_bias = self._bias(index, "k"), self._bias(index, "v")
        return KvLayer(
            key_offset,
            value_offset,
            None if key_bias is None else key_bias - key_offset.reshape(-1),
            None if value_bias is None else value_bias - value_offset.reshape(-1),
            keys,
            values,
        )

    def _norm(self, index: int, hidden: F64) -> F32:
        """Outputs of the layer's first norm, which q, k and v are made of: f32[N, C]."""
        weight = self._rows.rows(f"model.layers.{index}.input_layernorm.weight", 0, self._spec.hidden_size)
        mean_square = np.mean(hidden**2, axis=-1, keepdims=True) + self._spec.rms_norm_eps
        normed: F64 = hidden / np.sqrt(mean_square) * weight
        return normed.astype(np.float32)

    def _bias(self, index: int, letter: str) -> F32 | None:
        if not self._spec.qkv_bias:
            return None
        name = f"model.layers.{index}.self_attn.{letter}_proj.bias"
        return self._rows.rows(name, 0, self._rows.shape(name)[0])

    def _project(self, index: int, letter: str, x: F32) -> F64:
        """q, k or v of some tokens, bias and all: [N, heads, D]."""
        product = multiply(self._rows, f"model.layers.{index}.self_attn.{letter}_proj.weight", torch.from_numpy(x))
        bias = self._bias(index, letter)
        whole = product.numpy().astype(np.float64) + (0.0 if bias is None else bias)
        return whole.reshape(len(x), -1, self._spec.head_dim)

    def _turn(self, x: F64, places: NDArray[np.int64]) -> F64:
        """`R(place) · x` for [N, heads, D]; scores take YaRN's factor in, which no relative error shows."""
        angles = (places[:, None] * self._inv_freq)[:, None]  # [N, 1, D/2]
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _candidates(self, index: int, letter: str, measured: F64 | None) -> dict[str, F32]:
        """Offsets to try, f32[Hkv, D] each."""
        shape = self._spec.num_kv_heads, self._spec.head_dim
        bias, found = self._bias(index, letter), {"none": np.zeros(shape, np.float32)}
        if bias is None:  # nothing that an offset could be taken out of
            return found
        found["bias"] = bias.reshape(shape)
        if measured is not None:
            rest = (found["bias"] - measured.mean(0)).astype(ml_dtypes.bfloat16)  # what the build stores as the bias
            found["mean"] = found["bias"] - rest.astype(np.float32)
        return found

    def _key_errors(
        self,
        q: F64,
        k: F64,
        places: NDArray[np.int64],
        visible: NDArray[np.bool_],
        offsets: Mapping[str, F32],
    ) -> dict[str, F64]:
        """Candidate → relative error of the scores of each kv head, f64[Hkv]."""
        num_queries, kv_heads = len(q), k.shape[1]
        queries = q.reshape(num_queries, kv_heads, -1, q.shape[-1]).transpose(1, 2, 0, 3)  # [Hkv, H/Hkv, M, D]

        def size(keys: F64) -> F64:
            """Norm of the scores of turned keys [N, Hkv, D], their mean over visible keys taken off: f64[Hkv]."""
            scores = queries @ keys.transpose(1, 2, 0)[:, None]  # [Hkv, H/Hkv, M, N]
            mean = np.where(visible, scores, 0).sum(-1, keepdims=True) / visible.sum(-1, keepdims=True)
            centred = np.where(visible, scores - mean, 0).reshape(kv_heads, -1)
            norms: F64 = np.linalg.norm(centred, axis=-1)
            return norms

        whole = size(self._turn(k, places))
        errors = {}
        for name, offset in offsets.items():
            turned = self._turn(k - offset, places)
            errors[name] = _ratio(size(fake_quantize_kv(turned, self._format) - turned), whole)
        return errors

    def _value_errors(self, v: F64, offsets: Mapping[str, F32]) -> dict[str, F64]:
        """Candidate → relative error of the values of each kv head, f64[Hkv]."""

        def size(vectors: F64) -> F64:
            norms: F64 = np.sqrt((vectors**2).sum((0, 2)))
            return norms

        whole = size(v - v.mean(0))
        return {
            name: _ratio(size(fake_quantize_kv(v - offset, self._format) - (v - offset)), whole)
            for name, offset in offsets.items()
        }


def _ratio(error: F64, whole: F64) -> F64:
    """`error / whole`, rounded to what a report shows; 0 where both are."""
    found = np.where(error > 0, error / np.maximum(whole, np.finfo(np.float64).tiny), 0.0)
    return np.array([float(f"{value:.{_DIGITS}g}") for value in found])


def _choose(offsets: Mapping[str, F32], errors: Mapping[str, F64]) -> tuple[F32, tuple[HeadChoice, ...]]:
    """The offset of each head, f32[Hkv, D], and why."""
    chosen, choices = np.zeros_like(offsets["none"]), []
    for head in range(len(chosen)):
        found = {name: float(values[head]) for name, values in errors.items()}
        best = "none"
        for name in CANDIDATES[1:]:
            if name in found and found[name] < found[best] * (1 - MARGIN):
                best = name
        chosen[head] = offsets[best][head]
        choices.append(HeadChoice(best, found))
    return chosen, tuple(choices)


def _evenly(rows: F64, count: int) -> F64:
    """At most `count` of the rows [..., C], evenly spaced: [N, C]."""
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) <= count:
        return flat
    return flat[np.linspace(0, len(flat) - 1, count).round().astype(np.int64)]
