"""Every module says what it exports, in order and truthfully."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_rt

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"core": "qwen_rt", **{name: f"qwen_rt.{name}" for name in ("export", "runtime", "plugins", "benchmarks")}}


def _modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in file.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            yield ".".join([package, *parts]), file


MODULES = dict(_modules())


def _declared(file: Path) -> list[str] | None:
    """Return the literal `__all__` of a file, or None if it has none."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            value = (
                ast.literal_eval(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else None
            )
            assert isinstance(value, list), f"{file}: __all__ is a list"
            return value
    return None


def _needs_missing_package(name: str) -> str | None:
    """Import a module; return the package outside qwen_rt whose absence stopped it, or None."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "qwen_rt":
            return error.name
        raise
    return None


def test_every_source_file_is_found() -> None:
    assert {"qwen_rt.errors", "qwen_rt.runtime", "qwen_rt.export"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_sorted_all_without_doubles(name: str) -> None:
    file = MODULES[name]
    declared = _declared(file)
    if declared is None:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        public = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        # benchmarks/ and the commands are programs, and so is __main__: no name is imported from them.
        if file.name != "__main__.py" and not name.startswith(("qwen_rt.benchmarks.", "qwen_rt.cli.")):
            assert not public, f"{name} defines {public} and has no __all__"
        return
    # Constants first, then classes, then functions, numbers by their size: the order that `ruff` (RUF022) sorts into.
    kinds = [
        (
            0 if item.isupper() else 1 if item.lstrip("_")[:1].isupper() else 2,
            [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", item)],
        )
        for item in declared
    ]
    assert len(set(declared)) == len(declared), f"{name}: doubles in __all__"
    assert kinds == sorted(kinds), f"{name}: __all__ is not sorted"


@pytest.mark.parametrize("name", [name for name, file in MODULES.items() if _declared(file)])
def test_every_name_in_all_exists_and_is_documented(name: str) -> None:
    if missing := _needs_missing_package(name):
        pytest.skip(f"{missing} is not installed")
    module = sys.modules[name]
    for item in _declared(MODULES[name]) or []:
        assert hasattr(module, item), f"{name}.__all__ lists {item}, which does not exist"
        value = getattr(module, item)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{name}.{item} has no docstring"


def test_public_names_of_the_package_have_docstrings() -> None:
    for item in getattr(qwen_rt, "__all__", []):
        value = getattr(qwen_rt, item)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"qwen_rt.{item} has no docstring"


def test_no_module_lacks_a_docstring() -> None:
    without = [
        name
        for name, file in MODULES.items()
        if (text := file.read_text("utf-8")).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not [name for name in without if not name.endswith("_version")]


def test_every_folder_of_modules_is_listed_for_the_wheel() -> None:
    """A sub-package that pyproject.toml does not list works in a checkout and is missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    present = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert present <= listed, f"not listed in pyproject.toml: {sorted(present - listed)}"
