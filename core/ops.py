"""The table of plugin ops: what each takes and gives. Exporter, bindings, library and tests all read it.

Shapes use symbolic dimensions; a string such as `"q_width + 2 * kv_width"` is a sum of them, each with a factor. The
values of `PluginOp.dims`, in that order, are what a launcher gets, next to one pointer for every input and then every
output and the numbers of the attributes (`plugins/csrc/capi.h`). So a binding that knows its tensors' shapes needs
no code op by op.

| op                         | computes                                                                              |
|----------------------------|---------------------------------------------------------------------------------------|
| `embed`                    | `out = table[ids]`                                                                    |
| `rmsnorm_qkv`              | `qkv = concat(q, k, v)(norm(hidden)) + bias`                                          |
| `rope_kv_append_attention` | rope on q and k, k and v into the paged cache, causal attention of the new tokens     |
| `o_proj_residual`          | `out = residual + o(attention)`                                                       |
| `select_o_proj_residual`   | the same for the rows `indices` only, one of each sequence: in the last layer         |
| `rmsnorm_gate_up_silu`     | `activation = silu(gate(norm(hidden))) · up(norm(hidden))`                            |
| `down_residual`            | `out = residual + down(activation)`                                                   |
| `lm_head`                  | `logits = head(norm(hidden))`                                                         |
| `sample`                   | the next token of every row, and every position moves on by one                       |

A row is a token. The tokens of all sequences of a call lie behind each other, those of a sequence in order of position:
sequence b has the rows `query_starts[b]` to `query_starts[b + 1] - 1`. With `rows == sequences` (a decode step) every
sequence has exactly one, and neither `query_starts` nor `indices` is read; with more rows it is a prefill.

`sample` is greedy with `logits` alone. `penalties` are repetition, frequency and presence. A row that no token can be
chosen from (NaN, +inf, or nothing above -inf) gets -2 in `history`.

Matrices may be quantized, as `qwen_rt.quantization` lays them out: `weight_format`, a number of `WEIGHT_FORMATS`, says
how; the inputs named `scale`, `zero_point` and `perm` are its parts, and the axis `columns` is K, or K/2 for int4. All
matrices of a node are alike. Without a format a matrix is bf16 and has no such parts.

The KV cache may be quantized, as the same module lays it out: `kv_format`, a number of `KV_CACHE_FORMATS`, says how.
Its pools then hold one byte an element, `k_scales` and `v_scales` hold a scale for each token and head, and `k_offset`
and `v_offset` (absent: zero) are what the projections' biases lack: `R(position) · k_offset` is part of every key, and
`v_offset` is added to the output. A scale counts as its pool's slot does: unread where no token is, written with it.
`scale_blocks` is `num_blocks` then, else 0.

An op with a workspace gets device memory behind its tensors: `COUNTER_BYTES` that are zero before the first use and
that every op leaves zero, then scratch. All ops of a graph that run one after another share one. In a graph it is the
node's last input, `workspace: uint8[W]`.
"""

from __future__ import annotations

from qwen_rt.errors import UsageError
from qwen_rt.op_types import (
    BLOCK_SIZE,
    COUNTER_BYTES,
    DOMAIN,
    INT8_ROWS,
    KV_CACHE_FORMATS,
    MAX_ROWS,
    POLYMORPHIC,
    SKINNY_ROWS,
    WEIGHT_FORMATS,
    OpTensor,
    PluginOp,
    shape_of,
)

__all__ = [
    "BLOCK_SIZE",
    "COUNTER_BYTES",
    "DOMAIN",
    "INT8_ROWS",
    "KV_CACHE_FORMATS",
    "MAX_ROWS",
    "OPS",
    "POLYMORPHIC",
    "SKINNY_ROWS",
    "WEIGHT_FORMATS",
    "OpTensor",
    "PluginOp",
    "find_op",
    "shape_of",
]


def _matrix(name: str, *shape: str) -> OpTensor:
    return OpTensor(name, "bf16", shape)


def _weight(name: str, rows: str) -> OpTensor:
    """A matrix of any format."""
    return OpTensor(name, "weight", (rows, "columns"))


