"""Which matrix is stored in which scheme: from the precision asked for, a file of overrides, and what must agree."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.quantize.forward import UNITS, matrix_names
from qwen_rt.quantization import DEFAULT_SCHEMES, FORMATS, Scheme, check_scheme
from qwen_rt.spec import ModelSpec

__all__ = ["SchemeOptions", "base_scheme", "layer_matrices", "plan_schemes"]


FLOAT = ("bf16", "fp16", "fp32", "none")
_KEYS = {"precision", "group_size", "symmetric"}


@dataclass(frozen=True)
class SchemeOptions:
    """What the user asked for.

    Attributes:
        precision: `fp8`, `int8` or `int4`, of the layers' matrices.
        group_size: Columns that share a scale; None for the format's default.
        symmetric: No zero points.
        lm_head: Precision of the LM head; None leaves it as the checkpoint stores it.
        embedding: Precision of the embeddings, `fp8` or `int8`; None leaves them.
        overrides: TOML file of patterns and precisions, or None.
    """

    precision: str
    group_size: int | None = None
    symmetric: bool = True
    lm_head: str | None = None
    embedding: str | None = None
    overrides: Path | None = None


def base_scheme(precision: str, group_size: int | None = None, symmetric: bool = True) -> Scheme:
    """The scheme of a precision.

    Raises:
        UsageError: No format of that name, or options that it does not have.
    """
    if precision not in FORMATS:
        raise UsageError(f"precision={precision}", f"one of {', '.join(FORMATS)}")
    default = DEFAULT_SCHEMES[precision]
    if not symmetric and precision != "int4":
        raise UsageError(f"zero points with {precision}", "int4", "leave out --asymmetric, or choose int4")
    return Scheme(precision, default.group_size if group_size is None else group_size, symmetric)


def layer_matrices(spec: ModelSpec) -> list[str]:
    """Every matrix of every layer, in the order of the checkpoint."""
    return [name for layer in range(spec.num_layers) for unit in UNITS for name in matrix_names(layer, unit)]


def plan_schemes(spec: ModelSpec, options: SchemeOptions) -> dict[str, Scheme]:
    """Decide the scheme of every matrix that is quantized.

    Returns:
        Name → scheme. `lm_head.weight` may be among them for a tied model too: its head is then stored once more,
        quantized, beside the embeddings.

    Raises:
        UsageError: An unknown precision, a group size that does not divide, a pattern that fits nothing, or q, k and v
            (gate and up) of a layer in different schemes.
    """
    base = base_scheme(options.precision, options.group_size, options.symmetric)
    chosen: dict[str, Scheme | None] = dict.fromkeys(layer_matrices(spec), base)
    chosen[HEAD] = _other(options.lm_head, options, "--lm-head")
    chosen[EMBEDDING] = _other(options.embedding, options, "--embedding")
    if options.overrides is not None:
        _apply(chosen, _read_overrides(options.overrides), options)
    embedding = chosen[EMBEDDING]
    if embedding is not None and embedding.format == "int4":
        raise UsageError("embeddings in int4", "fp8 or int8", "choose another --embedding")
    if spec.tie_word_embeddings and chosen[HEAD] is not None and chosen[HEAD] == chosen[EMBEDDING]:
        chosen[HEAD] = None  # one table serves both
    schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
    shapes = spec.parameters()
    for name, scheme in schemes.items():
        check_scheme(name, shapes[EMBEDDING if name not in shapes else name], scheme)
    _check_units(spec, chosen)
    return schemes


def _other(precision: str | None, options: SchemeOptions, flag: str) -> Scheme | None:
    """The scheme of the LM head or the embeddings."""
    if precision is None or precision in FLOAT:
        return None
    if precision not in FORMATS:
        raise UsageError(f"{flag} {precision}", f"one of {', '.join(('none', *FORMATS))}")
    group_size = options.group_size if precision == options.precision else None
    return base_scheme(precision, group_size, options.symmetric or precision != "int4")


def _read_overrides(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--overrides {path} cannot be read: {error}", "a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--overrides {path} is not TOML: {error}", '"model.layers.0.*" = "bf16"') from None


def _apply(chosen: dict[str, Scheme | None], lines: Mapping[str, Any], options: SchemeOptions) -> None:
    """Let the lines of an override file decide, later ones over earlier ones."""
    for pattern, value in lines.items():
        wanted = value if isinstance(value, dict) else {"precision": value}
        unknown = [key for key in wanted if key not in _KEYS]
        precision = wanted.get("precision")
        if unknown or precision not in (*FLOAT, *FORMATS):
            raise UsageError(
                f"{options.overrides}: {pattern} = {value}",
                f'one of {", ".join((*FLOAT[:3], *FORMATS))}, or {{ precision = "int4", group_size = 64 }}',
                "correct the line",
            )
        names = [name for name in chosen if _fits(name, pattern)]
        if not names:
            raise UsageError(
                f"{options.overrides}: {pattern} fits no matrix",
                'names such as "model.layers.0.mlp.down_proj.weight", with * for any part',
                "correct the pattern",
            )
        group_size, symmetric = wanted.get("group_size"), wanted.get("symmetric", True)
        if (group_size is not None and type(group_size) is not int) or type(symmetric) is not bool:
            raise UsageError(
                f"{options.overrides}: {pattern} = {value}", "group_size an integer, symmetric true or false"
            )
        scheme = None if precision in FLOAT else base_scheme(precision, group_size, symmetric)
        chosen.update(dict.fromkeys(names, scheme))


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern means a matrix; `.weight` may be left out."""
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, name.removesuffix(".weight")))


def _check_units(spec: ModelSpec, chosen: Mapping[str, Scheme | None]) -> None:
    for layer in range(spec.num_layers):
        for unit in UNITS:
            _check_alike(matrix_names(layer, unit), chosen)


def _check_alike(names: Sequence[str], chosen: Mapping[str, Scheme | None]) -> None:
    first = names[0]
    other = next((name for name in names[1:] if chosen[name] != chosen[first]), None)
    if other is not None:
        raise UsageError(
            f"{first} in {chosen[first] or 'bf16'} and {other} in {chosen[other] or 'bf16'}",
            "one precision for all matrices that read the same input (q, k, v; gate, up)",
            "name them all in the overrides",
        )
