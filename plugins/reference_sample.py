"""The `sample` op in plain numpy, float64, one row and one token at a time: what the GPU kernels are tested against.

It shares nothing with `qwen_rt.runtime.sampler`, which means the same: a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen_rt.errors import UsageError

__all__ = ["BAD_ROW", "NUM_TOP", "philox", "sample"]

BAD_ROW = -2
"""What `history` holds where the logits allow no choice."""

NUM_TOP = 20
"""Entries of `top_ids` and `top_logprobs`."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_GREEDY_TEMPERATURE = np.float32(1e-5)
_WORD = 2**64 - 1
_NEEDS = (
    ("temperature", "seeds"),
    ("temperature", "num_outputs"),
    ("penalties", "counts"),
    ("counts", "count_slots"),
    ("edit_ids", "edit_values"),
    ("edit_ids", "edit_until"),
    ("edit_ids", "num_outputs"),
    ("history", "step"),
    ("logprobs", "step"),
    ("top_ids", "step"),
    ("top_ids", "top_logprobs"),
)


def philox(seed: int, position: int) -> int:
    """Return the first 64-bit word of Philox4x64-10 with the key `seed` and the counter `position + 1`.

    numpy's generator raises its counter before it draws, so that this is `Philox(key=seed, counter=position)`'s first.

    Args:
        seed: 0 to 2**64 - 1.
        position: 0 to 2**64 - 2.

    Returns:
        0 to 2**64 - 1.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    words, key = [position + 1, 0, 0, 0], [seed, 0]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ key[0],
            second & _WORD,
            (first >> 64) ^ words[3] ^ key[1],
            first & _WORD,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & _WORD, (key[1] + 0xBB67AE8584CAA73B) & _WORD]
    return words[0]


def sample(tensors: Mapping[str, ArrayLike], num_tokens: int = 0) -> dict[str, NDArray[np.generic]]:
    """Choose the next token of every row.

    Args:
        tensors: Inputs and in-place outputs of the op by name, as in `qwen_rt.ops`; absent ones left out. Of `history`,
            `logprobs`, `top_ids` and `top_logprobs` one step's part is written, so they are given too, where wanted.
        num_tokens: Ids from here on are padding; 0: none are.

    Returns:
        New arrays: `next_ids`, and every given tensor that the op writes, under its own name (`positions`, ...).

    Raises:
        UsageError: A tensor is given without another that it needs.
    """
    given = {name: np.asarray(value) for name, value in tensors.items()}
    for name, other in _NEEDS:
        if name in given and other not in given:
            raise UsageError(f"{name} without {other}", f"{other} beside {name}", "pass both")
    written = ("positions", "num_outputs", "counts", "step", "history", "logprobs", "top_ids", "top_logprobs")
    out = {name: given[name].copy() for name in written if name in given}
    logits = given["logits"][:, : num_tokens or None]
    at = (
        int(given["step"][0]) % next((len(out[name]) for name in written[4:] if name in out), 1) if "step" in out else 0
    )
    out["next_ids"] = np.zeros(len(logits), np.int64)
    for row, raw in enumerate(logits):
        edited = _edit(raw, row, given)
        bad = any(np.isnan(x).any() or not np.isfinite(x.max()) for x in (raw, edited))
        token = 0 if bad else _choose(edited, row, given)
        out["next_ids"][row] = token
        if "history" in out:
            out["history"][at, row] = BAD_ROW if bad else token
        log_softmax = np.full(len(raw), math.nan) if bad else _log_softmax(raw)
        if "logprobs" in out:
            out["logprobs"][at, row] = log_softmax[token]
        if "top_ids" in out:
            top = _by_falling_logit(raw)[: 0 if bad else NUM_TOP]
            out["top_ids"][at, row] = [*top, *[-1] * (NUM_TOP - len(top))]
            out["top_logprobs"][at, row] = [*log_softmax[top], *[math.nan] * (NUM_TOP - len(top))]
        if "counts" in out and given["count_slots"][row] >= 0 and not bad:
            out["counts"][given["count_slots"][row], token] += 1
    if "positions" in out:
        out["positions"] += out["positions"] >= 0
    for name in ("num_outputs", "step"):
        if name in out:
            out[name] += 1
    return out


def _edit(raw: F32, row: int, given: Mapping[str, NDArray[np.generic]]) -> F32:
    """Edits, then penalties; every step rounds to float32."""
    x = raw.copy()
    with np.errstate(all="ignore"):  # an extreme penalty overflows, which makes the row a bad one
        if "edit_ids" in given:
            edits = zip(given["edit_ids"][row], given["edit_values"][row], given["edit_until"][row], strict=True)
            for token, value, until in edits:
                if 0 <= token < len(x) and given["num_outputs"][row] < until:
                    x[token] += np.float32(value)
        slot = int(given["count_slots"][row]) if "count_slots" in given else -1
        if slot >= 0 and "penalties" in given:
            repetition, frequency, presence = (np.float32(value) for value in given["penalties"][row])
            counts = given["counts"][slot, : len(x)].astype(np.int64)
            for token in np.flatnonzero(counts):
                in_output = int(counts[token]) & 0x7FFFFFFF
                value = x[token]
                value = value / repetition if value > 0 else value * repetition
                value = value - frequency * np.float32(in_output)
                x[token] = value - presence if in_output else value
    return x


def _choose(x: F32, row: int, given: Mapping[str, NDArray[np.generic]]) -> int:
    """Greedy, or the token at the row's random number among those that the filters leave."""

    def setting(name: str, default: float) -> float:
        return float(given[name][row]) if name in given else default

    order = _by_falling_logit(x)
    if "temperature" not in given or given["temperature"][row] < _GREEDY_TEMPERATURE:
        return int(order[0])
    top_k, top_p, min_p = int(setting("top_k", 0)), setting("top_p", 1), setting("min_p", 0)
    scaled: F64 = (x.astype(np.float64) - float(x[order[0]])) / setting("temperature", 1)
    p: F64 = np.exp(scaled)
    if 0 < top_k < len(x):
        order = order[x[order] >= x[order[top_k - 1]]]
    if top_p < 1:
        reached = np.cumsum(p[order])
        order = order[np.concatenate([[0.0], reached[:-1]]) < top_p * reached[-1]]
    if min_p > 0:
        order = order[scaled[order] >= math.log(min_p)]
    kept = np.sort(order)
    cumulative = np.cumsum(p[kept])
    word = philox(int(given["seeds"][row]) & _WORD, int(given["num_outputs"][row]))
    target = (word >> 11) * 2.0**-53 * float(cumulative[-1])
    # Rounding may lift the product to the whole mass: then it is the last token that adds to it.
    above = np.flatnonzero((cumulative > target) | (cumulative == cumulative[-1]))
    return int(kept[above[0]])


def _by_falling_logit(x: F32) -> I64:
    """All ids; among equals, the lower id first."""
    order: I64 = np.lexsort((np.arange(len(x)), -x))
    return order


def _log_softmax(raw: F32) -> F64:
    shifted = raw.astype(np.float64) - float(raw.max())
    result: F64 = shifted - math.log(np.exp(shifted).sum())
    return result
