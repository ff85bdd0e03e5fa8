"""Quantized KV caches: both lowerings against the formula in numpy, and key biases of hundreds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.lower import graph_bytes, lowered_graph
from qwen_rt.export.passes.kv_cache_cpu import quantize_kv_cache
from qwen_rt.export.passes.lower_cpu import lower_cpu
from qwen_rt.export.passes.lower_cuda import lower_cuda
from qwen_rt.export.portable import WeightLocation, attach_weights, checkpoint_locations, portable_graph
from qwen_rt.export.quantize.kv import KvLayer, KvPlan, choose_kv_offsets
from qwen_rt.export.source import open_source
from qwen_rt.export.stamp import stamp_layers
from qwen_rt.export.trace import trace_single_layer
from qwen_rt.quantization import KV_FORMATS, key_offset_name, value_offset_name
from qwen_rt.row_reader import StoredRows
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import (
    KV_BF16_CACHE_RELATIVE,
    KV_BF16_MIN_COSINE,
    KV_BF16_RELATIVE,
    KV_FP32_RELATIVE,
    KV_LOGITS_MIN_COSINE,
    KV_LOGITS_RELATIVE,
    KV_STEP,
    LOWERED_RELATIVE,
)

from ..cases import Zoo
from ..checkpoints import SHAPES, random_ids, save_checkpoint
from ..compare import assert_close
from .graphs import all_positions, cache_feeds, run_model
from .paged import PagedModel
from .quantized_cache import NumpyModel, per_tensor_fp8
from .test_lower_cuda import calls_of

CAPACITY = 80
BIAS_FACTOR = 40  # makes key biases of 6 … 9 ones of 240 … 360


@dataclasses.dataclass
class Model:
    """A checkpoint whose graphs can be made as often as a test wants one."""

    checkpoint: Checkpoint
    weights: dict[str, NDArray[np.float32]]
    exported: Callable[[], ir.Model | None] = lambda: None

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def plan(self, kv_format: str) -> KvPlan:
        with StoredRows(self.checkpoint.tensors) as rows:
            return choose_kv_offsets(rows, self.spec, kv_format)

    def portable(self) -> ir.Model:
        return portable_graph(self.checkpoint, "float32", checkpoint_locations(self.checkpoint), self.exported())

    def lowered(self, target: str, kv: KvPlan | None) -> ir.Model:
        locations = checkpoint_locations(self.checkpoint)
        return lowered_graph(self.checkpoint, target, CAPACITY, locations, self.exported(), kv=kv)


def weights_of(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    with StoredRows(checkpoint.tensors) as rows:
        return {name: rows.rows(name, 0, shape[0]) for name, shape in checkpoint.spec.parameters().items()}


def zoo_model(zoo: Zoo, name: str) -> Model:
    case = zoo.case(name)
    checkpoint = Checkpoint.open(case.checkpoint)
    return Model(checkpoint, weights_of(checkpoint), lambda: open_source(case.portable).load_graph())


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with 8 key/value heads whose key biases reach hundreds, as those of Qwen2 do."""
    folder = save_checkpoint(SHAPES["heads-72b"], tmp_path_factory.mktemp("biased"))
    opened = Checkpoint.open(folder)
    weights = weights_of(opened)
    for name, values in weights.items():
        if name.endswith("k_proj.bias"):
            values *= BIAS_FACTOR
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert min(np.abs(weights[f"model.layers.{i}.self_attn.k_proj.bias"]).max() for i in range(2)) > 200
    traced = stamp_layers(trace_single_layer(checkpoint.spec, "float32"), checkpoint.spec.num_layers)
    return Model(checkpoint, weights, traced.clone)


def mixed_plan(plan: KvPlan, spec: ModelSpec, biases: Mapping[str, NDArray[np.float32]]) -> KvPlan:
    """Layer 0 with offsets that are nobody's bias, the others without any: no choice would give all of these."""
    shape = spec.num_kv_heads, spec.head_dim
    rng = np.random.default_rng(5)
    layers = []
    for index, layer in enumerate(plan.layers):
        names = [f"model.layers.{index}.self_attn.{letter}_proj.bias" for letter in "kv"]
        offsets = [np.zeros(shape, np.float32) for _ in names]
        if index == 0:  # what is left of a bias has to be a bfloat16
            rest = [rng.integers(-8, 8, size=shape).astype(np.float32) / 8 for _ in names]
            offsets = [biases[name].reshape(shape) - left for name, left in zip(names, rest, strict=True)]
        left_over = [biases[name] - offset.reshape(-1) for name, offset in zip(names, offsets, strict=True)]
        layers.append(KvLayer(*offsets, *left_over, layer.keys, layer.values))
    return KvPlan(plan.kv_format, tuple(layers))


