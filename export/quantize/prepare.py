"""Everything that is decided about a quantized bundle before its weights are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.bundle import MIXED, PRECISIONS
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import UnsupportedModelError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD, head_name
from qwen_rt.export.portable import QuantizedLocation, WeightLocation
from qwen_rt.export.quantize.calibrate import calibrate
from qwen_rt.export.quantize.forward import UNITS, matrix_names
from qwen_rt.export.quantize.gate_text import file_tokens, gate_tokens
from qwen_rt.export.quantize.kv import KvPlan, choose_kv_offsets
from qwen_rt.export.quantize.mixed import choose_mixed, to_toml
from qwen_rt.export.quantize.pieces import EditedRows, MatrixEdit, quantized_piece, stored_piece, vector_piece
from qwen_rt.export.quantize.plan import SchemeOptions, layer_matrices, plan_schemes
from qwen_rt.export.settings import FROM_CHECKPOINT, QuantizeOptions
from qwen_rt.export.weights import Piece, float_piece
from qwen_rt.quantization import FORMATS, Scheme, part_name
from qwen_rt.row_reader import CheckpointRows, RowSource
from qwen_rt.safetensors_header import BYTES_OF_DTYPE
from qwen_rt.spec import ModelSpec
from qwen_rt.storage import atomic_write_bytes

__all__ = ["Prepared", "pieces_of", "prepare", "quantized_locations"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is stored how.

    Attributes:
        spec: The model.
        rows: Parameters of the checkpoint, as float32.
        edited: The same as the bundle computes with them: scaled by calibration, which changes nothing but rounding.
        schemes: Name of each quantized matrix → its scheme. `lm_head.weight` of a tied model may be among them.
        stored: Those that are taken from the checkpoint as it stores them.
        edits: Matrix → what a calibration multiplies it by, and what counts when it is rounded.
        vectors: Name → new elements, of vectors that a calibration changes.
        kv: Offsets of a quantized cache; None without one.
        method: How the numbers came about, one of `manifest_quantization.METHODS`.
        report: What was measured, for the manifest.
    """

    spec: ModelSpec
    rows: CheckpointRows
    edited: RowSource
    schemes: Mapping[str, Scheme]
    stored: frozenset[str] = frozenset()
    edits: Mapping[str, MatrixEdit] = field(default_factory=dict)
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    kv: KvPlan | None = None
    method: str = "rtn"
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_own_head(self) -> bool:
        """Whether a tied model gets a head beside its embeddings."""
        return self.spec.tie_word_embeddings and HEAD in self.schemes

    def source_name(self, name: str) -> str:
        """The parameter that a stored matrix is made of: the embeddings, for the head of a tied model."""
        return EMBEDDING if name == HEAD and self.has_own_head else name

    def precision(self, asked: str) -> str:
        """What the manifest calls the bundle: the one format of the layers' matrices, or `mixed`."""
        formats = {self.schemes[name].format if name in self.schemes else None for name in layer_matrices(self.spec)}
        if formats == {None}:
            return asked
        (only, *others) = formats
        return MIXED if others or only is None else only


