"""What can be asked of an engine beside what every bundle has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qwen_rt.engine_card import EngineProfile
from qwen_rt.errors import UsageError
from qwen_rt.export.tensor_parallel import check_tp
from qwen_rt.spec import ModelSpec

__all__ = ["DEFAULT_MAX_BATCH", "DEFAULT_PREFILL_TOKENS", "EngineOptions", "profiles", "settle_engine"]

DEFAULT_MAX_BATCH = 8
DEFAULT_PREFILL_TOKENS = 1024
_ALIGNMENT = 256  # bytes; what TensorRT wants of the address of every row of the cache
_MAX_DIM = 2**31 - 1
_LEAST_BATCH = 2
"""For one row alone TensorRT-RTX 1.7 writes fp8 and int8 matrices out as floats in every step."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class EngineOptions:
    """What to compile for.

    Attributes:
        compute_capabilities: Such as `8.9`; none for all that the flavour compiles this precision for. Full TensorRT
            compiles for the GPU that is present.
        max_batch: Rows that the engine takes at a time; at least 2 are built.
        prefill_tokens: Tokens of a prompt that it takes at a time; None for `DEFAULT_PREFILL_TOKENS` or `max_length`.
        tensor_parallel: Ranks, an engine for each.
        timing_cache: File that keeps what TensorRT measured; None for one in the user's cache folder. TensorRT-RTX has
            none.
        optimization_level: 0 (fastest build) to 5; None for the library's default.
    """

    compute_capabilities: tuple[str, ...] = ()
    max_batch: int = DEFAULT_MAX_BATCH
    prefill_tokens: int | None = None
    tensor_parallel: int = 1
    timing_cache: Path | None = None
    optimization_level: int | None = None


def settle_engine(
    spec: ModelSpec, options: EngineOptions, max_length: int, dtype: str, target: str = "tensorrt-rtx"
) -> EngineOptions:
    """Fill in what was left open.

    Raises:
        UsageError: Options that do not fit the model or TensorRT.
    """
    if options.timing_cache is not None and target != "tensorrt":
        raise UsageError(
            f"timing-cache={options.timing_cache} with target {target}, which measures nothing while it builds",
            "--target tensorrt",
            "leave --timing-cache out",
        )
    most = max(1, _MAX_DIM // max_length)
    if not 1 <= options.max_batch <= most:
        raise UsageError(
            f"max-batch={options.max_batch}",
            f"1 to {most}, as rows of {max_length} tokens are counted in 31 bits",
            "choose another --max-batch",
        )
    tokens = options.prefill_tokens
    if tokens is None:
        tokens = min(DEFAULT_PREFILL_TOKENS, max_length)
    if not 1 <= tokens <= max_length:
        raise UsageError(f"prefill-tokens={tokens}", f"1 to {max_length}, the tokens of --max-length")
    level = options.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"optimization-level={level}", "0 to 5")
    check_tp(spec, options.tensor_parallel)
    if spec.num_heads == options.tensor_parallel:
        raise UsageError(
            f"tp={options.tensor_parallel} of {spec.num_heads} attention heads",
            "at least 2 heads a rank: TensorRT-RTX takes the attention of a single one apart",
            "choose a smaller --tp",
        )
    row_bytes = max(1, spec.num_kv_heads // options.tensor_parallel) * spec.head_dim * _ITEM_BYTES[dtype]
    if row_bytes * max_length % _ALIGNMENT:
        multiple = next(count for count in range(1, _ALIGNMENT + 1) if row_bytes * count % _ALIGNMENT == 0)
        raise UsageError(
            f"max-length={max_length} for an engine, whose cache rows begin every {row_bytes * max_length} bytes",
            f"a multiple of {multiple}, so that they begin at multiples of {_ALIGNMENT}",
            f"choose --max-length {max(multiple, max_length // multiple * multiple)}",
        )
    return replace(options, prefill_tokens=tokens)


def profiles(options: EngineOptions) -> dict[str, EngineProfile]:
    """The optimization profiles of settled options, in the order of their numbers."""
    assert options.prefill_tokens is not None
    max_batch = max(_LEAST_BATCH, options.max_batch)
    return {"prefill": EngineProfile(max_batch, options.prefill_tokens), "decode": EngineProfile(max_batch, 1)}
