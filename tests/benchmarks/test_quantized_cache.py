"""KV caches in torch: the references of the GPU against those in numpy, what ops are handed, and random offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen_rt.benchmarks import bench_kernels, bench_latency
from qwen_rt.benchmarks.kernel_references import attention_8bit
from qwen_rt.benchmarks.kernel_shapes import SHAPES, ModelShape
from qwen_rt.benchmarks.quantized_cache import KvCache, quantize_heads, random_cache
from qwen_rt.errors import UsageError
from qwen_rt.ops import KV_CACHE_FORMATS
from qwen_rt.plugins.reference_attention import quantize_kv, rope_kv_append_attention
from qwen_rt.quantization import KV_FORMATS
from qwen_rt.spec import ModelSpec

from .test_bench_kernels import SHAPE, Recorder

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 64, 16
OP = "rope_kv_append_attention"


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_heads_are_rounded_as_numpy_rounds_them(kv_format: str) -> None:
    x = torch.randn(500, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    numbers, scales = quantize_heads(x, kv_format)
    expected, expected_scales = quantize_kv(x.numpy(), kv_format)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    assert (bits(numbers) != expected.view(np.uint8)).mean() < 1e-4, "torch rounds to float32 on the way to fp8"
    assert scales[3] == 0


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_reference_agrees_with_that_in_numpy(kv_format: str) -> None:
    """Two chunks on blocks of any order, with offsets of hundreds."""
    random = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    (keys, key_scales), (values, value_scales) = (
        quantize_heads(draw(9, KV_HEADS, BLOCK, HEAD_DIM), kv_format) for _ in range(2)
    )
    offsets = [draw(KV_HEADS, HEAD_DIM) * 100 for _ in range(2)]
    cache = KvCache(kv_format, keys, values, key_scales, value_scales, *offsets)
    qkv = draw(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    positions, starts = torch.tensor([20, 21, 22, 3, 4]), torch.tensor([0, 3, 5], dtype=torch.int32)
    tables = torch.tensor([[1, 2, 7], [5, 6, 7]], dtype=torch.int32)
    inv_freq = (1e6 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).float()
    scale = HEAD_DIM**-0.5
    out, new_keys, new_values = attention_8bit(qkv, positions, inv_freq, tables, cache, scale, 1.2, starts)
    expected, *_ = rope_kv_append_attention(
        qkv.float().numpy(),
        positions.numpy(),
        starts.numpy(),
        inv_freq.numpy(),
        tables.numpy(),
        *(pool.numpy() if kv_format == "int8" else bits(pool) for pool in (keys, values)),
        *(part.numpy() for part in (key_scales, value_scales, *offsets)),
        scale=scale,
        rope_scaling=1.2,
        kv_format=KV_CACHE_FORMATS[kv_format],
    )
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(
        new_keys.norm(dim=-1), 1.2 * qkv[:, HEADS * HEAD_DIM :].double().view(5, 4, -1)[:, :2].norm(dim=-1)
    )
    assert torch.equal(new_values.flatten(1), qkv[:, -KV_HEADS * HEAD_DIM :].double())


@pytest.mark.parametrize("kv_format", KV_CACHE_FORMATS)
def test_attention_gets_a_cache_of_the_format(kv_format: str) -> None:
    """Tensors without data, as if they lay on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder: Any = Recorder()
    with FakeTensorMode():
        cases = bench_kernels.OpCases(recorder, SHAPE, 3, 100, kv_format=kv_format)
        cases.prepare(OP)[0][0]()
        cache = random_cache(kv_format, 5, 2, 64, 128, offset=1.0)
    dims = recorder.dims[OP][0]
    assert dims["scale_blocks"] == (0 if kv_format == "bf16" else dims["num_blocks"])
    is_quantized = kv_format != "bf16"
    assert {name for name, tensor in cache.tensors().items() if tensor is not None} == {
        "k_cache", "v_cache", *(("k_scales", "v_scales", "k_offset", "v_offset") if is_quantized else ())
    }  # fmt: skip


def test_bytes_of_a_token() -> None:
    shape = ModelShape(256, 2, 4, 2, 128, 512, 1000)
    assert shape.kv_bytes(1) == 2 * 2 * 2 * 128 * 2
    assert shape.kv_bytes(3, "fp8") == shape.kv_bytes(3, "int8") == 3 * 2 * 2 * 2 * (128 + 4)
    assert shape.op_cost(OP, 2, 100, kv_format="int8").read_bytes == 200 * 2 * 2 * 132


def test_random_offsets_are_those_of_every_layer() -> None:
    spec = ModelSpec.from_config(SHAPES["0.5b"].config())
    assert bench_latency.random_offsets(spec, "bf16") is None
    plan = bench_latency.random_offsets(spec, "fp8")
    assert plan is not None
    assert (plan.kv_format, len(plan.layers)) == ("fp8", 24)
    assert all(layer.key_offset.shape == (2, 64) and layer.key_offset.any() for layer in plan.layers)


def test_a_cache_is_of_shapes_only(tmp_path: Any) -> None:
    assert bench_latency.find_model("7b", None, 0, kv_format="int8").kv_format == "int8"
    assert bench_latency.find_model("7b", None, 0).kv_format == "bf16"
    with pytest.raises(UsageError, match="--kv-cache fp8 with "):
        bench_latency.find_model(str(tmp_path), None, 0, kv_format="fp8")
