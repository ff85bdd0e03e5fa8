"""A deserialized engine: its tensors against the contract, the limits of its profiles, its execution contexts.

    profile 0, prefill    B rows of S tokens each
    profile 1, decode     B rows of one token each

Every context is given the same scratch memory: they run one after the other on one stream.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt import tensors
from qwen_rt.errors import BundleError, QwenRtError
from qwen_rt.runtime.cuda.memory import ALIGNMENT
from qwen_rt.runtime.tensorrt.platform import Platform, make_log
from qwen_rt.spec import ModelSpec

__all__ = ["DECODE", "PREFILL", "Context", "DeviceEngine", "Limits", "cache_pairs"]

PREFILL, DECODE = 0, 1
"""Numbers of the profiles."""

_KV_TYPES = {"float32": "FLOAT", "bfloat16": "BF16", "float16": "HALF"}  # of a manifest → name of trt.DataType
_ITEM_BYTES = {"FLOAT": 4, "BF16": 2, "HALF": 2}
_INDICES = (tensors.INPUT_IDS, tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES)


@dataclass(frozen=True)
class Limits:
    """The largest call of a profile: B rows of S tokens each."""

    rows: int
    tokens: int


def cache_pairs(num_layers: int) -> Iterator[tuple[str, str]]:
    """Yield (past name, present name) of every key and value tensor, in the order of their memory."""
    for layer in range(num_layers):
        yield tensors.past_key(layer), tensors.present_key(layer)
        yield tensors.past_value(layer), tensors.present_value(layer)


class DeviceEngine:
    """An engine in device memory.

    Args:
        platform: What to stand on; its device is the calling thread's.
        file: The serialized engine.
        spec: The model's hyperparameters.
        capacity: Tmax, tokens that a row of the cache holds.
        kv_dtype: Dtype of the cache, as the manifest names it.
        rebuild: What to tell where the engine cannot serve.

    Attributes:
        kv_item_bytes: Bytes of a number in the cache.
        row_bytes: Bytes of one row of one key or value tensor: Hkv · Tmax · D · `kv_item_bytes`.
        limits: The largest calls: of prefill, of decode.
        scratch_bytes: What the contexts share.

    Raises:
        BundleError: TensorRT refuses the file, or the engine lacks what the session relies on.
    """

    def __init__(
        self, platform: Platform, file: Path, spec: ModelSpec, capacity: int, kv_dtype: str, rebuild: str
    ) -> None:
        self._trt, self._name, self._rebuild = platform.trt, str(file), rebuild
        self.num_layers, self._capacity, self._spec = spec.num_layers, capacity, spec
        self._log = make_log(platform.trt)
        self._runtime: Any = platform.trt.Runtime(self._log)
        self._engine: Any = self._deserialize(file)
        self._check_tensors(kv_dtype)
        self.kv_item_bytes = _ITEM_BYTES[_KV_TYPES[kv_dtype]]
        self.row_bytes = spec.num_kv_heads * capacity * spec.head_dim * self.kv_item_bytes
        if self.row_bytes % ALIGNMENT:
            raise self._refuse(f"a row of the cache has {self.row_bytes} bytes", f"a multiple of {ALIGNMENT}")
        self.limits = self._read_limits(PREFILL), self._read_limits(DECODE)
        sizes = [int(self._engine.get_device_memory_size_for_profile_v2(profile)) for profile in (PREFILL, DECODE)]
        self.scratch_bytes = max(sizes)

    def _refuse(self, what: str, expected: str = "") -> BundleError:
        return BundleError(f"{self._name}: {what}", expected, self._rebuild)

    def _deserialize(self, file: Path) -> Any:
        """Let TensorRT read the mapped file: the host holds no copy of the weights."""
        if file.stat().st_size == 0:
            raise self._refuse("the file is empty", "an engine")
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            engine = self._runtime.deserialize_cuda_engine(data)
        except Exception as error:  # bindings raise what they like
            raise self._refuse(f"TensorRT {self._trt.__version__} cannot load it: {error}") from None
        if engine is None:
            raise self._refuse(f"TensorRT {self._trt.__version__} cannot load it: {self._log.last()}")
        return engine

    def _check_tensors(self, kv_dtype: str) -> None:
        engine, spec, trt = self._engine, self._spec, self._trt
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        pairs = dict(cache_pairs(spec.num_layers))
        inputs, outputs = {*_INDICES, *pairs}, {tensors.LOGITS, *pairs.values()}
        if names != inputs | outputs:
            differing = sorted(names ^ (inputs | outputs))
            raise self._refuse(f"its tensors differ from those of the model, {differing[0]} first", "the same names")
        for name in sorted(names):
            mode = trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT
            if engine.get_tensor_mode(name) != mode:
                raise self._refuse(f"{name} is no {'input' if name in inputs else 'output'}")
        self._check(tensors.INPUT_IDS, "INT64", (None, None))
        for name in _INDICES[1:]:
            self._check(name, "INT64", (None,))
        self._check(tensors.LOGITS, "FLOAT", (None, spec.vocab_size))
        if kv_dtype not in _KV_TYPES:
            raise self._refuse(f"the cache has dtype {kv_dtype}", f"one of {', '.join(_KV_TYPES)}")
        shape = (None, spec.num_kv_heads, self._capacity, spec.head_dim)
        for past, present in pairs.items():
            self._check(past, _KV_TYPES[kv_dtype], shape)
            self._check(present, _KV_TYPES[kv_dtype], shape)
            aliased = engine.get_aliased_input_tensor(present)
            if aliased != past:
                raise self._refuse(f"{present} is aliased to {aliased or 'nothing'}", f"{past}, updated in place")

    def _check(self, name: str, dtype: str, shape: Sequence[int | None]) -> None:
        """Compare dtype and shape; None stands for an axis of any size, or of one that a call chooses."""
        found = tuple(self._engine.get_tensor_shape(name))
        if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
            wanted = ", ".join("B" if size is None else str(size) for size in shape)
            raise self._refuse(f"{name} has shape {list(found)}", f"[{wanted}]")
        have = self._engine.get_tensor_dtype(name)
        if have != getattr(self._trt.DataType, dtype):
            raise self._refuse(f"{name} has dtype {have.name}", dtype)

    def _read_limits(self, profile: int) -> Limits:
        count = self._engine.num_optimization_profiles
        if count <= profile:
            raise self._refuse(f"it has {count} optimization profiles", "2: prefill and decode")
        least, _, most = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(tensors.INPUT_IDS, profile))
        # A call of one token a row is always a decode step, so prefill may begin at two.
        if least[0] != 1 or least[1] > (2 if profile == PREFILL else 1):
            raise self._refuse(f"profile {profile} begins at {least[0]} rows of {least[1]} tokens", "1 row of 1 token")
        return Limits(int(most[0]), int(most[1]))

    def open_context(self, profile: int, stream: int, scratch: int, *, captured: bool = False) -> Context:
        """Make an execution context.

        Args:
            profile: `PREFILL` or `DECODE`.
            stream: Where its work goes.
            scratch: Device address of `scratch_bytes` bytes, shared by all contexts.
            captured: Whether its calls will be captured: TensorRT-RTX then compiles the kernels of a shape at once, so
                that the captured step is not made of those that it uses while it compiles better ones.

        Raises:
            QwenRtError: TensorRT refuses.
        """
        trt, engine = self._trt, self._engine
        strategy: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if captured:
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            strategy = config
        context = engine.create_execution_context(strategy)
        if context is None:
            raise QwenRtError(f"{self._name}: no execution context: {self._log.last()}")
        opened = Context(context, self._log, self._name)
        opened.check(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        if self.scratch_bytes:
            context.set_device_memory(scratch, self.scratch_bytes)
        return opened

    def close(self) -> None:
        """Let engine and runtime go; their contexts must have gone before."""
        self._engine = self._runtime = None


class Context:
    """An execution context: shapes and addresses by name, every answer checked.

    Args:
        context: TensorRT's.
        log: Where TensorRT tells why it refuses.
        name: Of the engine, for messages.
    """

    def __init__(self, context: Any, log: Any, name: str) -> None:
        self._context, self._log, self._name = context, log, name
        self.bound: object = None
        """What its owner has bound last; the owner's alone."""

    def check(self, answer: object, what: str) -> None:
        """Raise what TensorRT has logged if it answered no.

        Raises:
            QwenRtError: It did.
        """
        if not answer:
            raise QwenRtError(f"{self._name}: TensorRT refuses {what}: {self._log.last()}")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input."""
        self.check(self._context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")

    def set_address(self, name: str, address: int) -> None:
        """Set the device address of an input or an output."""
        self.check(self._context.set_tensor_address(name, address), f"the address of {name}")

    def enqueue(self, stream: int) -> None:
        """Enqueue the engine."""
        self.check(self._context.execute_async_v3(stream), "to run")

    def can_capture(self, stream: int) -> bool:
        """Say whether a call may be captured; the full TensorRT does not tell, and is believed to."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def close(self) -> None:
        """Let TensorRT's context go."""
        self._context = None
