"""The plugin library around a stub of the kernels, and TensorRT's descriptions of tensors on host memory."""

from __future__ import annotations

import json
import operator
import shutil
import subprocess
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.ops import OPS, OpTensor, PluginOp
from qwen_rt.plugins import build
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.plugins.tensorrt.plugin import INPUT_NAMES, OUTPUT_NAMES, NodeSettings, plugin_class

from ..ort_stub.kit import Case, dtype_of, required_attributes

TYPES = {
    "bf16": "BF16", "f16": "HALF", "f32": "FLOAT", "i32": "INT32", "i64": "INT64", "u8": "UINT8", "i8": "INT8",
    "f8": "FP8",
}  # fmt: skip


class Stub(PluginLibrary):
    """A `PluginLibrary` that launches nothing: what it was called with, and failures to order."""

    def __init__(self, path: Path) -> None:
        import ctypes

        super().__init__(path, check_sources=False)
        self._library.stub_log.restype = ctypes.c_char_p

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._library.stub_log().decode().splitlines()]

    def call(self) -> dict[str, Any]:
        (only,) = self.calls()
        return only

    def clear(self) -> None:
        self._library.stub_clear()

    def fail(self, op: str, status: int, message: str) -> None:
        self._library.stub_fail(op.encode(), status, message.encode())


def compile_library(folder: Path) -> Stub:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    (folder / "op_table.inc").write_text(build.op_table(), encoding="utf-8")
    ops = ",".join(f"{op.name}:{op.version}" for op in OPS)
    info = f'-DSTUB_BUILD_INFO="abi={build.ABI} sources=stub sms=90 nvcc=0.0 ops={ops}"'
    here = Path(__file__).parent
    sources = (here.parent / "ort_stub" / "stub.cpp", here / "library.cpp")
    target = folder / "libstub.so"
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
    done = subprocess.run(
        [compiler, *flags, info, f"-I{build.SOURCES}", f"-I{folder}", *map(str, sources), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Stub(target)


def fields_of(op: PluginOp, case: Case, **attributes: float) -> dict[str, Any]:
    """What a node of a case says of itself."""
    names = {
        INPUT_NAMES: ",".join(tensor.name for tensor in case.inputs),
        OUTPUT_NAMES: ",".join(tensor.name for tensor in case.outputs),
    }
    return names | required_attributes(op) | attributes


class Layer:
    """A plugin of a case, called as TensorRT calls it."""

    def __init__(self, trt: Any, stub: Stub, case: Case, **attributes: float) -> None:
        self.trt, self.case, self.fills = trt, case, []
        made = plugin_class(trt, case.op, stub, lambda *arguments: self.fills.append(arguments))
        self.plugin = made(NodeSettings.from_fields(case.op, fields_of(case.op, case, **attributes)))

    def describe(self, tensor: OpTensor) -> Any:
        desc = self.trt.PluginTensorDesc()
        desc.dims = self.trt.Dims(self.case.buffers.shapes[tensor.name])
        desc.type = getattr(self.trt.DataType, TYPES[dtype_of(tensor)])
        desc.format = self.trt.TensorFormat.LINEAR
        return desc

    def dynamic(self, tensor: OpTensor) -> Any:
        desc = self.describe(tensor)
        return types.SimpleNamespace(desc=desc, max=desc.dims, min=desc.dims, opt=desc.dims)

    def enqueue(self, workspace: int = 1 << 20, stream: int = 77) -> None:
        case = self.case
        self.plugin.enqueue(
            [self.describe(tensor) for tensor in case.inputs],
            [self.describe(tensor) for tensor in case.outputs],
            [case.buffers.address(tensor.name) for tensor in case.inputs],
            [case.buffers.address(tensor.name) for tensor in case.outputs],
            workspace,
            stream,
        )


class Expr:
    """TensorRT's IDimensionExpr with its value known to the test alone."""

    def __init__(self, value: int) -> None:
        self.value = value


class ExprBuilder:
    """TensorRT's IExprBuilder, which only TensorRT can make."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self.operations = {kinds.SUM: operator.add, kinds.SUB: operator.sub, kinds.PROD: operator.mul}

    def constant(self, value: int) -> Expr:
        return Expr(value)

    def operation(self, kind: Any, a: Expr, b: Expr) -> Expr:
        return Expr(self.operations[kind](a.value, b.value))


def with_exprs(trt: Any) -> Any:
    """TensorRT's module, but for a DimsExprs that holds an `Expr`."""
    names = [name for name in dir(trt) if not name.startswith("_")]
    return types.SimpleNamespace(**{name: getattr(trt, name) for name in names} | {"DimsExprs": lambda n: [None] * n})


def exprs(shape: Sequence[int]) -> list[Expr]:
    return [Expr(size) for size in shape]
