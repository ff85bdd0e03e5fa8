"""What ran on the GPU and when, by CUPTI's activity API through ctypes: kernels, copies and fills in ns.

CUPTI hands out records in buffers that we give it. It is told of launched graphs node by node as long as nobody asks it
for whole graphs (`CUPTI_ACTIVITY_KIND_GRAPH_TRACE`), so `CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL` is all that is enabled
besides copies and fills. It must be attached before the process's CUDA context is made, or records of graphs that were
captured earlier can lack nodes.

Layouts: cupti_activity.h of CUDA 13.0. Of every kind only the front is declared, which CUDA 12 has too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_rt.errors import QwenRtError
from qwen_rt.runtime.cuda.cudart import library_candidates

__all__ = ["Activity", "Cupti", "CuptiError", "find_cupti", "parse_buffer"]

MEMCPY, MEMSET, KERNEL = 1, 2, 10
"""CUpti_ActivityKind; the last is CONCURRENT_KERNEL."""

_BUFFER_BYTES = 8 << 20
_ALIGNMENT = 8
_FLUSH_FORCED = 1
_MAX_LIMIT_REACHED = 12  # of cuptiActivityGetNextRecord: no more
_INVALID_KIND = 21
_NAMES = {MEMCPY: "copy", MEMSET: "fill"}
_SUFFERED = {
    35: "only administrators may profile: load the driver with NVreg_RestrictProfilingToAdminUsers=0, or run as root",
    39: "another profiler is attached to this process",
    40: "the hypervisor does not let this machine profile",
}

_REQUEST = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_COMPLETE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class CuptiError(QwenRtError):
    """CUPTI is not there, or refuses."""


class _Kernel(ctypes.Structure):
    """The front of CUpti_ActivityKernel9 and 10."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("cache_config", ctypes.c_uint8),
        ("shared_memory_config", ctypes.c_uint8),
        ("registers", ctypes.c_uint16),
        ("partitioned_requested", ctypes.c_uint32),
        ("partitioned_executed", ctypes.c_uint32),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("completed", ctypes.c_uint64),
        ("device", ctypes.c_uint32),
        ("context", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("static_shared_bytes", ctypes.c_int32),
        ("dynamic_shared_bytes", ctypes.c_int32),
        ("local_bytes_per_thread", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32),
        ("correlation", ctypes.c_uint32),
        ("grid_id", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("reserved", ctypes.c_void_p),
        ("queued", ctypes.c_uint64),
        ("submitted", ctypes.c_uint64),
        ("launch_type", ctypes.c_uint8),
        ("carveout_requested", ctypes.c_uint8),
        ("carveout", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
        ("shared_executed", ctypes.c_uint32),
        ("graph_node", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint32),
        ("graph", ctypes.c_uint32),
    )


class _Memory(ctypes.Structure):
    """The front of CUpti_ActivityMemcpy6 and of CUpti_ActivityMemset4, where they are the same."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("value", ctypes.c_uint32),
        ("nbytes", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("device", ctypes.c_uint32),
        ("context", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
        ("correlation", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Activity:
    """Something that ran on the device.

    Attributes:
        name: A kernel's mangled name; `copy` or `fill`.
        start_ns, end_ns: On CUPTI's clock.
        stream: Number of the stream.
        launch: Number of the call that launched it; nodes of one graph launch share it.
        graph_node: Number of its node in a captured graph; 0 outside of one.
        grid, block: Sizes of a kernel.
        shared_bytes: Shared memory of a block, static and dynamic.
        registers: Of a thread.
    """

    name: str
    start_ns: int
    end_ns: int
    stream: int = 0
    launch: int = 0
    graph_node: int = 0
    grid: tuple[int, int, int] = (0, 0, 0)
    block: tuple[int, int, int] = (0, 0, 0)
    shared_bytes: int = 0
    registers: int = 0


def _places() -> Iterator[str]:
    """Yield where libcupti may be: as other CUDA libraries, and in the folders of a toolkit."""
    yield from library_candidates("libcupti")
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for root in dict.fromkeys([*roots, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))[::-1]]):
        for folder in ("extras/CUPTI/lib64", "lib64", "lib"):
            yield from map(str, sorted((root / folder).glob("libcupti.so.[0-9]*"))[::-1])


def find_cupti() -> ctypes.CDLL:
    """Load libcupti: of the pip wheels, of the loader's path, or of a toolkit.

    Raises:
        CuptiError: There is none that can be loaded.
    """
    for place in _places():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place)
    raise CuptiError("CUPTI (libcupti.so) was not found", fix="pip install nvidia-cuda-cupti")


class Cupti:
    """Records activity between `start` and `stop`; one in a process.

    Args:
        library: A loaded libcupti; None: the one of `find_cupti`.

    Raises:
        CuptiError: There is no CUPTI, or it refuses.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = find_cupti() if library is None else library
        self._free: list[ctypes.Array[ctypes.c_char]] = []
        self._given: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._full: list[tuple[int, int]] = []
        # CUPTI calls them from threads of its own until the process ends.
        self._callbacks = _REQUEST(self._request), _COMPLETE(self._complete)
        self._call("cuptiActivityRegisterCallbacks", *self._callbacks)
        _KEPT.append(self)
        self.start()  # says at once whether it is allowed, and before there is a context
        self.stop()

    @functools.cached_property
    def version(self) -> int:
        """CUPTI_API_VERSION, 130001 of CUDA 13.0."""
        number = ctypes.c_uint32()
        self._call("cuptiGetVersion", ctypes.byref(number))
        return number.value

    def start(self) -> None:
        """Record from here on."""
        for kind in (KERNEL, MEMCPY, MEMSET):
            self._call("cuptiActivityEnable", kind)

    def stop(self) -> list[Activity]:
        """Record no more, and return what was, in order of its start. The device must be idle.

        Raises:
            CuptiError: Records were lost.
        """
        for kind in (KERNEL, MEMCPY, MEMSET):
            self._call("cuptiActivityDisable", kind)
        self._call("cuptiActivityFlushAll", _FLUSH_FORCED)
        dropped = ctypes.c_size_t()
        self._call("cuptiActivityGetNumDroppedRecords", None, 0, ctypes.byref(dropped))
        full, self._full = self._full, []
        found: list[Activity] = []
        for address, nbytes in full:
            found += parse_buffer(self._library, address, nbytes)
            self._free.append(self._given.pop(address))
        if dropped.value:
            raise CuptiError(f"CUPTI lost {dropped.value} records")
        return sorted(found, key=lambda activity: (activity.start_ns, activity.end_ns))

    def timestamp_ns(self) -> int:
        """Return the time on the clock of the records."""
        now = ctypes.c_uint64()
        self._call("cuptiGetTimestamp", ctypes.byref(now))
        return now.value

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise _error(self._library, name, status)

    def _request(self, buffer: object, size: object, most: object) -> None:
        """Give CUPTI a buffer."""
        memory = self._free.pop() if self._free else ctypes.create_string_buffer(_BUFFER_BYTES + _ALIGNMENT)
        address = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
        self._given[address] = memory
        buffer[0], size[0], most[0] = address, _BUFFER_BYTES, 0  # type: ignore[index]

    def _complete(self, context: object, stream: int, buffer: int, size: int, valid: int) -> None:
        """Take a buffer back."""
        self._full.append((buffer, valid))


_KEPT: list[Cupti] = []


def _error(library: ctypes.CDLL, name: str, status: int) -> CuptiError:
    text = ctypes.c_char_p()
    library.cuptiGetResultString(status, ctypes.byref(text))
    return CuptiError(f"CUPTI refuses {name}: {(text.value or b'').decode()} ({status})", fix=_SUFFERED.get(status, ""))


def parse_buffer(library: ctypes.CDLL, address: int, nbytes: int) -> list[Activity]:
    """Read the records of a full buffer.

    Args:
        library: libcupti.
        address: Of the buffer.
        nbytes: How much of it is filled.

    Raises:
        CuptiError: CUPTI cannot read its own buffer.
    """
    found: list[Activity] = []
    record = ctypes.c_void_p()
    while nbytes:
        status = library.cuptiActivityGetNextRecord(
            ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.byref(record)
        )
        if status in (_MAX_LIMIT_REACHED, _INVALID_KIND):
            break
        if status:
            raise _error(library, "cuptiActivityGetNextRecord", status)
        at = record.value or 0
        kind = ctypes.c_uint32.from_address(at).value
        if kind == KERNEL:
            kernel = _Kernel.from_address(at)
            found.append(
                Activity(
                    (kernel.name or b"").decode(errors="replace"),
                    kernel.start,
                    kernel.end,
                    kernel.stream,
                    kernel.correlation,
                    kernel.graph_node,
                    tuple(kernel.grid),
                    tuple(kernel.block),
                    kernel.static_shared_bytes + kernel.dynamic_shared_bytes,
                    kernel.registers,
                )
            )
        elif kind in _NAMES:
            memory = _Memory.from_address(at)
            found.append(Activity(_NAMES[kind], memory.start, memory.end, memory.stream, memory.correlation))
    return found
