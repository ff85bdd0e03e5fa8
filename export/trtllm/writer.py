"""One pass over a checkpoint that writes every rank of a TensorRT-LLM checkpoint side by side, in bounded memory.

Each parameter is read once, in blocks of rows; what a rank holds of a block goes to the end of that rank's file. The
folder appears when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwen_rt._version import __version__
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.disk import device_error
from qwen_rt.errors import StorageError, UsageError
from qwen_rt.export.quantize.plan import base_scheme, layer_matrices
from qwen_rt.export.quantize.prepare import Prepared, prepare
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.settings import FROM_CHECKPOINT, QuantizeOptions
from qwen_rt.export.source import Source, open_source, refuse_overlap
from qwen_rt.export.tensor_parallel import Part, Span, check_tp
from qwen_rt.export.trtllm import config, encoding, smoothquant
from qwen_rt.export.trtllm.layout import Target, layout
from qwen_rt.export.weights import BLOCK_BYTES, in_order, one_thread_a_worker
from qwen_rt.progress import progress
from qwen_rt.quantization import FORMATS, Scheme
from qwen_rt.safetensors_header import BYTES_OF_DTYPE, write_header
from qwen_rt.storage import AtomicFile, StagedDirectory, atomic_write_bytes, require_free_space

__all__ = ["MARKER_FILE", "TrtllmOptions", "TrtllmResult", "convert"]

MARKER_FILE = "qwen-rt.json"
"""Says what the folder was made from, with sizes and hashes; `--force` replaces only a folder that has it."""

_FLOATS = {"bf16": "BF16", "fp16": "F16"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TrtllmOptions:
    """What to write.

    Attributes:
        precision: `bf16`, `fp16`, `fp8`, `int8`, `int4`, or `auto` for what the checkpoint holds (floats: fp16 where it
            stores float16, else bf16).
        tp: Ranks: 1, 2, 4 or 8.
        max_length: Positions that the printed command gives an engine; None for the model's context length.
        quantize: `group_size`, `calibrate` and `activations` count; the others have no counterpart and are refused.
        num_workers: Threads that convert; 0 for one a core.
        overwrite: Replace an existing folder of this kind.
        quiet: No progress on stderr.
    """

    precision: str = "auto"
    tp: int = 1
    max_length: int | None = None
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    num_workers: int = 0
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class TrtllmResult:
    """What was written.

    Attributes:
        precision: Of the layers' matrices.
        dtype: Of the rest.
        quant_algo: What TensorRT-LLM calls it; None for floats.
        nbytes: All of the weights' files.
        command: Builds an engine.
    """

    precision: str
    dtype: str
    quant_algo: str | None
    nbytes: int
    command: str


@dataclass(frozen=True)
class _Plan:
    """Options that fit: dtype of floats, precision and scheme of the layers' matrices, width of the MLP as stored."""

    precision: str
    dtype: str
    scheme: Scheme | None
    max_length: int
    ffn: int

    @property
    def quant_algo(self) -> str | None:
        return config.quant_algo(self.precision, self.scheme)


def convert(source: str | Path, out: str | Path, options: TrtllmOptions | None = None) -> TrtllmResult:
    """Write a TensorRT-LLM checkpoint.

    Args:
        source: Checkpoint folder, `nano`, or a portable graph's folder.
        out: Folder to make; it is there when it is whole.
        options: What to write.

    Raises:
        UsageError: Options that do not fit the model, each other, or TensorRT-LLM.
        CheckpointError, UnsupportedModelError: The checkpoint cannot be read or expressed.
        BundleError: A bundle, or a portable graph that is damaged.
        StorageError: The folder cannot be written, or holds what is read; nothing of it stays.
    """
    options, out = options or TrtllmOptions(), Path(out)
    opened = open_source(source)
    plan = _settle(opened.checkpoint, options)
    refuse_overlap(opened, out, options.quantize.files())
    with StagedDirectory(out, overwrite=options.overwrite, marker=MARKER_FILE) as stage:
        try:
            for child in stage.path.iterdir():  # of a killed run: one pass cannot go on in its middle
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            nbytes = _write(opened, plan, options, stage.path)
            stage.commit()
        except Exception as error:
            with contextlib.suppress(StorageError):
                stage.abandon()
            if refused := device_error(error, out):
                raise refused from error
            raise
    command = config.build_command(out, options.tp, plan.max_length)
    return TrtllmResult(plan.precision, _DTYPES[plan.dtype], plan.quant_algo, nbytes, command)


