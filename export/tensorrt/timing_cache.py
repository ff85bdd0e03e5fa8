"""What the builder measured, kept between builds: one file for each version of TensorRT.

TensorRT-RTX measures nothing while it builds (it specializes kernels when an engine is loaded, on the GPU), so its
timing caches are empty and this file's functions do nothing for it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from qwen_rt.errors import StorageError
from qwen_rt.export.tensorrt.flavour import Flavour
from qwen_rt.storage import atomic_write_bytes

__all__ = ["default_cache", "has_timing_cache", "load_cache", "save_cache"]

_MAX_BYTES = 1 << 30


def has_timing_cache(target: str) -> bool:
    """Whether what compiles for a target measures while it builds."""
    return target == "tensorrt"


def default_cache(flavour: Flavour) -> Path:
    """The file in the user's cache folder; measurements of one version say nothing to another."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qwen-rt" / "timing" / f"{flavour.target}-{flavour.version}.cache"


def load_cache(config: Any, file: Path) -> Any:
    """Give the builder's configuration the measurements of a file, or none yet; returns the cache, None if refused.

    A file that is damaged, or of another version or GPU, is as good as none.
    """
    data = b""
    with contextlib.suppress(OSError):
        if file.stat().st_size <= _MAX_BYTES:
            data = file.read_bytes()
    for content in dict.fromkeys((data, b"")):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def save_cache(config: Any, file: Path) -> bool:
    """Write what the builder knows now; a cache that cannot be kept does not stop a build. Says whether it was."""
    cache = config.get_timing_cache()
    if cache is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, bytes(memoryview(cache.serialize())))
    except (OSError, StorageError):
        return False
    return True
