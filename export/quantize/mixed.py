"""Mixed precision under a size budget: every unit in the base scheme, the most sensitive ones raised above it.

    choice = choose_mixed(rows, spec, token_ids, base, budget_bytes)
    schemes = {name: scheme for name, scheme in choice.schemes.items() if scheme is not None}
    to_toml(choice)                                       # the same for --overrides, to edit and use again

`sensitivity.py` measures what each unit (q, k and v; o; gate and up; down) in each scheme does to the output of its
layer. Errors of different units are about independent, so their squares add, and the choice is

    minimize Σ error²    subject to    Σ bytes ≤ budget,    one scheme for each unit

Greedy: the raise that takes away most error² for a byte, again and again while one fits. Up to the first raise that is
passed over for its size, no choice of the same size is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.decoder import HEAD, head_name
from qwen_rt.export.quantize.forward import UNITS, matrix_names
from qwen_rt.export.quantize.sensitivity import Sensitivity
from qwen_rt.export.quantize.texts import cut_texts
from qwen_rt.progress import format_count, track
from qwen_rt.quantization import DEFAULT_SCHEMES, Scheme, check_scheme
from qwen_rt.row_reader import RowSource
from qwen_rt.safetensors_header import BYTES_OF_DTYPE
from qwen_rt.spec import ModelSpec

__all__ = [
    "MAX_TOKENS",
    "MixedChoice",
    "MixedOption",
    "MixedUnit",
    "choose_mixed",
    "raise_greedily",
    "stored_bytes",
    "to_toml",
]

MAX_TOKENS = 256
"""Of the text, at most; the activations of 72B's branches take a gigabyte then."""

_FLOAT = "bf16"
_HEAD_UNIT = "lm_head"
_FINE_GROUP = 32
_DIGITS = 4

_Sizes = list[tuple[Scheme | None, int]]


@dataclass(frozen=True)
class MixedOption:
    """One way to store a unit.

    Attributes:
        scheme: None for floats.
        nbytes: Of all its matrices, scales and all.
        error: What it does to the layer's output, relative.
    """

    scheme: Scheme | None
    nbytes: int
    error: float


@dataclass(frozen=True)
class MixedUnit:
    """A unit, and what was chosen for it.

    Attributes:
        layer: None for the LM head.
        unit: `qkv`, `o`, `gate_up`, `down` or `lm_head`.
        names: Its matrices.
        options: The base scheme first, then larger ones.
        chosen: Index of the option that was chosen.
    """

    layer: int | None
    unit: str
    names: tuple[str, ...]
    options: tuple[MixedOption, ...]
    chosen: int = 0

    @property
    def choice(self) -> MixedOption:
        """The chosen option."""
        return self.options[self.chosen]


@dataclass(frozen=True)
class MixedChoice:
    """A scheme for every unit.

    Attributes:
        base: What the others are raised above.
        units: In the order of the model, the LM head last if it took part.
        budget_bytes: What was allowed.
        stored_bytes: What the layers' matrices and the LM head take.
        num_tokens: Tokens that the errors were measured on.
    """

    base: Scheme
    units: tuple[MixedUnit, ...]
    budget_bytes: int
    stored_bytes: int
    num_tokens: int

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """Matrix → scheme, None where it stays as it is."""
        return {name: unit.choice.scheme for unit in self.units for name in unit.names}

    @property
    def error(self) -> float:
        """Root of the sum of the squared errors: what to expect of the whole."""
        return float(sum(unit.choice.error**2 for unit in self.units) ** 0.5)

    @property
    def report(self) -> dict[str, Any]:
        """JSON-ready: sizes, errors, and a row for each unit."""
        base_error = sum(unit.options[0].error ** 2 for unit in self.units) ** 0.5
        rows = [
            {
                "layer": unit.layer,
                "unit": unit.unit,
                "chosen": _called(unit.choice.scheme),
                "bytes": unit.choice.nbytes,
                "errors": {_called(option.scheme): _short(option.error) for option in unit.options},
            }
            for unit in self.units
        ]
        return {
            "base": str(self.base),
            "budget_bytes": self.budget_bytes,
            "stored_bytes": self.stored_bytes,
            "num_tokens": self.num_tokens,
            "error_of_base": _short(base_error),
            "error": _short(self.error),
            "units": rows,
        }


