"""What TensorRT-RTX makes of the graph: native layers where it has them, and engines, built without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.lower import graph_bytes, lowered_graph
from qwen_rt.export.passes.shard import Shard, shard_spec
from qwen_rt.export.portable import checkpoint_locations
from qwen_rt.export.source import open_source
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec

from .quantize.kit import all_matrices, write_quantized

trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
pytestmark = pytest.mark.trt

MAX_LENGTH = 256
NATIVE = {"ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1, "ATTENTION_OUTPUT": 1, "ACTIVATION": 1}
"""Layers that the parser makes of one decoder layer, beside its seven products."""


WHOLE = Shard()
MIN_DECODE_HEADS = 4
"""Query heads that TensorRT's attention kernel for one token wants; with two or three that for many tokens does."""


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what the builder says."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[tuple[Any, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append((severity, message))

    def errors(self) -> list[str]:
        return [line for severity, line in self.lines if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]

    def engine_layers(self) -> list[str]:
        """Names of the built engine's layers, for all profiles."""
        text = next(line for _, line in self.lines if line.startswith("Layers:"))
        return re.findall(r"^Name: (.*?), LayerType", text, re.MULTILINE)


class Network:
    """A graph, parsed."""

    def __init__(self, model: ir.Model, folder: Path, spec: ModelSpec) -> None:
        self.spec, self.log = spec, Log()
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(self.network, self.log)
        assert parser.parse(graph_bytes(model), str(folder / "graph.onnx")), self.log.errors()

    def layers(self) -> list[Any]:
        return [self.network.get_layer(index) for index in range(self.network.num_layers)]

    def counts(self) -> Counter[str]:
        return Counter(layer.type.name for layer in self.layers())

    def allow_other_attention(self) -> None:
        for layer in self.layers():
            if layer.type.name == "ATTENTION_INPUT":
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True

    def build(self, capability: str, max_rows: int, max_tokens: int) -> list[str]:
        """Layers of an engine for one profile; empty if the builder gives up."""
        self.log.lines.clear()
        config = self.builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = self.builder.create_optimization_profile()
        profile.set_shape(tensors.INPUT_IDS, (1, 1), (1, max_tokens), (max_rows, max_tokens))
        for name in (tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES):
            profile.set_shape(name, (1,), (1,), (max_rows,))
        rest = (self.spec.num_kv_heads, MAX_LENGTH, self.spec.head_dim)
        for layer in range(self.spec.num_layers):
            for past in (tensors.past_key(layer), tensors.past_value(layer)):
                profile.set_shape(past, (1, *rest), (1, *rest), (max_rows, *rest))
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
        return self.log.engine_layers() if self.builder.build_serialized_network(self.network, config) else []


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return Checkpoint.open("nano")


def float_network(
    nano: Checkpoint,
    portable: Path,
    dtype: str = "bfloat16",
    shard: Shard = WHOLE,
) -> Network:
    exported, locations = open_source(portable).load_graph(), checkpoint_locations(nano)
    model = lowered_graph(nano, "tensorrt-rtx", MAX_LENGTH, locations, exported, dtype=dtype, shard=shard)
    return Network(model, Path(nano.path), shard_spec(nano.spec, shard))


