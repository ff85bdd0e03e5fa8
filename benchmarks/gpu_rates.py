"""What one GPU can deliver: bytes a second of plain reads, and operations a second of large matrix products."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qwen_rt.benchmarks.measure import package_python
from qwen_rt.machine import last_json_line

if TYPE_CHECKING:
    from qwen_rt.plugins.library import PluginLibrary
    from qwen_rt.runtime.cuda.cudart import Cudart

__all__ = ["NUM_READ_PROBES", "gpu_read_bandwidth", "matrix_rate", "matrix_rates_of_child"]

NUM_READ_PROBES = 6
"""Variants of `PluginLibrary.read_probe`."""


def gpu_read_bandwidth(cuda: Cudart, library: PluginLibrary, nbytes: int = 8 << 30, repeats: int = 12) -> float:
    """Measure how fast the GPU reads its memory: the fastest of several plain read kernels.

    Args:
        cuda: The CUDA runtime, with the device opened.
        library: The plugins.
        nbytes: Of the buffer, many times any L2; at most half of what is free is taken.
        repeats: Reads by each kernel; the median counts.

    Returns:
        Bytes a second.

    Raises:
        QwenRtError: CUDA refused something.
    """
    from qwen_rt.runtime.cuda.memory import Resources

    chunk = 16 << 20
    nbytes = min(nbytes, cuda.memory_info()[0] // 2) // chunk * chunk
    with contextlib.closing(Resources(cuda)) as resources:
        stream, start, end = resources.stream(), resources.event(timing=True), resources.event(timing=True)
        (data, _), (sink, _) = resources.device(nbytes), resources.device(chunk)
        # Random bits, as weights have them: what is constant draws less power and is read at higher clocks.
        source = resources.pinned(chunk)
        source.array(np.uint8, (chunk,))[:] = np.random.default_rng(0).integers(0, 256, chunk, np.uint8)
        for offset in range(0, nbytes, chunk):
            cuda.copy(data + offset, source.host, chunk, stream)
        rates = []
        for variant in range(NUM_READ_PROBES):
            samples = []
            for _ in range(repeats + 2):
                cuda.event_record(start, stream)
                library.read_probe(data, nbytes, sink, variant, stream)
                cuda.event_record(end, stream)
                cuda.event_synchronize(end)
                samples.append(cuda.elapsed_ms(start, end))
            rates.append(nbytes / (sorted(samples[2:])[repeats // 2] * 1e-3))
        cuda.stream_synchronize(stream)
    return max(rates)


def matrix_rate(device: int = 0, size: int = 8192, repeats: int = 20, dtype: str = "bf16") -> float | None:
    """Measure how fast the GPU multiplies square matrices, by torch.

    Args:
        device: The GPU's number.
        size: Rows and columns of both factors.
        repeats: Products; the median counts.
        dtype: `bf16`, or `fp8` for e4m3 numbers with a scale for each row of both factors, which gives bf16.

    Returns:
        Operations a second (2 size³ a product); None without torch, without a GPU that it can use, or where that GPU
        or that torch has no such product.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(device)
    a, b = (torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    multiply: Callable[[], object] = functools.partial(torch.matmul, a, b, out=torch.empty_like(a))
    if dtype == "fp8":
        first, second = (100 * factor for factor in (a, b))  # e4m3 reaches 448
        ones = torch.ones(size, 1, device="cuda")
        multiply = functools.partial(
            torch._scaled_mm,
            first.to(torch.float8_e4m3fn),
            second.to(torch.float8_e4m3fn).t(),
            scale_a=ones,
            scale_b=ones.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    samples = []
    try:
        for turn in range(repeats + 5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            multiply()
            end.record()
            end.synchronize()
            if turn >= 5:
                samples.append(start.elapsed_time(end) * 1e-3)
    except (RuntimeError, NotImplementedError):
        return None
    return float(2 * size**3 / sorted(samples)[len(samples) // 2])


_CHILD = """
import json, sys
from qwen_rt.benchmarks.gpu_rates import matrix_rate
print(json.dumps({dtype: matrix_rate(int(sys.argv[1]), dtype=dtype) for dtype in sys.argv[2:]}))
"""


def matrix_rates_of_child(device: int = 0, timeout_s: float = 120.0) -> dict[str, float]:
    """Measure `matrix_rate` of bf16 and fp8 in a process of its own, so that torch leaves no memory on the device.

    Returns:
        `bf16` and `fp8` → operations a second, those that could be measured.
    """
    try:
        command = package_python("-P", "-c", _CHILD, str(device), "bf16", "fp8")
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {}
    answer = last_json_line(done.stdout)
    rates = answer if isinstance(answer, dict) else {}
    return {dtype: float(rate) for dtype, rate in rates.items() if isinstance(rate, int | float) and rate > 0}
