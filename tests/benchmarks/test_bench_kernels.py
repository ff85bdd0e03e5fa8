"""`bench kernels` without a GPU: what it hands to every op, its table, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qwen_rt.benchmarks import bench_kernels
from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.benchmarks.kernel_step import DecodeStep
from qwen_rt.errors import MissingDependencyError
from qwen_rt.ops import OPS, POLYMORPHIC, WEIGHT_FORMATS, find_op, shape_of

SHAPE = ModelShape(hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=1000)


DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f8": torch.float8_e4m3fn,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}


def names_of(dtype: str) -> tuple[str, ...]:
    return POLYMORPHIC.get(dtype, (dtype,))


class Recorder:
    """Stands in for the caller of ops: works out the dims as the real one does, and keeps them."""

    def __init__(self) -> None:
        self.dims: dict[str, list[dict[str, int]]] = {}

    def __call__(self, op: str, tensors: Mapping[str, Any], **attributes: float) -> None:
        row = find_op(op)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        assert set(shapes) <= {tensor.name for tensor in row.tensors}
        assert {name for name, default in row.attributes if default is None} <= set(attributes)
        dims = dict(zip(row.dims, row.dims_of(shapes), strict=True))
        for tensor in row.tensors:
            if tensor.name in shapes:
                assert tensors[tensor.name].dtype in {DTYPES[name] for name in names_of(tensor.dtype)}, tensor.name
                if not {"half_dim", "columns", "zeros"} & set(tensor.shape):
                    assert shape_of(tensor.shape, dims) == shapes[tensor.name]
        assert {t.name for t in row.outputs if not t.optional and t.alias is None} <= set(shapes)
        self.dims.setdefault(op, []).append(dims)


@pytest.mark.parametrize("precision", WEIGHT_FORMATS)
@pytest.mark.parametrize("op", bench_kernels.STEP_OPS)
def test_every_op_gets_what_the_table_says(op: str, precision: str) -> None:
    """Tensors without data, as if they lay on a GPU: names, dtypes and shapes are checked, nothing runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder: Any = Recorder()
    with FakeTensorMode():
        cases = bench_kernels.OpCases(recorder, SHAPE, 3, 100, precision)
        calls, _ = cases.prepare(op)
        for call in calls[:2]:
            call()
    dims = recorder.dims[op][0]
    assert dims["rows"] == 3
    assert dims.get("sequences", 3) == 3
    assert dims.get("hidden", 256) == 256
    assert dims.get("vocab", 1000) == 1000
    assert dims.get("head_dim", 64) == 64
    in_layers = op not in ("embed", "lm_head", "sample", "rope_kv_append_attention")
    columns = 512 if op == "down_residual" else 256
    if in_layers:
        assert dims["groups"] == {"bf16": 0, "fp8": 1, "int8": 1, "int4": columns // 128}[precision]
    else:
        assert dims.get("groups", 0) == 0


@pytest.mark.parametrize("precision", WEIGHT_FORMATS)
def test_the_floor_is_what_is_stored(precision: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        recorder: Any = Recorder()
        step = DecodeStep(recorder, SHAPE, precision=precision)
        stored = sum(matrix.nbytes for layer in step.layers for matrix in layer.values())
        assert stored + step.head.numel() * 2 == SHAPE.floor_bytes_at(precision)
    assert SHAPE.floor_bytes_at("bf16") == SHAPE.floor_bytes


def test_all_ops_of_the_table_are_timed() -> None:
    assert set(bench_kernels.STEP_OPS) == {op.name for op in OPS}


def test_a_line_of_the_table() -> None:
    metrics = {
        "time_us": {"median": 31.5},
        "alone_us": {"median": 33.25},
        "read_gb_s": 4310.7,
        "share_of_bandwidth_ratio": 0.9312,
        "share_of_roofline_ratio": 0.9345,
    }
    line = bench_kernels.op_line("7b", 1, 127, "down_residual", 135_790_592, metrics)
    assert line.split() == ["7b", "1", "127", "down_residual", "31.50", "33.25", "135.79", "4310.7", "93.1", "93.5"]
    assert len(line) == len(bench_kernels.OP_TITLES)


def test_a_gpu_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MissingDependencyError, match="is a CPU build"):
        bench_kernels.require_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="torch finds no GPU"):
        bench_kernels.require_gpu()
