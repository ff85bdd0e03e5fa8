"""The accuracy gate: one pass of the source model and the quantized one in lockstep, every matrix read once.

    result = run_gate(source, quantized, spec, token_ids, schemes, kv_format)
    result.passed, result.failure(), result.table()

Each matrix is judged by itself: both models' rows are multiplied by the source's own input, so that an error shows
where it is made and not in everything behind it. What the two streams make of all that together shows in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.errors import CheckpointError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD, head_name
from qwen_rt.export.quantize.folds import LayerFolds
from qwen_rt.export.quantize.forward import Forward, LayerPass, read_blocks
from qwen_rt.export.quantize.tensor_check import MatrixCheck, mean_relative_error
from qwen_rt.gate_result import GateResult, LayerError, TensorError
from qwen_rt.progress import progress
from qwen_rt.quantization import Scheme, key_offset_name, value_offset_name
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import (
    GATE_KV_ERROR,
    GATE_MIN_CONFIDENT,
    GATE_VECTOR_ERROR,
    gate_kl_limit,
    gate_limit,
    gate_top1_limit,
)

__all__ = ["CONFIDENT", "LogitErrors", "compare_logits", "run_gate"]

CONFIDENT = 0.5
"""Probability of the source's best token from which on a position is confident: no other token can be as likely."""

_MAX_FAILURES = 8
_POSITIONS_AT_ONCE = 16  # of logits in float64


@torch.no_grad()
def run_gate(
    source: RowSource,
    quantized: RowSource,
    spec: ModelSpec,
    token_ids: Sequence[int],
    schemes: Mapping[str, Scheme],
    kv_format: str | None = None,
    *,
    text: str = "tokens",
    take_logits: Callable[[Tensor, Tensor], object] | None = None,
    quiet: bool = True,
) -> GateResult:
    """Compare a quantized model with its source.

    Args:
        source: The parameters as the checkpoint has them.
        quantized: As the bundle has them, dequantized; factors moved between neighbours are found (`folds`).
        spec: The model.
        token_ids: What both read: int[T].
        schemes: Scheme of each quantized matrix.
        kv_format: Format of the KV cache if it is quantized; then `quantized` has its offsets.
        text: What the tokens are, for people.
        take_logits: Given the logits of both, f32[T, V] each.
        quiet: No progress.

    Returns:
        Errors and verdict. A model that is wrong in any way gives a result that did not pass, not an exception.

    Raises:
        CheckpointError: A parameter is missing or of another shape.
        StorageError: A file cannot be read.
    """
    gate = _Gate(spec, source, quantized, schemes, kv_format)
    hidden = [forward.embed(token_ids) for forward in gate.forwards]
    layers: list[LayerError] = []
    tensors = [gate.embedding(hidden)]
    with progress(spec.num_layers + 1, "gate: layers", quiet=quiet) as bar:
        for index in range(spec.num_layers):
            hidden, found = gate.layer(index, hidden)
            layers.append(LayerError(index, max(found, key=lambda t: t.excess), _relative(hidden[1], hidden[0])))
            tensors += found
            bar.update()
        logits, found = gate.head(hidden)
        tensors += found
        bar.update()
    if take_logits is not None:
        take_logits(*logits)
    errors = compare_logits(*logits)
    formats = {scheme.format for scheme in schemes.values()}
    kl_limit, top1_limit = gate_kl_limit(formats, kv_format), gate_top1_limit(formats, kv_format)
    # Of random weights no position is confident, and how far their logits move says nothing but how wild they are.
    decides_logits = errors.num_confident >= GATE_MIN_CONFIDENT
    failing = sorted((tensor for tensor in tensors if not tensor.passed), key=lambda tensor: -tensor.excess)
    failures = [str(tensor) for tensor in failing]
    if not (errors.kl_mean <= kl_limit or (not decides_logits and math.isfinite(errors.kl_mean))):
        failures.append(f"logits: mean KL {errors.kl_mean:.3g} nats, limit {kl_limit:g}")
    if decides_logits and not errors.top1_confident >= top1_limit:
        failures.append(
            f"logits: same best token at {errors.top1_confident:.3f} of {errors.num_confident} confident positions, "
            f"limit {top1_limit:g}"
        )
    return GateResult(
        precision="+".join(sorted(formats)) or "kept",
        kv_format=kv_format,
        text=text,
        num_tokens=len(token_ids),
        **vars(errors),
        kl_limit=kl_limit,
        top1_limit=top1_limit,
        decides_logits=decides_logits,
        worst=max(tensors, key=lambda tensor: tensor.excess),
        layers=tuple(layers),
        num_failures=len(failures),
        failures=tuple(failures[:_MAX_FAILURES]),
        tensors=tuple(tensors),
    )


