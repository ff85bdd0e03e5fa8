"""Bundles that are damaged, foreign, from the future or hostile: one line, exit code 1, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from ..runtime.cuda_bundle import as_cuda
from .conftest import Cli
from .kit import (
    HOSTILE,
    NANO_FOLDER,
    SHARDS,
    copy_graph_of,
    edit_json,
    edit_manifest,
    flip_byte,
    names,
    rehash,
)

GRAPH = "graph/rank0.onnx"
REBUILD = "build the bundle again: qwen-rt build CHECKPOINT -o BUNDLE"


def _manifest(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda document: document.update(fields))


def _list_outside(folder: Path) -> None:
    entry = {"nbytes": 1, "sha256": "0" * 64}
    edit_manifest(folder, lambda document: document["files"].update({"../checkpoint/config.json": entry}))


def _loop(folder: Path) -> None:
    (folder / GRAPH).unlink()
    (folder / GRAPH).symlink_to("rank0.onnx")


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "newer format": (
        _manifest(format_version=99),
        ("format_version=99", "expected 2 or older", "pip install -U qwen-rt"),
    ),
    "another format": (_manifest(format="zip"), ('format="zip"', "expected", REBUILD)),
    "format with controls": (_manifest(format=HOSTILE), ("expected", REBUILD)),
    "no manifest, no config": (
        lambda f: [(f / name).unlink() for name in ("manifest.json", "config.json")],
        ("has no manifest.json", "expected a bundle folder", REBUILD),
    ),
    "manifest cut short": (lambda f: (f / "manifest.json").write_text('{"format"'), ("not valid JSON", REBUILD)),
    "manifest not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b'{"\xff": 1}'), ("not UTF-8", REBUILD)),
    "manifest is empty": (lambda f: (f / "manifest.json").write_bytes(b""), ("not valid JSON", REBUILD)),
    "file outside the bundle": (_list_outside, (r"\.\./checkpoint/config.json", "inside the bundle", REBUILD)),
    "tampered graph": (lambda f: flip_byte(f / GRAPH), (GRAPH, "changed after the build", "expected", REBUILD)),
    "longer graph": (lambda f: (f / GRAPH).write_bytes((f / GRAPH).read_bytes() + b"x"), ("bytes; expected", REBUILD)),
    "missing graph": (lambda f: (f / GRAPH).unlink(), (GRAPH, "is missing", "expected a file of", REBUILD)),
    "a graph that links to itself": (_loop, ("cannot be read|is missing", "expected")),
    "tampered tokenizer": (
        lambda f: flip_byte(f / "tokenizer.json", 500),
        ("tokenizer.json", "changed after", REBUILD),
    ),
    "tampered template": (
        lambda f: flip_byte(f / "tokenizer_config.json", 900),
        ("tokenizer_config", "changed", REBUILD),
    ),
    "added template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 'obey' }}"),
        ("chat_template.jinja", "added after the build", REBUILD),
    ),
    "graph of nonsense": (lambda f: ((f / GRAPH).write_bytes(b"\xff" * 99), rehash(f, GRAPH)), ("graph", "again")),
    "graph is empty": (lambda f: ((f / GRAPH).write_bytes(b""), rehash(f, GRAPH)), ("graph", "again")),
    "tokenizer of nonsense": (
        lambda f: ((f / "tokenizer.json").write_text(HOSTILE), rehash(f, "tokenizer.json")),
        ("tokenizer.json",),
    ),
    "generation config of nonsense": (
        lambda f: ((f / "generation_config.json").write_text("["), rehash(f, "generation_config.json")),
        ("generation_config.json is not JSON", "build the bundle again"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(damage: str, bundle_copy: Path, workplace: Path, cli: Cli) -> None:
    harm, words = DAMAGES[damage]
    harm(bundle_copy)
    before = names(bundle_copy)
    cli("generate", bundle_copy, "hi").refused(1, *words)
    cli("chat", bundle_copy, stdin="hi\n").refused(1, *words)
    assert names(workplace) == set()
    assert names(bundle_copy) == before


@pytest.mark.parametrize("command", ["generate", "chat", "verify"])
def test_a_path_that_is_no_bundle(command: str, graph: Path, workplace: Path, cli: Cli) -> None:
    (workplace / "file").write_text("x")
    prompt = ["hi"] if command == "generate" else []
    cli(command, "absent", *prompt).refused(1, "absent does not exist", "expected a bundle folder", REBUILD)
    cli(command, "file", *prompt).refused(1, "file is a file", "expected a bundle folder", REBUILD)
    cli(command, "x" * 5000, *prompt).refused(1, "cannot be read: File name too long", "check the path")
    cli(command, NANO_FOLDER, *prompt).refused(1, "is a checkpoint", "expected a bundle", "qwen-rt build .* -o BUNDLE")
    cli(command, graph, *prompt).refused(1, "target portable", "expected a bundle of target cpu", "qwen-rt build .* -o")
    assert names(workplace) == {"file"}


def test_building_from_a_bundle(bundle: Path, workplace: Path, cli: Cli) -> None:
    cli("build", bundle, "-o", "out").refused(
        1, "bundle of target cpu", "expected a checkpoint", "build from its checkp"
    )
    assert names(workplace) == set()


def test_tampered_weights_in_the_bundle(packed_copy: Path, workplace: Path, cli: Cli) -> None:
    flip_byte(packed_copy / "graph" / SHARDS[0])
    cli("generate", packed_copy, "hi").refused(1, SHARDS[0], "changed after the build: sha256", "expected", REBUILD)
    assert cli("inspect", packed_copy).code == 0  # looks at sizes only, as its help says


@pytest.fixture
def linked(nano_copy: Path, tmp_path: Path, cli: Cli) -> Path:
    """A bundle of a checkpoint that may be damaged."""
    portable = copy_graph_of(nano_copy, tmp_path / "portable")
    assert cli("build", portable, "-o", tmp_path / "linked", "--quiet").code == 0
    return tmp_path / "linked"


def test_tampered_weights_in_the_checkpoint(linked: Path, nano_copy: Path, cli: Cli) -> None:
    assert cli("generate", linked, "--max-tokens", "1", "hi").code == 0
    flip_byte(nano_copy / SHARDS[1])
    cli("generate", linked, "hi").refused(1, SHARDS[1], "changed after the build: sha256", "expected", REBUILD)
    flip_byte(nano_copy / SHARDS[1])
    flip_byte(nano_copy / SHARDS[0], 20)
    cli("generate", linked, "hi").refused(1, SHARDS[0], "another header than at build time", "expected", REBUILD)


def test_a_missing_linked_shard_and_where_it_went(linked: Path, nano_copy: Path, tmp_path: Path, cli: Cli) -> None:
    answer = cli("generate", linked, "--max-tokens", "4", "hi").out
    moved = nano_copy.rename(tmp_path / "moved")
    cli("generate", linked, "hi").refused(1, "checkpoint shard", "is missing", "pass --checkpoint FOLDER")
    assert cli("generate", linked, "--checkpoint", moved, "--max-tokens", "4", "hi").out == answer
    cli("generate", linked, "--checkpoint", tmp_path, "hi").refused(1, "is missing", "--checkpoint")
    cli("generate", linked, "--checkpoint", "no\nwhere", "hi").refused(1, "is missing", "--checkpoint")
    flip_byte(moved / SHARDS[0])
    cli("generate", linked, "--checkpoint", moved, "hi").refused(1, "changed after the build")
    (moved / SHARDS[0]).write_bytes(b"short")
    cli("generate", linked, "--checkpoint", moved, "hi").refused(1, "has 5 bytes", "expected")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only\nmaths\x1b[31m') }}", ("chat template failed: only maths",)),
        ("{% for", ("chat template does not compile", "expected a Jinja template")),
        ("{{ messages[0].nothing.more }}", ("chat template failed", "check the messages")),
        ("{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", ("chat template failed",)),
    ],
)
def test_a_chat_template_that_raises(
    template: str, words: tuple[str, ...], nano_copy: Path, tmp_path: Path, cli: Cli
) -> None:
    config = nano_copy / "tokenizer_config.json"
    edit_json(config, lambda document: document.update(chat_template=template))
    portable = copy_graph_of(nano_copy, tmp_path / "portable")
    shutil.copy(config, portable)
    rehash(portable, "tokenizer_config.json")
    out = tmp_path / "out"
    assert cli("build", portable, "-o", out, "--quiet").code == 0
    cli("generate", out, "hi").refused(1, *words)
    cli("chat", out, stdin="hi\nho\n").refused(1, *words)
    raw = cli("generate", out, "--raw", "--max-tokens", "3", "1+1=")
    assert (raw.code, raw.err) == (0, "")


def test_verify_against_another_checkpoint(bundle: Path, nano_copy: Path, workplace: Path, cli: Cli) -> None:
    edit_json(nano_copy / "config.json", lambda document: document.update(rms_norm_eps=1e-5))
    result = cli("verify", bundle, "--checkpoint", nano_copy, "--json", "result.json")
    result.refused(1, "is not the checkpoint of", "expected", "--checkpoint FOLDER")
    assert names(workplace) == set()


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has an NVIDIA driver")
def test_a_cuda_bundle_without_a_gpu(bundle: Path, tmp_path: Path, workplace: Path, cli: Cli) -> None:
    folder = as_cuda(bundle, tmp_path / "nano-cuda")
    for command in (["generate", folder, "hi"], ["chat", folder], ["verify", folder]):
        cli(*command).refused(1, "NVIDIA driver", "--target cpu")
    assert names(workplace) == set()


def test_a_hostile_manifest_cannot_command_the_terminal(bundle_copy: Path, cli: Cli) -> None:
    def poison(document: dict[str, Any]) -> None:
        document["checkpoint"]["path"] = f"/x/{HOSTILE}"
        document["tools"] = {HOSTILE: HOSTILE}

    edit_manifest(bundle_copy, poison)
    shown = cli("inspect", bundle_copy, "--layers")
    assert shown.code == 0
    assert all(line.isprintable() for line in shown.out.splitlines())
    assert json.loads(cli("inspect", bundle_copy, "--json").out)["kind"] == "bundle"
