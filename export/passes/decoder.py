"""Hold a portable graph, node by node, against the Qwen2 decoder that its `ModelSpec` describes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.export.passes.matcher import GraphMatcher
from qwen_rt.spec import ModelSpec

__all__ = ["EMBEDDING", "HEAD", "head_name", "match_decoder"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def head_name(spec: ModelSpec) -> str:
    """Name of the parameter that makes the logits: of a tied model the embeddings."""
    return EMBEDDING if spec.tie_word_embeddings else HEAD


def match_decoder(model: ir.Model, spec: ModelSpec) -> dict[str, ir.Value]:
    """Check that a graph computes exactly the model that `spec` describes.

    Every node is accounted for: operators, attributes (epsilon, scale, …), constants (inverse frequencies, YaRN's
    scaling, head counts), weights with names and shapes, and the edges between them, residual ones among them. Casts
    of weights and activations, which differ between graphs of one model in several dtypes, may be there or not.

    Args:
        model: A portable graph, traced or read from disk; not changed.
        spec: The model's hyperparameters.

    Returns:
        Hugging Face name → initializer, of every parameter.

    Raises:
        GraphError: Something in the graph is not as the spec says, or a node is no part of the decoder.
    """
    return _DecoderMatcher(model, spec).run()


class _DecoderMatcher(GraphMatcher):
    """Walks from the logits back to the token ids."""

    def __init__(self, model: ir.Model, spec: ModelSpec) -> None:
        super().__init__(model)
        self.spec = spec
        self.shapes = spec.parameters()

    def run(self) -> dict[str, ir.Value]:
        layers = range(self.spec.num_layers)
        pasts = {name(i) for i in layers for name in (tensors.past_key, tensors.past_value)}
        presents = {name(i) for i in layers for name in (tensors.present_key, tensors.present_value)}
        edges = {tensors.INPUT_IDS, tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES}
        self.boundary(pasts | edges, presents | {tensors.LOGITS})
        hidden = self._head(self.output(tensors.LOGITS))
        for layer in reversed(layers):
            hidden = self._layer(hidden, layer)
        gather = self.node(self.skip_cast(hidden), "Gather", 2, {"axis": 0})
        self.weight(gather.inputs[0], EMBEDDING, self.shapes[EMBEDDING])
        self.graph_input(gather.inputs[1], tensors.INPUT_IDS)
        self.finish()
        return {name: self.weights[name] for name in self.shapes}

    def _head(self, logits: ir.Value) -> ir.Value:
        """Hidden ── GatherND(logits_indices) ── RMSNormalization ── product ── [Cast] ── logits."""
        normed = self._linear(self.skip_cast(logits), head_name(self.spec))
        chosen = self._norm(normed, "model.norm.weight")
        gather = self.node(chosen, "GatherND", 2, {"batch_dims": 1})
        rows = self.node(gather.inputs[1], "Unsqueeze", 2)
        self.graph_input(rows.inputs[0], tensors.LOGITS_INDICES)
        self.constant(rows.inputs[1], [-1], f"axis of {rows.name}")
        return self.given(gather)

    def _layer(self, out: ir.Value, layer: int) -> ir.Value:
        """Out = h + down(silu(gate(norm(h))) · up(norm(h))), h = x + o(attention(norm(x))); returns x."""
        path = f"model.layers.{layer}"
        product, middle = self.operands(self.node(out, "Add", 2), "MatMul")
        gated = self.node(self._linear(product, f"{path}.mlp.down_proj.weight"), "Mul", 2)
        silu, up = self.operands(gated, "Mul")
        activated = self.node(silu, "Mul", 2)
        sigmoid, gate = self.operands(activated, "Sigmoid")
        self.same(self.node(sigmoid, "Sigmoid", 1).inputs[0], gate, f"input of the sigmoid of layer {layer}")
        normed = self._linear(up, f"{path}.mlp.up_proj.weight")
        self.same(self._linear(gate, f"{path}.mlp.gate_proj.weight"), normed, f"input of gate of layer {layer}")
        entry = self._norm(normed, f"{path}.post_attention_layernorm.weight")
        self.same(entry, middle, f"input of the MLP of layer {layer}")

        product, first = self.operands(self.node(middle, "Add", 2), "MatMul")
        normed = self._attention(self._linear(product, f"{path}.self_attn.o_proj.weight"), layer)
        entry = self._norm(normed, f"{path}.input_layernorm.weight")
        self.same(entry, first, f"input of the attention of layer {layer}")
        return first

    def _attention(self, merged: ir.Value, layer: int) -> ir.Value:
        """The nodes from the normed hidden state, which is returned, to the merged heads."""
        spec, path = self.spec, f"model.layers.{layer}.self_attn"
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        reshape = self.node(merged, "Reshape", 2)
        self.constant(reshape.inputs[1], [0, 0, heads * head_dim], f"shape of {reshape.name}")
        transpose = self.node(reshape.inputs[0], "Transpose", 1, {"perm": (0, 2, 1, 3)})
        attributes = {"is_causal": 1, "scale": head_dim**-0.5}
        attention = self.node(transpose.inputs[0], "Attention", 7, attributes)
        query, keys, values, *absent, lengths = attention.inputs
        for extra in absent:
            self.absent(extra, f"mask or cache of {attention.name}")
        self.graph_input(lengths, tensors.KV_LENGTHS)
        key = self._scatter(keys, tensors.past_key(layer), tensors.present_key(layer))
        value = self._scatter(values, tensors.past_value(layer), tensors.present_value(layer))
        entries = [
            self._projection(flat, f"{path}.{name}_proj", num)
            for name, flat, num in (
                ("q", self._rotated(query), heads),
                ("k", self._rotated(key), kv_heads),
                ("v", value, kv_heads),
            )
        ]
        for name, entry in zip("kv", entries[1:], strict=True):
            self.same(entry, entries[0], f"input of {path}.{name}_proj")
        return entries[0]

    def _scatter(self, written: ir.Value | None, past: str, present: str) -> ir.Value | None:
        """The new rows of a cache that starts as `past` and is handed out as `present`."""
        scatter = self.node(written, "TensorScatter", 3, {"axis": 2, "mode": "linear"})
        self.same(scatter.outputs[0], self.output(present), f"output of {scatter.name}")
        self.graph_input(scatter.inputs[0], past)
        self.graph_input(scatter.inputs[2], tensors.WRITE_INDICES)
        return scatter.inputs[1]

    def _projection(self, split: ir.Value | None, path: str, num_heads: int) -> ir.Value:
        """The input of a projection whose [B, S, width] result is split into heads: [B, heads, S, D]."""
        transpose = self.node(split, "Transpose", 1, {"perm": (0, 2, 1, 3)})
        reshape = self.node(transpose.inputs[0], "Reshape", 2)
        self.constant(reshape.inputs[1], [0, 0, num_heads, self.spec.head_dim], f"shape of {reshape.name}")
        product = reshape.inputs[0]
        if self.spec.qkv_bias:
            product, bias = self.operands(self.node(product, "Add", 2), "MatMul")
            self.weight(bias, f"{path}.bias", self.shapes[f"{path}.bias"])
        return self._linear(product, f"{path}.weight")

    def _linear(self, product: ir.Value | None, name: str) -> ir.Value:
        """The input of `x · weightᵀ`, written as MatMul on a Transpose or as Gemm."""
        producer = product.producer() if product is not None else None
        if producer is not None and producer.op_type == "Gemm":
            node = self.node(product, "Gemm", 2, {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1})
            matrix = node.inputs[1]
        else:
            node = self.node(product, "MatMul", 2)
            matrix = self.node(node.inputs[1], "Transpose", 1, {"perm": (1, 0)}).inputs[0]
        self.weight(matrix, name, self.shapes[name])
        return self.given(node)

    def _norm(self, normed: ir.Value, name: str) -> ir.Value:
        """The input of an RMS norm."""
        attributes = {"axis": -1, "epsilon": self.spec.rms_norm_eps, "stash_type": 1}
        node = self.node(normed, "RMSNormalization", 2, attributes)
        self.weight(node.inputs[1], name, self.shapes[name])
        return self.given(node)

    def _rotated(self, turned: ir.Value | None) -> ir.Value | None:
        """What a RotaryEmbedding turns, by the angles that the spec gives."""
        node = self.node(turned, "RotaryEmbedding", 3, {"interleaved": 0})
        angles = [self._angles(value, op_type) for value, op_type in zip(node.inputs[1:], ("Cos", "Sin"), strict=True)]
        self.same(angles[1], angles[0], f"angles of {node.name}")
        return node.inputs[0]

    def _angles(self, table: ir.Value | None, op_type: str) -> ir.Value | None:
        """`[Cast] (cos(positions · inv_freq) [· scaling])`, or sin."""
        rope, table = self.spec.rope, self.skip_cast(table)
        if rope.attention_scaling != 1.0:
            scaled = self.node(table, "Mul", 2)
            table, scaling = self.operands(scaled, op_type)
            self.constant(scaling, np.float32(rope.attention_scaling), f"scaling of {scaled.name}")
        angles = self.node(table, op_type, 1).inputs[0]
        product = self.node(angles, "Mul", 2)
        column, inv_freq = self.operands(product, "Unsqueeze")
        self.constant(inv_freq, rope.inv_freq(self.spec.head_dim), f"inverse frequencies of {product.name}")
        unsqueeze = self.node(column, "Unsqueeze", 2)
        self.constant(unsqueeze.inputs[1], [-1], f"axis of {unsqueeze.name}")
        cast = self.node(unsqueeze.inputs[0], "Cast", 1, {"to": int(ir.DataType.FLOAT)})
        self._positions(self.node(cast.inputs[0], "Add", 2))
        return angles

    def _positions(self, add: ir.Node) -> None:
        """`write_indices[b] + s`."""
        starts, steps = (self.node(value, "Unsqueeze", 2) for value in add.inputs)
        self.graph_input(starts.inputs[0], tensors.WRITE_INDICES)
        self.constant(starts.inputs[1], [1], f"axis of {starts.name}")
        self.constant(steps.inputs[1], [0], f"axis of {steps.name}")
        arange = self.node(steps.inputs[0], "Range", 3)
        size = self.node(arange.inputs[1], "Squeeze", 1)
        for value, wanted in ((arange.inputs[0], 0), (arange.inputs[2], 1)):
            like = self.node(value, "CastLike", 2)
            self.constant(like.inputs[0], wanted, f"bound of {arange.name}")
            self.same(like.inputs[1], size.outputs[0], f"dtype of {like.name}")
        shape = self.node(size.inputs[0], "Shape", 1, {"start": 1, "end": 2})
        self.graph_input(shape.inputs[0], tensors.INPUT_IDS)
