"""A model in the memory of one GPU: what is allocated, in which order, and what of it is accounted for how.

    check that it fits, with smaller chunks of prompts if it must → weights → workspace, buffers → ONNX Runtime
    → warm-up → KV cache of what is left

The warm-up is the largest prefill and the largest decode step, over a cache of one scratch block. After it ONNX Runtime
holds all that it will ever want, so the rest can go to the KV cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import QwenRtError, UnsupportedModelError
from qwen_rt.ops import BLOCK_SIZE, COUNTER_BYTES, MAX_ROWS
from qwen_rt.plugins.library import PluginLibrary, load
from qwen_rt.runtime.cuda.counts import CountSlots
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.graph import GraphRunner, OrtRunner, bind_cache, bind_model, cache_format, split_weights
from qwen_rt.runtime.cuda.memory import (
    MIN_BLOCKS,
    Layout,
    MemoryReport,
    Resources,
    align,
    block_bytes,
    count_blocks,
    measured,
    require_memory,
    reserve_bytes,
)
from qwen_rt.runtime.cuda.sampling import EDIT_SIZES, RowBuffers, SamplePlan, row_layout, sample_workspace
from qwen_rt.runtime.cuda.steps import ModelCalls, StepGraphs, graph_workspace
from qwen_rt.runtime.cuda.weights import LoadStats, WeightSource, plan_weights
from qwen_rt.spec import ModelSpec

__all__ = ["DeviceModel", "Platform", "Settings"]

_LOGIT_BYTES = 4
_WARM_UP = SamplePlan(full=True, num_edits=EDIT_SIZES[1], logprobs=True)  # loads every kernel of `sample`
_BF16_BYTES = 2
_RUNTIME_BYTES = 300 << 20  # kernels and the libraries' own, as long as nothing is measured
_MIN_CHUNK = 512  # tokens; smaller ones would save little and read all weights for few rows


@dataclass(frozen=True)
class Platform:
    """What a session stands on; tests stand it on something else.

    Attributes:
        cuda: The CUDA runtime.
        load_library: SM → the plugin library for it.
        open_graph: Graph, path of the plugin library, device, stream → the loaded graph.
    """

    cuda: Cudart
    load_library: Callable[[int], PluginLibrary]
    open_graph: Callable[[bytes, Path, int, int], GraphRunner]

    @classmethod
    def real(cls) -> Platform:
        """Return that of this machine.

        Raises:
            MissingDependencyError: There is no CUDA runtime.
        """
        return cls(Cudart(), lambda sm: load(sm=sm), OrtRunner)


@dataclass(frozen=True)
class Settings:
    """How much of a GPU a model may take; the arguments of `CudaSession`."""

    device: int = 0
    kv_memory: int | None = None
    max_rows: int = MAX_ROWS
    chunk_tokens: int = 8192
    num_tokens: int | None = None
    capture: str = "lazy"
    quiet: bool = False


@dataclass(frozen=True)
class _Sizes:
    """What a session with chunks of `chunk_tokens` tokens takes beside weights and cache: layouts, and bytes."""

    chunk_tokens: int
    decode: Layout
    prefill: Layout
    graph_bytes: int
    sample_bytes: int
    buffer_bytes: int


class DeviceModel:
    """A loaded model and its memory.

    Args:
        graph: A serialised ModelProto of target `cuda`.
        spec: The model's hyperparameters.
        max_length: Positions that it can reach.
        weights: Where the weights come from.
        settings: Checked; `chunk_tokens` at most `max_length`.
        platform: What to stand on.

    Attributes:
        spec: As given.
        settings: As given, but with the `chunk_tokens` that fit.
        kv_format: Of the KV cache, a key of `qwen_rt.ops.KV_CACHE_FORMATS`.
        num_tokens: Tokens of the tokenizer.
        max_blocks: Width of a block table.
        num_blocks: Blocks of the cache, scratch included.
        cuda, stream: The runtime, and where all work goes.
        resources: Owner of all memory, events and graphs.
        decode, prefill: The rows of the two kinds of calls.
        counts: Slots of rows with penalties.
        calls, graphs: The graph, and the captured steps.
        load_stats: How loading the weights went.

    Raises:
        As `CudaSession`; nothing stays allocated.
    """

    def __init__(
        self,
        graph: bytes,
        spec: ModelSpec,
        max_length: int,
        weights: WeightSource,
        settings: Settings,
        platform: Platform,
    ) -> None:
        self.spec, self.settings = spec, settings
        self.num_tokens = min(settings.num_tokens or spec.vocab_size, spec.vocab_size)
        self.max_blocks = -(-max_length // BLOCK_SIZE)
        self.cuda = platform.cuda
        self.resources = Resources(self.cuda)
        self._runner: GraphRunner | None = None
        self._bytes = dict.fromkeys(("weights", "kv_cache", "workspace", "buffers", "runtime"), 0)
        try:
            self._load(graph, weights, platform)
        except BaseException:
            self.close()
            raise

    def _load(self, graph: bytes, source: WeightSource, platform: Platform) -> None:
        cuda, spec, settings = self.cuda, self.spec, self.settings
        sm = cuda.open_device(settings.device)
        self._library = library = platform.load_library(sm)
        if sm not in library.sms:
            have = ", ".join(f"{have // 10}.{have % 10}" for have in library.sms)
            raise UnsupportedModelError(
                f"the plugin library has code for SM {have}, this GPU is SM {sm // 10}.{sm % 10}",
                "code for this GPU",
                f"run `python -m qwen_rt.plugins.build --sm {sm}`",
            )
        self._free_at_start, total = cuda.memory_info()
        changed, external = split_weights(graph, spec.num_layers)
        self.kv_format = cache_format(graph, spec.num_layers)
        plan = plan_weights(external)
        groups = {weight.shape[1] for weight in external if weight.name.endswith("_scale")}
        sizes = self._find_sizes(plan.nbytes, groups, total)
        self.settings = settings = replace(settings, chunk_tokens=sizes.chunk_tokens)
        decode, prefill, graph_bytes = sizes.decode, sizes.prefill, sizes.graph_bytes

        self.stream = stream = self.resources.stream()
        weights = self._take("weights", plan.nbytes)
        with measured(cuda, self._add_runtime):
            self.load_stats: LoadStats = source.fill(plan, weights, cuda, settings.device, quiet=settings.quiet)
        workspace = self._take("workspace", graph_bytes + sizes.sample_bytes)
        self._sample_workspace = workspace + graph_bytes, sizes.sample_bytes
        for start in (workspace, workspace + graph_bytes):
            cuda.fill(start, 0, COUNTER_BYTES, stream)
        base = self._take("buffers", sizes.buffer_bytes)
        self.decode = RowBuffers(cuda, self.resources, decode, base, stream, advances=True)
        self.prefill = RowBuffers(cuda, self.resources, prefill, base + decode.nbytes, stream, advances=False)
        self._logits = base + decode.nbytes + prefill.nbytes
        self.counts = CountSlots(
            cuda, self._take_buffer, self.resources, stream, settings.max_rows + 1, spec.vocab_size
        )
        with measured(cuda, self._add_runtime):
            self._runner = runner = platform.open_graph(changed, library.path, settings.device, stream)
        bind_model(runner, plan.tensors, weights, (workspace, graph_bytes))
        self.calls = ModelCalls(runner, self._logits, spec.vocab_size)
        self.graphs = StepGraphs(cuda, self.resources, stream, self.enqueue_step, self._add_runtime)
        self._warm_up(runner)
        self._make_cache(runner, total)

    def _sizes(self, chunk: int, groups: set[int]) -> _Sizes:
        spec, rows = self.spec, self.settings.max_rows
        decode, prefill = row_layout(rows, rows, self.max_blocks), row_layout(1, chunk, self.max_blocks)
        logits_bytes = align(rows * spec.vocab_size * _LOGIT_BYTES)
        graph = graph_workspace(self._library, spec, rows, chunk, self.max_blocks, groups, self.kv_format)
        sample = sample_workspace(self._library, rows, spec.vocab_size, rows + 1)
        return _Sizes(chunk, decode, prefill, graph, sample, decode.nbytes + prefill.nbytes + logits_bytes)

    def _find_sizes(self, weight_bytes: int, groups: set[int], total: int) -> _Sizes:
        """Find the largest chunk, halved as often as need be, that leaves room for the cache.

        The cache is the one asked for; else a request of the full length should fit, and if none does, the smallest
        chunk leaves it the most.

        Raises:
            CapacityError: The model does not fit, with all numbers, before anything is loaded.
        """
        spec, kv_memory = self.spec, self.settings.kv_memory
        one = block_bytes(spec, self.kv_format)
        least, wanted = MIN_BLOCKS * one, (self.max_blocks + 1) * one + reserve_bytes(total)
        if kv_memory is not None:
            count_blocks(spec, kv_memory, name=f"kv_memory={kv_memory}", kv_format=self.kv_format)
            least = wanted = kv_memory
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        # The largest prefill at once, besides weights: the residual twice, qkv, attention, the MLP's activation.
        widths = 2 * spec.hidden_size + 2 * q_width + 2 * kv_width + spec.intermediate_size
        chunk = self.settings.chunk_tokens
        while True:
            sizes = self._sizes(chunk, groups)
            parts = {
                "weights": weight_bytes,
                "workspace": sizes.graph_bytes + sizes.sample_bytes + sizes.buffer_bytes,
                "KV cache": least,
                "ONNX Runtime": _RUNTIME_BYTES + chunk * widths * _BF16_BYTES,
            }
            if chunk // 2 < _MIN_CHUNK or sum(parts.values()) - least + wanted <= self._free_at_start:
                require_memory(self._free_at_start, parts)
                return sizes
            chunk //= 2

    def _take(self, use: str, nbytes: int) -> int:
        """Allocate device memory and account for it."""
        address, size = self.resources.device(nbytes)
        self._bytes[use] += size
        return address

    def _take_buffer(self, nbytes: int) -> int:
        return self._take("buffers", nbytes)

    def _add_runtime(self, nbytes: int) -> None:
        self._bytes["runtime"] += nbytes

    def _warm_up(self, runner: GraphRunner) -> None:
        cuda, stream, chunk = self.cuda, self.stream, self.settings.chunk_tokens
        nbytes = block_bytes(self.spec, self.kv_format)
        address, _ = self.resources.device(nbytes)
        try:
            cuda.fill(address, 0, nbytes, stream)
            self._bind_cache(runner, address, 1)
            with measured(cuda, self._add_runtime):
                host = self.prefill.host
                host["positions"][:] = np.arange(chunk)
                host["query_starts"][1], host["logits_indices"][0] = chunk, chunk - 1
                self.prefill.upload(SamplePlan())
                self.calls.enqueue(self.prefill, chunk, 1, self.max_blocks)
                self.decode.write_rows((), (), _WARM_UP, self.num_tokens, self.max_blocks)
                self.decode.upload(_WARM_UP)
                self.enqueue_step(self.settings.max_rows, self.max_blocks, SamplePlan())
                self.sample(self.decode, self.settings.max_rows, _WARM_UP)
                cuda.stream_synchronize(stream)
        finally:
            self.resources.release(address)

    def _make_cache(self, runner: GraphRunner, total: int) -> None:
        most, budget = None, self.settings.kv_memory
        name = f"kv_memory={budget}"
        if budget is None:
            most = self.settings.max_rows * self.max_blocks + 1  # more could not be filled
            budget = self.cuda.memory_info()[0] - reserve_bytes(total)
            name = "the memory left for it"
        self.num_blocks = count_blocks(self.spec, budget, most, name=name, kv_format=self.kv_format)
        nbytes = self.num_blocks * block_bytes(self.spec, self.kv_format)
        address = self._take("kv_cache", nbytes)
        self.cuda.fill(address, 0, nbytes, self.stream)
        self._bind_cache(runner, address, self.num_blocks)
        self.cuda.stream_synchronize(self.stream)

    def _bind_cache(self, runner: GraphRunner, address: int, num_blocks: int) -> None:
        spec = self.spec
        shape = (num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        bind_cache(runner, self.kv_format, shape, spec.num_layers, address)

    # ---------------------------------------------------------------- steps

    def sample(self, buffers: RowBuffers, num_rows: int, plan: SamplePlan) -> None:
        """Enqueue the `sample` op over the logits of the call before."""
        buffers.launch_sample(
            self._library,
            plan,
            num_rows,
            logits=self._logits,
            counts=self.counts.device,
            dims=(self.spec.vocab_size, self.num_tokens),
            workspace=self._sample_workspace,
        )

    def enqueue_step(self, bucket: int, width: int, plan: SamplePlan) -> None:
        """Enqueue a decode step over the first `bucket` rows on the device, uncaptured."""
        self.calls.enqueue(self.decode, bucket, bucket, width)
        self.sample(self.decode, bucket, plan)

    def find_step(self, bucket: int, width: int, plan: SamplePlan) -> int:
        """Return the launchable step of a bucket and a width of block tables under a plan.

        Captures it first where that has not been done, which makes all rows idle.
        """
        executable = self.graphs.find(bucket, width, plan)
        if executable is None:
            self.decode.wait_upload()
            self.decode.write_rows((), (), plan, self.num_tokens, width)
            self.decode.upload(plan)
            executable = self.graphs.capture(bucket, width, plan)
        return executable

    def read_logits(self, num_rows: int) -> NDArray[np.float32]:
        """Wait for the device and copy the first rows of the logits: float32[num_rows, V]."""
        shape = num_rows, self.spec.vocab_size
        resources = Resources(self.cuda)
        try:
            staging = resources.pinned(num_rows * self.spec.vocab_size * _LOGIT_BYTES, zeroed=False)
            self.cuda.copy(staging.host, self._logits, staging.nbytes, self.stream)
            self.cuda.stream_synchronize(self.stream)
            logits: NDArray[np.float32] = staging.array(np.float32, shape).copy()
            return logits
        finally:
            resources.close()

    # ---------------------------------------------------------------- memory

    def memory_report(self) -> MemoryReport:
        """Return who holds how much of the device."""
        return MemoryReport(**self._bytes, driver_used=self._free_at_start - self.cuda.memory_info()[0])

    def close(self) -> None:
        """Give everything back: what runs, captured graphs, ONNX Runtime, then memory. Closing twice does nothing."""
        if self._runner is not None:
            with contextlib.suppress(QwenRtError):  # after a fault of the device there is nothing to wait for
                self.cuda.stream_synchronize(self.stream)
            if hasattr(self, "graphs"):
                self.graphs.close()
            self._runner.close()
            self._runner = None
        self.resources.close()
