"""What this machine is: processor, memory, GPUs, CUDA compiler. A probe that fails leaves a reason."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = [
    "Cpu",
    "Gpu",
    "Gpus",
    "Kernels",
    "Nvcc",
    "Started",
    "find_nvcc",
    "gpu_probe_command",
    "kernels_probe_command",
    "last_json_line",
    "python_command",
    "read_cpu",
    "read_gpus",
    "read_kernels",
    "read_nvcc",
]

# Instruction sets that decide how fast the CPU path is, as /proc/cpuinfo spells them (x86, then Arm).
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


@dataclass(frozen=True)
class Cpu:
    """The processor and the memory beside it.

    Attributes:
        model: The maker's name for it.
        num_cores: Logical cores of the machine.
        num_usable_cores: How many of them this process may use (affinity and container limit).
        flags: The instruction sets that matter here.
        memory_bytes: Memory of the machine, or the container's limit if that is lower; None if unknown.
        available_bytes: What of it is free or reclaimable; None if unknown.
    """

    model: str
    num_cores: int
    num_usable_cores: int
    flags: tuple[str, ...]
    memory_bytes: int | None
    available_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; `free_bytes` is None where the driver library does not tell."""

    name: str
    memory_bytes: int
    free_bytes: int | None
    compute_capability: str


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA driver and its GPUs; `reason` says why there are none."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler; `version` is None if it could not be run."""

    path: str
    version: str | None


@dataclass(frozen=True)
class Kernels:
    """The plugin library: our CUDA kernels.

    Attributes:
        path: The newest library, of the present sources if there is one; None if none is built.
        sms: What it has code for, 90 for compute capability 9.0; with it all others of the present sources.
        is_current: Whether it is built from the sources of this installation.
        nvcc: The compiler that built it, empty if it does not tell.
        known_sms: What the sources can be built for; empty if that could not be found out.
        in_checkout: Whether `make plugins` is there to build it.
        reason: Why nothing is known, if that is so.
    """

    path: str | None = None
    sms: tuple[int, ...] = ()
    is_current: bool = False
    nvcc: str = ""
    known_sms: tuple[int, ...] = ()
    in_checkout: bool = False
    reason: str | None = None


# In a process of its own: nothing below the command line may import the plugins. The library is read, not loaded.
_KERNELS_PROBE = """
import json
from qwen_rt.plugins import build
built = [(path, build.library_info(path)) for path in build.built_libraries()]
key = build.source_hash(), str(build.ABI)
current = [(path, info) for path, info in built if (info.get("sources"), info.get("abi")) == key]
newest = (current or built or [(None, {})])[0]
sms = {int(sm) for _, info in current or [newest] for sm in info.get("sms", "").split(",") if sm}
print(json.dumps({
    "path": str(newest[0]) if newest[0] else None,
    "sms": sorted(sms),
    "is_current": bool(current),
    "nvcc": newest[1].get("nvcc", ""),
    "known_sms": list(build.SUPPORTED_SMS),
    "in_checkout": (build.SOURCES.parent.parent / "Makefile").is_file(),
}))
"""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _container_cores() -> float:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    try:
        return float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return float("inf")


def _container_bytes(name: str) -> int | None:
    with contextlib.suppress(ValueError):  # "max", or no such file
        return int(_read(f"/sys/fs/cgroup/{name}"))
    return None


def read_cpu() -> Cpu:
    """Return the processor and the memory, as this process may use them."""
    info = _read("/proc/cpuinfo")
    fields = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", info, re.MULTILINE))
    present = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    num_cores = os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = num_cores
    memory = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)}
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    limit, used = _container_bytes("memory.max"), _container_bytes("memory.current")
    if limit is not None and total is not None and limit < total:
        total = limit
        if used is not None and available is not None:
            available = max(0, min(available, limit - used))
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        num_cores=num_cores,
        num_usable_cores=max(1, int(min(allowed, _container_cores()))),
        flags=tuple(flag for flag in _CPU_FLAGS if flag in present),
        memory_bytes=total,
        available_bytes=available,
    )


