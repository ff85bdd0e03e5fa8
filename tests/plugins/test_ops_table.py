"""The op table: names, order, dims from shapes, and that the C side knows the same ops."""

from __future__ import annotations

import re

import pytest

from qwen_rt.errors import MissingDependencyError, UsageError
from qwen_rt.ops import (
    COUNTER_BYTES,
    INT8_ROWS,
    MAX_ROWS,
    OPS,
    SKINNY_ROWS,
    WEIGHT_FORMATS,
    OpTensor,
    find_op,
    shape_of,
)
from qwen_rt.plugins import build, library


def test_names_are_unique_and_found() -> None:
    assert len({op.name for op in OPS}) == len(OPS)
    assert all(find_op(op.name) is op for op in OPS)
    with pytest.raises(UsageError, match="op 'layer_norm'"):
        find_op("layer_norm")


EXTRA = {"half_dim": 2, "columns": 29, "zeros": 31}
"""Symbols that are no dims."""


def words_of(tensors) -> set[str]:
    return {word for tensor in tensors for size in tensor.shape for word in re.findall(r"[a-z_]\w*", size)}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_row_is_consistent(op) -> None:
    names = [tensor.name for tensor in op.tensors]
    assert len(set(names)) == len(names)
    inputs = {tensor.name: tensor for tensor in op.inputs}
    for tensor in op.outputs:
        if tensor.alias is not None:
            assert tensor.shape == inputs[tensor.alias].shape
            assert tensor.dtype == inputs[tensor.alias].dtype
    assert set(op.dims) - words_of(op.inputs) <= words_of(t for t in op.outputs if t.optional), (
        "a dim that nothing tells"
    )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_dims_come_back_from_the_shapes_of_the_inputs(op) -> None:
    primes = dict(zip(op.dims, (3, 5, 7, 11, 13, 17, 19, 23, 37), strict=False)) | EXTRA
    shapes = {tensor.name: shape_of(tensor.shape, primes) for tensor in op.tensors}
    expected = tuple(primes[dim] for dim in op.dims)
    assert op.dims_of(shapes) == expected

    def told_by(tensors) -> tuple[int, ...]:
        return tuple(primes[dim] if dim in words_of(tensors) else 0 for dim in op.dims)

    assert op.dims_of({tensor.name: shapes[tensor.name] for tensor in op.inputs}) == told_by(op.inputs)
    required = [tensor for tensor in op.tensors if not tensor.optional]
    assert op.dims_of({tensor.name: shapes[tensor.name] for tensor in required}) == told_by(required)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    op = find_op("down_residual")
    shapes = {"activation": (2, 64), "weight": (32, 64), "residual": (2, 32)}
    assert op.dims_of(shapes) == (2, 64, 32, 0)
    packed = {"weight": (32, 32), "scale": (32, 4), "zero_point": (32, 2), "perm": (64,)}
    assert op.dims_of(shapes | packed) == (2, 64, 32, 4)
    with pytest.raises(UsageError, match="perm has ffn = 63"):
        op.dims_of(shapes | packed | {"perm": (63,)})
    with pytest.raises(UsageError, match="residual has rows = 3"):
        op.dims_of(shapes | {"residual": (3, 32)})
    with pytest.raises(UsageError, match="weight has 3 axes"):
        op.dims_of(shapes | {"weight": (1, 32, 64)})
    with pytest.raises(UsageError, match="lacks weight"):
        op.dims_of({"activation": (2, 64), "residual": (2, 32)})


