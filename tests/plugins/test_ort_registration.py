"""Registration of the custom ops with ONNX Runtime: versions, threads, whole graphs; around a stub of the kernels."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qwen_rt import tensors
from qwen_rt.bundle import GRAPH_FILE
from qwen_rt.ops import find_op
from qwen_rt.plugins import build

from .ort_stub.kit import (
    Case,
    OldRuntime,
    Stub,
    session_of,
    sum_of_inputs,
)

CACHE_PAIRS = ((tensors.present_key, tensors.past_key), (tensors.present_value, tensors.past_value))


@pytest.mark.parametrize(
    ("version", "versions"),
    [("1.23.2", range(1, 24)), ("0.9.0", [1]), ("2.0.0", [1, 40]), ("nightly", range(1, 99))],
)
def test_an_onnx_runtime_that_cannot_run_the_ops_is_told_so(stub: Stub, version: str, versions: Sequence[int]) -> None:
    old = OldRuntime(version, versions)
    assert stub.library.RegisterCustomOps(None, old.base) is not None
    (message,) = old.messages
    assert f"ONNX Runtime {version} cannot run these ops; expected 1.24 or newer" in message
    assert "\n" not in message
    assert old.asked == ([24, 1] if version == "2.0.0" else [1])  # asking for too much is a line on stderr


def test_a_runtime_that_cannot_even_make_a_status_gets_no_ops(stub: Stub) -> None:
    old = OldRuntime("0.1", [])
    assert stub.library.RegisterCustomOps(None, old.base) is None
    assert old.messages == []


def test_sessions_share_the_ops_from_many_threads(stub: Stub) -> None:
    op = find_op("down_residual")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            case = Case(op, dims={"rows": number + 1})
            session = case.open(stub)
            for _ in range(20):
                case.buffers.run(session)
            expected = sum_of_inputs(op, case.buffers.data, case) % 256
            np.testing.assert_array_equal(case.buffers.data["out"], expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted({call["dims"][0] for call in stub.calls()}) == [1, 2, 3, 4, 5, 6]
    assert len(stub.calls()) == 120


def test_an_exported_graph_runs_op_by_op(stub: Stub, nano_portable: Path, tmp_path: Path) -> None:
    from qwen_rt.export.build import BuildOptions
    from qwen_rt.export.build import build as build_bundle

    build_bundle(nano_portable, tmp_path / "cuda", BuildOptions(target="cuda", quiet=True))
    model = onnx.load(tmp_path / "cuda" / GRAPH_FILE, load_external_data=False)
    external = [weight for weight in model.graph.initializer if weight.external_data]
    inputs = {value.name for value in model.graph.input}
    for weight in external:
        model.graph.initializer.remove(weight)
        if weight.name not in inputs:
            model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    session = session_of(stub, model)
    sizes = {"R": 5, "B": 2, "B + 1": 3, "max_blocks": 4, "blocks": 3, "W": 96}
    kept, io = {}, session.io_binding()
    dtypes = {"tensor(bfloat16)": (16, 2), "tensor(float)": (1, 4), "tensor(uint8)": (2, 1)}
    dtypes |= {"tensor(int32)": (6, 4), "tensor(int64)": (7, 8)}
    layers = len([name for name in inputs if name.startswith("past_") and name.endswith(".key")])
    shared = {present(i): past(i) for i in range(layers) for present, past in CACHE_PAIRS}
    edges = [(value, io.bind_input) for value in session.get_inputs()]
    edges += [(value, io.bind_output) for value in session.get_outputs()]
    for value, bind in edges:
        shape = [sizes.get(size, size) for size in value.shape]
        element_type, item_bytes = dtypes[value.type]
        name = shared.get(value.name, value.name)
        data = kept.setdefault(name, np.zeros(math.prod(shape) * item_bytes, np.uint8))
        bind(value.name, "cpu", 0, element_type, shape, data.ctypes.data)
    session.run_with_iobinding(io)
    calls = stub.calls()
    assert [call["op"] for call in calls] == [node.op_type for node in model.graph.node]
    assert len(calls) == 5 * layers + 2
    rows = [call["dims"][0] for call in calls]
    assert rows == [5] * (len(calls) - 3) + [2] * 3  # behind the last projection: one row of each sequence
    residuals = [call["tensors"] for call in calls if call["op"] in ("o_proj_residual", "down_residual")]
    assert all(tensors[2] == tensors[-1] for tensors in residuals), "a residual that is copied"


def test_entries_are_declared_at_their_positions() -> None:
    """The padding of OrtApi adds up, and the binding calls nothing that is not declared."""
    header = (build.SOURCES / "ort" / "ort_abi.h").read_text(encoding="utf-8")
    binding = (build.SOURCES / "ort" / "binding.cpp").read_text(encoding="utf-8")
    table = header[header.index("struct OrtApi {") : header.index("#define QWEN_RT_AT(")]
    position, positions = 0, {}
    for line in re.sub(r"/\*.*?\*/", "", table, flags=re.DOTALL).split(";"):
        if found := re.search(r"\(\*(\w+)\)", line):
            positions[found[1]] = position
            position += 1
        elif found := re.search(r"unused_(\d+)(?:\[(\d+)\])?", line):
            assert int(found[1]) == position, line
            position += int(found[2] or 1)
    checked = {name: int(number) for name, number in re.findall(r"QWEN_RT_AT\((\w+), (\d+)\)", header)}
    assert checked.items() <= positions.items()
    used = set(re.findall(r"ort(?:->|\.)(\w+)\(", binding))
    assert {"CreateStatus", "KernelContext_GetOutput"} < used <= set(positions)