# ---------------------------------------------------------------- target cuda


def assert_paged_model_is(model: Model, kv: KvPlan, num_steps: int) -> None:
    """Ragged prefills, a chunk across a block's end, decode steps, over poison; exact, then rounded as kernels do."""
    spec, calls = model.spec, calls_of(model.spec.vocab_size, num_steps)
    reference = NumpyModel(spec, model.weights, kv)
    expected = [reference.call(chunks) for chunks in calls]
    lowered = lower_cuda(model.portable(), spec, CAPACITY, kv=kv)
    for bf16, poison in ((False, np.nan), (True, 1e4)):
        paged = PagedModel(lowered, model.checkpoint.path, spec, CAPACITY, bf16, poison, kv.kv_format)
        bounds = {"relative": LOWERED_RELATIVE}
        if bf16:
            bounds = {"relative": KV_BF16_RELATIVE[kv.kv_format], "cosine": KV_BF16_MIN_COSINE[kv.kv_format]}
        for number, (chunks, logits) in enumerate(zip(calls, expected, strict=True)):
            assert_close(paged.call(chunks), logits, **bounds, what=f"logits of call {number}, bf16={bf16}")
        for sequence in reference.keys:
            found = paged.cached(sequence)
            for name, rows in reference.cached(sequence).items():
                numbers, scales = found[name], found[f"{name}_scale"]
                bounds["relative"] = LOWERED_RELATIVE if not bf16 else KV_BF16_CACHE_RELATIVE[kv.kv_format]
                assert_close(numbers * scales[..., None], rows, **bounds, what=f"{name}, bf16={bf16}")
        for name, slots in paged.untouched().items():
            wanted = np.full_like(slots, -128 if slots.dtype == np.int8 else poison)
            assert slots.tobytes() == wanted.tobytes(), f"{name} was written where no token belongs"


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("name", ["yarn", "yarn-mscale"])
def test_the_cuda_lowering_is_the_formula(name: str, kv_format: str, zoo: Zoo) -> None:
    model = zoo_model(zoo, name)
    assert_paged_model_is(model, model.plan(kv_format), num_steps=2)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_any_offsets_give_the_same_model_on_cuda(kv_format: str, zoo: Zoo) -> None:
    model = zoo_model(zoo, "linear-rope")
    assert_paged_model_is(model, mixed_plan(model.plan(kv_format), model.spec, model.weights), num_steps=1)


def test_the_cuda_graph_of_a_quantized_cache(zoo: Zoo) -> None:
    model = zoo_model(zoo, "linear-rope")
    plan = mixed_plan(model.plan("fp8"), model.spec, model.weights)
    graph = model.lowered("cuda", plan).graph
    values = (*graph.inputs, *graph.outputs)
    shapes = {value.name: (value.dtype, tuple(map(str, value.shape or ()))) for value in values}
    pool = (ir.DataType.FLOAT8E4M3FN, ("blocks", "1", "64", "64"))
    scales = (ir.DataType.FLOAT, ("blocks", "1", "64"))
    for layer in range(2):
        for name in (tensors.past_key, tensors.past_value, tensors.present_key, tensors.present_value):
            assert shapes[name(layer)] == pool
        for name in (tensors.past_key_scale, tensors.past_value_scale):
            assert shapes[name(layer)] == scales
            assert shapes[name(layer).replace("past_key_values", "present")] == scales
    nodes = [node for node in graph if node.op_type == "rope_kv_append_attention"]
    assert [node.attributes["kv_format"].as_float() for node in nodes] == [1.0, 1.0]
    assert [[value is None for value in node.inputs[7:11]] for node in nodes] == [[False] * 4, [False] * 2 + [True] * 2]
    initializers = graph.initializers
    assert key_offset_name(0) in initializers
    assert key_offset_name(1) not in initializers, "an offset of zeros costs a product and brings nothing"
    bias = initializers["model.layers.0.self_attn.k_proj.bias"]
    assert bias.dtype == ir.DataType.BFLOAT16
    left = bias.const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
    np.testing.assert_array_equal(left, plan.layers[0].key_bias)
    without = model.lowered("cuda", None).graph
    assert all(len(node.outputs) == 3 for node in without if node.op_type == "rope_kv_append_attention")


# ---------------------------------------------------------------- target cpu


