"""Builds libqwen_rt_plugins.so from plugins/csrc with nvcc, once per state of the sources.

The library holds the CUDA kernels of the op table, their C ABI (`plugins/csrc/capi.h`) and the ops as custom ops of
ONNX Runtime. It lies in `build/plugins/<hash>/` of a checkout, or under the user's cache where the package is
installed; the hash covers all sources, the op table and the SMs, so an old library is never taken for a new one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from qwen_rt.errors import MissingDependencyError, QwenRtError, StorageError, UsageError
from qwen_rt.ops import DOMAIN, OPS, POLYMORPHIC, OpTensor, PluginOp
from qwen_rt.progress import format_seconds

__all__ = [
    "ABI",
    "DEFAULT_SMS",
    "LIBRARY_NAME",
    "SOURCES",
    "SUPPORTED_SMS",
    "build",
    "built_libraries",
    "cache_folder",
    "find_library",
    "find_nvcc",
    "library_info",
    "library_path",
    "nvcc_version",
    "op_table",
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
_SUFFIXES = (".cu", ".cuh", ".cpp", ".h")
_ARCHITECTURES = {90: "90a"}  # wgmma is in the architecture-specific instructions of SM 9.0 only
_ELEMENT_TYPES = {
    "f32": 1,
    "u8": 2,
    "i8": 3,
    "i32": 6,
    "i64": 7,
    "f16": 10,
    "bf16": 16,
    "f8": 17,
}  # TensorProto.DataType
_ANY_TYPE = 0  # what ONNX Runtime takes for several
_CACHE_TYPE = -1  # kCacheType of op_table.h: outputs have it too, and one of several must be said
_INFO = re.compile(rb"abi=\d+ sources=[\w.,:=+ -]+")

_HELP = """examples:
  python -m qwen_rt.plugins.build                     for SM 9.0 (H100, H200)
  python -m qwen_rt.plugins.build --sm 80 --sm 89     for SM 8.0 (A100) and 8.9 (L4, L40, RTX 40)

Needs nvcc 12.8 or newer on PATH or below $CUDA_HOME, and a C++ compiler; no GPU. stdout gets the path of the library,
stderr a line per compiled file. Exit codes: 0 built or there already, 1 it failed, 2 an option that cannot be used."""


def op_table() -> str:
    """Return the op table as C++ constants, the text of op_table.inc (structures in `csrc/ort/op_table.h`)."""
    rows = ",\n".join(_op_row(op) for op in OPS)
    types = ", ".join(str(_ELEMENT_TYPES[name]) for name in POLYMORPHIC["cache"])
    head = f'#define QWEN_RT_DOMAIN "{DOMAIN}"\n#define QWEN_RT_CACHE_TYPES {types}\n'
    return f"{head}\nconstexpr OpSpec kOps[] = {{\n{rows},\n}};\n"


def _op_row(op: PluginOp) -> str:
    words = (word for tensor in op.tensors for size in tensor.shape for word in re.findall(r"[A-Za-z_]\w*", size))
    symbols = list(dict.fromkeys((*op.dims, *words)))
    tensors = ",\n      ".join(_tensor_row(op, tensor, symbols) for tensor in op.tensors)
    attributes = ", ".join(
        f"{{{json.dumps(name)}, {_flag(default is None)}, {float(default or 0)!r}}}" for name, default in op.attributes
    )
    return (
        f"    // version {op.version}\n"
        f"    {{{json.dumps(op.name)}, {len(op.dims)}, {len(symbols)}, {{{', '.join(map(json.dumps, symbols))}}},\n"
        f"     {len(op.inputs)}, {len(op.outputs)},\n     {{{tensors}}},\n"
        f"     {len(op.attributes)}, {{{attributes}}}, {_flag(op.has_workspace)}}}"
    )


def _tensor_row(op: PluginOp, tensor: OpTensor, symbols: Sequence[str]) -> str:
    alias = -1 if tensor.alias is None else [other.name for other in op.inputs].index(tensor.alias)
    sizes = ", ".join(_size(size, symbols) for size in tensor.shape)
    element_type = _CACHE_TYPE if tensor.dtype == "cache" else _ELEMENT_TYPES.get(tensor.dtype, _ANY_TYPE)
    return (
        f"{{{json.dumps(tensor.name)}, {element_type}, {_flag(tensor.optional)},"
        f" {alias}, {_flag(tensor.may_alias)}, {len(tensor.shape)}, {{{sizes}}}}}"
    )


def _size(text: str, symbols: Sequence[str]) -> str:
    constant, terms = 0, []
    for term in text.split("+"):
        names = [word.strip() for word in term.split("*")]
        factor = 1
        for number in (name for name in names if name.isdecimal()):
            factor *= int(number)
        numbers = [str(symbols.index(name)) for name in names if not name.isdecimal()]
        if numbers:
            terms.append(f"{{{factor}, {len(numbers)}, {{{', '.join(numbers)}}}}}")
        else:
            constant += factor
    return f"{{{json.dumps(text)}, {constant}, {len(terms)}, {{{', '.join(terms)}}}}}"


def _flag(value: bool) -> str:
    return "true" if value else "false"


def source_hash() -> str:
    """Return the SHA-256 of all sources, by name and content, and of the op table, as 16 hex digits."""
    digest = hashlib.sha256(op_table().encode())
    for file in sorted(SOURCES.rglob("*")):
        if file.suffix in _SUFFIXES:
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
    return _library_path(source_hash(), sms)


def _library_path(sources: str, sms: Sequence[int]) -> Path:
    return cache_folder() / f"{sources}-sm{'-'.join(map(str, sorted(set(sms))))}" / LIBRARY_NAME


def library_info(path: Path) -> dict[str, str]:
    """Read what a library was built from, without loading it (so without CUDA).

    Returns:
        `abi`, `sources`, `sms` (`"80,90"`), `nvcc`, `ops`; nothing if the file is not such a library.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _INFO.search(data)
            text = found[0].decode() if found else ""
    except (OSError, ValueError):  # ValueError: an empty file
        return {}
    return dict(item.split("=", 1) for item in text.split() if "=" in item)


