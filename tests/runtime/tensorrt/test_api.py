"""Every name of TensorRT that the session uses exists in the real module: the fake has no others."""

from __future__ import annotations

import enum
import inspect
import mmap
import types
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import BundleError, MissingDependencyError, QwenRtError, UnsupportedModelError
from qwen_rt.runtime.tensorrt.platform import Platform, load_flavour, make_log

from ..cuda.fake import FakeGpu
from . import fake
from .kit import open_session

CLASSES = {
    "Runtime": fake.Runtime,
    "ICudaEngine": fake.ICudaEngine,
    "IExecutionContext": fake.StreamCapturableContext,
    "IRuntimeConfig": fake.IRuntimeConfig,
    "ILogger": fake.ILogger,
}
ENUMS = [
    fake.DataType,
    fake.TensorIOMode,
    fake.ExecutionContextAllocationStrategy,
    fake.DynamicShapesKernelSpecializationStrategy,
]


@pytest.fixture(scope="module")
def real() -> Any:
    try:
        return load_flavour("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))


def public(kind: Any) -> set[str]:
    own = {name for name in dir(kind) if not name.startswith("_")} - set(dir(object))
    return own | {name for name in vars(kind).get("__annotations__", {}) if not name.startswith("_")}


@pytest.mark.trt
@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_properties_exist(name: str, real: Any) -> None:
    missing = {one for one in public(CLASSES[name]) if not hasattr(getattr(real, name), one)}
    assert not missing


@pytest.mark.trt
def test_attributes_that_are_set_exist(real: Any) -> None:
    assert {name for name in vars(fake.IRuntimeConfig()) if not name.startswith("_")} <= set(dir(real.IRuntimeConfig))


@pytest.mark.trt
@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_members_exist(kind: type[enum.Enum], real: Any) -> None:
    assert {member.name for member in kind} <= set(getattr(real, kind.__name__).__members__)
    assert {s.name for s in fake.ILogger.Severity} == set(real.ILogger.Severity.__members__)


@pytest.mark.trt
@pytest.mark.parametrize("name", CLASSES)
def test_parameters_have_the_real_names_and_order(name: str, real: Any) -> None:
    """The bindings tell their signatures in their docstrings; an overload that fits is enough."""
    for method in public(CLASSES[name]):
        own = getattr(CLASSES[name], method)
        told = getattr(real, name).__dict__.get(method) or getattr(getattr(real, name), method)
        if not inspect.isfunction(own) or not told.__doc__:
            continue
        wanted = [one for one in inspect.signature(own).parameters if one != "self"]
        signatures = [line for line in told.__doc__.splitlines() if f"{method}(" in line and "self" in line]
        fits = [line for line in signatures if all(f"{one}:" in line for one in wanted)]
        assert fits or not signatures, (method, wanted, signatures)


@pytest.mark.trt
def test_the_real_runtime_takes_a_mapped_file_and_logs_to_us(real: Any, tmp_path: Path) -> None:
    """As far as a machine without a GPU goes: a file that is no engine is refused in TensorRT's words."""
    file = tmp_path / "no.engine"
    file.write_bytes(b"no engine" * 1000)
    log = make_log(real)
    runtime = real.Runtime(log)
    with file.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    assert runtime.deserialize_cuda_engine(data) is None
    text = log.last()
    assert text != "TensorRT gives no reason"
    assert "\n" not in text
    assert log.last() == "TensorRT gives no reason"


@pytest.fixture(scope="module")
def real_bundle(real: Any, nano_portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano compiled by TensorRT-RTX."""
    from qwen_rt.export.build import BuildOptions, build

    folder = tmp_path_factory.mktemp("real") / "nano"
    build(nano_portable, folder, BuildOptions(target="tensorrt-rtx", max_length=64, quiet=True))
    return folder


@pytest.mark.trt
def test_a_real_engine_gets_as_far_as_its_loading(real: Any, real_bundle: Path, gpu: FakeGpu) -> None:
    """Its card fits the GPU that the fake says is there; TensorRT itself finds none."""
    if not without_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(
        BundleError, match=r"engine/rank0\.engine: TensorRT 1\.\S+ cannot load it: .*build: qwen-rt build"
    ):
        open_session(real_bundle, Platform(gpu.cuda, real))


@pytest.mark.trt
def test_a_real_engine_of_another_gpu(
    real: Any, real_bundle: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SM", "90")
    with pytest.raises(UnsupportedModelError, match="does not support compute capability"):
        open_session(real_bundle, Platform(gpu.cuda, real))
    other = types.SimpleNamespace(**{name: getattr(real, name) for name in dir(real)} | {"__version__": "1.9"})
    monkeypatch.setenv("FAKE_SM", "89")
    with pytest.raises(BundleError, match=r"was built by tensorrt-rtx 1\.\S+, and 1\.9 is installed"):
        open_session(real_bundle, Platform(gpu.cuda, other))


def without_gpu() -> bool:
    try:
        return Platform.real("tensorrt-rtx").cuda.device_count() == 0
    except QwenRtError:
        return True


@pytest.mark.trt
def test_the_real_platform_without_a_gpu_is_one_line(real: Any, bundle: Path) -> None:
    if not without_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(QwenRtError) as caught:
        open_session(bundle, Platform.real("tensorrt-rtx"))
    assert "\n" not in str(caught.value)
