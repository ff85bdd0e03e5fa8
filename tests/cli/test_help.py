"""Help, version, and what is missing: every command explains itself, and names the extra that it needs."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_rt._version import __version__
from qwen_rt.cli import COMMANDS, main

from .conftest import Cli
from .kit import Outcome, child, command, environment, names

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name: str, cli: Cli) -> None:
    shown = cli(name, "--help")
    assert (shown.code, shown.err) == (0, "")
    module = importlib.import_module(f"qwen_rt.cli.{name}")
    assert module.__doc__.splitlines()[0] in shown.out
    example = shown.out.split("\nexample:\n")[1]
    lines = [line.strip() for line in example.splitlines() if line.strip()]
    assert any(f"qwen-rt {name}" in line for line in lines)
    for line in lines:
        words = shlex.split(line.split("|")[-1])
        assert words[0] == "qwen-rt"
        importlib.import_module("qwen_rt.cli")._parse(words[1:])


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of the commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


def test_every_option_says_what_it_is_and_what_it_takes() -> None:
    seen = 0
    for parser in _parsers(importlib.import_module("qwen_rt.cli")._parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            seen += 1
            name = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
            assert action.help, f"{name} has no help"
            assert action.nargs == 0 or action.metavar or action.choices, f"{name} takes something that has no name"
    assert seen > 150


def test_the_first_page(cli: Cli) -> None:
    for arguments in ([], ["--help"]):
        shown = cli(*arguments)
        assert shown.code == 0
        assert all(re.search(rf"^    {name} ", shown.out, re.MULTILINE) for name in COMMANDS)
        assert "example:" in shown.out
    assert cli("--version").out == f"qwen-rt {__version__}\n"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"qwen-rt {name}" not in text] == []


def test_help_needs_nothing_heavy() -> None:
    """`--help` starts fast: it imports neither torch nor ONNX Runtime."""
    code = (
        "import sys, qwen_rt.cli as c; c._parser().format_help(); "
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'tokenizers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([command()[0], "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "[]\n"


_BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from qwen_rt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _without(blocked: set[str], arguments: list[str | Path], folder: Path) -> Outcome:
    program = [command()[0], "-c", _BLOCKER.format(blocked=blocked), *map(str, arguments)]
    done = subprocess.run(
        program, capture_output=True, text=True, cwd=folder, env=environment(), timeout=60, check=False, input="hi\n"
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


EXPORT = {"torch", "onnxscript", "onnx_ir", "ml_dtypes"}


@pytest.mark.parametrize("package", sorted(EXPORT))
def test_building_without_the_export_extra(package: str, workplace: Path) -> None:
    result = _without({package}, ["build", "nano", "-o", "out", "--quiet"], workplace)
    result.refused(1, f"needs {package}, which is not installed", r'pip install "qwen-rt\[export\]"')
    assert names(workplace) == set()


def test_verifying_without_the_bench_extra(bundle: Path, workplace: Path) -> None:
    result = _without({"transformers"}, ["verify", bundle, "--num-tokens", "2", "--quiet"], workplace)
    result.refused(1, "needs transformers, which is not installed", r'pip install "qwen-rt\[bench\]"')


def test_running_a_bundle_needs_none_of_the_extras(bundle: Path, workplace: Path) -> None:
    extras = EXPORT - {"ml_dtypes"} | {"transformers", "safetensors", "matplotlib"}  # onnx itself needs ml_dtypes
    assert _without(extras, ["generate", bundle, "--max-tokens", "2", "hi"], workplace).err == ""
    assert _without(extras, ["chat", bundle, "--max-tokens", "2"], workplace).err == ""
    assert _without(extras, ["inspect", bundle, "--layers"], workplace).err == ""
    assert _without(extras, ["doctor"], workplace).err == ""
    assert names(workplace) == set()


def test_a_broken_installation(bundle: Path, workplace: Path) -> None:
    result = _without({"onnxruntime"}, ["generate", bundle, "hi"], workplace)
    result.refused(1, "needs onnxruntime, which is not installed", "pip install --force-reinstall qwen-rt")


def test_an_import_error_of_our_own_is_a_bug_and_looks_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ModuleNotFoundError("No module named 'qwen_rt.nowhere'", name="qwen_rt.nowhere")

    monkeypatch.setattr("qwen_rt.cli._run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_trouble_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def fails(error: BaseException) -> None:
        def run(arguments: object) -> int:
            raise error

        monkeypatch.setattr("qwen_rt.cli._run", run)

    fails(PermissionError(13, "Permission denied", "/a\nb"))
    cli("doctor").refused(1, "/a b: Permission denied", "check the path")
    fails(MemoryError("Unable to allocate 9 TiB"))
    cli("doctor").refused(1, "not enough memory: Unable to allocate 9 TiB", "lower --max-length")
    fails(KeyboardInterrupt())
    interrupted = cli("doctor")
    assert (interrupted.code, interrupted.err) == (130, "qwen-rt: interrupted\n")


@pytest.mark.slow
def test_demo(workplace: Path) -> None:
    result = child(["demo"], cwd=workplace)
    assert (result.code, result.err) == (0, ""), result
    assert "right" in result.out.splitlines()[-1]
    assert os.path.isfile(workplace / "demo" / "nano-cpu" / "manifest.json")
