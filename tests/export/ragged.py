"""Running a graph on one cache of several rows, as a runtime does: ragged calls, idle rows, padding of noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.spec import ModelSpec

from .graphs import Feeds, cache_feeds
from .paged import Chunk, shared_name

Run = Callable[[Feeds], Feeds]
"""Feeds of a graph by input name → its outputs by name."""


class RaggedModel:
    """A graph with a dense cache; row i belongs to sequence i.

    A call takes every row. Rows that no chunk belongs to are idle, and tokens behind a row's own are noise, as are the
    cache rows that nothing was written to.

    Args:
        run: Runs the graph.
        spec: The model.
        num_rows: Rows of the cache.
        capacity: Tmax.
        dtype: Of the cache.
        true_lengths: Let `kv_lengths` count valid rows only, 0 in an idle row; else `write_indices + S`.
    """

    def __init__(
        self,
        run: Run,
        spec: ModelSpec,
        num_rows: int,
        capacity: int,
        dtype: str = "float32",
        true_lengths: bool = False,
    ) -> None:
        self.run, self.spec, self.num_rows, self.true_lengths = run, spec, num_rows, true_lengths
        self.caches = cache_feeds(spec, num_rows, capacity, dtype)
        self.lengths = np.zeros(num_rows, np.int64)
        self.rng = np.random.default_rng(11)

    def call(self, chunks: Sequence[Chunk], padding: int = 0) -> NDArray[np.float32]:
        """Feed chunks in one call, rows padded to the longest and `padding` more; logits float32[len(chunks), V]."""
        num_tokens = max(len(ids) for _, ids in chunks) + padding
        ids = self.rng.integers(0, self.spec.vocab_size, (self.num_rows, num_tokens))
        new = np.zeros(self.num_rows, np.int64)
        for row, tokens in chunks:
            ids[row, : len(tokens)] = tokens
            new[row] = len(tokens)
        starts = self.lengths
        lengths = np.where(new > 0, starts + new, 0) if self.true_lengths else starts + num_tokens
        feeds = self.caches | {
            tensors.INPUT_IDS: ids,
            tensors.WRITE_INDICES: starts,
            tensors.KV_LENGTHS: lengths,
            tensors.LOGITS_INDICES: np.maximum(new - 1, 0),
        }
        found = self.run({name: array.copy() for name, array in feeds.items()})
        for name, array in found.items():
            assert np.isfinite(array.astype(np.float32)).all(), f"{name} has numbers that are not finite"
        self.caches = {past: found[present] for past, present in shared_name(self.spec)}
        self.lengths = starts + new
        return found[tensors.LOGITS][[row for row, _ in chunks]]

    def cached(self, row: int) -> dict[str, NDArray[Any]]:
        """Past name → the valid rows of a sequence, [Hkv, T, D]."""
        return {name: array[row, :, : self.lengths[row]] for name, array in self.caches.items()}
