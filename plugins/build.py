"""Builds libqwen_rt_plugins.so from plugins/csrc with nvcc, once per state of the sources.

    python -m qwen_rt.plugins.build --sm 90 --sm 80

The library lies in `build/plugins/<hash>/` of a checkout, or under the user's cache where the package is installed; the
hash covers all sources, the SMs and nvcc's version, so an old library is never taken for a new one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_rt.errors import MissingDependencyError, QwenRtError, UsageError
from qwen_rt.ops import OPS

__all__ = [
    "ABI",
    "DEFAULT_SMS",
    "LIBRARY_NAME",
    "SOURCES",
    "SUPPORTED_SMS",
    "build",
    "cache_folder",
    "find_nvcc",
    "library_path",
    "nvcc_version",
    "source_hash",
]

ABI = 2
"""QWEN_RT_ABI of capi.h."""

LIBRARY_NAME = "libqwen_rt_plugins.so"
SOURCES = Path(__file__).resolve().parent / "csrc"
SUPPORTED_SMS = (80, 86, 89, 90, 100, 120)
DEFAULT_SMS = (90,)

_OLDEST_NVCC = (12, 8)
_FLAGS = ("-std=c++17", "-O3", "--threads", "1", "-Xcompiler", "-fPIC,-Wall,-fvisibility=default")


def source_hash() -> str:
    """Return the SHA-256 of all sources, by name and content, as 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.suffix in (".cu", ".cuh", ".h"):
            digest.update(file.relative_to(SOURCES).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Return where libraries are kept: `build/plugins` of a checkout, else the user's cache."""
    root = SOURCES.parent.parent
    if (root / "pyproject.toml").is_file():
        return root / "build" / "plugins"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qwen-rt" / "plugins"


def library_path(sms: Sequence[int] = DEFAULT_SMS) -> Path:
    """Return where the library of the present sources for `sms` lies once it is built."""
    return cache_folder() / f"{source_hash()}-sm{'-'.join(map(str, sorted(sms)))}" / LIBRARY_NAME


def find_nvcc() -> Path:
    """Find nvcc: $CUDA_HOME, PATH, /usr/local/cuda, the nvidia-cuda-nvcc wheel.

    Raises:
        MissingDependencyError: There is none, or only one that is too old.
    """
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in sys.path:
        candidates += sorted(Path(folder).glob("nvidia/c*/bin/nvcc")) if folder else []
    too_old = None
    for candidate in candidates:
        if candidate.is_file():
            version = nvcc_version(candidate)
            if version >= _OLDEST_NVCC:
                return candidate
            too_old = f"nvcc {version[0]}.{version[1]}"
    oldest = ".".join(map(str, _OLDEST_NVCC))
    raise MissingDependencyError(
        f"{too_old} is too old" if too_old else "nvcc was not found",
        f"nvcc {oldest} or newer on PATH or below $CUDA_HOME",
        "install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime`",
    )


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Ask nvcc for its version, (0, 0) if it does not tell."""
    try:
        answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return 0, 0
    match = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def build(sms: Sequence[int] = DEFAULT_SMS, *, force: bool = False, jobs: int | None = None) -> Path:
    """Build the library, unless it is there.

    Args:
        sms: Compute capabilities, 90 for 9.0.
        force: Build even so.
        jobs: Compilers at a time; None for one per core.

    Returns:
        Path of the library.

    Raises:
        UsageError: An SM that the sources are not written for.
        MissingDependencyError: No usable nvcc.
        QwenRtError: nvcc failed; the first error is in the message.
    """
    if not sms or not set(sms) <= set(SUPPORTED_SMS):
        raise UsageError(f"sms={list(sms)}", f"some of {', '.join(map(str, SUPPORTED_SMS))}", "name supported ones")
    target = library_path(sms)
    if target.is_file() and not force:
        return target
    nvcc = find_nvcc()
    version = ".".join(map(str, nvcc_version(nvcc)))
    ops = ",".join(f"{op.name}:{op.version}" for op in OPS)
    info = f"abi={ABI} sources={source_hash()} sms={','.join(map(str, sorted(sms)))} nvcc={version} ops={ops}"
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sorted(sms)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = []
        commands = []
        for source in sorted(SOURCES.rglob("*.cu")):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            define = [f'-DQWEN_RT_BUILD_INFO="{info}"'] if source.name == "capi.cu" else []
            commands.append([str(nvcc), *_FLAGS, *codes, *define, "-c", str(source), "-o", objects[-1]])
        with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        library = str(Path(scratch) / LIBRARY_NAME)
        _run([str(nvcc), "-shared", "-cudart", "static", "-o", library, *objects])
        os.replace(library, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise QwenRtError(
            f"nvcc failed: {(lines or ['no message'])[0]}",
            "",
            f"rerun by hand: {Path(command[0]).name} ... {command[-3]}",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Build from the command line and print the path."""
    parser = argparse.ArgumentParser(prog="python -m qwen_rt.plugins.build", description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, action="append", help="compute capability, 90 for 9.0 (may be repeated)")
    parser.add_argument("--force", action="store_true", help="build even if the library is there")
    arguments = parser.parse_args(argv)
    try:
        print(build(tuple(arguments.sm or DEFAULT_SMS), force=arguments.force))
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
