"""Packed products compute the same; weights are addresses of files, in one piece where they lie so, else written."""

from __future__ import annotations

import ctypes
import gc
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import StorageError
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.passes.graph_tools import stored_elements
from qwen_rt.export.portable import checkpoint_locations
from qwen_rt.export.source import open_source
from qwen_rt.export.tensorrt import weights as weights_module
from qwen_rt.export.tensorrt.pack import Parts, pack_linears
from qwen_rt.export.tensorrt.weights import INLINE_BYTES, MappedWeights

from ..cases import Zoo
from ..export.ragged import RaggedModel
from ..export.test_lower_cuda import zoo_source
from ..export.test_lower_tensorrt import calls_of, on_ort

LENGTH = 80


def _lowered(source: Path, portable: Path, dtype: str = "float32") -> ir.Model:
    checkpoint = Checkpoint.open(source)
    exported, places = open_source(portable).load_graph(), checkpoint_locations(checkpoint)
    return lowered_graph(checkpoint, "tensorrt", LENGTH, places, exported, dtype=dtype)


def _joined(model: ir.Model, parts: Parts) -> ir.Model:
    """Put the bytes of packed matrices into the graph itself."""
    for name, pieces in parts.items():
        array = np.concatenate([stored_elements(piece) for piece in pieces])
        value = model.graph.initializers[name]
        assert value.shape is not None
        assert array.shape == tuple(value.shape)
        value.const_value = ir.tensor(array, name=name)
    return model


@pytest.mark.parametrize("name", ["heads-0.5b", "heads-7b", "mha", "odd", "yarn"])
def test_packed_products_compute_the_same(name: str, zoo: Zoo) -> None:
    """Every cache and every logit of a ragged batch, to the last bits of a float32 sum."""
    case, source = zoo.case(name), zoo_source(zoo, name)
    plain = _lowered(case.checkpoint, case.portable)
    packed = _lowered(case.checkpoint, case.portable)
    parts = pack_linears(packed)
    if case.shape.dtype == "float32":
        assert len(parts) == 2 * source.spec.num_layers
    else:
        assert not parts, "a matrix that is cast is not packed"
        return
    models = [
        RaggedModel(on_ort(model, case.checkpoint), source.spec, 4, LENGTH) for model in (plain, _joined(packed, parts))
    ]
    for call in calls_of(source.spec.vocab_size):
        first, second = (model.call(call, padding=1) for model in models)
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-5 * float(np.abs(first).max()))
    for past, array in models[0].caches.items():
        np.testing.assert_allclose(models[1].caches[past], array, rtol=0, atol=1e-5 * float(np.abs(array).max()))


def test_what_is_packed(nano_portable: Path) -> None:
    """q, k, v and gate, up, in the order in which they lie; names say so."""
    checkpoint = Checkpoint.open("nano")
    model = _lowered(checkpoint.path, nano_portable, "bfloat16")
    before = Counter(node.op_type for node in model.graph)
    parts = pack_linears(model)
    after = Counter(node.op_type for node in model.graph)
    assert before["Gemm"] - after["Gemm"] == 3 * 4
    assert after["Split"] == 2 * 4
    assert len(parts) == 2 * 4
    for name, pieces in parts.items():
        places = [(str(piece.path), piece.offset) for piece in pieces]
        assert places == sorted(places)
        members = {str(piece.name).split(".")[-2].removesuffix("_proj") for piece in pieces}
        assert set(name.split(".")[-2].removesuffix("_proj").split("_")) == members
        assert members in ({"q", "k", "v"}, {"gate", "up"})
        assert all(str(piece.name) not in model.graph.initializers for piece in pieces)
    ir.serde.serialize_model(model)
    assert not pack_linears(model), "once"


# ---------------------------------------------------------------- addresses


def _model(*tensors: ir.TensorProtocol) -> ir.Model:
    values = [
        ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        for tensor in tensors
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}, name="weights")
    return ir.Model(graph, ir_version=11)


def _reference(file: Path, name: str, offset: int, rows: int, columns: int = 16) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        file.name,
        offset,
        4 * rows * columns,
        ir.DataType.FLOAT,
        shape=ir.Shape([rows, columns]),
        name=name,
        base_dir=file.parent,
    )


