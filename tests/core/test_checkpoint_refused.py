"""Checkpoints that cannot be opened: one clear line each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import CheckpointError, StorageError, UnsupportedModelError

from .checkpoint_kit import TINY, refusal, tensors_of, weight_map_of, write_checkpoint, write_index


class TestRefused:
    def test_paths(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "model")
        assert "absent does not exist; expected a checkpoint folder" in str(refusal(tmp_path / "absent"))
        error = refusal(folder / "model.safetensors")
        assert "model.safetensors is a file; expected a checkpoint folder with config.json" in str(error)
        assert isinstance(refusal("x" * 5000), StorageError)
        assert isinstance(refusal("nul\0byte"), StorageError)

    @pytest.mark.parametrize(
        ("content", "fragment"),
        [
            (None, "config.json is missing; expected a checkpoint folder"),
            (b"{", "config.json is not valid JSON"),
            (b"", "config.json is not valid JSON"),
            (b"[]", "config.json holds a list of 0; expected a JSON object"),
            (b"\xff\xfe{}", "config.json is not UTF-8 at byte 0"),
            (b'{"a": 1, "a": 2}', 'key "a" is given twice'),
            (b'{"a": "\\ud800"}', "surrogates not allowed"),
            (b'{"a": ' + b"9" * 5000 + b"}", "integer of 5000 digits"),
            (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "config.json is nested too deeply"),
            (b'{"a": [' + b"0," * 1_000_001 + b"0]}", "more than 1000000 JSON values"),
            (b" " * (5 << 20), "config.json is larger than 4194304 bytes"),
        ],
    )
    def test_config(self, tmp_path: Path, content: bytes | None, fragment: str) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "config.json").unlink()
        if content is not None:
            (tmp_path / "config.json").write_bytes(content)
        error = refusal(tmp_path)
        assert isinstance(error, CheckpointError)
        assert fragment in str(error)

    def test_config_of_another_model(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
        assert isinstance(refusal(tmp_path), UnsupportedModelError)

    def test_config_that_is_a_folder_or_pipe(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").mkdir()
        assert "config.json is not a regular file" in str(refusal(tmp_path))
        (tmp_path / "config.json").rmdir()
        os.mkfifo(tmp_path / "config.json")
        assert "config.json is not a regular file" in str(refusal(tmp_path))

    def test_no_weights(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        error = refusal(tmp_path)
        assert "has no weights; expected model.safetensors or model.safetensors.index.json" in str(error)
        (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
        assert "pytorch_model.bin weights only" in str(refusal(tmp_path))
        assert "convert it to safetensors" in str(refusal(tmp_path))

    @pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
    def test_index_without_a_map(self, tmp_path: Path, weight_map: Any) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        write_index(tmp_path, weight_map)
        assert "has weight_map=" in str(refusal(tmp_path))

    @pytest.mark.parametrize(
        "shard",
        [
            "../model.safetensors",
            "/etc/model.safetensors",
            "sub/model.safetensors",
            "a\\b.safetensors",
            "..",
            "",
            "nul\0.safetensors",
            "line\n.safetensors",
            "model.bin",
            "x" * 300 + ".safetensors",
            7,
            None,
            ["model.safetensors"],
        ],
    )
    def test_index_pointing_out_of_the_folder(self, tmp_path: Path, shard: Any) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        write_index(tmp_path, {**weight_map_of(tmp_path), "lm_head.weight": shard})
        error = refusal(tmp_path)
        assert 'stores tensor "lm_head.weight" in ' in str(error)
        assert "expected the name of a .safetensors file inside the checkpoint folder" in str(error)

    def test_missing_shards(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=8)
        (tmp_path / "model-00003-of-00008.safetensors").unlink()
        error = refusal(tmp_path)
        assert str(error).startswith(f"shard model-00003-of-00008.safetensors is missing from {tmp_path}")
        assert str(error).endswith("download them again")
        for i in (4, 5, 6, 7):
            (tmp_path / f"model-0000{i}-of-00008.safetensors").unlink()
        assert "model-00005-of-00008.safetensors and 2 more are missing" in str(refusal(tmp_path))

    def test_index_naming_what_a_shard_lacks(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        write_index(tmp_path, weight_map_of(tmp_path) | {"lm_head.weight": "model-00001-of-00002.safetensors"})
        error = refusal(tmp_path)
        assert "places lm_head.weight where it is not, the first in model-00001-of-00002.safetensors" in str(error)

    def test_truncated_shard(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        shard = tmp_path / "model-00002-of-00002.safetensors"
        nbytes = shard.stat().st_size
        os.truncate(shard, nbytes - 1)
        error = refusal(tmp_path)
        assert f"00002.safetensors is cut short: its header says {nbytes} bytes, the file has {nbytes - 1}" in str(
            error
        )
        assert str(error).endswith("download it again")
        os.truncate(shard, nbytes + 1)
        assert "has bytes behind its last tensor" in str(refusal(tmp_path))

    def test_missing_tensors(self, tmp_path: Path) -> None:
        tensors = tensors_of(TINY)
        del tensors["model.norm.weight"]
        error = refusal(write_checkpoint(tmp_path, TINY, tensors))
        assert "lacks 1 of 27 tensors: model.norm.weight; expected every tensor that config.json implies" in str(error)
        error = refusal(write_checkpoint(tmp_path, TINY, {"model.norm.weight": ("BF16", (16,))}))
        assert "lacks 26 of 27 tensors: lm_head.weight, model.embed_tokens.weight, " in str(error)
        assert "and 23 more" in str(error)

    def test_dtypes(self, tmp_path: Path) -> None:
        tensors = tensors_of(TINY) | {"lm_head.weight": ("F8_E4M3", (40, 16))}
        error = refusal(write_checkpoint(tmp_path, TINY, tensors))
        assert "F8_E4M3 weights in 1 of 27 tensors: lm_head.weight; expected BF16 or F16 or F32" in str(error)

    def test_shapes(self, tmp_path: Path) -> None:
        tensors = tensors_of(TINY) | {"lm_head.weight": ("BF16", (41, 16))}
        error = refusal(write_checkpoint(tmp_path, TINY, tensors))
        assert "wrong shape of 1 of 27 tensors: lm_head.weight [41, 16] (expected [40, 16])" in str(error)
        error = refusal(write_checkpoint(tmp_path, {**TINY, "intermediate_size": 25}, tensors_of(TINY)))
        assert "wrong shape of 6 of 27 tensors: model.layers.0.mlp.gate_proj.weight [24, 16] (exp" in str(error)
        assert "and 3 more; expected the shapes that config.json implies" in str(error)

    def test_names_cannot_forge_lines(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, num_shards=2)
        name = "x\nerror: all is well\r\x1b[2J\u2028" + "y" * 5000
        write_index(tmp_path, {**weight_map_of(tmp_path), name: "model-00001-of-00002.safetensors"})
        error = refusal(tmp_path)
        assert str(error).isprintable()
        assert len(str(error)) < 1000