def built_libraries() -> list[Path]:
    """Return all libraries that were built, of whatever sources, the newest first."""
    times = []
    for path in cache_folder().glob(f"*/{LIBRARY_NAME}"):
        with contextlib.suppress(OSError):  # removed since it was listed
            times.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(times, reverse=True)]


def find_library(sms: Sequence[int] | None = None) -> Path | None:
    """Return the newest built library of the present sources, without loading it.

    Args:
        sms: Compute capabilities that it must have code for, 90 for 9.0; None for any.

    Returns:
        Its path, or None if there is none.
    """
    present = source_hash()
    for path in built_libraries():
        info = library_info(path)
        have = {int(sm) for sm in info.get("sms", "").split(",") if sm.isdecimal()}
        if info.get("sources") == present and info.get("abi") == str(ABI) and have >= set(sms or ()):
            return path
    return None


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
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    match = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def build(
    sms: Sequence[int] = DEFAULT_SMS,
    *,
    force: bool = False,
    jobs: int | None = None,
    werror: bool = False,
    quiet: bool = True,
) -> Path:
    """Build the library, unless it is there.

    Args:
        sms: Compute capabilities, 90 for 9.0.
        force: Build even so.
        jobs: Compilers at a time; None for one per core.
        werror: Fail on any warning; a library that was built without this is built again.
        quiet: Write no line per compiled file to stderr.

    Returns:
        Path of the library.

    Raises:
        UsageError: An SM that the sources are not written for.
        MissingDependencyError: No usable nvcc.
        StorageError: No room or no permission for the library.
        QwenRtError: nvcc failed (the first error is in the message), or the sources changed meanwhile.
    """
    sms = sorted(set(sms))
    if not sms or not set(sms) <= set(SUPPORTED_SMS):
        raise UsageError(f"sms={list(sms)}", f"some of {', '.join(map(str, SUPPORTED_SMS))}", "name supported ones")
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs={jobs}", "1 or more")
    sources = source_hash()
    target = _library_path(sources, sms)
    if target.is_file() and not force and not (werror and library_info(target).get("werror") != "1"):
        return target
    nvcc = find_nvcc()
    version = ".".join(map(str, nvcc_version(nvcc)))
    ops = ",".join(f"{op.name}:{op.version}" for op in OPS)
    info = f"abi={ABI} sources={sources} sms={','.join(map(str, sms))} nvcc={version} ops={ops}"
    info += f" werror={int(werror)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            (Path(scratch) / "op_table.inc").write_text(op_table(), encoding="utf-8")
            commands = _commands(nvcc, sms, Path(scratch), info, werror)
            _compile(commands, jobs or os.cpu_count() or 1, quiet)
            library = str(Path(scratch) / LIBRARY_NAME)
            objects = [command[-1] for command in commands.values()]
            _run([str(nvcc), "-shared", "-cudart", "static", *objects, "-ldl", "-o", library])
            if source_hash() != sources:
                raise QwenRtError("the sources changed while they were compiled", fix="build again")
            os.replace(library, target)
    except OSError as error:
        raise StorageError(f"{target.parent}: {error.strerror or error}", "room for the library", "make some") from None
    return target


