"""The graph of a layout against transformers: padding on either side, prompts and decode steps, many shapes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from qwen_rt.errors import UnsupportedModelError
from qwen_rt.export.layouts.folder import export_layout
from qwen_rt.tolerances import PARITY_RELATIVE_FP32

from ..cases import NUM_TOKENS, Case, Zoo
from ..compare import assert_close

NUM_PROMPT = 30
LENGTHS = (NUM_PROMPT, 17, 1)
"""Tokens of each row of a batch; the rest of NUM_PROMPT is padding."""


class Graph:
    """A session of `model.onnx` that keeps its cache between calls."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = {value.name: value.shape for value in self.session.get_outputs()}
        self.past = {
            name: np.zeros((batch_size, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.past}
        logits, *present = self.session.run(None, feed)
        self.past = dict(zip(self.past, present, strict=True))
        result: NDArray[np.float32] = logits
        return result


@pytest.fixture(scope="module", params=["heads-0.5b", "heads-72b", "odd", "one-layer", "yarn-options"])
def folder(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case, parent = zoo.case(request.param), tmp_path_factory.mktemp("layout")
    portable = Path(shutil.copytree(case.portable, parent / "portable"))
    _add_file(portable, "tokenizer.json", b"{}")
    export_layout(portable, parent / "out", "genai", max_length=64, quiet=True)
    return case, parent / "out"


def _add_file(portable: Path, name: str, data: bytes) -> None:
    """Put a file into a portable graph's folder, and into its manifest."""
    (portable / name).write_bytes(data)
    manifest = json.loads((portable / "manifest.json").read_bytes())
    manifest["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (portable / "manifest.json").write_text(json.dumps(manifest))


def test_names_and_shapes_are_those_that_the_libraries_look_for(folder: tuple[Case, Path]) -> None:
    case, out = folder
    graph, config = Graph(out, 1), json.loads((out / "genai_config.json").read_bytes())["model"]
    heads, size = case.shape.num_kv_heads, config["decoder"]["head_size"]
    assert list(graph.inputs.items())[:3] == [
        ("input_ids", ["batch_size", "sequence_length"]),
        ("attention_mask", ["batch_size", "total_sequence_length"]),
        ("position_ids", ["batch_size", "sequence_length"]),
    ]
    layers = range(case.shape.num_layers)
    past = {f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")}
    present = {f"present.{i}.{kind}" for i in layers for kind in ("key", "value")}
    assert set(graph.inputs) == {"input_ids", "attention_mask", "position_ids", *past}
    assert set(graph.outputs) == {"logits", *present}
    assert graph.outputs["logits"] == ["batch_size", "sequence_length", case.shape.vocab_size]
    assert all(graph.inputs[name] == ["batch_size", heads, "past_sequence_length", size] for name in past)
    assert all(graph.outputs[name] == ["batch_size", heads, "total_sequence_length", size] for name in present)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_row_gives_alone(folder: tuple[Case, Path], side: str) -> None:
    case, out = folder
    graph, num_rows = Graph(out, len(LENGTHS)), len(LENGTHS)
    mask = np.zeros((num_rows, NUM_PROMPT), np.int64)
    ids = np.full_like(mask, case.shape.vocab_size - 1)  # what stands in padding must not matter
    where = [slice(NUM_PROMPT - n, None) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (length, place) in enumerate(zip(LENGTHS, where, strict=True)):
        mask[row, place], ids[row, place] = 1, case.ids[:length]
    positions = np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 1)
    logits = graph.run(ids, mask, positions)
    assert np.isfinite(logits).all()
    found = [[logits[row, place]] for row, place in enumerate(where)]
    for step in range(NUM_TOKENS - NUM_PROMPT):
        mask = np.concatenate([mask, np.ones((num_rows, 1), np.int64)], axis=1)
        positions = np.array([[length + step] for length in LENGTHS])
        logits = graph.run(case.ids[positions], mask, positions)
        for row in range(num_rows):
            found[row].append(logits[row])
    for row, length in enumerate(LENGTHS):
        expected = case.logits[: length + NUM_TOKENS - NUM_PROMPT]
        assert_close(np.concatenate(found[row]), expected, relative=PARITY_RELATIVE_FP32)


def test_a_later_chunk_of_one_row(folder: tuple[Case, Path]) -> None:
    case, out = folder
    graph = Graph(out, 1)
    found = [
        graph.run(case.ids[None, start:stop], np.ones((1, stop), np.int64), np.arange(start, stop)[None])[0]
        for start, stop in ((0, 13), (13, NUM_TOKENS))
    ]
    assert_close(np.concatenate(found), case.logits, relative=PARITY_RELATIVE_FP32)


def test_optimum_takes_head_dim_for_granted(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(zoo.case("heads-72b").checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"head_dim=128 .* use --layout genai"):
        export_layout(checkpoint, tmp_path / "out", "optimum", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
