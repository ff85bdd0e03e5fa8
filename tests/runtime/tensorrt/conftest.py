"""An engine bundle of nano, the fake GPU with the fake TensorRT on it, and that nothing of them is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.runtime.tensorrt.platform import Platform
from qwen_rt.spec import ModelSpec

from ..cuda.fake import FakeGpu, compile_fake
from .fake import FakeTensorRt
from .kit import CAPACITY, make_bundle, make_engine, platform_of


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library of the fake CUDA runtime."""
    return compile_fake(tmp_path_factory.mktemp("fake_cuda_trt"))


@pytest.fixture
def gpu(fake_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake GPU of compute capability 8.9; after the test nothing of it may be taken."""
    monkeypatch.setenv("FAKE_SM", "89")
    gpu = FakeGpu(fake_library)
    gpu.library.fake_fail_at(-1)
    before = gpu.live()
    yield gpu
    gpu.library.fake_fail_at(-1)
    if gpu.live() != before:  # of sessions that a test has let go without closing them
        gc.collect()
    assert gpu.live() == before


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return Checkpoint.open("nano").spec


@pytest.fixture(scope="session")
def graph(nano_portable: Path, spec: ModelSpec) -> onnx.ModelProto:
    """The lowered graph of nano, computing in float32."""
    import onnx_ir as ir

    from qwen_rt.export.passes.lower_tensorrt import lower_tensorrt
    from qwen_rt.export.source import open_source

    model = open_source(nano_portable).load_graph()
    assert model is not None
    lowered: onnx.ModelProto = ir.serde.serialize_model(lower_tensorrt(model, spec, CAPACITY, "float32"))
    return lowered


@pytest.fixture(scope="session")
def bundles(
    nano_bundle: Path, graph: onnx.ModelProto, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Target → a bundle that no test may change."""
    folder, engine = tmp_path_factory.mktemp("engines"), make_engine(graph, spec)
    versions = {"tensorrt": "10.15.1.29", "tensorrt-rtx": "1.7.1.116"}
    return {
        target: make_bundle(nano_bundle, folder / target, engine, target, version)
        for target, version in versions.items()
    }


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["tensorrt-rtx"]


@pytest.fixture
def stack(gpu: FakeGpu) -> Iterator[tuple[Platform, FakeTensorRt]]:
    """A platform and the TensorRT of it; after the test no engine lives and nothing undefined has happened."""
    platform, trt = platform_of(gpu)
    yield platform, trt
    if trt._num_alive():
        gc.collect()
    assert trt._violations == []
    assert trt._num_alive() == 0


@pytest.fixture
def platform(stack: tuple[Platform, FakeTensorRt]) -> Platform:
    return stack[0]


@pytest.fixture
def trt(stack: tuple[Platform, FakeTensorRt]) -> FakeTensorRt:
    return stack[1]