def _commands(nvcc: Path, sms: Sequence[int], scratch: Path, info: str, werror: bool) -> dict[str, list[str]]:
    """Source → command that compiles it; the object is the last word."""
    codes = []
    for sm in sms:
        name = _ARCHITECTURES.get(sm, str(sm))
        codes.append(f"-gencode=arch=compute_{name},code=sm_{name}")
    commands = {}
    for source in sorted((*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cpp"))):
        name = source.relative_to(SOURCES).as_posix()
        flags = [*_FLAGS, *codes, f"-I{SOURCES}", f"-I{scratch}"]
        if werror:  # the host code that nvcc makes of a .cu file is not ours
            flags += ["-Werror", "all-warnings"] + (["-Xcompiler", "-Werror"] if source.suffix == ".cpp" else [])
        if name == "capi.cu":
            flags.append(f'-DQWEN_RT_BUILD_INFO="{info}"')
        commands[name] = [str(nvcc), *flags, "-c", str(source), "-o", str(scratch / f"{name.replace('/', '_')}.o")]
    return commands


def _compile(commands: dict[str, list[str]], jobs: int, quiet: bool) -> None:
    """Run the compilers; after a failure none is started any more."""
    lock = threading.Lock()
    done = 0

    def compile_one(name: str) -> None:
        nonlocal done
        start = time.monotonic()
        _run(commands[name])
        with lock:
            done += 1
            if not quiet:
                with contextlib.suppress(OSError, ValueError):  # a closed stderr ends the report, not the work
                    line = f"[{done}/{len(commands)}] {name}  {format_seconds(time.monotonic() - start)}"
                    print(line, file=sys.stderr, flush=True)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        # The largest first, so that none of them is the last to begin.
        order = sorted(commands, key=lambda name: (SOURCES / name).stat().st_size, reverse=True)
        for future in concurrent.futures.as_completed([pool.submit(compile_one, name) for name in order]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        telling = [line for line in lines if "error" in line.lower()] or [line for line in lines if line.strip()]
        source = next((word for word in command if word.endswith((".cu", ".cpp"))), "the library")
        raise QwenRtError(
            f"nvcc failed on {Path(source).name}: {(telling or ['no message'])[0]}",
            "sources that this nvcc compiles",
            "build with another nvcc (below $CUDA_HOME), or for fewer SMs",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Build from the command line and print the path."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_rt.plugins.build",
        description=(__doc__ or "").strip(),
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(map(str, SUPPORTED_SMS))
    parser.add_argument(
        "--sm", type=int, action="append", metavar="SM", help=f"compute capability, of {known}; may be repeated [90]"
    )
    parser.add_argument("--force", action="store_true", help="build even if the library is there")
    parser.add_argument("--werror", action="store_true", help="fail on any warning")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at a time [one per core]")
    parser.add_argument("--quiet", action="store_true", help="no line per compiled file")
    arguments = parser.parse_args(argv)
    try:
        print(
            build(
                tuple(arguments.sm or DEFAULT_SMS),
                force=arguments.force,
                jobs=arguments.jobs,
                werror=arguments.werror,
                quiet=arguments.quiet,
            )
        )
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
