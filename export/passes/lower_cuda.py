"""The lowering for our own CUDA kernels: five plugin ops a layer, and a paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.errors import GraphError, UnsupportedModelError
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD, match_decoder
from qwen_rt.export.passes.graph_tools import inline_value
from qwen_rt.export.passes.graph_writer import graph_input
from qwen_rt.export.passes.plugin_node import OPSET_VERSION, plugin_node
from qwen_rt.export.portable import QuantizedLocation, external_value
from qwen_rt.ops import BLOCK_SIZE, DOMAIN, KV_CACHE_FORMATS, WEIGHT_FORMATS
from qwen_rt.quantization import Scheme, key_offset_name, part_name, value_offset_name
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvPlan

__all__ = ["LAST_O_PROJ", "LAYER_OPS", "check_cuda_shapes", "lower_cuda"]

LAYER_OPS = (
    "rmsnorm_qkv",
    "rope_kv_append_attention",
    "o_proj_residual",
    "rmsnorm_gate_up_silu",
    "down_residual",
)
"""The ops of a decoder layer, in order. Before the first layer stands `embed`, after the last `lm_head`. The last layer
has `LAST_O_PROJ` for its `o_proj_residual`: from there on only the rows whose logits are wanted are computed."""

LAST_O_PROJ = "select_o_proj_residual"

_CACHE_DTYPES = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
_POOLS = (tensors.past_key, tensors.past_value), (tensors.present_key, tensors.present_value)
_SCALES = (tensors.past_key_scale, tensors.past_value_scale), (tensors.present_key_scale, tensors.present_value_scale)

_HEAD_DIMS = (64, 128)
_MAX_GROUP = 16
_COLUMNS = 64


def check_cuda_shapes(spec: ModelSpec) -> None:
    """Refuse a model of a shape that the kernels do not take, before a bundle is written that cannot run.

    Raises:
        UnsupportedModelError: head_dim is neither 64 nor 128, more than 16 heads share a key/value head, or a width
            is no multiple of 64. No released Qwen2 is such a model.
    """
    fix = "build with --target cpu"
    if spec.head_dim not in _HEAD_DIMS:
        raise UnsupportedModelError(f"head_dim={spec.head_dim} for target cuda", "64 or 128", fix)
    group = spec.num_heads // spec.num_kv_heads
    if group > _MAX_GROUP:
        raise UnsupportedModelError(
            f"{group} heads on each key/value head for target cuda", f"at most {_MAX_GROUP}", fix
        )
    for name, width in (("hidden_size", spec.hidden_size), ("intermediate_size", spec.intermediate_size)):
        if width % _COLUMNS:
            raise UnsupportedModelError(f"{name}={width} for target cuda", f"a multiple of {_COLUMNS}", fix)


def lower_cuda(
    model: ir.Model,
    spec: ModelSpec,
    max_length: int,
    quantized: Mapping[str, QuantizedLocation] | None = None,
    kv: KvPlan | None = None,
) -> ir.Model:
    """Lower a portable graph to the ops of `qwen_rt.ops`, computing in bfloat16.

        input_ids ─ embed ─ L × ( rmsnorm_qkv ─ rope_kv_append_attention ─ o_proj_residual ─
                                  rmsnorm_gate_up_silu ─ down_residual ) ─ lm_head ─ logits

    In the last layer `select_o_proj_residual` takes the rows of `logits_indices`; what follows has B rows instead of R.

    The new graph is written from the table, not edited out of the old one, which is first held against the spec node
    by node (`match_decoder`): so nothing of it can get lost.

    Args:
        model: A portable graph in any compute dtype, its weights stored as bfloat16; not changed.
        spec: The model's hyperparameters.
        max_length: Positions that the bundle can reach, at least 1.
        quantized: Matrices that are stored quantized, and where; they need no data in `model`.
        kv: Format and offsets of a quantized KV cache; None for one of bfloat16. Its offsets, where a layer has any,
            and what it leaves of the biases of k and v lie in the graph itself.

    Returns:
        A new model with the inputs and outputs of target `cuda` in `qwen_rt.tensors`. Weights are the initializers of
        the old one: external references stay what they are.

    Raises:
        GraphError: The graph is not the portable graph of this model, or a weight is not bfloat16.
    """
    places = dict(quantized or {})
    matched = match_decoder(model, spec)
    weights = {name: _weight(name, value) for name, value in matched.items() if name not in places}
    if kv is not None:
        left = {name: array for name, array in kv.tensors().items() if name in weights}
        weights |= {
            name: inline_value(name, array.astype(ir.DataType.BFLOAT16.numpy())) for name, array in left.items()
        }
    lowered = _Emitter(spec, max_length, weights, {name: Matrix.of(name, at) for name, at in places.items()}, kv).run()
    _check_ops(lowered, spec.num_layers)
    return lowered


def _weight(name: str, value: ir.Value) -> ir.Value:
    """An initializer for the new graph on the same bytes."""
    if value.dtype != ir.DataType.BFLOAT16:
        raise GraphError(f"weight {name} is stored as {value.dtype}", "BFLOAT16", "build with --precision bf16")
    return ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix in the new graph: its scheme, and an initializer for each part."""

    scheme: Scheme
    parts: Mapping[str, ir.Value]

    @classmethod
    def of(cls, name: str, place: QuantizedLocation) -> Matrix:
        """The initializers on the bytes of a stored matrix."""
        return cls(place.scheme, {part: external_value(part_name(name, part), at) for part, at in place.parts.items()})


