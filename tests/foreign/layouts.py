"""Writers of every foreign layout, one number at a time, from the descriptions of the layouts; and what is written.

They share nothing with the readers under test: words are built with Python integers, and the weights that they stand
for are computed from the integers before they are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Written:
    """One matrix as another tool stores it.

    Attributes:
        config: The quantization config that goes with it.
        tensors: Name behind the module's → (safetensors dtype, array of its bits).
        weight: float64[N, K], what it stands for.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)
    weight: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the bfloat16 that `x` is cut to."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(x: NDArray[Any], dtype: str) -> tuple[tuple[str, NDArray[Any]], NDArray[np.float64]]:
    """Store floats as F16, BF16 or F32: (the tensor, what it holds)."""
    if dtype == "BF16":
        bits = to_bf16(x.astype(np.float32))
        return (dtype, bits), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = x.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return (dtype, stored), stored.astype(np.float64)


def words_of(numbers: NDArray[Any], bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """Pack along the last axis: [..., n] → int32 [..., ceil(n · bits / 32)]; a word has its share in `order`."""
    per_word = 32 // bits
    flat = numbers.reshape(-1, numbers.shape[-1])
    num_words = -(-flat.shape[1] // per_word)
    words = np.zeros((flat.shape[0], num_words), np.uint32)
    for i, row in enumerate(flat):
        for j in range(num_words):
            word = 0
            for place, which in enumerate(order or range(per_word)):
                at = j * per_word + which
                if at < len(row):
                    word |= (int(row[at]) & ((1 << bits) - 1)) << (bits * place)
            words[i, j] = word
    return words.view(np.int32).reshape(*numbers.shape[:-1], num_words)


def gptq(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    act_order: bool = False,
    version: str = "gptq",
    scale_dtype: str = "F16",
    g_idx: bool = True,
    seed: int = 0,
) -> Written:
    """A GPTQ matrix; zero points of 0 among them unless symmetric."""
    rng = np.random.default_rng(seed)
    width = columns if group_size == -1 else group_size
    groups = columns // width
    group_of = np.arange(columns) // width
    if act_order:
        group_of = rng.permutation(group_of)
    values = rng.integers(0, 1 << bits, (columns, rows))
    zeros = np.full((groups, rows), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (groups, rows))
    scales, exact = floats(rng.uniform(1e-3, 2e-2, (groups, rows)), scale_dtype)
    packed = words_of(zeros, bits).view(np.uint32)
    if version == "gptq":
        ones = int("1" * 8 if bits == 4 else "01" * 4, 16)
        packed = np.array([(int(word) - ones) % 2**32 for word in packed.reshape(-1)], np.uint32).reshape(packed.shape)
    written = Written(
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": act_order,
            "sym": sym,
            "checkpoint_format": version,
        }
    )
    written.tensors = {
        "qweight": ("I32", np.ascontiguousarray(words_of(values.T, bits).T)),
        "qzeros": ("I32", packed.view(np.int32)),
        "scales": scales,
    }
    if g_idx:
        written.tensors["g_idx"] = ("I32", group_of.astype(np.int32))
    written.weight = (exact[group_of] * (values - zeros[group_of])).T
    return written


def awq(rows: int, columns: int, *, group_size: int = 32, scale_dtype: str = "F16", seed: int = 0) -> Written:
    """An AWQ matrix of the layout gemm."""
    rng = np.random.default_rng(seed)
    width = columns if group_size == -1 else group_size
    values = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // width, rows))
    scales, exact = floats(rng.uniform(1e-3, 2e-2, zeros.shape), scale_dtype)
    group_of = np.arange(columns) // width
    return Written(
        {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True},
        {
            "qweight": ("I32", words_of(values, 4, AWQ_ORDER)),
            "qzeros": ("I32", words_of(zeros, 4, AWQ_ORDER)),
            "scales": scales,
        },
        (exact[group_of] * (values - zeros[group_of])).T,
    )


def group_config(format_: str, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config of one group of all linear layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def compressed_integers(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    strategy: str = "group",
    group_size: int = 32,
    symmetric: bool = True,
    packed: bool = True,
    act_order: bool = False,
    scale_dtype: str = "BF16",
    seed: int = 0,
) -> Written:
    """A matrix of compressed-tensors' pack-quantized or int-quantized."""
    rng = np.random.default_rng(seed)
    width = group_size if strategy == "group" else columns
    groups = columns // width
    half = 1 << (bits - 1)
    group_of = np.arange(columns) // width
    if act_order:
        group_of = rng.permutation(group_of)
    shape = (1, 1) if strategy == "tensor" else (rows, groups)
    values = rng.integers(-half, half, (rows, columns))
    zeros = np.zeros(shape, np.int64) if symmetric else rng.integers(-half, half, shape)
    scales, exact = floats(rng.uniform(1e-3, 2e-2, shape), scale_dtype)
    if strategy == "tensor":
        scales = (scales[0], scales[1].reshape(1))
    config = group_config(
        "pack-quantized" if packed else "int-quantized",
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        actorder="group" if act_order else None,
        dynamic=False,
    )
    tensors: dict[str, tuple[str, NDArray[Any]]] = {"weight_scale": scales}
    if packed:
        tensors["weight_packed"] = ("I32", words_of(values + half, bits))
        tensors["weight_shape"] = ("I64", np.array([rows, columns], np.int64))
        if act_order:
            tensors["weight_g_idx"] = ("I32", group_of.astype(np.int32))
    else:
        tensors["weight"] = ("I8", values.astype(np.int8))
    if not symmetric:
        if packed and strategy != "tensor":
            tensors["weight_zero_point"] = ("I32", np.ascontiguousarray(words_of((zeros + half).T, bits).T))
        else:
            tensors["weight_zero_point"] = ("I8", zeros.astype(np.int8).reshape(scales[1].shape))
    index = np.zeros(columns, int) if strategy == "tensor" else group_of
    return Written(config, tensors, exact[:, index] * (values - zeros[:, index]))


def fp8_values(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Random e4m3 numbers: (their bits, their values)."""
    bits = rng.integers(0, 256, shape).astype(np.uint8)
    bits[(bits & 127) == 127] = 0
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return bits, np.where(bits >= 128, -magnitude, magnitude)


def fp8(
    rows: int,
    columns: int,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale_shape: tuple[int, ...] | None = None,
    scale_name: str = "weight_scale_inv",
    scale_dtype: str = "F32",
    seed: int = 0,
) -> Written:
    """A plain fp8 matrix: scales by blocks, or of `scale_shape` for rows or one for all."""
    rng = np.random.default_rng(seed)
    bits, values = fp8_values(rng, (rows, columns))
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block is not None and scale_shape is None:
        config["weight_block_size"] = list(block)
        scale_shape = (-(-rows // block[0]), -(-columns // block[1]))
        by_row, by_column = np.arange(rows) // block[0], np.arange(columns) // block[1]
    else:
        config["weight_block_size"] = None
        scale_shape = scale_shape or ()
        by_row = np.arange(rows) if scale_shape[:1] == (rows,) else np.zeros(rows, int)
        by_column = np.zeros(columns, int)
    scales, exact = floats(rng.uniform(1e-4, 1e-2, scale_shape), scale_dtype)
    grid = exact.reshape(scale_shape if len(scale_shape) == 2 else (-1, 1))
    return Written(
        config,
        {"weight": ("F8_E4M3", bits), scale_name: (scales[0], scales[1].reshape(scale_shape))},
        values * grid[by_row[:, None], by_column[None, :]],
    )


def compressed_fp8(
    rows: int, columns: int, *, strategy: str = "channel", scale_dtype: str = "BF16", seed: int = 0
) -> Written:
    """A matrix of compressed-tensors' float-quantized."""
    rng = np.random.default_rng(seed)
    bits, values = fp8_values(rng, (rows, columns))
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // 32),
        "block": (-(-rows // 16), -(-columns // 64)),
    }
    scales, exact = floats(rng.uniform(1e-4, 1e-2, shapes[strategy]), scale_dtype)
    by_row = {"tensor": np.zeros(rows, int), "block": np.arange(rows) // 16}.get(strategy, np.arange(rows))
    width = {"group": 32, "block": 64}.get(strategy, columns)
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = 32
    if strategy == "block":
        weights["block_structure"] = [16, 64]
    grid = exact.reshape(-1, 1) if len(shapes[strategy]) == 1 else exact
    return Written(
        group_config("float-quantized", **weights),
        {"weight": ("F8_E4M3", bits), "weight_scale": scales},
        values * grid[by_row[:, None], (np.arange(columns) // width)[None, :]],
    )
