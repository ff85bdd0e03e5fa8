"""Doctor and target cuda: driver, plugin library and its machine code, each with the command that gets it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from qwen_rt import doctor, machine, targets
from qwen_rt.machine import Gpu, Gpus, Kernels, Nvcc, Started
from qwen_rt.targets import TARGETS, Facts, Lack

H100 = Gpus((Gpu("NVIDIA H100 80GB HBM3", 85 * 10**9, 80 * 10**9, "9.0"),), "580.65", "13.0")
NVCC = Nvcc("/usr/local/cuda/bin/nvcc", "13.0.88")
NOT_BUILT = Kernels(known_sms=(80, 86, 89, 90, 100, 120), in_checkout=True)
BUILT = dataclasses.replace(NOT_BUILT, path="build/plugins/x/libqwen_rt_plugins.so", sms=(90,), is_current=True)
CUDA = ("CUDAExecutionProvider",)


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.collect()


def _needs_and_has(monkeypatch: pytest.MonkeyPatch, need: str, **versions: str) -> None:
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [f'{need}; extra == "cuda"'])
    monkeypatch.setattr(targets, "installed_version", found.get)


def _lacks(
    gpus: Gpus,
    providers: tuple[str, ...] | None = CUDA,
    kernels: Kernels = BUILT,
    nvcc: Nvcc | None = NVCC,
) -> list[Lack]:
    target = next(target for target in TARGETS if target.name == "cuda")
    return target.probe(Facts(gpus, providers, kernels, nvcc))


def _one_gpu(capability: str, driver: str = "580.65") -> Gpus:
    return Gpus((Gpu("A GPU", 80 * 10**9, None, capability),), driver, "13.0")


@pytest.fixture
def cuda_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu is installed."""
    _needs_and_has(monkeypatch, "onnxruntime-gpu>=1.31", onnxruntime_gpu="1.31.1")


@pytest.mark.usefixtures("cuda_packages")
def test_target_cuda_needs_a_driver_for_cuda_13() -> None:
    assert _lacks(_one_gpu("9.0", "580.65"), CUDA) == []
    (lack,) = _lacks(_one_gpu("9.0", "570.86.15"), ("CPUExecutionProvider",))
    assert lack == Lack("an NVIDIA driver for CUDA 13 (this is 570.86.15; install 580 or newer)")
    assert _lacks(Gpus(_one_gpu("9.0").gpus, None, "13.0"), CUDA) == []  # the driver does not tell


@pytest.mark.usefixtures("cuda_packages")
def test_target_cuda_needs_the_plugin_library() -> None:
    assert _lacks(H100, CUDA, NOT_BUILT) == [Lack("the plugin library", "make plugins")]
    installed = dataclasses.replace(NOT_BUILT, in_checkout=False)
    (lack,) = _lacks(H100, CUDA, installed)
    assert lack.command == "python -m qwen_rt.plugins.build --sm 90"
    stale = dataclasses.replace(BUILT, is_current=False)
    assert _lacks(H100, CUDA, stale) == [Lack("a plugin library of the present sources", "make plugins")]
    (unknown,) = _lacks(H100, CUDA, Kernels(reason="no answer"))
    assert unknown == Lack("the plugin library (no answer)")


@pytest.mark.usefixtures("cuda_packages")
@pytest.mark.parametrize(
    ("capability", "sms", "wanted"),
    [
        ("9.0", (90,), None),
        ("9.0", (80, 90), None),
        ("9.0", (80,), 90),
        ("8.6", (80,), 86),  # as the session wants it: exactly, though the code of SM 80 would run
        ("8.0", (86,), 80),
        ("8.9", (90,), 89),
        ("12.0", (90, 120), None),
        ("10.0", (90,), 100),
    ],
)
def test_the_library_must_have_code_for_the_gpu(capability: str, sms: tuple[int, ...], wanted: int | None) -> None:
    lacks = _lacks(_one_gpu(capability), CUDA, dataclasses.replace(BUILT, sms=sms))
    if wanted is None:
        assert lacks == []
        return
    (lack,) = lacks
    assert lack.what == f"a plugin library for SM {wanted} (there is one for {', '.join(map(str, sms))})"
    expected = "make plugins" if wanted == 90 else f"python -m qwen_rt.plugins.build --sm {wanted}"
    assert lack.command == expected


@pytest.mark.usefixtures("cuda_packages")
def test_one_gpu_that_has_all_is_enough() -> None:
    both = Gpus((*_one_gpu("8.9").gpus, *H100.gpus), "580.65", "13.0")
    assert _lacks(both, CUDA) == []
    (lack,) = _lacks(_one_gpu("11.0"), CUDA)
    assert lack == Lack("a GPU that kernels are written for (SM 80, 86, 89, 90, 100, 120; this is 110)")


