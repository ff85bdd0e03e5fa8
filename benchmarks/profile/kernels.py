"""From the kernels that ran to the ops that they belong to: by name, and by their order in a step.

A step is read as a text with a letter for every kernel, and each op as a regular expression over such letters; the
expressions of a step's ops behind each other match the text in one way. Copies, fills and kernels of nobody we know
stay outside the text and are an op of their own, `other`.

| letter | kernels                                                            |
|--------|--------------------------------------------------------------------|
| `e`    | `embed_kernel`                                                     |
| `a`    | attention, and writing the cache before it                         |
| `S` `s`| `skinny_gemm` and its int4 kernels, with and without a norm        |
| `x` `w`| rows prepared for the next, and 8-bit kernels that take either     |
| `r` `g`| columns in another order, rows of their own, before a product      |
| `n` `q`| a prefill's norm, and rows rounded to fp8 without one              |
| `d` `m`| a slab of a matrix in bf16, a product of cuBLASLt                  |
| `i`    | scales on a slab of integer products                               |
| `t`    | a product of many rows in fp8, of gate and up with SiLU at its end |
| `u`    | SiLU of a prefill's gate and up                                    |
| `p`    | sampling                                                           |
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["demangle", "letter_of", "ops_of_kernels", "ops_of_step", "short_name"]

_OURS = "qwen_rt"
_LETTERS = (
    ("e", r"embed_kernel"),
    ("S", r"skinny_gemmI(?:(?!Lb).)*Lb1E"),  # the first flag of the template is the norm
    ("S", r"skinny_int4_\w+ILb1E"),
    ("s", r"skinny_gemm|skinny_int4"),
    ("x", r"prepare_rows"),
    ("w", r"wide_gemm|skinny_8bit_few"),
    ("t", r"tile_gemm_kernel"),
    ("a", r"attention_\w*kernel|prefill_append|dequantize_cache"),
    ("r", r"reorder_kernel"),
    ("g", r"gather_kernel"),
    ("n", r"row_kernelI(?:(?!Lb).)*Lb1E"),
    ("q", r"row_kernel"),
    ("d", r"dequantize_kernel"),
    ("i", r"finish_integers_kernel"),
    ("u", r"gate_(?:integers_)?kernel"),
    ("p", r"(?:greedy|choose|edit|logprob|select|mass)_kernel"),
)
_LIBRARY = re.compile(r"nvjet|gemm|cutlass|splitK|cublas|xmma", re.IGNORECASE)
_PRODUCT = "(?:[dmi]*[mi]|t)"
_EITHER = "xwxw|x?w"  # more than 32 rows of int8 go in two
_PATTERNS = {
    "embed": "e",
    "rmsnorm_qkv": f"r?S+|{_EITHER}|n{_PRODUCT}",
    "rope_kv_append_attention": "a+",
    "o_proj_residual": f"r?s+|{_EITHER}|q?{_PRODUCT}",
    "select_o_proj_residual": f"g?r?s+|g?(?:{_EITHER})|g?q?{_PRODUCT}",
    "rmsnorm_gate_up_silu": f"r?S+|{_EITHER}|n(?:(?:{_PRODUCT}u)+|t)",
    "down_residual": f"r?s+|{_EITHER}|q?{_PRODUCT}",
    "lm_head": f"r?S+|{_EITHER}",
    "sample": "p+",
}


def letter_of(name: str) -> str | None:
    """Return the letter of a kernel by its mangled name; None: not one of a step's."""
    if _OURS in name:
        return next((letter for letter, pattern in _LETTERS if re.search(pattern, name)), None)
    return "m" if _LIBRARY.search(name) else None


def ops_of_step(num_layers: int, *, samples: bool = True) -> tuple[str, ...]:
    """Return the ops of a step in the order in which they run.

    Args:
        num_layers: L.
        samples: Whether `sample` is the last: in a decode step and at a prompt's end.
    """
    layer = ("rmsnorm_qkv", "rope_kv_append_attention", "o_proj_residual", "rmsnorm_gate_up_silu", "down_residual")
    last = tuple("select_o_proj_residual" if op == "o_proj_residual" else op for op in layer)
    return ("embed", *layer * (num_layers - 1), *last, "lm_head", *(("sample",) if samples else ()))


@functools.lru_cache(maxsize=8)
def _expression(ops: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("".join(f"({_PATTERNS[op]})" for op in ops))


def ops_of_kernels(names: Sequence[str], ops: tuple[str, ...]) -> list[int | None] | None:
    """Return for every kernel of a step the place of its op among the step's.

    Args:
        names: Mangled names in the order in which the kernels began.
        ops: Of `ops_of_step`.

    Returns:
        A place in `ops` each, None for `other`; None if the kernels are not those of such a step: some are missing.
    """
    letters = [letter_of(name) for name in names]
    found = _expression(ops).fullmatch("".join(letter for letter in letters if letter is not None))
    if found is None:
        return None
    places: list[int] = []
    for index in range(len(ops)):
        places += [index] * len(found[index + 1])
    taken = iter(places)
    return [None if letter is None else next(taken) for letter in letters]


@functools.cache
def _demangler() -> Any:
    """libstdc++, which ONNX Runtime brings; None without it."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        library.__cxa_demangle.restype = ctypes.c_void_p
        library.free.argtypes = (ctypes.c_void_p,)
        return library
    except (OSError, AttributeError):
        return None


@functools.lru_cache(maxsize=4096)
def demangle(name: str) -> str:
    """Return a kernel's name as in the source, without our namespace and arguments; `name` if it cannot be read."""
    library = _demangler()
    if library is None or not name.startswith("_Z"):
        return name
    status = ctypes.c_int()
    text = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if not text:
        return name
    plain = ctypes.string_at(text).decode(errors="replace")
    library.free(text)
    plain = "".join(_outside_arguments(plain.removeprefix("void ")))
    return plain.replace("(anonymous namespace)::", "").replace(f"{_OURS}::", "")


def _outside_arguments(text: str) -> Iterator[str]:
    """Yield the characters before the parameter list: the first `(` outside of `<>` that opens no `(anonymous …)`."""
    depth = 0
    for at, character in enumerate(text):
        if character == "(" and depth == 0 and not text.startswith("(anonymous", at):
            return
        depth += {"<": 1, ">": -1}.get(character, 0)
        yield character


def short_name(name: str) -> str:
    """Return a kernel's name without its template's arguments: what fits on a track."""
    return demangle(name).split("<")[0].split("::")[-1]
