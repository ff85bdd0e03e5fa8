"""Who may import whom: core is below all, export and runtime never meet, no heavy library comes in by accident."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"core": "qwen_rt", **{name: f"qwen_rt.{name}" for name in ("export", "runtime", "plugins", "benchmarks")}}
HEAVY = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_llm", "transformers")
OPTIONAL = ("torch", "transformers", "safetensors", "onnxscript", "matplotlib", "optimum", "math_verify")


class Import(NamedTuple):
    """One imported module: where it stands, its full name, and whether it happens on import of the file."""

    place: str
    name: str
    at_import: bool


def _module_name(file: Path, folder: str) -> list[str]:
    return [*PACKAGES[folder].split("."), *file.relative_to(ROOT / folder).with_suffix("").parts]


def _is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node and whether it runs when the module is imported; type-checking blocks do not run at all."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            assert isinstance(child, ast.If)
            for inner in child.orelse:
                yield inner, at_import
                yield from _walk(inner, at_import)
            continue
        runs = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, runs
        yield from _walk(child, runs)


def imports_of(source: str, module: list[str], place: str = "test") -> Iterator[Import]:
    """Yield every import of a source text, relative ones resolved against the module's own dotted name."""
    for node, at_import in _walk(ast.parse(source)):
        where = f"{place}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(where, alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) if node.level else ""
            full = ".".join(part for part in (base, node.module) if part)
            yield Import(where, full, at_import)
            for alias in node.names:  # `from . import x` may name a module
                yield Import(where, f"{full}.{alias.name}", at_import)
        elif (
            isinstance(node, ast.Call)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(where, str(node.args[0].value), at_import)


def _imports(folder: str, *, skip: str = "") -> Iterator[Import]:
    for file in sorted((ROOT / folder).rglob("*.py")):
        relative = file.relative_to(ROOT).as_posix()
        if skip and relative.startswith(skip):
            continue
        yield from imports_of(file.read_text(encoding="utf-8"), _module_name(file, folder), relative)


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _offenders(found: Iterator[Import], *packages: str, only_at_import: bool = False) -> list[str]:
    return sorted(
        {
            f"{i.place} imports {i.name}"
            for i in found
            if _within(i.name, *packages) and (i.at_import or not only_at_import)
        }
    )


def test_the_parser_of_this_test_sees_every_kind_of_import() -> None:
    source = """
import torch
from ..export import trace
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import transformers
try:
    import tensorrt
except ImportError:
    pass
def lazy():
    import onnxruntime.capi
    importlib.import_module("optimum.x")
"""
    found = {(i.name, i.at_import) for i in imports_of(source, ["qwen_rt", "runtime", "session"])}
    assert {("torch", True), ("tensorrt", True), ("onnxruntime.capi", False), ("optimum.x", False)} <= found
    assert ("qwen_rt.export", True) in found
    assert ("qwen_rt.export.trace", True) in found
    assert not any(name.startswith("transformers") for name, _ in found)


def test_core_imports_no_heavy_library_at_module_level() -> None:
    assert not _offenders(_imports("core"), *HEAVY, only_at_import=True)


def test_core_imports_no_heavy_library_even_lazily_outside_the_cli() -> None:
    assert not _offenders(_imports("core", skip="core/cli/"), *HEAVY)


def test_core_reaches_the_other_packages_only_lazily_and_only_from_the_cli() -> None:
    others = [PACKAGES[name] for name in ("export", "runtime", "plugins", "benchmarks")]
    assert not _offenders(_imports("core", skip="core/cli/"), *others)
    assert not _offenders(_imports("core"), *others, only_at_import=True)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("export", ("runtime", "benchmarks")),
        ("runtime", ("export", "benchmarks")),
        ("plugins", ("export", "runtime", "benchmarks")),
    ],
)
def test_packages_keep_apart(folder: str, forbidden: tuple[str, ...]) -> None:
    names = [PACKAGES[name] for name in forbidden]
    assert not _offenders(_imports(folder), *names, "qwen_rt.cli")


def test_runtime_needs_no_optional_package() -> None:
    assert not _offenders(_imports("runtime"), *OPTIONAL)


def test_no_source_imports_a_folder_by_its_bare_name() -> None:
    """`import core` works by accident in a checkout and nowhere else."""
    for folder in PACKAGES:
        assert not _offenders(_imports(folder), *PACKAGES)


@pytest.mark.parametrize(
    ("module", "absent"),
    [("qwen_rt", HEAVY), ("qwen_rt.doctor", HEAVY), ("qwen_rt.storage", HEAVY), ("qwen_rt.runtime", OPTIONAL)],
)
def test_importing_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    """The rule as the interpreter sees it: third-party imports count too."""
    probe = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.split() == []
