"""Weights: their places on the device, real shards through real threads, random ones."""

from __future__ import annotations

import ctypes
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qwen_rt.errors import BundleError, GraphError, MissingDependencyError, QwenRtError
from qwen_rt.runtime.cuda.graph import split_weights
from qwen_rt.runtime.cuda.memory import ALIGNMENT, Resources
from qwen_rt.runtime.cuda.weights import (
    BF16,
    FLOAT,
    FLOAT8,
    FLOAT16,
    INT8,
    INT32,
    ITEM_BYTES,
    UINT8,
    ExternalWeight,
    FileWeights,
    LoadStats,
    RandomWeights,
    WeightPlan,
    plan_weights,
    to_bf16,
)
from qwen_rt.spec import ModelSpec

from ...core.configs import released_config
from .fake import FakeGpu, make_graph, small_spec, write_shards


def plan_of(spec: ModelSpec, folder: Path | None = None) -> WeightPlan:
    return plan_weights(split_weights(make_graph(spec, folder), spec.num_layers)[1])


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B", "72B"])
def test_what_is_multiplied_together_lies_together(size: str) -> None:
    spec = ModelSpec.from_config(released_config(size))
    plan = plan_of(spec)
    tensors = {tensor.source.name: tensor for tensor in plan.tensors}
    assert tensors.keys() == spec.parameters().keys()
    for layer in range(spec.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for names in (
            [f"{attention}.{name}_proj.weight" for name in "qkv"],
            [f"{attention}.{name}_proj.bias" for name in "qkv"],
            [f"{mlp}.{name}_proj.weight" for name in ("gate", "up")],
        ):
            members = [tensors[name] for name in names]
            for first, second in pairwise(members):
                assert first.stop == second.address_offset, names
    places = sorted((tensor.address_offset, tensor.stop) for tensor in plan.tensors)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert places[-1][1] <= plan.nbytes < spec.weight_bytes("bfloat16") * 1.001


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_bytes", [256, 1000, 4096, 1 << 20])
def test_every_byte_arrives_where_it_belongs(gpu: FakeGpu, tmp_path: Path, block_bytes: int, tied: bool) -> None:
    """Odd sizes, tensors larger and smaller than a buffer, more blocks than threads and fewer."""
    spec = small_spec(hidden_size=33, intermediate_size=77, tie_word_embeddings=tied)
    weights = write_shards(spec, tmp_path, count=3)
    plan = plan_of(spec, tmp_path)
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    source = FileWeights(files_of(tmp_path), block_bytes=block_bytes, num_threads=4)
    stats = source.fill(plan, base, gpu.cuda, 0, quiet=True)
    assert stats.nbytes == sum(array.nbytes for array in weights.values())
    assert stats.seconds > 0
    assert len(plan.tensors) == len(weights)
    for tensor in plan.tensors:
        found = ctypes.string_at(base + tensor.address_offset, tensor.source.nbytes)
        assert found == weights[tensor.source.name].tobytes(), tensor.source.name
    resources.close()


def test_loading_reports_bytes(gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = small_spec()
    weights = write_shards(spec, tmp_path)
    plan = plan_of(spec, tmp_path)
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    FileWeights(files_of(tmp_path)).fill(plan, base, gpu.cuda, 0, quiet=False)
    resources.close()
    told = capsys.readouterr()
    assert told.out == ""
    total = sum(array.nbytes for array in weights.values()) / 1000
    assert f"loading weights: done {total:.1f} kB" in told.err


@pytest.mark.parametrize("damage", ["truncated", "missing", "unlisted", "folder"])
def test_a_damaged_shard_is_one_line_and_nothing_stays(gpu: FakeGpu, tmp_path: Path, damage: str) -> None:
    spec = small_spec()
    write_shards(spec, tmp_path)
    plan = plan_of(spec, tmp_path)
    files, victim = files_of(tmp_path), tmp_path / "model-1.safetensors"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "unlisted":
        del files[victim.name]
    else:
        victim.unlink()
        if damage == "folder":
            victim.mkdir()
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    with pytest.raises(BundleError, match="model-1") as caught:
        FileWeights(files, block_bytes=4096).fill(plan, base, gpu.cuda, 0, quiet=True)
    assert "\n" not in str(caught.value)
    if damage == "truncated":
        assert "ends at byte" in caught.value.what
    resources.close()


def test_no_failed_allocation_leaves_anything(gpu: FakeGpu, tmp_path: Path) -> None:
    spec = small_spec()
    write_shards(spec, tmp_path)
    plan = plan_of(spec, tmp_path)
    owner = Resources(gpu.cuda)
    base, _ = owner.device(plan.nbytes)
    source = FileWeights(files_of(tmp_path), block_bytes=8192, num_threads=3)
    for index in range(1 + 2 * 3):
        gpu.library.fake_fail_at(index)
        with pytest.raises(QwenRtError, match="cudaErrorMemoryAllocation"):
            source.fill(plan, base, gpu.cuda, 0, quiet=True)
        assert gpu.live() == {"device": 1}
    gpu.library.fake_fail_at(7)
    source.fill(plan, base, gpu.cuda, 0, quiet=True)
    owner.close()


def test_random_weights_fill_every_tensor(gpu: FakeGpu) -> None:
    spec = small_spec()
    plan = plan_of(spec)
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    RandomWeights(gpu.path, seed=3).fill(plan, base, gpu.cuda, 0, quiet=True)
    for index, tensor in enumerate(plan.tensors):
        data = ctypes.string_at(base + tensor.address_offset, tensor.source.nbytes)
        bits = np.frombuffer(data, np.uint16)
        if len(tensor.source.shape) == 2:  # what the fake generator writes
            expected = ((3 << 32) + index + np.arange(bits.size)) % 2**16
            assert (bits == expected).all(), tensor.source.name
            continue
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        centre, width = (0, 0.02) if tensor.source.name.endswith("bias") else (1, 0.1)
        assert abs(values.mean() - centre) < width, tensor.source.name
        assert 0.3 * width < values.std() < 2 * width, tensor.source.name
    resources.close()


def quantized_plan() -> WeightPlan:
    """q, k and v of one layer in int4, gate and up in fp8, and what belongs to them."""
    weights = []
    for name, rows in (("self_attn.q", 64), ("self_attn.k", 32), ("self_attn.v", 32)):
        stem = f"model.layers.0.{name}_proj.weight"
        parts = {"": (UINT8, (rows, 128)), "_scale": (FLOAT16, (rows, 8)), "_zero_point": (UINT8, (rows, 8))}
        weights += [external(stem + part, *of) for part, of in parts.items()]
        weights.append(external(f"{stem}_perm", INT32, (256,)))
    for name in ("gate", "up"):
        stem = f"model.layers.0.mlp.{name}_proj.weight"
        weights += [external(stem, FLOAT8, (64, 256)), external(f"{stem}_scale", FLOAT, (64, 1))]
    weights.append(external("model.layers.0.mlp.down_proj.weight", INT8, (256, 64)))
    weights.append(external("model.layers.0.mlp.down_proj.weight_scale", FLOAT, (256, 1)))
    weights.append(external("model.layers.0.self_attn.k_proj.kv_offset", FLOAT, (1, 16)))
    return plan_weights(weights)


def external(name: str, element_type: int, shape: tuple[int, ...]) -> ExternalWeight:
    return ExternalWeight(name, shape, "file", 0, ITEM_BYTES[element_type] * math.prod(shape), element_type)


def test_parts_of_quantized_matrices_lie_together() -> None:
    places = {tensor.source.name: tensor for tensor in quantized_plan().tensors}
    for stem, names, parts in (
        ("model.layers.0.self_attn", "qkv", ("", "_scale", "_zero_point")),
        ("model.layers.0.mlp", ("gate", "up"), ("", "_scale")),
    ):
        for part in parts:
            members = [places[f"{stem}.{name}_proj.weight{part}"] for name in names]
            for first, second in pairwise(members):
                assert first.stop == second.address_offset, part


def test_random_quantized_weights_are_whole(gpu: FakeGpu) -> None:
    plan = quantized_plan()
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    RandomWeights(gpu.path).fill(plan, base, gpu.cuda, 0, quiet=True)
    for index, tensor in enumerate(plan.tensors):
        data = np.frombuffer(ctypes.string_at(base + tensor.address_offset, tensor.source.nbytes), np.uint8)
        if tensor.source.name.endswith("_perm"):
            assert (data.view(np.int32) == np.arange(256)).all()
        elif tensor.source.name.endswith(("_zero_point", "kv_offset")):
            assert (data == (0x88 if tensor.source.element_type == UINT8 else 0)).all()
        elif tensor.source.element_type == FLOAT:
            assert (data.view(np.uint32) == index + np.arange(data.size // 4)).all()
        elif tensor.source.element_type == FLOAT16:
            assert (data.view(np.uint16) == index + np.arange(data.size // 2)).all()
        else:
            assert (data == (index + np.arange(data.size)) % 256).all()
    resources.close()


def test_random_weights_need_the_generator(tmp_path: Path) -> None:
    (tmp_path / "libnone.so").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"qwen_rt\.plugins\.build"):
        RandomWeights(tmp_path / "libnone.so")


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5, 0.0], np.float32)
    assert to_bf16(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC020, 0]


def test_a_plan_refuses_what_does_not_add_up() -> None:
    with pytest.raises(GraphError, match="has 7 bytes"):
        plan_weights([ExternalWeight("a", (2, 2), "file", 0, 7)])
    with pytest.raises(GraphError, match="twice"):
        plan_weights([ExternalWeight("a", (2, 2), "file", 0, 8)] * 2)


def test_a_rate_is_bytes_by_time() -> None:
    assert LoadStats(3_000_000_000, 1.5).gb_s == 2.0


def test_random_layers_but_the_first_add_an_eighth(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the scales of quantized matrices, through the numbers themselves of others."""
    source, sizes = RandomWeights(gpu.path), []
    names = [f"model.layers.{layer}.{place}" for layer in (0, 1, 10) for place in ("self_attn.o", "mlp.down", "mlp.up")]
    weights = []
    for name in names:
        weights += [
            external(f"{name}_proj.weight", FLOAT8, (8, 8)),
            external(f"{name}_proj.weight_scale", FLOAT, (8, 1)),
        ]
    plan = plan_weights([external("model.layers.3.mlp.down_proj.weight", BF16, (8, 8)), *weights])

    def note(target: int, count: int, element_type: int, size: float, seed: int, stream: int) -> int:
        sizes.append(size)
        return 0

    monkeypatch.setattr(source, "_fill", note)
    resources = Resources(gpu.cuda)
    base, _ = resources.device(plan.nbytes)
    source.fill(plan, base, gpu.cuda, 0, quiet=True)
    resources.close()
    found = {tensor.source.name: size for tensor, size in zip(plan.tensors, sizes, strict=True)}
    assert found["model.layers.3.mlp.down_proj.weight"] == pytest.approx(0.02 / 8)
    for name in names:
        is_less = "up_proj" not in f"{name}_proj" and ".0." not in name
        assert found[f"{name}_proj.weight"] == 120.0
        assert found[f"{name}_proj.weight_scale"] == pytest.approx(0.02 / 120 / (8 if is_less else 1)), name
