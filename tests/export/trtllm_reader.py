"""Reads a TensorRT-LLM checkpoint back: what all ranks hold → the parameters it was made of, by the formulas alone.

Written from TensorRT-LLM's documents and loader, not from our writer: it knows only names, shapes and what the numbers
mean. Whatever two ranks both hold has to be the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Arrays = dict[str, NDArray[np.float32]]

SMOOTHQUANT = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"


class TrtllmCheckpoint:
    """A folder of `config.json` and `rank{r}.safetensors`, all of it in memory."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tp: int = self.config["mapping"]["tp_size"]
        assert self.config["mapping"] == {"world_size": self.tp, "tp_size": self.tp, "pp_size": 1}
        self.ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(self.tp)]
        assert not (folder / f"rank{self.tp}.safetensors").exists()
        assert all(rank.keys() == self.ranks[0].keys() for rank in self.ranks)
        assert all(rank[name].shape == tensor.shape for rank in self.ranks for name, tensor in self.ranks[0].items())
        self.algorithm: str | None = self.config["quantization"]["quant_algo"]
        self.dtype = getattr(torch, self.config["dtype"])

    def linear(self, stem: str, builder: bool = False) -> list[NDArray[np.float32]]:
        """What a linear of a layer multiplies by on each rank: f32[N, K].

        Args:
            stem: Its name.
            builder: Round as trtllm-build does when it makes W8A16 weights of floats.
        """
        return [self._dequantized(rank, stem, builder) for rank in self.ranks]

    def _dequantized(self, rank: dict[str, torch.Tensor], stem: str, builder: bool) -> NDArray[np.float32]:
        weight = rank[f"{stem}.weight"]
        if self.algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            scale = rank[f"{stem}.per_channel_scale"]
            assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert scale.shape == (weight.shape[0],)
            return (weight.to(torch.float32) * scale[:, None]).numpy()
        if self.algorithm == "W4A16_AWQ":
            scale = rank[f"{stem}.weights_scaling_factor"].to(torch.float32)
            assert weight.dtype == torch.int8
            pairs = weight.numpy().view(np.uint8)  # [N/2, K]
            nibbles = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1, pairs.shape[1]).astype(np.int32)
            values = torch.from_numpy(np.where(nibbles >= 8, nibbles - 16, nibbles).astype(np.float32))
            group = self.config["quantization"]["group_size"]
            assert scale.shape == (values.shape[0], values.shape[1] // group)
            return (values * scale.repeat_interleave(group, dim=1)).numpy()
        if self.algorithm == SMOOTHQUANT:
            values, scale, smoother = int8_matrix(rank, stem)
            return (values.astype(np.float32) * scale[:, None]) / smoother
        assert weight.dtype == self.dtype
        assert f"{stem}.per_channel_scale" not in rank
        found = weight.to(torch.float32)
        if builder:
            scale = found.abs().amax(1, keepdim=True) / 128
            found = (found / scale).round().clamp(-128, 127) * scale
        return found.numpy()

    def parameters(self, builder: bool = False, ffn: int | None = None) -> Arrays:
        """Every parameter by its Hugging Face name; an MLP that is wider than `ffn` has to hold zeros there."""
        config, found = self.config, {}
        width, heads, kv_heads = config["head_size"], config["num_attention_heads"], config["num_key_value_heads"]
        used = {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}
        found["model.embed_tokens.weight"] = self._same("transformer.vocab_embedding.weight")
        found["model.norm.weight"] = self._same("transformer.ln_f.weight")
        for layer in range(config["num_hidden_layers"]):
            theirs, ours = f"transformer.layers.{layer}", f"model.layers.{layer}"
            found[f"{ours}.input_layernorm.weight"] = self._same(f"{theirs}.input_layernorm.weight")
            found[f"{ours}.post_attention_layernorm.weight"] = self._same(f"{theirs}.post_layernorm.weight")
            biases = [self._floats(rank, f"{theirs}.attention.qkv.bias") for rank in self.ranks]
            for kind, parts in (("weight", self.linear(f"{theirs}.attention.qkv", builder)), ("bias", biases)):
                for name, array in _split_qkv(parts, width, heads, kv_heads).items():
                    found[f"{ours}.self_attn.{name}_proj.{kind}"] = array
            # silu(fc(x)) · gate(x): their gate is the up projection
            for name, stem, axis in (
                ("self_attn.o_proj", "attention.dense", 1),
                ("mlp.gate_proj", "mlp.fc", 0),
                ("mlp.up_proj", "mlp.gate", 0),
                ("mlp.down_proj", "mlp.proj", 1),
            ):
                whole = np.concatenate(self.linear(f"{theirs}.{stem}", builder), axis)
                if name.startswith("mlp.") and ffn is not None:
                    assert whole.shape[axis] == config["intermediate_size"]
                    whole, rest = np.split(whole, [ffn], axis)
                    assert not rest.any()
                found[f"{ours}.{name}.weight"] = whole
            stems = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
            suffixes = ("weight", "bias", "per_channel_scale", "weights_scaling_factor")
            used |= {f"{theirs}.{stem}.{suffix}" for stem in stems for suffix in suffixes}
            used |= {f"{theirs}.input_layernorm.weight", f"{theirs}.post_layernorm.weight"}
            if self.algorithm == SMOOTHQUANT:
                used |= self._ones(theirs)
        assert self.ranks[0].keys() <= used
        head = np.concatenate([self._floats(rank, "lm_head.weight") for rank in self.ranks])
        assert len(head) == -(-config["vocab_size"] // self.tp) * self.tp
        assert not head[config["vocab_size"] :].any()
        found["lm_head.weight"] = head[: config["vocab_size"]]
        return found

    def _ones(self, theirs: str) -> set[str]:
        """What the loader demands of a layer in W8A8 with a scale a token, beside matrices, scales and norms."""
        norms = {f"{theirs}.{norm}.scale_to_int" for norm in ("input_layernorm", "post_layernorm")}
        for rank in self.ranks:
            for name in norms:
                assert rank[name].dtype == torch.float32
                assert rank[name].tolist() == [1.0]
        return norms | {f"{theirs}.attention.dense.smoother", f"{theirs}.mlp.proj.smoother"}

    def _floats(self, rank: dict[str, torch.Tensor], name: str) -> NDArray[np.float32]:
        assert rank[name].dtype == self.dtype
        array: NDArray[np.float32] = rank[name].to(torch.float32).numpy()
        return array

    def _same(self, name: str) -> NDArray[np.float32]:
        first, *others = (self._floats(rank, name) for rank in self.ranks)
        assert all(np.array_equal(first, other) for other in others)
        return first


def int8_matrix(
    rank: dict[str, torch.Tensor], stem: str
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Values int8 [N, K], scales of rows float32 [N], and what divides the inputs, float32 [K], of a W8A8 linear."""
    weight, scale = rank[f"{stem}.weight"], rank[f"{stem}.per_channel_scale"]
    assert (weight.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (1, weight.shape[0])
    smoother = torch.ones(1, weight.shape[1])
    if stem.endswith(("dense", "proj")):
        smoother = rank[f"{stem}.smoother"]
        assert smoother.dtype == torch.float32
        assert smoother.shape == (1, weight.shape[1])
        assert smoother.min() > 0
    return weight.numpy(), scale[0].numpy(), smoother[0].numpy()


def _split_qkv(parts: Sequence[NDArray[np.float32]], width: int, heads: int, kv_heads: int) -> Arrays:
    """q, k and v of all ranks from each rank's [q; k; v]; a head that several ranks hold has to be the same on each."""
    tp = len(parts)
    q_rows, held = heads // tp * width, -(-kv_heads // tp)
    repeats = max(1, tp // kv_heads)
    assert all(len(part) == q_rows + 2 * held * width for part in parts)
    found = {"q": np.concatenate([part[:q_rows] for part in parts])}
    for name, start in (("k", q_rows), ("v", q_rows + held * width)):
        of_ranks = [part[start : start + held * width] for part in parts]
        for rank, array in enumerate(of_ranks):
            assert np.array_equal(array, of_ranks[rank // repeats * repeats])
        found[name] = np.concatenate(of_ranks[::repeats])
    return found
