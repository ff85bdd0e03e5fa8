"""Whole checkpoints with quantized matrices: what is opened, ignored, read by rows, and told apart by fingerprint."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, QwenRtError
from qwen_rt.foreign import ForeignMatrix
from qwen_rt.inspection import inspect
from qwen_rt.quantization import QuantizedTensor, Scheme
from qwen_rt.row_reader import CheckpointRows
from qwen_rt.safetensors_header import read_header, write_header
from qwen_rt.spec import ModelSpec

from . import layouts
from .kit import CONFIG, NAME, open_refusal, refusal, write_checkpoint, write_matrix
from .layouts import Written


def quantize_all(name: str, rows: int, columns: int) -> Written | None:
    """Int4 with an act-order for the projections; the head stays in float16."""
    if name == "lm_head.weight":
        return None
    return layouts.gptq(rows, columns, act_order=True, seed=len(name))


def add_tensors(folder: Path, added: dict[str, tuple[str, NDArray[Any]]]) -> None:
    """Write the shard of a checkpoint anew with more tensors, or others in their place."""
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    entries = [(name, dtype, array.shape, array.tobytes()) for name, (dtype, array) in added.items()]
    for ref in read_header(shard).tensors.values():
        if ref.name not in added:
            entries.append((ref.name, ref.dtype, ref.shape, data[ref.offset : ref.offset + ref.nbytes]))
    header, _ = write_header([(name, dtype, shape) for name, dtype, shape, _ in entries])
    shard.write_bytes(header + b"".join(raw for *_, raw in entries))


class TestOpen:
    def test_parameters_are_floats_or_quantized(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.spec == ModelSpec.from_config(CONFIG)
        assert checkpoint.tensors.keys() | checkpoint.quantized.keys() == checkpoint.spec.parameters().keys()
        assert not checkpoint.tensors.keys() & checkpoint.quantized.keys()
        assert len(checkpoint.quantized) == 7
        assert "lm_head.weight" in checkpoint.tensors
        assert checkpoint.ignored == checkpoint.unexpected == ()
        matrix = checkpoint.quantized["model.layers.0.mlp.down_proj.weight"]
        assert matrix.shape == (64, 96)
        assert matrix.scheme == Scheme("int4", 32, symmetric=False, permuted=True)
        assert checkpoint.read("model.norm.weight").shape == (64,)

    def test_opening_reads_no_data(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        shard = tmp_path / "model.safetensors"
        header = read_header(shard)
        with shard.open("r+b") as file:
            file.truncate(header.header_nbytes)
            file.truncate(header.nbytes)  # holes: every scale a zero
        checkpoint = Checkpoint.open(tmp_path)
        assert "scales" in refusal(checkpoint.quantized[NAME].load)

    def test_a_quantized_matrix_is_not_mapped(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        with pytest.raises(CheckpointError, match=r"is stored as GPTQ of 4 bits, group_size=32; expected a parameter"):
            Checkpoint.open(tmp_path).read(NAME)

    def test_a_quantized_head_and_embedding(self, tmp_path: Path) -> None:
        """compressed-tensors quantizes embeddings too, if told to."""
        weights = write_checkpoint(tmp_path, lambda _, n, k: layouts.compressed_integers(n, k))
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["ignore"] = []
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        written = layouts.compressed_integers(40, 64)
        shard = tmp_path / "model.safetensors"
        add_tensors(tmp_path, {f"model.embed_tokens.{key}": value for key, value in written.tensors.items()})
        assert "model.embed_tokens.weight is stored beside" in open_refusal(tmp_path)
        _drop(shard, "model.embed_tokens.weight")
        checkpoint = Checkpoint.open(tmp_path)
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= checkpoint.quantized.keys()
        with CheckpointRows(checkpoint) as rows:
            np.testing.assert_array_equal(
                rows.rows("model.embed_tokens.weight", 3, 9), written.weight[3:9].astype("f4")
            )
            np.testing.assert_array_equal(rows.rows("lm_head.weight", 0, 40), weights["lm_head.weight"])

    def test_dtype_of_a_config_that_names_none(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all, {"torch_dtype": None})
        assert Checkpoint.open(tmp_path).spec.dtype == "float16"

    def test_scales_of_activations_and_caches_are_ignored(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, lambda name, n, k: None if "head" in name else layouts.compressed_fp8(n, k))
        scale = ("F32", np.ones(1, np.float32))
        extra = [f"model.layers.0.mlp.up_proj.{name}" for name in ("input_scale", "output_scale")]
        extra += [f"model.layers.0.self_attn.{name}" for name in ("k_scale", "v_scale")]
        add_tensors(tmp_path, {**dict.fromkeys(extra, scale), "model.layers.0.mlp.surprise": scale})
        checkpoint = Checkpoint.open(tmp_path)
        assert set(checkpoint.ignored) == set(extra)
        assert checkpoint.unexpected == ("model.layers.0.mlp.surprise",)

    def test_biases_of_zero(self, tmp_path: Path) -> None:
        """AutoGPTQ writes one for every matrix; q, k and v have true ones."""
        write_checkpoint(tmp_path, quantize_all)
        bias = "model.layers.0.mlp.up_proj.bias"
        add_tensors(tmp_path, {bias: ("F16", np.zeros(96, np.float16))})
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.unexpected == ()
        checkpoint.quantized[NAME].load()
        assert "bias" not in checkpoint.quantized["model.layers.0.self_attn.q_proj.weight"].parts
        add_tensors(tmp_path, {bias: ("F16", np.ones(96, np.float16))})
        text = refusal(Checkpoint.open(tmp_path).quantized[NAME].load)
        assert text.startswith(f"{bias} is not zero; expected zeros: Qwen2 has no bias there")

    def test_a_tied_head_that_is_stored_again(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all, {"tie_word_embeddings": True})
        written = layouts.gptq(40, 64)
        add_tensors(tmp_path, {f"lm_head.{key}": value for key, value in written.tensors.items()})
        checkpoint = Checkpoint.open(tmp_path)
        assert "lm_head.weight" not in checkpoint.quantized
        assert checkpoint.unexpected == ()
        assert len(checkpoint.ignored) == 4

    def test_shards(self, tmp_path: Path) -> None:
        """A matrix may have its parts in several files."""
        weights = write_checkpoint(tmp_path, quantize_all)
        header = read_header(tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        weight_map = {}
        for i in range(3):
            shard = f"model-{i + 1:05d}-of-00003.safetensors"
            refs = [ref for j, ref in enumerate(header.tensors.values()) if j % 3 == i]
            text, _ = write_header([(ref.name, ref.dtype, ref.shape) for ref in refs])
            (tmp_path / shard).write_bytes(text + b"".join(data[r.offset : r.offset + r.nbytes] for r in refs))
            weight_map |= {ref.name: shard for ref in refs}
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        checkpoint = Checkpoint.open(tmp_path)
        assert len({ref.path for ref in checkpoint.quantized[NAME].parts.values()}) > 1
        with CheckpointRows(checkpoint) as rows:
            np.testing.assert_array_equal(rows.rows(NAME, 0, 96), weights[NAME])

    def test_fingerprint_covers_the_quantization(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        before = Checkpoint.open(tmp_path).fingerprint()
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["sym"] = True
        (tmp_path / "config.json").write_text(json.dumps(config))
        changed = Checkpoint.open(tmp_path).fingerprint()
        add_tensors(tmp_path, {"model.layers.0.mlp.up_proj.bias": ("F16", np.zeros(96, np.float16))})
        assert len({before, changed, Checkpoint.open(tmp_path).fingerprint()}) == 3


def _drop(shard: Path, name: str) -> None:
    header = read_header(shard)
    data = shard.read_bytes()
    refs = [ref for ref in header.tensors.values() if ref.name != name]
    text, _ = write_header([(ref.name, ref.dtype, ref.shape) for ref in refs])
    shard.write_bytes(text + b"".join(data[ref.offset : ref.offset + ref.nbytes] for ref in refs))


def test_inspection(tmp_path: Path) -> None:
    """Formats and sizes are told from headers and config."""
    write_checkpoint(tmp_path, quantize_all)
    checkpoint = Checkpoint.open(tmp_path)
    found = inspect(tmp_path)
    assert found.facts["stored as"] == "F16+int4"
    assert found.facts["quantized"] == "7 matrices as GPTQ of 4 bits, group_size=32"
    stored = sum(ref.nbytes for header in checkpoint.headers for ref in header.tensors.values())
    assert sum(row.nbytes for row in found.layers) == stored
    assert sum(row.num_parameters for row in found.layers) == checkpoint.spec.num_parameters
    assert {matrix.format for matrix in checkpoint.quantized.values()} == {"int4"}


class TestRows:
    def test_any_checkpoint(self, tmp_path: Path) -> None:
        weights = write_checkpoint(tmp_path, quantize_all)
        with CheckpointRows(Checkpoint.open(tmp_path)) as rows:
            for name, weight in weights.items():
                assert rows.shape(name) == weight.shape
                middle = len(weight) // 3
                np.testing.assert_array_equal(rows.rows(name, middle, len(weight)), weight[middle:], err_msg=name)
                np.testing.assert_array_equal(rows.rows(name, 0, 1), weight[:1], err_msg=name)

    def test_plain_checkpoints(self) -> None:
        checkpoint = Checkpoint.open("nano")
        assert checkpoint.quantized == {}
        with CheckpointRows(checkpoint) as rows:
            assert rows.shape("model.norm.weight") == (512,)
            assert rows.rows("model.embed_tokens.weight", 5, 8).shape == (3, 512)

    def test_a_matrix_is_loaded_once_and_few_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path, quantize_all)
        loaded: list[str] = []
        load = ForeignMatrix.load

        def counted(matrix: ForeignMatrix) -> QuantizedTensor:
            loaded.append(matrix.name)
            return load(matrix)

        monkeypatch.setattr(ForeignMatrix, "load", counted)
        checkpoint = Checkpoint.open(tmp_path)
        names = list(checkpoint.quantized)
        reader = CheckpointRows(checkpoint)
        threads = [threading.Thread(target=reader.rows, args=(names[i % 2], 0, 8)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(loaded) == sorted(names[:2])
        for name in names[2:5]:
            reader.rows(name, 0, 1)
        reader.rows(names[4], 1, 2)
        assert len(loaded) == 5
        reader.rows(names[0], 0, 1)
        assert loaded[-1] == names[0]
        reader.close()
        reader.rows(names[0], 0, 1)
        assert len(loaded) == 7

    def test_a_failed_load_is_tried_again(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        shard = tmp_path / "model.safetensors"
        data = shard.read_bytes()
        reader = CheckpointRows(Checkpoint.open(tmp_path))
        os.truncate(shard, 2000)
        assert "within tensor" in refusal(lambda: reader.rows(NAME, 0, 1))
        shard.write_bytes(data)
        assert reader.rows(NAME, 0, 1).shape == (1, 64)

    def test_unknown_names(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, quantize_all)
        with CheckpointRows(Checkpoint.open(tmp_path)) as rows, pytest.raises(QwenRtError, match="is not stored"):
            rows.rows("model.layers.9.mlp.up_proj.weight", 0, 1)


@pytest.mark.parametrize("act_order", [False, True])
def test_memory_of_a_load(tmp_path: Path, act_order: bool) -> None:
    """A matrix of 72B has 120 MB: what a load takes beside it counts."""
    rows, columns = 1024, 4096
    written = Written({"quant_method": "gptq", "bits": 4, "group_size": 128})
    group = np.arange(columns) // 128
    written.tensors = {
        "qweight": ("I32", np.zeros((columns // 8, rows), np.int32)),
        "qzeros": ("I32", np.zeros((columns // 128, rows // 8), np.int32)),
        "scales": ("F16", np.ones((columns // 128, rows), np.float16)),
        "g_idx": ("I32", (group[::-1] if act_order else group).astype(np.int32)),
    }
    written.weight = np.broadcast_to(np.zeros(1), (rows, columns))
    matrix = write_matrix(tmp_path, written)
    tracemalloc.start()
    matrix.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * matrix.nbytes + (4 << 20)