def _bytes(weights: MappedWeights, name: str) -> bytes:
    address, nbytes = weights.addresses[name]
    return ctypes.string_at(address, nbytes)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    file = tmp_path / "shard"
    file.write_bytes(np.random.default_rng(0).bytes(100_000))
    return file


def test_addresses_of_files(shard: Path, tmp_path: Path) -> None:
    """Neighbours are one piece and nothing is written; others are put behind each other."""
    data = shard.read_bytes()
    neighbours = (_reference(shard, "a", 1001, 3), _reference(shard, "b", 1001 + 192, 2))
    apart = (_reference(shard, "c", 4000, 3), _reference(shard, "d", 9000, 1))
    whole = _reference(shard, "alone", 77, 5)
    numbers = np.arange(5000, dtype=np.float32)
    made = ir.LazyTensor(lambda: ir.tensor(numbers), ir.DataType.FLOAT, ir.Shape([5000]), name="made")
    small = ir.tensor(np.zeros(INLINE_BYTES // 4, np.float32), name="small")
    joined = [_reference(shard, name, 0, rows) for name, rows in (("near", 5), ("far", 4))]
    parts = {"near": neighbours, "far": apart}
    told: list[int] = []
    with MappedWeights(_model(whole, *joined, made, small), parts, tmp_path, told.append) as weights:
        assert set(weights.addresses) == {"alone", "near", "far", "made"}
        assert _bytes(weights, "alone") == data[77 : 77 + 320]
        assert _bytes(weights, "near") == data[1001 : 1001 + 320]
        assert _bytes(weights, "far") == data[4000:4192] + data[9000:9064]
        assert _bytes(weights, "made") == numbers.tobytes()
        assert weights.nbytes == 320 + 320 + 256 + 20_000
        assert sum(told) == 256 + 20_000
        assert weights.addresses["far"][0] % 64 == 0
        assert [path.name for path in tmp_path.iterdir()] == ["shard"], "the file has no name"
    assert not weights.addresses


def test_one_address_has_one_size(shard: Path, tmp_path: Path) -> None:
    """TensorRT takes two weights at one address for one: a tied head's first rows are copied."""
    model = _model(
        _reference(shard, "table", 512, 6), _reference(shard, "head", 512, 3), _reference(shard, "x", 512, 6)
    )
    with MappedWeights(model, {}, tmp_path) as weights:
        assert weights.addresses["table"] == weights.addresses["x"]
        assert weights.addresses["head"][0] != weights.addresses["table"][0]
        assert _bytes(weights, "head") == _bytes(weights, "table")[:192]


def test_the_hash_is_of_names_and_bytes(shard: Path, tmp_path: Path) -> None:
    def digest(*tensors: ir.ExternalTensor, parts: Parts | None = None) -> str:
        with MappedWeights(_model(*tensors), parts or {}, tmp_path) as weights:
            return weights.sha256()

    one, two = _reference(shard, "a", 0, 4), _reference(shard, "b", 4096, 4)
    first = digest(one, two)
    assert first == digest(two, one)
    assert first != digest(one)
    assert first != digest(_reference(shard, "a", 4096, 4), _reference(shard, "b", 0, 4))
    assert first != digest(_reference(shard, "a", 0, 8, 8), two)
    copy = tmp_path / "copy"
    copy.write_bytes(shard.read_bytes())
    assert first == digest(_reference(copy, "a", 0, 4), two), "wherever they lie"
    pieces = (_reference(shard, "p", 0, 1), _reference(shard, "q", 64, 3))
    assert first == digest(one, two, parts={"a": pieces})


def test_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "RELEASE_BYTES", 1 << 20)
    file = tmp_path / "shard"
    file.write_bytes(os.urandom(1 << 20) * 24)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_bytes().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    before = resident()
    with MappedWeights(_model(_reference(file, "a", 0, 24 << 14)), {}, tmp_path) as weights:
        first = _bytes(weights, "a")
        assert resident() - before > 20 << 20
        weights.release()
        assert resident() - before < 4 << 20
        assert _bytes(weights, "a") == first


def test_a_shard_that_ends_too_early(shard: Path, tmp_path: Path) -> None:
    parts = {"a": (_reference(shard, "p", 99_990, 1), _reference(shard, "q", 0, 1))}
    with pytest.raises(StorageError, match="ends too early"):
        MappedWeights(_model(_reference(shard, "a", 0, 2)), parts, tmp_path)
