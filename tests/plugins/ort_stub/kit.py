"""Graphs of one op or a few, run by ONNX Runtime's CPU provider on host memory bound by address."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from qwen_rt.ops import DOMAIN, OpTensor, PluginOp, shape_of
from qwen_rt.plugins import build

ELEMENT_TYPES = {"bf16": 16, "f16": 10, "f32": 1, "i32": 6, "i64": 7, "u8": 2, "i8": 3, "f8": 17}
ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "u8": 1, "i8": 1, "f8": 1}
CONCRETE = {"weight": "f8", "scale": "f32", "zero": "i8", "cache": "i8"}
"""Dtype of the table that stands for several → the one that a case takes unless told otherwise."""
EXTRA = {"half_dim": 2, "columns": 6, "zeros": 4}
"""Symbols that are no dims."""
WORKSPACE = OpTensor("workspace", "u8", ("W",))
PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29)
UNTOLD = {"ring"}  # dims that only outputs tell: no graph can have those outputs


class Stub:
    """The compiled binding; what the stubbed kernels were called with."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.stub_log.restype = ctypes.c_char_p
        self.library.RegisterCustomOps.restype = ctypes.c_void_p

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.library.stub_log().decode().splitlines()]

    def call(self) -> dict[str, Any]:
        (only,) = self.calls()
        return only

    def fail(self, op: str, status: int, message: str) -> None:
        self.library.stub_fail(op.encode(), status, message.encode())


