"""Calibration: what a text shows of a model's activations, turned into better rounding, layer by layer.

    calibration = calibrate(rows, spec, token_ids, schemes)
    edited = EditedRows(rows, calibration.edits, calibration.vectors)      # the same model, in other numbers

`balance.py` chooses factors for the columns of each unit; here they are folded into what makes the unit's input:

| unit      | input made by              | columns  | divided by the same factors                  |
|-----------|----------------------------|----------|----------------------------------------------|
| `qkv`     | input_layernorm            | W · s    | the norm's weight                            |
| `o`       | attention over v           | W · s    | rows of v_proj and its bias, s alike in all  |
|           |                            |          | query heads of a kv head                     |
| `gate_up` | post_attention_layernorm   | W · s    | the norm's weight                            |
| `down`    | silu(gate) · up            | W · s    | rows of up_proj                              |

The factors are powers of two: both models are equal, and so are the errors of whatever is not rounded anew. Rows may
be multiplied without harm to their own rounding, because their scales take the factor in. Only matrices that are
quantized are edited: `o` and `down` are left alone where v_proj and up_proj are not.

Everything is measured on the source's activations. Memory is the activations of one layer, a few rows of each of its
matrices, and of every layer the statistics that are returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.errors import CheckpointError
from qwen_rt.export.passes.decoder import HEAD, head_name
from qwen_rt.export.quantize.balance import Balance, Limits, UnitInputs, choose_balance, sample_rows
from qwen_rt.export.quantize.forward import Forward, matrix_names
from qwen_rt.export.quantize.pieces import MatrixEdit
from qwen_rt.export.quantize.texts import Texts, cut_texts, evenly
from qwen_rt.progress import track
from qwen_rt.quantization import Scheme
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["MAX_TOKENS", "Calibration", "calibrate"]

F32 = NDArray[np.float32]

MAX_TOKENS = 2048
"""Of the text, at most; the largest activations, those inside the MLP of 72B, take half a gigabyte then."""

_MAX_HIDDEN_BYTES = 128 << 20  # of all layers together
_HIDDEN_TOKENS = (32, 256)  # of a layer: at least, at most
_DIGITS = 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a text showed.

    Attributes:
        edits: Matrix → its factors and the importance of its columns; only of matrices that are quantized.
        vectors: Norm or bias → its new elements, float32.
        ranges: JSON-ready: for each layer and unit, and the head, `max`, `mean`, `rms` and `p99.9` of |x| before edits.
        report: JSON-ready: what was chosen for each unit, and the relative errors of its products before and after.
        hidden: For each layer the residual stream before it at some tokens, float32 [n, C].
    """

    edits: dict[str, MatrixEdit]
    vectors: dict[str, F32]
    ranges: list[dict[str, Any]]
    report: dict[str, Any]
    hidden: tuple[F32, ...]


