"""A compiled engine on one NVIDIA GPU: tokens and leased rows of a cache in, logits out, decode steps captured.

weights     in the engine; TensorRT holds them
cache       past and present of a layer in the same memory, all rows of it allocated once
prefill     profile 0, pieces of at most the profile's length, uncaptured
decode      profile 1, one token a row; rows are filled up to a bucket, and a bucket's step is one launch
logits      come to pinned host memory; `qwen_rt.runtime.sampler` chooses
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.engine_card import engine_file
from qwen_rt.errors import BundleError, CapacityError, QwenRtError, UsageError
from qwen_rt.ops import MAX_ROWS
from qwen_rt.runtime.cuda.memory import Layout, MemoryReport, Resources, measured, require_memory, reserve_bytes
from qwen_rt.runtime.cuda.steps import bucket_of
from qwen_rt.runtime.tensorrt.cache import KvPool, LeasedCache
from qwen_rt.runtime.tensorrt.card import check_profiles, fitting_card
from qwen_rt.runtime.tensorrt.engine import DECODE, PREFILL, Context, DeviceEngine
from qwen_rt.runtime.tensorrt.platform import FLAVOURS, Platform
from qwen_rt.runtime.tensorrt.steps import CapturedSteps

__all__ = ["TensorRtSession"]

_LOGIT_BYTES = 4
_SMALL = (tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES)


class TensorRtSession:
    """A loaded bundle of target `tensorrt` or `tensorrt-rtx`; see `qwen_rt.runtime.engine.SlotSession`.

    Args:
        bundle: An opened bundle of one of these targets.
        device: The GPU's number.
        kv_memory: Bytes for the KV cache; None: as much as `max_rows` rows take, or what is free.
        max_rows: Most rows of the cache, which is most requests at once; the engine's own limit bounds it too.
        platform: None for this machine's.

    Attributes:
        spec: The model's hyperparameters.
        max_length: Tokens that a row of the cache holds.
        max_rows: Rows of the cache, as they fit.
        steps: The captured decode steps.

    Raises:
        BundleError: Of another target, built for another TensorRT or another GPU, damaged, or refused by TensorRT.
        MissingDependencyError: No TensorRT of this flavour, no driver, no GPU, no CUDA runtime.
        UnsupportedModelError: The GPU is too old.
        CapacityError: The engine and one row of the cache do not fit.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: int = 0,
        kv_memory: int | None = None,
        max_rows: int = MAX_ROWS,
        platform: Platform | None = None,
    ) -> None:
        manifest = bundle.manifest
        if manifest.target not in FLAVOURS:
            raise BundleError(
                f"{bundle.path} has target {manifest.target}",
                f"a bundle of target {' or '.join(FLAVOURS)}",
                f"build one: qwen-rt build {manifest.checkpoint.path} --target tensorrt-rtx -o BUNDLE",
            )
        if manifest.tensor_parallel != 1:
            raise BundleError(
                f"{bundle.path} has engines for {manifest.tensor_parallel} GPUs",
                "one engine: those of several ranks are built, and not run yet",
                "build the bundle again without --tp",
            )
        if max_rows < 1:
            raise UsageError(f"max_rows={max_rows}", "1 at least")
        self.spec, self.max_length = manifest.model, manifest.max_length
        self._device = device
        self._engine: DeviceEngine | None = None
        self._bytes = dict.fromkeys(("weights", "kv_cache", "workspace", "buffers", "runtime"), 0)
        platform = Platform.real(manifest.target) if platform is None else platform
        self._cuda = platform.cuda
        self._resources = Resources(platform.cuda)
        try:
            self._load(bundle, platform, kv_memory, max_rows)
        except BaseException:
            self.close()
            raise

    def _load(self, bundle: Bundle, platform: Platform, kv_memory: int | None, max_rows: int) -> None:
        cuda, spec, manifest = self._cuda, self.spec, bundle.manifest
        sm = cuda.open_device(self._device)
        card = fitting_card(bundle, str(platform.trt.__version__), sm)
        rebuild = f"build: {card.rebuild_command(str(bundle.path))}"
        file = bundle.path / engine_file(0)
        self._free_at_start, total = cuda.memory_info()
        require_memory(self._free_at_start, {"weights": file.stat().st_size})
        self._stream = self._resources.stream()
        with measured(cuda, self._adder("weights")):
            self._engine = engine = DeviceEngine(platform, file, spec, self.max_length, manifest.kv_dtype, rebuild)
        check_profiles(card, [(limits.rows, limits.tokens) for limits in engine.limits], file, rebuild)
        max_rows = min(max_rows, engine.limits[DECODE].rows)
        least = KvPool.nbytes(spec.num_layers, 1, engine.row_bytes)
        require_memory(cuda.memory_info()[0], {"workspace": engine.scratch_bytes, "KV cache": least})
        self._scratch = self._take("workspace", engine.scratch_bytes)
        self._make_buffers(max_rows)
        with measured(cuda, self._adder("runtime")):
            self._contexts = [
                engine.open_context(profile, self._stream, self._scratch) for profile in (PREFILL, DECODE)
            ]
            for context in self._contexts:
                self._bind_buffers(context)
        self._make_cache(kv_memory, max_rows, total)
        self.steps = CapturedSteps(
            cuda, self._resources, self._stream, self._open_step, self._enqueue_step, self._adder("runtime")
        )
        cuda.stream_synchronize(self._stream)

    def _make_buffers(self, max_rows: int) -> None:
        """Allocate the integer inputs, device and pinned, and the logits of one call and of one answer."""
        assert self._engine is not None
        prefill = self._engine.limits[PREFILL]
        self._group_rows = min(max_rows, prefill.rows)
        tokens = max(max_rows, self._group_rows * prefill.tokens)
        sizes = {**dict.fromkeys(_SMALL, max_rows), tensors.INPUT_IDS: tokens}  # last: a step copies few bytes
        layout = Layout({name: (np.int64, (size,)) for name, size in sizes.items()})
        base = self._take("buffers", layout.nbytes)
        pinned = self._resources.pinned(layout.nbytes)
        self._host, self._at = layout.views(pinned), layout.addresses(base)
        self._inputs = base, pinned.host, layout.offsets[tensors.INPUT_IDS]
        self._row_logits = self.spec.vocab_size * _LOGIT_BYTES
        self._at[tensors.LOGITS] = self._take("buffers", max_rows * self._row_logits)
        answer = self._resources.pinned(max_rows * self._row_logits, zeroed=False)
        self._answer_address = answer.host
        self._answer: NDArray[np.float32] = answer.array(np.float32, (max_rows, self.spec.vocab_size))

    def _make_cache(self, kv_memory: int | None, most: int, total: int) -> None:
        assert self._engine is not None
        row_bytes, layers = self._engine.row_bytes, self.spec.num_layers
        one = KvPool.nbytes(layers, 1, row_bytes)
        budget = self._cuda.memory_info()[0] - reserve_bytes(total) if kv_memory is None else kv_memory
        self.max_rows = min(most, max(budget, 0) // one)
        if self.max_rows < 1:
            name = "the memory left for it" if kv_memory is None else f"kv_memory={kv_memory}"
            raise CapacityError(
                f"KV cache: {name} is {max(budget, 0) / 1e6:.1f} MB",
                f"at least {one / 1e6:.1f} MB, a row of {self.max_length} tokens",
                "give it more memory, or build the bundle with a smaller --max-length",
            )
        nbytes = KvPool.nbytes(layers, self.max_rows, row_bytes)
        address = self._take("kv_cache", nbytes)
        self._pool = KvPool(self._cuda, self._stream, address, layers, self.max_rows, row_bytes, self.max_length)

    def _take(self, use: str, nbytes: int) -> int:
        address, size = self._resources.device(nbytes)
        self._bytes[use] += size
        return address

    def _adder(self, use: str) -> Any:
        def add(nbytes: int) -> None:
            self._bytes[use] += nbytes

        return add

    # ---------------------------------------------------------------- calls

    def new_cache(self, num_rows: int, capacity: int) -> LeasedCache:
        """Lease rows for up to `num_rows` sequences of up to `capacity` tokens; fewer where others hold rows.

        Raises:
            CapacityError: `capacity` is more than `max_length`, or no row is free.
        """
        self._opened()
        self._cuda.set_device(self._device)  # the thread may not be the one that loaded
        return self._pool.lease(num_rows, capacity)

    def run(
        self,
        cache: LeasedCache,
        first_row: int,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_indices: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run the model over new tokens and write their keys and values into the cache: see `SlotSession.run`.

        `write_indices` may be any. A call with S = 1 and `first_row` 0 may overwrite the first token of rows behind
        those that take part, which must hold nothing.

        Returns:
            Logits, float32[B, V]. The buffer is reused by the next call: copy what must stay.

        Raises:
            CapacityError: A position beyond the cache.
            UsageError: Rows that are not leased, or a closed session.
        """
        self._opened()
        num_rows, num_tokens = input_ids.shape
        cache.check_rows(first_row, num_rows)
        if cache.pool is not self._pool:
            raise UsageError("a cache of another session", "one of `new_cache`")
        if write_indices.min() < 0 or int(write_indices.max()) + num_tokens > self.max_length:
            raise CapacityError(
                f"tokens at {int(write_indices.max())} to {int(write_indices.max()) + num_tokens - 1}",
                f"positions 0 to {self.max_length - 1}",
            )
        self._cuda.set_device(self._device)
        if num_tokens == 1:
            self._decode(cache, first_row, input_ids, write_indices)
        else:
            self._prefill(cache.first + first_row, input_ids, write_indices, logits_indices)
        return self._answer[:num_rows]

    def _decode(
        self, cache: LeasedCache, first_row: int, input_ids: NDArray[np.int64], write_indices: NDArray[np.int64]
    ) -> None:
        num_rows = len(input_ids)
        captured = first_row == 0  # only there are the rows behind known to be free
        bucket = min(bucket_of(num_rows, self.max_rows), cache.num_leased) if captured else num_rows
        host = self._host
        host[tensors.INPUT_IDS][:num_rows] = input_ids[:, 0]
        host[tensors.WRITE_INDICES][:num_rows] = write_indices
        for name in (tensors.INPUT_IDS, tensors.WRITE_INDICES):
            host[name][num_rows:bucket] = 0
        host[tensors.KV_LENGTHS][:bucket] = host[tensors.WRITE_INDICES][:bucket] + 1
        host[tensors.LOGITS_INDICES][:bucket] = 0
        row = cache.first + first_row
        if captured:
            self.steps.run(row, bucket)
        else:
            self._enqueue_step(self._contexts[DECODE], row, bucket)
        self._cuda.stream_synchronize(self._stream)

    def _prefill(
        self,
        row: int,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_indices: NDArray[np.int64],
    ) -> None:
        """Run pieces that the profile takes; `row` counts in the pool."""
        limits = self._opened().limits[PREFILL]
        num_rows, num_tokens = input_ids.shape
        for first in range(0, num_rows, self._group_rows):
            group = slice(first, min(first + self._group_rows, num_rows))
            for start in range(0, num_tokens, limits.tokens):
                piece = input_ids[group, start : start + limits.tokens]
                indices = logits_indices[group] - start
                self._enqueue_prefill(row + first, piece, write_indices[group] + start, indices)
                for index in np.flatnonzero((indices >= 0) & (indices < piece.shape[1])):
                    self._fetch_logits(int(index), first + int(index), 1)
                self._cuda.stream_synchronize(self._stream)  # the pinned inputs are free again

    def _enqueue_prefill(
        self,
        row: int,
        piece: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_indices: NDArray[np.int64],
    ) -> None:
        num_rows, num_tokens = piece.shape
        host = self._host
        host[tensors.INPUT_IDS][: piece.size] = piece.ravel()
        host[tensors.WRITE_INDICES][:num_rows] = write_indices
        host[tensors.KV_LENGTHS][:num_rows] = write_indices + num_tokens
        host[tensors.LOGITS_INDICES][:num_rows] = np.clip(logits_indices, 0, num_tokens - 1)
        self._upload(piece.size)
        # One token a row is a decode step, whatever the prefill profile begins at.
        context = self._contexts[DECODE if num_tokens == 1 else PREFILL]
        self._bind_call(context, row, num_rows, num_tokens)
        context.enqueue(self._stream)

    def _enqueue_step(self, context: Context, row: int, num_rows: int) -> None:
        """Enqueue what a decode step is: inputs up, the engine, logits down."""
        self._bind_call(context, row, num_rows, 1)
        self._upload(num_rows)
        context.enqueue(self._stream)
        self._fetch_logits(0, 0, num_rows)

    def _upload(self, num_ids: int) -> None:
        device, host, ids_offset = self._inputs
        nbytes = ids_offset + num_ids * self._host[tensors.INPUT_IDS].itemsize
        self._cuda.copy(device, host, nbytes, self._stream)

    def _fetch_logits(self, source: int, target: int, num_rows: int) -> None:
        """Enqueue copying rows of the call's logits to rows of the answer."""
        self._cuda.copy(
            self._answer_address + target * self._row_logits,
            self._at[tensors.LOGITS] + source * self._row_logits,
            num_rows * self._row_logits,
            self._stream,
        )

    # ---------------------------------------------------------------- bindings

    def _open_step(self) -> Context:
        context = self._opened().open_context(DECODE, self._stream, self._scratch, captured=True)
        self._bind_buffers(context)
        return context

    def _bind_buffers(self, context: Context) -> None:
        for name in (*_SMALL, tensors.INPUT_IDS, tensors.LOGITS):
            context.set_address(name, self._at[name])

    def _bind_call(self, context: Context, row: int, num_rows: int, num_tokens: int) -> None:
        """Set shapes and the cache's addresses, where they differ from those of the context's last call."""
        key = row, num_rows, num_tokens
        if context.bound == key:
            return
        context.bound = None
        context.set_shape(tensors.INPUT_IDS, (num_rows, num_tokens))
        for name in _SMALL:
            context.set_shape(name, (num_rows,))
        shape = num_rows, self.spec.num_kv_heads, self.max_length, self.spec.head_dim
        for past, present, address in self._pool.addresses(row):
            context.set_shape(past, shape)
            context.set_address(past, address)
            context.set_address(present, address)
        context.bound = key

    # ---------------------------------------------------------------- facts, end

    def memory_report(self) -> MemoryReport:
        """Return who holds how much of the device; `runtime` is TensorRT's contexts and the captured steps."""
        self._opened()
        self._cuda.set_device(self._device)  # the thread may have another one, and its memory would be told
        return MemoryReport(**self._bytes, driver_used=self._free_at_start - self._cuda.memory_info()[0])

    def close(self) -> None:
        """Give everything back: captured steps, contexts, the engine, then memory. Closing twice does nothing."""
        engine, self._engine = getattr(self, "_engine", None), None
        resources = getattr(self, "_resources", None)
        if resources is None:
            return
        if hasattr(self, "_pool"):
            self._pool.is_open = False
        if engine is not None:
            with contextlib.suppress(QwenRtError):  # after a fault of the device there is nothing to wait for
                self._cuda.stream_synchronize(self._stream)
            if hasattr(self, "steps"):
                self.steps.close()
            for context in getattr(self, "_contexts", ()):
                context.close()
            engine.close()
        resources.close()

    def _opened(self) -> DeviceEngine:
        if self._engine is None:
            raise UsageError("the session is closed", "an open one", "load the bundle again")
        return self._engine

    def __del__(self) -> None:
        with contextlib.suppress(QwenRtError):  # nobody is left to tell
            self.close()
