"""The config of compressed-tensors: groups of modules, each quantized in its way."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign.compressed_tensors import IntegerLayout
from qwen_rt.foreign.fields import FIX_CONFIG, Fields
from qwen_rt.foreign.fp8 import Fp8Layout, block_shape
from qwen_rt.foreign.matrix import Layout
from qwen_rt.foreign.patterns import Pattern
from qwen_rt.strict_json import INT_MAX, show

__all__ = ["CompressedTensorsQuantization", "read_compressed_tensors"]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_DENSE = "dense"
_MIXED = "mixed-precision"
_PATTERN = "re:"
_MAX_PATTERNS = 256
_MAX_GROUPS = 1000
_MARKS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
)


class _Targets:
    """Names, patterns and classes of modules."""

    def __init__(self, targets: tuple[str, ...], path: str) -> None:
        self.names = frozenset(target for target in targets if not target.startswith(_PATTERN))
        patterns = sorted(target[len(_PATTERN) :] for target in targets if target.startswith(_PATTERN))
        if len(patterns) > _MAX_PATTERNS:
            raise CheckpointError(f"{path} has {len(patterns)} patterns", f"at most {_MAX_PATTERNS}", FIX_CONFIG)
        self.patterns = tuple(Pattern(pattern) for pattern in patterns)

    def rank(self, module: str) -> int | None:
        """How specific the match is: 0 by name, 1 by pattern, 2 by class, None for no match."""
        if module in self.names:
            return 0
        if any(pattern.matches(module) for pattern in self.patterns):
            return 1
        return 2 if _class_of(module) in self.names else None


def _class_of(module: str) -> str:
    return "Embedding" if module.endswith("embed_tokens") else "Linear"


@dataclass(frozen=True, eq=False)
class _Group:
    """Modules that are quantized alike; no layout where only their activations are."""

    targets: _Targets
    layout: Layout | None


@dataclass(frozen=True, eq=False)
class CompressedTensorsQuantization:
    """A compressed-tensors config."""

    groups: tuple[_Group, ...]
    ignored: _Targets
    marks: tuple[str, ...] = _MARKS

    def layout(self, module: str) -> Layout | None:
        """See `Quantization`."""
        if self.ignored.rank(module) is not None:
            return None
        ranked = [(rank, group) for group in self.groups if (rank := group.targets.rank(module)) is not None]
        return min(ranked, key=lambda item: item[0])[1].layout if ranked else None

    def __str__(self) -> str:
        return "the compressed-tensors config"


def read_compressed_tensors(fields: Fields) -> CompressedTensorsQuantization:
    """Read a config with `quant_method` compressed-tensors.

    Raises:
        CheckpointError: A field that is missing, malformed or out of range.
        UnsupportedModelError: A format, a type of number, sparsity or a transform that is not read.
    """
    kind = fields.text("format")
    fields.require("format", kind, *_FORMATS, _MIXED, _DENSE)
    if fields.has("sparsity_config"):
        sparsity = fields.child("sparsity_config")
        if sparsity.data:
            sparsity.require("format", sparsity.text("format", _DENSE), _DENSE)
    if fields.data.get("transform_config") not in (None, {}):
        transform = fields.child("transform_config")
        if transform.data.get("config_groups") not in (None, {}):
            raise UnsupportedModelError(
                f"{transform.path}: rotations are not computed", "no transform", "take a checkpoint without"
            )
    groups = fields.child("config_groups")
    if not groups.data or len(groups.data) > _MAX_GROUPS:
        raise CheckpointError(f"{groups.path}={show(groups.data)}", f"1 to {_MAX_GROUPS} groups", FIX_CONFIG)
    return CompressedTensorsQuantization(
        tuple(_read_group(groups.child(name), kind) for name in groups.data),
        _Targets(fields.names("ignore"), f"{fields.path}.ignore"),
    )


def _read_group(fields: Fields, kind: str) -> _Group:
    targets = _Targets(fields.names("targets"), f"{fields.path}.targets")
    if not fields.has("weights"):
        return _Group(targets, None)
    kind = fields.text("format", kind)
    if kind == _DENSE:
        return _Group(targets, None)
    fields.require("format", kind, *_FORMATS)
    return _Group(targets, _read_layout(fields.child("weights"), kind))


def _read_layout(weights: Fields, kind: str) -> Layout:
    number = weights.text("type", "int")
    weights.require("type", number, "int", "float")
    bits = weights.integer("num_bits", 1, 64, 8)
    strategy = weights.text("strategy", _default_strategy(weights))
    weights.require("strategy", strategy, "tensor", "channel", "group", "block")
    if weights.data.get("dynamic") not in (None, False):
        weights.require("dynamic", weights.data["dynamic"], False)
    group_size = weights.integer("group_size", 1, INT_MAX) if strategy == "group" else 0
    symmetric = weights.boolean("symmetric", True)
    if kind == "naive-quantized":
        kind = "int-quantized" if number == "int" else "float-quantized"
    weights.require("type", number, "float" if kind == "float-quantized" else "int")
    if kind == "float-quantized":
        weights.require("num_bits", bits, 8)
        weights.require("symmetric", symmetric, True)
        if strategy == "block":
            block = block_shape(f"{weights.path}.block_structure", _block(weights))
            return Fp8Layout(block, ("weight_scale",))
        return Fp8Layout((1, group_size) if group_size else None, ("weight_scale",), whole_blocks=True)
    weights.require("strategy", strategy, "tensor", "channel", "group")
    weights.require("num_bits", bits, *((4, 8) if kind == "pack-quantized" else range(2, 9)))
    return IntegerLayout(bits, strategy, group_size, kind == "pack-quantized", symmetric)


def _default_strategy(weights: Fields) -> str:
    """What stands for a strategy that is missing: it follows from the group size."""
    if not weights.has("group_size"):
        return "tensor"
    return "channel" if weights.integer("group_size", -1, INT_MAX) == -1 else "group"


def _block(weights: Fields) -> object:
    """Rows and columns of a block; old configs have "128x128"."""
    value = weights.data.get("block_structure")
    if isinstance(value, str) and len(value) < 32:
        parts = value.split("x")
        return [int(part) if part.isascii() and part.isdigit() else part for part in parts]
    return value