def compile_stub(folder: Path) -> Stub:
    """Compile the binding and the stub of the kernels for the CPU provider."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    (folder / "op_table.inc").write_text(build.op_table(), encoding="utf-8")
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")
    define = '-DQWEN_RT_ORT_PROVIDER="CPUExecutionProvider"'
    sources = (build.SOURCES / "ort" / "binding.cpp", Path(__file__).with_name("stub.cpp"))
    target = folder / "libstub.so"
    done = subprocess.run(
        [compiler, *flags, define, f"-I{build.SOURCES}", f"-I{folder}", *map(str, sources), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Stub(target)


def dtype_of(tensor: OpTensor) -> str:
    """The concrete dtype of a tensor."""
    return CONCRETE.get(tensor.dtype, tensor.dtype)


def node(op: PluginOp, inputs: Sequence[str], outputs: Sequence[str], **attributes: float) -> Any:
    return helper.make_node(op.name, inputs, outputs, domain=DOMAIN, name=f"/{outputs[0]}", **attributes)


def open_session(
    stub: Stub,
    nodes: Sequence[Any],
    inputs: Mapping[str, OpTensor],
    outputs: Mapping[str, OpTensor],
    inner: Mapping[str, tuple[OpTensor, Sequence[int | str]]] | None = None,
) -> ort.InferenceSession:
    """A session over the nodes; inputs and outputs have types and no shapes, so that any can be bound."""

    def infos(values: Mapping[str, OpTensor]) -> list[Any]:
        return [helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype_of(t)], None) for name, t in values.items()]

    graph = helper.make_graph(nodes, "graph", infos(inputs), infos(outputs))
    for name, (tensor, shape) in (inner or {}).items():
        graph.value_info.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype_of(tensor)], shape))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return session_of(stub, model)


def session_of(stub: Stub, model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(stub.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Buffers:
    """Host memory by tensor name, random bytes, bound by address."""

    def __init__(self, tensors: Mapping[str, OpTensor], shapes: Mapping[str, Sequence[int]]) -> None:
        random = np.random.default_rng(7)
        self.tensors, self.shapes = dict(tensors), {name: tuple(shapes[name]) for name in tensors}
        self.data = {
            name: random.integers(1, 256, math.prod(self.shapes[name]) * ITEM_BYTES[dtype_of(tensor)], np.uint8)
            for name, tensor in tensors.items()
        }

    def share(self, name: str, other: str) -> None:
        self.data[name] = self.data[other]

    def address(self, name: str) -> int:
        return int(self.data[name].ctypes.data) if name in self.data else 0

    def bind(self, how: Any, name: str) -> None:
        element_type = ELEMENT_TYPES[dtype_of(self.tensors[name])]
        how(name, "cpu", 0, element_type, list(self.shapes[name]), self.address(name))

    def run(self, session: ort.InferenceSession) -> None:
        io = session.io_binding()
        for value in session.get_inputs():
            self.bind(io.bind_input, value.name)
        for value in session.get_outputs():
            self.bind(io.bind_output, value.name)
        session.run_with_iobinding(io)


class Case:
    """One node of an op with some tensors left out."""

    def __init__(
        self,
        op: PluginOp,
        absent: Sequence[str] = (),
        dims: Mapping[str, int] | None = None,
        workspace_bytes: int | None = 96,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        self.op = op
        symbols = dict(zip(op.dims, PRIMES, strict=False)) | EXTRA | dict(dims or {})
        types = dict(dtypes or {})
        named = [dataclasses.replace(tensor, dtype=types.get(tensor.name, tensor.dtype)) for tensor in op.tensors]
        count = len(op.inputs)
        self.inputs = [tensor for tensor in named[:count] if tensor.name not in absent]
        self.outputs = [tensor for tensor in named[count:] if tensor.name not in absent]
        shapes = {tensor.name: shape_of(tensor.shape, symbols) for tensor in op.tensors}
        given = {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}
        self.input_names = [tensor.name if tensor.name in given else "" for tensor in op.inputs]
        if op.has_workspace and workspace_bytes is not None:
            given["workspace"], shapes["workspace"] = WORKSPACE, (workspace_bytes,)
            self.input_names.append("workspace")
        self.buffers = Buffers(given, shapes)
        for tensor in self.outputs:
            if tensor.alias is not None and not tensor.may_alias:
                self.buffers.share(tensor.name, tensor.alias)

    def open(self, stub: Stub, trim: bool = False, **attributes: float) -> ort.InferenceSession:
        there = {tensor.name for tensor in self.outputs}
        outputs = [tensor.name if tensor.name in there else "" for tensor in self.op.outputs]
        names = list(self.input_names)
        while trim and not names[-1]:
            names.pop()
        while trim and not outputs[-1]:
            outputs.pop()
        inputs = {name: self.buffers.tensors[name] for name in names if name}
        return open_session(
            stub,
            [node(self.op, names, outputs, **attributes)],
            inputs,
            {tensor.name: tensor for tensor in self.outputs},
        )

    @property
    def dims(self) -> list[int]:
        told = {tensor.name for tensor in self.inputs}
        return list(self.op.dims_of({name: shape for name, shape in self.buffers.shapes.items() if name in told}))

    @property
    def addresses(self) -> list[int]:
        return [self.buffers.address(tensor.name) for tensor in self.op.tensors]


class OldRuntime:
    """An OrtApiBase of another version, whose OrtApi can make a status and nothing else."""

    def __init__(self, version: str, versions: Sequence[int]) -> None:
        self.messages: list[str] = []
        status = ctypes.create_string_buffer(8)

        def create_status(code: int, message: bytes) -> int:
            self.messages.append(message.decode())
            return ctypes.addressof(status)

        self.api = (ctypes.c_void_p * 102)()
        made = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
        self.api[0] = ctypes.cast(made, ctypes.c_void_p).value
        address = ctypes.addressof(self.api)
        self.asked: list[int] = []

        def get_api(number: int) -> int | None:
            self.asked.append(number)
            return address if number in versions else None

        get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(get_api)
        text = ctypes.create_string_buffer(version.encode())
        tell = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
        self.base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get, tell)))
        self.kept = (made, get, tell, text, status)


def untold(op: PluginOp) -> list[str]:
    return [tensor.name for tensor in op.outputs if UNTOLD & set(tensor.shape)]


def required_attributes(op: PluginOp) -> dict[str, float]:
    return {name: 0.25 * (i + 1) for i, (name, default) in enumerate(op.attributes) if default is None}


def sum_of_inputs(op: PluginOp, data: Mapping[str, np.ndarray], case: Case) -> int:
    """What the stub adds up: it takes a tensor of any type for one of bytes, and knows no symbols that are no dims."""
    total = 0
    for tensor in op.inputs:
        if not EXTRA.keys() & set(tensor.shape):
            known = math.prod(case.buffers.shapes[tensor.name]) * ITEM_BYTES.get(tensor.dtype, 1)
            total += int(data[tensor.name][:known].sum())
    return total
