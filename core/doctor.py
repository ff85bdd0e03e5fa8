"""What this machine can run, and what to install for the rest: the facts behind `qwen-rt doctor`.

Nothing heavy is imported: versions come from package metadata, and whatever loads a native library (the NVIDIA driver,
ONNX Runtime, nvcc) runs in a child process with a time limit, all of them side by side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen_rt import machine
from qwen_rt._version import __version__
from qwen_rt.machine import Cpu, Gpus, Kernels, Nvcc, Started
from qwen_rt.progress import format_count
from qwen_rt.targets import (
    EXPORT,
    TARGETS,
    Facts,
    Lack,
    Target,
    TargetStatus,
    examine,
    install_command,
    installed_version,
    kernels_command,
)

__all__ = ["Package", "Report", "collect", "render"]

T = TypeVar("T")

_ORT_NAMES = ("onnxruntime", "onnxruntime-gpu")
_ORT_PROBE = "import json, onnxruntime as o; print(json.dumps(o.get_available_providers()))"
# What each package is for; the version limits stand in the metadata of qwen-rt itself.
_ROLES = {
    "onnxruntime": "runs bundles on the CPU",
    "onnxruntime-gpu": "runs bundles on the GPU",
    "onnx": "reads and writes graphs",
    "tokenizers": "text to tokens and back",
    "torch": "traces the model for export",
    "onnxscript": "turns the trace into a graph",
    "transformers": "reference for comparisons",
    "tensorrt": "target tensorrt",
    "tensorrt-rtx": "target tensorrt-rtx",
    "tensorrt-llm": "target trtllm, and a peer in benchmarks",
    "onnxruntime-genai": "a peer in benchmarks",
}


@dataclass(frozen=True)
class Package:
    """One package that matters here; `version` is None if it is not installed, `note` tells of its build."""

    name: str
    role: str
    version: str | None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that `collect` found out; `providers` is None if ONNX Runtime is absent or does not import."""

    version: str
    python: str
    python_path: str
    system: str
    cpu: Cpu
    disk_path: str
    disk_free_bytes: int | None
    gpus: Gpus
    nvcc: Nvcc | None
    kernels: Kernels
    packages: tuple[Package, ...]
    providers: tuple[str, ...] | None
    export: TargetStatus
    targets: tuple[TargetStatus, ...]
    warnings: tuple[str, ...]
    next_step: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return asdict(self)


def _torch_build() -> str:
    """Return `CPU build` or `CUDA 13.0 build`, read from torch's own version file without importing it."""
    text = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py"))).read_text("utf-8")
    cuda = re.search(r"""^cuda\b[^=]*=\s*["']([\d.]+)["']""", text, re.MULTILINE)
    return f"CUDA {cuda[1]} build" if cuda else "CPU build"