def quantized_network(nano: Checkpoint, portable: Path, scheme: Scheme, folder: Path) -> Network:
    quantized = write_quantized(Path(nano.path), dict.fromkeys(all_matrices(nano.spec), scheme), folder / "weights")
    exported, places = open_source(portable).load_graph(), quantized.places
    model = lowered_graph(nano, "tensorrt-rtx", MAX_LENGTH, quantized.locations, exported, places)
    return Network(model, quantized.folder, nano.spec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_parser_makes_native_layers(dtype: str, nano: Checkpoint, nano_portable: Path) -> None:
    network, num_layers = float_network(nano, nano_portable, dtype), nano.spec.num_layers
    counts = network.counts()
    for kind, number in NATIVE.items():
        assert counts[kind] == number * num_layers, kind
    assert counts["MATRIX_MULTIPLY"] == 7 * num_layers + 1
    assert not counts.keys() & {"SCATTER", "SOFTMAX", "EINSUM", "NON_ZERO", "LOOP_OUTPUT", "PLUGIN_V3", "TOPK"}
    assert not network.log.errors()


def test_float32_has_no_attention_kernel_for_a_prompt(nano: Checkpoint, nano_portable: Path) -> None:
    network = float_network(nano, nano_portable, "float32")
    assert not network.build("SM89", 2, 16)
    assert any("not supported by a dedicated kernel" in line for line in network.log.errors())


def test_only_norms_fall_apart(nano: Checkpoint, nano_portable: Path) -> None:
    """TensorRT has no RMS norm: the builder recognises the pieces and makes one kernel of them.

    Beside norms a decoder layer has nine elementwise layers: three biases, two residuals, silu · up, and the two
    with which the parser multiplies queries and keys by the root of the scale, 1 here.
    """
    network = float_network(nano, nano_portable)
    names = [layer.name for layer in network.layers()]
    first, second = (names.index(f"/model/layers.{i}/self_attn/q_proj/Gemm") for i in (0, 1))
    layer = network.layers()[first:second]  # a whole layer, from one product of q to the next
    norms = [each for each in layer if "RMSNormalization" in f"{each.name}{each.metadata}"]
    kinds = Counter(each.type.name for each in layer if each not in norms)
    assert kinds["ELEMENTWISE"] == 9
    assert kinds["REDUCE"] + kinds["UNARY"] == 0
    assert Counter(each.type.name for each in norms) == {"ELEMENTWISE": 8, "REDUCE": 2, "UNARY": 2}
    assert len(layer) < 80


def test_mask_and_angles_are_made_once(nano: Checkpoint, nano_portable: Path) -> None:
    network = float_network(nano, nano_portable)
    counts = network.counts()
    assert counts["SELECT"] == 1
    assert (
        sum(layer.name.startswith(("/model/rotary_emb/Cos", "/model/rotary_emb/Sin")) for layer in network.layers())
        == 2
    )
    assert sum(layer.type.name == "FILL" for layer in network.layers()) == 3
    mask = [layer.get_input(3).name for layer in network.layers() if layer.type.name == "ATTENTION_INPUT"]
    assert len(mask) == nano.spec.num_layers
    assert len(set(mask)) == 1


def test_the_cache_is_aliased_and_has_a_fixed_capacity(nano: Checkpoint, nano_portable: Path) -> None:
    network = float_network(nano, nano_portable).network
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    spec = nano.spec
    for layer in range(spec.num_layers):
        for past, present in ((tensors.past_key, tensors.present_key), (tensors.past_value, tensors.present_value)):
            shape = (-1, spec.num_kv_heads, MAX_LENGTH, spec.head_dim)
            assert tuple(inputs.pop(past(layer)).shape) == tuple(outputs.pop(present(layer)).shape) == shape
    assert {name: (tuple(value.shape), value.dtype.name) for name, value in inputs.items()} == {
        tensors.INPUT_IDS: ((-1, -1), "INT64"),
        tensors.WRITE_INDICES: ((-1,), "INT64"),
        tensors.KV_LENGTHS: ((-1,), "INT64"),
        tensors.LOGITS_INDICES: ((-1,), "INT64"),
    }
    assert {name: (tuple(value.shape), value.dtype.name) for name, value in outputs.items()} == {
        tensors.LOGITS: ((-1, spec.vocab_size), "FLOAT")
    }


@pytest.mark.parametrize("capability", ["SM80", "SM89", "SM120"])
def test_a_decode_engine_of_floats(capability: str, nano: Checkpoint, nano_portable: Path) -> None:
    """A step: a norm is one kernel, attention one, q, k and v one product, gate and up one; 12 layers in all."""
    layers = float_network(nano, nano_portable).build(capability, 4, 1)
    num_layers = nano.spec.num_layers
    assert sum("_mha_" in name for name in layers) == num_layers
    assert sum("MulMeanAddSqrtDivMul" in name for name in layers) == 2 * num_layers + 1
    assert sum(name.count("Gemm") == 3 for name in layers) == num_layers
    assert len(layers) <= 12 * num_layers + 6


@pytest.mark.parametrize("capability", ["SM80", "SM89", "SM120"])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("fp8"), Scheme("int4", 128), Scheme("int4")], ids=str)
def test_quantized_matrices(
    scheme: Scheme, capability: str, nano: Checkpoint, nano_portable: Path, tmp_path: Path
) -> None:
    """Every product dequantizes inside: no kernel writes a matrix out. There is no fp8 before 8.9."""
    network = quantized_network(nano, nano_portable, scheme, tmp_path)
    assert network.counts()["DEQUANTIZE"] == 7 * nano.spec.num_layers
    assert network.counts()["KV_CACHE_UPDATE"] == 2 * nano.spec.num_layers
    layers = network.build(capability, 4, 1)
    if scheme.format == "fp8" and capability == "SM80":
        assert not layers
        assert any("fp8_e4m3" in line for line in network.log.errors())
        return
    assert sum("CastMulCastFc" in name for name in layers) == 7 * nano.spec.num_layers
    assert not [name for name in layers if name.startswith("__myl_CastMulCast_") or "ReplCastMulCast_" in name]


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 2), (1, 2), (3, 4)])
def test_the_collectives_of_a_rank(rank: int, num_ranks: int, nano: Checkpoint, nano_portable: Path) -> None:
    """Two sums a layer and one join of the logits."""
    shard, num_layers = Shard(rank, num_ranks), nano.spec.num_layers
    network = float_network(nano, nano_portable, shard=shard)
    found = [layer for layer in network.layers() if layer.type.name == "DIST_COLLECTIVE"]
    assert len(found) == 2 * num_layers + 1
    assert {layer.num_ranks for layer in found} == {num_ranks}
    outputs = (network.network.get_output(index) for index in range(network.network.num_outputs))
    assert {value.name: tuple(value.shape) for value in outputs}[tensors.LOGITS] == (-1, nano.spec.vocab_size)
    for kind, number in NATIVE.items():
        assert network.counts()[kind] == number * num_layers, kind


@pytest.mark.parametrize("capability", ["SM80", "SM89", "SM120"])
def test_an_engine_of_a_rank(capability: str, nano: Checkpoint, nano_portable: Path) -> None:
    """Its collectives stay layers of their own; attention over two heads needs leave to take the other kernel."""
    network, num_layers = float_network(nano, nano_portable, shard=Shard(1, 2)), nano.spec.num_layers
    assert network.spec.num_heads < MIN_DECODE_HEADS
    assert not network.build(capability, 4, 1)
    assert any("not supported by a dedicated kernel" in line for line in network.log.errors())
    network.allow_other_attention()
    layers = network.build(capability, 4, 1)
    assert sum("AllReduce" in name for name in layers) == 2 * num_layers
    assert sum("AllGather" in name for name in layers) == 1
    assert sum("_mha_" in name for name in layers) == num_layers
