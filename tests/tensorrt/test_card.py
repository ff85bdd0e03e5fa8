"""The portability card: written and read back, damaged ones refused, and what a check says where engines do not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.bundle import Bundle, FileEntry, Manifest
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import CARD_FILE, EngineCard, EngineProfile, engine_files
from qwen_rt.errors import BundleError

CARD = EngineCard(
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    compute_capabilities=("8.0", "8.9", "12.0"),
    precision="int4",
    compute_dtype="bfloat16",
    max_length=4096,
    profiles={"prefill": EngineProfile(8, 1024), "decode": EngineProfile(8, 1)},
    network={"ATTENTION": 28, "KV_CACHE_UPDATE": 56, "SHUFFLE": 300},
    engine={"prefill": {"kgen": 300}, "decode": {"kgen": 280, "gemm": 1}},
    weights_sha256=("ab" * 32, "cd" * 32),
    command=("qwen-rt", "build", "/a folder", "--target", "tensorrt-rtx", "--precision", "int4"),
)


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(CARD.to_json())
    return document


def test_round_trip() -> None:
    assert EngineCard.from_json(CARD.to_json()) == CARD
    assert CARD.to_json() == EngineCard.from_json(CARD.to_json()).to_json()
    assert CARD.num_ranks == 2
    unknown = EngineCard.from_json(json.dumps(_document() | {"engine": {}}).encode())
    assert unknown.engine == {}


@pytest.mark.parametrize("field", sorted(_document()))
@pytest.mark.parametrize("value", [None, 7, -1, "", "x\0", [], [1], {}, {"a": -1}, {"a": {"b": "c"}}, True, 2**62 + 1])
def test_damaged_cards(field: str, value: object) -> None:
    """Any field of another kind, or gone: one line that names it."""
    if (field, value) in [("engine", {}), ("network", {}), ("max_length", 7), ("format_version", 7)]:
        return
    for document in (_document() | {field: value}, {k: v for k, v in _document().items() if k != field}):
        with pytest.raises(BundleError) as caught:
            EngineCard.from_json(json.dumps(document).encode(), "card of x")
        text = str(caught.value)
        assert "card of x" in text
        assert "\n" not in text
        assert field in text or (field == "weights_sha256" and "rank" in text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compute_capabilities": ["8.9", "9"]}, 'compute_capabilities has "9"; expected numbers such as 8.9'),
        ({"compute_capabilities": ["8.9\x1b[31m"]}, "compute_capabilities has "),
        (
            {"profiles": {"prefill": {"max_batch": 1, "max_tokens": 1}}},
            'profiles="prefill"; expected prefill and decode',
        ),
        ({"profiles": _document()["profiles"] | {"decode": {"max_batch": 0, "max_tokens": 1}}}, "max_batch=0"),
        ({"weights_sha256": ["ab" * 32, "AB" * 32]}, "rank 1: weights_sha256="),
        ({"format_version": 2}, "format_version=2; expected 1 or older; upgrade qwen-rt"),
        ({"flavour": "cuda"}, 'flavour="cuda"; expected one of tensorrt, tensorrt-rtx'),
        ({"compute_dtype": "int8"}, "compute_dtype="),
    ],
)
def test_wrong_values(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as caught:
        EngineCard.from_json(json.dumps(_document() | change).encode())
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"null"])
def test_no_card(data: bytes) -> None:
    with pytest.raises(BundleError):
        EngineCard.from_json(data)


def test_a_fitting_machine() -> None:
    for one in CARD.compute_capabilities:
        CARD.check("tensorrt-rtx", "1.7.1.116", one)


@pytest.mark.parametrize(
    ("found", "words", "options"),
    [
        (
            ("tensorrt", "1.7.1.116", "8.9"),
            "B holds engines of tensorrt-rtx; expected engines of tensorrt",
            ["--target", "tensorrt", "--precision", "int4"],
        ),
        (
            ("tensorrt-rtx", "1.8.0.1", "8.9"),
            "B was built by tensorrt-rtx 1.7.1.116, and 1.8.0.1 is installed; expected the same version",
            ["--target", "tensorrt-rtx", "--precision", "int4", "--compute-capability", "8.0", "8.9", "12.0"],
        ),
        (
            ("tensorrt-rtx", "1.7.1.116", "8.6"),
            "B was built for compute capability 8.0, 8.9, 12.0; expected 8.6, that of this GPU",
            ["--target", "tensorrt-rtx", "--precision", "int4", "--compute-capability", "8.6"],
        ),
    ],
)
def test_another_machine(found: tuple[str, str, str], words: str, options: list[str]) -> None:
    """The message ends with the command that builds what fits."""
    with pytest.raises(BundleError) as caught:
        CARD.check(*found, folder="B")
    text, _, command = str(caught.value).partition("; build: ")
    assert text == words
    assert shlex.split(command) == ["qwen-rt", "build", "/a folder", *options, "-o", "B", "--force"]


def test_another_flavour_of_a_checkpoint_of_that_name() -> None:
    """Only what stands behind --target changes."""
    words = ("qwen-rt", "build", "tensorrt-rtx", "--target", "tensorrt-rtx")
    text = dataclasses.replace(CARD, command=words).rebuild_command("B", flavour="tensorrt")
    assert text == "qwen-rt build tensorrt-rtx --target tensorrt -o B --force"


# ---------------------------------------------------------------- the bundle


def _bundle(folder: Path, files: dict[str, bytes], num_ranks: int = 1) -> Path:
    entries = {}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        entries[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    link = {"path": "/nowhere", "fingerprint": "0" * 64, "shards": {}}
    document = {
        "format": "qwen-rt-bundle",
        "format_version": 2,
        "target": "tensorrt-rtx",
        "precision": "bf16",
        "compute_dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "max_length": 128,
        "tensor_parallel": num_ranks,
        "model": Checkpoint.open("nano").spec.to_dict(),
        "checkpoint": link,
        "files": {name: vars(entry) for name, entry in entries.items()},
        "tools": {},
        "quantization": None,
        "gate": None,
    }
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def test_a_bundle_of_engines_needs_no_graph(tmp_path: Path) -> None:
    files = {"engine/rank0.engine": b"engine", CARD_FILE: CARD.to_json()}
    assert isinstance(Bundle.open(_bundle(tmp_path, files)).manifest, Manifest)
    assert engine_files("tensorrt", 2) == ["engine/rank0.engine", "engine/rank1.engine"]
    assert engine_files("cuda", 2) == []


@pytest.mark.parametrize(
    ("files", "num_ranks", "missing"),
    [
        ({CARD_FILE: b"x"}, 1, "engine/rank0.engine"),
        ({"engine/rank0.engine": b"x"}, 1, CARD_FILE),
        ({"engine/rank0.engine": b"x", CARD_FILE: b"x"}, 2, "engine/rank1.engine"),
        ({"engine/rank0.engine": b"x", CARD_FILE: b"x"}, 2**62, "engine/rank1.engine"),
        ({}, 1, CARD_FILE),
    ],
)
def test_a_bundle_that_lacks_an_engine(files: dict[str, bytes], num_ranks: int, missing: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"lists no {missing}|lists no engine/rank0|lists no graph"):
        Bundle.open(_bundle(tmp_path, files, num_ranks))


def test_an_engine_that_was_changed(tmp_path: Path) -> None:
    folder = _bundle(tmp_path, {"engine/rank0.engine": b"engine", CARD_FILE: CARD.to_json()})
    (folder / "engine/rank0.engine").write_bytes(b"enginf")
    with pytest.raises(BundleError, match=r"engine/rank0\.engine of .* was changed after the build"):
        Bundle.open(folder)