def assert_cpu_model_is(model: Model, kv: KvPlan) -> None:
    """A prefill, then a chunk of one row, then a decode step, on ONNX Runtime with its float32 cache."""
    spec = model.spec
    ids = np.random.default_rng(2).integers(0, spec.vocab_size, 24)
    reference = NumpyModel(spec, model.weights, kv)
    expected = reference.logits(0, ids)
    graph = model.lowered("cpu", kv)
    relative = KV_FP32_RELATIVE[kv.kv_format]
    found = run_model(graph, model.checkpoint.path, all_positions(spec, ids))
    assert_close(found[tensors.LOGITS], expected, relative=relative, cosine=1 - 1e-5, what="logits of a prefill")
    cache, start = cache_feeds(spec, 1, 30), 0
    for count in (13, 10, 1):
        positions = {
            tensors.INPUT_IDS: ids[None, start : start + count],
            tensors.WRITE_INDICES: np.array([start]),
            tensors.KV_LENGTHS: np.array([start + count]),
            tensors.LOGITS_INDICES: np.array([count - 1]),
        }
        start += count
        found = run_model(graph, model.checkpoint.path, cache | positions)
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        what = f"logits after {start} tokens"
        assert_close(found[tensors.LOGITS][0], expected[start - 1], relative=relative, cosine=1 - 1e-5, what=what)
    for layer in range(spec.num_layers):
        for name, rows in (
            (tensors.past_key(layer), reference.keys[0][layer]),
            (tensors.past_value(layer), reference.values[0][layer]),
        ):
            step = KV_STEP[kv.kv_format]  # a number between two of the eight bits may fall the other way
            assert_close(cache[name][0, :, :start], rows, relative=1.01 * step, cosine=1 - 1e-5, what=name)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("name", ["yarn-mscale", "one-layer"])
def test_the_cpu_lowering_is_the_formula(name: str, kv_format: str, zoo: Zoo) -> None:
    """Stored as bfloat16 and float16, with YaRN's factor on the angles and without."""
    model = zoo_model(zoo, name)
    assert_cpu_model_is(model, model.plan(kv_format))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_any_offsets_give_the_same_model_on_the_cpu(kv_format: str, zoo: Zoo) -> None:
    model = zoo_model(zoo, "linear-rope")
    assert_cpu_model_is(model, mixed_plan(model.plan(kv_format), model.spec, model.weights))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_model_without_biases(kv_format: str, zoo: Zoo) -> None:
    """Its projections are not packed, and there is nothing to take out."""
    model = zoo_model(zoo, "linear-rope")
    spec = dataclasses.replace(model.spec, qkv_bias=False)
    traced = trace_single_layer(spec, "float32")

    def portable() -> ir.Model:
        graph = stamp_layers(traced.clone(), spec.num_layers)
        attach_weights(graph, checkpoint_locations(model.checkpoint))
        return graph

    with StoredRows(model.checkpoint.tensors) as rows:
        plan = choose_kv_offsets(rows, spec, kv_format)
    ids = random_ids(SHAPES["linear-rope"], 16)
    expected = NumpyModel(spec, model.weights, plan).logits(0, ids)
    on_cpu = lower_cpu(portable(), spec, CAPACITY, kv=plan)
    found = run_model(on_cpu, model.checkpoint.path, all_positions(spec, ids))[tensors.LOGITS]
    assert_close(found, expected, relative=KV_FP32_RELATIVE[kv_format], cosine=1 - 1e-5)
    on_cuda = lower_cuda(portable(), spec, CAPACITY, kv=plan)
    paged = PagedModel(on_cuda, model.checkpoint.path, spec, CAPACITY, kv_format=kv_format)
    assert_close(paged.call([(0, ids)])[0], expected[-1], relative=LOWERED_RELATIVE)