def choose_mixed(
    rows: RowSource,
    spec: ModelSpec,
    token_ids: Sequence[Sequence[int]],
    base: Scheme,
    budget_bytes: int,
    candidates: Sequence[Scheme | None] | None = None,
    *,
    head: bool = False,
    head_scheme: Scheme | None = None,
    float_bytes: int = 2,
    max_tokens: int = MAX_TOKENS,
    quiet: bool = True,
) -> MixedChoice:
    """Measure every unit in every scheme and choose one each.

    Args:
        rows: The model's parameters.
        spec: The model.
        token_ids: Texts, as tokens; of more than `max_tokens` some windows are chosen.
        base: What every unit starts in.
        budget_bytes: What the layers' matrices and the LM head may take together; embeddings and vectors do not count.
            A tied head counts as if it were stored: it is read like one.
        candidates: What a unit may be raised to, None for floats; those that are no larger than the base, or do not
            fit a matrix, are left out for it. Without any: floats, for int4 also int8, and int4 in smaller groups.
        head: Let the LM head take part.
        head_scheme: What it is stored in if it does not.
        float_bytes: Size of a float.
        max_tokens: How many tokens to run at most.
        quiet: Report no progress on stderr.

    Returns:
        The choice; equal arguments give an equal one.

    Raises:
        UsageError: A budget too small for the base or larger than everything needs; a base that does not fit a matrix;
            no tokens, or one outside the vocabulary.
        CheckpointError: Weights or activations that are not finite.
    """
    if candidates is None:
        candidates = _default_candidates(base)
    source = head_name(spec)
    units: list[tuple[int | None, str, tuple[str, ...]]] = [
        (layer, unit, matrix_names(layer, unit)) for layer in range(spec.num_layers) for unit in UNITS
    ]
    if head:
        units.append((None, _HEAD_UNIT, (HEAD,)))
    sizes = [
        _sizes(names, [rows.shape(source if name == HEAD else name) for name in names], base, candidates, float_bytes)
        for _, _, names in units
    ]
    kept_bytes = 0 if head else stored_bytes(head_scheme, rows.shape(source), float_bytes)
    _check_budget(budget_bytes, kept_bytes, sizes, base, candidates)
    texts = cut_texts(token_ids, max_tokens)
    errors = _measure(Sensitivity(rows, spec, texts), spec.num_layers, sizes, quiet)
    found = [
        MixedUnit(
            layer, unit, names, tuple(MixedOption(scheme, nbytes, error.get(scheme, 0.0)) for scheme, nbytes in options)
        )
        for (layer, unit, names), options, error in zip(units, sizes, errors, strict=True)
    ]
    chosen = raise_greedily(found, budget_bytes - kept_bytes - sum(unit.choice.nbytes for unit in found))
    total = kept_bytes + sum(unit.choice.nbytes for unit in chosen)
    return MixedChoice(base, tuple(chosen), budget_bytes, total, texts.num_tokens)


def _default_candidates(base: Scheme) -> tuple[Scheme | None, ...]:
    """Smaller groups cost an eighth of what int8 does, and take away more error for a byte where little is left."""
    if base.format != "int4":
        return (None,)
    return Scheme("int4", _FINE_GROUP, base.symmetric), DEFAULT_SCHEMES["int8"], None


def _measure(
    sensitivity: Sensitivity, num_layers: int, sizes: Sequence[_Sizes], quiet: bool
) -> list[dict[Scheme | None, float]]:
    """Scheme → error for each unit, those of the layers first and the head last."""
    found: list[dict[Scheme | None, float]] = []
    rounded = [[scheme for scheme, _ in options if scheme is not None] for options in sizes]
    for layer in track(range(num_layers), "measuring precisions", quiet=quiet):
        first = layer * len(UNITS)
        schemes = dict(zip(UNITS, rounded[first : first + len(UNITS)], strict=True))
        errors = sensitivity.next_layer(schemes)
        found += [{scheme: errors[unit, scheme] for scheme in schemes[unit]} for unit in UNITS]
    if len(found) < len(sizes):
        found.append(dict(sensitivity.head(HEAD, rounded[-1]).items()))
    return found


