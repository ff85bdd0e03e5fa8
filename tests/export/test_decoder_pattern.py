"""Every graph that is not the one of its model is refused: nothing that the lowering does not know can get lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.decoder import match_decoder
from qwen_rt.export.passes.graph_tools import constant, insert
from qwen_rt.export.passes.lower_cuda import lower_cuda
from qwen_rt.export.source import open_source
from qwen_rt.rope import RopeSpec

SPEC = Checkpoint.open("nano").spec


def load(portable: Path) -> ir.Model:
    """The portable graph of nano, read anew."""
    model = open_source(portable).load_graph()
    assert model is not None
    return model


def test_the_graph_as_exported_is_matched(nano_portable: Path) -> None:
    found = match_decoder(load(nano_portable), SPEC)
    assert {name: tuple(value.shape or ()) for name, value in found.items()} == SPEC.parameters()


def node(model: ir.Model, name: str) -> ir.Node:
    return next(found for found in model.graph if found.name == name)


def set_attribute(name: str, key: str, value: float | str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node(model, name).attributes[key] = ir.convenience.convert_attribute(key, value)

    return change


def set_domain(name: str, domain: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node(model, name).domain = domain

    return change


def put_between(reader: str, index: int, op_type: str) -> Callable[[ir.Model], None]:
    """A node of one input and output in front of a node's input."""

    def change(model: ir.Model) -> None:
        found = node(model, reader)
        extra = insert(found, op_type, [found.inputs[index]], "/extra")
        found.replace_input_with(index, extra.outputs[0])

    return change


def rewire(reader: str, index: int, writer: str | None) -> Callable[[ir.Model], None]:
    """Another value as a node's input: what a node writes, or an initializer, or a graph input, or none."""

    def change(model: ir.Model) -> None:
        values: dict[str, ir.Value] = {str(value.name): value for value in model.graph.inputs}
        values |= dict(model.graph.initializers)
        values |= {str(found.name): found.outputs[0] for found in model.graph}
        node(model, reader).replace_input_with(index, None if writer is None else values[writer])

    return change


def set_constant(reader: str, index: int, array: NDArray[np.generic]) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node(model, reader).replace_input_with(index, constant(model.graph, "/model/another", array))

    return change


def drop_bias(model: ir.Model) -> None:
    add = node(model, f"{ATTENTION}/q_proj/Add")
    product = node(model, f"{ATTENTION}/q_proj/MatMul").outputs[0]
    for use in list(add.outputs[0].uses()):
        use.node.replace_input_with(use.idx, product)
    model.graph.remove(add, safe=True)


def swap_presents(model: ir.Model) -> None:
    first, second = (value for value in model.graph.outputs if value.name in ("present.0.key", "present.1.key"))
    first.name, second.name = second.name, first.name


def add_output(model: ir.Model) -> None:
    model.graph.outputs.append(node(model, "/model/GatherND").outputs[0])


