"""Where every weight lies on the device, and the loaders that put it there.

All weights share one allocation, each `ALIGNMENT`-aligned. The q, k and v matrices of a layer lie behind each other
without a gap where their sizes allow, and so do the q, k and v biases, and gate and up, and the scales and zero points
of each: a prefill multiplies by such a group in one go.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import BundleError, GraphError, MissingDependencyError, QwenRtError
from qwen_rt.progress import Progress, progress
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Pinned, Resources, align

__all__ = [
    "BF16",
    "FLOAT",
    "FLOAT8",
    "FLOAT16",
    "INT8",
    "INT32",
    "ITEM_BYTES",
    "UINT8",
    "ExternalWeight",
    "FileWeights",
    "LoadStats",
    "RandomWeights",
    "WeightPlan",
    "WeightSource",
    "WeightTensor",
    "plan_weights",
    "to_bf16",
]

FLOAT, UINT8, INT8, INT32, FLOAT16, BF16, FLOAT8 = 1, 2, 3, 6, 10, 16, 17  # onnx.TensorProto.DataType

ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, FLOAT16: 2, BF16: 2, FLOAT8: 1}
"""Element type of a weight → bytes of an element."""

_GROUPS = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "gate": ("gate_up", 0), "up": ("gate_up", 1)}
_MEMBER = re.compile(r"\.(q|k|v|gate|up)_proj\.")
_SPREADS = {FLOAT8: 120.0, INT8: 36.0, UINT8: 4.6}
"""Element type of a quantized matrix → deviation of its random numbers; those of int4 are uniform from 0 to 15."""
_STD = 0.02
_LATER = re.compile(r"\.layers\.0*[1-9]\d*\..*\.(o|down)_proj\.weight$")
_LATER_SHARE = 1 / 8


@dataclass(frozen=True)
class ExternalWeight:
    """An initializer of the graph whose data lies in a file.

    Attributes:
        name: As Hugging Face calls it.
        shape: Its shape.
        location: The file's name in the graph.
        offset: First byte in the file.
        nbytes: Its size.
        element_type: As ONNX numbers it, a key of `ITEM_BYTES`.
    """

    name: str
    shape: tuple[int, ...]
    location: str
    offset: int
    nbytes: int
    element_type: int = BF16


@dataclass(frozen=True)
class WeightTensor:
    """A weight and its place on the device: `address_offset` bytes from the start of all weights."""

    source: ExternalWeight
    address_offset: int

    @property
    def stop(self) -> int:
        """First byte behind it."""
        return self.address_offset + self.source.nbytes


@dataclass(frozen=True)
class WeightPlan:
    """All weights in the order of their addresses, and the bytes that they take with alignment."""

    tensors: tuple[WeightTensor, ...]
    nbytes: int


@dataclass(frozen=True)
class LoadStats:
    """How a load went: bytes that were moved, and seconds."""

    nbytes: int
    seconds: float

    @property
    def gb_s(self) -> float:
        """10^9 bytes a second."""
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0


def plan_weights(weights: Sequence[ExternalWeight]) -> WeightPlan:
    """Give every weight its place: the order of the graph, but what is multiplied together lies together.

    Raises:
        GraphError: A size that does not follow from the shape, or a name twice.
    """
    first_of_group: dict[str, int] = {}
    keyed = []
    for index, weight in enumerate(weights):
        expected = ITEM_BYTES[weight.element_type] * math.prod(weight.shape)
        if weight.nbytes != expected:
            raise GraphError(
                f"{weight.name} has {weight.nbytes} bytes", f"{expected}, those of {list(weight.shape)}", "build again"
            )
        group, rank = weight.name, 0
        if member := _MEMBER.search(weight.name):
            stem, rank = _GROUPS[member[1]]
            group = f"{weight.name[: member.start()]}.{stem}.{weight.name[member.end() :]}"
        keyed.append((first_of_group.setdefault(group, index), rank, weight))
    if len({weight.name for weight in weights}) != len(weights):
        raise GraphError("the graph names a weight twice", "each once", "build again")
    tensors, offset = [], 0
    for _, _, weight in sorted(keyed, key=lambda item: item[:2]):
        tensors.append(WeightTensor(weight, offset))
        offset += align(weight.nbytes)
    return WeightPlan(tuple(tensors), offset)


class WeightSource(Protocol):
    """Fills the weights' memory."""

    def fill(self, plan: WeightPlan, base: int, cuda: Cudart, device: int, *, quiet: bool) -> LoadStats:
        """Write every tensor of the plan to `base + address_offset`; returns when the device has all.

        Args:
            plan: What goes where.
            base: Device address of the weights' memory, of `plan.nbytes` bytes at least.
            cuda: The runtime.
            device: The GPU's number, for threads that are started.
            quiet: No progress on stderr.
        """
        ...


