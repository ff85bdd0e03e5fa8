"""One quantized matrix of a foreign checkpoint: which tensors it is stored in, and how they become a `QuantizedTensor`.

A layout is one way to store a matrix; `gptq.py`, `awq.py`, `compressed_tensors.py` and `fp8.py` have one each or more.
`find_matrices` finds the matrices of a checkpoint from the names of its tensors: the config says how a module is
quantized, and the shards whether it is. Shapes and dtypes of all parts are checked here, from the headers alone;
values are when a matrix is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError
from qwen_rt.quantization import QuantizedTensor, Scheme
from qwen_rt.safetensors_header import TensorRef
from qwen_rt.strict_json import name_some
from qwen_rt.tensor_data import FLOAT_DTYPES, read_tensor, to_float32

__all__ = ["FIX_AGAIN", "ForeignMatrix", "Layout", "Part", "Quantization", "find_matrices"]

FIX_AGAIN = "download the shards and config.json again"

_BIAS = "bias"
_QUANTIZED_DTYPES = ("F8_E4M3", "I8", "U8")


@dataclass(frozen=True)
class Part:
    """What one stored part of a matrix must be.

    Attributes:
        dtypes: Any of these safetensors dtypes.
        shapes: Any of these shapes.
        required: Whether it must be there.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {' or '.join(str(list(shape)) for shape in self.shapes)}"


class Layout(Protocol):
    """One way to store a quantized matrix; `str` of it says which, for messages."""

    @property
    def format(self) -> str:
        """`Scheme.format` of every matrix that is stored so."""
        ...

    def parts(self, name: str, shape: tuple[int, int], present: frozenset[str]) -> Mapping[str, Part]:
        """What is stored of a matrix.

        Args:
            name: Its name, for messages.
            shape: [N, K].
            present: Names behind the module's that the shards have, among those of `Quantization.marks`.

        Returns:
            Name of each part behind the module's → what it must be.

        Raises:
            CheckpointError, UnsupportedModelError: A matrix of that shape cannot be stored so, or is not read.
        """
        ...

    def scheme(self, matrix: ForeignMatrix) -> Scheme:
        """The scheme that `load` gives, from as little data as that takes."""
        ...

    def load(self, matrix: ForeignMatrix) -> QuantizedTensor:
        """Read and repack a matrix; see `ForeignMatrix.load`."""
        ...


class Quantization(Protocol):
    """What a quantization config says, read and checked; `str` of it says which method, for messages."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Names behind a module's of the tensors that only a quantized module has."""
        ...

    def layout(self, module: str) -> Layout | None:
        """How a module (`model.layers.0.mlp.up_proj`) is stored; None if the config leaves it as it was.

        Raises:
            UnsupportedModelError: The config says it in a way that is not read.
        """
        ...


@dataclass(frozen=True, eq=False)
class ForeignMatrix:
    """A quantized matrix on disk.

    Attributes:
        name: Hugging Face name of the parameter (`model.layers.0.mlp.up_proj.weight`).
        shape: [N, K].
        layout: How it is stored.
        parts: Name of each stored part behind the module's → where it is.
    """

    name: str
    shape: tuple[int, int]
    layout: Layout
    parts: Mapping[str, TensorRef]

    @cached_property
    def scheme(self) -> Scheme:
        """The scheme of what `load` returns.

        Whether a matrix is symmetric and whether its columns are in order is a matter of its data: zero points and
        column order are read for it, once, a hundredth of the matrix at most.

        Raises:
            CheckpointError, StorageError: As `load`.
        """
        return self.layout.scheme(self)

    @property
    def format(self) -> str:
        """`Scheme.format` of `scheme`, from the config alone."""
        return self.layout.format

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(ref.nbytes for ref in self.parts.values())

    def load(self) -> QuantizedTensor:
        """Read the matrix and lay it out as this package stores it; no value is quantized anew.

        Takes about three times `nbytes` of memory for a moment.

        Raises:
            CheckpointError: A scale that is zero, infinite or no number; a column order that is none; a bias where
                Qwen2 has none; scales that float16 cannot hold; a file that was cut short.
            StorageError: A file cannot be read.
        """
        if _BIAS in self.parts and np.any(self.read_float(_BIAS)):
            raise CheckpointError(
                f"{self.parts[_BIAS].name} is not zero", "zeros: Qwen2 has no bias there", "choose another checkpoint"
            )
        return self.layout.load(self)

    def read(self, part: str) -> NDArray[Any]:
        """Data of one part, as `read_tensor` gives it."""
        return read_tensor(self.parts[part])

    def read_float(self, part: str) -> NDArray[np.float32]:
        """Data of one part of floats, widened."""
        return to_float32(self.parts[part], self.read(part))


def find_matrices(
    quantization: Quantization, parameters: Mapping[str, tuple[int, ...]], stored: Mapping[str, TensorRef]
) -> dict[str, ForeignMatrix]:
    """Find the quantized matrices of a checkpoint and check what is stored of them.

    Args:
        quantization: What the config says.
        parameters: Every parameter of the model with its shape.
        stored: Every tensor of the shards.

    Returns:
        Name of a parameter → its matrix, in the order of `parameters`. Parameters that are stored as floats are left
        out, and so are those that are missing altogether.

    Raises:
        CheckpointError: A part missing, of another dtype or shape than the config implies, or stored though the
            config has its module left as it was.
        UnsupportedModelError: A layout that is not read.
    """
    found: dict[str, ForeignMatrix] = {}
    for name, shape in parameters.items():
        module, dot, kind = name.rpartition(".")
        if len(shape) != 2 or kind != "weight" or not dot:
            continue
        present = frozenset(mark for mark in quantization.marks if f"{module}.{mark}" in stored)
        if not present and not (name in stored and stored[name].dtype in _QUANTIZED_DTYPES):
            continue
        layout = quantization.layout(module)
        if layout is None:
            raise CheckpointError(
                f"{module} is stored quantized ({name_some(present or {kind})})",
                f"{name}: {quantization} leaves that module as it was",
                FIX_AGAIN,
            )
        rows, columns = shape
        parts = dict(layout.parts(name, (rows, columns), present))
        if f"{module}.{_BIAS}" not in parameters:
            # AutoGPTQ gives every linear a bias, of zeros where the model has none.
            parts[_BIAS] = Part(FLOAT_DTYPES, ((rows,),), required=False)
        found[name] = ForeignMatrix(name, (rows, columns), layout, _check_parts(module, layout, parts, stored))
        if "weight" not in parts and name in stored:
            raise CheckpointError(
                f"{name} is stored beside {name_some(f'{module}.{mark}' for mark in present)}",
                "one of them",
                FIX_AGAIN,
            )
    return found


def _check_parts(
    module: str, layout: Layout, parts: Mapping[str, Part], stored: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    """Find the parts of one matrix and hold them against what they must be."""
    found: dict[str, TensorRef] = {}
    for part, wanted in parts.items():
        full = f"{module}.{part}"
        ref = stored.get(full)
        if ref is None:
            if wanted.required:
                raise CheckpointError(f"tensor {full} is missing", f"{wanted} for {layout}", FIX_AGAIN)
            continue
        if ref.dtype not in wanted.dtypes or ref.shape not in wanted.shapes:
            raise CheckpointError(
                f"tensor {full} is {ref.dtype} {list(ref.shape)}", f"{wanted} for {layout}", FIX_AGAIN
            )
        found[part] = ref
    return found
