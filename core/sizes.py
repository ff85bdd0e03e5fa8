"""Sizes of memory as people write them: `8GiB`, `24 GB`, `500000000`."""

from __future__ import annotations

import re
from fractions import Fraction

from qwen_rt.errors import UsageError

__all__ = ["parse_size"]

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{'iB' if base == 1024 else 'B'}": base**power
    for base in (1000, 1024)
    for power, prefix in enumerate("KMGT", 1)
}
_FACTORS = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")
_WANTED = "bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"


def parse_size(value: int | str, name: str = "size") -> int:
    """Return a size in bytes.

    Args:
        value: Bytes, or a text: a number with a unit, in any case, such as `8GiB`, `1.5 tb` or `4096`.
        name: What the size is for, for the message.

    Returns:
        Bytes, at least 1; a fraction of a byte is dropped.

    Raises:
        UsageError: It is no size, has another unit, or is below one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        factor = None if found is None else _FACTORS.get(found[2].lower())
        if found is None or factor is None:
            raise UsageError(f"{name}={value!r}", _WANTED, "write it like 8GiB")
        size = int(Fraction(found[1]) * factor)
    if size < 1:
        raise UsageError(f"{name}={value!r}", "at least one byte", "write it like 8GiB")
    return size
