"""`export --layout`: what is in the folder, what is shared with the checkpoint, and what is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli
from .kit import NANO_FOLDER, SHARDS, copy_nano, edit_json, names

TEXTS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("layout", ["optimum", "genai"])
def test_weights_are_hard_links(layout: str, cli: Cli, workplace: Path) -> None:
    checkpoint = copy_nano(workplace / "checkpoint")
    done = cli("export", checkpoint, "-o", "out", "--layout", layout, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"layout {layout}, 4 layers: ")
    assert done.out.endswith("of weights shared by hard links\n")
    own = {"model.onnx", "qwen_rt_layout.json"} | ({"genai_config.json"} if layout == "genai" else set())
    assert names(workplace / "out") == own | TEXTS | set(SHARDS)
    for name in SHARDS:
        assert (workplace / "out" / name).samefile(checkpoint / name)
    for name in TEXTS:
        assert (workplace / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    note = json.loads((workplace / "out/qwen_rt_layout.json").read_bytes())
    assert note["shards"] == {"linked": list(SHARDS), "copied": []}
    assert names(workplace) == {"checkpoint", "out"}


def test_a_portable_graph_and_shards_behind_symbolic_links(cli: Cli, graph: Path, workplace: Path) -> None:
    """As in Hugging Face's cache: what is linked is the file, not the symbolic link."""
    checkpoint = copy_nano(workplace / "checkpoint")
    for name in SHARDS:
        (checkpoint / name).rename(workplace / name)
        (checkpoint / name).symlink_to(workplace / name)
    assert cli("export", checkpoint, "-o", "one", "--layout", "optimum", "--quiet").code == 0
    assert cli("export", graph, "-o", "two", "--layout", "optimum", "--quiet").code == 0
    assert (workplace / "one/model.onnx").read_bytes() == (workplace / "two/model.onnx").read_bytes()
    for name in SHARDS:
        assert not (workplace / "one" / name).is_symlink()
        assert (workplace / "one" / name).samefile(workplace / name)


def test_genai_config_says_what_the_checkpoint_says(cli: Cli, graph: Path, workplace: Path) -> None:
    assert cli("export", graph, "-o", "out", "--layout", "genai", "--max-length", "512", "--quiet").code == 0
    document = json.loads((workplace / "out/genai_config.json").read_bytes())
    model, search = document["model"], document["search"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("qwen2", 512, 1152)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1115, [1117, 1115], 1115)
    assert model["decoder"]["head_size"] == 128
    assert (search["do_sample"], search["max_length"]) == (False, 512)


def test_copies_where_they_are_wanted_or_needed(
    cli: Cli, graph: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("export", graph, "-o", "own", "--layout", "optimum", "--self-contained", "--quiet")
    assert done.out.endswith("of weights copied\n")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    done = cli("export", graph, "-o", "nano", "--layout", "optimum", "--quiet")
    assert done.out.endswith("of weights copied (files of the package get no second name)\n")
    checkpoint = copy_nano(workplace / "checkpoint")
    monkeypatch.setattr(os, "link", refuse)
    done = cli("export", checkpoint, "-o", "far", "--layout", "optimum", "--quiet")
    assert done.code == 0
    assert done.out.endswith("of weights copied (hard links do not reach another file system)\n")
    for folder in ("own", "nano", "far"):
        for name in SHARDS:
            assert (workplace / folder / name).read_bytes() == (NANO_FOLDER / name).read_bytes()
            assert not (workplace / folder / name).samefile(NANO_FOLDER / name)


def test_a_full_disk_leaves_nothing(cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = copy_nano(workplace / "checkpoint")
    monkeypatch.setattr(os, "link", refuse)
    cli("export", checkpoint, "-o", "out", "--layout", "optimum", "--quiet").refused(1, "no space left on the device")
    assert names(workplace) == {"checkpoint"}


def test_an_existing_folder(cli: Cli, graph: Path, workplace: Path) -> None:
    arguments = ["export", graph, "-o", "out", "--layout", "genai", "--quiet"]
    (workplace / "out").mkdir()
    (workplace / "out/notes.txt").write_text("mine")
    cli(*arguments).refused(1, "out exists and is not empty", "--force")
    cli(*arguments, "--force").refused(1, "holds no qwen_rt_layout.json")
    assert names(workplace / "out") == {"notes.txt"}
    shutil.rmtree(workplace / "out")
    assert cli(*arguments).code == 0
    assert cli(*arguments, "--force", "--max-length", "64").code == 0
    assert json.loads((workplace / "out/qwen_rt_layout.json").read_bytes())["max_length"] == 64
    assert names(workplace) == {"out"}


def test_what_a_layout_cannot_hold_is_refused(cli: Cli, graph: Path, bundle: Path, workplace: Path) -> None:
    def refused(source: str | Path, code: int, *words: str, layout: str = "genai", more: tuple[str, ...] = ()) -> None:
        cli("export", source, "-o", "out", "--layout", layout, "--quiet", *more).refused(code, *words)
        assert names(workplace) <= {"checkpoint"}

    refused(graph, 2, "--dtype bfloat16 with --layout", more=("--dtype", "bfloat16"))
    refused(graph, 2, "max-length=4096", "1 to 2048", more=("--max-length", "4096"))
    refused(bundle, 1, "is a bundle of target cpu")
    checkpoint = copy_nano(workplace / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    refused(checkpoint, 1, "has no tokenizer.json", "add the tokenizer files")
    shutil.copy(NANO_FOLDER / "tokenizer.json", checkpoint)
    edit_json(checkpoint / "config.json", lambda config: config.pop("eos_token_id"))
    (checkpoint / "generation_config.json").unlink()
    refused(checkpoint, 1, "names no eos_token_id")


@pytest.mark.parametrize("command", [["inspect"], ["build", "-o", "new"], ["export", "-o", "new"]])
def test_the_folder_is_no_checkpoint(command: list[str], cli: Cli, graph: Path, workplace: Path) -> None:
    assert cli("export", graph, "-o", "out", "--layout", "genai", "--quiet").code == 0
    cli(*command, "out").refused(1, "out was written by qwen-rt export --layout, for another runtime", "a checkpoint")
    assert names(workplace) == {"out"}


def test_a_layout_that_nobody_knows(cli: Cli, workplace: Path) -> None:
    assert cli("export", "nano", "-o", "out", "--layout", "gguf").code == 2
    assert names(workplace) == set()


@pytest.mark.parametrize("layout", ["optimum", "genai"])
def test_a_quantized_checkpoint(layout: str, cli: Cli, workplace: Path) -> None:
    checkpoint = Path(__file__).parents[1] / "foreign/fixtures/gptqmodel-int4-act-order"
    result = cli("export", checkpoint, "-o", "out", "--layout", layout, "--quiet")
    result.refused(1, "is quantized", f"a checkpoint of floats for --layout {layout}", "qwen-rt build")
    assert names(workplace) == set()
