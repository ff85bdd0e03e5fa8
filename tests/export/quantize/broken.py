"""Sources of rows for the gate: arrays in memory, quantized on the way, and broken on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.export.quantize.gate import run_gate
from qwen_rt.export.quantize.gate_text import gate_tokens
from qwen_rt.gate_result import GateResult
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize, pack_nibbles, round_fp8
from qwen_rt.spec import ModelSpec

F32 = NDArray[np.float32]
Damage = Callable[[QuantizedTensor], QuantizedTensor]


class ArrayRows:
    """A RowSource over arrays in memory."""

    def __init__(self, arrays: Mapping[str, F32]) -> None:
        self.arrays = dict(arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def rows(self, name: str, start: int, stop: int) -> F32:
        return self.arrays[name][start:stop].copy()


def read_all(checkpoint: Checkpoint) -> dict[str, F32]:
    """All parameters as float32."""
    return {name: to_float32(checkpoint.tensors[name], checkpoint.read(name)) for name in checkpoint.spec.parameters()}


def schemes_for(spec: ModelSpec, scheme: Scheme) -> dict[str, Scheme]:
    """That scheme for every matrix of the layers; a scale for a whole row where the groups do not divide it."""
    found = {}
    for name, shape in spec.parameters().items():
        if name.startswith("model.layers.") and len(shape) == 2:
            fits = not scheme.group_size or shape[1] % scheme.group_size == 0
            used = Scheme(scheme.format, scheme.group_size if fits else 0, scheme.symmetric)
            found[name] = Scheme("int8") if used.format == "int4" and shape[1] % 2 else used
    return found


def quantize(name: str, weight: F32, scheme: Scheme) -> QuantizedTensor:
    """Round to nearest, without any search for a better scale."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, scheme.num_groups(columns), -1)
    if scheme.symmetric:
        largest = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[scheme.format]
        scale, zero = np.abs(grouped).max(-1) / largest, np.zeros(grouped.shape[:2])
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        levels, base = (15, 0) if scheme.format == "int4" else (255, -128)
        scale = (high - low) / levels
        zero = base - np.rint(low / np.where(scale > 0, scale, 1))
    scale = np.where(scale > 0, scale, 1).astype(np.float16 if scheme.format == "int4" else np.float32)
    scaled = grouped / scale.astype(np.float32)[..., None]
    if scheme.format == "fp8":
        return QuantizedTensor(name, scheme, weight.shape, _fp8_bits(round_fp8(scaled).reshape(weight.shape)), scale)
    numbers = np.rint(scaled + zero[..., None]).reshape(weight.shape)
    if scheme.format == "int8":
        points = None if scheme.symmetric else zero.astype(np.int8)
        return QuantizedTensor(name, scheme, weight.shape, numbers.clip(-128, 127).astype(np.int8), scale, points)
    offset = 8 if scheme.symmetric else 0
    points = None if scheme.symmetric else pack_nibbles(zero.astype(np.uint8))
    packed = pack_nibbles((numbers + offset).clip(0, 15).astype(np.uint8))
    return QuantizedTensor(name, scheme, weight.shape, packed, scale, points)


def _fp8_bits(numbers: F32) -> NDArray[np.uint8]:
    from qwen_rt.quantization import decode_fp8

    table = decode_fp8(np.arange(127, dtype=np.uint8))  # the numbers from 0 up, in order
    found: NDArray[np.uint8] = np.searchsorted(table, np.abs(numbers)).astype(np.uint8) | (numbers < 0).astype(
        np.uint8
    ) * np.uint8(128)
    return found