class FileWeights:
    """Weights from safetensors shards, by way of pinned memory.

    The device's memory is cut into blocks of `block_bytes`. A thread takes a block, reads all pieces of tensors that
    lie in it into its own pinned buffer, enqueues one copy, and takes the next once that copy is done; threads overlap.

    Args:
        files: File name in the graph → real path.
        block_bytes: Size of a pinned buffer.
        num_threads: Most buffers, each with its thread.
    """

    def __init__(self, files: Mapping[str, Path], *, block_bytes: int = 32 << 20, num_threads: int = 8) -> None:
        self._files, self._block_bytes, self._num_threads = dict(files), block_bytes, num_threads

    def fill(self, plan: WeightPlan, base: int, cuda: Cudart, device: int, *, quiet: bool) -> LoadStats:
        """Read the shards; see `WeightSource.fill`.

        Raises:
            BundleError: A file that is missing, cannot be read or is too short.
            OutOfMemoryError: No pinned memory.
        """
        started = time.perf_counter()
        total = sum(tensor.source.nbytes for tensor in plan.tensors)
        descriptors: dict[str, int] = {}
        resources = Resources(cuda)
        try:
            for location in dict.fromkeys(tensor.source.location for tensor in plan.tensors):
                descriptors[location] = self._open(location)
            stream = resources.stream()
            with progress(total, "loading weights", "B", quiet=quiet) as bar:
                load = _Load(plan, base, cuda, device, stream, descriptors, self._block_bytes, bar)
                load.run(resources, self._num_threads)
            cuda.stream_synchronize(stream)
        finally:
            resources.close()
            for descriptor in descriptors.values():
                os.close(descriptor)
        return LoadStats(total, time.perf_counter() - started)

    def _open(self, location: str) -> int:
        path = self._files.get(location)
        if path is None:
            raise BundleError(f"the graph refers to {location}", "a file of the bundle", "build the bundle again")
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}", fix="put it back, or build again") from None


@dataclass
class _Load:
    """One run of `FileWeights.fill`."""

    plan: WeightPlan
    base: int
    cuda: Cudart
    device: int
    stream: int
    descriptors: Mapping[str, int]
    block_bytes: int
    bar: Progress

    def run(self, resources: Resources, num_threads: int) -> None:
        blocks: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        stop = threading.Event()
        size = min(self.block_bytes, align(self.plan.nbytes))
        starts = range(0, self.plan.nbytes, size)
        first = 0
        for start in starts:  # the tensors of a block are neighbours: note where to begin
            while self.plan.tensors[first].stop <= start:
                first += 1
            blocks.put((start, first))
        workers: list[Future[None]] = []
        told = threading.Lock()
        num_threads = min(num_threads, len(starts))
        with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="weights") as pool:
            try:
                for _ in range(num_threads):
                    buffer, event = resources.pinned(size, zeroed=False), resources.event()
                    workers.append(pool.submit(self._work, blocks, stop, buffer, event, told))
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # also after an interrupt: the pool waits for its threads before the buffers go
        for worker in workers:
            worker.result()

    def _work(
        self,
        blocks: queue.SimpleQueue[tuple[int, int]],
        stop: threading.Event,
        buffer: Pinned,
        event: int,
        told: threading.Lock,
    ) -> None:
        self.cuda.set_device(self.device)
        memory = buffer.array(np.uint8, (buffer.nbytes,)).data
        try:
            while not stop.is_set():
                try:
                    start, first = blocks.get_nowait()
                except queue.Empty:
                    break
                self.cuda.event_synchronize(event)
                size = min(buffer.nbytes, self.plan.nbytes - start)
                read = self._read_block(memory[:size], start, first)
                self.cuda.copy(self.base + start, buffer.host, size, self.stream)
                self.cuda.event_record(event, self.stream)
                with told:
                    self.bar.update(read)
        finally:
            self.cuda.event_synchronize(event)

    def _read_block(self, memory: memoryview, start: int, first: int) -> int:
        """Fill a buffer with every tensor's part of the device bytes from `start` on; return the bytes read."""
        done = 0
        for tensor in self.plan.tensors[first:]:
            begin, end = max(tensor.address_offset, start), min(tensor.stop, start + len(memory))
            if tensor.address_offset >= start + len(memory):
                break
            if end > begin:
                source = tensor.source
                _read(
                    self.descriptors[source.location],
                    memory[begin - start : end - start],
                    source.offset + begin - tensor.address_offset,
                    source,
                )
                done += end - begin
        return done