def test_the_c_side_has_the_same_ops_versions_and_dims() -> None:
    source = (build.SOURCES / "capi.cu").read_text("utf-8")
    entries = re.findall(r'\{"(\w+)", (\d+), (\d+), launch_(\w+), (\w+)\}', source)
    assert [(name, int(version), int(dims)) for name, version, dims, _, _ in entries] == [
        (op.name, op.version, len(op.dims)) for op in OPS
    ]
    for (name, _, _, launcher, workspace), op in zip(entries, OPS, strict=True):
        assert launcher == name
        assert workspace == (f"workspace_{name}" if op.has_workspace else "no_workspace")
    header = (build.SOURCES / "capi.h").read_text("utf-8")
    assert f"#define QWEN_RT_ABI {build.ABI}\n" in header
    assert f"#define QWEN_RT_COUNTER_BYTES {COUNTER_BYTES} " in header
    launch = (build.SOURCES / "common" / "launch.cuh").read_text("utf-8")
    assert f"constexpr int kMaxRows = {MAX_ROWS};\n" in launch
    skinny = (build.SOURCES / "common" / "skinny.cuh").read_text("utf-8")
    assert f"constexpr int kMostSkinnyRows = {SKINNY_ROWS};\n" in skinny
    assert f"constexpr int kInt8Rows = {INT8_ROWS};" in (build.SOURCES / "common" / "skinny.cu").read_text("utf-8")
    formats = (build.SOURCES / "common" / "skinny_format.cuh").read_text("utf-8")
    named = ", ".join(f"k{name.capitalize()} = {number}" for name, number in WEIGHT_FORMATS.items())
    assert f"enum class Format {{ {named} }};" in formats


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_kernels_number_tensors_and_dims_as_the_table(op) -> None:
    """Where a launcher names them: its enumerations have as many, in this order."""
    stem = "prefill" if op.name in ("o_proj_residual", "down_residual") else op.name
    file = next(path for path in build.SOURCES.rglob(f"{stem}.cu"))
    text = file.read_text("utf-8")
    enums = {
        name: re.sub(r"\s", "", body).split(",") for name, body in re.findall(r"enum (\w+) \{([^}]*)\}", text) if body
    }
    places = {word: words.index(word) for words in enums.values() for word in words}
    assert places["kNumTensors"] == len(op.tensors)
    if "Dim" in enums:
        assert places["kNumDims"] == len(op.dims)
    if "Attribute" in enums:
        assert places["kNumAttributes"] == len(op.attributes)
    for names, words in ((op.tensors, "Tensor"), (op.attributes, "Attribute")):
        for number, item in enumerate(names):
            name = item.name if isinstance(item, OpTensor) else item[0]
            wanted = "k" + "".join(part.capitalize() for part in name.split("_"))
            if words in enums and wanted in enums[words]:
                assert enums[words].index(wanted) == number, f"{file.name}: {wanted}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_a_kernel_file_whose_header_says_all(op) -> None:
    text = (build.SOURCES / "kernels" / f"{op.name}.cu").read_text("utf-8")
    for part in (
        "// Tensors",
        "// Dims:",
        "Numerics",
        "apping",
        "// Preconditions",
        "// Cost:",
        "// Reference:",
        "// Source:",
    ):
        assert part in text, f"{op.name}.cu lacks {part}"
    for tensor in op.tensors:
        assert re.search(rf"\b{tensor.name}\b", text), f"{op.name}.cu does not tell of {tensor.name}"


def test_what_cannot_be_built_or_loaded_is_said_in_a_line(monkeypatch, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"sms=\[70\]"):
        build.build((70,))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: (11, 8))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    with pytest.raises(MissingDependencyError, match=r"expected nvcc 12\.8 or newer"):
        build.build()
    with pytest.raises(MissingDependencyError, match="is not built"):
        library.load()
    broken = tmp_path / build.LIBRARY_NAME
    broken.write_bytes(b"no library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        library.PluginLibrary(broken)


def test_the_hash_covers_every_source(monkeypatch, tmp_path) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "kernels" / "a.cu").write_text("1")
    first = build.source_hash()
    (tmp_path / "b.cuh").write_text("2")
    second = build.source_hash()
    (tmp_path / "b.cuh").write_text("3")
    assert len({first, second, build.source_hash()}) == 3
