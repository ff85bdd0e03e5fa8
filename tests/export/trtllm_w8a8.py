"""A W8A8 TensorRT-LLM checkpoint run in numpy, rank by rank, as its layers compute: int8 products, sums over the ranks.

Written from TensorRT-LLM's layers, apart from our own forward: every product rounds its inputs to int8 with one scale a
token, adds up whole numbers, and scales by token and channel. Between products it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .trtllm_reader import TrtllmCheckpoint, int8_matrix

Doubles = NDArray[np.float64]
Rank = dict[str, torch.Tensor]

Rounding = Literal["none", "rank", "all"]
"""How inputs are rounded: not at all, with the scale that a rank finds in its own, or with that of all ranks."""


class W8a8Forward:
    """The checkpoint in float64 and whole numbers.

    Args:
        read: All ranks.
        rounding: Of the inputs of products. Engines find a token's scale on each rank alone, `rank`. With `all`, whole
            numbers add up over the ranks to those of one.
    """

    def __init__(self, read: TrtllmCheckpoint, rounding: Rounding = "rank") -> None:
        self.config, self.ranks, self.rounding = read.config, read.ranks, rounding

    def logits(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> Doubles:
        """Logits of a text: float64 [T, V]."""
        hidden = _floats(self.ranks[0], "transformer.vocab_embedding.weight")[np.asarray(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"transformer.layers.{layer}"
            x = self._norm(hidden, f"{name}.input_layernorm.weight")
            biases = [_floats(rank, f"{name}.attention.qkv.bias") for rank in self.ranks]
            products = self._products(f"{name}.attention.qkv", [x] * len(self.ranks))
            attended = [self._attend(qkv + bias) for qkv, bias in zip(products, biases, strict=True)]
            hidden = hidden + sum(self._products(f"{name}.attention.dense", attended))
            x = self._norm(hidden, f"{name}.post_layernorm.weight")
            fc, gate = (self._products(f"{name}.mlp.{stem}", [x] * len(self.ranks)) for stem in ("fc", "gate"))
            inner = [a / (1 + np.exp(-a)) * b for a, b in zip(fc, gate, strict=True)]
            hidden = hidden + sum(self._products(f"{name}.mlp.proj", inner))
        x = self._norm(hidden, "transformer.ln_f.weight")
        of_ranks = [x @ _floats(rank, "lm_head.weight").T for rank in self.ranks]
        return np.concatenate(of_ranks, -1)[:, : self.config["vocab_size"]]

    def _products(self, stem: str, inputs: list[Doubles]) -> list[Doubles]:
        """Products of each rank's inputs [T, K] with its matrix [N, K]: float64 [T, N] each."""
        held = [int8_matrix(rank, stem) for rank in self.ranks]
        inputs = [x / smoother for x, (_, _, smoother) in zip(inputs, held, strict=True)]
        if self.rounding == "none":
            return [x @ (w.astype(np.float64) * c[:, None]).T for x, (w, c, _) in zip(inputs, held, strict=True)]
        largest = [np.maximum(np.abs(x).max(-1, keepdims=True), 1e-6) for x in inputs]
        if self.rounding == "all":
            largest = [np.max(largest, axis=0)] * len(largest)
        found = []
        for x, most, (values, scale, _) in zip(inputs, largest, held, strict=True):
            sums = np.rint(x / (most / 127)) @ values.astype(np.float64).T  # whole numbers, exact
            assert np.abs(sums).max() < 2**31
            found.append(sums * (most / 127) * scale)
        return found

    def _norm(self, x: Doubles, name: str) -> Doubles:
        size = np.sqrt(np.mean(x * x, -1, keepdims=True) + self.config["norm_epsilon"])
        normed: Doubles = x / size * _floats(self.ranks[0], name)
        return normed

    def _attend(self, qkv: Doubles) -> Doubles:
        """Causal attention of the heads of one rank: float64 [T, (h + 2 g) D] → [T, h D]."""
        config, tokens, tp = self.config, len(qkv), len(self.ranks)
        width, num_heads = config["head_size"], config["num_attention_heads"] // tp
        num_kv_heads = -(-config["num_key_value_heads"] // tp)
        heads = qkv.reshape(tokens, -1, width).transpose(1, 0, 2)  # [h + 2 g, T, D]
        q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads])
        angles = np.outer(np.arange(tokens), config["rotary_base"] ** (-np.arange(0, width, 2) / width))  # [T, D/2]
        k, v = (np.repeat(part, num_heads // num_kv_heads, 0) for part in (_turn(k, angles), v))
        scores = _turn(q, angles) @ k.transpose(0, 2, 1) / width**0.5
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context: Doubles = weights / weights.sum(-1, keepdims=True) @ v  # [h, T, D]
        return context.transpose(1, 0, 2).reshape(tokens, -1)


def _floats(rank: Rank, name: str) -> Doubles:
    array: Doubles = rank[name].to(torch.float64).numpy()
    return array


def _turn(x: Doubles, angles: Doubles) -> Doubles:
    first, second = np.split(x, 2, -1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
