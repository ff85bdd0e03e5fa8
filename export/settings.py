"""Options of a build → settings: every default replaced by its value, everything that does not fit refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwen_rt.bundle import PRECISIONS, TARGETS
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import UsageError
from qwen_rt.export.lower import COMPUTE_DTYPES
from qwen_rt.export.passes.lower_cpu import check_cpu_shapes
from qwen_rt.export.passes.lower_cuda import check_cuda_shapes
from qwen_rt.export.tensorrt.options import EngineOptions, settle_engine
from qwen_rt.quantization import FORMATS, KV_FORMATS
from qwen_rt.spec import ModelSpec

__all__ = ["FROM_CHECKPOINT", "BuildOptions", "QuantizeOptions", "Settings", "settle"]

FROM_CHECKPOINT = "checkpoint"
"""Precision of a build that takes quantized matrices as the checkpoint stores them."""

_PRECISION_OF = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_ACTIVATIONS = ("float32", "int8")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize; the defaults quantize nothing but what the precision says.

    Attributes:
        group_size: Columns that share a scale; None for the format's default.
        symmetric: No zero points.
        lm_head: Precision of the LM head; None leaves it as it is stored.
        embedding: Precision of the embeddings; None leaves them.
        overrides: TOML file of patterns and precisions.
        size_budget: Bytes that all matrices may take: the most sensitive get a higher precision, as far as it goes.
        write_overrides: File to write what the budget chose to, as one for `overrides`.
        calibrate: UTF-8 text whose activations decide scales.
        kv_cache: `fp8` or `int8`; None for a cache of the activations' dtype.
        activations: Target cpu: `float32`, or `int8` to multiply int8 and int4 matrices by rounded activations; the
            latter is SmoothQuant in a checkpoint for TensorRT-LLM.
    """

    group_size: int | None = None
    symmetric: bool = True
    lm_head: str | None = None
    embedding: str | None = None
    overrides: Path | None = None
    size_budget: int | None = None
    write_overrides: Path | None = None
    calibrate: Path | None = None
    kv_cache: str | None = None
    activations: str = "float32"

    def files(self) -> list[Path]:
        """The files that are read."""
        return [file for file in (self.overrides, self.calibrate) if file is not None]


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        target: `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, or `portable` for the graph before lowering.
        precision: How weights are stored: `fp32`, `bf16`, `fp16`, quantized as `fp8`, `int8` or `int4`, or `auto` for
            what the checkpoint holds. Of the floats target `cuda` takes bf16 only, which is its `auto`; an engine of a
            checkpoint of float32 is `bf16` by itself.
        dtype: Compute dtype of a portable graph: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's.
            The CPU target computes in float32, target `cuda` in bfloat16, an engine in what it is stored in, or in
            the checkpoint's 16 bits where that is quantized.
        max_length: Positions that the bundle can reach; None for the model's context length.
        quantize: How to quantize, with a quantized precision or cache.
        gate: Compare a quantized model with its source before the bundle is finished.
        num_workers: Threads that convert weights; 0 for one a core.
        self_contained: Copy the weights into the folder instead of referring to the checkpoint; engines hold theirs.
        engine: What to compile an engine for.
        overwrite: Replace an existing bundle.
        quiet: No progress on stderr.
    """

    target: str = "cpu"
    precision: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    gate: bool = True
    num_workers: int = 0
    self_contained: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Settings:
    """Options with every default replaced by its value; `precision` may be `FROM_CHECKPOINT`.

    `engine` is None for a target that has a graph.
    """

    target: str
    precision: str
    dtype: str
    max_length: int
    quantize: QuantizeOptions
    gate: bool
    num_workers: int
    self_contained: bool
    engine: EngineOptions | None
    quiet: bool

    @property
    def is_quantized(self) -> bool:
        """Whether matrices or the cache are."""
        return self.precision in (*FORMATS, FROM_CHECKPOINT) or self.quantize.kv_cache is not None


def settle(checkpoint: Checkpoint, options: BuildOptions) -> Settings:
    """Fill in what was left open.

    Raises:
        UsageError: Options that do not fit the model or each other.
        UnsupportedModelError: A shape that the target's operators or kernels do not take.
    """
    spec = checkpoint.spec
    if options.target not in TARGETS:
        raise UsageError(f"target={options.target}", "one of " + ", ".join(TARGETS))
    if options.target == "cuda":
        check_cuda_shapes(spec)
    if options.target == "cpu":
        check_cpu_shapes(spec, options.quantize.kv_cache)
    precision = _precision(checkpoint, options)
    _check_quantize(options.quantize, precision, options.target)
    is_engine = options.target in ENGINE_TARGETS
    dtype = _engine_dtype(spec, precision) if is_engine else COMPUTE_DTYPES.get(options.target, options.dtype)
    if dtype == "auto":
        dtype = spec.dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype={dtype}", "one of auto, float32, bfloat16, float16")
    limit = spec.context_length
    max_length = limit if options.max_length is None else options.max_length
    if not 1 <= max_length <= limit:
        raise UsageError(
            f"max-length={max_length}",
            f"1 to {limit}, the model's context length",
            f"choose a {'smaller' if max_length > limit else 'larger'} --max-length",
        )
    if options.num_workers < 0:
        raise UsageError(f"workers={options.num_workers}", "0 (one a core) or more")
    return Settings(
        options.target,
        precision,
        dtype,
        max_length,
        options.quantize,
        options.gate,
        options.num_workers,
        options.self_contained and not is_engine,
        settle_engine(spec, options.engine, max_length, dtype, options.target) if is_engine else None,
        options.quiet,
    )


def _engine_dtype(spec: ModelSpec, precision: str) -> str:
    """What an engine computes in: its floats', or beside quantized matrices the checkpoint's 16 bits."""
    of_floats = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return of_floats.get(precision, "float16" if spec.dtype == "float16" else "bfloat16")


def _precision(checkpoint: Checkpoint, options: BuildOptions) -> str:
    precision, target = options.precision, options.target
    known = ("auto", *PRECISIONS, *FORMATS)
    if precision not in known:
        raise UsageError(f"precision={precision}", f"one of {', '.join(known)}")
    if target == "portable":
        if checkpoint.quantized:
            raise UsageError(
                f"{checkpoint.path} is quantized",
                "a checkpoint of floats for a portable graph",
                "build a bundle from it: qwen-rt build",
            )
        if precision in FORMATS:
            raise UsageError(
                f"precision={precision} for a portable graph", "a bundle", "quantize it with qwen-rt build"
            )
    if precision == "auto" and checkpoint.quantized:
        return FROM_CHECKPOINT
    if precision in FORMATS:
        return precision
    if target == "cuda":
        if precision not in ("auto", "bf16"):
            raise UsageError(
                f"precision={precision} for target cuda",
                f"bf16, in which its kernels compute, or one of {', '.join(FORMATS)}",
                "leave out --precision, or build with --target cpu",
            )
        return "bf16"
    if precision != "auto":
        return precision
    stored = {checkpoint.tensors[name].dtype for name in checkpoint.spec.parameters()}
    if target in ENGINE_TARGETS:
        return "fp16" if stored == {"F16"} else "bf16"
    return _PRECISION_OF[stored.pop()] if len(stored) == 1 else "fp32"


def _check_quantize(options: QuantizeOptions, precision: str, target: str) -> None:
    """Refuse options of quantization that have nothing to act on, or that no target knows."""
    only_formats = {
        "group_size": options.group_size is not None,
        "asymmetric": not options.symmetric,
        "lm_head": options.lm_head is not None,
        "embedding": options.embedding is not None,
        "overrides": options.overrides is not None,
        "size_budget": options.size_budget is not None,
        "calibrate": options.calibrate is not None and options.kv_cache is None,
    }
    if precision not in FORMATS and any(only_formats.values()):
        flag = "--" + next(name for name, given in only_formats.items() if given).replace("_", "-")
        raise UsageError(f"{flag} without quantization", f"--precision {' or '.join(FORMATS)}", f"leave {flag} out")
    if options.overrides is not None and options.size_budget is not None:
        raise UsageError("--overrides and --size-budget", "one of the two", "put the choices into the overrides")
    if options.write_overrides is not None and options.size_budget is None:
        raise UsageError("--write-overrides without --size-budget", "a budget that chooses", "add --size-budget SIZE")
    if options.kv_cache is not None and options.kv_cache not in KV_FORMATS:
        raise UsageError(f"kv-cache={options.kv_cache}", f"one of auto, {', '.join(KV_FORMATS)}")
    if options.kv_cache is not None and target == "portable":
        raise UsageError("a quantized KV cache in a portable graph", "a bundle", "give --kv-cache to qwen-rt build")
    if options.kv_cache is not None and target in ENGINE_TARGETS:
        raise UsageError(
            f"a {options.kv_cache} KV cache for target {target}, whose KV_CACHE_UPDATE takes 16 or 32 bits",
            "a cache of floats",
            "leave --kv-cache out, or build with --target cuda",
        )
    if options.activations not in _ACTIVATIONS:
        raise UsageError(f"activations={options.activations}", f"one of {', '.join(_ACTIVATIONS)}")
    if options.activations != "float32" and (target != "cpu" or precision not in ("int8", "int4", FROM_CHECKPOINT)):
        expected = "--target cpu with --precision int8 or int4, or --target trtllm with int8"
        raise UsageError("--activations int8", expected, "leave --activations out")
