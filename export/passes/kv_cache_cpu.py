"""What a quantized KV cache gives back, computed on the CPU: the reference of its accuracy, not a smaller cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.graph_tools import constant, insert, nodes_of_type, prune
from qwen_rt.quantization import KV_LARGEST, key_offset_name, value_offset_name
from qwen_rt.spec import ModelSpec

if TYPE_CHECKING:
    from qwen_rt.export.quantize.kv import KvLayer, KvPlan

__all__ = ["quantize_kv_cache"]

_TINY = float(np.finfo(np.float32).tiny)


def quantize_kv_cache(model: ir.Model, spec: ModelSpec, kv: KvPlan) -> ir.Model:
    """Round new keys and values to eight bits before GroupQueryAttention writes them into its cache.

        qkv ── GroupQueryAttention(do_rotary=1)
                              becomes
        qkv ─ Split ─ q ─ RotaryEmbedding ────────────────────────────────────────────────┐
                    ├ k ─ RotaryEmbedding ─┐                       ┌ + R(position)·offset ┼─ GroupQueryAttention
                    └ v ───────────────────┴ Concat ─ round ─ Split┴ + offset ────────────┘      (do_rotary=0)

        round(x) = scale · to 8 bits and back(x / scale),  scale = max|x| / largest, of each token and head

    The cache stays float32 and holds what a quantized one would give back: this target shows what the eight bits do to
    a model, with the numbers of the kernels and on any machine, but saves no memory. 15 small nodes are added to a
    layer (14 for int8), and up to 4 for its offsets; their work does not grow with the length of the sequence.

    Args:
        model: A graph after `pack_qkv`, in float32; changed in place. The biases of k and v become what the plan
            leaves of them, in the dtype in which they are stored; they and the offsets lie in the graph itself.
        spec: The model's hyperparameters.
        kv: Format and offsets.

    Returns:
        The same object. A graph whose attention turns nothing has been through here, and is left as it is.

    Raises:
        GraphError: The plan is of another model, or the graph has no such bias.
    """
    attentions = nodes_of_type(model, "GroupQueryAttention")
    if len(attentions) != len(kv.layers):
        raise GraphError(f"a KV plan of {len(kv.layers)} layers", f"one of {len(attentions)}", "make it anew")
    todo = [
        (index, attention)
        for index, attention in enumerate(attentions)
        if attention.attributes["do_rotary"].as_int() == 1
    ]
    if not todo:
        return model
    shared = _Shared(model, spec, kv.kv_format, todo[0][1])
    for index, attention in todo:
        _replace_biases(model, index, kv.layers[index])
        shared.rewrite(index, attention, kv.layers[index])
    return prune(model)


def _replace_biases(model: ir.Model, index: int, layer: KvLayer) -> None:
    """Put what the plan leaves of the biases into the graph, in the dtype in which they were stored."""
    for letter, bias in (("k", layer.key_bias), ("v", layer.value_bias)):
        name = f"model.layers.{index}.self_attn.{letter}_proj.bias"
        value = model.graph.initializers.get(name)
        if (bias is None) != (value is None):
            raise GraphError(f"{name} is in {'the graph' if bias is None else 'the KV plan'} alone", "both or neither")
        if bias is not None and value is not None and value.dtype is not None:
            value.const_value = ir.tensor(bias.astype(value.dtype.numpy()), name=name)


class _Shared:
    """What all layers read, and how a layer is rewritten with it."""

    def __init__(self, model: ir.Model, spec: ModelSpec, kv_format: str, before: ir.Node) -> None:
        self._graph, self._spec, self._format = model.graph, spec, kv_format
        path = self._path = "/model/kv_cache"
        self._kv_width = spec.num_kv_heads * spec.head_dim
        inputs = {value.name: value for value in model.graph.inputs}
        zero, one = self._int("zero", 0), self._int("one", 1)
        ids = inputs[tensors.INPUT_IDS]
        length = insert(before, "Shape", [ids], f"{path}/length", {"start": 1, "end": 2}).outputs[0]
        squeezed = insert(before, "Squeeze", [length], f"{path}/Squeeze").outputs[0]
        steps = insert(before, "Range", [zero, squeezed, one], f"{path}/Range").outputs[0]
        starts = inputs[tensors.WRITE_INDICES]
        column = insert(before, "Unsqueeze", [starts, self._ints("column", [1])], f"{path}/Unsqueeze").outputs[0]
        self._positions = insert(before, "Add", [column, steps], f"{path}/positions").outputs[0]  # [B, S]
        shape = insert(before, "Shape", [ids], f"{path}/Shape").outputs[0]
        width = self._ints("kv_width", [self._kv_width])
        self._expanded = insert(before, "Concat", [shape, width], f"{path}/Concat", {"axis": 0}).outputs[0]

    def rewrite(self, index: int, attention: ir.Node, layer: KvLayer) -> None:
        spec, path = self._spec, f"{str(attention.name).rsplit('/', 1)[0]}/kv_cache"
        tables = list(attention.inputs[7:9])
        q, k, v = self._projections(attention, path)
        query = self._turn(attention, q, tables, spec.num_heads, f"{path}/q_rotary")
        key = self._turn(attention, k, tables, spec.num_kv_heads, f"{path}/k_rotary")
        key, value = self._round(attention, key, v, path)
        if layer.key_offset.any():
            offset = self._offset(attention, key_offset_name(index), layer.key_offset, f"{path}/k_offset")
            everywhere = insert(attention, "Expand", [offset, self._expanded], f"{path}/k_offset/Expand").outputs[0]
            turned = self._turn(attention, everywhere, tables, spec.num_kv_heads, f"{path}/k_offset/rotary")
            key = insert(attention, "Add", [key, turned], f"{path}/k_offset/Add").outputs[0]
        if layer.value_offset.any():
            offset = self._offset(attention, value_offset_name(index), layer.value_offset, f"{path}/v_offset")
            value = insert(attention, "Add", [value, offset], f"{path}/v_offset/Add").outputs[0]
        for place, new in enumerate((query, key, value)):
            attention.replace_input_with(place, new)
        attention.resize_inputs(7)
        attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)

    def _projections(self, attention: ir.Node, path: str) -> Sequence[ir.Value | None]:
        """q, k and v, [B, S, heads·D] each, as one tensor or as three."""
        if attention.inputs[1] is not None:
            return attention.inputs[:3]
        sizes = self._ints("qkv_widths", [self._spec.num_heads * self._spec.head_dim, self._kv_width, self._kv_width])
        split = insert(attention, "Split", [attention.inputs[0], sizes], f"{path}/qkv", {"axis": -1}, num_outputs=3)
        return split.outputs

    def _turn(
        self, before: ir.Node, x: ir.Value | None, tables: Sequence[ir.Value | None], num_heads: int, name: str
    ) -> ir.Value:
        inputs = [x, *tables, self._positions]
        return insert(before, "RotaryEmbedding", inputs, name, {"num_heads": num_heads}).outputs[0]

    def _round(self, before: ir.Node, key: ir.Value, value: ir.Value | None, path: str) -> Sequence[ir.Value]:
        """Keys and values to eight bits and back, both in one go: [B, S, Hkv·D] each."""

        def add(op_type: str, inputs: list[ir.Value | None], name: str, **attributes: int) -> ir.Value:
            return insert(before, op_type, inputs, f"{path}/{name}", attributes).outputs[0]

        both = add("Concat", [key, value], "Concat", axis=-1)
        heads = self._ints("heads", [0, 0, 2 * self._spec.num_kv_heads, self._spec.head_dim])
        x = add("Reshape", [both, heads], "heads")  # [B, S, 2 Hkv, D]
        largest = add("ReduceMax", [add("Abs", [x], "Abs"), self._ints("last", [-1])], "ReduceMax", keepdims=1)
        wanted = self._float("largest", KV_LARGEST[self._format])
        # A vector of zeros has a scale of zero: the smallest number in its place leaves it one.
        scale = add("Max", [add("Div", [largest, wanted], "scale"), self._float("tiny", _TINY)], "Max")
        scaled = add("Div", [x, scale], "Div")
        if self._format == "fp8":
            stored = add("Cast", [scaled], "Cast_stored", to=int(ir.DataType.FLOAT8E4M3FN))
            rounded = add("Cast", [stored], "Cast_read", to=int(ir.DataType.FLOAT))
        else:
            rounded = add("Round", [scaled], "Round")
        back = add("Mul", [rounded, scale], "Mul")
        flat = add("Reshape", [back, self._ints("flat", [0, 0, 2 * self._kv_width])], "flat")
        sizes = self._ints("kv_widths", [self._kv_width, self._kv_width])
        return insert(before, "Split", [flat, sizes], f"{path}/kv", {"axis": -1}, num_outputs=2).outputs

    def _offset(self, before: ir.Node, name: str, offset: NDArray[np.float32], path: str) -> ir.Value:
        """An offset f32[Hkv, D] as [1, 1, Hkv·D]: the runtime folds that at load."""
        stored = constant(self._graph, name, offset)
        shape = self._ints("offset", [1, 1, self._kv_width])
        return insert(before, "Reshape", [stored, shape], f"{path}/Reshape").outputs[0]

    def _int(self, name: str, number: int) -> ir.Value:
        return constant(self._graph, f"{self._path}/{name}", np.array(number, np.int64))

    def _ints(self, name: str, numbers: list[int]) -> ir.Value:
        return constant(self._graph, f"{self._path}/{name}", np.array(numbers, np.int64))

    def _float(self, name: str, number: float) -> ir.Value:
        return constant(self._graph, f"{self._path}/{name}", np.array(number, np.float32))
