"""What a manifest says of a quantized bundle: the scheme of every matrix, the KV cache, how it came about, the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_rt.errors import BundleError
from qwen_rt.manifest_fields import REBUILD, Fields
from qwen_rt.quantization import FORMATS, GROUP_SIZES, KV_FORMATS, Scheme
from qwen_rt.strict_json import show

__all__ = ["METHODS", "Quantization"]

METHODS = ("rtn", "awq", "smoothquant", "checkpoint")
"""How the numbers came about: rounded to nearest, after activation-aware scaling, after balancing, or by whoever made
the checkpoint."""

_ACTIVATIONS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Quantization:
    """The quantized part of a bundle.

    Attributes:
        weights: Name of each quantized matrix → its scheme.
        method: One of `METHODS`.
        activations: What quantized matrices are multiplied by: `float32`, `bfloat16`, or `int8` in blocks.
        kv_format: `fp8` or `int8`; None for a cache of the manifest's `kv_dtype`.
        report: What the build measured, by topic (`kv_cache`, `calibration`, `mixed`), JSON data.
    """

    weights: Mapping[str, Scheme]
    method: str = "rtn"
    activations: str = "float32"
    kv_format: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "weights": {name: scheme.to_dict() for name, scheme in self.weights.items()},
            "method": self.method,
            "activations": self.activations,
            "kv_format": self.kv_format,
            "report": dict(self.report),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], source: str) -> Quantization:
        """Parse and check what anyone may have written.

        Raises:
            BundleError: A field is missing or malformed.
        """
        take = Fields(document, source)
        weights = {
            name: _scheme(Fields(entry, f"{source}: {show(name)}")) for name, entry in take.objects("weights").items()
        }
        kv_format = None if take.is_null("kv_format") else take.choice("kv_format", KV_FORMATS)
        method, activations = take.choice("method", METHODS), take.choice("activations", _ACTIVATIONS)
        return cls(weights, method, activations, kv_format, take.data("report"))


def _scheme(take: Fields) -> Scheme:
    group_size = take.integer("group_size", 0)
    if group_size not in (0, *GROUP_SIZES):
        raise BundleError(f"{take.source}: group_size={group_size}", f"0 or one of {GROUP_SIZES}", REBUILD)
    return Scheme(take.choice("format", FORMATS), group_size, take.boolean("symmetric"), take.boolean("permuted"))
