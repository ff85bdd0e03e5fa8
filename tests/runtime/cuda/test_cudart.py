"""The CUDA runtime's wrapper against a C library of the same signatures."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from qwen_rt.errors import CapacityError, MissingDependencyError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.runtime.cuda.cudart import CudaError, Cudart, OutOfMemoryError, find_cudart
from qwen_rt.runtime.cuda.memory import Resources

from .fake import FakeGpu


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"FAKE_DRIVER": "0"}, MissingDependencyError, "no NVIDIA driver is loaded; expected one for CUDA 13.0"),
        ({"FAKE_DRIVER": "12080"}, MissingDependencyError, "supports CUDA 12.8; expected CUDA 13.0, the runtime's"),
        ({"FAKE_DEVICES": "0"}, MissingDependencyError, "no NVIDIA GPU can be used (cudaErrorNoDevice)"),
        ({"FAKE_SM": "75"}, UnsupportedModelError, "the GPU has SM 7.5; expected 8.0 or newer"),
    ],
)
def test_a_machine_that_cannot_run_is_told_in_one_line(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], kind: type[QwenRtError], text: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as caught:
        gpu.cuda.open_device(0)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("device", [-1, 1, 7])
def test_a_device_that_does_not_exist_is_named(gpu: FakeGpu, device: int) -> None:
    with pytest.raises(UsageError, match=f"device={device}; expected 0 to 0"):
        gpu.cuda.open_device(device)


def test_a_newer_minor_runtime_is_served_by_its_major_driver(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_RUNTIME", "13020")
    assert gpu.cuda.open_device(0) == 90
    assert gpu.cuda.runtime_version == 13020


def test_errors_carry_the_name_of_cuda(gpu: FakeGpu) -> None:
    with pytest.raises(CudaError, match=r"cudaSetDevice: cudaErrorFake \(a fake error\)") as caught:
        gpu.cuda.set_device(9)
    assert caught.value.status == 101
    gpu.library.fake_fail_at(0)
    with pytest.raises(OutOfMemoryError, match="cudaMalloc of 1000 bytes: cudaErrorMemoryAllocation") as memory:
        gpu.cuda.malloc(1000)
    assert isinstance(memory.value, CapacityError)
    with pytest.raises(OutOfMemoryError):
        gpu.cuda.malloc(1 << 50)


def test_copies_fills_and_events_work(gpu: FakeGpu) -> None:
    cuda, resources = gpu.cuda, Resources(gpu.cuda)
    stream, start, stop = resources.stream(), resources.event(timing=True), resources.event(timing=True)
    assert not cuda.event_query(start)
    device, _ = resources.device(100)
    pinned = resources.pinned(100)
    cuda.event_record(start, stream)
    cuda.fill(device, 7, 100, stream)
    cuda.copy(pinned.host, device, 50, stream)
    cuda.event_record(stop, stream)
    cuda.event_synchronize(stop)
    assert cuda.event_query(stop)
    assert cuda.stream_query(stream)
    assert cuda.elapsed_ms(start, stop) == 1.5
    assert bytes(pinned.array("uint8", (100,))) == b"\7" * 50 + b"\0" * 50
    resources.close()


def test_a_capture_replays_what_was_enqueued(gpu: FakeGpu) -> None:
    cuda, resources = gpu.cuda, Resources(gpu.cuda)
    stream, (device, _), pinned = resources.stream(), resources.device(4), resources.pinned(4)
    cuda.capture_begin(stream)
    cuda.copy(device, pinned.host, 4, stream)
    executable = resources.graph_exec(cuda.capture_end(stream))
    for value in (3, 9):
        ctypes.memset(pinned.host, value, 4)
        cuda.graph_launch(executable, stream)
        assert ctypes.string_at(device, 4) == bytes([value] * 4)
    resources.close()


def test_the_runtime_of_the_wheels_is_found_first(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "nvidia" / "cu13" / "lib"
    wheel.mkdir(parents=True)
    (wheel / "libcudart.so.13").write_bytes(gpu.path.read_bytes())
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    assert find_cudart()._name == str(wheel / "libcudart.so.13")
    assert Cudart().runtime_version == 13000


def test_a_broken_or_missing_runtime_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("qwen_rt.runtime.cuda.cudart._MAJORS", (99,))
    with pytest.raises(MissingDependencyError, match=r"libcudart\.so\) was not found; expected CUDA 12 or 13; pip"):
        find_cudart()
    wheel = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    wheel.mkdir(parents=True)
    (wheel / "libcudart.so.99").write_bytes(b"no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match=r"was not found: .*libcudart\.so\.99"):
        find_cudart()


def test_a_library_without_the_functions_is_refused() -> None:
    with pytest.raises(MissingDependencyError, match="too old"):
        Cudart(ctypes.CDLL(None))
