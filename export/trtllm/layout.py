"""Which part of which parameter a rank of a TensorRT-LLM checkpoint holds, and under which name.

| tensor of a rank (below `transformer.layers.N.` unless whole)   | made of              | split                      |
|------------------------------------------------------------------|----------------------|----------------------------|
| `transformer.vocab_embedding.weight`                             | embed_tokens         | none: every rank has it    |
| `input_layernorm.weight`, `post_layernorm.weight`                | the layer's norms    | none                       |
| `attention.qkv.weight`, `attention.qkv.bias`                     | q, k, v, in order    | heads                      |
| `attention.dense.weight`                                         | o_proj               | columns                    |
| `mlp.fc.weight`                                                  | gate_proj            | rows                       |
| `mlp.gate.weight`                                                | up_proj              | rows                       |
| `mlp.proj.weight`                                                | down_proj            | columns                    |
| `transformer.ln_f.weight`                                        | norm                 | none                       |
| `lm_head.weight`                                                 | lm_head              | rows, zeros behind them    |

The gated MLP of TensorRT-LLM computes `proj(silu(fc(x)) · gate(x))`: what Hugging Face calls gate_proj is `fc` there.
With more ranks than key/value heads each head is repeated on as many neighbouring ranks as share it. Where a width of
the MLP does not suit a format it is made larger with zeros, which changes nothing: silu(0) · 0 = 0.

Source: TensorRT-LLM 1.2, `models/qwen/model.py`, `models/qwen/convert.py`, `layers/mlp.py` and
`docs/source/architecture/checkpoint.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_rt.errors import UsageError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.spec import ModelSpec

__all__ = ["TP_SIZES", "Part", "Span", "Target", "check_tp", "layout"]

TP_SIZES = (1, 2, 4, 8)
"""Ranks that a checkpoint can be split over."""


@dataclass(frozen=True)
class Span:
    """Rows `start … stop - 1` of a parameter, which the given ranks hold."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A parameter, or its columns dealt out to the ranks, that a tensor is made of.

    Attributes:
        name: Hugging Face name.
        spans: Its rows in order; one span of all ranks if its columns are split.
        num_columns: Rank r holds columns `r · num_columns` and on, with zeros where the parameter ends; 0: all columns.
    """

    name: str
    spans: tuple[Span, ...]
    num_columns: int = 0


@dataclass(frozen=True)
class Target:
    """A tensor that every rank has, of the same shape.

    Attributes:
        name: Its name in a rank's file.
        shape: On each rank.
        parts: What stands in it, one behind the other.
        is_linear: A matrix of a layer, which a precision may quantize.
        padding: Rows of zeros at its end, for each rank; even where pairs of rows share bytes. Empty for none.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_linear: bool = False
    padding: tuple[int, ...] = ()


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


def layout(spec: ModelSpec, tp: int, ffn: int) -> list[Target]:
    """Every tensor of a rank, in the order of a rank's file.

    Args:
        spec: The model.
        tp: Ranks; `check_tp` has passed.
        ffn: Width of the MLP, at least the model's, a multiple of the ranks.
    """
    width, hidden, everyone = spec.head_dim, spec.hidden_size, tuple(range(tp))
    q_rows, kv_rows = spec.num_heads * width, spec.num_kv_heads * width

    def whole(name: str, source: str, shape: tuple[int, ...]) -> Target:
        return Target(name, shape, (Part(source, (Span(0, shape[0], everyone),)),))

    def rows(name: str, source: str) -> Target:
        spans, padding = _dealt(spec.intermediate_size, ffn // tp, tp)
        return Target(name, (ffn // tp, hidden), (Part(source, spans),), is_linear=True, padding=padding)

    def columns(name: str, source: str, size: int) -> Target:
        part = Part(source, (Span(0, hidden, everyone),), num_columns=size // tp)
        return Target(name, (hidden, size // tp), (part,), is_linear=True)

    qkv_rows = (q_rows + 2 * max(kv_rows, tp * width)) // tp
    heads = {"q": _even(q_rows, tp), "k": _kv_spans(spec, tp), "v": _kv_spans(spec, tp)}
    targets = [whole("transformer.vocab_embedding.weight", EMBEDDING, (spec.vocab_size, hidden))]
    for layer in range(spec.num_layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.layers.{layer}"

        def qkv(kind: str, prefix: str = ours) -> tuple[Part, ...]:
            return tuple(Part(f"{prefix}.self_attn.{name}_proj.{kind}", spans) for name, spans in heads.items())

        targets.append(whole(f"{theirs}.input_layernorm.weight", f"{ours}.input_layernorm.weight", (hidden,)))
        targets.append(Target(f"{theirs}.attention.qkv.weight", (qkv_rows, hidden), qkv("weight"), is_linear=True))
        if spec.qkv_bias:
            targets.append(Target(f"{theirs}.attention.qkv.bias", (qkv_rows,), qkv("bias")))
        targets.append(columns(f"{theirs}.attention.dense.weight", f"{ours}.self_attn.o_proj.weight", q_rows))
        targets.append(whole(f"{theirs}.post_layernorm.weight", f"{ours}.post_attention_layernorm.weight", (hidden,)))
        targets.append(rows(f"{theirs}.mlp.fc.weight", f"{ours}.mlp.gate_proj.weight"))
        targets.append(rows(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.up_proj.weight"))
        targets.append(columns(f"{theirs}.mlp.proj.weight", f"{ours}.mlp.down_proj.weight", ffn))
    targets.append(whole("transformer.ln_f.weight", "model.norm.weight", (hidden,)))
    targets.append(_head(spec, tp))
    return targets


def _even(num_rows: int, tp: int) -> tuple[Span, ...]:
    each = num_rows // tp
    return tuple(Span(rank * each, (rank + 1) * each, (rank,)) for rank in range(tp))


def _kv_spans(spec: ModelSpec, tp: int) -> tuple[Span, ...]:
    """Rows of k or v: dealt out, or each head repeated on the ranks whose query heads read it."""
    if spec.num_kv_heads >= tp:
        return _even(spec.num_kv_heads * spec.head_dim, tp)
    repeats, width = tp // spec.num_kv_heads, spec.head_dim
    return tuple(
        Span(head * width, (head + 1) * width, tuple(range(head * repeats, (head + 1) * repeats)))
        for head in range(spec.num_kv_heads)
    )


def _dealt(num_rows: int, each: int, tp: int) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """Deal out rows, `each` to a rank as far as they go: the spans, and how many rows each rank is short of."""
    bounds = [(min(rank * each, num_rows), min((rank + 1) * each, num_rows)) for rank in range(tp)]
    spans = tuple(Span(start, stop, (rank,)) for rank, (start, stop) in enumerate(bounds) if stop > start)
    return spans, tuple(each - (stop - start) for start, stop in bounds)


def _head(spec: ModelSpec, tp: int) -> Target:
    """The LM head, with zeros up to a multiple of the ranks; of a tied model a copy of the embeddings."""
    each = -(-spec.vocab_size // tp)
    spans, padding = _dealt(spec.vocab_size, each, tp)
    part = Part(EMBEDDING if spec.tie_word_embeddings else HEAD, spans)
    return Target("lm_head.weight", (each, spec.hidden_size), (part,), padding=padding)