class _Probes:
    """Runs the probes and collects what went wrong as warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def guarded(self, what: str, probe: Callable[[], T], fallback: T) -> T:
        """Return what a probe finds; third-party metadata and drivers fail in ways that nobody can list."""
        try:
            return probe()
        except Exception as error:
            self.warnings.append(f"{what} could not be read ({type(error).__name__}: {error})")
            return fallback

    def packages(self) -> dict[str, Package]:
        """Return the packages that matter, installed or not."""
        found = {}
        for name, role in _ROLES.items():
            version = self.guarded(name, functools.partial(installed_version, name), None)
            note = self.guarded(name, _torch_build, "") if name == "torch" and version else ""
            found[name] = Package(name, role, version, note)
        return found

    def providers(self, probe: Started) -> tuple[str, ...] | None:
        """Return the execution providers that the started ONNX Runtime lists; None if it does not import."""
        output, trouble = probe.finish(10.0)
        listed = machine.last_json_line(output)
        if trouble or not isinstance(listed, list):
            self.warnings.append(f"onnxruntime is installed but does not import ({trouble or 'no answer'})")
            return None
        return tuple(str(provider) for provider in listed)

    def status(self, target: Target, facts: Facts) -> TargetStatus:
        """Return whether a target is ready; one that cannot be examined is not."""
        lacks = (Lack("it could not be examined"),)
        unknown = TargetStatus(target.name, target.role, "missing", lacks, target.evidence)
        return self.guarded(f"target {target.name}", lambda: examine(target, facts), unknown)

    def warn_of_traps(self, cpu: Cpu, gpus: Gpus, ort_names: list[str]) -> None:
        """Add what works now and surprises later."""
        if len(ort_names) > 1:
            keep = "onnxruntime-gpu" if gpus.gpus else "onnxruntime"
            self.warnings.append(
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
                f"run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install {keep}"
            )
        if platform.machine() == "x86_64" and cpu.flags and "avx2" not in cpu.flags:
            self.warnings.append("this processor has no AVX2: the CPU target will be slow")
        if gpus.gpus and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            self.warnings.append(f"CUDA_VISIBLE_DEVICES={visible} hides GPUs that are listed here")


def collect(path: Path | None = None) -> Report:
    """Look at this machine; never raises for what it finds.

    Args:
        path: The folder whose disk matters; the working folder if None.

    Returns:
        The report.
    """
    probes = _Probes()
    guarded = probes.guarded
    with contextlib.ExitStack() as children:

        def start(command: list[str]) -> Started:
            return children.enter_context(contextlib.closing(Started(command)))

        gpu_probe = start(machine.gpu_probe_command())
        nvcc_path = guarded("the CUDA compiler", machine.find_nvcc, None)
        nvcc_probe = start([nvcc_path, "--version"]) if nvcc_path else None
        kernels_probe = start(machine.kernels_probe_command())
        packages = probes.packages()
        ort_names = [name for name in _ORT_NAMES if packages[name].version]
        ort_probe = start(machine.python_command("-P", "-c", _ORT_PROBE)) if ort_names else None

        unknown_cpu = Cpu("unknown", os.cpu_count() or 1, os.cpu_count() or 1, (), None, None)
        cpu = guarded("the processor", machine.read_cpu, unknown_cpu)
        folder = str(path) if path is not None else guarded("the working folder", os.getcwd, "/")
        disk_free = guarded("the disk", lambda: shutil.disk_usage(folder).free, None)

        providers = probes.providers(ort_probe) if ort_probe else None
        gpus = guarded("the GPUs", lambda: machine.read_gpus(gpu_probe), Gpus(reason="unknown"))
        nvcc = guarded("the CUDA compiler", lambda: machine.read_nvcc(nvcc_path, nvcc_probe), None)
        kernels = guarded(
            "the plugin library",
            lambda: machine.read_kernels(kernels_probe),
            Kernels(reason="it could not be examined"),
        )

    probes.warn_of_traps(cpu, gpus, ort_names)
    facts = Facts(gpus, providers, kernels, nvcc)
    export, targets = probes.status(EXPORT, facts), tuple(probes.status(target, facts) for target in TARGETS)
    return Report(
        version=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        python_path=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu,
        disk_path=folder,
        disk_free_bytes=disk_free,
        gpus=gpus,
        nvcc=nvcc,
        kernels=kernels,
        packages=tuple(packages.values()),
        providers=providers,
        export=export,
        targets=targets,
        warnings=tuple(probes.warnings),
        next_step=_next_step(targets[0], export),
    )


def _next_step(cpu: TargetStatus, export: TargetStatus) -> str:
    for status, purpose in ((cpu, "to run bundles"), (export, "to export checkpoints")):
        if commands := install_command(status.lacks):
            return f"{commands}   # {purpose}"
        if status.lacks:
            return f"provide {status.lacks[0].what}, {purpose}"
    return "qwen-rt demo"


_WIDTH = 100
_LABEL = 11


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _gib(num_bytes: int) -> str:
    """Return a size of memory, which comes in powers of two, unlike disks."""
    return f"{num_bytes / 2**30:.1f} GiB"


def _row(label: str, text: str) -> Iterator[str]:
    """Yield a labelled value, wrapped under itself."""
    indent = " " * (_LABEL + 2)
    lines = textwrap.wrap(_printable(text), _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]
    yield f"  {label:<{_LABEL - 1}} {lines[0]}".rstrip()
    yield from (indent + line for line in lines[1:])


def _machine_rows(report: Report) -> Iterator[str]:
    cpu = report.cpu
    yield from _row("system", f"{report.system}, {report.python} ({report.python_path})")
    yield from _row("CPU", f"{cpu.model}, {cpu.num_usable_cores} of {cpu.num_cores} cores usable")
    yield from _row("", " ".join(cpu.flags) or "no known vector instructions")
    if cpu.memory_bytes is not None:
        free = "" if cpu.available_bytes is None else f", {_gib(cpu.available_bytes)} available"
        yield from _row("memory", _gib(cpu.memory_bytes) + free)
    if report.disk_free_bytes is not None:
        yield from _row("disk", f"{format_count(report.disk_free_bytes, 'B')} free in {report.disk_path}")
    if report.gpus.driver or report.gpus.cuda:
        yield from _row("driver", f"{report.gpus.driver or 'unknown'}, CUDA {report.gpus.cuda or 'unknown'}")
    for index, gpu in enumerate(report.gpus.gpus):
        free = "" if gpu.free_bytes is None else f" ({_gib(gpu.free_bytes)} free)"
        memory = _gib(gpu.memory_bytes) + free
        yield from _row(f"GPU {index}", f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}")
    if not report.gpus.gpus:
        yield from _row("GPU", f"none: {report.gpus.reason}")
    if report.nvcc is None:
        yield from _row("nvcc", "none (needed only to compile CUDA kernels)")
    else:
        yield from _row("nvcc", f"{report.nvcc.version or 'does not run'} ({report.nvcc.path})")
    yield from _row("kernels", _kernels_text(report.kernels))


def _kernels_text(kernels: Kernels) -> str:
    """Say which plugin library there is, and how to get one of the present sources."""
    if kernels.reason is not None:
        return f"unknown: {kernels.reason}"
    command = kernels_command(kernels)
    if kernels.path is None:
        return f"none: the plugin library is not built; for target cuda run: {command}"
    sms = ", ".join(str(sm) for sm in kernels.sms) or "no GPU that it tells of"
    stale = "" if kernels.is_current else f", STALE: of other sources than the present ones; run: {command}"
    return f"for SM {sms}{f', nvcc {kernels.nvcc}' if kernels.nvcc else ''}{stale} ({kernels.path})"


def _package_rows(report: Report) -> Iterator[str]:
    width = max(len(package.name) for package in report.packages)
    for package in report.packages:
        note = f" ({package.note})" if package.note else ""
        yield _printable(f"  {package.name:<{width}}  {package.version or '-':<14}  {package.role}{note}").rstrip()
    if report.providers is not None:
        yield from _row("providers", ", ".join(report.providers))


def _target_rows(report: Report) -> Iterator[str]:
    statuses = (report.export, *report.targets)
    width = max(len(status.name) for status in statuses)
    indent = " " * (width + 4)
    for status in statuses:
        lacks = ", ".join(lack.what for lack in status.lacks)
        text = f"{status.state}: {lacks}" if lacks else status.state
        if status.state == "not in this release":
            text = lacks
        lines = textwrap.wrap(f"{text}  [{status.role}]", _WIDTH - len(indent), break_on_hyphens=False)
        yield f"  {status.name:<{width}}  {lines[0]}"
        yield from (indent + line for line in lines[1:])
        if command := install_command(status.lacks):
            yield f"{indent}-> {command}"  # not wrapped: it is there to be copied
        evidence = textwrap.wrap(status.evidence, _WIDTH - len(indent), break_on_hyphens=False)
        yield from (indent + line for line in evidence)


def render(report: Report) -> str:
    """Return the report as text that ends with the next step; at most 100 columns, but for paths and commands."""
    sections = (
        (f"qwen-rt {report.version}", _machine_rows(report)),
        ("packages", _package_rows(report)),
        ("targets", _target_rows(report)),
        ("warnings", (line for warning in report.warnings for line in _row("!", warning))),
    )
    blocks = ["\n".join([title, *lines]) for title, rows in sections if (lines := list(rows))]
    return "\n\n".join([*blocks, f"next: {report.next_step}"]) + "\n"