def calibrate(
    rows: RowSource,
    spec: ModelSpec,
    token_ids: Sequence[Sequence[int]],
    schemes: Mapping[str, Scheme],
    quiet: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> Calibration:
    """Run texts through a model and choose how its matrices are better rounded.

    Args:
        rows: The model's parameters.
        spec: The model.
        token_ids: Texts, as tokens; of more than `max_tokens` some windows are chosen.
        schemes: Matrix → scheme, as `plan_schemes` gives them.
        quiet: Report no progress on stderr.
        max_tokens: How many tokens to run at most.

    Returns:
        The calibration; equal arguments give an equal one.

    Raises:
        UsageError: No tokens, or one outside the vocabulary.
        CheckpointError: Activations that are not finite.
    """
    work = _Calibrator(rows, spec, cut_texts(token_ids, max_tokens), schemes)
    hidden = work.embed()
    for layer in track(range(spec.num_layers), "calibrating", quiet=quiet):
        hidden = work.layer(layer, hidden)
    work.head(hidden)
    return work.result()


class _Calibrator:
    def __init__(self, rows: RowSource, spec: ModelSpec, texts: Texts, schemes: Mapping[str, Scheme]) -> None:
        self._rows, self._spec, self._texts, self._schemes = rows, spec, texts, schemes
        self._forward = Forward(spec, rows)
        self._row_factors: dict[str, F32] = {}
        self._columns: dict[str, tuple[F32 | None, F32 | None]] = {}  # factors, importance
        self._vectors: dict[str, F32] = {}
        self._ranges: list[dict[str, Any]] = []
        self._units: list[dict[str, Any]] = []
        self._hidden: list[F32] = []

    def embed(self) -> Tensor:
        return self._forward.embed(self._texts.ids)

    def layer(self, layer: int, hidden: Tensor) -> Tensor:
        """Run and calibrate one layer: hidden states before it → after it, f32[B, T, C]."""
        self._keep(hidden)
        step = self._forward.layer(layer, hidden)
        while step.unit:
            x = self._texts.take(step.x)
            self._unit(layer, step.unit, step.names, x)
            step.advance(self._texts.multiply(self._rows, step.names, x))
        return step.hidden

    def head(self, hidden: Tensor) -> None:
        """Calibrate the LM head on what leaves the last layer."""
        inputs = self._inputs(None, "lm_head", self._texts.take(self._forward.final_norm(hidden)))
        scheme = self._schemes.get(HEAD)
        if scheme is not None and scheme.format != "fp8":
            weights = {HEAD: sample_rows(self._rows, head_name(self._spec))}
            choice = choose_balance(inputs, weights, scheme, None)
            self._note(None, "lm_head", (HEAD,), scheme, choice)

    def result(self) -> Calibration:
        names = dict.fromkeys((*self._columns, *self._row_factors))
        edits = {
            name: MatrixEdit(self._row_factors.get(name), *self._columns.get(name, (None, None))) for name in names
        }
        report = {"num_tokens": self._texts.num_tokens, "num_texts": len(self._texts.ids), "units": self._units}
        return Calibration(edits, self._vectors, self._ranges, report, tuple(self._hidden))

    def _keep(self, hidden: Tensor) -> None:
        states = self._texts.take(hidden)
        affordable = _MAX_HIDDEN_BYTES // (4 * self._spec.num_layers * self._spec.hidden_size)
        low, high = _HIDDEN_TOKENS
        chosen = evenly(len(states), min(max(affordable, low), high))
        self._hidden.append(states[torch.from_numpy(chosen)].numpy())

    def _inputs(self, layer: int | None, unit: str, x: Tensor) -> UnitInputs:
        inputs = UnitInputs.of(x)
        if not np.isfinite(inputs.largest).all():
            place = "the LM head" if layer is None else f"{unit} of layer {layer}"
            raise CheckpointError(
                f"inputs of {place} are not finite", "finite weights", "download the checkpoint again"
            )
        rounded = {name: _short(value) for name, value in inputs.ranges.items()}
        self._ranges.append({"layer": layer, "unit": unit, **rounded})
        return inputs

    def _unit(self, layer: int, unit: str, names: tuple[str, ...], x: Tensor) -> None:
        inputs, scheme = self._inputs(layer, unit, x), self._schemes.get(names[0])
        if scheme is None or scheme.format == "fp8" or any(self._schemes.get(name) != scheme for name in names):
            return
        weights = {name: sample_rows(self._rows, name) for name in names}
        spec = self._spec
        sharing = (spec.num_heads // spec.num_kv_heads, spec.head_dim) if unit == "o" else (1, 1)
        choice = choose_balance(inputs, weights, scheme, self._limits(layer, unit, x.shape[1]), *sharing)
        self._note(layer, unit, names, scheme, choice)
        if choice.exponents is not None:
            self._fold(layer, unit, choice.exponents)

    def _note(self, layer: int | None, unit: str, names: tuple[str, ...], scheme: Scheme, choice: Balance) -> None:
        exponents = choice.exponents
        factors = None if exponents is None else _power(exponents)
        if factors is not None or choice.importance is not None:
            self._columns.update(dict.fromkeys(names, (factors, choice.importance)))
        self._units.append(
            {
                "layer": layer,
                "unit": unit,
                "scheme": str(scheme),
                "alpha": choice.alpha,
                "smallest_factor": 1.0 if exponents is None else 2.0 ** int(exponents.min()),
                "largest_factor": 1.0 if exponents is None else 2.0 ** int(exponents.max()),
                "by_importance": choice.importance is not None,
                "error_before": _short(choice.error_before),
                "error_after": _short(choice.error_after),
            }
        )

    def _limits(self, layer: int, unit: str, num_channels: int) -> Limits | None:
        """What can be folded into whatever makes a unit's input; None for nothing."""
        norm, maker, bias = _makers(layer, unit)
        if maker is not None and maker not in self._schemes:
            return None
        vectors = []
        if norm is not None:
            vectors.append(self._vector(norm))
        if bias is not None and self._spec.qkv_bias:
            vectors.append(self._over_query_heads(self._vector(bias)))
        return Limits.of_vectors(vectors, num_channels)

    def _fold(self, layer: int, unit: str, exponents: NDArray[np.int32]) -> None:
        norm, maker, bias = _makers(layer, unit)
        if unit == "o":
            spec = self._spec
            heads = exponents.reshape(spec.num_kv_heads, -1, spec.head_dim)  # [Hkv, H/Hkv, D]
            exponents = heads[:, 0].reshape(-1)
        inverse = _power(-exponents)
        if maker is not None:
            self._row_factors[maker] = inverse
        for name in (norm, bias if self._spec.qkv_bias else None):
            if name is not None:
                self._vectors[name] = self._vector(name) * inverse

    def _vector(self, name: str) -> F32:
        return self._rows.rows(name, 0, self._rows.shape(name)[0])

    def _over_query_heads(self, vector: F32) -> F32:
        """Elements of v as they reach o: float32 [Hkv·D] → [H·D]."""
        spec = self._spec
        heads = vector.reshape(spec.num_kv_heads, 1, spec.head_dim)
        return np.repeat(heads, spec.num_heads // spec.num_kv_heads, 1).reshape(-1)


def _makers(layer: int, unit: str) -> tuple[str | None, str | None, str | None]:
    """What makes a unit's input: a norm, or a matrix, and its bias if it has one."""
    prefix = f"model.layers.{layer}"
    if unit == "qkv":
        return f"{prefix}.input_layernorm.weight", None, None
    if unit == "gate_up":
        return f"{prefix}.post_attention_layernorm.weight", None, None
    if unit == "o":
        return None, matrix_names(layer, "qkv")[2], f"{prefix}.self_attn.v_proj.bias"
    return None, matrix_names(layer, "gate_up")[1], None


def _power(exponents: NDArray[np.int32]) -> F32:
    powers: F32 = np.ldexp(np.float32(1), exponents)
    return powers


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
