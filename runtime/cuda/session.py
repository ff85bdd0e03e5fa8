"""A model on one NVIDIA GPU: our kernels in ONNX Runtime's graph, captured; the runtime's `PagedExecutor`.

weights            one allocation, filled by a `WeightSource`, bound to the graph as inputs
prefill            runs the graph uncaptured over a chunk of one request; the last chunk also samples
decode             one captured CUDA graph (model, then `sample`) a step; ids, positions and counts stay on the device
tokens             come through pinned memory that the device writes; the host waits for an event only
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qwen_rt.bundle import MANIFEST_FILE, Bundle
from qwen_rt.errors import BundleError, CapacityError, QwenRtError, UsageError
from qwen_rt.ops import BLOCK_SIZE, MAX_ROWS
from qwen_rt.runtime.cuda import bench
from qwen_rt.runtime.cuda.memory import MemoryReport
from qwen_rt.runtime.cuda.model import DeviceModel, Platform, Settings
from qwen_rt.runtime.cuda.sampling import RING, SamplePlan, edits_of, plan_of
from qwen_rt.runtime.cuda.steps import bucket_of, buckets_up_to, width_of, widths_up_to
from qwen_rt.runtime.cuda.weights import FileWeights, WeightSource
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import SampleResult
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.spec import ModelSpec

__all__ = ["CudaSession"]

_UNDER_WAY = 2  # steps
_MOST_CHUNK = 1 << 20


class CudaSession:
    """A loaded bundle of target `cuda`; see `qwen_rt.runtime.executor.PagedExecutor`.

    Args:
        bundle: An opened bundle of target `cuda`.
        device: The GPU's number.
        kv_memory: Bytes for the KV cache, scales included; None: what is free after all else, less a reserve, but no
            more than `max_rows` requests of the full length can fill.
        max_rows: Most requests that decode at once, 1 to 64.
        chunk_tokens: Most tokens of a prefill call; fewer where memory is short.
        weights: Where the weights come from; None: the bundle's files.
        num_tokens: Tokens of the tokenizer, larger ids are never chosen; None: the whole vocabulary.
        capture: `lazy` captures a decode step when it is first needed, `all` captures the usual ones now.
        quiet: No progress on stderr.
        platform: None for this machine's.

    Attributes:
        chunk_tokens: Most tokens of a prefill call, as they fit.
        load_stats: How loading the weights went.
        kv_format: Of the KV cache, a key of `qwen_rt.ops.KV_CACHE_FORMATS`.
        graph: The captured step of the present rows; 0 without rows.
        host_seconds: Time that the host has spent in launching steps and reading tokens, waiting not included.
        steps: Steps launched.

    Raises:
        BundleError: The bundle is of another target, or a file of it is missing or cut off.
        MissingDependencyError: No driver, no GPU, no CUDA runtime, no onnxruntime-gpu, no plugin library.
        UnsupportedModelError: The GPU is too old, or the library has no code for it.
        CapacityError: The model does not fit, with all numbers, before anything is loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: int = 0,
        kv_memory: int | None = None,
        max_rows: int = MAX_ROWS,
        chunk_tokens: int = 8192,
        weights: WeightSource | None = None,
        num_tokens: int | None = None,
        capture: str = "lazy",
        quiet: bool = False,
        platform: Platform | None = None,
    ) -> None:
        manifest = bundle.manifest
        if manifest.target != "cuda":
            raise BundleError(
                f"{bundle.path} has target {manifest.target}",
                "a bundle of target cuda",
                f"build one: qwen-rt build {manifest.checkpoint.path} --target cuda -o BUNDLE",
            )
        source = FileWeights(bundle.weight_files) if weights is None else weights
        settings = Settings(device, kv_memory, max_rows, chunk_tokens, num_tokens, capture, quiet)
        graph = bundle.graph_file.read_bytes()
        self._start(graph, manifest.model, manifest.max_length, source, settings, platform)
        stored = None if manifest.quantization is None else manifest.quantization.kv_format
        if self.kv_format != (stored or "bf16"):
            self.close()
            raise BundleError(
                f"{bundle.graph_file} has a KV cache of {self.kv_format}",
                f"{stored or 'bf16'}, as {bundle.path}/{MANIFEST_FILE} says",
                "build the bundle again",
            )

    @classmethod
    def from_graph(
        cls,
        graph: bytes,
        spec: ModelSpec,
        max_length: int,
        *,
        weights: WeightSource | None = None,
        base_dir: Path | None = None,
        platform: Platform | None = None,
        **settings: Any,
    ) -> Self:
        """Load a lowered graph without a bundle.

        Args:
            graph: A serialised ModelProto of target `cuda`.
            spec: Its model.
            max_length: Positions that it can reach.
            weights: Where the weights come from; None: the files that the graph names, in `base_dir`.
            base_dir: Folder of the weight files.
            platform: None for this machine's.
            **settings: `device`, `kv_memory`, `max_rows`, `chunk_tokens`, `num_tokens`, `capture`, `quiet`, as for the
                class.

        Raises:
            UsageError: Neither `weights` nor `base_dir`, or no such setting.
        """
        unknown = settings.keys() - Settings.__dataclass_fields__.keys()
        if unknown:
            raise UsageError(f"{min(unknown)}: no such setting", ", ".join(Settings.__dataclass_fields__))
        if weights is None:
            if base_dir is None:
                raise UsageError("neither weights nor base_dir", "one of them", "pass RandomWeights or a folder")
            if not base_dir.is_dir():
                raise BundleError(f"base_dir={base_dir} is no folder", "the folder of the weight files")
            weights = FileWeights({path.name: path for path in base_dir.iterdir()})
        session = cls.__new__(cls)
        session._start(graph, spec, max_length, weights, Settings(**settings), platform)
        return session

    def _start(
        self,
        graph: bytes,
        spec: ModelSpec,
        max_length: int,
        weights: WeightSource,
        settings: Settings,
        platform: Platform | None,
    ) -> None:
        for name, high in (("max_rows", MAX_ROWS), ("chunk_tokens", _MOST_CHUNK)):
            if not 1 <= getattr(settings, name) <= high:
                raise UsageError(f"{name}={getattr(settings, name)}", f"1 to {high}")
        if settings.capture not in ("lazy", "all"):
            raise UsageError(f"capture={settings.capture!r}", "lazy or all")
        self.spec, self.max_length, self.max_rows = spec, max_length, settings.max_rows
        self.block_size, self.chunk_tokens = BLOCK_SIZE, min(settings.chunk_tokens, max_length)
        self.host_seconds, self.steps = 0.0, 0
        self._device, self._waited = settings.device, 0
        self.forget_rows()
        settings = Settings(**{**vars(settings), "chunk_tokens": self.chunk_tokens})
        model = DeviceModel(graph, spec, max_length, weights, settings, platform or Platform.real())
        self._model: DeviceModel | None = model
        try:
            self._cuda, self._stream, self.num_blocks = model.cuda, model.stream, model.num_blocks
            self.chunk_tokens = model.settings.chunk_tokens
            self.num_tokens, self.load_stats, self.kv_format = model.num_tokens, model.load_stats, model.kv_format
            self._events = [model.resources.event() for _ in range(RING)]
            self._sampled = model.resources.event()
            if settings.capture == "all":
                for bucket in buckets_up_to(self.max_rows):
                    for width in widths_up_to(model.max_blocks):
                        for plan in (SamplePlan(), SamplePlan(full=True)):
                            model.find_step(bucket, width, plan)
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------- rows

    def forget_rows(self) -> None:
        """Let the decoding rows go: the next step needs `set_rows` first."""
        self.graph, self._bucket, self._plan = 0, 0, SamplePlan()
        self._params: tuple[SamplingParams, ...] = ()

    def check_params(self, params: SamplingParams) -> None:
        """Refuse settings that the device cannot serve; an engine asks when it admits a request.

        Raises:
            UsageError: More edits of single logits than there is room for.
        """
        edits_of(params, self.num_tokens)

    def prefill(
        self, row: RowState, token_ids: NDArray[np.int64], position: int, *, is_last: bool
    ) -> SampleResult | None:
        """Feed a chunk of a request's prompt; after the last one, choose its first token.

        Args:
            row: The request; `output_ids` is empty.
            token_ids: int64[S], 1 to `chunk_tokens` tokens of the prompt.
            position: Place of the first of them; the earlier ones have been fed.
            is_last: Whether the chunk ends the prompt. Then the call waits for the result.

        Returns:
            The first token (one row) after the last chunk, else None.

        Raises:
            UsageError: A chunk, a position or blocks that cannot be.
            LogitsError: No token can be chosen.
        """
        model = self._opened()
        count = len(token_ids)
        if not 1 <= count <= self.chunk_tokens:
            raise UsageError(f"a chunk of {count} tokens", f"1 to chunk_tokens={self.chunk_tokens}")
        self._check_row(row, position + count)
        if token_ids.min() < 0 or token_ids.max() >= self.spec.vocab_size:
            raise UsageError("a token of the prompt is outside the vocabulary", f"0 to {self.spec.vocab_size - 1}")
        self._cuda.set_device(self._device)  # the thread may not be the one that loaded
        buffers = model.prefill
        plan = plan_of((row,), self.num_tokens) if is_last else SamplePlan()
        slot = model.counts.assign_prefill(row) if is_last else -1
        buffers.wait_upload()
        width = width_of(len(row.blocks), model.max_blocks)
        buffers.write_rows((row,), (slot,), plan, self.num_tokens, width)
        host = buffers.host
        host["ids"][:count] = token_ids
        host["positions"][:count] = np.arange(position, position + count)
        host["query_starts"][1], host["logits_indices"][0] = count, count - 1
        buffers.upload(plan)
        model.calls.enqueue(buffers, count, 1, width)
        if not is_last:
            return None
        model.sample(buffers, 1, plan)
        if slot >= 0:
            model.counts.count_prefill(row)
        self._cuda.event_record(self._sampled, self._stream)
        self._cuda.event_synchronize(self._sampled)
        return buffers.result(0, 1, (row.params,), plan)

    def set_rows(self, rows: Sequence[RowState]) -> None:
        """Replace the set of decoding rows, 1 to `max_rows` of them, each with one output token at least.

        No step may be under way. The executor keeps no reference to `output_ids` and does not change it.

        Raises:
            UsageError: Too many rows or none, a step under way, a row without output or blocks.
        """
        model = self._opened()
        if self.steps != self._waited:
            raise UsageError(f"{self.steps - self._waited} steps are under way", "none", "wait for them")
        if not 1 <= len(rows) <= self.max_rows:
            raise UsageError(f"{len(rows)} rows", f"1 to max_rows={self.max_rows}")
        for row in rows:
            if not row.output_ids:
                raise UsageError("a decoding row has no output token", "one at least", "prefill it first")
            self._check_row(row, row.position + 1)
        self.forget_rows()
        self._cuda.set_device(self._device)
        plan = plan_of(rows, self.num_tokens)
        bucket = bucket_of(len(rows), self.max_rows)
        width = width_of(max(len(row.blocks) for row in rows), model.max_blocks)
        slots = model.counts.assign(rows)
        graph = model.find_step(bucket, width, plan)
        buffers = model.decode
        buffers.wait_upload()
        buffers.write_rows(rows, slots, plan, self.num_tokens, width)
        host = buffers.host
        for index, row in enumerate(rows):
            host["ids"][index], host["positions"][index] = row.output_ids[-1], row.position
        host["step"][0] = self.steps
        buffers.upload(plan)
        self.graph, self._bucket, self._plan = graph, bucket, plan
        self._params = tuple(row.params for row in rows)

    def _check_row(self, row: RowState, length: int) -> None:
        """Refuse a row whose first `length` tokens have no place: a wrong block would overwrite another request."""
        if length > self.max_length:
            raise CapacityError(f"a request reaches {length} tokens", f"at most max_length={self.max_length}")
        needed = -(-length // BLOCK_SIZE)
        if not needed <= len(row.blocks) <= -(-self.max_length // BLOCK_SIZE):
            raise UsageError(f"{len(row.blocks)} cache blocks for {length} tokens", f"{needed} or a few more")
        if min(row.blocks) < 1 or max(row.blocks) >= self.num_blocks:
            raise UsageError("a cache block that does not exist", f"1 to {self.num_blocks - 1}")

    # ---------------------------------------------------------------- steps

    def launch_step(self) -> int:
        """Start a decode step over the rows of `set_rows` and return its number; does not wait for the device.

        Raises:
            UsageError: No rows, or two steps under way already.
        """
        started = time.perf_counter()
        number = self.steps
        if not self.graph or number - self._waited >= _UNDER_WAY:
            self._opened()
            what = "two steps are under way" if self.graph else "there are no rows"
            raise UsageError(what, "one at most, over rows", "wait_step" if self.graph else "set_rows first")
        self._cuda.graph_launch(self.graph, self._stream)
        self._cuda.event_record(self._events[number % RING], self._stream)
        self.steps = number + 1
        if self._plan.counts:
            self._opened().counts.count_step()
        self.host_seconds += time.perf_counter() - started
        return number

    def wait_step(self, number: int) -> SampleResult:
        """Wait for a launched step, in order, and return the token of every row, and log probabilities where asked for.

        Raises:
            UsageError: Not the oldest step under way.
            LogitsError: Rows that no token can be chosen for; the step counts as waited for.
        """
        if number != self._waited or number >= self.steps:
            raise UsageError(f"step {number}", f"step {self._waited}, launched before", "wait in order")
        model = self._opened()
        self._cuda.event_synchronize(self._events[number % RING])
        started = time.perf_counter()
        self._waited = number + 1
        result = model.decode.result(number, self._bucket, self._params, self._plan)
        self.host_seconds += time.perf_counter() - started
        return result

    # ---------------------------------------------------------------- facts, end

    def read_logits(self, num_rows: int) -> NDArray[np.float32]:
        """Wait for the device and return the logits of the last call, before sampling: float32[num_rows, V].

        For tests and parity checks; a step never needs them on the host.

        Raises:
            UsageError: More rows than there are.
        """
        if not 1 <= num_rows <= self.max_rows:
            raise UsageError(f"num_rows={num_rows}", f"1 to max_rows={self.max_rows}")
        return self._opened().read_logits(num_rows)

    def memory_report(self) -> MemoryReport:
        """Return who holds how much of the device."""
        model = self._opened()
        self._cuda.set_device(self._device)  # the thread may have another one, and its memory would be told
        return model.memory_report()

    def time_decode(self, rows: int, prompt: int, steps: int) -> list[float]:
        """Return the milliseconds of each of `steps` decode steps of `rows` rows with `prompt` tokens in the cache."""
        return bench.time_decode(self, self._opened(), rows, prompt, steps)

    def time_prefill(self, tokens: int, repeats: int) -> list[float]:
        """Return the milliseconds of each of `repeats` prefills of `tokens` tokens, first token included."""
        return bench.time_prefill(self, self._opened(), tokens, repeats)

    def close(self) -> None:
        """Give everything back. Closing twice does nothing."""
        model, self._model = getattr(self, "_model", None), None
        if model is not None:
            self.forget_rows()
            self._waited = self.steps
            model.close()

    def _opened(self) -> DeviceModel:
        if self._model is None:
            raise UsageError("the session is closed", "an open one", "load the bundle again")
        return self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(QwenRtError):  # nobody is left to tell
            self.close()
