"""The lowered graph on ONNX Runtime's CUDA provider: weights become inputs, everything is bound by address.

ONNX Runtime would read external weights on its own, slowly, into memory of its own. So every initializer that lies in a
file is made a graph input of the same name before the graph is loaded, and bound once to memory that we have filled.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qwen_rt import tensors
from qwen_rt.errors import BundleError, GraphError, MissingDependencyError, QwenRtError
from qwen_rt.runtime.cuda.weights import (
    BF16,
    FLOAT,
    FLOAT8,
    FLOAT16,
    INT8,
    INT32,
    ITEM_BYTES,
    UINT8,
    ExternalWeight,
    WeightTensor,
)

__all__ = [
    "INT64",
    "GraphRunner",
    "OrtRunner",
    "bind_cache",
    "bind_model",
    "cache_format",
    "split_weights",
]

INT64 = 7  # onnx.TensorProto.DataType

_PARTS = {
    "_scale": (FLOAT, FLOAT16),
    "_zero_point": (INT8, UINT8),
    "_perm": (INT32,),
    ".kv_offset": (FLOAT,),
    "": (BF16, FLOAT8, INT8, UINT8),
}
"""How a weight's name ends → element types that it may have; the first that fits counts."""

_CACHE_TYPES = {"bf16": BF16, "fp8": FLOAT8, "int8": INT8}  # keys of qwen_rt.ops.KV_CACHE_FORMATS

_ERRORS = 3  # ONNX Runtime's severity
_PROVIDER = "CUDAExecutionProvider"
_INSTALL = "pip install --force-reinstall --no-deps onnxruntime-gpu"
_POOLS = (tensors.past_key, tensors.present_key), (tensors.past_value, tensors.present_value)
_SCALES = (
    (tensors.past_key_scale, tensors.present_key_scale),
    (tensors.past_value_scale, tensors.present_value_scale),
)
_INPUTS = (
    tensors.INPUT_IDS,
    tensors.POSITIONS,
    tensors.QUERY_STARTS,
    tensors.BLOCK_TABLES,
    tensors.LOGITS_INDICES,
    tensors.WORKSPACE,
)


def split_weights(graph: bytes, num_layers: int) -> tuple[bytes, list[ExternalWeight]]:
    """Turn the external initializers of a lowered graph into inputs.

    Args:
        graph: A serialised ModelProto of target `cuda`.
        num_layers: L, for the check that its inputs and outputs are those of `qwen_rt.tensors`.

    Returns:
        The changed model, and the weights in the order of the graph.

    Raises:
        GraphError: No ONNX model, no graph of target `cuda`, or a weight of a type that no kernel takes.
    """
    import onnx  # here: importing it takes longer than many a caller needs

    try:
        model = onnx.ModelProto.FromString(graph)
    except Exception as error:  # protobuf's own class differs between its implementations
        raise GraphError(f"the graph is no ONNX model: {error}", fix="build the bundle again") from None
    caches, presents = ([pair[end](i) for i in range(num_layers) for pair in _POOLS] for end in (0, 1))
    _require("input", {value.name for value in model.graph.input}, [*_INPUTS, *caches])
    _require("output", {value.name for value in model.graph.output}, [tensors.LOGITS, *presents])
    weights, inline = [], []
    for initializer in model.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            inline.append(initializer)
            continue
        name, kind = initializer.name, initializer.data_type
        allowed = next(types for ending, types in _PARTS.items() if name.endswith(ending))
        if kind not in allowed:
            label = onnx.TensorProto.DataType.Name
            raise GraphError(f"{name} is {label(kind)}", " or ".join(map(label, allowed)), "build the bundle again")
        weights.append(_weight(initializer))
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(initializer.dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(inline)
    return model.SerializeToString(), weights


def cache_format(graph: bytes, num_layers: int) -> str:
    """Find the format of a lowered graph's KV cache.

    Args:
        graph: A serialised ModelProto of target `cuda`, as `split_weights` takes it.
        num_layers: L.

    Returns:
        A key of `qwen_rt.ops.KV_CACHE_FORMATS`.

    Raises:
        GraphError: Pools of a type that no kernel takes or of several types, or pools of bytes without scales.
    """
    import onnx

    model = onnx.ModelProto.FromString(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.input, *model.output)}
    pools = [name(i) for i in range(num_layers) for pair in _POOLS for name in pair]
    formats = {number: name for name, number in _CACHE_TYPES.items()}
    found = {types.get(name, 0) for name in pools}
    if len(found) != 1 or not found <= formats.keys():
        label = onnx.TensorProto.DataType.Name
        raise GraphError(
            f"the KV cache is {', '.join(label(kind) for kind in sorted(found))}",
            " or ".join(map(label, formats)),
            "build the bundle again",
        )
    kv_format = formats[found.pop()]
    if kv_format != "bf16":
        for kind, values, index in (("input", model.input, 0), ("output", model.output, 1)):
            wanted = [pair[index](i) for i in range(num_layers) for pair in _SCALES]
            _require(kind, {value.name for value in values}, wanted)
    return kv_format


def _require(kind: str, found: set[str], wanted: Sequence[str]) -> None:
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        raise GraphError(f"the graph has no {kind} {missing}", "a graph of target cuda", "build with --target cuda")