def _settle(checkpoint: Checkpoint, options: TrtllmOptions) -> _Plan:
    """Fill in what was left open, and refuse what does not fit."""
    spec, wanted = checkpoint.spec, options.quantize
    _refuse_options(wanted)
    smoothquant.check_options(options.precision, wanted, bool(checkpoint.quantized))
    check_tp(spec, options.tp)
    config.check_rope(spec)
    limit = spec.context_length
    max_length = limit if options.max_length is None else options.max_length
    if not 1 <= max_length <= limit:
        raise UsageError(f"max-length={max_length}", f"1 to {limit}, the model's context length")
    if options.num_workers < 0:
        raise UsageError(f"workers={options.num_workers}", "0 (one a core) or more")
    precision, dtype = options.precision, "F16" if spec.dtype == "float16" else "BF16"
    scheme = None
    if precision == "auto" and checkpoint.quantized:
        _refuse_without_quantization(wanted, "of a checkpoint that is quantized", "a checkpoint of floats")
        scheme = _stored_scheme(checkpoint, wanted.activations)
        precision = scheme.format
    elif precision == "auto":
        precision = "fp16" if dtype == "F16" else "bf16"
    elif precision in FORMATS and checkpoint.quantized:
        raise UsageError(
            f"precision={precision} of a checkpoint that is quantized", "auto, bf16 or fp16", "leave --precision out"
        )
    elif precision in FORMATS:
        scheme = base_scheme(precision, wanted.group_size)
    elif precision not in _FLOATS:
        raise UsageError(f"precision={precision} for target trtllm", f"one of auto, {', '.join((*_FLOATS, *FORMATS))}")
    if precision in _FLOATS:
        dtype = _FLOATS[precision]
        _refuse_without_quantization(wanted, "without quantization", f"--precision {' or '.join(FORMATS)}")
    if precision == encoding.ROUNDED_BY_BUILDER and wanted.group_size:
        raise UsageError(f"int8 with group_size={wanted.group_size} for target trtllm", "a scale a channel")
    if wanted.activations == "int8":
        smoothquant.check_widths(spec, options.tp)
        return _Plan(precision, dtype, scheme, max_length, smoothquant.ffn_width(spec, options.tp))
    if precision == encoding.ROUNDED_BY_BUILDER:
        scheme = None
    if scheme is not None:
        encoding.check_scheme_fits("a matrix", scheme)
    group_size = 0 if scheme is None else scheme.group_size
    encoding.check_widths(spec, options.tp, precision, group_size)
    ffn = encoding.ffn_width(spec, options.tp, precision, group_size)
    return _Plan(precision, dtype, scheme, max_length, ffn)


def _refuse_without_quantization(options: QuantizeOptions, where: str, expected: str) -> None:
    """Refuse what says how matrices are rounded, where none is."""
    given = {"--calibrate": options.calibrate, "--group-size": options.group_size}
    flag = next((name for name, value in given.items() if value is not None), None)
    if flag is not None:
        raise UsageError(f"{flag} {where}", expected, f"leave {flag} out")


def _refuse_options(options: QuantizeOptions) -> None:
    given = {
        "--asymmetric": not options.symmetric,
        "--lm-head": options.lm_head is not None,
        "--embedding": options.embedding is not None,
        "--overrides": options.overrides is not None,
        "--size-budget": options.size_budget is not None,
        "--write-overrides": options.write_overrides is not None,
        "--kv-cache": options.kv_cache is not None,
    }
    flag = next((name for name, is_given in given.items() if is_given), None)
    if flag is not None:
        raise UsageError(f"{flag} with target trtllm", "one precision for all layers", f"leave {flag} out")


def _stored_scheme(checkpoint: Checkpoint, activations: str) -> Scheme:
    """The one scheme of a quantized checkpoint's layers, which fits."""
    quantized, (first, *others) = checkpoint.quantized, layer_matrices(checkpoint.spec)
    scheme = quantized[first].scheme if first in quantized else None
    for name in others:
        other = quantized[name].scheme if name in quantized else None
        if other != scheme or scheme is None:
            raise UsageError(
                f"{first} in {scheme or 'floats'} and {name} in {other or 'floats'} for target trtllm",
                "one quantized scheme for all layers",
                "build with --precision bf16",
            )
    if scheme is None:
        raise UsageError(f"{first} in floats beside quantized embeddings", "layers", "build with --precision bf16")
    check = smoothquant.check_scheme if activations == "int8" else encoding.check_scheme_fits
    check(first, scheme)
    return scheme


