"""Mutated manifests and graphs: each is read, or refused by an error of ours, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.bundle import GRAPH_FILE, MANIFEST_FILE, Bundle, Manifest
from qwen_rt.errors import BundleError, QwenRtError
from qwen_rt.inspection import inspect

from ..cli.kit import rehash, shared_bundle

NUM_MANIFESTS, NUM_OPENED, NUM_GRAPHS = 2200, 300, 210
MAX_SECONDS, MAX_PEAK_BYTES = 20.0, 64 << 20
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**62 + 1, 10**19, 1e308, -0.5, "", "x", "\0", "\ud800", "../x", "/etc/passwd",
    "a\nb\x1b[31m", "x" * 5000, [], {}, [[]], {"": {}}, float("nan"), float("inf"), "0" * 64, "É" * 300,
)  # fmt: skip
NAMES = (
    "../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../x",
    "\0",
    "a\nb",
    "x" * 300,
    "x/" * 3000 + "y",
    "\\..\\x",
    "C:\\x",
    "é",
)


def _places(node: Any, depth: int = 8) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document, not too far into what an earlier mutation nested."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list) and depth:
            yield from _places(node[key], depth - 1)


def _mutate_document(document: Any, rng: random.Random) -> bytes:
    """Change one to three places: a value of another kind, a hostile name, a key lost or copied, deep nesting."""
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(_places(document)))
        kind = rng.randrange(6)
        if kind == 0 and isinstance(container, dict):
            container[rng.choice(NAMES)] = container.pop(key)
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[f"{key}2"] = container[key]
        elif kind == 3:
            deep: Any = rng.choice(VALUES)
            for _ in range(rng.choice((5, 90, 200, 900))):
                deep = [deep] if rng.random() < 0.5 else {"k": deep}
            container[key] = deep
        else:
            container[key] = rng.choice(VALUES)
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):
        return b"[" * 100_000


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double, insert; or write what a JSON library would not."""
    kind = rng.randrange(7)
    at = rng.randrange(len(data))
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]
    if kind == 3:
        line = rng.choice(data.splitlines(keepends=True))  # a key twice
        return data.replace(line, line + line)
    if kind == 4:
        number = rng.choice((b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"0x10", b"1_000", b"-0", b"1e-400"))
        return data.replace(rng.choice((b"1", b"2048", b"true", b"1e-06")), number, rng.randint(1, 3))
    if kind == 5:
        return data[:at] + rng.choice((b"[" * 200_000, b'{"a":' * 100_000, b'"\\ud800"', b"\xff", b"\xef\xbb\xbf"))
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 1000, b"null", b"\0")) + data


def _mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        yield _mutate_document(json.loads(data), rng) if rng.random() < 0.6 else _mutate_bytes(data, rng)


def _check_message(error: QwenRtError) -> None:
    """One printable line, however long and strange the names in it."""
    assert str(error).isprintable()
    assert len(str(error)) < 3100


@pytest.fixture(scope="module")
def manifest() -> bytes:
    return (shared_bundle() / MANIFEST_FILE).read_bytes()


def test_mutated_manifests_are_read_or_refused(manifest: bytes) -> None:
    read = refused = 0
    slowest = 0.0
    start = time.perf_counter()
    tracemalloc.start()
    try:
        for data in _mutations(manifest, 20_261_123, NUM_MANIFESTS):
            began = time.perf_counter()
            try:
                found = Manifest.from_json(data)
            except QwenRtError as error:
                refused += 1
                _check_message(error)
            else:
                read += 1
                assert Manifest.from_json(found.to_json()) == found, "what is read can be written and read again"
                for name in found.files:
                    assert not name.startswith("/"), name
                    assert ".." not in name.split("/"), name
                assert not any("/" in name for name in found.checkpoint.shards)
            slowest = max(slowest, time.perf_counter() - began)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read > 20, read
    assert refused > NUM_MANIFESTS // 2, refused
    assert peak < MAX_PEAK_BYTES, peak
    assert time.perf_counter() - start < MAX_SECONDS, slowest


def test_bundles_with_mutated_manifests_open_whole_or_not_at_all(manifest: bytes, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shared_bundle(), tmp_path / "bundle"))
    opened = refused = 0
    start = time.perf_counter()
    for data in _mutations(manifest, 7, NUM_OPENED):
        (folder / MANIFEST_FILE).write_bytes(data)
        try:
            Bundle.open(folder)
        except QwenRtError as error:
            refused += 1
            _check_message(error)
        else:
            opened += 1
        with contextlib.suppress(QwenRtError):
            inspect(folder).render(with_layers=True)
    assert opened > 0
    assert refused > NUM_OPENED // 2
    assert time.perf_counter() - start < MAX_SECONDS


@pytest.mark.parametrize("consistent", [False, True], ids=["manifest-as-built", "manifest-agrees"])
def test_mutated_graphs(consistent: bool, tmp_path: Path) -> None:
    """A changed graph is refused by its hash; with a manifest that agrees, `inspect` shows it or refuses it."""
    folder = Path(shutil.copytree(shared_bundle(), tmp_path / "bundle"))
    data = (folder / GRAPH_FILE).read_bytes()
    rng = random.Random(11)
    shown = refused = 0
    start = time.perf_counter()
    for _ in range(NUM_GRAPHS):
        changed = bytearray(data[: rng.choice((len(data), rng.randrange(len(data))))])
        for _ in range(rng.choice((1, 3, 100))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        if changed == data:
            continue
        (folder / GRAPH_FILE).write_bytes(changed)
        if not consistent:
            with pytest.raises(BundleError, match=r"changed after the build|bytes; expected"):
                Bundle.open(folder)
            continue
        rehash(folder, GRAPH_FILE)
        Bundle.open(folder)
        try:
            text = inspect(folder).render(with_layers=True)
        except QwenRtError as error:
            refused += 1
            _check_message(error)
        else:
            shown += 1
            assert all(line.isprintable() for line in text.split("\n"))
    assert time.perf_counter() - start < MAX_SECONDS
    if consistent:
        assert shown > 10
        assert refused > 10
