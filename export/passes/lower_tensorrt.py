"""The lowering for the ONNX parser of TensorRT and TensorRT-RTX: standard operators, strongly typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qwen_rt import tensors
from qwen_rt.errors import UsageError
from qwen_rt.export.passes.compute_dtype import FLOAT_TYPES
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD, match_decoder
from qwen_rt.export.passes.dequantize import StoredMatrix, check_tensorrt_scheme, dequantized
from qwen_rt.export.passes.graph_writer import Attributes, GraphWriter, Shape, graph_input
from qwen_rt.export.passes.shard import Shard, shard_spec, shard_weights
from qwen_rt.export.portable import QuantizedLocation
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvPlan

__all__ = ["HIDDEN_SCORE", "lower_tensorrt"]

HIDDEN_SCORE = {"float32": -1e30, "bfloat16": -1e30, "float16": -6e4}
"""Dtype of activations → what is added to the score of a cache row that a token must not see. Finite, so that no row of
scores is -inf alone; in float16 a score of -5000 or less may make it -inf, which hides as well."""

_WHOLE = Shard()


def lower_tensorrt(
    model: ir.Model,
    spec: ModelSpec,
    max_length: int,
    dtype: str = "bfloat16",
    quantized: Mapping[str, QuantizedLocation] | None = None,
    kv: KvPlan | None = None,
    shard: Shard = _WHOLE,
) -> ir.Model:
    """Write the graph of a model for TensorRT.

        input_ids ─ Gather ─ L × ( RMSNormalization ─ Gemm q, k, v ─ RotaryEmbedding q, k ─ TensorScatter k, v ─
        Attention with mask ─ Gemm ─ Add ─ RMSNormalization ─ Gemm gate, up ─ silu · up ─ Gemm ─ Add ) ─ … ─ logits

    What differs from the portable graph, and why:

    - The capacity of the cache, Tmax, is `max_length`: KV_CACHE_UPDATE takes no dynamic one.
    - TensorRT's parser does not look at `nonpad_kv_seqlen`, and its causal mask begins at the first cache row. So there
      is a mask, added to the scores, made once: token s of row b sees cache row j if
      `j <= write_indices[b] + s` and `j < max(kv_lengths[b], 1)`. No row of scores is empty, so padding and idle rows
      give finite numbers. A mask of booleans would cost ten kernels that pack it into blocks.
    - The parser multiplies q and the whole key cache by sqrt(scale), rounded to 16 bits, an error of 0.3 % at D = 128.
      So Attention has scale 1, and the cosines and sines that turn q are multiplied by the scale in float32.
    - Tokens stand on one axis, and products are Gemm on the weights as stored, [out, in]: MATRIX_MULTIPLY takes them
      transposed, where Transpose + MatMul would add a SHUFFLE and a rank.
    - TensorRT has no layer for an RMS norm (its NORMALIZATION takes the mean away): RMSNormalization becomes a dozen
      layers, which the builder knows again and makes one kernel of.
    - From the last layer's output projection on only the rows of `logits_indices` are computed.

    One rank of several has its share of the heads and of the MLP, and `DistCollective` nodes, an operator of TensorRT's
    parser: a sum over the ranks behind o_proj and down_proj, and one that joins the parts of the logits.

    Args:
        model: The portable graph in any compute dtype; not changed.
        spec: The model's hyperparameters.
        max_length: Rows of the cache, and positions that the engine can reach.
        dtype: Of activations and cache: `bfloat16`, `float16`, or `float32`. Weights stored in another are cast, which
            the builder does once.
        quantized: Matrices that are stored quantized, and where.
        kv: A quantized cache, which is refused.
        shard: Which rank of a tensor-parallel model the graph is for.

    Returns:
        A new model with the inputs and outputs of target `tensorrt` in `qwen_rt.tensors`, of standard operators but
        for those collectives. Weights are references to the bytes where they lie, but for int4 and for columns of a
        rank, which are `ir.LazyTensor`.

    Raises:
        GraphError: The graph is not the portable graph of this model.
        UsageError: Something that this target does not have: a quantized cache, or a matrix in a form that it lacks; or
            ranks that the model cannot be split over.
    """
    if kv is not None:
        raise UsageError(
            f"kv-cache={kv.kv_format} for target tensorrt",
            "none: its KV_CACHE_UPDATE takes 16 or 32 bits",
            "leave out --kv-cache, or build with --target cuda",
        )
    matrices = {name: StoredMatrix.of(name, place) for name, place in (quantized or {}).items()}
    for name, matrix in matrices.items():
        check_tensorrt_scheme(name, matrix.scheme, matrix.shape[1])
    weights = {}
    for name, value in match_decoder(model, spec).items():
        if name not in matrices:
            assert value.const_value is not None
            weights[name] = value.const_value
    part = shard_spec(spec, shard)
    if shard.num_ranks > 1:
        weights, matrices = shard_weights(weights, matrices, spec, shard)
    return _Emitter(part, max_length, dtype, weights, matrices, shard).run()


class _Emitter:
    """Writes the lowered graph."""

    def __init__(
        self,
        spec: ModelSpec,
        max_length: int,
        dtype: str,
        weights: Mapping[str, ir.TensorProtocol],
        matrices: Mapping[str, StoredMatrix],
        shard: Shard,
    ) -> None:
        self.shard = shard
        self.spec, self.max_length, self.weights, self.matrices = spec, max_length, weights, matrices
        self.dtype_name, self.dtype = dtype, FLOAT_TYPES[dtype]
        self.writer = GraphWriter()
        self.cache_shape = ("B", spec.num_kv_heads, max_length, spec.head_dim)
        i64 = ir.DataType.INT64
        names = [name(layer) for layer in range(spec.num_layers) for name in (tensors.past_key, tensors.past_value)]
        edges = [
            graph_input(tensors.INPUT_IDS, i64, "B", "S"),
            *(graph_input(name, self.dtype, *self.cache_shape) for name in names),
            graph_input(tensors.WRITE_INDICES, i64, "B"),
            graph_input(tensors.KV_LENGTHS, i64, "B"),
            graph_input(tensors.LOGITS_INDICES, i64, "B"),
        ]
        self.inputs = {str(value.name): value for value in edges}
        self.presents: list[ir.Value] = []
        self.cast_weights: dict[str, ir.Value] = {}

    def run(self) -> ir.Model:
        spec, writer = self.spec, self.writer
        self._positions()
        self._head_shapes()
        self._angles()
        self._mask()
        path = "/model/embed_tokens"
        ids = writer.node(
            "Reshape", [self.inputs[tensors.INPUT_IDS], writer.integers(-1)], f"{path}/ids", ir.DataType.INT64, ["R"]
        )
        if EMBEDDING in self.matrices:
            table = dequantized(writer, self.matrices[EMBEDDING], self.dtype, path)
        else:
            table = writer.stored(self.weights[EMBEDDING])
        assert table.dtype is not None
        rows = writer.node("Gather", [table, ids], f"{path}/Gather", table.dtype, ["R", spec.hidden_size], {"axis": 0})
        hidden = writer.cast(rows, self.dtype, f"{path}/Cast")
        for layer in range(spec.num_layers):
            hidden = self._layer(hidden, layer)
        normed = self._norm(hidden, "model.norm", "B")
        head = HEAD if HEAD in self.weights or HEAD in self.matrices else EMBEDDING
        product = self._linear(normed, head, "/lm_head", "B")
        if self.shard.has_part_of_head(spec):
            product = self._joined(product)
        logits = writer.cast(product, ir.DataType.FLOAT, "/lm_head/Cast")
        logits.name = tensors.LOGITS
        graph = ir.Graph(
            list(self.inputs.values()),
            [logits, *self.presents],
            nodes=writer.nodes,
            initializers=list(writer.initializers.values()),
            opset_imports={"": 24},
            name="qwen2",
        )
        return ir.Model(graph, ir_version=11, producer_name="qwen-rt")

    def _positions(self) -> None:
        """Position of each token int64[B, S], sizes int64[1], and the rows whose logits are wanted int64[B]."""
        writer, i64, path = self.writer, ir.DataType.INT64, "/model/positions"
        ids, zero, one = self.inputs[tensors.INPUT_IDS], writer.integer(0), writer.integer(1)
        self.num_rows = writer.node("Shape", [ids], f"{path}/rows", i64, [1], {"start": 0, "end": 1})
        self.num_tokens = writer.node("Shape", [ids], f"{path}/tokens", i64, [1], {"start": 1, "end": 2})
        axis = writer.integers(0)
        rows, tokens = (
            writer.node("Squeeze", [size, axis], f"{path}/{name}_scalar", i64, [])
            for name, size in (("rows", self.num_rows), ("tokens", self.num_tokens))
        )
        steps = writer.node("Range", [zero, tokens, one], f"{path}/steps", i64, ["S"])
        steps = writer.node("Unsqueeze", [steps, axis], f"{path}/steps_row", i64, [1, "S"])
        starts = self.inputs[tensors.WRITE_INDICES]
        starts = writer.node("Unsqueeze", [starts, writer.integers(1)], f"{path}/starts_column", i64, ["B", 1])
        self.positions = writer.node("Add", [starts, steps], f"{path}/Add", i64, ["B", "S"])
        firsts = writer.node("Range", [zero, rows, one], f"{path}/row_numbers", i64, ["B"])
        firsts = writer.node("Mul", [firsts, tokens], f"{path}/row_starts", i64, ["B"])
        wanted = [firsts, self.inputs[tensors.LOGITS_INDICES]]
        self.wanted = writer.node("Add", wanted, f"{path}/wanted", i64, ["B"])

    def _head_shapes(self) -> None:
        """[B, S, heads, D] for queries, and for keys and values, as int64[4]."""
        self.split_shapes = {
            num: self.writer.node(
                "Concat",
                [self.num_rows, self.num_tokens, self.writer.integers(num, self.spec.head_dim)],
                f"/model/positions/split_{num}",
                ir.DataType.INT64,
                [4],
                {"axis": 0},
            )
            for num in {self.spec.num_heads: None, self.spec.num_kv_heads: None}
        }

    def _angles(self) -> None:
        """Cosines and sines [B, S, D/2] that turn keys, and others, times the scale of attention, that turn queries."""
        writer, rope, path, f32 = self.writer, self.spec.rope, "/model/rotary_emb", ir.DataType.FLOAT
        half = self.spec.head_dim // 2
        numbers = writer.cast(self.positions, f32, f"{path}/Cast")
        column = writer.node("Unsqueeze", [numbers, writer.integers(-1)], f"{path}/column", f32, ["B", "S", 1])
        inv_freq = writer.constant(f"{path}/inv_freq", rope.inv_freq(self.spec.head_dim).astype(np.float32))
        angles = writer.node("Mul", [column, inv_freq], f"{path}/Mul", f32, ["B", "S", half])
        scales = {"key": rope.attention_scaling, "query": rope.attention_scaling * self.spec.head_dim**-0.5}
        self.turns: dict[str, list[ir.Value]] = {name: [] for name in scales}
        for op_type in ("Cos", "Sin"):
            plain = writer.node(op_type, [angles], f"{path}/{op_type}", f32, ["B", "S", half])
            for name, scale in scales.items():
                turn, stem = plain, f"{path}/{name}/{op_type}"
                if scale != 1.0:
                    factor = writer.constant(f"{path}/{name}/scale", np.array(scale, np.float32))
                    turn = writer.node("Mul", [plain, factor], f"{stem}_scaled", f32, ["B", "S", half])
                self.turns[name].append(writer.cast(turn, self.dtype, f"{stem}_cast"))

    def _mask(self) -> None:
        """What is added to the scores of every layer: [B, 1, S, Tmax], zero where a token sees a cache row."""
        writer, i64, path = self.writer, ir.DataType.INT64, "/model/mask"
        one = writer.integer(1)
        valid = writer.node("Max", [self.inputs[tensors.KV_LENGTHS], one], f"{path}/valid", i64, ["B"])
        valid = writer.node("Unsqueeze", [valid, writer.integers(1)], f"{path}/valid_column", i64, ["B", 1])
        ends = writer.node("Add", [self.positions, one], f"{path}/ends", i64, ["B", "S"])
        ends = writer.node("Min", [ends, valid], f"{path}/bounds", i64, ["B", "S"])
        ends = writer.node("Unsqueeze", [ends, writer.integers(1, 3)], f"{path}/column", i64, ["B", 1, "S", 1])
        limits = [writer.integer(0), writer.integer(self.max_length), one]
        columns = writer.node("Range", limits, f"{path}/cache_rows", i64, [self.max_length])
        shape = ["B", 1, "S", self.max_length]
        visible = writer.node("Less", [columns, ends], f"{path}/visible", ir.DataType.BOOL, shape)
        zero, low = (
            writer.constant(f"{path}/{name}", np.array(number, np.float32))
            for name, number in (("seen", 0), ("hidden", HIDDEN_SCORE[self.dtype_name]))
        )
        added = writer.node("Where", [visible, zero, low], f"{path}/Where", ir.DataType.FLOAT, shape)
        self.mask = writer.cast(added, self.dtype, f"{path}/Cast")

    def _layer(self, hidden: ir.Value, layer: int) -> ir.Value:
        """One decoder layer on [R, C]; the last one returns [B, C]."""
        name, path, writer = f"model.layers.{layer}", f"/model/layers.{layer}", self.writer
        rows, hidden_size = "R", self.spec.hidden_size
        attended = self._attention(self._norm(hidden, f"{name}.input_layernorm", rows), layer)
        if layer == self.spec.num_layers - 1:
            rows = "B"
            hidden, attended = (
                writer.node("Gather", [value, self.wanted], f"{path}/{what}", self.dtype, ["B", width], {"axis": 0})
                for what, value, width in (
                    ("wanted_residual", hidden, hidden_size),
                    ("wanted_attention", attended, self.spec.num_heads * self.spec.head_dim),
                )
            )
        product = self._summed(attended, f"{name}.self_attn.o_proj.weight", f"{path}/self_attn/o_proj", rows)
        hidden = writer.node("Add", [hidden, product], f"{path}/Add", self.dtype, [rows, hidden_size])
        normed = self._norm(hidden, f"{name}.post_attention_layernorm", rows)
        gate, up = (
            self._linear(normed, f"{name}.mlp.{half}_proj.weight", f"{path}/mlp/{half}_proj", rows)
            for half in ("gate", "up")
        )
        width = [rows, self.spec.intermediate_size]
        sigmoid = writer.node("Sigmoid", [gate], f"{path}/mlp/Sigmoid", self.dtype, width)
        silu = writer.node("Mul", [gate, sigmoid], f"{path}/mlp/silu", self.dtype, width)
        activated = writer.node("Mul", [silu, up], f"{path}/mlp/Mul", self.dtype, width)
        product = self._summed(activated, f"{name}.mlp.down_proj.weight", f"{path}/mlp/down_proj", rows)
        return writer.node("Add", [hidden, product], f"{path}/Add_1", self.dtype, [rows, hidden_size])

    def _attention(self, normed: ir.Value, layer: int) -> ir.Value:
        """Attention over the layer's cache: the merged heads [R, H·D]."""
        spec, writer, path = self.spec, self.writer, f"/model/layers.{layer}/self_attn"
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        query, key, value = (
            self._projection(normed, layer, letter, num)
            for letter, num in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        shape = ["B", heads, "S", head_dim]
        query = writer.node("RotaryEmbedding", [query, *self.turns["query"]], f"{path}/q_rope", self.dtype, shape)
        key = writer.node(
            "RotaryEmbedding", [key, *self.turns["key"]], f"{path}/k_rope", self.dtype, ["B", kv_heads, "S", head_dim]
        )
        start, cached = self.inputs[tensors.WRITE_INDICES], []
        for past, present, new in (
            (tensors.past_key, tensors.present_key, key),
            (tensors.past_value, tensors.present_value, value),
        ):
            inputs = [self.inputs[past(layer)], new, start]
            attributes: Attributes = {"axis": 2, "mode": "linear"}
            stem = f"{path}/{past(layer).rsplit('.', 1)[1]}_cache"
            cached.append(writer.node("TensorScatter", inputs, stem, self.dtype, self.cache_shape, attributes))
            cached[-1].name = present(layer)
        self.presents += cached
        attended = writer.node(
            "Attention", [query, *cached, self.mask], f"{path}/Attention", self.dtype, shape, {"scale": 1.0}
        )
        shape = ["B", "S", heads, head_dim]
        attended = writer.node(
            "Transpose", [attended], f"{path}/merge_transpose", self.dtype, shape, {"perm": (0, 2, 1, 3)}
        )
        width = heads * head_dim
        return writer.node("Reshape", [attended, writer.integers(-1, width)], f"{path}/merge", self.dtype, ["R", width])

    def _projection(self, normed: ir.Value, layer: int, letter: str, num_heads: int) -> ir.Value:
        """Queries, keys or values by head: [B, heads, S, D]."""
        writer, head_dim, path = self.writer, self.spec.head_dim, f"/model/layers.{layer}/self_attn"
        name = f"model.layers.{layer}.self_attn.{letter}_proj"
        bias = f"{name}.bias" if self.spec.qkv_bias else None
        flat = self._linear(normed, f"{name}.weight", f"{path}/{letter}_proj", "R", bias)
        shape = ["B", "S", num_heads, head_dim]
        split = writer.node(
            "Reshape", [flat, self.split_shapes[num_heads]], f"{path}/{letter}_split", self.dtype, shape
        )
        shape = ["B", num_heads, "S", head_dim]
        return writer.node(
            "Transpose", [split], f"{path}/{letter}_transpose", self.dtype, shape, {"perm": (0, 2, 1, 3)}
        )

    def _linear(self, x: ir.Value, weight: str, path: str, rows: str, bias: str | None = None) -> ir.Value:
        """`x · weightᵀ [+ bias]`: [rows, out]."""
        writer = self.writer
        if weight in self.matrices:
            stored = self.matrices[weight]
            if "perm" in stored.parts:
                perm = writer.stored(stored.parts["perm"])
                shape = [rows, stored.shape[1]]
                x = writer.node("Gather", [x, perm], f"{path}/permuted", self.dtype, shape, {"axis": 1})
            matrix, width = dequantized(writer, stored, self.dtype, path), stored.shape[0]
        else:
            matrix, width = self._weight(weight), self.weights[weight].shape.numpy()[0]
        inputs = [x, matrix] if bias is None else [x, matrix, self._weight(bias)]
        return writer.node("Gemm", inputs, f"{path}/Gemm", self.dtype, [rows, width], {"transB": 1})

    def _summed(self, x: ir.Value, weight: str, path: str, rows: str) -> ir.Value:
        """`x · weightᵀ`, where every rank has some of the columns of both: [rows, out]."""
        product = self._linear(x, weight, path, rows)
        if self.shard.num_ranks == 1:
            return product
        return self._collective(product, "all_reduce", "sum", f"{path}/AllReduce", list(product.shape or ()))

    def _joined(self, product: ir.Value) -> ir.Value:
        """Logits [B, V] of the ranks' parts [B, V / ranks]: they are joined along the first axis."""
        size, across = self.spec.vocab_size, {"perm": (1, 0)}
        part = self.writer.node(
            "Transpose", [product], "/lm_head/part", self.dtype, [size // self.shard.num_ranks, "B"], across
        )
        joined = self._collective(part, "all_gather", "none", "/lm_head/AllGather", [size, "B"])
        return self.writer.node("Transpose", [joined], "/lm_head/whole", self.dtype, ["B", size], across)

    def _collective(self, value: ir.Value, operation: str, reduce: str, name: str, shape: Shape) -> ir.Value:
        attributes: Attributes = {
            "collective_operation": operation,
            "reduce_op": reduce,
            "root": -1,
            "nb_rank": self.shard.num_ranks,
        }
        return self.writer.node("DistCollective", [value], name, self.dtype, shape, attributes)

    def _norm(self, x: ir.Value, module: str, rows: str) -> ir.Value:
        attributes: Attributes = {"axis": -1, "epsilon": self.spec.rms_norm_eps, "stash_type": 1}
        path = "/" + re.sub(r"\.(?!\d)", "/", module)
        weight = self._weight(f"{module}.weight")
        name, shape = f"{path}/RMSNormalization", [rows, self.spec.hidden_size]
        return self.writer.node("RMSNormalization", [x, weight], name, self.dtype, shape, attributes)

    def _weight(self, name: str) -> ir.Value:
        """A parameter in the dtype of the activations."""
        if name not in self.cast_weights:
            stored = self.writer.stored(self.weights[name])
            self.cast_weights[name] = self.writer.cast(stored, self.dtype, f"/{name}/Cast")
        return self.cast_weights[name]
