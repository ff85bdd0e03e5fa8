"""Typed access to the JSON of a manifest, whose every name and value may be wrong or hostile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qwen_rt.errors import BundleError
from qwen_rt.strict_json import show

__all__ = ["REBUILD", "Fields", "inner_path", "plain_name"]

REBUILD = "build the bundle again: qwen-rt build CHECKPOINT -o BUNDLE"
"""The next step wherever a bundle is not what was built."""

_MAX_DEPTH = 8


class Fields:
    """Typed access to a JSON object whose every value may be wrong."""

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self._document, self._source = document, source

    @property
    def source(self) -> str:
        """Where the object stands, for messages."""
        return self._source

    def _fail(self, key: str, expected: str) -> BundleError:
        found = show(self._document[key]) if key in self._document else "(missing)"
        return BundleError(f"{self._source}: {key}={found}", expected, REBUILD)

    def string(self, key: str) -> str:
        """A non-empty string."""
        value = self._document.get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._fail(key, "a non-empty string")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of some strings."""
        value = self._document.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self._fail(key, "one of " + ", ".join(choices))
        return value

    def integer(self, key: str, low: int) -> int:
        """An integer of at least `low`."""
        value = self._document.get(key)
        if type(value) is not int or not low <= value <= 2**62:
            raise self._fail(key, f"an integer of at least {low}")
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._document.get(key)
        if type(value) is not bool:
            raise self._fail(key, "true or false")
        return value

    def sha256(self, key: str) -> str:
        """64 hex digits."""
        value = self._document.get(key)
        if not isinstance(value, str) or len(value) != 64 or any(c not in "0123456789abcdef" for c in value):
            raise self._fail(key, "64 lower-case hex digits")
        return value

    def is_null(self, key: str) -> bool:
        """Whether the value is there and null."""
        return key in self._document and self._document[key] is None

    def object(self, key: str) -> dict[str, Any]:
        """An object."""
        value = self._document.get(key)
        if not isinstance(value, dict):
            raise self._fail(key, "an object")
        return value

    def data(self, key: str) -> dict[str, Any]:
        """An object of any JSON data, nested no more than `_MAX_DEPTH` levels deep."""
        value, level = self.object(key), [self._document[key]]
        for _ in range(_MAX_DEPTH):
            values = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
            level = [child for child in values if isinstance(child, dict | list)]
        if level:
            raise BundleError(f"{self._source}: {key} is nested too deeply", f"at most {_MAX_DEPTH} levels", REBUILD)
        return value

    def strings(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        value = self.object(key)
        for name, text in value.items():
            if not isinstance(text, str):
                raise BundleError(f"{self._source}: {key}[{show(name)}]={show(text)}", "a string", REBUILD)
        return value

    def objects(self, key: str) -> dict[str, dict[str, Any]]:
        """An object whose values are objects."""
        value = self.object(key)
        for name, entry in value.items():
            if not isinstance(entry, dict):
                raise BundleError(f"{self._source}: {key}[{show(name)}]={show(entry)}", "an object", REBUILD)
        return value


def inner_path(name: str, source: str) -> str:
    """Return `name` if it is a relative path that stays inside the bundle, as POSIX writes it.

    Raises:
        BundleError: It is not; the message begins with `source`.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or name.startswith("/") or ".." in parts or str(PurePosixPath(name)) != name:
        raise BundleError(f"{source}: file name {show(name)}", "a relative path inside the bundle", REBUILD)
    return name


def plain_name(name: str, source: str) -> str:
    """Return `name` if it is a file name without folders.

    Raises:
        BundleError: It is not; the message begins with `source`.
    """
    if "/" in inner_path(name, source):
        raise BundleError(f"{source}: shard name {show(name)}", "a file name without folders", REBUILD)
    return name