def prepare(
    checkpoint: Checkpoint,
    precision: str,
    options: QuantizeOptions,
    target: str,
    quiet: bool = False,
    check: Callable[[Mapping[str, Scheme]], None] | None = None,
) -> Prepared:
    """Decide schemes, scales of a calibration, and offsets of the cache.

    Args:
        checkpoint: The model.
        precision: `fp8`, `int8` or `int4`, `FROM_CHECKPOINT` for matrices as they are stored, or one of floats.
        options: The rest.
        target: Any but `portable`, as in `BuildOptions`.
        quiet: No progress.
        check: Told the schemes as soon as they are known, before what takes long; what it raises ends the build.

    Raises:
        UsageError: Options that do not fit the model or each other.
        CheckpointError: Weights that cannot be quantized.
        UnsupportedModelError: Matrices of the checkpoint that target `cuda` does not take as they are stored.
    """
    rows, spec = CheckpointRows(checkpoint), checkpoint.spec
    report: dict[str, Any] = {}
    schemes: dict[str, Scheme] = {}
    stored: frozenset[str] = frozenset()
    method = "rtn"
    if precision == FROM_CHECKPOINT:
        schemes = {name: matrix.scheme for name, matrix in checkpoint.quantized.items()}
        if EMBEDDING in schemes and not _can_look_up(schemes[EMBEDDING]):
            del schemes[EMBEDDING]  # stored as floats instead
        stored, method = frozenset(schemes), "checkpoint"
        if target == "cuda":
            _check_units(spec.num_layers, schemes, rows)
    elif precision in FORMATS:
        wanted = SchemeOptions(
            precision, options.group_size, options.symmetric, options.lm_head, options.embedding, options.overrides
        )
        schemes = plan_schemes(spec, wanted)
        if check is not None:
            check(schemes)
        if options.size_budget is not None:
            tokens = _texts(checkpoint, options) or [gate_tokens(checkpoint.path, spec)[0]]
            base, head = schemes[layer_matrices(spec)[0]], schemes.get(HEAD, schemes.get(head_name(spec)))
            width = _float_bytes(checkpoint, target)
            mixed = choose_mixed(
                rows, spec, tokens, base, options.size_budget, head_scheme=head, float_bytes=width, quiet=quiet
            )
            schemes |= {name: scheme for name, scheme in mixed.schemes.items() if scheme is not None}
            for name in [name for name, scheme in mixed.schemes.items() if scheme is None]:
                del schemes[name]
            report["mixed"] = mixed.report
            if options.write_overrides is not None:
                atomic_write_bytes(options.write_overrides, to_toml(mixed).encode())
    if check is not None:
        check(schemes)
    edits: dict[str, MatrixEdit] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    hidden = None
    if texts := _texts(checkpoint, options):
        own = {name: scheme for name, scheme in schemes.items() if name not in stored}  # no stored number may change
        found = calibrate(rows, spec, texts, own, quiet=quiet)
        edits, vectors, hidden = found.edits, found.vectors, found.hidden
        report["calibration"] = {"ranges": found.ranges, **found.report}
        method = {"int4": "awq", "int8": "smoothquant"}.get(precision, method)
    edited: RowSource = EditedRows(rows, edits, vectors) if edits or vectors else rows
    kv = None
    if options.kv_cache is not None:
        kv = choose_kv_offsets(edited, spec, options.kv_cache, hidden=hidden, quiet=quiet)
        report["kv_cache"] = kv.summary()
    return Prepared(spec, rows, edited, schemes, stored, edits, vectors, kv, method, report)


def _texts(checkpoint: Checkpoint, options: QuantizeOptions) -> list[list[int]]:
    """Tokens of the calibration text; none without one."""
    if options.calibrate is None:
        return []
    return [file_tokens(checkpoint.path, checkpoint.spec, options.calibrate)]


def _can_look_up(scheme: Scheme) -> bool:
    """Whether rows of a quantized embedding can be looked up."""
    return scheme.format != "int4" and scheme.symmetric and not scheme.permuted


def _check_units(num_layers: int, schemes: Mapping[str, Scheme], rows: CheckpointRows) -> None:
    """Demand one scheme and one order of columns of matrices that a kernel multiplies in one go."""
    for layer in range(num_layers):
        for unit in UNITS:
            first, *others = matrix_names(layer, unit)
            for name in others:
                if schemes.get(name) != schemes.get(first):
                    raise UnsupportedModelError(
                        f"{first} is {schemes.get(first) or 'not quantized'}, {name} {schemes.get(name) or 'is not'}",
                        "one scheme for matrices that read the same input, on target cuda",
                        "build with --target cpu, or with --precision bf16",
                    )
            if first in schemes and schemes[first].permuted:
                _check_order([first, *others], rows)