class Started:
    """A probe in a child process, collected later so that slow probes run side by side.

    The child cannot read the terminal, write to it or outlive its time; the parent survives whatever happens to it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._error = ""
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self._error = f"{command[0]} could not be started: {error.strerror}"

    def finish(self, timeout_s: float) -> tuple[str, str]:
        """Return the output and why it cannot be trusted (empty if it can); a child past its time is killed."""
        process = self._process
        if process is None:
            return "", self._error
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            return "", f"no answer within {timeout_s:g} s"
        if process.returncode < 0:
            return output, f"killed by signal {-process.returncode}"
        return output, "" if process.returncode == 0 else f"exit code {process.returncode}"

    def close(self) -> None:
        """End the child if it still runs."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
            # A child that sits in the kernel does not die; nobody waits for it longer than this.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
        if process.stdout is not None:
            process.stdout.close()


def python_command(*arguments: str) -> list[str]:
    """Return the command that runs this very Python."""
    return [sys.executable or "python3", *arguments]


def last_json_line(output: str) -> object:
    """Return what the last line says as JSON, or None: libraries may print lines of their own before it."""
    lines = output.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def gpu_probe_command() -> list[str]:
    """Return the command that asks the NVIDIA driver, in a process of its own."""
    return python_command("-IS", str(Path(__file__).with_name("gpu_probe.py")))


def read_gpus(probe: Started, timeout_s: float = 10.0) -> Gpus:
    """Return what the started probe found out.

    Args:
        probe: `gpu_probe_command`, started.
        timeout_s: How long to wait; a driver that wakes up many GPUs takes seconds.

    Returns:
        The GPUs, or the reason why there are none.
    """
    output, trouble = probe.finish(timeout_s)
    found = last_json_line(output)
    if trouble or not isinstance(found, dict):
        return Gpus(reason=f"asking the NVIDIA driver failed: {trouble or 'no answer'}")
    try:
        gpus = tuple(Gpu(**gpu) for gpu in found.get("gpus", ()))
    except TypeError:
        return Gpus(reason="asking the NVIDIA driver failed: unreadable answer")
    reason = found.get("reason") or (None if gpus else "the driver lists no GPU")
    return Gpus(gpus, found.get("driver"), found.get("cuda"), reason)


def _wheel_nvcc() -> str | None:
    """Return the compiler of the `nvidia-cuda-nvcc` wheel, which puts nothing on PATH."""
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu13", "nvidia-cuda-nvcc-cu12"):
        try:
            for file in importlib.metadata.files(name) or ():
                if file.name == "nvcc" and file.parent.name == "bin":
                    return str(file.locate())
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_nvcc() -> str | None:
    """Return the path of the CUDA compiler: from CUDA_HOME, PATH, the usual folder, or PyPI's wheel."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or _wheel_nvcc()


def read_nvcc(path: str | None, probe: Started | None, timeout_s: float = 3.0) -> Nvcc | None:
    """Return the compiler found at `path`, with the version that the started `nvcc --version` printed."""
    if path is None or probe is None:
        return None
    output, _ = probe.finish(timeout_s)
    version = re.search(r"\bV(\d[\d.]*)", output)
    return Nvcc(path, version[1] if version else None)


def kernels_probe_command() -> list[str]:
    """Return the command that looks for the plugin library, in a process of its own."""
    return python_command("-P", "-c", _KERNELS_PROBE)


def read_kernels(probe: Started, timeout_s: float = 10.0) -> Kernels:
    """Return what the started `kernels_probe_command` found out, or the reason why nothing is known."""
    output, trouble = probe.finish(timeout_s)
    found = last_json_line(output)
    if trouble or not isinstance(found, dict):
        return Kernels(reason=f"looking for the plugin library failed: {trouble or 'no answer'}")
    try:
        kernels = Kernels(**found)
        return replace(kernels, sms=tuple(map(int, kernels.sms)), known_sms=tuple(map(int, kernels.known_sms)))
    except (TypeError, ValueError):
        return Kernels(reason="looking for the plugin library failed: unreadable answer")