@pytest.mark.usefixtures("cuda_packages")
def test_without_a_compiler_the_library_needs_one_first() -> None:
    lacks = _lacks(H100, CUDA, NOT_BUILT, None)
    assert [lack.what for lack in lacks] == ["nvcc 12.8 or newer, to build it with", "the plugin library"]
    assert targets.install_command(lacks) == "pip install nvidia-cuda-nvcc nvidia-cuda-runtime && make plugins"
    assert _lacks(H100, CUDA, BUILT, None) == []


def test_all_that_target_cuda_lacks_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _needs_and_has(monkeypatch, "onnxruntime-gpu[cuda]>=1.31")
    lacks = _lacks(H100, None, NOT_BUILT)
    assert [lack.what for lack in lacks] == ["onnxruntime-gpu", "the plugin library"]
    assert targets.install_command(lacks) == "pip install 'onnxruntime-gpu[cuda]>=1.31' && make plugins"
    old = _one_gpu("7.0", "470.1")
    assert [lack.what for lack in _lacks(old, None, NOT_BUILT)] == [
        "a GPU of compute capability 8.0 or newer",
        "onnxruntime-gpu",
    ]


def _kernels_line(report: doctor.Report, kernels: Kernels) -> str:
    text = doctor.render(dataclasses.replace(report, kernels=kernels))
    after = text.split("\n  kernels ")[1].split("\n\n")[0]
    return " ".join(after.split())


def test_the_plugin_library_has_a_line(report: doctor.Report) -> None:
    for kernels, line in (
        (NOT_BUILT, "none: the plugin library is not built; for target cuda run: make plugins"),
        (dataclasses.replace(BUILT, nvcc="13.0"), f"for SM 90, nvcc 13.0 ({BUILT.path})"),
        (
            dataclasses.replace(BUILT, is_current=False, sms=(80, 90)),
            f"for SM 80, 90, STALE: of other sources than the present ones; run: make plugins ({BUILT.path})",
        ),
        (Kernels(reason="killed by signal 9"), "unknown: killed by signal 9"),
    ):
        assert _kernels_line(report, kernels) == line
    installed = dataclasses.replace(NOT_BUILT, in_checkout=False)
    assert _kernels_line(report, installed).endswith("run: python -m qwen_rt.plugins.build")


def test_the_probe_looks_for_the_library_without_loading_it(tmp_path: Path) -> None:
    """A folder with libraries that cannot be loaded: their build information is read from the file."""
    from qwen_rt.plugins import build

    program = machine.kernels_probe_command()
    elsewhere = f"lambda: pathlib.Path({str(tmp_path)!r})"
    changed = f"import pathlib; from qwen_rt.plugins import build; build.cache_folder = {elsewhere}\n"

    def look() -> Kernels:
        return machine.read_kernels(Started([*program[:-1], changed + program[-1]]), 60.0)

    nothing = look()
    assert (nothing.path, nothing.reason, nothing.known_sms) == (None, None, build.SUPPORTED_SMS)
    assert nothing.in_checkout
    ops = ",".join(f"{op.name}:{op.version}" for op in build.OPS)
    old, present = "0123456789abcdef", build.source_hash()
    for sources, sm, expected in ((old, 80, (80,)), (present, 90, (90,)), (present, 120, (90, 120))):
        file = tmp_path / f"{sources}-sm{sm}" / build.LIBRARY_NAME
        file.parent.mkdir()
        info = f"abi={build.ABI} sources={sources} sms={sm} nvcc=13.0 ops={ops}"
        file.write_bytes(b"\x7fELF" + bytes(100) + info.encode() + bytes(100))
        os.utime(file, (sm, sm))
        found = look()
        assert found.path == str(file)
        assert (found.sms, found.nvcc) == (expected, "13.0")
        assert found.is_current == (sources == present)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("print('no json')", "no answer"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('{\"unknown\": 1}')", "unreadable answer"),
        ('print(\'{"sms": ["x"]}\')', "unreadable answer"),
        ("print('{\"sms\": 3}')", "unreadable answer"),
    ],
)
def test_a_strange_answer_about_the_library_becomes_a_reason(output: str, reason: str) -> None:
    kernels = machine.read_kernels(Started([sys.executable, "-c", output]), 30.0)
    assert kernels.path is None
    assert reason in (kernels.reason or "")
