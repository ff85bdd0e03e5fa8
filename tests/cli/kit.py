"""What the tests of the command line share: folders built once, copies to damage, children, and what an error is."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NANO_FOLDER = Path(str(importlib.resources.files("qwen_rt.nano") / "config.json")).parent
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
QUESTION = "What is 17 + 25?"
HOSTILE = "ev\nil\x1b[31m\u202e"


@functools.cache
def _shared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qwen-rt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def shared_graph() -> Path:
    """The portable graph of nano, traced once: what bundles of nano are built from in a tenth of a second."""
    from qwen_rt.export.build import BuildOptions, build

    build("nano", _shared() / "graph", BuildOptions(target="portable", quiet=True))
    return _shared() / "graph"


@functools.cache
def shared_bundle(self_contained: bool = False) -> Path:
    """A bundle of nano that no test may change."""
    from qwen_rt.export.build import BuildOptions, build

    folder = _shared() / ("packed" if self_contained else "linked")
    build(shared_graph(), folder, BuildOptions(quiet=True, self_contained=self_contained))
    return folder


def copy_nano(folder: Path) -> Path:
    """A checkpoint to damage; copy-on-write is not relied upon, it is 17 MB."""
    shutil.copytree(NANO_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py", "README.md"))
    return folder


def copy_graph_of(checkpoint: Path, folder: Path) -> Path:
    """The portable graph of a copy of nano, without tracing it again."""
    shutil.copytree(shared_graph(), folder)

    def relink(document: dict[str, Any]) -> None:
        document["checkpoint"]["path"] = str(checkpoint)
        for name, shard in document["checkpoint"]["shards"].items():
            shard["path"] = str(checkpoint / name)

    edit_manifest(folder, relink)
    return folder


def edit_json(file: Path, change: Any) -> None:
    """Rewrite a JSON file by a function that changes the document in place."""
    document = json.loads(file.read_bytes())
    change(document)
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def edit_manifest(bundle: Path, change: Any) -> None:
    """Rewrite a manifest by a function that changes the document in place."""
    edit_json(bundle / "manifest.json", change)


def rehash(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    data = (bundle / name).read_bytes()

    def change(document: dict[str, Any]) -> None:
        document["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(bundle, change)


def flip_byte(file: Path, offset: int = -100) -> None:
    """Change one byte, and neither size nor name."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden names too."""
    return {path.name for path in folder.iterdir()}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> str:
        """Assert the one line of an error, and return it."""
        assert self.code == code, self
        assert self.err.startswith("qwen-rt: error: "), self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        assert "Traceback" not in self.err, self
        line = self.err[:-1]
        assert line.isprintable(), repr(line)
        assert len(line) < 3100, len(line)
        for word in words:
            assert re.search(word, line), f"{word!r} not in {line!r}"
        return line


def command(*arguments: str | Path) -> list[str]:
    """The command line, as a child runs it."""
    return [sys.executable, "-m", "qwen_rt", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """A child's environment: ours with output buffered as users have it, and one thread for BLAS."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return ours | {"OMP_NUM_THREADS": "1"} | more


def child(
    arguments: Sequence[str | Path], *, stdin: str | bytes = "", cwd: Path | None = None, **options: Any
) -> Outcome:
    """Run the command in a process of its own."""
    options.setdefault("env", environment())
    done = subprocess.run(
        command(*arguments),
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=120,
        cwd=cwd,
        check=False,
        **options,
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