def _check_order(names: Sequence[str], rows: CheckpointRows) -> None:
    orders = [rows.quantized(name).perm for name in names]
    for name, order in zip(names, orders, strict=True):
        if not np.array_equal(order, orders[0]):  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"the columns of {names[0]} and {name} are ordered differently (act-order)",
                "one order for matrices that read the same input, on target cuda",
                "build with --target cpu, or with --precision bf16",
            )


def _float_dtype(checkpoint: Checkpoint, name: str, target: str, precision: str) -> str:
    """The safetensors dtype of a parameter that a bundle does not quantize: as it is stored, unless told otherwise."""
    if target == "cuda":
        return "BF16"
    held = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "F32"
    return PRECISIONS.get(precision, held)


def _float_bytes(checkpoint: Checkpoint, target: str) -> int:
    """Bytes of an element of a matrix that a quantized bundle keeps as floats; of the widest if they differ."""
    if target != "cpu":
        return 2  # engines compute in 16 bits whatever the checkpoint stores
    names = [*layer_matrices(checkpoint.spec), head_name(checkpoint.spec)]
    return max(BYTES_OF_DTYPE[_float_dtype(checkpoint, name, target, "")] for name in names)


def pieces_of(
    checkpoint: Checkpoint, prepared: Prepared, target: str, precision: str, self_contained: bool
) -> list[Piece]:
    """What a quantized bundle stores itself, in the order of the checkpoint.

    Quantized matrices, and of the others: vectors, which are small, whatever the target or the precision wants in
    another dtype, and with `self_contained` all. The rest stays in the checkpoint.

    Args:
        checkpoint: The source.
        prepared: What is stored how.
        target: As in `prepare`.
        precision: As in `prepare`; one of floats is the dtype of everything that is not quantized.
        self_contained: Whether nothing may stay in the checkpoint.
    """
    pieces: list[Piece] = []
    changed = dict(prepared.vectors) | ({} if prepared.kv is None else prepared.kv.tensors())
    changed_dtype = "BF16" if target == "cuda" else "F32"
    parameters = checkpoint.spec.parameters()
    for name, shape in parameters.items():
        scheme = prepared.schemes.get(name)
        if scheme is not None:
            pieces.append(_matrix_piece(checkpoint, prepared, name, scheme))
        elif name in changed:
            pieces.append(vector_piece(name, changed[name], changed_dtype))
        else:
            dtype = _float_dtype(checkpoint, name, target, precision)
            is_held = name in checkpoint.tensors and checkpoint.tensors[name].dtype == dtype
            if len(shape) == 1 or self_contained or name in prepared.edits or not is_held:
                pieces.append(float_piece(prepared.edited, name, dtype))
    if prepared.has_own_head:
        pieces.append(_matrix_piece(checkpoint, prepared, HEAD, prepared.schemes[HEAD]))
    offsets = {name: values for name, values in changed.items() if name not in parameters}
    pieces.extend(vector_piece(name, values, "F32") for name, values in offsets.items())
    return pieces


def quantized_locations(
    schemes: Mapping[str, Scheme], locations: Mapping[str, WeightLocation]
) -> dict[str, QuantizedLocation]:
    """Gather where the parts of each quantized matrix lie."""
    found = {}
    for name, scheme in schemes.items():
        rows, columns = locations[name].shape
        shape = (rows, columns * 2 if scheme.format == "int4" else columns)
        parts = {part: locations[part_name(name, part)] for part in scheme.parts(shape)}
        found[name] = QuantizedLocation(scheme, shape, parts)
    return found


def _matrix_piece(checkpoint: Checkpoint, prepared: Prepared, name: str, scheme: Scheme) -> Piece:
    if name in prepared.stored:
        shape = checkpoint.quantized[name].shape
        return stored_piece(name, scheme, shape, lambda: prepared.rows.quantized(name))
    edit = prepared.edits.get(name)
    importance = None if edit is None else edit.importance
    return quantized_piece(prepared.edited, prepared.source_name(name), scheme, name, importance)