class QuantizedRows(ArrayRows):
    """The arrays as a bundle has them: matrices quantized and dequantized.

    Args:
        arrays: Parameters.
        schemes: Scheme of each quantized matrix.
        damage: Name of a matrix → what happens to it between the two.
    """

    def __init__(
        self, arrays: Mapping[str, F32], schemes: Mapping[str, Scheme], damage: Mapping[str, Damage] | None = None
    ) -> None:
        super().__init__(arrays)
        for name, scheme in schemes.items():
            stored = quantize(name, self.arrays[name], scheme)
            self.arrays[name] = dequantize((damage or {}).get(name, lambda tensor: tensor)(stored))

    def damaged(
        self, source: Mapping[str, F32], schemes: Mapping[str, Scheme], damage: Mapping[str, Damage]
    ) -> ArrayRows:
        """The same with some matrices broken; the others are not quantized again."""
        names = {name: schemes[name] for name in damage}
        return ArrayRows(self.arrays | {name: QuantizedRows(source, names, damage).arrays[name] for name in names})


def changed(tensor: QuantizedTensor, **fields: Any) -> QuantizedTensor:
    """A copy with some fields replaced."""
    return QuantizedTensor(**{**vars(tensor), **fields})


def scales_permuted(tensor: QuantizedTensor) -> QuantizedTensor:
    """Every row gets the scales of another."""
    return changed(tensor, scale=tensor.scale[np.random.default_rng(5).permutation(len(tensor.scale))])


def scales_shifted(tensor: QuantizedTensor) -> QuantizedTensor:
    """Every group gets the scale of the one before it."""
    return changed(tensor, scale=np.roll(tensor.scale, 1, axis=1))


def scale_is_nan(tensor: QuantizedTensor) -> QuantizedTensor:
    """One scale is not a number."""
    scale = tensor.scale.copy()
    scale[3, 0] = np.nan
    return changed(tensor, scale=scale)


def scales_doubled(tensor: QuantizedTensor) -> QuantizedTensor:
    """All scales are twice what they should be."""
    return changed(tensor, scale=tensor.scale * tensor.scale.dtype.type(2))


def zeroed(tensor: QuantizedTensor) -> QuantizedTensor:
    """All scales are 0."""
    return changed(tensor, scale=np.zeros_like(tensor.scale))


def rows_zeroed(tensor: QuantizedTensor) -> QuantizedTensor:
    """The last quarter of the rows was never written."""
    scale = tensor.scale.copy()
    scale[-(len(scale) // 4) :] = 0
    return changed(tensor, scale=scale)


def transposed(tensor: QuantizedTensor) -> QuantizedTensor:
    """The numbers run down the columns instead of along the rows."""
    values = np.ascontiguousarray(tensor.values.T).reshape(tensor.values.shape)
    return changed(tensor, values=values)


def nibbles_swapped(tensor: QuantizedTensor) -> QuantizedTensor:
    """Even columns hold what odd ones should."""
    return changed(tensor, values=(tensor.values >> 4) | (tensor.values << 4))


SCHEMES = {
    "fp8": Scheme("fp8"),
    "fp8-g128": Scheme("fp8", 128),
    "int8": Scheme("int8"),
    "int8-asymmetric": Scheme("int8", 64, symmetric=False),
    "int4": Scheme("int4", 128),
    "int4-g32": Scheme("int4", 32),
    "int4-row": Scheme("int4"),
    "int4-asymmetric": Scheme("int4", 64, symmetric=False),
}


class Model:
    """A checkpoint in memory."""

    def __init__(self, folder: Path | str) -> None:
        torch.set_num_threads(1)  # more only spin: the shapes are small
        self.checkpoint = Checkpoint.open(folder)
        self.spec = self.checkpoint.spec
        self.arrays = read_all(self.checkpoint)
        self.ids, self.text = gate_tokens(self.checkpoint.path, self.spec, 96)
        self._quantized: dict[Scheme, QuantizedRows] = {}

    def gate(self, scheme: Scheme, damage: dict[str, Damage] | None = None, **options: Any) -> GateResult:
        schemes = schemes_for(self.spec, scheme)
        if scheme not in self._quantized:
            self._quantized[scheme] = QuantizedRows(self.arrays, schemes)
        return self.compare(self._quantized[scheme].damaged(self.arrays, schemes, damage or {}), schemes, **options)

    def compare(self, quantized: Any, schemes: dict[str, Scheme], **options: Any) -> GateResult:
        return run_gate(ArrayRows(self.arrays), quantized, self.spec, self.ids, schemes, text=self.text, **options)
