"""Who holds which bytes: allocations that go back together, the size of the KV pool, the memory report."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.bundle import KV_DTYPES
from qwen_rt.errors import CapacityError, QwenRtError
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.spec import ModelSpec

__all__ = [
    "ALIGNMENT",
    "MIN_BLOCKS",
    "Layout",
    "MemoryReport",
    "Pinned",
    "Resources",
    "align",
    "block_bytes",
    "count_blocks",
    "measured",
    "require_memory",
    "reserve_bytes",
]

ALIGNMENT = 256
"""Bytes: what cudaMalloc promises, and what the widest loads and TMA descriptors want."""

MIN_BLOCKS = 2
"""The scratch block and one that a request can have."""

_DRIVER_PAGE = 2 << 20  # the driver maps device memory in pages of this; rounding ourselves makes the accounts exact
_RESERVE_SHARE = 0.03
_RESERVE_BYTES = 256 << 20


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """Round up to a multiple."""
    return -(-nbytes // to) * to


def block_bytes(spec: ModelSpec, kv_format: str = "bf16") -> int:
    """Return the bytes of one cache block over all layers: keys and values, and the scales of a quantized cache."""
    if kv_format == "bf16":
        return BLOCK_SIZE * spec.kv_bytes_per_token("bfloat16")
    return BLOCK_SIZE * (spec.kv_bytes_per_token(KV_DTYPES[kv_format]) + spec.kv_scale_bytes_per_token)


def reserve_bytes(total: int) -> int:
    """Return what stays unused of a device with `total` bytes: captured graphs, late kernels, other processes."""
    return int(_RESERVE_SHARE * total) + _RESERVE_BYTES


def count_blocks(
    spec: ModelSpec,
    budget: int,
    most: int | None = None,
    *,
    name: str = "the memory left for it",
    kv_format: str = "bf16",
) -> int:
    """Return how many cache blocks fit into `budget` bytes, block 0 included.

    Args:
        spec: The model's hyperparameters.
        budget: Bytes for keys and values of all layers, scales included.
        most: More are of no use; None: no limit.
        name: What the budget is, for the error.
        kv_format: Of the cache.

    Raises:
        CapacityError: Not even `MIN_BLOCKS` fit.
    """
    one = block_bytes(spec, kv_format)
    # Every layer's pools start aligned; with one allocation for all of them that costs nothing: blocks are multiples.
    blocks = max(budget, 0) // one
    if blocks < MIN_BLOCKS:
        raise CapacityError(
            f"KV cache: {name} is {max(budget, 0) / 1e6:.1f} MB",
            f"at least {MIN_BLOCKS * one / 1e6:.1f} MB, {MIN_BLOCKS} blocks of {BLOCK_SIZE} tokens",
            "give it more memory, or take a smaller model",
        )
    return blocks if most is None else min(blocks, max(most, MIN_BLOCKS))


def require_memory(free: int, parts: Mapping[str, int]) -> None:
    """Refuse a model that will not fit before anything is loaded.

    Args:
        free: Bytes free on the device.
        parts: What is needed (`weights`, …) → bytes.

    Raises:
        CapacityError: The parts take more than is free; every number is in the message.
    """
    if sum(parts.values()) > free:
        needs = [f"{nbytes / 1e9:.1f} GB of {name}" for name, nbytes in parts.items() if nbytes]
        text = f"{', '.join(needs[:-1])} and {needs[-1]}" if len(needs) > 1 else needs[0]
        raise CapacityError(
            f"the model needs {text}; {free / 1e9:.1f} GB free",
            fix="free GPU memory, ask for less (kv_memory, chunk_tokens), or take a smaller model",
        )


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of device memory by use.

    Attributes:
        weights: The model's parameters.
        kv_cache: Keys and values of all layers, and the scales of a quantized cache.
        workspace: Scratch that the kernels share.
        buffers: Logits, token ids, block tables, sampling state.
        runtime: ONNX Runtime's arena, loaded kernels, captured graphs: what the driver lost while they came.
        driver_used: What the driver lost since the session began, the CUDA context itself not included.
    """

    weights: int
    kv_cache: int
    workspace: int
    buffers: int
    runtime: int
    driver_used: int

    @property
    def total(self) -> int:
        """The sum of all that is accounted for."""
        return self.weights + self.kv_cache + self.workspace + self.buffers + self.runtime

    @property
    def unaccounted_share(self) -> float:
        """|total - driver_used| / driver_used."""
        return abs(self.total - self.driver_used) / max(1, self.driver_used)

    def __str__(self) -> str:
        parts = ("weights", "kv_cache", "workspace", "buffers", "runtime", "total", "driver_used")
        return ", ".join(f"{name} {getattr(self, name) / 1e9:.2f} GB" for name in parts)


