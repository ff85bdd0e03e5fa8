"""Fields of a quantization config, typed and ranged when they are read."""

from __future__ import annotations

from typing import Any

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.strict_json import check_bool, check_int, show

__all__ = ["FIX_CONFIG", "Fields"]

FIX_CONFIG = "download config.json again"

_MAX_NAMES = 100_000


class Fields:
    """One JSON object of the config.

    Args:
        data: The object.
        path: How messages name it: `quantization_config`.

    Raises:
        CheckpointError: It is no object. Every method raises that for a value of the wrong type or out of range.
    """

    def __init__(self, data: object, path: str) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}={show(data)}", "a JSON object", FIX_CONFIG)
        self.data: dict[str, Any] = data
        self.path = path

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.data.get(key) is not None

    def first_of(self, *keys: str) -> str:
        """The first of the names that the object has, or the first of all: some fields go by several names."""
        return next((key for key in keys if self.has(key)), keys[0])

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [`low`, `high`]; required without a default."""
        return check_int(f"{self.path}.{key}", self._value(key, default), low, high)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        return check_bool(f"{self.path}.{key}", self._value(key, default))

    def text(self, key: str, default: str | None = None) -> str:
        """A text in lower case; required without a default."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}.{key}={show(value)}", "a text", FIX_CONFIG)
        return value.lower()

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of names under the first of the keys that is there; empty if none is."""
        key = self.first_of(*keys)
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(value) > _MAX_NAMES:
            raise CheckpointError(f"{self.path}.{key}={show(value)}", "a list of names", FIX_CONFIG)
        return tuple(value)

    def child(self, key: str) -> Fields:
        """An object within this one."""
        return Fields(self._value(key, None), f"{self.path}.{key}")

    def require(self, key: str, value: object, *readable: object) -> None:
        """Refuse a value that is none of those that are read.

        Raises:
            UnsupportedModelError: It is another.
        """
        if value not in readable:
            shown = " or ".join(show(item) for item in readable)
            raise UnsupportedModelError(f"{self.path}.{key}={show(value)}", shown, "take another quantized checkpoint")

    def _value(self, key: str, default: object) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            if key in self.data:
                raise CheckpointError(f"{self.path}.{key}=null", "a value", FIX_CONFIG)
            raise CheckpointError(f"{self.path} lacks {key}", "a whole quantization config", FIX_CONFIG)
        return default