class _Gate:
    """Two models, and how their matrices are stored."""

    def __init__(
        self,
        spec: ModelSpec,
        source: RowSource,
        quantized: RowSource,
        schemes: Mapping[str, Scheme],
        kv_format: str | None,
    ) -> None:
        self.spec, self.schemes, self.kv_format = spec, schemes, kv_format
        self.forwards = Forward(spec, source), Forward(spec, quantized, kv_format)
        self.rows = source, quantized

    def embedding(self, hidden: Sequence[Tensor]) -> TensorError:
        """Error of the embeddings that were looked up: f32[T, C] of both."""
        scheme = self.schemes.get(EMBEDDING)
        limit = gate_limit(scheme, self.spec.hidden_size)
        return TensorError(EMBEDDING, str(scheme or "kept"), _relative(hidden[1], hidden[0]), limit)

    def layer(self, index: int, hidden: Sequence[Tensor]) -> tuple[list[Tensor], list[TensorError]]:
        """Run a layer of both; hidden: f32[T, C] of source and quantized."""
        steps = [forward.layer(index, state) for forward, state in zip(self.forwards, hidden, strict=True)]
        folds = LayerFolds(*self.forwards, index)
        found = [self._norm(name, torch.from_numpy(factors)) for name, factors in folds.norms.items()]
        while steps[0].unit:
            names = steps[0].names
            outputs, errors = self._unit(self.rows, names, [step.x for step in steps], folds)
            found += errors
            if steps[0].unit == "qkv":
                found += self._behind_qkv(index, hidden[0], outputs[0], folds)
            for step, products in zip(steps, outputs, strict=True):
                step.advance(products)
        return [step.hidden for step in steps], found

    def head(self, hidden: Sequence[Tensor]) -> tuple[list[Tensor], list[TensorError]]:
        """Logits of both, f32[T, V], and the errors of the last norm and the head."""
        name = "model.norm.weight"
        norms = [forward.vector(name) for forward in self.forwards]
        error = _vector_error(name, norms[1], norms[0])
        inputs = [forward.final_norm(state) for forward, state in zip(self.forwards, hidden, strict=True)]
        stored = HEAD if HEAD in self.schemes else head_name(self.spec)  # of a tied model it may be stored apart
        rows = [
            _Renamed(rows, stored, named) for rows, named in zip(self.rows, (head_name(self.spec), stored), strict=True)
        ]
        outputs, errors = self._unit(rows, (stored,), inputs, None)
        return [products[0] for products in outputs], [error, *errors]

    def _unit(
        self, sources: Sequence[RowSource], names: Sequence[str], inputs: Sequence[Tensor], folds: LayerFolds | None
    ) -> tuple[Sequence[list[Tensor]], list[TensorError]]:
        """Multiply both streams by matrices that read the same input, and measure the matrices.

        Returns:
            Products of the source's stream and of the quantized one, f32[T, N] for each matrix, and the errors.
        """
        own, other = inputs
        shapes = {name: sources[0].shape(name) for name in names}
        checks = {name: MatrixCheck(name, self.schemes.get(name), shapes[name], len(own)) for name in names}
        columns = {name: None if folds is None else folds.columns(name) for name in names}
        outputs = tuple([own.new_empty(len(own), shapes[name][0]) for name in names] for _ in inputs)

        def inspect(name: str, start: int, rows: Sequence[NDArray[np.float32]]) -> Tensor | None:
            before, after = rows
            return checks[name].add_rows(start, before, after, columns[name], folds)

        for block in read_blocks(sources, names, inspect):
            before, after = block.rows
            place, part, factors = names.index(block.name), slice(block.start, block.stop), columns[block.name]
            outputs[0][place][:, part] = product = own @ before.T
            outputs[1][place][:, part] = other @ after.T
            found = (own if factors is None else own / torch.from_numpy(factors)) @ after.T
            checks[block.name].add_outputs(product if block.found is None else product * block.found, found)
        return outputs, [check.result() for check in checks.values()]

    def _norm(self, name: str, factors: Tensor) -> TensorError:
        """Compare a norm with the source's, which was divided by some factors."""
        before, after = (forward.vector(name) for forward in self.forwards)
        return _vector_error(name, after * factors, before)

    def _behind_qkv(
        self, index: int, hidden: Tensor, products: Sequence[Tensor], folds: LayerFolds
    ) -> list[TensorError]:
        """Compare the biases, and what the cache makes of the source's own keys and values.

        Args:
            index: The layer.
            hidden: f32[T, C], the source's, before the layer.
            products: Of q, k and v with the source's matrices, f32[T, N] each.
            folds: The layer's, whose rows have passed.
        """
        biases = {proj: self._bias_pair(index, proj) for proj in "qkv"} if self.spec.qkv_bias else {}
        before, after = biases.get("v", (None, None))
        rows = torch.from_numpy(folds.value_rows(*(None if bias is None else bias.numpy() for bias in (before, after))))
        found = [
            _vector_error(
                f"model.layers.{index}.self_attn.{proj}_proj.bias", stored, own * rows if proj == "v" else own
            )
            for proj, (own, stored) in biases.items()
        ]
        return found if self.kv_format is None else [*found, self._cache(index, hidden, products, rows)]

    def _bias_pair(self, index: int, proj: str) -> tuple[Tensor, Tensor]:
        """A bias of the source and of the bundle, with what the cache's offset holds of it: f32[N] each."""
        name = f"model.layers.{index}.self_attn.{proj}_proj.bias"
        before, after = (forward.vector(name) for forward in self.forwards)
        offset = {"k": key_offset_name(index), "v": value_offset_name(index)}.get(proj)
        if offset is not None and self.kv_format is not None:
            after = after + self.forwards[1].vector(offset).reshape(-1)
        return before, after

    def _cache(self, index: int, hidden: Tensor, products: Sequence[Tensor], rows: Tensor) -> TensorError:
        """Error of the source's attention when nothing but its keys and values is rounded as the cache rounds them."""
        q, k, v = products
        exact, rounded = (LayerPass(forward, index, hidden) for forward in self.forwards)
        exact.advance((q, k, v))
        rounded.advance((q, k, v * rows))
        back = rows.view(self.spec.num_kv_heads, 1, -1).expand(-1, self.spec.num_heads // self.spec.num_kv_heads, -1)
        return TensorError(
            name=f"KV cache of layer {index}",
            scheme=str(self.kv_format),
            output_error=_relative(rounded.x / back.reshape(-1), exact.x),
            limit=GATE_KV_ERROR[str(self.kv_format)],
        )


class _Renamed:
    """A `RowSource` of one matrix by another name."""

    def __init__(self, source: RowSource, name: str, stored_name: str) -> None:
        self._source, self._names = source, {name: stored_name}

    def shape(self, name: str) -> tuple[int, ...]:
        """See `RowSource`."""
        return self._source.shape(self._names[name])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `RowSource`."""
        return self._source.rows(self._names[name], start, stop)


class LogitErrors:
    """What two models' logits differ by; see `GateResult` for the fields."""

    def __init__(self) -> None:
        self.kl_mean = self.kl_max = 0.0
        self.top1 = self.top1_confident = 1.0
        self.num_confident = 0


def compare_logits(source: Tensor, other: Tensor) -> LogitErrors:
    """Compare the distributions of the next token, in float64.

    Args:
        source: f32[T, V], the logits to be met.
        other: f32[T, V].
    """
    kl, same, confident = [], [], []
    for start in range(0, len(source), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        log_p, log_q = (torch.log_softmax(logits[part].double(), -1) for logits in (source, other))
        probability = log_p.exp()
        kl.append((probability * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        confident.append(probability.amax(-1) >= CONFIDENT)
    divergence, agrees, is_confident = torch.cat(kl), torch.cat(same), torch.cat(confident)
    found = LogitErrors()
    found.kl_mean, found.kl_max = float(divergence.mean()), float(divergence.max())
    found.top1, found.num_confident = float(agrees.double().mean()), int(is_confident.sum())
    if found.num_confident:
        found.top1_confident = float(agrees[is_confident].double().mean())
    return found


def _relative(a: Tensor, b: Tensor) -> float:
    """Mean over the tokens of ‖a - b‖ / ‖b‖: f32[T, n] each."""
    return mean_relative_error((a - b).square().sum(-1, dtype=torch.float64), b.square().sum(-1, dtype=torch.float64))


def _vector_error(name: str, found: Tensor, wanted: Tensor) -> TensorError:
    if found.shape != wanted.shape:
        raise CheckpointError(f"{name} has shape {list(found.shape)}", str(list(wanted.shape)), "build again")
    size = float(wanted.norm())
    difference = float((found - wanted).norm())
    error = difference / size if size else 0.0 if difference == 0 else math.inf
    return TensorError(name, "kept", error, GATE_VECTOR_ERROR)
