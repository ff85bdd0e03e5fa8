"""What the accuracy gate found: errors by matrix and layer, logits beside the source's, and what is out of limits.

`qwen_rt.export.quantize.gate` measures; this is the result, which a manifest carries and people read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_rt.errors import BundleError
from qwen_rt.manifest_fields import REBUILD
from qwen_rt.strict_json import show

__all__ = ["GateResult", "LayerError", "TensorError"]


@dataclass(frozen=True)
class TensorError:
    """How far one stored tensor is from the source's.

    Attributes:
        name: Name of the tensor, or of a layer's KV cache.
        scheme: How it is stored (`int4 g128`, `kept`).
        output_error: Mean over the tokens of ‖(Ŵ - W) x‖ / ‖W x‖, x the source's own input.
        limit: Of that.
        weight_error: ‖Ŵ - W‖ / ‖W‖; for information.
        scale_error: How far ⟨ŵ, w⟩ / ⟨w, w⟩ is from 1 over the groups that share a scale, root mean square weighted by
            ‖w‖²: rounding moves it little, a wrong scale by all it is wrong.
        scale_limit: Of that.
        cause: What seems to be wrong; empty within the limits, or if it is not easy to tell.
    """

    name: str
    scheme: str
    output_error: float
    limit: float
    weight_error: float = 0.0
    scale_error: float = 0.0
    scale_limit: float = 1.0
    cause: str = ""

    @property
    def excess(self) -> float:
        """The larger of the two errors over their limits; infinite if either is no number."""
        ratios = (self.output_error / self.limit, self.scale_error / self.scale_limit)
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    @property
    def passed(self) -> bool:
        """Whether both errors are within their limits."""
        return self.excess <= 1

    def __str__(self) -> str:
        """The output error, or the scale error if only that is out: `X.weight: output error 0.93 > 0.25, all zeros`."""
        within = self.output_error <= self.limit
        if within and self.scale_error > self.scale_limit:
            measure, value, limit = "scale error", self.scale_error, self.scale_limit
        else:
            measure, value, limit = "output error", self.output_error, self.limit
        sign = "<=" if value <= limit else ">" if value > limit else "is not <="
        return f"{self.name}: {measure} {value:.3g} {sign} {limit:.3g}" + (f", {self.cause}" if self.cause else "")


@dataclass(frozen=True)
class LayerError:
    """A layer: its worst tensor, and how far the two residual streams are apart behind it.

    Attributes:
        index: Which layer.
        worst: The tensor with the largest excess.
        stream_error: Mean over the tokens of ‖ĥ - h‖ / ‖h‖.
    """

    index: int
    worst: TensorError
    stream_error: float


@dataclass(frozen=True)
class GateResult:
    """What the gate found.

    Attributes:
        precision: Formats of the matrices (`int4`, `int4+int8`).
        kv_format: Of the KV cache, or None.
        text: What was read (`built-in text`, `random tokens`).
        num_tokens: How many.
        kl_mean, kl_max: KL(source ‖ quantized) of the next token in nats, over the positions.
        kl_limit: Of the mean.
        top1: Share of the positions with the same best token.
        num_confident: Positions at which the source gives its best token half of the probability or more.
        top1_confident: The same share, of these; 1 without any.
        top1_limit: Of that.
        decides_logits: Whether there are enough confident positions for the limits of KL and top-1 to count.
        worst: The tensor with the largest excess.
        layers: Layer by layer.
        num_failures: Limits that are missed.
        failures: A line for each, the worst tensor first; no more than some.
        tensors: Every tensor that was compared; neither part of `to_dict` nor of a comparison.
    """

    precision: str
    kv_format: str | None
    text: str
    num_tokens: int
    kl_mean: float
    kl_max: float
    kl_limit: float
    top1: float
    num_confident: int
    top1_confident: float
    top1_limit: float
    decides_logits: bool
    worst: TensorError
    layers: tuple[LayerError, ...]
    num_failures: int
    failures: tuple[str, ...]
    tensors: tuple[TensorError, ...] = field(default=(), compare=False, repr=False)

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return self.num_failures == 0

    def failure(self) -> str:
        """One line: the worst failure, and how many more there are; empty if there is none."""
        if self.passed:
            return ""
        more = self.num_failures - 1
        return self.failures[0] + (f" (and {more} more)" if more else "")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data with an entry for each layer, not for each tensor; what is no finite number is null."""
        data = asdict(self)
        del data["tensors"]
        found: dict[str, Any] = _without_nan(data | {"passed": self.passed})
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "gate") -> GateResult:
        """Read back what `to_dict` wrote, whoever may have changed it.

        Raises:
            BundleError: A field missing, unknown, or of another type; or `passed` contradicts the failures.
        """
        take = dict(data)
        passed = take.pop("passed", None)
        take["worst"] = _tensor(take.get("worst"), source)
        layers, failures = take.get("layers"), take.get("failures")
        if not isinstance(layers, list) or not isinstance(failures, list):
            raise BundleError(f"{source}: no lists of layers and failures", "the gate's result", REBUILD)
        take["layers"] = tuple(_layer(layer, source) for layer in layers)
        take["failures"] = tuple(str(line) for line in failures)
        result: GateResult = _made(cls, take, source)
        if passed is not result.passed or bool(failures) == result.passed:
            raise BundleError(f"{source}: passed={show(passed)}", f"{result.passed}, as the failures say", REBUILD)
        return result

    def table(self) -> str:
        """The lines for a person: each layer's worst tensor, then the logits, then what is out of limits."""
        width = max(len(layer.worst.name) for layer in self.layers)
        head = f"{'layer':>5}  {'worst tensor':<{width}}  {'scheme':<18}  {'output error':>12}  {'limit':>8}"
        lines = [head + f"  {'scale error':>11}  {'stream error':>12}"]
        lines += [self._layer_line(layer, width) for layer in self.layers]
        in_layers = {layer.worst.name for layer in self.layers}
        if not self.worst.passed and self.worst.name not in in_layers:
            lines += ["", f"outside the layers: {self.worst}"]
        lines += ["", *self._logit_lines(), ""]
        shown = [f"  {line}" for line in self.failures]
        if self.num_failures > len(self.failures):
            shown.append(f"  and {self.num_failures - len(self.failures)} more")
        return "\n".join([*lines, "gate passed" if self.passed else "gate FAILED", *shown])

    def _layer_line(self, layer: LayerError, width: int) -> str:
        worst = layer.worst
        verdict = "" if worst.passed else "  OUT OF LIMITS"
        return (
            f"{layer.index:>5}  {worst.name:<{width}}  {worst.scheme:<18}  {worst.output_error:>12.3g}  "
            f"{worst.limit:>8.3g}  {worst.scale_error:>11.3g}  {layer.stream_error:>12.3g}{verdict}"
        )

    def _logit_lines(self) -> Iterator[str]:
        kv = "" if self.kv_format is None else f", KV cache {self.kv_format}"
        yield f"{self.precision}{kv}; {self.num_tokens} tokens of {self.text}"
        few = "too few confident positions to decide"
        kl_limit, limit = (f"limit {x:g}" if self.decides_logits else few for x in (self.kl_limit, self.top1_limit))
        yield f"KL(source || quantized): mean {self.kl_mean:.3g} nats ({kl_limit}), max {self.kl_max:.3g}"
        yield (
            f"same best token: {self.top1:.3f} of all, "
            f"{self.top1_confident:.3f} of the {self.num_confident} confident positions ({limit})"
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_KINDS: Mapping[str, tuple[type, ...]] = {
    "float": (float, int, type(None)),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
}


def _made(cls: type[Any], data: Mapping[str, Any], source: str) -> Any:
    """An instance of a dataclass, if `data` has exactly its fields and each is of its type."""
    fields = {name: kind for name, kind in cls.__annotations__.items() if name != "tensors"}
    if set(data) != set(fields):
        raise BundleError(f"{source} has fields {', '.join(sorted(map(str, data)))}", ", ".join(fields), REBUILD)
    taken = dict(data)
    for name, kind in fields.items():
        value, kinds = data[name], _KINDS.get(kind)
        if kinds is not None and (not isinstance(value, kinds) or (kind != "bool" and isinstance(value, bool))):
            raise BundleError(f"{source}: {name}={show(value)}", kind, REBUILD)
        if kind == "float":
            taken[name] = math.nan if value is None else float(value)
    return cls(**taken)


def _tensor(data: object, source: str) -> TensorError:
    if not isinstance(data, dict):
        raise BundleError(f"{source}: {show(data)}", "errors of a tensor", REBUILD)
    found: TensorError = _made(TensorError, data, source)
    return found


def _layer(data: object, source: str) -> LayerError:
    if not isinstance(data, dict):
        raise BundleError(f"{source}: {show(data)}", "errors of a layer", REBUILD)
    found: LayerError = _made(LayerError, {**data, "worst": _tensor(data.get("worst"), source)}, source)
    return found