@dataclass(frozen=True)
class Pinned:
    """Pinned host memory.

    Attributes:
        host: Its address here.
        device: The device's address of it.
        nbytes: Its size.
    """

    host: int
    device: int
    nbytes: int

    def array(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """View a part as an array; valid until the memory goes back."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset + nbytes > self.nbytes:
            raise QwenRtError(f"{nbytes} bytes at {offset} of a pinned buffer", f"at most {self.nbytes}")
        raw = (ctypes.c_char * nbytes).from_address(self.host + offset)
        return np.frombuffer(raw, dtype).reshape(shape)


class Resources:
    """Everything CUDA that an owner has taken, given back in reverse order by `close`.

    Args:
        cuda: The runtime.
    """

    def __init__(self, cuda: Cudart) -> None:
        self._cuda = cuda
        self._taken: list[tuple[Callable[[int], None], int]] = []

    def device(self, nbytes: int) -> tuple[int, int]:
        """Allocate device memory, rounded up to the driver's page.

        Returns:
            Its address and its true size.
        """
        size = align(max(1, nbytes), _DRIVER_PAGE)
        return self._take(self._cuda.malloc(size), self._cuda.free), size

    def pinned(self, nbytes: int, *, zeroed: bool = True) -> Pinned:
        """Allocate pinned host memory."""
        size = max(1, nbytes)
        host = self._take(self._cuda.host_alloc(size), self._cuda.host_free)
        if zeroed:
            ctypes.memset(host, 0, size)
        return Pinned(host, self._cuda.host_device_pointer(host), size)

    def stream(self) -> int:
        """Create a stream."""
        return self._take(self._cuda.stream_create(), self._cuda.stream_destroy)

    def event(self, *, timing: bool = False) -> int:
        """Create an event."""
        return self._take(self._cuda.event_create(timing=timing), self._cuda.event_destroy)

    def graph_exec(self, graph: int) -> int:
        """Make a captured graph launchable; the graph itself goes in any case."""
        try:
            return self._take(self._cuda.graph_instantiate(graph), self._cuda.graph_exec_destroy)
        finally:
            self._cuda.graph_destroy(graph)

    def release(self, handle: int) -> None:
        """Give one thing back early."""
        for index in reversed(range(len(self._taken))):
            give_back, taken = self._taken[index]
            if taken == handle:
                del self._taken[index]
                give_back(taken)
                return

    def close(self) -> None:
        """Give everything back; what cannot be given back (after a fault of the device) does not stop the rest."""
        while self._taken:
            give_back, handle = self._taken.pop()
            with contextlib.suppress(QwenRtError):
                give_back(handle)

    def _take(self, handle: int, give_back: Callable[[int], None]) -> int:
        self._taken.append((give_back, handle))
        return handle


class Layout:
    """Arrays behind each other in one block of memory, each aligned to `ALIGNMENT`.

    Args:
        fields: Name → (dtype, shape).
    """

    def __init__(self, fields: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, (dtype, shape) in self.fields.items():
            self.offsets[name] = self.nbytes
            self.nbytes += align(int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def views(self, pinned: Pinned) -> dict[str, NDArray[Any]]:
        """View every array in pinned memory."""
        return {name: pinned.array(*self.fields[name], self.offsets[name]) for name in self.fields}

    def addresses(self, base: int) -> dict[str, int]:
        """Return every array's address where the block starts at `base`."""
        return {name: base + offset for name, offset in self.offsets.items()}


@contextlib.contextmanager
def measured(cuda: Cudart, add: Callable[[int], None]) -> Iterator[None]:
    """Tell `add` how many bytes the driver lost in the block."""
    before, _ = cuda.memory_info()
    yield
    add(before - cuda.memory_info()[0])
