"""What `inspect` counts, checked against the checkpoint itself; and that it never reads a weight."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from qwen_rt.bundle import GRAPH_FILE, Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import BundleError
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.inspection import Inspection, inspect
from qwen_rt.progress import format_count

from ..cli.kit import NANO_FOLDER, SHARDS, copy_nano, rehash, shared_bundle, shared_graph


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_bundle(self_contained=True), tmp_path / "packed"))


def _sizes(found: Inspection) -> dict[str, tuple[int, int, list[str]]]:
    return {row.name: (row.num_parameters, row.nbytes, sorted(row.dtypes)) for row in found.layers}


def test_rows_add_up_to_the_model() -> None:
    checkpoint = Checkpoint.open("nano")
    refs = checkpoint.tensors
    names = checkpoint.spec.parameters()
    expected: dict[str, tuple[int, int, list[str]]] = {}
    for row in ("outside", "0", "1", "2", "3"):
        inside = [n for n in names if (f"layers.{row}." in n) or (row == "outside" and ".layers." not in n)]
        nbytes = sum(refs[name].nbytes for name in inside)
        expected[row] = (nbytes // 2, nbytes, ["BF16"])
    for folder in ("nano", NANO_FOLDER, shared_bundle(), shared_bundle(self_contained=True), shared_graph()):
        found = inspect(folder)
        assert _sizes(found) == expected, folder
    assert sum(count for count, _, _ in expected.values()) == checkpoint.spec.num_parameters


def test_files_are_those_on_disk(packed: Path) -> None:
    found = inspect(packed)
    assert found.files == {
        str(path.relative_to(packed)): path.stat().st_size
        for path in packed.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(inspect("nano").files) == set(SHARDS)


def test_operators_are_those_of_the_graph(packed: Path) -> None:
    graph = onnx.load_model(str(packed / GRAPH_FILE), load_external_data=False).graph
    found = inspect(packed)
    assert sum(found.operators.values()) == len(graph.node) == sum(row.num_nodes for row in found.layers)
    assert found.operators["GroupQueryAttention"] == 4
    assert list(found.operators.values()) == sorted(found.operators.values(), reverse=True)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Files of the right size whose data is a hole: a 72B checkpoint takes no time."""
    checkpoint = copy_nano(tmp_path / "checkpoint")
    for name in SHARDS:
        size = (checkpoint / name).stat().st_size
        with open(checkpoint / name, "r+b") as file:
            file.truncate(8192)
            file.truncate(size)
    assert _sizes(inspect(checkpoint)) == _sizes(inspect("nano"))


def test_a_folder_with_a_manifest_is_a_bundle_though_it_has_a_config(packed: Path) -> None:
    assert (packed / "config.json").is_file()
    assert inspect(packed).kind == "bundle"
    (packed / "manifest.json").unlink()
    assert inspect_kind_or_error(packed) == "CheckpointError"


def inspect_kind_or_error(folder: Path) -> str:
    try:
        return inspect(folder).kind
    except Exception as error:
        return type(error).__name__


def test_a_graph_that_does_not_fit_the_model(packed: Path) -> None:
    model = onnx.load_model(str(packed / GRAPH_FILE), load_external_data=False)
    model.graph.node[5].name = "/model/layers.4/mlp/MatMul"
    (packed / GRAPH_FILE).write_bytes(model.SerializeToString())
    rehash(packed, GRAPH_FILE)
    with pytest.raises(BundleError, match="of layer 4, the model has 4 layers"):
        inspect(packed)


@pytest.mark.parametrize(
    ("target", "precision", "options", "dtypes"),
    [
        ("cpu", "int4", {"symmetric": False, "lm_head": "int8"}, ["BF16", "int4"]),
        ("cpu", "int8", {"embedding": "fp8"}, ["BF16", "int8"]),  # the graph names its bytes twice: rows, and numbers
        ("cuda", "fp8", {}, ["BF16", "fp8"]),
    ],
)
def test_quantized_matrices_are_as_large_as_they_are_stored(
    target: str, precision: str, options: dict[str, Any], dtypes: list[str], tmp_path: Path
) -> None:
    quantize = QuantizeOptions(**options)
    asked = BuildOptions(
        target=target, precision=precision, quantize=quantize, self_contained=True, gate=False, quiet=True
    )
    build(shared_graph(), tmp_path / "out", asked)
    stored = Bundle.open(tmp_path / "out", "size").tensors()
    found = inspect(tmp_path / "out")
    for row in found.layers:
        inside = [n for n in stored if (f"layers.{row.name}." in n) or (row.name == "outside" and ".layers." not in n)]
        assert row.nbytes == sum(stored[name].nbytes for name in inside), row.name
        assert row.name == "outside" or sorted(row.dtypes) == dtypes
    assert sum(row.num_parameters for row in found.layers) == found.model.num_parameters
    assert (
        found.facts["weights"]
        == f"{precision}, {format_count(sum(r.nbytes for r in found.layers), 'B')}, in this folder"
    )


def test_weights_in_two_places(tmp_path: Path) -> None:
    build(shared_graph(), tmp_path / "out", BuildOptions(precision="int8", gate=False, quiet=True))
    embedding = Checkpoint.open("nano").tensors["model.embed_tokens.weight"]
    own = sum(row.nbytes for row in inspect(tmp_path / "out").layers) - embedding.nbytes
    there = format_count(embedding.nbytes, "B")
    expected = f"int8, {format_count(own, 'B')} in this folder, {there} in {embedding.path.parent}"
    assert inspect(tmp_path / "out").facts["weights"] == expected


def test_other_dtypes_are_named(packed: Path) -> None:
    model = onnx.load_model(str(packed / GRAPH_FILE), load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT8E4M3FN
    for tensor in model.graph.initializer:
        if tensor.name == "model.norm.weight":
            tensor.data_type = onnx.TensorProto.FLOAT
    (packed / GRAPH_FILE).write_bytes(model.SerializeToString())
    rehash(packed, GRAPH_FILE)
    found = inspect(packed).layers[0].dtypes
    assert {"F32", "F8_E4M3"} <= found


def test_json_ready(packed: Path) -> None:
    import json

    found = inspect(packed)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["path"] == os.fspath(packed)
    assert document["model"]["hidden_size"] == 512
    assert document["layers"][0]["dtypes"] == ["BF16"]
