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

from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.tensor_parallel import Part, parameter_parts
from qwen_rt.spec import ModelSpec

__all__ = ["Target", "layout"]


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


def layout(spec: ModelSpec, tp: int, ffn: int) -> list[Target]:
    """Every tensor of a rank, in the order of a rank's file.

    Args:
        spec: The model.
        tp: Ranks; `check_tp` has passed.
        ffn: Width of the MLP, at least the model's, a multiple of the ranks.
    """
    parts, hidden = parameter_parts(spec, tp, ffn), spec.hidden_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def whole(name: str, source: str, *shape: int) -> Target:
        return Target(name, shape, (parts[source],))

    def rows(name: str, source: str, each: int, is_linear: bool = True) -> Target:
        held = [parts[source].rows(rank) for rank in range(tp)]
        padding = tuple(each - (stop - start) for start, stop in held)
        return Target(name, (each, hidden), (parts[source],), is_linear, padding)

    def columns(name: str, source: str) -> Target:
        return Target(name, (hidden, parts[source].num_columns), (parts[source],), is_linear=True)

    qkv_rows = (q_rows + 2 * max(kv_rows, tp * spec.head_dim)) // tp
    targets = [whole("transformer.vocab_embedding.weight", EMBEDDING, spec.vocab_size, hidden)]
    for layer in range(spec.num_layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.layers.{layer}"

        def qkv(kind: str, prefix: str = ours) -> tuple[Part, ...]:
            return tuple(parts[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv")

        targets.append(whole(f"{theirs}.input_layernorm.weight", f"{ours}.input_layernorm.weight", hidden))
        targets.append(Target(f"{theirs}.attention.qkv.weight", (qkv_rows, hidden), qkv("weight"), is_linear=True))
        if spec.qkv_bias:
            targets.append(Target(f"{theirs}.attention.qkv.bias", (qkv_rows,), qkv("bias")))
        targets.append(columns(f"{theirs}.attention.dense.weight", f"{ours}.self_attn.o_proj.weight"))
        targets.append(whole(f"{theirs}.post_layernorm.weight", f"{ours}.post_attention_layernorm.weight", hidden))
        targets.append(rows(f"{theirs}.mlp.fc.weight", f"{ours}.mlp.gate_proj.weight", ffn // tp))
        targets.append(rows(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.up_proj.weight", ffn // tp))
        targets.append(columns(f"{theirs}.mlp.proj.weight", f"{ours}.mlp.down_proj.weight"))
    targets.append(whole("transformer.ln_f.weight", "model.norm.weight", hidden))
    return [*targets, rows("lm_head.weight", HEAD, -(-spec.vocab_size // tp), is_linear=False)]
