"""The registry of targets: what each needs, what this machine lacks of it, and the command that gets it.

Nothing is imported to find out: versions come from package metadata, modules are located and left alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_rt._version import __version__
from qwen_rt.machine import Gpu, Gpus, Kernels, Nvcc

__all__ = [
    "EXPORT",
    "RTX_CAPABILITIES",
    "TARGETS",
    "Facts",
    "Lack",
    "Target",
    "TargetStatus",
    "examine",
    "install_command",
    "installed_version",
    "kernels_command",
]

_OLDEST_DRIVER = "580"
"""The first driver for CUDA 13, which onnxruntime-gpu from 1.31 on and the plugin library are built with."""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.")
"""What the compute capability of a GPU that TensorRT-RTX supports begins with."""


_UNKNOWN_KERNELS = Kernels()


@dataclass(frozen=True)
class Lack:
    """Something that is missing; `command` gets it, and is empty where no command can."""

    what: str
    command: str = ""


@dataclass(frozen=True)
class Facts:
    """What the targets' probes look at."""

    gpus: Gpus
    providers: tuple[str, ...] | None
    kernels: Kernels = _UNKNOWN_KERNELS
    nvcc: Nvcc | None = None


@dataclass(frozen=True)
class Target:
    """One way to run a model.

    Attributes:
        name: As `--target` takes it.
        role: What it is for.
        module: The module that lowers a graph for it; a release without that module lacks the target. None: built in.
        probe: Says what is missing on this machine.
        evidence: What of it has been executed, on which devices, and what was only built.
    """

    name: str
    role: str
    module: str | None
    probe: Callable[[Facts], list[Lack]]
    evidence: str = ""


@dataclass(frozen=True)
class TargetStatus:
    """Whether a target runs here; `lacks` is empty exactly if it is ready, `evidence` is the target's."""

    name: str
    role: str
    state: Literal["ready", "missing", "not in this release"]
    lacks: tuple[Lack, ...] = ()
    evidence: str = ""


