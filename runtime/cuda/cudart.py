"""The CUDA runtime by ctypes: only what the session needs, every status checked, every error one line.

The library is looked for in the `nvidia/*/lib` folders of the wheels that onnxruntime-gpu brings along, then on the
loader's path. Handles are the addresses that CUDA gives, as plain integers; all pointers are too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_rt.errors import CapacityError, MissingDependencyError, QwenRtError, UnsupportedModelError, UsageError

__all__ = ["OLDEST_SM", "CudaError", "Cudart", "OutOfMemoryError", "find_cudart", "library_candidates"]

OLDEST_SM = 80
"""Compute capability 8.0: the first with bf16 matrix units and asynchronous copies."""

_MAJORS = (13, 12)
_OUT_OF_MEMORY = 2
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100
_NOT_READY = 600
_SM_MAJOR, _SM_MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, ...Minor
_HOST_ALLOC = 1 | 2  # cudaHostAllocPortable | cudaHostAllocMapped
_MEMCPY_DEFAULT = 4  # the addresses say which way
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_CAPTURE_RELAXED = 2
_INSTALL = "pip install onnxruntime-gpu nvidia-cuda-runtime"

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_OUT = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaDriverGetVersion": (_OUT,),
    "cudaRuntimeGetVersion": (_OUT,),
    "cudaGetDeviceCount": (_OUT,),
    "cudaSetDevice": (_INT,),
    "cudaDeviceGetAttribute": (_OUT, _INT, _INT),
    "cudaMemGetInfo": (_OUT, _OUT),
    "cudaMalloc": (_OUT, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaHostAlloc": (_OUT, _SIZE, ctypes.c_uint),
    "cudaFreeHost": (_POINTER,),
    "cudaHostGetDevicePointer": (_OUT, _POINTER, ctypes.c_uint),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemsetAsync": (_POINTER, _INT, _SIZE, _POINTER),
    "cudaStreamCreateWithFlags": (_OUT, ctypes.c_uint),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamQuery": (_POINTER,),
    "cudaEventCreateWithFlags": (_OUT, ctypes.c_uint),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventQuery": (_POINTER,),
    "cudaEventSynchronize": (_POINTER,),
    "cudaEventElapsedTime": (_OUT, _POINTER, _POINTER),
    "cudaEventDestroy": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, _OUT),
    "cudaGraphInstantiate": (_OUT, _POINTER, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGraphDestroy": (_POINTER,),
    "cudaGetLastError": (),
}


class CudaError(QwenRtError):
    """The CUDA runtime refused a call.

    Attributes:
        status: The cudaError_t.
    """

    def __init__(self, what: str, expected: str = "", fix: str = "", *, status: int = 0) -> None:
        super().__init__(what, expected, fix)
        self.status = status


class OutOfMemoryError(CapacityError):
    """Device or pinned memory that cannot be had."""


def library_candidates(stem: str) -> Iterator[str]:
    """Yield where a library of CUDA may be, best first: of CUDA 13 before 12, pip wheels before the loader's path.

    Args:
        stem: Its name before `.so`, as `libcudart`.
    """
    for major in _MAJORS:
        name = f"{stem}.so.{major}"
        for folder in dict.fromkeys(sys.path):
            if folder:
                yield from map(str, sorted(Path(folder).glob(f"nvidia/*/lib/{name}")))
        yield name


def find_cudart() -> ctypes.CDLL:
    """Load libcudart: of the pip wheels if there is one, else of the loader's path; CUDA 13 before 12.

    Raises:
        MissingDependencyError: There is none that can be loaded.
    """
    trouble = ""
    for candidate in library_candidates("libcudart"):
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            if "/" in candidate:
                trouble = f": {error}"
    raise MissingDependencyError(f"the CUDA runtime (libcudart.so) was not found{trouble}", "CUDA 12 or 13", _INSTALL)


class Cudart:
    """The runtime's calls that the session uses, on one device at a time.

    Args:
        library: A loaded libcudart; None: the one of `find_cudart`.

    Raises:
        MissingDependencyError: No CUDA runtime, or one without a function that is needed.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = find_cudart() if library is None else library
        try:
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, _INT
            for name in ("cudaGetErrorName", "cudaGetErrorString"):
                function = getattr(self._library, name)
                function.argtypes, function.restype = (_INT,), ctypes.c_char_p
        except AttributeError as error:
            raise MissingDependencyError(f"the CUDA runtime is too old: {error}", "CUDA 12 or 13", _INSTALL) from None
        # Bound once: these run in every step.
        self._graph_launch = self._library.cudaGraphLaunch
        self._event_record = self._library.cudaEventRecord
        self._event_synchronize = self._library.cudaEventSynchronize

    def _error(self, call: str, status: int) -> QwenRtError:
        self._library.cudaGetLastError()  # else the next call of anyone in this process reports it again
        name = (self._library.cudaGetErrorName(status) or b"unknown error").decode()
        text = (self._library.cudaGetErrorString(status) or b"").decode()
        if status == _OUT_OF_MEMORY:
            return OutOfMemoryError(f"{call}: {name} ({text})", "enough free memory", "free memory or ask for less")
        return CudaError(f"{call}: {name} ({text})", status=status)

    def _call(self, name: str, *arguments: Any, note: str = "") -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise self._error(f"{name}{note}", status)

    def _handle(self, name: str, *arguments: Any, note: str = "") -> int:
        out = ctypes.c_void_p()
        self._call(name, ctypes.addressof(out), *arguments, note=note)
        return out.value or 0

    def _integer(self, name: str, *arguments: Any) -> int:
        out = ctypes.c_int()
        self._call(name, ctypes.addressof(out), *arguments)
        return out.value

    # ---------------------------------------------------------------- device

    @property
    def runtime_version(self) -> int:
        """1000 · major + 10 · minor."""
        return self._integer("cudaRuntimeGetVersion")

    @property
    def driver_version(self) -> int:
        """Newest CUDA that the driver speaks, 1000 · major + 10 · minor; 0 without a driver."""
        return self._integer("cudaDriverGetVersion")

    def open_device(self, device: int) -> int:
        """Make a device the calling thread's own, after checking that this package can run on it.

        A driver serves every runtime of its major version and older ones.

        Returns:
            Its compute capability, 90 for 9.0.

        Raises:
            MissingDependencyError: No driver, or one older than the runtime.
            UsageError: No GPU of that number.
            UnsupportedModelError: A GPU too old.
        """
        driver, runtime = self.driver_version, self.runtime_version
        if driver == 0:
            raise MissingDependencyError(
                "no NVIDIA driver is loaded",
                "one for CUDA " + _version(runtime),
                "install it, or build with --target cpu",
            )
        if driver // 1000 < runtime // 1000:
            raise MissingDependencyError(
                f"the NVIDIA driver supports CUDA {_version(driver)}",
                f"CUDA {_version(runtime)}, the runtime's, or newer",
                f"update the driver, or install onnxruntime-gpu for CUDA {driver // 1000}",
            )
        count = self.device_count()
        if not 0 <= device < count:
            raise UsageError(f"device={device}", f"0 to {count - 1}", "name a GPU that nvidia-smi lists")
        self.set_device(device)
        sm = 10 * self.attribute(_SM_MAJOR, device) + self.attribute(_SM_MINOR, device)
        if sm < OLDEST_SM:
            raise UnsupportedModelError(
                f"the GPU has SM {sm // 10}.{sm % 10}", "8.0 or newer", "use a newer GPU, or a bundle of target cpu"
            )
        return sm

    def device_count(self) -> int:
        """Return the number of GPUs.

        Raises:
            MissingDependencyError: There is none, or the driver is too old to tell.
        """
        count = ctypes.c_int()
        status = self._library.cudaGetDeviceCount(ctypes.addressof(count))
        if status in (_NO_DEVICE, _INSUFFICIENT_DRIVER) or (status == 0 and count.value == 0):
            self._library.cudaGetLastError()
            name = (self._library.cudaGetErrorName(status) or b"").decode() if status else "a count of 0"
            raise MissingDependencyError(
                f"no NVIDIA GPU can be used ({name})", "one that nvidia-smi lists", "check CUDA_VISIBLE_DEVICES"
            )
        if status:
            raise self._error("cudaGetDeviceCount", status)
        return count.value

    def set_device(self, device: int) -> None:
        """Make a device the calling thread's own."""
        self._call("cudaSetDevice", device)

    def attribute(self, attribute: int, device: int) -> int:
        """Return a cudaDeviceAttr."""
        return self._integer("cudaDeviceGetAttribute", attribute, device)

    def memory_info(self) -> tuple[int, int]:
        """Return (free, total) bytes of the device, by all processes' use."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.addressof(free), ctypes.addressof(total))
        return free.value, total.value

    # ---------------------------------------------------------------- memory

    def malloc(self, nbytes: int) -> int:
        """Allocate device memory; 256-byte aligned at least."""
        return self._handle("cudaMalloc", nbytes, note=f" of {nbytes} bytes")

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", pointer)

    def host_alloc(self, nbytes: int) -> int:
        """Allocate pinned host memory that the device can address too."""
        return self._handle("cudaHostAlloc", nbytes, _HOST_ALLOC, note=f" of {nbytes} bytes")

    def host_free(self, pointer: int) -> None:
        """Give pinned host memory back."""
        self._call("cudaFreeHost", pointer)

    def host_device_pointer(self, pointer: int) -> int:
        """Return the device's address of pinned host memory."""
        return self._handle("cudaHostGetDevicePointer", pointer, 0)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy; host memory must be pinned and stay as it is until the copy is done."""
        self._call("cudaMemcpyAsync", target, source, nbytes, _MEMCPY_DEFAULT, stream)

    def fill(self, target: int, value: int, nbytes: int, stream: int) -> None:
        """Enqueue setting every byte to `value`."""
        self._call("cudaMemsetAsync", target, value, nbytes, stream)

    # ---------------------------------------------------------------- streams, events

    def stream_create(self) -> int:
        """Create a stream that does not wait for the legacy default stream."""
        return self._handle("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def stream_destroy(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def stream_synchronize(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cudaStreamSynchronize", stream)

    def stream_query(self, stream: int) -> bool:
        """Say whether all work of a stream is done."""
        return self._is_ready("cudaStreamQuery", stream)

    def event_create(self, *, timing: bool = False) -> int:
        """Create an event."""
        return self._handle("cudaEventCreateWithFlags", 0 if timing else _EVENT_DISABLE_TIMING)

    def event_destroy(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def event_record(self, event: int, stream: int) -> None:
        """Enqueue an event."""
        if status := self._event_record(event, stream):
            raise self._error("cudaEventRecord", status)

    def event_query(self, event: int) -> bool:
        """Say whether an event has happened."""
        return self._is_ready("cudaEventQuery", event)

    def event_synchronize(self, event: int) -> None:
        """Wait for an event; one never recorded has happened."""
        if status := self._event_synchronize(event):
            raise self._error("cudaEventSynchronize", status)

    def elapsed_ms(self, start: int, stop: int) -> float:
        """Return the milliseconds between two timing events that have happened."""
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.addressof(milliseconds), start, stop)
        return milliseconds.value

    def _is_ready(self, name: str, handle: int) -> bool:
        status = getattr(self._library, name)(handle)
        if status == _NOT_READY:
            self._library.cudaGetLastError()
            return False
        if status:
            raise self._error(name, status)
        return True

    # ---------------------------------------------------------------- graphs

    def capture_begin(self, stream: int) -> None:
        """Record what follows on a stream instead of running it; calls that are no stream work stay allowed."""
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_RELAXED)

    def capture_end(self, stream: int) -> int:
        """End a capture and return its graph."""
        graph = ctypes.c_void_p()
        self._call("cudaStreamEndCapture", stream, ctypes.addressof(graph))  # the one with its result behind
        return graph.value or 0

    def graph_instantiate(self, graph: int) -> int:
        """Make a graph launchable."""
        return self._handle("cudaGraphInstantiate", graph, 0)

    def graph_launch(self, executable: int, stream: int) -> None:
        """Enqueue a graph."""
        if status := self._graph_launch(executable, stream):
            raise self._error("cudaGraphLaunch", status)

    def graph_exec_destroy(self, executable: int) -> None:
        """Destroy a launchable graph."""
        self._call("cudaGraphExecDestroy", executable)

    def graph_destroy(self, graph: int) -> None:
        """Destroy a captured graph."""
        self._call("cudaGraphDestroy", graph)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
