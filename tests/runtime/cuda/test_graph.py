"""The graph before ONNX Runtime sees it, and ONNX Runtime where it has no CUDA."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError, GraphError, MissingDependencyError, UsageError
from qwen_rt.runtime.cuda.graph import OrtRunner, split_weights
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.cuda.steps import bucket_of, buckets_up_to
from qwen_rt.safetensors_header import read_header

from .fake import FakeGpu, continuation, make_graph, request, small_spec, write_shards

SPEC = small_spec()


def test_weights_become_inputs_and_small_constants_stay(tmp_path: Path) -> None:
    write_shards(SPEC, tmp_path)
    changed, weights = split_weights(make_graph(SPEC, tmp_path), SPEC.num_layers)
    model = onnx.ModelProto.FromString(changed)
    assert [item.name for item in model.graph.initializer] == ["inv_freq"]
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    assert {weight.name: weight.shape for weight in weights} == SPEC.parameters()
    for weight in weights:
        assert inputs[weight.name].elem_type == TensorProto.BFLOAT16
        assert tuple(dim.dim_value for dim in inputs[weight.name].shape.dim) == weight.shape
        assert weight.location in ("model-0.safetensors", "model-1.safetensors")
        assert weight.offset > 0


def test_graphs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no ONNX model"):
        split_weights(b"\xff\xff\xff", 2)
    with pytest.raises(GraphError, match=r"no input past_key_values\.2\.key"):
        split_weights(make_graph(SPEC), 3)
    with pytest.raises(GraphError, match=r"is FLOAT16; expected BFLOAT16 or FLOAT8E4M3FN or INT8 or UINT8"):
        split_weights(make_graph(SPEC, data_type=TensorProto.FLOAT16), 2)


def external(name: str, data_type: int, *dims: int) -> TensorProto:
    weight = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="none")
    return weight


def test_parts_of_quantized_matrices_keep_their_types() -> None:
    model = onnx.ModelProto.FromString(make_graph(SPEC))
    parts = {
        "a.weight": (TensorProto.FLOAT8E4M3FN, (4, 8), 32),
        "a.weight_scale": (TensorProto.FLOAT, (4, 1), 16),
        "b.weight": (TensorProto.UINT8, (4, 4), 16),
        "b.weight_scale": (TensorProto.FLOAT16, (4, 2), 16),
        "b.weight_zero_point": (TensorProto.UINT8, (4, 1), 4),
        "b.weight_perm": (TensorProto.INT32, (8,), 32),
        "c.weight": (TensorProto.INT8, (4, 8), 32),
        "d.kv_offset": (TensorProto.FLOAT, (1, 8), 32),
    }
    model.graph.initializer.extend(external(name, kind, *shape) for name, (kind, shape, _) in parts.items())
    changed, weights = split_weights(model.SerializeToString(), SPEC.num_layers)
    found = {weight.name: weight for weight in weights}
    inputs = {value.name: value.type.tensor_type for value in onnx.ModelProto.FromString(changed).graph.input}
    for name, (kind, shape, nbytes) in parts.items():
        assert (found[name].element_type, found[name].shape, found[name].nbytes) == (kind, shape, nbytes)
        assert inputs[name].elem_type == kind


@pytest.mark.parametrize(
    ("name", "data_type", "expected"),
    [
        ("a.weight", TensorProto.INT4, "INT4; expected BFLOAT16"),
        ("a.weight_scale", TensorProto.BFLOAT16, "BFLOAT16; expected FLOAT or FLOAT16"),
        ("a.weight_zero_point", TensorProto.FLOAT, "FLOAT; expected INT8 or UINT8"),
        ("a.weight_perm", TensorProto.INT64, "INT64; expected INT32"),
    ],
)
def test_types_that_no_kernel_takes_are_refused(name: str, data_type: int, expected: str) -> None:
    model = onnx.ModelProto.FromString(make_graph(SPEC))
    model.graph.initializer.append(external(name, data_type, 4, 8))
    with pytest.raises(GraphError, match=f"{name} is {expected}"):
        split_weights(model.SerializeToString(), SPEC.num_layers)


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("offset", "x"), ("length", "x"), ("location", None)])
def test_broken_references_are_named(key: str, value: str | None) -> None:
    model = onnx.ModelProto.FromString(make_graph(SPEC))
    entries = model.graph.initializer[3].external_data
    index = next(index for index, entry in enumerate(entries) if entry.key == key)
    if value is None:
        del entries[index]
    else:
        entries[index].value = value
    with pytest.raises(GraphError, match=model.graph.initializer[3].name):
        split_weights(model.SerializeToString(), 2)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime has CUDA here"
)
def test_onnxruntime_without_cuda_names_the_command(gpu: FakeGpu) -> None:
    with pytest.raises(MissingDependencyError, match="pip install --force-reinstall --no-deps onnxruntime-gpu"):
        OrtRunner(b"", gpu.path, 0, 1)


def test_a_library_without_its_ops_is_refused(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(MissingDependencyError, match=r"cannot use libfake\.so: .*; run `python -m qwen_rt") as caught:
        OrtRunner(b"", gpu.path, 0, 1)
    assert "\n" not in str(caught.value)


def test_from_graph_wants_weights(gpu: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither weights nor base_dir"):
        CudaSession.from_graph(b"", SPEC, 64, platform=gpu.platform())
    with pytest.raises(BundleError, match="is no folder"):
        CudaSession.from_graph(b"", SPEC, 64, base_dir=tmp_path / "none", platform=gpu.platform())


def test_buckets_serve_every_number_of_rows() -> None:
    assert buckets_up_to(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert buckets_up_to(5) == (1, 2, 4, 5)
    assert buckets_up_to(1) == (1,)
    for most in range(1, 65):
        for rows in range(1, most + 1):
            bucket = bucket_of(rows, most)
            assert rows <= bucket <= most
            assert all(smaller < rows for smaller in buckets_up_to(most) if smaller < bucket)


def test_importing_the_session_loads_nothing_heavy() -> None:
    code = (
        "import sys, qwen_rt.runtime.cuda.session; print({'torch', 'onnxruntime', 'onnx', 'cuda'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_the_exporters_graph_is_bound_as_it_declares(gpu: FakeGpu, nano_portable: Path) -> None:
    """The contract of exporter and session, with nano's real graph and shards: names, dtypes, shapes, every one."""
    from qwen_rt.export.build import BuildOptions, build

    folder = nano_portable.parent / "cuda-contract"
    build(nano_portable, folder, BuildOptions(target="cuda", quiet=True))
    bundle = Bundle.open(folder)
    with CudaSession(bundle, kv_memory=64 << 20, max_rows=2, quiet=True, platform=gpu.platform()) as session:
        graph = gpu.graphs[-1]
        assert graph.runs == [(session.chunk_tokens, 1), (2, 2)], "the warm-up ran with everything bound"
        for name, shape in session.spec.parameters().items():
            assert graph.bound[name][1] == shape
        shards = {path.name: read_header(path).tensors for path in bundle.weight_files.values()}
        for tensors in shards.values():
            for name, ref in tensors.items():
                with ref.real_path.open("rb") as file:
                    file.seek(ref.offset)
                    assert ctypes.string_at(graph.bound[name][2], ref.nbytes) == file.read(ref.nbytes), name
        row = request([20, 30, 40], [1])
        result = session.prefill(row, np.array(row.prompt_ids, np.int64), 0, is_last=True)
        assert result is not None
        assert result.token_ids.tolist() == continuation(row.prompt_ids, 1, session.spec.vocab_size)


def test_a_bundle_of_another_target_is_refused(gpu: FakeGpu, nano_bundle: Path) -> None:
    """The command that the message names is one that works: a bundle is built from a checkpoint, not from another."""
    bundle = Bundle.open(nano_bundle)
    command = f"qwen-rt build {bundle.manifest.checkpoint.path} --target cuda"
    with pytest.raises(BundleError, match=f"has target cpu; expected a bundle of target cuda; build one: {command}"):
        CudaSession(bundle, platform=gpu.platform())
