"""A quantized KV cache in the session, on the fake GPU: what is bound, what it takes, what does not fit together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError, CapacityError, GraphError
from qwen_rt.quantization import KV_FORMATS
from qwen_rt.runtime.cuda.graph import cache_format
from qwen_rt.runtime.cuda.memory import block_bytes, count_blocks
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.spec import ModelSpec

from ...core.configs import released_config
from .fake import CACHE_TYPES, FakeGpu, continuation, make_graph, request, small_spec
from .kit import VOCAB, decode, feed, open_session, prompt_of

SPEC = small_spec()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_block_takes_a_byte_an_element_and_a_scale_a_head(kv_format: str) -> None:
    spec = ModelSpec.from_config(released_config("7B"))
    assert block_bytes(spec, kv_format) == 2 * 28 * 4 * 64 * (128 + 4)
    assert block_bytes(spec, kv_format) / block_bytes(spec) == 132 / 256
    assert count_blocks(spec, 8 << 30, kv_format=kv_format) == (8 << 30) // block_bytes(spec, kv_format) == 4539
    with pytest.raises(CapacityError, match=r"expected at least 3\.8 MB, 2 blocks"):
        count_blocks(spec, 1 << 20, kv_format=kv_format)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_session_binds_pools_and_scales(gpu: FakeGpu, tmp_path: Path, kv_format: str) -> None:
    """The fake graph checks that all is bound as declared, without overlap and in place; the model reads its keys."""
    with open_session(gpu, tmp_path, kv_format) as session:
        assert session.kv_format == kv_format
        assert session.num_blocks == (4 << 20) // (2 * 2 * 64 * (20 + 4))
        rows = [request(prompt_of(n, n), [1 + 3 * i, 2 + 3 * i, 3 + 3 * i]) for i, n in enumerate((1, 63, 64, 130))]
        for row in rows:
            feed(session, row)
        decode(session, rows, 9)
        for row in rows:
            assert row.output_ids == continuation(row.prompt_ids, 10, VOCAB)
        graph = gpu.graphs[-1]
        for layer in range(SPEC.num_layers):
            assert graph.bound[tensors.past_value(layer)][0] == CACHE_TYPES[kv_format]
            kind, shape, _ = graph.bound[tensors.past_key_scale(layer)]
            assert (kind, shape) == (TensorProto.FLOAT, (session.num_blocks, 1, 64))
        pools = sum(graph.nbytes(name) for name in graph.bound if name.startswith("past_"))
        assert pools == session.num_blocks * block_bytes(SPEC, kv_format) <= session.memory_report().kv_cache


def test_the_cache_holds_nearly_twice_the_tokens(gpu: FakeGpu, tmp_path: Path) -> None:
    blocks = []
    for kv_format in ("bf16", "int8"):
        with open_session(gpu, tmp_path, kv_format) as session:
            blocks.append(session.num_blocks)
    assert blocks[1] / blocks[0] == pytest.approx(40 / 24, rel=1e-2)


@pytest.mark.parametrize("kv_format", CACHE_TYPES)
def test_the_graph_tells_the_format(kv_format: str) -> None:
    assert cache_format(make_graph(SPEC, kv_format=kv_format), SPEC.num_layers) == kv_format


def test_caches_that_no_kernel_takes_are_refused() -> None:
    model = onnx.ModelProto.FromString(make_graph(SPEC))
    pool = next(value for value in model.graph.input if value.name == tensors.past_key(1))
    pool.type.tensor_type.elem_type = TensorProto.INT8
    with pytest.raises(GraphError, match="the KV cache is INT8, BFLOAT16; expected BFLOAT16 or FLOAT8E4M3FN or INT8"):
        cache_format(model.SerializeToString(), SPEC.num_layers)
    for values in (model.graph.input, model.graph.output):
        for value in values:
            if value.name.endswith((".key", ".value")):
                value.type.tensor_type.elem_type = TensorProto.INT8
    with pytest.raises(GraphError, match=r"the graph has no input past_key_values\.0\.key_scale"):
        cache_format(model.SerializeToString(), SPEC.num_layers)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_bundle_is_served_and_its_manifest_believed(gpu: FakeGpu, nano_portable: Path, kv_format: str) -> None:
    from qwen_rt.export.build import BuildOptions, build
    from qwen_rt.export.settings import QuantizeOptions

    folder = nano_portable.parent / f"cuda-{kv_format}"
    options = BuildOptions(target="cuda", quantize=QuantizeOptions(kv_cache=kv_format), gate=False, quiet=True)
    build(nano_portable, folder, options)
    bundle = Bundle.open(folder)
    with CudaSession(bundle, kv_memory=64 << 20, max_rows=2, quiet=True, platform=gpu.platform()) as session:
        assert session.kv_format == kv_format
        row = request([20, 30, 40], [1])
        feed(session, row)
        assert row.output_ids == continuation(row.prompt_ids, 1, session.spec.vocab_size)
    assert bundle.manifest.quantization is not None
    other = dataclasses.replace(bundle.manifest.quantization, kv_format=None)
    object.__setattr__(bundle, "manifest", dataclasses.replace(bundle.manifest, quantization=other))
    with pytest.raises(BundleError, match=f"has a KV cache of {kv_format}; expected bf16, as "):
        CudaSession(bundle, kv_memory=64 << 20, max_rows=2, quiet=True, platform=gpu.platform())