def _read(descriptor: int, memory: memoryview, offset: int, source: ExternalWeight) -> None:
    while memory:
        try:
            count = os.preadv(descriptor, [memory], offset)
        except OSError as error:
            raise BundleError(f"{source.location} cannot be read: {error.strerror}", fix="check the disk") from None
        if count == 0:
            raise BundleError(
                f"{source.location} ends at byte {offset}, within {source.name}",
                f"{source.offset + source.nbytes} bytes or more",
                "copy the file again, or build the bundle again",
            )
        memory, offset = memory[count:], offset + count


# ---------------------------------------------------------------- random weights


class RandomWeights:
    """Weights for benchmarks that need no checkpoint, made on the device.

    Activations stay finite and of ordinary size: matrices stand for numbers of std 0.02, quantized or not; norms are
    1 ± 0.1, biases ± 0.02, offsets of keys and values 0, column orders those of the model. What o_proj and down_proj
    of all layers but the first add is an eighth of that, so that a layer changes what it finds by some 10 %, as
    trained ones do. Were all alike, each would multiply the errors of those before it: behind 28 layers, activations
    that are rounded to fp8 would choose other tokens.

    Args:
        library: Path of the plugin library, whose generator is used.
        seed: The same seed gives the same weights.
    """

    def __init__(self, library: Path, seed: int = 0) -> None:
        self._seed = seed
        try:
            self._fill = ctypes.CDLL(str(library)).qwen_rt_fill_random
        except (OSError, AttributeError) as error:
            raise MissingDependencyError(
                f"{library.name} has no random weights: {error}", "", "run `python -m qwen_rt.plugins.build`"
            ) from None
        self._fill.restype = ctypes.c_int32
        self._fill.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_float,
            ctypes.c_uint64,
            ctypes.c_void_p,
        )

    def fill(self, plan: WeightPlan, base: int, cuda: Cudart, device: int, *, quiet: bool) -> LoadStats:
        """Make the weights; see `WeightSource.fill`."""
        started = time.perf_counter()
        types = {tensor.source.name: tensor.source.element_type for tensor in plan.tensors}
        vectors = [tensor for tensor in plan.tensors if len(tensor.source.shape) == 1]
        resources = Resources(cuda)
        try:
            stream = resources.stream()
            staging = resources.pinned(sum(align(tensor.source.nbytes) for tensor in vectors))
            at = 0
            for index, tensor in enumerate(plan.tensors):
                source, target = tensor.source, base + tensor.address_offset
                if len(source.shape) == 1:
                    staging.array(np.uint8, (source.nbytes,), at)[:] = self._vector(source, index).view(np.uint8)
                    cuda.copy(target, staging.host + at, source.nbytes, stream)
                    at += align(source.nbytes)
                elif source.name.endswith(("_zero_point", "kv_offset")):
                    cuda.fill(target, 0x88 if source.element_type == UINT8 else 0, source.nbytes, stream)
                else:
                    size, seed = _size(source, types), (self._seed << 32) + index
                    count = math.prod(source.shape)
                    if status := self._fill(target, count, source.element_type, size, seed, stream):
                        raise QwenRtError(f"qwen_rt_fill_random of {source.name}: status {status}")
            cuda.stream_synchronize(stream)
        finally:
            resources.close()
        return LoadStats(sum(tensor.source.nbytes for tensor in plan.tensors), time.perf_counter() - started)

    def _vector(self, source: ExternalWeight, index: int) -> NDArray[Any]:
        """A norm's weights, a bias or a column order."""
        (count,) = source.shape
        if source.element_type == INT32:
            return np.arange(count, dtype=np.int32)
        numbers = np.random.default_rng([self._seed, index]).standard_normal(count, np.float32)
        values = _STD * numbers if source.name.endswith("bias") else 1 + 0.1 * numbers
        return to_bf16(values.astype(np.float32))


def _size(source: ExternalWeight, types: Mapping[str, int]) -> float:
    """Deviation of a random matrix's stored numbers, or what the scales of one are around."""
    matrix = source.name.removesuffix("_scale")
    std = _STD * (_LATER_SHARE if _LATER.search(matrix) else 1.0)
    if matrix != source.name:
        return std / _SPREADS[types.get(matrix, UINT8)]
    return _SPREADS.get(source.element_type, std)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite numbers to bf16, to nearest even, as their 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
