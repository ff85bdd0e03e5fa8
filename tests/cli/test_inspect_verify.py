"""`inspect` and `verify`: what they print, what they write, and that a bundle with other weights does not pass."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.inspection import Inspection

from .conftest import Cli
from .kit import SHARDS, child, names, rehash

QUICK = ["--num-tokens", "24", "--greedy-tokens", "4", "--exact-match", "0", "--quiet", "--threads", "1"]


def test_inspect_every_kind(bundle: Path, packed: Path, graph: Path, cli: Cli) -> None:
    kinds = {"nano": "checkpoint", str(bundle): "bundle", str(packed): "bundle", str(graph): "portable graph"}
    for folder, kind in kinds.items():
        text = cli("inspect", folder)
        assert (text.code, text.err) == (0, "")
        assert text.out.splitlines()[0].endswith(f": {kind}")
        assert "4 x hidden 512, ffn 768" in text.out
        assert "8.5 M parameters" in text.out
        found = json.loads(cli("inspect", folder, "--json").out)
        assert found["kind"] == kind
        assert found["model"]["num_layers"] == 4
        assert bool(found["operators"]) == (kind != "checkpoint")
        layers = [row["name"] for row in found["layers"]]
        assert layers == ["outside", "0", "1", "2", "3"]
        assert sum(row["num_parameters"] for row in found["layers"]) == 8_462_848
        assert all(bool(row["num_nodes"]) == (kind != "checkpoint") for row in found["layers"])


def test_inspect_layers_and_files(bundle: Path, packed: Path, graph: Path, cli: Cli) -> None:
    plain, layered = cli("inspect", bundle), cli("inspect", bundle, "--layers")
    assert "layer " not in plain.out.splitlines()[-1]
    assert layered.out.startswith(plain.out[:-1])
    rows = layered.out[len(plain.out) :].split("\n")
    assert [row.split()[0] for row in rows if row.strip()][1:] == ["outside", "0", "1", "2", "3"]
    assert f"{SHARDS[0]} (in the checkpoint)" in plain.out
    assert f"graph/{SHARDS[0]}" in cli("inspect", packed).out
    assert "in this folder" in cli("inspect", packed).out
    assert "GroupQueryAttention" in plain.out
    assert "RMSNormalization" in cli("inspect", graph).out


def test_inspect_finds_its_way_by_what_is_there(workplace: Path, cli: Cli) -> None:
    cli("inspect", "absent").refused(1, "absent does not exist", "expected")
    (workplace / "empty").mkdir()
    cli("inspect", "empty").refused(1, "has no manifest.json", "expected a bundle folder")
    (workplace / "file").write_text("x")
    cli("inspect", "file").refused(1, "is a file", "expected")
    cli("inspect", "x" * 5000).refused(1, "too long")


def test_render_is_plain_text_for_people() -> None:
    found = Inspection("bundle", "a\nb", None, {"x": "\x1b[2J"}, {"f\r": 5}, {"Op\n": 2}, [])  # type: ignore[arg-type]
    assert all(line.isprintable() for line in found.render(with_layers=True).split("\n"))


def test_verify_passes_and_writes_json(bundle: Path, workplace: Path, cli: Cli) -> None:
    result = cli("verify", bundle, *QUICK, "--json", "result.json")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "passed"
    found = json.loads((workplace / "result.json").read_text())
    assert found["passed"] is True
    assert found["num_tokens"] == 24
    assert {check["passed"] for check in found["checks"]} == {True}
    assert {"qwen-rt", "onnxruntime", "torch", "transformers"} <= set(found["versions"])
    assert found["gate"] is None
    assert found["notes"] == ["exact match on the nano set: skipped, --exact-match 0"]
    assert found["notes"][0] in result.out
    assert names(workplace) == {"result.json"}


def _scale(shard: Path, name: str, factor: float) -> None:
    data = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    part = slice(8 + length + begin, 8 + length + end)
    wide = (np.frombuffer(bytes(data[part]), "<u2").astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
    data[part] = (wide.view(np.uint32) >> 16).astype("<u2").tobytes()
    shard.write_bytes(data)


def test_verify_fails_on_weights_that_were_changed_consistently(packed_copy: Path, workplace: Path, cli: Cli) -> None:
    """The manifest agrees with the changed shard, so the bundle opens: only the numbers tell."""
    name = "model.layers.1.mlp.down_proj.weight"
    shard = next(shard for shard in SHARDS if name.encode() in (packed_copy / "graph" / shard).read_bytes()[:8000])
    _scale(packed_copy / "graph" / shard, name, 1.02)
    rehash(packed_copy, f"graph/{shard}")
    result = cli("verify", packed_copy, *QUICK, "--json", "result.json")
    assert (result.code, result.err) == (1, "")
    assert "OUT OF TOLERANCE" in result.out
    assert result.out.splitlines()[-1] == "FAILED"
    found = json.loads((workplace / "result.json").read_text())
    assert found["passed"] is False
    assert not next(check for check in found["checks"] if "largest error of a logit" in check["name"])["passed"]


def test_verify_refuses_what_it_cannot_read(bundle: Path, workplace: Path, cli: Cli) -> None:
    (workplace / "latin").write_bytes(b"caf\xe9")
    (workplace / "short").write_text("1")
    cli("verify", bundle, "--text", "absent").refused(2, "--text absent cannot be read", "expected a UTF-8 text file")
    cli("verify", bundle, "--text", "latin").refused(2, "cannot be read", "expected a UTF-8 text file")
    cli("verify", bundle, "--text", "short").refused(2, "the text has 1 tokens", "expected at least 2")
    cli("verify", bundle, "--num-tokens", "1").refused(2, "num_tokens=1", "expected at least 2")
    cli("verify", bundle, "--checkpoint", "absent").refused(1, "is missing", "--checkpoint FOLDER")
    assert names(workplace) == {"latin", "short"}


@pytest.mark.slow
def test_verify_in_a_process_of_its_own(bundle: Path, workplace: Path) -> None:
    result = child(["verify", bundle, "--num-tokens", "64", "--greedy-tokens", "32", "--quiet"], cwd=workplace)
    assert (result.code, result.err) == (0, ""), result
    assert result.out.splitlines()[-1] == "passed"


def test_doctor(cli: Cli) -> None:
    text = cli("doctor")
    assert (text.code, text.err) == (0, "")
    assert "cpu" in text.out
    report: dict[str, Any] = json.loads(cli("doctor", "--json").out)
    assert report