def _parts(perm: str | None, **rows: str) -> tuple[OpTensor, ...]:
    """What quantized matrices have besides: prefix of the name → axis of the rows; `perm` is the axis K."""
    scales = tuple(OpTensor(f"{name}scale", "scale", (size, "groups"), optional=True) for name, size in rows.items())
    zeros = tuple(OpTensor(f"{name}zero_point", "zero", (size, "zeros"), optional=True) for name, size in rows.items())
    order = () if perm is None else (OpTensor("perm", "i32", (perm,), optional=True),)
    return scales + zeros + order


_FORMAT = (("weight_format", 0.0),)
_EPSILON = (("epsilon", None), *_FORMAT)
_CACHE = ("num_blocks", "kv_heads", "block_size", "head_dim")
_SCALES = ("scale_blocks", *_CACHE[1:-1])

OPS: tuple[PluginOp, ...] = (
    PluginOp(
        "embed",
        2,
        ("rows", "vocab", "hidden", "groups"),
        (
            OpTensor("ids", "i64", ("rows",)),
            OpTensor("table", "weight", ("vocab", "hidden")),
            OpTensor("scale", "scale", ("vocab", "groups"), optional=True),
        ),
        (_matrix("out", "rows", "hidden"),),
        _FORMAT,
    ),
    PluginOp(
        "rmsnorm_qkv",
        3,
        ("rows", "hidden", "q_width", "kv_width", "groups"),
        (
            _matrix("hidden", "rows", "hidden"),
            _matrix("norm_weight", "hidden"),
            _weight("q_weight", "q_width"),
            _weight("k_weight", "kv_width"),
            _weight("v_weight", "kv_width"),
            OpTensor("q_bias", "bf16", ("q_width",), optional=True),
            OpTensor("k_bias", "bf16", ("kv_width",), optional=True),
            OpTensor("v_bias", "bf16", ("kv_width",), optional=True),
            *_parts("hidden", q_="q_width", k_="kv_width", v_="kv_width"),
        ),
        (_matrix("qkv", "rows", "q_width + 2 * kv_width"),),
        _EPSILON,
        has_workspace=True,
    ),
    PluginOp(
        "rope_kv_append_attention",
        4,
        (
            "rows",
            "q_width",
            "kv_heads",
            "head_dim",
            "num_blocks",
            "block_size",
            "sequences",
            "max_blocks",
            "scale_blocks",
        ),
        (
            _matrix("qkv", "rows", "q_width + 2 * kv_heads * head_dim"),
            OpTensor("positions", "i64", ("rows",)),
            OpTensor("query_starts", "i32", ("sequences + 1",)),
            OpTensor("inv_freq", "f32", ("half_dim",)),
            OpTensor("block_tables", "i32", ("sequences", "max_blocks")),
            OpTensor("k_cache", "cache", _CACHE),
            OpTensor("v_cache", "cache", _CACHE),
            OpTensor("k_scales", "f32", _SCALES, optional=True),
            OpTensor("v_scales", "f32", _SCALES, optional=True),
            OpTensor("k_offset", "f32", ("kv_heads", "head_dim"), optional=True),
            OpTensor("v_offset", "f32", ("kv_heads", "head_dim"), optional=True),
        ),
        (
            _matrix("out", "rows", "q_width"),
            OpTensor("present_k", "cache", _CACHE, alias="k_cache"),
            OpTensor("present_v", "cache", _CACHE, alias="v_cache"),
            OpTensor("present_k_scales", "f32", _SCALES, optional=True, alias="k_scales"),
            OpTensor("present_v_scales", "f32", _SCALES, optional=True, alias="v_scales"),
        ),
        (("scale", None), ("rope_scaling", 1.0), ("max_length", 0.0), ("kv_format", 0.0)),
        has_workspace=True,
    ),
    PluginOp(
        "o_proj_residual",
        3,
        ("rows", "width", "hidden", "groups"),
        (
            _matrix("attention", "rows", "width"),
            _weight("weight", "hidden"),
            _matrix("residual", "rows", "hidden"),
            *_parts("width", **{"": "hidden"}),
        ),
        (OpTensor("out", "bf16", ("rows", "hidden"), alias="residual", may_alias=True),),
        _FORMAT,
        has_workspace=True,
    ),
    PluginOp(
        "select_o_proj_residual",
        2,
        ("rows", "sequences", "width", "hidden", "groups"),
        (
            _matrix("attention", "rows", "width"),
            OpTensor("indices", "i64", ("sequences",)),
            _weight("weight", "hidden"),
            _matrix("residual", "rows", "hidden"),
            *_parts("width", **{"": "hidden"}),
        ),
        (_matrix("out", "sequences", "hidden"),),
        _FORMAT,
        has_workspace=True,
    ),
    PluginOp(
        "rmsnorm_gate_up_silu",
        3,
        ("rows", "hidden", "ffn", "groups"),
        (
            _matrix("hidden", "rows", "hidden"),
            _matrix("norm_weight", "hidden"),
            _weight("gate_weight", "ffn"),
            _weight("up_weight", "ffn"),
            *_parts("hidden", gate_="ffn", up_="ffn"),
        ),
        (_matrix("activation", "rows", "ffn"),),
        _EPSILON,
        has_workspace=True,
    ),
    PluginOp(
        "down_residual",
        3,
        ("rows", "ffn", "hidden", "groups"),
        (
            _matrix("activation", "rows", "ffn"),
            _weight("weight", "hidden"),
            _matrix("residual", "rows", "hidden"),
            *_parts("ffn", **{"": "hidden"}),
        ),
        (OpTensor("out", "bf16", ("rows", "hidden"), alias="residual", may_alias=True),),
        _FORMAT,
        has_workspace=True,
    ),
    PluginOp(
        "lm_head",
        4,
        ("rows", "hidden", "vocab", "groups"),
        (
            _matrix("hidden", "rows", "hidden"),
            _matrix("norm_weight", "hidden"),
            _weight("weight", "vocab"),
            *_parts("hidden", **{"": "vocab"}),
        ),
        (OpTensor("logits", "f32", ("rows", "vocab")),),
        _EPSILON,
    ),
    PluginOp(
        "sample",
        2,
        ("rows", "vocab", "slots", "max_edits", "ring"),
        (
            OpTensor("logits", "f32", ("rows", "vocab")),
            OpTensor("positions", "i64", ("rows",), optional=True),
            OpTensor("temperature", "f32", ("rows",), optional=True),
            OpTensor("top_k", "i32", ("rows",), optional=True),
            OpTensor("top_p", "f32", ("rows",), optional=True),
            OpTensor("min_p", "f32", ("rows",), optional=True),
            OpTensor("seeds", "i64", ("rows",), optional=True),
            OpTensor("num_outputs", "i64", ("rows",), optional=True),
            OpTensor("penalties", "f32", ("rows", "3"), optional=True),
            OpTensor("count_slots", "i32", ("rows",), optional=True),
            OpTensor("counts", "i32", ("slots", "vocab"), optional=True),
            OpTensor("edit_ids", "i32", ("rows", "max_edits"), optional=True),
            OpTensor("edit_values", "f32", ("rows", "max_edits"), optional=True),
            OpTensor("edit_until", "i32", ("rows", "max_edits"), optional=True),
            OpTensor("step", "i64", ("1",), optional=True),
        ),
        (
            OpTensor("next_ids", "i64", ("rows",)),
            OpTensor("next_positions", "i64", ("rows",), optional=True, alias="positions"),
            OpTensor("next_num_outputs", "i64", ("rows",), optional=True, alias="num_outputs"),
            OpTensor("next_counts", "i32", ("slots", "vocab"), optional=True, alias="counts"),
            OpTensor("next_step", "i64", ("1",), optional=True, alias="step"),
            OpTensor("history", "i64", ("ring", "rows"), optional=True),
            OpTensor("logprobs", "f32", ("ring", "rows"), optional=True),
            OpTensor("top_ids", "i32", ("ring", "rows", "20"), optional=True),
            OpTensor("top_logprobs", "f32", ("ring", "rows", "20"), optional=True),
        ),
        (("num_tokens", 0.0),),
        has_workspace=True,
    ),
)
"""All ops, in the order of a decode step."""


def find_op(name: str) -> PluginOp:
    """Return the row of an op.

    Raises:
        UsageError: There is no such op.
    """
    for op in OPS:
        if op.name == name:
            return op
    raise UsageError(f"op {name!r}", f"one of {', '.join(op.name for op in OPS)}", "name one of them")
