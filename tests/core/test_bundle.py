"""Opening a bundle: what each level of checking sees, and what no manifest may name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from qwen_rt import bundle as bundle_module
from qwen_rt.bundle import GRAPH_FILE, MANIFEST_FILE, Bundle, Check, Manifest, file_sha256
from qwen_rt.errors import BundleError, QwenRtError, StorageError
from qwen_rt.safetensors_header import read_header

from ..cli.kit import SHARDS, copy_nano, edit_manifest, flip_byte, rehash, shared_bundle

LEVELS: tuple[Check, ...] = get_args(Check)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_bundle(self_contained=True), tmp_path / "packed"))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A bundle whose shards lie in `tmp_path/checkpoint`."""
    checkpoint = copy_nano(tmp_path / "checkpoint")
    folder = Path(shutil.copytree(shared_bundle(), tmp_path / "linked"))

    def relink(document: dict[str, Any]) -> None:
        for name, shard in document["checkpoint"]["shards"].items():
            shard["path"] = str(checkpoint / name)

    edit_manifest(folder, relink)
    return folder


def test_a_good_bundle_opens_at_every_level(packed: Path, linked: Path, tmp_path: Path) -> None:
    for check in LEVELS:
        own = Bundle.open(packed, check)
        assert own.graph_file == packed / GRAPH_FILE
        assert own.weight_files == {name: (packed / "graph" / name).resolve() for name in SHARDS}
        there = Bundle.open(str(linked), check)
        assert there.weight_files == {name: (tmp_path / "checkpoint" / name).resolve() for name in SHARDS}


def test_the_manifest_is_what_to_json_writes(packed: Path, linked: Path) -> None:
    for folder in (packed, linked):
        data = (folder / MANIFEST_FILE).read_bytes()
        manifest = Manifest.from_json(data)
        assert manifest.to_json() == data
        listed = set(manifest.files) | {MANIFEST_FILE}
        assert listed == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for name, entry in manifest.files.items():
            assert (entry.nbytes, entry.sha256) == ((folder / name).stat().st_size, file_sha256(folder / name))
    for name, shard in Bundle.open(linked).manifest.checkpoint.shards.items():
        assert (Path(shard.path).name, shard.sha256) == (name, file_sha256(Path(shard.path)))
        assert shard.header_sha256 == read_header(shard.path).sha256


def _opens(folder: Path, check: Check) -> bool:
    try:
        Bundle.open(folder, check)
    except BundleError as error:
        if "changed after the build" not in str(error):
            raise
        return False
    return True


def test_what_each_level_sees(packed: Path, linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`size` sees no changed byte, `full` every one; `auto` every one up to 1 GiB, beyond it not those of weights."""
    flip_byte(packed / "graph" / SHARDS[0])
    flip_byte(tmp_path / "checkpoint" / SHARDS[1])
    for folder in (packed, linked):
        assert [_opens(folder, check) for check in ("size", "auto", "full")] == [True, False, False]
    monkeypatch.setattr(bundle_module, "_HASHED_AT_LOAD_BYTES", 1 << 20)
    for folder in (packed, linked):
        assert [_opens(folder, check) for check in ("size", "auto", "full")] == [True, True, False]
        flip_byte(folder / GRAPH_FILE)
        assert [_opens(folder, check) for check in ("size", "auto", "full")] == [True, False, False]


@pytest.mark.parametrize("check", LEVELS)
def test_sizes_and_headers_are_always_compared(check: Check, packed: Path, linked: Path, tmp_path: Path) -> None:
    flip_byte(tmp_path / "checkpoint" / SHARDS[0], 30)
    with pytest.raises(BundleError, match="another header than at build time"):
        Bundle.open(linked, check)
    for name in (GRAPH_FILE, "tokenizer.json", f"graph/{SHARDS[0]}"):
        data = (packed / name).read_bytes()
        (packed / name).write_bytes(data + b"\0")
        with pytest.raises(BundleError, match=rf"has {len(data) + 1} bytes; expected {len(data)} bytes"):
            Bundle.open(packed, check)
        (packed / name).unlink()
        with pytest.raises(BundleError, match="is missing; expected a file of"):
            Bundle.open(packed, check)
        (packed / name).write_bytes(data)
    Bundle.open(packed, check)


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "./x", "a//b", "a/", "graph/../../x", "a\0b", "a/./b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_inside_the_bundle_only(name: str, packed: Path) -> None:
    (packed.parent / "x").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    edit_manifest(packed, lambda document: document["files"].update({name: {"nbytes": 0, "sha256": empty}}))
    with pytest.raises(BundleError, match="expected a relative path inside the bundle"):
        Bundle.open(packed)


@pytest.mark.parametrize("name", [*OUTSIDE, "a/b.safetensors"])
def test_a_shard_is_named_by_a_plain_file_name(name: str, linked: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        shards = document["checkpoint"]["shards"]
        shards[name] = shards.pop(SHARDS[0])

    edit_manifest(linked, change)
    with pytest.raises(BundleError, match=r"expected a relative path inside|expected a file name without folders"):
        Bundle.open(linked)


def test_two_weight_files_of_one_name(packed: Path) -> None:
    """The graph refers to weights by file name: which of the two it would get must not be left to chance."""
    (packed / "graph" / "more").mkdir()
    shutil.copy(packed / "graph" / SHARDS[0], packed / "graph" / "more")
    rehash(packed, f"graph/more/{SHARDS[0]}")
    with pytest.raises(BundleError, match="two weight files named"):
        Bundle.open(packed)


def test_text_files_that_came_later_are_refused(packed: Path) -> None:
    """The runtime reads what it finds by name; a file that nobody hashed could change every prompt."""
    (packed / "README.md").write_text("notes do no harm")
    Bundle.open(packed)
    (packed / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BundleError, match=r"chat_template.jinja of .* was added after the build"):
        Bundle.open(packed)


def test_links_pipes_and_folders_in_place_of_files(packed: Path) -> None:
    graph = packed / GRAPH_FILE
    moved = graph.rename(packed / "moved.onnx")
    graph.symlink_to("../moved.onnx")  # as in Hugging Face's cache: a link to the right bytes is fine
    Bundle.open(packed, "full")
    graph.unlink()
    graph.symlink_to("rank0.onnx")
    with pytest.raises((StorageError, BundleError)):
        Bundle.open(packed)
    graph.unlink()
    os.mkfifo(graph)
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(packed)
    graph.unlink()
    graph.mkdir()
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(packed)
    graph.rmdir()
    moved.rename(graph)
    Bundle.open(packed)


def test_what_is_no_bundle(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), Path("x" * 5000), Path("\0"), tmp_path / "absent"):
        with pytest.raises(QwenRtError) as caught:
            Bundle.open(path)
        assert caught.value.exit_code == 1
    (packed / MANIFEST_FILE).unlink()
    os.mkfifo(packed / MANIFEST_FILE)
    with pytest.raises(BundleError):
        Bundle.open(packed)


def test_a_manifest_that_lists_no_graph(packed: Path) -> None:
    edit_manifest(packed, lambda document: document["files"].pop(GRAPH_FILE))
    with pytest.raises(BundleError, match=r"lists no graph/rank0\.onnx"):
        Bundle.open(packed)


def test_a_huge_manifest_is_not_read(packed: Path) -> None:
    with open(packed / MANIFEST_FILE, "r+b") as file:
        file.truncate(65 << 20)
    with pytest.raises(BundleError, match="expected at most"):
        Bundle.open(packed)