class _Emitter:
    """Writes the lowered graph."""

    def __init__(
        self,
        spec: ModelSpec,
        max_length: int,
        weights: Mapping[str, ir.Value],
        quantized: Mapping[str, Matrix],
        kv: KvPlan | None,
    ) -> None:
        self.spec, self.max_length, self.weights, self.quantized, self.kv = spec, max_length, weights, quantized, kv
        self.offsets: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.cache_shape = ("blocks", spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        i32, i64, f32 = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
        edges = [
            graph_input(tensors.INPUT_IDS, i64, "R"),
            graph_input(tensors.POSITIONS, i64, "R"),
            graph_input(tensors.QUERY_STARTS, i32, "B + 1"),
            graph_input(tensors.BLOCK_TABLES, i32, "B", "max_blocks"),
            graph_input(tensors.LOGITS_INDICES, i64, "B"),
            graph_input(tensors.WORKSPACE, ir.DataType.UINT8, "W"),
        ]
        cache = ir.DataType.BFLOAT16 if kv is None else _CACHE_DTYPES[kv.kv_format]
        caches: list[ir.Value] = []
        for layer in range(spec.num_layers):
            caches += [graph_input(name(layer), cache, *self.cache_shape) for name in _POOLS[0]]
            if kv is not None:
                caches += [graph_input(name(layer), f32, *self.cache_shape[:-1]) for name in _SCALES[0]]
        self.inputs = {str(value.name): value for value in (*edges, *caches)}
        name = "/model/rotary_emb/inv_freq"
        self.inv_freq = inline_value(name, spec.rope.inv_freq(spec.head_dim).astype(np.float32))

    def run(self) -> ir.Model:
        spec = self.spec
        table, form = self._matrices({"": EMBEDDING}, "table")
        ids = {"ids": self.inputs[tensors.INPUT_IDS]}
        (hidden,) = self._add("embed", "/model/embed_tokens", ids | table, [("R", spec.hidden_size)], form)
        presents: list[ir.Value] = []
        for layer in range(spec.num_layers):
            hidden = self._layer(hidden, layer, presents)
        is_tied = spec.tie_word_embeddings and HEAD not in self.quantized
        head, form = self._matrices({"": EMBEDDING if is_tied else HEAD})
        (logits,) = self._add(
            "lm_head",
            "/lm_head",
            {"hidden": hidden, "norm_weight": self.weights["model.norm.weight"], **head},
            [("B", spec.vocab_size)],
            {"epsilon": spec.rms_norm_eps, **form},
        )
        logits.name = tensors.LOGITS
        graph = ir.Graph(
            list(self.inputs.values()),
            [logits, *presents],
            nodes=self.nodes,
            initializers=[
                *self.weights.values(),
                *(part for matrix in self.quantized.values() for part in matrix.parts.values()),
                self.inv_freq,
                *self.offsets,
            ],
            opset_imports={"": 24, DOMAIN: OPSET_VERSION},
            name="qwen2",
        )
        return ir.Model(graph, ir_version=11, producer_name="qwen-rt")

    def _layer(self, hidden: ir.Value, layer: int, presents: list[ir.Value]) -> ir.Value:
        """One decoder layer; its written caches are added to `presents`."""
        spec, weights = self.spec, self.weights
        name, path = f"model.layers.{layer}", f"/model/layers.{layer}"
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        epsilon = {"epsilon": spec.rms_norm_eps}

        projections, form = self._matrices({f"{letter}_": f"{name}.self_attn.{letter}_proj.weight" for letter in "qkv"})
        if spec.qkv_bias:
            projections |= {f"{letter}_bias": weights[f"{name}.self_attn.{letter}_proj.bias"] for letter in "qkv"}
        norm = weights[f"{name}.input_layernorm.weight"]
        (qkv,) = self._add(
            "rmsnorm_qkv",
            f"{path}/self_attn",
            {"hidden": hidden, "norm_weight": norm, **projections},
            [("R", q_width + 2 * kv_width)],
            epsilon | form,
        )
        attended = self._attention(qkv, layer, presents)
        o_proj, form = self._matrices({"": f"{name}.self_attn.o_proj.weight"})
        attention = {"attention": attended, "residual": hidden, **o_proj}
        is_last = layer == spec.num_layers - 1
        rows = "B" if is_last else "R"
        if is_last:
            attention["indices"] = self.inputs[tensors.LOGITS_INDICES]
        stream = [(rows, spec.hidden_size)]
        op_name = LAST_O_PROJ if is_last else "o_proj_residual"
        (hidden,) = self._add(op_name, f"{path}/self_attn", attention, stream, form)
        gate_up, form = self._matrices({f"{half}_": f"{name}.mlp.{half}_proj.weight" for half in ("gate", "up")})
        norm = weights[f"{name}.post_attention_layernorm.weight"]
        mlp = {"hidden": hidden, "norm_weight": norm, **gate_up}
        width = [(rows, spec.intermediate_size)]
        (activation,) = self._add("rmsnorm_gate_up_silu", f"{path}/mlp", mlp, width, epsilon | form)
        down_proj, form = self._matrices({"": f"{name}.mlp.down_proj.weight"})
        down = {"activation": activation, "residual": hidden, **down_proj}
        (hidden,) = self._add("down_residual", f"{path}/mlp", down, stream, form)
        return hidden

    def _attention(self, qkv: ir.Value, layer: int, presents: list[ir.Value]) -> ir.Value:
        """Attention of a layer over its cache; what it writes is added to `presents`."""
        spec, inputs = self.spec, self.inputs
        given = {
            "qkv": qkv,
            "positions": inputs[tensors.POSITIONS],
            "query_starts": inputs[tensors.QUERY_STARTS],
            "inv_freq": self.inv_freq,
            "block_tables": inputs[tensors.BLOCK_TABLES],
            "k_cache": inputs[tensors.past_key(layer)],
            "v_cache": inputs[tensors.past_value(layer)],
        }
        attributes = {
            "scale": spec.head_dim**-0.5,
            "rope_scaling": spec.rope.attention_scaling,
            "max_length": float(self.max_length),
        }
        width = spec.num_heads * spec.head_dim
        shapes: list[tuple[int | str, ...]] = [("R", width), self.cache_shape, self.cache_shape]
        names = list(_POOLS[1])
        if self.kv is not None:
            given["k_scales"] = inputs[tensors.past_key_scale(layer)]
            given["v_scales"] = inputs[tensors.past_value_scale(layer)]
            given |= self._layer_offsets(self.kv, layer)
            attributes["kv_format"] = float(KV_CACHE_FORMATS[self.kv.kv_format])
            shapes += [self.cache_shape[:-1]] * 2
            names += _SCALES[1]
        path = f"/model/layers.{layer}/self_attn"
        attended, *written = self._add("rope_kv_append_attention", path, given, shapes, attributes)
        for value, present in zip(written, names, strict=True):
            value.name = present(layer)
            presents.append(value)
        return attended

    def _layer_offsets(self, kv: KvPlan, layer: int) -> dict[str, ir.Value]:
        """Offsets of a layer's cache, as inputs of its attention; none where they are zero."""
        plan = kv.layers[layer]
        found = {
            key: inline_value(name, offset)
            for key, name, offset in (
                ("k_offset", key_offset_name(layer), plan.key_offset),
                ("v_offset", value_offset_name(layer), plan.value_offset),
            )
            if offset.any()
        }
        self.offsets += found.values()
        return found

    def _matrices(
        self, names: Mapping[str, str], weight: str = "weight"
    ) -> tuple[dict[str, ir.Value], dict[str, float]]:
        """Inputs and `weight_format` of an op for its matrices: prefix of the input → name of the parameter."""
        schemes = {name: self.quantized[name].scheme if name in self.quantized else None for name in names.values()}
        first, *others = schemes
        for name in others:
            if schemes[name] != schemes[first]:
                raise GraphError(
                    f"{first} is stored as {schemes[first] or 'bf16'}, {name} as {schemes[name] or 'bf16'}",
                    "one format for matrices that read the same input",
                    "name them all in the overrides",
                )
        scheme = schemes[first]
        if scheme is None:
            return {f"{prefix}{weight}": self.weights[name] for prefix, name in names.items()}, {}
        inputs = {}
        for prefix, name in names.items():
            parts = dict(self.quantized[name].parts)
            inputs[f"{prefix}{weight}"] = parts.pop("weight")
            perm = parts.pop("perm", None)
            if perm is not None:
                inputs.setdefault("perm", perm)  # of the first: the build demands that all have the same
            inputs |= {f"{prefix}{part}": value for part, value in parts.items()}
        return inputs, {"weight_format": float(WEIGHT_FORMATS[scheme.format])}

    def _add(
        self,
        op_name: str,
        path: str,
        inputs: Mapping[str, ir.Value],
        shapes: Sequence[tuple[int | str, ...]],
        attributes: Mapping[str, float] | None = None,
    ) -> tuple[ir.Value, ...]:
        node = plugin_node(op_name, path, inputs, shapes, self.inputs[tensors.WORKSPACE], attributes)
        self.nodes.append(node)
        return tuple(node.outputs)


def _check_ops(model: ir.Model, num_layers: int) -> None:
    """Demand the plugin ops that a model of so many layers has, and nothing else."""
    expected = {(DOMAIN, name): num_layers for name in LAYER_OPS}
    expected[DOMAIN, "o_proj_residual"] -= 1
    expected |= {(DOMAIN, name): 1 for name in ("embed", LAST_O_PROJ, "lm_head")}
    found = Counter((node.domain, node.op_type) for node in model.graph)
    for domain, name in sorted(found.keys() | expected.keys()):
        if found[(domain, name)] != expected.get((domain, name), 0):
            raise GraphError(
                f"the lowered graph has {found[(domain, name)]} nodes {domain}.{name}",
                f"{expected.get((domain, name), 0)}",
            )
