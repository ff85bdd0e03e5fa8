"""`build`, `export` and `inspect` on broken checkpoints: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli
from .kit import HOSTILE, INDEX, SHARDS, child, copy_graph_of, copy_nano, edit_json, names

Damage = Callable[[Path], None]


def _edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a safetensors header; its length stays, so that the data stays where it is."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _overlap(header: dict[str, Any]) -> None:
    first, second = sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])[:2]
    nbytes = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + nbytes]


def _reshape(header: dict[str, Any]) -> None:
    entry = header["model.embed_tokens.weight"]
    entry["shape"] = entry["shape"][::-1]


def _replace(offset: int, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / SHARDS[0]
        content = bytearray(file.read_bytes())
        content[offset : offset + len(data)] = data
        file.write_bytes(content)

    return change


def _truncate(folder: Path) -> None:
    file = folder / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-1000])


def _config(**fields: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda document: document.update(fields))


def _index(change: Callable[[dict[str, str]], None]) -> Damage:
    return lambda folder: edit_json(folder / INDEX, lambda document: change(document["weight_map"]))


def _pipe(folder: Path) -> None:
    import os

    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


def _loop(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(SHARDS[0])


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), (SHARDS[1], "missing", "expected all 2 shards", "download")),
    "truncated shard": (_truncate, (SHARDS[1], "cut short", "download it again")),
    "empty shard": (lambda f: (f / SHARDS[0]).write_bytes(b""), ("cut short", "download")),
    "git lfs pointer": (lambda f: (f / SHARDS[0]).write_text("version https://git-lfs"), ("LFS", "git lfs pull")),
    "index names an absent tensor": (
        _index(lambda m: m.update({"model.layers.9.absent": SHARDS[0]})),
        ("model.layers.9.absent", "expected", "download"),
    ),
    "index names a file outside": (
        _index(lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        ("model.norm.weight", r"\.\./x", "inside the checkpoint folder", "download"),
    ),
    "index names a hostile shard": (
        _index(lambda m: m.update({"model.norm.weight": f"{HOSTILE}.safetensors"})),
        ("inside the checkpoint folder", "download"),
    ),
    "index names a hostile tensor": (_index(lambda m: m.update({HOSTILE: SHARDS[0]})), ("expected", "download")),
    "index without a tensor": (_index(lambda m: m.pop("model.norm.weight") and None), ()),
    "index is a list": (lambda f: (f / INDEX).write_text("[1]"), ("expected a JSON object", "download")),
    "wrong shape": (
        lambda f: _edit_header(f / SHARDS[0], _reshape),
        ("wrong shape", "model.embed_tokens.weight", r"\[512, 1152\]", r"expected \[1152, 512\]"),
    ),
    "config of another size": (_config(intermediate_size=1024), ("wrong shape", "mlp", "config.json")),
    "unknown architecture": (
        _config(architectures=["LlamaForCausalLM"], model_type="llama"),
        ("[Ll]lama", "expected", "[Qq]wen2"),
    ),
    "hostile architecture": (_config(architectures=[HOSTILE], model_type=HOSTILE), ("expected",)),
    "huge model": (_config(num_hidden_layers=2**40), ("num_hidden_layers", "expected")),
    "config is not JSON": (lambda f: (f / "config.json").write_text('{"a": '), ("config.json", "not valid JSON")),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), ("not UTF-8", "download")),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json is missing|no manifest.json", "expected")),
    "no weights": (lambda f: (f / INDEX).unlink(), ("has no weights", "expected", "download")),
    "huge header length": (_replace(0, struct.pack("<Q", 2**63)), ("cut short", "download")),
    "overlapping offsets": (lambda f: _edit_header(f / SHARDS[0], _overlap), ("begins at byte|data_offsets", "expect")),
    "header not UTF-8": (_replace(12, b"\xff\xfe"), ("not UTF-8", "expected UTF-8", "download")),
    "header not JSON": (_replace(8, b"hello"), ("header", "expected", "download")),
    "a pipe for a shard": (_pipe, ("not a regular file", "expected a safetensors file", "check")),
    "a loop of links": (_loop, ("expected", "check|download")),
}


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "index without a tensor"])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, nano_copy: Path, workplace: Path, cli: Cli) -> None:
    harm, words = DAMAGES[damage]
    harm(nano_copy)
    before = names(nano_copy)
    for arguments in (["build", nano_copy, "-o", "out"], ["export", nano_copy, "-o", "out"], ["inspect", nano_copy]):
        cli(*arguments).refused(1, *words)
    assert names(workplace) == set()
    assert names(nano_copy) == before


def test_a_bundle_of_a_checkpoint_that_was_damaged_later_is_not_built(
    nano_copy: Path, tmp_path: Path, workplace: Path, cli: Cli
) -> None:
    portable = copy_graph_of(nano_copy, tmp_path / "portable")
    _truncate(nano_copy)
    cli("build", portable, "-o", "out").refused(1, SHARDS[1], "expected", "put it back|build the bundle again")
    assert names(workplace) == set()


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_missing_checkpoint(command: str, workplace: Path, cli: Cli) -> None:
    cli(command, "absent", "-o", "out").refused(
        1, "absent does not exist", "expected a checkpoint folder", "hf download"
    )
    (workplace / "file").write_text("x")
    cli(command, "file", "-o", "out").refused(1, "is a file", "expected", "name its folder")
    cli(command, "x" * 5000, "-o", "out").refused(1, "too long", "check the path")
    cli(command, "a\nb\x1b[31m", "-o", "out").refused(1, "does not exist")
    assert names(workplace) == {"file"}


def test_names_with_control_characters_build_and_run(tmp_path: Path, graph: Path, workplace: Path, cli: Cli) -> None:
    """A path of the user's own is used as it is, but what is printed stays one line."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    checkpoint = copy_nano(folder / "checkpoint")
    portable = copy_graph_of(checkpoint, folder / "graph")
    out = folder / "bundle"
    built = cli("build", portable, "-o", out, "--quiet")
    assert (built.code, built.err, built.out.count("\n")) == (0, "", 1)
    assert built.out[:-1].isprintable()
    shown = cli("inspect", out)
    assert shown.code == 0
    assert all(line.isprintable() for line in shown.out.splitlines())
    assert cli("generate", out, "--max-tokens", "2", "hi").code == 0
    (checkpoint / SHARDS[0]).unlink()
    cli("generate", out, "--max-tokens", "2", "hi").refused(1, "is missing", "--checkpoint FOLDER")


