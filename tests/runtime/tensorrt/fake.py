"""TensorRT's runtime without a GPU: engines are ONNX graphs that ONNX Runtime computes, at the addresses that are set.

It stands on the fake CUDA runtime of `..cuda.fake`, whose memory is the host's and whose streams can be captured, and
refuses what TensorRT refuses: shapes outside of the profile, tensors without an address, addresses that are not
aligned, past and present of a cache that are not the same memory, too little scratch, a capture without a run before
it. Replaying a step whose context has been bound anew since its capture is a violation, and so is one of a context or
an engine that is gone. Every public name here is one of the real classes': `test_api` holds that.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from ..cuda.fake import FakeGpu

MAGIC = b"fake engine "
ALIGNMENT = 256
SCRATCH = (3 << 20, 1 << 16)
"""Bytes that a context of each profile wants."""

_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
    TensorProto.INT32: "INT32",
}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}

Profile = dict[str, list[list[int]]]
"""Input → its least, usual and largest shape."""


def serialize(model: onnx.ModelProto, weights: str, profiles: Sequence[Profile], aliases: dict[str, str]) -> bytes:
    """Write an engine: a graph, the folder of its weights, its profiles, and output → input of the same memory."""
    header = json.dumps({"weights": weights, "profiles": profiles, "aliases": aliases}).encode()
    graph = model.SerializeToString()
    body = len(header).to_bytes(8, "little") + header + graph
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


class DataType(enum.Enum):
    FLOAT, HALF, BF16, FP8, INT8, INT32, INT64 = range(7)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    """Made by `FakeTensorRt.Runtime`."""

    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        body = data[len(MAGIC) + 4 :]
        whole = zlib.crc32(body).to_bytes(4, "little") == data[len(MAGIC) : len(MAGIC) + 4]
        if not data.startswith(MAGIC) or not whole:
            self._logger.log(ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization\n")
            return None
        size = int.from_bytes(body[:8], "little")
        return ICudaEngine(self._trt, self._logger, json.loads(body[8 : 8 + size]), body[8 + size :])


class ICudaEngine:
    def __init__(self, trt: FakeTensorRt, logger: Any, header: dict[str, Any], graph: bytes) -> None:
        self._trt, self._logger, self._header = trt, logger, header
        model = onnx.ModelProto.FromString(graph)
        self._inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self._outputs = {value.name: value.type.tensor_type for value in model.graph.output}
        self._session = _open(graph, header["weights"])
        trt._made.append(weakref.ref(self))

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._inputs | self._outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_TYPES[self._tensors[name].elem_type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value or -1 for dim in self._tensors[name].shape.dim)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._header["profiles"][profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        found: str | None = self._header["aliases"].get(name)
        return found

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH[profile_index]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        config = IRuntimeConfig()
        if isinstance(strategy, IRuntimeConfig):
            config = strategy
        else:
            config.set_execution_context_allocation_strategy(strategy)
        return (StreamCapturableContext if self._trt._rtx else IExecutionContext)(self, config)


def _open(graph: bytes, weights: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        assert isinstance(strategy, ExecutionContextAllocationStrategy)
        self._strategy = strategy


class _State:
    """What a step that was captured needs of its context: steps hold this, and not the context."""

    def __init__(self) -> None:
        self.generation, self.is_alive = 0, True  # the generation grows with everything that is set


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine, self._config, self._profile = engine, config, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._state = _State()
        self._ran = -1  # the generation of the last run outside of a capture
        engine._trt._made.append(weakref.ref(self))

    def __del__(self) -> None:
        self._state.is_alive = False

    def _no(self, text: str) -> bool:
        self._engine._logger.log(ILogger.Severity.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({text})")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles or not stream_handle:
            return self._no(f"profile {profile_index}")
        self._profile, self._shapes = profile_index, {}
        self._state.generation += 1
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size
        self._state.generation += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._engine._inputs or self._profile < 0:
            return self._no(f"no input {name}, or no profile")
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        inside = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=False))
        if len(shape) != len(most) or not inside:
            return self._no(f"shape {shape} of {name} is outside of {least} to {most}")
        self._shapes[name] = tuple(shape)
        self._state.generation += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            return self._no(f"no tensor {name}")
        if not memory or memory % ALIGNMENT:
            return self._no(f"address {memory:#x} of {name} is no multiple of {ALIGNMENT}")
        self._addresses[name] = memory
        self._state.generation += 1
        return True

    def _trouble(self) -> str:
        """What keeps it from running."""
        engine = self._engine
        if missing := engine._inputs.keys() - self._shapes.keys():
            return f"no shape of {min(missing)}"
        if missing := engine._tensors.keys() - self._addresses.keys():
            return f"no address of {min(missing)}"
        for output, source in engine._header["aliases"].items():
            if self._addresses[output] != self._addresses[source]:
                return f"{output} is not where {source} is"
        address, size = self._scratch
        wanted = engine.get_device_memory_size_for_profile_v2(self._profile)
        if self._config._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            return "only contexts that are given their memory are known here"
        if not address or address % ALIGNMENT or size < wanted:
            return f"{size} bytes of device memory at {address:#x}; {wanted} are needed"
        return ""

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt = self._engine._trt
        if not stream_handle:
            return self._no("the default stream")
        if trouble := trt._refusal or self._trouble():
            return self._no(trouble)
        is_captured = bool(ctypes.c_void_p.from_address(stream_handle).value)
        if is_captured and (self._ran != self._state.generation or not trt._can_capture):
            return self._no("operation not permitted when stream is capturing")
        if not is_captured:
            self._ran = self._state.generation
        trt._log.append((self._profile, self._shapes["input_ids"], is_captured))
        trt._enqueue(stream_handle, self._job())
        return True

    def _job(self) -> Callable[[], None]:
        engine, state, generation = self._engine, self._state, self._state.generation
        trt, session, outputs = engine._trt, engine._session, list(engine._outputs)
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        types = {name: np.dtype(_NUMPY[engine.get_tensor_dtype(name).name]) for name in shapes}

        def run() -> None:
            if not state.is_alive:
                trt._violations.append("a step of a context that is gone")
            elif state.generation != generation:
                trt._violations.append("a step of a context that was bound anew since its capture")
            feeds = {name: _array(addresses[name], types[name], shape) for name, shape in shapes.items()}
            for name, array in zip(outputs, session.run(outputs, feeds), strict=True):
                data = np.ascontiguousarray(array)
                ctypes.memmove(addresses[name], data.ctypes.data, data.nbytes)

        return run


class StreamCapturableContext(IExecutionContext):
    """What TensorRT-RTX has besides."""

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(stream) and self._engine._trt._can_capture


def _array(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    raw = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


class FakeTensorRt:
    """Stands in for the module `tensorrt_rtx`, or for `tensorrt` with `rtx=False`.

    Attributes:
        _log: (profile, shape of `input_ids`, captured) of every call.
        _violations: What would have been undefined behaviour.
        _refusal: Why no context runs; empty if it does.
        _can_capture: Whether engines can be captured.
    """

    ILogger, DataType, TensorIOMode = ILogger, DataType, TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, gpu: FakeGpu, rtx: bool = True) -> None:
        self.__name__, self.__version__ = ("tensorrt_rtx", "1.7.1.116") if rtx else ("tensorrt", "10.15.1.29")
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        self._gpu, self._rtx = gpu, rtx
        self._log: list[tuple[int, tuple[int, ...], bool]] = []
        self._violations: list[str] = []
        self._made: list[weakref.ref[Any]] = []
        self._refusal, self._can_capture = "", True
        self._jobs: list[Callable[[], None]] = []
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run_job)

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)

    def _num_alive(self) -> int:
        """Engines and contexts that somebody holds."""
        return sum(1 for made in self._made if made() is not None)

    def _enqueue(self, stream: int, job: Callable[[], None]) -> None:
        number = ctypes.c_int64(len(self._jobs))
        self._jobs.append(job)
        self._gpu.library.fake_enqueue(
            stream, ctypes.cast(self._run, ctypes.c_void_p), ctypes.addressof(number), ctypes.sizeof(number)
        )

    def _run_job(self, argument: int) -> None:
        try:
            self._jobs[ctypes.c_int64.from_address(argument).value]()
        except Exception as error:  # nothing may be raised into C
            self._violations.append(repr(error))
