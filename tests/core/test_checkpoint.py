"""Opening checkpoints: layouts, laziness, values, hashes."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.errors import CheckpointError, StorageError
from qwen_rt.safetensors_header import TensorRef
from qwen_rt.spec import ModelSpec

from .checkpoint_kit import QWEN2_72B, TINY, Tensors, refusal, tensors_of, weight_map_of, write_checkpoint, write_index


class TestOpen:
    @pytest.mark.parametrize("num_shards", [0, 3])
    def test_layouts(self, tmp_path: Path, num_shards: int) -> None:
        checkpoint = Checkpoint.open(str(write_checkpoint(tmp_path, num_shards=num_shards)))
        assert checkpoint.spec == ModelSpec.from_config(TINY)
        assert checkpoint.config == TINY
        assert checkpoint.generation_config == {}
        assert list(checkpoint.tensors) == list(checkpoint.spec.parameters())
        assert len(checkpoint.shards) == max(1, num_shards)
        ref = checkpoint.tensors["model.layers.1.self_attn.k_proj.bias"]
        assert (ref.dtype, ref.shape, ref.nbytes, ref.path.parent) == ("BF16", (8,), 16, tmp_path)
        assert checkpoint.ignored == checkpoint.unexpected == ()

    def test_single_file_comes_before_an_index(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        write_checkpoint(tmp_path)
        assert [path.name for path in Checkpoint.open(tmp_path).shards] == ["model.safetensors"]

    def test_generation_config(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
        assert Checkpoint.open(tmp_path).generation_config == {"temperature": 0.7}
        (tmp_path / "generation_config.json").write_text("[1]")
        assert "generation_config.json holds a list of 1; expected a JSON object" in str(refusal(tmp_path))

    def test_relative_path_survives_a_change_of_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        checkpoint = Checkpoint.open("model")
        monkeypatch.chdir("/")
        assert checkpoint.read("model.norm.weight").shape == (16,)

    def test_hugging_face_cache_of_symlinks(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "source", num_shards=2)
        blobs, snapshot = tmp_path / "models--Qwen--X" / "blobs", tmp_path / "models--Qwen--X" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, path in enumerate(sorted(source.iterdir())):
            shutil.move(path, blobs / f"blob{i}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
        checkpoint = Checkpoint.open(snapshot)
        assert {path.parent for path in checkpoint.shards} == {blobs}
        ref = checkpoint.tensors["lm_head.weight"]
        assert ref.path == snapshot / "model-00002-of-00002.safetensors"
        assert ref.real_path.parent == blobs
        assert checkpoint.read("lm_head.weight").shape == (40, 16)
        ref.real_path.unlink()
        assert "shard model-00002-of-00002.safetensors is missing" in str(refusal(snapshot))

    def test_dtype_of_the_weights_where_the_config_names_none(self, tmp_path: Path) -> None:
        config = {key: value for key, value in TINY.items() if key != "torch_dtype"}
        write_checkpoint(tmp_path, config, tensors_of(config, "F16"))
        assert Checkpoint.open(tmp_path).spec.dtype == "float16"

    def test_tensors_of_no_use(self, tmp_path: Path) -> None:
        tied = {**TINY, "tie_word_embeddings": True}
        extra: Tensors = {
            "lm_head.weight": ("BF16", (40, 16)),
            "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,)),
            "value_head.weight": ("I64", (1,)),
        }
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tied, tensors_of(tied) | extra))
        assert checkpoint.ignored == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
        assert checkpoint.unexpected == ("value_head.weight",)
        assert not extra.keys() & checkpoint.tensors.keys()

    def test_72b_opens_in_no_time_and_memory(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, QWEN2_72B, num_shards=37)
        start = time.perf_counter()
        checkpoint = Checkpoint.open(tmp_path)
        seconds = time.perf_counter() - start
        assert (len(checkpoint.shards), len(checkpoint.tensors)) == (37, 963)
        assert sum(header.nbytes for header in checkpoint.headers) > 145e9
        assert seconds < 1.0
        tracemalloc.start()
        checkpoint.read("model.layers.79.mlp.down_proj.weight")
        checkpoint.fingerprint()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


class TestNano:
    @pytest.fixture
    def shipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A package `qwen_rt.nano` with a tiny checkpoint in place of the shipped one."""
        folder = write_checkpoint(tmp_path / "package")
        monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / "package")
        return folder

    def test_by_name(self, shipped: Path) -> None:
        assert Checkpoint.open("nano").path == shipped

    def test_shipped_one_wins_over_a_folder(
        self, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = write_checkpoint(tmp_path / "nano", {**TINY, "vocab_size": 41})
        monkeypatch.chdir(tmp_path)
        assert Checkpoint.open("nano").path == shipped
        assert Checkpoint.open("./nano").path == mine
        assert Checkpoint.open(Path("nano")).path == mine

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(package: str) -> Path:
            raise ModuleNotFoundError(package)

        monkeypatch.setattr("importlib.resources.files", absent)
        assert "the nano checkpoint is not installed" in str(refusal("nano"))


class TestRead:
    def test_values(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        checkpoint = Checkpoint.open(tmp_path)
        ref = checkpoint.tensors["model.norm.weight"]
        values = np.array([1.0, -2.5, np.inf, 3.0e38, *range(12)], np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2")
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(ref.offset)
            file.write(bits.tobytes())
        array = checkpoint.read("model.norm.weight")
        assert (str(array.dtype), array.shape, array.flags.writeable) == ("uint16", (16,), False)
        np.testing.assert_array_equal(array, bits)
        np.testing.assert_array_equal(to_float32(ref, array), (bits.astype(np.uint32) << 16).view(np.float32))
        assert to_float32(ref, array)[1] == -2.5

    @pytest.mark.parametrize(("stored", "kind"), [("F16", "float16"), ("F32", "float32")])
    def test_other_dtypes(self, tmp_path: Path, stored: str, kind: str) -> None:
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY, tensors_of(TINY, stored)))
        name = "model.layers.0.mlp.up_proj.weight"
        array = checkpoint.read(name)
        assert (str(array.dtype), array.shape) == (kind, (24, 16))
        wide = to_float32(checkpoint.tensors[name], array)
        assert wide.dtype == np.float32
        assert np.shares_memory(wide, array) == (stored == "F32")

    def test_to_float32_refuses_integers(self) -> None:
        with pytest.raises(CheckpointError, match='tensor "t" has dtype I64; expected BF16, F16, F32'):
            to_float32(TensorRef("t", "I64", (1,), Path("x"), 0, 8), np.zeros(1, np.int64))

    def test_bf16_is_what_ml_dtypes_says(self) -> None:
        import ml_dtypes

        bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
        ours = to_float32(TensorRef("t", "BF16", (1 << 16,), Path("x"), 0, 1 << 17), bits)
        np.testing.assert_array_equal(ours, bits.view(ml_dtypes.bfloat16).astype(np.float32))

    def test_unknown_name(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
        with pytest.raises(CheckpointError, match=r'no tensor "model\.norm\.bias"'):
            checkpoint.read("model.norm.bias")

    def test_file_that_shrank_after_opening(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match=r"has 1000 bytes, .* when it was opened"):
            checkpoint.read("lm_head.weight")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(StorageError, match=r"model\.safetensors cannot be read: No such file"):
            checkpoint.read("lm_head.weight")


class TestHashes:
    def test_fingerprint_follows_configs_and_headers(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        first = Checkpoint.open(tmp_path).fingerprint()
        assert first == Checkpoint.open(tmp_path).fingerprint()
        assert len(first) == 64
        write_index(tmp_path, dict(reversed(weight_map_of(tmp_path).items())))
        second = Checkpoint.open(tmp_path).fingerprint()
        (tmp_path / "config.json").write_text(json.dumps(TINY) + " ")
        third = Checkpoint.open(tmp_path).fingerprint()
        shard = tmp_path / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes().replace(b'"pt"', b'"np"'))
        fourth = Checkpoint.open(tmp_path).fingerprint()
        assert len({first, second, third, fourth}) == 4

    def test_fingerprint_does_not_depend_on_the_folder(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "a", num_shards=2)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert Checkpoint.open(tmp_path / "a").fingerprint() == Checkpoint.open(tmp_path / "b").fingerprint()