def add_input(model: ir.Model) -> None:
    model.graph.inputs.append(ir.Value(name="seeds", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B"])))


def add_dead_node(model: ir.Model) -> None:
    insert(node(model, "/model/GatherND"), "Relu", [node(model, "/model/GatherND").inputs[0]], "/dead/Relu")


LAYER, ATTENTION, MLP = "/model/layers.1", "/model/layers.1/self_attn", "/model/layers.1/mlp"

CHANGES: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "epsilon": (
        set_attribute(f"{LAYER}/input_layernorm/RMSNormalization", "epsilon", 1e-5),
        r"input_layernorm/RMSNormalization: epsilon=9\.99\S*e-06; expected 9\.99\S*e-07",
    ),
    "epsilon of the last norm": (
        set_attribute("/model/norm/RMSNormalization", "epsilon", 2e-6),
        "/model/norm/RMSNormalization: epsilon=",
    ),
    "scale": (set_attribute(f"{ATTENTION}/Attention", "scale", 0.1), r"Attention: scale=0\.1"),
    "not causal": (set_attribute(f"{ATTENTION}/Attention", "is_causal", 0), "Attention: is_causal=0; expected"),
    "an attribute more": (
        set_attribute(f"{ATTENTION}/Attention", "softcap", 30.0),
        r"softcap=30\.0; expected no attribute softcap",
    ),
    "interleaved": (set_attribute(f"{ATTENTION}/RotaryEmbedding", "interleaved", 1), "interleaved=1"),
    "circular": (set_attribute(f"{ATTENTION}/TensorScatter_1", "mode", "circular"), "mode=circular"),
    "a mask": (rewire(f"{ATTENTION}/Attention", 3, "kv_lengths"), "mask or cache of .*Attention is kv_lengths"),
    "no lengths": (rewire(f"{ATTENTION}/Attention", 6, None), "an absent input stands where graph input kv_lengths"),
    "a node in the stream": (
        put_between(f"{LAYER}/Add", 0, "Relu"),
        "input of the attention of layer 1 is /model/layers.0/Add_1.*; expected /extra/output_0",
    ),
    "a node before a product": (
        put_between(f"{MLP}/down_proj/MatMul", 0, "Relu"),
        r"is made by ai\.onnx\.Relu; expected",
    ),
    "a cast to integers": (put_between("/lm_head/Gemm", 0, "Cast"), "/extra/output_0 is made by ai.onnx.Cast"),
    "another domain": (set_domain(f"{MLP}/Sigmoid", "evil"), r"is made by evil\.Sigmoid; expected Sigmoid"),
    "a node that nothing reads": (add_dead_node, r"node /dead/Relu \(Relu\) is no part of the model"),
    "no bias": (drop_bias, "is made by ai.onnx.MatMul; expected Add"),
    "the bias of k for v": (
        rewire(f"{ATTENTION}/v_proj/Add", 1, "model.layers.1.self_attn.k_proj.bias"),
        r"k_proj\.bias stands where weight model\.layers\.1\.self_attn\.v_proj\.bias belongs",
    ),
    "a weight of another layer": (
        rewire(f"{ATTENTION}/k_proj/Transpose", 0, "model.layers.0.self_attn.k_proj.weight"),
        r"layers\.0\S* stands where weight model\.layers\.1\.self_attn\.k_proj\.weight belongs",
    ),
    "the residual of the layer before": (
        rewire(f"{LAYER}/Add_1", 0, "/model/layers.0/Add_1"),
        "input of the MLP of layer 1 is /model/layers.1/Add/",
    ),
    "no residual": (
        rewire(f"{LAYER}/Add_1", 0, f"{MLP}/down_proj/MatMul"),
        "input of the MLP of layer 1 is /model/layers.1/Add/output_0; expected .*down_proj",
    ),
    "the MLP on another norm": (
        rewire(f"{MLP}/gate_proj/MatMul", 0, f"{LAYER}/input_layernorm/RMSNormalization"),
        "input of gate of layer 1 is /model/layers.1/input_layernorm",
    ),
    "k on another norm": (
        rewire(f"{ATTENTION}/k_proj/MatMul", 0, "/model/layers.0/input_layernorm/RMSNormalization"),
        "k_proj is /model/layers.0/input_layernorm",
    ),
    "q not turned": (
        rewire(f"{ATTENTION}/Attention", 0, f"{ATTENTION}/Transpose"),
        "Transpose; expected RotaryEmbedding",
    ),
    "values for keys": (
        rewire(f"{ATTENTION}/Attention", 1, f"{ATTENTION}/TensorScatter_1"),
        "output of .*TensorScatter_1 is present.1.value; expected present.1.key",
    ),
    "the cache of another layer": (
        rewire(f"{ATTENTION}/TensorScatter", 0, "past_key_values.0.key"),
        r"past_key_values\.0\.key stands where graph input past_key_values\.1\.key belongs",
    ),
    "caches handed out in another order": (swap_presents, "present.* expected present"),
    "heads split otherwise": (
        set_constant(f"{ATTENTION}/Reshape", 1, np.array([0, 0, 8, 64], np.int64)),
        r"shape of .*Reshape is \[ *0 +0 +8 +64\]; expected \[ *0 +0 +4 +128\]",
    ),
    "other frequencies": (
        set_constant("/model/rotary_emb/Mul", 1, RopeSpec(theta=2e4).inv_freq(128)),
        "inverse frequencies of /model/rotary_emb/Mul",
    ),
    "cos for sin": (
        rewire(f"{ATTENTION}/RotaryEmbedding", 2, "/model/rotary_emb/Cos"),
        "is made by ai.onnx.Cos; expected Sin",
    ),
    "positions from 1": (
        set_constant("/model/rotary_emb/CastLike", 0, np.array(1, np.float32)),
        "bound of .*Range is 1",
    ),
    "a norm of nothing": (
        rewire(f"{LAYER}/input_layernorm/RMSNormalization", 0, None),
        "input 0 of .*input_layernorm/RMSNormalization is absent; expected a value",
    ),
    "another row's logits": (
        rewire("/model/Unsqueeze", 0, "write_indices"),
        "write_indices stands where graph input logits_indices belongs",
    ),
    "one output more": (add_output, "the graph has the unknown output /model/GatherND"),
    "one input more": (add_input, "the graph has the unknown input seeds"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_is_not_the_model_is_refused(change: str, nano_portable: Path) -> None:
    model = load(nano_portable)
    damage, message = CHANGES[change]
    damage(model)
    with pytest.raises(GraphError, match=message):
        lower_cuda(model, SPEC, 64)


SPECS: dict[str, tuple[dict[str, object], str]] = {
    "rope theta": ({"rope": RopeSpec(theta=1e6)}, "inverse frequencies"),
    "yarn": (
        {"rope": RopeSpec(theta=1e4, kind="yarn", factor=4.0, original_max_position_embeddings=512)},
        "Cos; expected Mul",
    ),
    "epsilon": ({"rms_norm_eps": 1e-5}, "epsilon="),
    "layers": ({"num_layers": 3}, r"unknown input past_key_values\.3"),
    "more layers": ({"num_layers": 5}, r"lacks input past_key_values\.4"),
    "untied": ({"tie_word_embeddings": False}, r"embed_tokens\.weight stands where weight lm_head\.weight belongs"),
    "heads": ({"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}, r"Attention: scale=0\.088\S*; expected 0\.125"),
    "vocabulary": ({"vocab_size": 1153}, r"embed_tokens\.weight has shape \[1152,512\]; expected \[1153, 512\]"),
}


@pytest.mark.parametrize("change", SPECS)
def test_a_graph_of_another_spec_is_refused(change: str, nano_portable: Path) -> None:
    fields, message = SPECS[change]
    spec = dataclasses.replace(SPEC, **fields)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=message):
        lower_cuda(load(nano_portable), spec, 64)
