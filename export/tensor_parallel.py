"""Which rows and columns of which parameter a rank of a tensor-parallel model holds, whatever runs it.

| parameter                        | split                                                          |
|----------------------------------|----------------------------------------------------------------|
| embedding, norms                 | none: every rank has them                                      |
| q_proj and its bias              | rows, by heads                                                 |
| k_proj, v_proj and their biases  | rows, by heads; with more ranks than heads each is repeated    |
| o_proj                           | columns, as q_proj's rows                                      |
| gate_proj, up_proj               | rows                                                           |
| down_proj                        | columns, as gate_proj's rows                                   |
| lm_head                          | rows; of a tied model those of the embedding                   |

So a layer needs two sums over the ranks: behind o_proj and behind down_proj.

Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.decoder import HEAD, head_name
from qwen_rt.spec import ModelSpec

__all__ = ["TP_SIZES", "Part", "Span", "check_tp", "parameter_parts"]

TP_SIZES = (1, 2, 4, 8)
"""Ranks that a model can be split over."""


@dataclass(frozen=True)
class Span:
    """Rows `start … stop - 1` of a parameter, which the given ranks hold."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A parameter, or its columns, dealt out to the ranks.

    Attributes:
        name: Hugging Face name of the tensor that holds it.
        spans: Its rows in order; one span of all ranks if its columns are split.
        num_columns: Rank r holds columns `r · num_columns` and on, with zeros where the parameter ends; 0: all columns.
    """

    name: str
    spans: tuple[Span, ...]
    num_columns: int = 0

    def rows(self, rank: int) -> tuple[int, int]:
        """First row of a rank, and the row behind its last; both 0 if it has none."""
        return next(((span.start, span.stop) for span in self.spans if rank in span.ranks), (0, 0))


def check_tp(spec: ModelSpec, tp: int) -> None:
    """Refuse a number of ranks that the heads or the MLP cannot be split over.

    Raises:
        UsageError: Not 1, 2, 4 or 8, or something that it does not divide.
    """
    if tp not in TP_SIZES:
        raise UsageError(f"tp={tp}", f"one of {', '.join(map(str, TP_SIZES))}")
    fits = [size for size in TP_SIZES if _fits(spec, size)]
    if tp not in fits:
        raise UsageError(
            f"tp={tp} with {spec.num_heads} query heads, {spec.num_kv_heads} key/value heads and an MLP of "
            f"{spec.intermediate_size}",
            "a number that divides query heads and MLP, and key/value heads or is a multiple of them",
            f"choose --tp {' or '.join(map(str, fits))}",
        )


def _fits(spec: ModelSpec, tp: int) -> bool:
    shared = spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0
    return spec.num_heads % tp == 0 and spec.intermediate_size % tp == 0 and shared


def parameter_parts(spec: ModelSpec, tp: int, ffn: int) -> dict[str, Part]:
    """How every parameter is dealt out.

    Args:
        spec: The model.
        tp: Ranks; `check_tp` has passed.
        ffn: Width of the MLP, at least the model's, a multiple of the ranks; what is beyond the model's is zeros.

    Returns:
        Hugging Face name → its part. The LM head is there in a tied model too; the last rank may be short of rows.
    """
    width, hidden, everyone = spec.head_dim, spec.hidden_size, tuple(range(tp))
    q_rows = spec.num_heads * width
    heads = {"q": _dealt(q_rows, q_rows // tp, tp), "k": _kv_spans(spec, tp), "v": _kv_spans(spec, tp)}
    found = {}
    for name, shape in spec.parameters().items():
        module, kind = name.rsplit(".", 2)[-2:]
        if module.endswith("_proj") and module[0] in heads and module[1] == "_":
            found[name] = Part(name, heads[module[0]])
        elif module in ("gate_proj", "up_proj"):
            found[name] = Part(name, _dealt(spec.intermediate_size, ffn // tp, tp))
        elif module in ("o_proj", "down_proj") and kind == "weight":
            size = q_rows if module == "o_proj" else ffn
            found[name] = Part(name, (Span(0, hidden, everyone),), num_columns=size // tp)
        else:
            found[name] = Part(name, (Span(0, shape[0], everyone),))
    return found | {HEAD: Part(head_name(spec), _dealt(spec.vocab_size, -(-spec.vocab_size // tp), tp))}


def _kv_spans(spec: ModelSpec, tp: int) -> tuple[Span, ...]:
    """Rows of k or v: dealt out, or each head repeated on the ranks whose query heads read it."""
    width = spec.head_dim
    if spec.num_kv_heads >= tp:
        num_rows = spec.num_kv_heads * width
        return _dealt(num_rows, num_rows // tp, tp)
    repeats = tp // spec.num_kv_heads
    return tuple(
        Span(head * width, (head + 1) * width, tuple(range(head * repeats, (head + 1) * repeats)))
        for head in range(spec.num_kv_heads)
    )


def _dealt(num_rows: int, each: int, tp: int) -> tuple[Span, ...]:
    """Deal out rows, `each` to a rank as far as they go."""
    bounds = [(min(rank * each, num_rows), min((rank + 1) * each, num_rows)) for rank in range(tp)]
    return tuple(Span(start, stop, (rank,)) for rank, (start, stop) in enumerate(bounds) if stop > start)
