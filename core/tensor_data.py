"""Data of stored tensors, read with `pread` when asked for.

Files are not mapped: mapped pages would count as this process's memory until the kernel takes them back, and a
145 GB checkpoint is read from end to end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError
from qwen_rt.safetensors_header import TensorRef, read_errors
from qwen_rt.strict_json import show

__all__ = ["FLOAT_DTYPES", "STORED_AS", "read_bytes", "read_tensor", "to_float32"]

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""safetensors dtypes of parameters that are not quantized."""

STORED_AS: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""safetensors dtype → what a numpy array of its bytes holds; numpy has neither bfloat16 nor float8."""


def read_bytes(descriptor: int, target: NDArray[np.uint8], offset: int, ref: TensorRef) -> None:
    """Fill `target` from byte `offset` of an open file.

    Raises:
        CheckpointError: The file ends before that.
        StorageError: The operating system refuses.
    """
    memory = target.data
    while memory:
        with read_errors(ref.path):
            count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise CheckpointError(
                f"{ref.path} ends at byte {offset}, within tensor {show(ref.name)}",
                "a file at rest",
                "download it again",
            )
        memory, offset = memory[count:], offset + count


def read_tensor(ref: TensorRef) -> NDArray[Any]:
    """Read a whole tensor: a new array of its shape, in `STORED_AS` of its dtype.

    Raises:
        CheckpointError: The file has been cut short.
        StorageError: It cannot be read.
    """
    data = np.empty(ref.nbytes, np.uint8)
    with read_errors(ref.path):
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_bytes(descriptor, data, ref.offset, ref)
    finally:
        os.close(descriptor)
    array: NDArray[Any] = data.view(STORED_AS[ref.dtype]).reshape(ref.shape)
    return array


def to_float32(ref: TensorRef, array: NDArray[Any]) -> NDArray[np.float32]:
    """Widen stored floats to float32, exactly.

    Args:
        ref: The tensor; its dtype says what the bits mean.
        array: Any part of its data, any shape.

    Returns:
        f32 of the same shape: a copy for BF16 and F16, `array` itself for F32.

    Raises:
        CheckpointError: The dtype is none of BF16, F16, F32.
    """
    if ref.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"tensor {show(ref.name)} has dtype {ref.dtype}", ", ".join(FLOAT_DTYPES), "choose a weight"
        )
    if ref.dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)
