"""Doctor: it tells the truth about this machine, gives exact commands, and survives broken probes."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_rt import doctor, gpu_probe, machine, targets
from qwen_rt.machine import Gpu, Gpus, Kernels, Started
from qwen_rt.targets import TARGETS, Facts, Lack, Target, TargetStatus

H100 = Gpus((Gpu("NVIDIA H100 80GB HBM3", 85 * 10**9, 80 * 10**9, "9.0"),), "580.65", "13.0")
ADA = Gpus((Gpu("NVIDIA L4", 24 * 10**9, None, "8.9"),), "580.65", "13.0")
NONE = Gpus(reason="no NVIDIA driver")
BUILT = Kernels("build/plugins/x/libqwen_rt_plugins.so", (90,), is_current=True, known_sms=(80, 90))


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.collect()


def test_it_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, time; start = time.monotonic(); from qwen_rt import doctor; doctor.render(doctor.collect());"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy'} & set(sys.modules);"
        "print(time.monotonic() - start, *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 10  # 0.4 s on an idle machine without GPU; the limit leaves room for a busy one


def test_the_report_is_plain_data_and_complete(report: doctor.Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert {field.name for field in dataclasses.fields(report)} == set(data)
    assert [target["name"] for target in data["targets"]] == ["cpu", "cuda", "tensorrt", "tensorrt-rtx", "trtllm"]
    assert data["cpu"]["num_usable_cores"] >= 1
    assert data["python_path"] == sys.executable


def test_versions_are_those_installed(report: doctor.Report) -> None:
    for package in report.packages:
        if package.version is not None:
            assert importlib.metadata.version(package.name) == package.version
    torch = next(package for package in report.packages if package.name == "torch")
    assert (torch.version is None) == (torch.note == "")


def test_cpu_is_ready_wherever_the_package_is_installed(report: doctor.Report) -> None:
    if not importlib.metadata.distribution("qwen-rt"):
        pytest.skip("qwen-rt is not installed")
    assert report.targets[0] == TargetStatus("cpu", TARGETS[0].role, "ready", evidence=TARGETS[0].evidence)
    assert "CPUExecutionProvider" in (report.providers or ())


def test_text_fits_and_ends_with_the_next_step(report: doctor.Report) -> None:
    text = doctor.render(report)
    assert text.endswith("\n")
    assert text.splitlines()[-1].startswith("next: ")
    for line in text.splitlines():
        assert len(line) <= 100 or "->" in line or "/" in line, line
        assert line == line.rstrip()
        assert line.isprintable()


def test_a_target_without_its_module_is_honest() -> None:
    ghost = Target("ghost", "nothing", "qwen_rt.export.passes.no_such_pass", lambda _: [])
    status = targets.examine(ghost, Facts(NONE, None))
    assert status.state == "not in this release"
    assert "does not build this target yet" in status.lacks[0].what
    assert targets.install_command(status.lacks) == ""
    present = dataclasses.replace(ghost, module="qwen_rt.errors")
    assert targets.examine(present, Facts(NONE, None)).state == "ready"


def test_finding_a_module_imports_nothing() -> None:
    probe = (
        "import sys; from qwen_rt import targets; print(targets._has_module('qwen_rt.export.passes.x'));"
        "print('qwen_rt.export' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(targets, "installed_version", found.get)


def _needs(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: list(lines))


def _lacks(name: str, gpus: Gpus = NONE, providers: tuple[str, ...] | None = None) -> list[Lack]:
    target = next(target for target in (*TARGETS, targets.EXPORT) if target.name == name)
    return target.probe(Facts(gpus, providers, BUILT))


def test_commands_name_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    _needs(
        monkeypatch,
        "onnx>=1.20",
        "tokenizers>=0.21",
        'torch>=2.11; extra == "export"',
        "onnxscript>=0.7; extra=='export'",
    )
    _installed(monkeypatch, onnx="1.9.0", torch="2.13.0+cpu")
    assert _lacks("cpu") == [
        Lack("onnx 1.9.0 is too old", "pip install 'onnx>=1.20'"),
        Lack("tokenizers", "pip install 'tokenizers>=0.21'"),
    ]
    assert _lacks("export") == [Lack("onnxscript", "pip install 'onnxscript>=0.7'")]
    assert targets.install_command(_lacks("cpu")) == "pip install 'onnx>=1.20' 'tokenizers>=0.21'"


def test_without_metadata_the_names_are_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    _installed(monkeypatch)
    assert Lack("onnxruntime", "pip install onnxruntime") in _lacks("cpu")
    assert Lack("torch", "pip install torch") in _lacks("export")


def test_cpu_takes_either_onnxruntime_but_needs_it_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    _needs(monkeypatch, "onnxruntime>=1.23")
    _installed(monkeypatch, onnxruntime_gpu="1.31.1")
    assert _lacks("cpu", providers=("CPUExecutionProvider",)) == []
    assert _lacks("cpu", providers=None)[0].what == "an onnxruntime that imports"


def test_gpu_targets_look_at_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _needs(monkeypatch, 'onnxruntime-gpu>=1.31; extra == "cuda"', 'tensorrt-rtx>=1.7; extra == "tensorrt"')
    _installed(monkeypatch, onnxruntime_gpu="1.31.1", tensorrt_rtx="1.7.1")
    assert _lacks("cuda")[0].what == "an NVIDIA GPU with its driver"
    assert _lacks("cuda", H100, ("CUDAExecutionProvider",)) == []
    assert _lacks("cuda", H100, ("CPUExecutionProvider",))[0].what == "ONNX Runtime's CUDA provider"
    old = Gpus((Gpu("Tesla V100", 16 * 10**9, None, "7.0"),))
    assert _lacks("cuda", old, ("CUDAExecutionProvider",))[0].what == "a GPU of compute capability 8.0 or newer"
    assert _lacks("tensorrt-rtx", ADA) == []
    assert "not compute capability 9.0" in _lacks("tensorrt-rtx", H100)[0].what
    assert _lacks("tensorrt", H100) == [Lack("tensorrt", "pip install 'tensorrt>=10.15'")]


def test_both_onnxruntimes_at_once_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.31.1" if name.startswith("onnxruntime") else None)
    report = doctor.collect()
    warning = next(w for w in report.warnings if "overwrite each other" in w)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in warning
    assert "overwrite each other" in doctor.render(report)


def test_an_onnxruntime_that_crashes_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ORT_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    report = doctor.collect()
    assert report.providers is None
    assert "onnxruntime is installed but does not import (killed by signal 11)" in report.warnings
    assert report.targets[0].state == "missing"
    assert report.next_step == "pip install --force-reinstall --no-deps onnxruntime   # to run bundles"


@pytest.mark.parametrize("probe", ["find_nvcc", "read_cpu", "read_gpus", "read_kernels", "read_nvcc"])
def test_a_probe_that_raises_is_told_of_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("broken\x1b[2J library")

    monkeypatch.setattr(machine, probe, explode)
    report = doctor.collect(Path("/no/such/folder"))
    text = doctor.render(report)
    assert any("broken" in warning for warning in report.warnings)
    assert "\x1b" not in text
    assert text.splitlines()[-1].startswith("next: ")


def test_broken_package_metadata_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_: str) -> str:
        raise ValueError("bad metadata")

    monkeypatch.setattr(doctor, "installed_version", explode)
    report = doctor.collect()
    assert all(package.version is None for package in report.packages)
    assert any("bad metadata" in warning for warning in report.warnings)


def test_a_hanging_nvcc_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexec sleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.find_nvcc() == str(fake)
    start = time.monotonic()
    assert machine.read_nvcc(str(fake), Started([str(fake), "--version"]), 0.2) == machine.Nvcc(str(fake), None)
    assert time.monotonic() - start < 5


def test_the_version_of_nvcc_is_read(tmp_path: Path) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    fake.chmod(0o755)
    found = machine.read_nvcc(str(fake), Started([str(fake), "--version"]))
    assert found == machine.Nvcc(str(fake), "13.0.88")
    assert machine.read_nvcc(None, None) is None


def test_a_program_that_cannot_start_gives_a_reason() -> None:
    output, trouble = Started(["/no/such/program"]).finish(1.0)
    assert output == ""
    assert trouble == "/no/such/program could not be started: No such file or directory"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("print('no json')", "no answer"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "no answer within 0.3 s"),
        ('print(\'{"gpus": [{"unknown": 1}]}\')', "unreadable answer"),
        ("print('{\"gpus\": []}')", "lists no GPU"),
    ],
)
def test_a_strange_driver_becomes_a_reason(output: str, reason: str) -> None:
    gpus = machine.read_gpus(Started([sys.executable, "-c", output]), 0.3 if "sleep" in output else 30.0)
    assert gpus.gpus == ()
    assert reason in (gpus.reason or "")


def test_the_gpu_probe_alone_prints_one_line_of_json() -> None:
    done = subprocess.run(machine.gpu_probe_command(), capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert ("gpus" in answer) != ("reason" in answer)


def test_the_gpu_probe_imports_only_the_standard_library() -> None:
    tree = ast.parse(Path(str(gpu_probe.__file__)).read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


FAKE_NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { strncpy(out, "580.65.06", n); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 13010; return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) { *out = (void *)(0x7f0000000000ul + i); return 0; }
int nvmlDeviceGetName(void *h, char *out, unsigned n) {
  strncpy(out, h == (void *)0x7f0000000000ul ? "NVIDIA H100" : "NVIDIA L4", n);
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *h, memory_t *m) { m->total = 85899345920ull; m->free = 1024; m->used = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *h, int *a, int *b) { *a = 9; *b = 0; return 0; }
"""
FAKE_CUDA = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *out) { *out = 12080; return 0; }
int cuDeviceGetCount(int *out) { *out = 1; return 0; }
int cuDeviceGet(int *out, int i) { *out = i; return 0; }
int cuDeviceGetName(char *out, int n, int d) { strncpy(out, "Orin", n); return 0; }
int cuDeviceTotalMem_v2(size_t *out, int d) { *out = 1ul << 36; return 0; }
int cuDeviceGetAttribute(int *out, int a, int d) { *out = a == 75 ? 8 : 7; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> Callable[[str, str], Gpus]:
    """Return a function that compiles a stand-in driver library and asks it as the doctor would."""

    def ask(name: str, source: str) -> Gpus:
        (tmp_path / "lib.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", "-w", "-o", str(tmp_path / name), str(tmp_path / "lib.c")]
        try:
            subprocess.run(command, check=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("no C compiler")
        return machine.read_gpus(Started(["env", f"LD_LIBRARY_PATH={tmp_path}", *machine.gpu_probe_command()]))

    return ask


def test_nvml_is_read(driver: Callable[[str, str], Gpus]) -> None:
    gpus = driver("libnvidia-ml.so.1", FAKE_NVML)
    assert (gpus.driver, gpus.cuda, gpus.reason) == ("580.65.06", "13.1", None)
    assert [gpu.name for gpu in gpus.gpus] == ["NVIDIA H100", "NVIDIA L4"]
    assert gpus.gpus[0] == Gpu("NVIDIA H100", 80 * 2**30, 1024, "9.0")


def test_the_cuda_driver_serves_where_nvml_is_absent(driver: Callable[[str, str], Gpus]) -> None:
    gpus = driver("libcuda.so.1", FAKE_CUDA)
    if gpus.driver is not None:
        pytest.skip("this machine has NVML")
    assert gpus == Gpus((Gpu("Orin", 2**36, None, "8.7"),), None, "12.8", None)


def test_a_crashing_driver_becomes_a_reason(driver: Callable[[str, str], Gpus]) -> None:
    gpus = driver("libnvidia-ml.so.1", "int nvmlInit_v2(void) { *(volatile int *)0 = 1; return 0; }")
    assert gpus.gpus == ()
    assert "killed by signal 11" in (gpus.reason or "")


def test_gpus_are_listed_with_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_gpus", lambda _: H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    text = doctor.render(doctor.collect())
    assert "GPU 0      NVIDIA H100 80GB HBM3, 79.2 GiB (74.5 GiB free), compute capability 9.0" in text
    assert "driver     580.65, CUDA 13.0" in text
    assert "CUDA_VISIBLE_DEVICES=1 hides GPUs" in text