def _write(source: Source, plan: _Plan, options: TrtllmOptions, folder: Path) -> int:
    """Write all files; returns the bytes of the weights."""
    checkpoint = source.checkpoint
    targets = layout(checkpoint.spec, options.tp, plan.ffn)
    tensors = [
        entry
        for target in targets
        for entry in (
            *encoding.tensors_of(target, plan.scheme, plan.dtype),
            *smoothquant.ones_of(target, plan.scheme),
        )
    ]
    header, ranges = write_header(tensors, {"format": "pt"})
    rank_bytes = len(header) + sum(place.nbytes for place in ranges.values())
    require_free_space(folder, rank_bytes * options.tp)
    asked = FROM_CHECKPOINT if checkpoint.quantized and plan.scheme is not None else plan.precision
    prepared = prepare(checkpoint, asked, options.quantize, "trtllm", options.quiet)
    names = [f"rank{rank}.safetensors" for rank in range(options.tp)]
    digests = [hashlib.sha256() for _ in names]
    workers = options.num_workers or os.cpu_count() or 1
    with (
        contextlib.closing(prepared.rows),
        one_thread_a_worker(),
        progress(rank_bytes * options.tp, "weights", unit="B", quiet=options.quiet) as bar,
        ThreadPoolExecutor(workers, "weights") as pool,
        contextlib.ExitStack() as stack,
    ):
        files: list[BinaryIO] = [stack.enter_context(AtomicFile(folder / name)) for name in names]

        def put(rank: int, data: bytes) -> None:
            files[rank].write(data)
            digests[rank].update(data)
            bar.update(len(data))

        for rank in range(options.tp):
            put(rank, header)
        maker = _Maker(prepared, plan, options.tp)
        for target in targets:
            for rank, data in maker.pieces(target, pool):
                put(rank, data)
    dtype = _DTYPES[plan.dtype]
    text = config.trtllm_config(checkpoint.spec, options.tp, dtype, plan.precision, plan.scheme, plan.ffn)
    atomic_write_bytes(folder / "config.json", json.dumps(text, indent=2).encode())
    marker = {
        "format": "qwen-rt-trtllm",
        "version": __version__,
        "trtllm": config.ENGINE_RELEASE,
        "checkpoint": {"path": source.origin, "fingerprint": source.fingerprint},
        "precision": plan.precision,
        "quant_algo": plan.quant_algo,
        "method": None if plan.precision in _FLOATS else prepared.method,
        "files": {
            name: {"nbytes": rank_bytes, "sha256": digest.hexdigest()}
            for name, digest in zip(names, digests, strict=True)
        },
    }
    atomic_write_bytes(folder / MARKER_FILE, json.dumps(marker, indent=2).encode())
    return rank_bytes * options.tp


Pieces = list[tuple[Sequence[int], encoding.Slice]]
"""What a block of rows gives: ranks, and what each of them stores of it."""


class _Maker:
    """Makes the bytes of targets: for each rank in the order of its file, of all ranks side by side."""

    def __init__(self, prepared: Prepared, plan: _Plan, tp: int) -> None:
        self._prepared, self._plan, self._tp = prepared, plan, tp

    def pieces(self, target: Target, pool: Executor) -> Iterator[tuple[int, bytes]]:
        """Yield (rank, bytes) in order; scales are held back until the rows of their matrix have passed."""
        tensors = encoding.tensors_of(target, self._plan.scheme, self._plan.dtype)
        row_bytes = [BYTES_OF_DTYPE[dtype] * math.prod(shape) // target.shape[0] for _, dtype, shape in tensors]
        scales: list[list[bytes]] = [[] for _ in range(self._tp)]
        for block in in_order(pool, self._tasks(target)):
            for ranks, piece in block:
                for rank in ranks:
                    yield rank, piece.weight
                    scales[rank].append(piece.scale)
        for rank, held in enumerate(scales):
            missing = target.padding[rank] if target.padding else 0
            yield rank, bytes(missing * row_bytes[0])
            if len(tensors) > 1:
                yield rank, b"".join(held) + bytes(missing * row_bytes[1])
            for _, _, shape in smoothquant.ones_of(target, self._plan.scheme):
                yield rank, smoothquant.ones_bytes(shape)

    def _tasks(self, target: Target) -> Iterator[Callable[[], Pieces]]:
        make = self._quantized if target.is_linear and self._plan.scheme is not None else self._floats
        for part in target.parts:
            columns = self._prepared.edited.shape(part.name)[1:]
            for span in part.spans:
                count = max(2, BLOCK_BYTES // (4 * math.prod(columns)) // 2 * 2)  # even: int4 packs pairs of rows
                for start in range(span.start, span.stop, count):
                    yield partial(make, part, span, start, min(start + count, span.stop))

    def _floats(self, part: Part, span: Span, start: int, stop: int) -> Pieces:
        rows, width = self._prepared.edited.rows(part.name, start, stop), part.num_columns
        if not width:
            return [(span.ranks, self._slice(part.name, rows))]
        return [((rank,), self._slice(part.name, encoding.cut(rows, rank, width))) for rank in span.ranks]

    def _slice(self, name: str, rows: NDArray[np.float32]) -> encoding.Slice:
        return encoding.Slice(encoding.float_bytes(name, rows, self._plan.dtype))

    def _quantized(self, part: Part, span: Span, start: int, stop: int) -> Pieces:
        name, prepared = part.name, self._prepared
        if name in prepared.stored:
            tensor = prepared.rows.quantized(name).rows(start, stop)
        else:
            edit = prepared.edits.get(name)
            importance = None if edit is None else edit.importance
            rows = prepared.edited.rows(name, start, stop)
            tensor = quantize_rows(name, rows, prepared.schemes[name], start, importance)
        if not part.num_columns:
            return [(span.ranks, encoding.slices(tensor, tensor.shape[1], 1)[0])]
        return [((rank,), piece) for rank, piece in enumerate(encoding.slices(tensor, part.num_columns, self._tp))]