def _weight(initializer: Any) -> ExternalWeight:
    entries = {entry.key: entry.value for entry in initializer.external_data}
    shape = tuple(initializer.dims)
    nbytes = ITEM_BYTES[initializer.data_type] * math.prod(shape)
    try:
        location, offset = entries["location"], int(entries.get("offset", "0"))
        length = int(entries.get("length", str(nbytes)))
    except (KeyError, ValueError):
        raise GraphError(f"{initializer.name}: broken reference", "location, offset, length", "build again") from None
    if offset < 0:
        raise GraphError(f"{initializer.name}: offset={offset}", "0 or more", "build the bundle again")
    return ExternalWeight(initializer.name, shape, location, offset, length, initializer.data_type)


class GraphRunner(Protocol):
    """A loaded graph whose inputs and outputs are device addresses."""

    def bind_input(self, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        """Bind an input; it stays until it is bound anew."""
        ...

    def bind_output(self, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        """Bind an output; it stays until it is bound anew."""
        ...

    def run(self) -> None:
        """Enqueue the graph on the session's stream; does not wait for the device."""
        ...

    def close(self) -> None:
        """Give the graph back."""
        ...


class OrtRunner:
    """The graph in an `onnxruntime.InferenceSession` with the plugin library's ops.

    Args:
        graph: The model of `split_weights`.
        library: Path of the plugin library.
        device: The GPU's number.
        stream: All work goes there.

    Raises:
        MissingDependencyError: onnxruntime without CUDA, CUDA libraries missing, a plugin library without its ops.
        BundleError: ONNX Runtime refuses the graph, or would run a node on the CPU.
    """

    def __init__(self, graph: bytes, library: Path, device: int, stream: int) -> None:
        import onnxruntime as ort

        if _PROVIDER not in ort.get_available_providers():
            raise MissingDependencyError(
                f"onnxruntime {ort.__version__} has no {_PROVIDER}", "onnxruntime-gpu", _INSTALL
            )
        ort.set_default_logger_severity(_ERRORS)  # it warns of plugin providers that nobody asked for
        told = io.StringIO()  # preload_dlls prints, and stdout belongs to results
        with contextlib.redirect_stdout(told):
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.enable_mem_pattern = False
        options.log_severity_level = _ERRORS
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph is lowered already
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise MissingDependencyError(
                f"ONNX Runtime cannot use {library.name}: {error}",
                "a library of these sources",
                "run `python -m qwen_rt.plugins.build`",
            ) from None
        provider_options = {
            "device_id": str(device),
            "user_compute_stream": str(stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_use_max_workspace": "0",
        }
        try:
            session = ort.InferenceSession(graph, options, providers=[(_PROVIDER, provider_options)])
        except Exception as error:
            raise BundleError(
                f"ONNX Runtime {ort.__version__} refuses the graph: {error}",
                fix="build the bundle again, or install another onnxruntime-gpu",
            ) from None
        if session.get_providers()[:1] != [_PROVIDER]:
            raise MissingDependencyError(
                f"{_PROVIDER} of onnxruntime {ort.__version__} cannot be loaded; {told.getvalue()}",
                "its CUDA libraries",
                "pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )
        self._device = device
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session: Any = session
        self._io: Any = session.io_binding()

    def bind_input(self, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        """Bind an input; it stays until it is bound anew."""
        self._bind(self._io.bind_input, name, element_type, shape, address)

    def bind_output(self, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        """Bind an output; it stays until it is bound anew."""
        self._bind(self._io.bind_output, name, element_type, shape, address)

    def _bind(self, bind: Any, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        try:
            bind(name, "cuda", self._device, element_type, list(shape), address)
        except Exception as error:
            raise GraphError(f"{name}{list(shape)} cannot be bound: {error}", fix="build the bundle again") from None

    def run(self) -> None:
        """Enqueue the graph on the session's stream; does not wait for the device."""
        try:
            self._session.run_with_iobinding(self._io, self._run_options)
        except Exception as error:
            raise QwenRtError(f"ONNX Runtime failed: {error}") from None

    def close(self) -> None:
        """Give the graph back."""
        self._io = self._session = None
        gc.collect()  # the arena is the device's again before the next session looks at what is free


def bind_model(runner: GraphRunner, weights: Sequence[WeightTensor], base: int, workspace: tuple[int, int]) -> None:
    """Bind what stays the same in every call.

    Args:
        runner: The loaded graph.
        weights: All of them.
        base: Device address that their offsets count from.
        workspace: Its address and bytes.
    """
    for tensor in weights:
        source = tensor.source
        runner.bind_input(source.name, source.element_type, source.shape, base + tensor.address_offset)
    runner.bind_input(tensors.WORKSPACE, UINT8, (workspace[1],), workspace[0])


def bind_cache(runner: GraphRunner, kv_format: str, shape: Sequence[int], num_layers: int, address: int) -> None:
    """Bind the cache, layer by layer: pools of keys and values behind each other, then the scales of both if quantized.

    Args:
        runner: The loaded graph.
        kv_format: A key of `qwen_rt.ops.KV_CACHE_FORMATS`.
        shape: [blocks, Hkv, 64, D].
        num_layers: L.
        address: Of the first pool; `qwen_rt.runtime.cuda.memory.block_bytes` tells how many bytes follow.
    """
    parts = [(pair, _CACHE_TYPES[kv_format], tuple(shape)) for pair in _POOLS]
    if kv_format != "bf16":
        parts += [(pair, FLOAT, tuple(shape[:-1])) for pair in _SCALES]
    for layer in range(num_layers):
        for (past, present), element_type, size in parts:
            runner.bind_input(past(layer), element_type, size, address)
            runner.bind_output(present(layer), element_type, size, address)
            address += ITEM_BYTES[element_type] * math.prod(size)
