"""Plain fp8 checkpoints: e4m3 matrices with a scale for each block, row, or matrix.

| tensor                               | dtype, shape                              | what                       |
|--------------------------------------|-------------------------------------------|----------------------------|
| `weight`                             | F8_E4M3 [N, K]                            |                            |
| `weight_scale_inv` or `weight_scale` | floats [ceil(N / height), ceil(K / width)]| blocks, 128 x 128 at large |
|                                      | floats [N] or [N, 1]                      | a scale for each row       |
|                                      | floats [], [1] or [1, 1]                  | one scale                  |

    w[n, k] = weight[n, k] · scale[n // height, k // width]      (both names of the scale: a factor)

A block's scale is repeated for each of its rows. Scales of activations belong to kernels that quantize those too;
this package does not, and leaves them.

Source: transformers 5.23.0, `integrations/finegrained_fp8.py`; DeepSeek-V3, `inference/fp8_cast_bf16.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_rt.errors import CheckpointError
from qwen_rt.foreign.assemble import check_fp8, check_groups, finish_fp8, read_scale, split_groups
from qwen_rt.foreign.fields import FIX_CONFIG, Fields
from qwen_rt.foreign.matrix import FIX_AGAIN, ForeignMatrix, Part
from qwen_rt.quantization import QuantizedTensor, Scheme
from qwen_rt.strict_json import INT_MAX, check_int, show
from qwen_rt.tensor_data import FLOAT_DTYPES

__all__ = ["Fp8Layout", "Fp8Quantization", "block_shape", "read_fp8"]

_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True)
class Fp8Layout:
    """How an fp8 matrix is stored; scales for rows or one for all go without saying.

    Attributes:
        block: Rows and columns that share a scale; None if scales are not stored by blocks.
        scale_names: What the scales may be called.
        whole_blocks: Whether the columns of a block must divide a row; else the last one is cut short.
    """

    block: tuple[int, int] | None
    scale_names: tuple[str, ...] = _SCALES
    whole_blocks: bool = False

    def __str__(self) -> str:
        return "fp8" if self.block is None else f"fp8 in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def format(self) -> str:
        """See `Layout`."""
        return "fp8"

    def parts(self, name: str, shape: tuple[int, int], present: frozenset[str]) -> Mapping[str, Part]:
        """See `Layout`."""
        rows, columns = shape
        if self.block is not None and self.whole_blocks:
            check_groups(name, columns, self.block[1], self)
        stored = [key for key in self.scale_names if key in present]
        if len(stored) > 1:
            raise CheckpointError(f"{name} has both {' and '.join(stored)}", "one of them", FIX_AGAIN)
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows,), (rows, 1)]
        if self.block is not None:
            shapes.insert(0, self._grid(shape))
        scale = stored[0] if stored else self.scale_names[0]
        return {"weight": Part(("F8_E4M3",), (shape,)), scale: Part(FLOAT_DTYPES, tuple(dict.fromkeys(shapes)))}

    def scheme(self, matrix: ForeignMatrix) -> Scheme:
        """See `Layout`."""
        return Scheme("fp8", split_groups(matrix.name, matrix.shape[1], self._spans(matrix)[1], "fp8"))

    def load(self, matrix: ForeignMatrix) -> QuantizedTensor:
        """See `Layout`.

        Raises:
            CheckpointError: As `ForeignMatrix.load`, or a number that is none.
        """
        scale = read_scale(matrix, self._scale_name(matrix))
        height, width = self._spans(matrix)
        if scale.ndim < 2:
            scale = scale.reshape(-1, 1)
        return finish_fp8(matrix, check_fp8(matrix, "weight"), scale, height, width)

    def _grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of blocks, those at the edges cut short."""
        height, width = self.block or shape
        return -(-shape[0] // height), -(-shape[1] // width)

    def _spans(self, matrix: ForeignMatrix) -> tuple[int, int]:
        """Rows and columns that share a scale, by the shape of the scales."""
        rows, columns = matrix.shape
        shape = matrix.parts[self._scale_name(matrix)].shape
        if self.block is not None and shape == self._grid(matrix.shape):
            return self.block
        return (1 if shape[:1] == (rows,) else rows), columns

    def _scale_name(self, matrix: ForeignMatrix) -> str:
        return next(name for name in self.scale_names if name in matrix.parts)


@dataclass(frozen=True)
class Fp8Quantization:
    """An fp8 config: one layout for every module that the shards have quantized."""

    default: Fp8Layout
    marks: tuple[str, ...] = _SCALES

    def layout(self, module: str) -> Fp8Layout:
        """See `Quantization`."""
        return self.default

    def __str__(self) -> str:
        return "the fp8 config"


def block_shape(name: str, value: object) -> tuple[int, int]:
    """Read rows and columns of a block.

    Raises:
        CheckpointError: Not two positive integers.
    """
    if not isinstance(value, list) or len(value) != 2:
        raise CheckpointError(f"{name}={show(value)}", "two integers, rows and columns", FIX_CONFIG)
    return check_int(f"{name}[0]", value[0], 1, INT_MAX), check_int(f"{name}[1]", value[1], 1, INT_MAX)


def read_fp8(fields: Fields) -> Fp8Quantization:
    """Read a config with `quant_method` fp8.

    Raises:
        CheckpointError: A field that is malformed or out of range.
        UnsupportedModelError: Another kind of fp8, or of activations.
    """
    fields.require("activation_scheme", fields.text("activation_scheme", "dynamic"), "dynamic", "static")
    fields.require("fmt", fields.text("fmt", "e4m3"), "e4m3")
    if not fields.boolean("is_checkpoint_fp8_serialized", True):
        fields.require("is_checkpoint_fp8_serialized", False, True)
    fields.names("modules_to_not_convert", "ignored_layers")
    blocks = fields.data.get("weight_block_size", [128, 128])  # a missing one is what transformers takes it for
    name = f"{fields.path}.weight_block_size"
    return Fp8Quantization(Fp8Layout(None if blocks is None else block_shape(name, blocks)))