def to_toml(choice: MixedChoice) -> str:
    """Write a choice as a file for `--overrides`, one line for each matrix, with the unit's error beside the first."""
    lines = [
        f"# {choice.stored_bytes:,} bytes of {choice.budget_bytes:,}; relative error {choice.error:.3g}.",
        "# Beside each unit: what its precision does to the output of its layer.",
    ]
    for unit in choice.units:
        scheme = unit.choice.scheme
        if scheme is None:
            value = f'"{_FLOAT}"'
        else:
            symmetric = "" if scheme.symmetric else ", symmetric = false"
            value = f'{{ precision = "{scheme.format}", group_size = {scheme.group_size}{symmetric} }}'
        for name in unit.names:
            note = f"  # {unit.choice.error:.3g}" if name == unit.names[0] else ""
            lines.append(f'"{name.removesuffix(".weight")}" = {value}{note}')
    return "\n".join(lines) + "\n"


def stored_bytes(scheme: Scheme | None, shape: tuple[int, ...], float_bytes: int = 2) -> int:
    """Bytes of a matrix [N, K] in a scheme, with its scales; None for floats."""
    if scheme is None:
        return float_bytes * int(np.prod(shape, dtype=np.int64))
    return sum(BYTES_OF_DTYPE[dtype] * int(np.prod(size)) for dtype, size in scheme.parts(shape).values())


def _sizes(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    base: Scheme,
    candidates: Sequence[Scheme | None],
    float_bytes: int,
) -> _Sizes:
    """What a unit can be stored in, and its bytes: the base, then those candidates that are larger, by size."""

    def size(scheme: Scheme | None) -> int:
        return sum(stored_bytes(scheme, shape, float_bytes) for shape in shapes)

    for name, shape in zip(names, shapes, strict=True):
        check_scheme(name, shape, base)
    least = size(base)
    fitting = [scheme for scheme in dict.fromkeys(candidates) if scheme is None or _fits(scheme, shapes)]
    larger = [(scheme, size(scheme)) for scheme in fitting if size(scheme) > least]
    return [(base, least), *sorted(larger, key=lambda option: option[1])]


def _fits(scheme: Scheme, shapes: Sequence[tuple[int, ...]]) -> bool:
    try:
        for shape in shapes:
            check_scheme("", shape, scheme)
    except UsageError:
        return False
    return True


def _check_budget(
    budget: int, kept_bytes: int, sizes: Sequence[_Sizes], base: Scheme, candidates: Sequence[Scheme | None]
) -> None:
    least = kept_bytes + sum(options[0][1] for options in sizes)
    most = kept_bytes + sum(options[-1][1] for options in sizes)
    shown = f"--size-budget of {format_count(budget, 'B')} ({budget:,} bytes)"
    if budget < least:
        raise UsageError(
            f"{shown} does not hold the matrices and the LM head in {base}",
            f"at least {format_count(least, 'B')} ({least:,})",
            "raise it, choose a lower --precision, or quantize the LM head with --lm-head",
        )
    if budget > most:
        best = _FLOAT if None in candidates else "the highest precision"
        raise UsageError(
            f"{shown} holds all matrices and the LM head in {best}",
            f"at most {format_count(most, 'B')} ({most:,})",
            f"build with --precision {best}" if best == _FLOAT else "leave it out and choose a higher --precision",
        )


def raise_greedily(units: Sequence[MixedUnit], left: int) -> list[MixedUnit]:
    """Raise units while `left` bytes hold out; of equal gains the earlier unit's comes first."""
    chosen = [0] * len(units)
    while True:
        best, most = None, 0.0
        for index, unit in enumerate(units):
            now = unit.options[chosen[index]]
            for number, option in enumerate(unit.options):
                more = option.nbytes - now.nbytes
                if 0 < more <= left:
                    gain = (now.error**2 - option.error**2) / more
                    if gain > most:
                        best, most = (index, number, more), gain
        if best is None:
            return [
                MixedUnit(unit.layer, unit.unit, unit.names, unit.options, number)
                for unit, number in zip(units, chosen, strict=True)
            ]
        index, number, more = best
        chosen[index], left = number, left - more


def _called(scheme: Scheme | None) -> str:
    return _FLOAT if scheme is None else str(scheme)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
