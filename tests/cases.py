"""A checkpoint with everything that tests ask of it: bundles, sessions, reference logits. Each is made on first use.

The CPU bundle is built from the portable graph, so that a shape is traced once; `test_parity` also builds one from the
checkpoint and holds the two equal.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.runtime.kv_cache import KVCache
from qwen_rt.runtime.session import CpuSession

from .checkpoints import SHAPES, TINY, Shape, load_reference, random_ids, reference_logits, save_checkpoint

NUM_TOKENS = 40  # beyond the 32 positions that the YaRN shapes begin with


class Case:
    """One shape of `checkpoints.SHAPES` on disk."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self.ids = random_ids(shape, NUM_TOKENS)

    @cached_property
    def checkpoint(self) -> Path:
        return save_checkpoint(self.shape, self.folder / "checkpoint")

    @cached_property
    def reference(self) -> Any:
        return load_reference(self.checkpoint)

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """transformers' logits of every position of `ids`: float32[S, V]."""
        logits: NDArray[np.float32] = reference_logits(self.reference, self.ids[None])[0]
        return logits

    @cached_property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        """All parameters, widened to float32."""
        opened = Checkpoint.open(self.checkpoint)
        return {name: to_float32(opened.tensors[name], opened.read(name)) for name in opened.spec.parameters()}

    @cached_property
    def portable(self) -> Path:
        return self.build("portable", target="portable", dtype="float32")

    @cached_property
    def bundle(self) -> Path:
        return self.build("cpu", self.portable)

    @cached_property
    def session(self) -> CpuSession:
        return CpuSession(Bundle.open(self.bundle), num_threads=1)  # more threads only spin: the shapes are small

    @cached_property
    def whole(self) -> NDArray[np.float32]:
        """The session's logits of every position of `ids`, through one prefill: float32[S, V]."""
        return all_at_once(self.session, self.ids)

    def narrow(self, dtype: str) -> Path:
        """A self-contained portable graph that computes in `dtype`, traced in it."""
        folder = self.folder / f"whole-{dtype}"
        return (
            folder if folder.exists() else self.build(folder.name, target="portable", dtype=dtype, self_contained=True)
        )

    def build(self, name: str, source: Path | None = None, **options: Any) -> Path:
        """Build into a folder of that name, from the checkpoint or from `source`."""
        build(source or self.checkpoint, self.folder / name, BuildOptions(quiet=True, **options))
        return self.folder / name


class Zoo:
    """All cases of a test session, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases: dict[str, Case] = {}

    def case(self, name: str) -> Case:
        if name not in self._cases:
            shape = TINY if name == "tiny" else SHAPES[name]
            self._cases[name] = Case(shape, self._folder / name)
        return self._cases[name]


def all_at_once(session: CpuSession, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of every position through one prefill: the text in S rows, each asking for another position. [S, V]."""
    num_tokens = len(ids)
    cache = session.new_cache(num_tokens, num_tokens)
    rows = np.tile(ids, (num_tokens, 1))
    return session.run(cache, 0, rows, np.zeros(num_tokens, np.int64), np.arange(num_tokens)).copy()


def in_chunks(
    session: CpuSession, ids: NDArray[np.int64], chunk: int, cache: KVCache | None = None, row: int = 0
) -> NDArray[np.float32]:
    """Logits of the last position of each chunk, float32[ceil(S / chunk), V], through the cache of one row."""
    cache = cache or session.new_cache(1, len(ids))
    found = []
    for start in range(0, len(ids), chunk):
        part = ids[None, start : start + chunk]
        last = np.array([part.shape[1] - 1])
        found.append(session.run(cache, row, part, np.array([start]), last)[0].copy())
    return np.stack(found)