def names_of(model: ir.Model) -> list[str]:
    return [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_second_run_of_the_pass_changes_nothing(kv_format: str, zoo: Zoo) -> None:
    model = zoo_model(zoo, "linear-rope")
    plan = model.plan(kv_format)
    graph = model.lowered("cpu", None)
    plain = names_of(graph)
    assert quantize_kv_cache(graph, model.spec, plan) is graph
    once = graph_bytes(graph)
    assert once == graph_bytes(model.lowered("cpu", plan))
    quantize_kv_cache(graph, model.spec, plan)
    assert graph_bytes(graph) == once
    assert names_of(graph) == plain


def test_a_plan_of_another_model_is_refused(zoo: Zoo) -> None:
    model = zoo_model(zoo, "linear-rope")
    plan = model.plan("int8")
    with pytest.raises(GraphError, match="a KV plan of 1 layers; expected one of 2"):
        quantize_kv_cache(model.lowered("cpu", None), model.spec, KvPlan("int8", plan.layers[:1]))
    bare = KvPlan("int8", tuple(dataclasses.replace(layer, key_bias=None) for layer in plan.layers))
    with pytest.raises(GraphError, match=r"k_proj\.bias is in the graph alone"):
        quantize_kv_cache(model.lowered("cpu", None), model.spec, bare)


# ---------------------------------------------------------------- tensors in files


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_stored_offsets_and_biases_are_referred_to(target: str, zoo: Zoo, tmp_path: Path) -> None:
    model = zoo_model(zoo, "linear-rope")
    plan = mixed_plan(model.plan("fp8"), model.spec, model.weights)
    locations = checkpoint_locations(model.checkpoint)
    for name in plan.tensors():
        dtype, shape = ("F32", (1, 64)) if name.endswith("offset") else ("BF16", (64,))
        locations[name] = WeightLocation(tmp_path / "kv.safetensors", 0, 4, dtype, shape)
    graph = lowered_graph(model.checkpoint, target, CAPACITY, locations, model.exported(), kv=plan).graph
    for name in (key_offset_name(0), value_offset_name(0), "model.layers.1.self_attn.v_proj.bias"):
        stored = graph.initializers[name].const_value
        assert isinstance(stored, ir.ExternalTensor)
        assert stored.location == "kv.safetensors"
    locations[key_offset_name(0)] = dataclasses.replace(locations[key_offset_name(0)], dtype="BF16")
    with pytest.raises(GraphError, match="kv_offset is stored as BFLOAT16; expected FLOAT"):
        lowered_graph(model.checkpoint, target, CAPACITY, locations, model.exported(), kv=plan)


# ---------------------------------------------------------------- large key biases


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_large_key_biases_cost_nothing(kv_format: str, biased: Model) -> None:
    """Key biases of hundreds: per-tensor fp8 loses the model, ours stays as good as on any other model."""
    ids = random_ids(SHAPES["heads-72b"], 48)
    feeds = all_positions(biased.spec, ids)
    exact = run_model(biased.lowered("cpu", None), biased.checkpoint.path, feeds)[tensors.LOGITS]
    plan = biased.plan(kv_format)
    assert all(choice.candidate == "bias" for layer in plan.layers for choice in layer.keys)
    found = run_model(biased.lowered("cpu", plan), biased.checkpoint.path, feeds)[tensors.LOGITS]
    bounds = {"relative": KV_LOGITS_RELATIVE[kv_format], "cosine": KV_LOGITS_MIN_COSINE[kv_format]}
    assert_close(found, exact, **bounds, what="logits")
    same_best = (found.argmax(-1) == exact.argmax(-1)).mean()

    naive = NumpyModel(biased.spec, biased.weights, None, per_tensor_fp8).logits(0, ids)
    cosine = float((naive * exact).sum() / np.linalg.norm(naive) / np.linalg.norm(exact))
    assert cosine < 0.92, "1 - cosine = e² / 2: an error of 40 %"
    assert (naive.argmax(-1) == exact.argmax(-1)).mean() < 0.6
    assert same_best > 0.85


def test_large_key_biases_on_a_paged_cache(biased: Model) -> None:
    """The same through the CUDA lowering, whose projections never see the large numbers."""
    plan = biased.plan("fp8")
    ids = random_ids(SHAPES["heads-72b"], 40)
    locations = checkpoint_locations(biased.checkpoint)
    graph = biased.portable()
    for value in graph.graph.initializers.values():  # the test's weights are float32: take them as bfloat16
        if str(value.name) in locations:
            number = biased.weights[str(value.name)].astype(ir.DataType.BFLOAT16.numpy())
            value.const_value = ir.tensor(number, name=value.name)
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    lowered = lower_cuda(graph, biased.spec, CAPACITY, kv=plan)
    rounded = {name: w.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32) for name, w in biased.weights.items()}
    expected = NumpyModel(biased.spec, rounded, None).logits(0, ids)[-1]
    paged = PagedModel(lowered, biased.checkpoint.path, biased.spec, CAPACITY, kv_format="fp8")
    bounds = {"relative": KV_LOGITS_RELATIVE["fp8"], "cosine": KV_LOGITS_MIN_COSINE["fp8"]}
    assert_close(paged.call([(0, ids)])[0], expected, **bounds)
