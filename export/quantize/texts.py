"""Calibration texts as one rectangle of tokens: cut into windows, chosen evenly, padded on the right.

Attention is causal, so padding behind a text changes nothing in it: all texts go through a layer at once, and every
matrix is read once. Only real tokens are multiplied and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.errors import UsageError
from qwen_rt.export.quantize.forward import multiply
from qwen_rt.row_reader import RowSource

__all__ = ["Texts", "cut_texts", "evenly"]

WINDOW = 512
"""Tokens of a text that see each other; a longer text is cut."""


@dataclass(frozen=True, eq=False)
class Texts:
    """B texts of at most T tokens.

    Attributes:
        ids: int64[B, T], zeros behind each text.
        mask: bool[B, T], where a token is.
    """

    ids: NDArray[np.int64]
    mask: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, padding not counted."""
        return int(self.mask.sum())

    def take(self, x: Tensor) -> Tensor:
        """Rows of real tokens: f32[B, T, K] → f32[n, K], n = `num_tokens`."""
        return x[self.mask]

    def put(self, rows: Tensor) -> Tensor:
        """Undo `take`, with zeros as padding: f32[n, N] → f32[B, T, N]."""
        if rows.shape[0] == self.mask.numel():
            return rows.view(*self.mask.shape, -1)
        spread = rows.new_zeros(*self.mask.shape, rows.shape[-1])
        spread[self.mask] = rows
        return spread

    def multiply(self, source: RowSource, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Multiply inputs f32[n, K] by the matrices of a unit: f32[B, T, N] each, as `LayerPass.advance` takes them."""
        return [self.put(multiply(source, name, x)) for name in names]


def cut_texts(token_ids: Sequence[Sequence[int]], max_tokens: int, window: int = WINDOW) -> Texts:
    """Cut texts into windows and choose some, evenly over all of them.

    Args:
        token_ids: Texts of any lengths.
        max_tokens: How many tokens to choose at most.
        window: Tokens of a window, at most.

    Returns:
        The chosen windows.

    Raises:
        UsageError: No tokens, or none wanted.
    """
    if max_tokens < 1 or window < 1:
        raise UsageError(f"max_tokens={max_tokens}, window={window}", "at least 1")
    pieces = [text[start : start + window] for text in token_ids for start in range(0, len(text), window)]
    total = sum(map(len, pieces))
    if not total:
        raise UsageError("the calibration text has no tokens", "some text", "name another file")
    chosen: list[Sequence[int]] = []
    left = max_tokens
    for index in evenly(len(pieces), max(1, -(-len(pieces) * max_tokens // total))):
        piece = pieces[index][:left]
        left -= len(piece)
        if len(piece):
            chosen.append(piece)
    lengths = np.array([len(piece) for piece in chosen])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([np.asarray(piece, np.int64) for piece in chosen])
    return Texts(ids, torch.from_numpy(mask))


def evenly(length: int, count: int) -> NDArray[np.integer[Any]]:
    """Indices of at most `count` of `length` things, evenly spaced from the first to the last."""
    if length <= count:
        return np.arange(length)
    return np.linspace(0, length - 1, count).round().astype(np.int64)