def test_a_path_that_is_not_utf8(tmp_path: Path, workplace: Path, cli: Cli) -> None:
    """A manifest is UTF-8: it cannot say where such a checkpoint is."""
    checkpoint = copy_nano(tmp_path / "\udcff")
    cli("build", checkpoint, "-o", "out").refused(1, "is not UTF-8", "expected", "rename it")
    assert names(workplace) == set()


def test_no_traceback_from_a_real_process(tmp_path: Path, workplace: Path) -> None:
    """The other tests run in this process; this one is what a user sees, and what --debug adds."""
    plain = child(["build", "absent", "-o", "out"], cwd=workplace)
    plain.refused(1, "absent does not exist")
    assert plain.out == ""
    debug = child(["--debug", "build", "absent", "-o", "out"], cwd=workplace)
    assert debug.code == 1
    assert debug.err.startswith("Traceback")
    assert debug.err.splitlines()[-1].startswith("qwen-rt: error: ")
    assert names(workplace) == set()


def test_fp16_overflow_names_the_tensor(nano_copy: Path, tmp_path: Path, workplace: Path, cli: Cli) -> None:
    portable = copy_graph_of(nano_copy, tmp_path / "portable")
    # bfloat16 0x4790 is 73728: finite, and beyond float16's 65504. The shard's last values are changed.
    shard = nano_copy / SHARDS[1]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\x90\x47"
    shard.write_bytes(data)
    line = cli("build", portable, "-o", "out", "--precision", "fp16").err.splitlines()[-1]
    assert line.startswith("qwen-rt: error: tensor model.")
    assert "holds 73728, beyond float16; expected values up to 65504; build with --precision bf16 or fp32" in line
    assert names(workplace) == set()
    assert cli("build", portable, "-o", "out", "--precision", "bf16", "--quiet").code == 0
