"""Print what the NVIDIA driver says about this machine's GPUs as one line of JSON.

Runs as a script in a process of its own (`doctor` starts it): a driver library that crashes or hangs takes nothing else
down. Only the standard library is used; nothing of the package is imported. NVML is asked first (it creates no CUDA
context and sees every GPU), then the CUDA driver.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

__all__ = ["probe"]

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _check(status: int, call: str) -> None:
    if status != 0:
        raise OSError(f"{call} returned {status}")


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(buffer: ctypes.Array[ctypes.c_char]) -> str:
    return buffer.value.decode("utf-8", "replace")


def _by_nvml() -> dict[str, Any]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    _check(nvml.nvmlInit_v2(), "nvmlInit")
    text, number = ctypes.create_string_buffer(96), ctypes.c_int()
    _check(nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)), "nvmlSystemGetDriverVersion")
    found: dict[str, Any] = {"source": "libnvidia-ml", "driver": _text(text), "gpus": []}
    if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number)) == 0:
        found["cuda"] = _cuda_version(number.value)
    count = ctypes.c_uint()
    _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)), "nvmlDeviceGetCount")
    for index in range(count.value):
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        major, minor = ctypes.c_int(), ctypes.c_int()
        _check(nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)), "nvmlDeviceGetHandle")
        _check(nvml.nvmlDeviceGetName(handle, text, ctypes.c_uint(96)), "nvmlDeviceGetName")
        _check(nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)), "nvmlDeviceGetMemoryInfo")
        _check(
            nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)),
            "nvmlDeviceGetCudaComputeCapability",
        )
        found["gpus"].append(
            {
                "name": _text(text),
                "memory_bytes": memory.total,
                "free_bytes": memory.free,
                "compute_capability": f"{major.value}.{minor.value}",
            }
        )
    nvml.nvmlShutdown()
    return found


def _by_cuda() -> dict[str, Any]:
    cuda = ctypes.CDLL("libcuda.so.1")
    _check(cuda.cuInit(ctypes.c_uint(0)), "cuInit")
    number, text = ctypes.c_int(), ctypes.create_string_buffer(96)
    found: dict[str, Any] = {"source": "libcuda", "driver": None, "gpus": []}
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        found["cuda"] = _cuda_version(number.value)
    _check(cuda.cuDeviceGetCount(ctypes.byref(number)), "cuDeviceGetCount")
    for index in range(number.value):
        device, total = ctypes.c_int(), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        _check(cuda.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
        _check(cuda.cuDeviceGetName(text, ctypes.c_int(96), device), "cuDeviceGetName")
        _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device), "cuDeviceTotalMem")
        for value, attribute in ((major, _COMPUTE_CAPABILITY_MAJOR), (minor, _COMPUTE_CAPABILITY_MINOR)):
            status = cuda.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), device)
            _check(status, "cuDeviceGetAttribute")
        found["gpus"].append(
            {
                "name": _text(text),
                "memory_bytes": total.value,
                "free_bytes": None,
                "compute_capability": f"{major.value}.{minor.value}",
            }
        )
    return found


def probe() -> dict[str, Any]:
    """Return `{source, driver, cuda, gpus: [{name, memory_bytes, free_bytes, compute_capability}]}` or `{reason}`."""
    reasons: list[str] = []
    for ask in (_by_nvml, _by_cuda):
        try:
            return ask()
        except (OSError, AttributeError) as error:
            reasons.append(str(error))
    if all("cannot open shared object file" in reason for reason in reasons):
        return {"reason": "no NVIDIA driver (neither libnvidia-ml.so.1 nor libcuda.so.1 is there)"}
    return {"reason": "; ".join(reasons)}


if __name__ == "__main__":
    print(json.dumps(probe()))