def _requirements(extra: str | None) -> list[str]:
    """Return what qwen-rt requires for an extra (None: what it always needs); empty if it is not installed."""
    try:
        lines = importlib.metadata.requires("qwen-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    split = [line.partition(";")[::2] for line in lines]
    if extra is None:
        return [need.strip() for need, condition in split if "extra" not in condition]
    pattern = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    return [need.strip() for need, condition in split if pattern.search(condition)]


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _unmet(requirements: Iterable[str], stand_ins: dict[str, str]) -> list[Lack]:
    """Return a lack for every `name>=version` that is absent or too old; a stand-in package serves as well."""
    lacks = []
    for requirement in requirements:
        named, _, minimum = requirement.partition(">=")
        name = named.partition("[")[0]
        version = installed_version(name) or (installed_version(stand_ins[name]) if name in stand_ins else None)
        command = f"pip install {shlex.quote(requirement)}"
        if version is None:
            lacks.append(Lack(name, command))
        elif _numbers(version) < _numbers(minimum):
            lacks.append(Lack(f"{name} {version} is too old", command))
    return lacks


def _probe_cpu(facts: Facts) -> list[Lack]:
    needed = _requirements(None) or ["numpy", "onnx", "onnxruntime", "tokenizers", "jinja2", "tqdm"]
    lacks = _unmet(needed, {"onnxruntime": "onnxruntime-gpu"})
    if not lacks and "CPUExecutionProvider" not in (facts.providers or ()):
        lacks.append(Lack("an onnxruntime that imports", "pip install --force-reinstall --no-deps onnxruntime"))
    return lacks


def _probe_export(_: Facts) -> list[Lack]:
    return _unmet(_requirements("export") or ["torch", "onnxscript", "onnx-ir", "ml-dtypes"], {})


def _gpu_lacks(facts: Facts, minimum: str) -> list[Lack]:
    if not facts.gpus.gpus:
        return [Lack("an NVIDIA GPU with its driver")]
    if all(_numbers(gpu.compute_capability) < _numbers(minimum) for gpu in facts.gpus.gpus):
        return [Lack(f"a GPU of compute capability {minimum} or newer")]
    return []


def _driver_lacks(facts: Facts) -> list[Lack]:
    driver = facts.gpus.driver
    if driver is None or not facts.gpus.gpus or _numbers(driver) >= _numbers(_OLDEST_DRIVER):
        return []
    return [Lack(f"an NVIDIA driver for CUDA 13 (this is {driver}; install {_OLDEST_DRIVER} or newer)")]


def _sm_of(gpu: Gpu) -> int:
    """Return the number of a GPU's compute capability as nvcc has it: 90 for 9.0."""
    major, minor = (*_numbers(gpu.compute_capability), 0, 0)[:2]
    return 10 * major + minor


def kernels_command(kernels: Kernels, sm: int | None = None) -> str:
    """Return the command that builds the plugin library; None: for the default SM."""
    if sm in (None, 90) and kernels.in_checkout:
        return "make plugins"
    return "python -m qwen_rt.plugins.build" + ("" if sm is None else f" --sm {sm}")


def _kernels_lacks(facts: Facts) -> list[Lack]:
    """Return what is missing of the plugin library, for the first GPU that kernels are written for."""
    kernels = facts.kernels
    if kernels.reason is not None:
        return [Lack(f"the plugin library ({kernels.reason})")]
    sms = [sm for gpu in facts.gpus.gpus if (sm := _sm_of(gpu)) >= 80]
    if kernels.path and kernels.is_current and set(sms) & set(kernels.sms):
        return []
    wanted = next((sm for sm in sms if sm in kernels.known_sms), None)
    if sms and kernels.known_sms and wanted is None:
        known = ", ".join(map(str, kernels.known_sms))
        return [Lack(f"a GPU that kernels are written for (SM {known}; this is {sms[0]})")]
    if kernels.path is None:
        what = "the plugin library"
    elif not kernels.is_current:
        what = "a plugin library of the present sources"
    else:
        what = f"a plugin library for SM {wanted} (there is one for {', '.join(map(str, kernels.sms))})"
    lacks = [Lack(what, kernels_command(kernels, wanted))]
    if facts.nvcc is None:
        compiler = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime"
        lacks.insert(0, Lack("nvcc 12.8 or newer, to build it with", compiler))
    return lacks


def _probe_cuda(facts: Facts) -> list[Lack]:
    unmet = _unmet(_requirements("cuda") or ["onnxruntime-gpu"], {})
    if lacks := _gpu_lacks(facts, "8.0"):
        return lacks + unmet
    lacks = _driver_lacks(facts)
    if not lacks and not unmet and "CUDAExecutionProvider" not in (facts.providers or ()):
        unmet = [Lack("ONNX Runtime's CUDA provider", "pip install --force-reinstall --no-deps onnxruntime-gpu")]
    return lacks + unmet + _kernels_lacks(facts)


def _probe_tensorrt(facts: Facts) -> list[Lack]:
    return _gpu_lacks(facts, "8.0") + _unmet(["tensorrt>=10.15"], {})


def _probe_tensorrt_rtx(facts: Facts) -> list[Lack]:
    lacks = _gpu_lacks(facts, "7.5") + _unmet(_requirements("tensorrt") or ["tensorrt-rtx"], {})
    capabilities = [gpu.compute_capability for gpu in facts.gpus.gpus]
    if capabilities and not any(found.startswith(RTX_CAPABILITIES) for found in capabilities):
        lacks.append(
            Lack(f"a GPU that TensorRT-RTX supports (not compute capability {', '.join(sorted(set(capabilities)))})")
        )
    return lacks


def _probe_trtllm(_: Facts) -> list[Lack]:
    return []


_CPU_EVIDENCE = "executed: in CI, and on AMD EPYC (rows in benchmarks/results)"
_CUDA_EVIDENCE = (
    "executed: on NVIDIA H100 80GB HBM3 and NVIDIA H200 (rows in benchmarks/results); "
    "built only: the kernels for compute capability 8.0, 8.9 and 12.0"
)
_TENSORRT_EVIDENCE = (
    "never built, never executed: the full TensorRT was not to be had; its code path is that of tensorrt-rtx"
)
_TENSORRT_RTX_EVIDENCE = (
    "built only: engines for compute capability 8.0, 8.9 and 12.0, in CI; no engine has been executed, the session "
    "runs in tests on a stand-in of TensorRT's runtime"
)
_TRTLLM_EVIDENCE = "written, and read back by a reader of our own; TensorRT-LLM has never been run"

TARGETS: tuple[Target, ...] = (
    Target("cpu", "any machine; ONNX Runtime", None, _probe_cpu, _CPU_EVIDENCE),
    Target("cuda", "fused kernels, CUDA graphs", "qwen_rt.export.passes.lower_cuda", _probe_cuda, _CUDA_EVIDENCE),
    Target(
        "tensorrt",
        "compiled engines",
        "qwen_rt.export.passes.lower_tensorrt",
        _probe_tensorrt,
        _TENSORRT_EVIDENCE,
    ),
    Target(
        "tensorrt-rtx",
        "engines for RTX GPUs",
        "qwen_rt.export.passes.lower_tensorrt",
        _probe_tensorrt_rtx,
        _TENSORRT_RTX_EVIDENCE,
    ),
    Target("trtllm", "export only", "qwen_rt.export.trtllm", _probe_trtllm, _TRTLLM_EVIDENCE),
)
EXPORT = Target("export", "checkpoint to bundle", None, _probe_export)


def _has_module(name: str) -> bool:
    """Say whether a module could be imported, importing nothing, not even its parents."""
    search: Sequence[str] | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        specs = (finder.find_spec(".".join(parts[:end]), search) for finder in sys.meta_path)
        spec = next((found for found in specs if found is not None), None)
        if spec is None:
            return False
        search = spec.submodule_search_locations
    return True


def examine(target: Target, facts: Facts) -> TargetStatus:
    """Return whether a target runs here, and if not what is missing."""
    if target.module is not None and not _has_module(target.module):
        lack = Lack(f"qwen-rt {__version__} does not build this target yet")
        return TargetStatus(target.name, target.role, "not in this release", (lack,))
    lacks = tuple(target.probe(facts))
    return TargetStatus(target.name, target.role, "missing" if lacks else "ready", lacks, target.evidence)


def install_command(lacks: Iterable[Lack]) -> str:
    """Return one line that gets all of them; several `pip install X` become one."""
    commands = [lack.command for lack in lacks if lack.command]
    plain = [c.removeprefix("pip install ") for c in commands if c.startswith("pip install ") and " --" not in c]
    others = [c for c in commands if not (c.startswith("pip install ") and " --" not in c)]
    return " && ".join(([f"pip install {' '.join(plain)}"] if plain else []) + others)
