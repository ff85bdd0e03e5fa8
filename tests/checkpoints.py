"""Random checkpoints, written by transformers, in which nothing is trivially 0 or 1; and their logits by transformers.

Weights are drawn so that every part of the computation shows in the logits, which `export/test_sensitivity.py` holds:
products keep unit variance; embeddings and what the layers add are as small as in a real Qwen2, or the epsilon of the
norms would not matter; norm weights lie between 0.5 and 1.5; biases are as large as the products, and those of k have
the large constant offsets that Qwen2's have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

THETA_LONG, THETA_MATH = 1e6, 1e4  # Qwen2 and Qwen2.5; Qwen2-Math
RESIDUAL_STD = 0.03


@dataclass(frozen=True)
class Shape:
    """One model: what its `config.json` says, how it is stored, and why it is here."""

    why: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int | None = None  # None: hidden_size / num_heads, as in every released Qwen2
    num_layers: int = 2
    tied: bool = False
    eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": THETA_LONG})
    max_position_embeddings: int = 512
    dtype: str = "bfloat16"

    def config(self) -> Qwen2Config:
        extra: dict[str, Any] = {} if self.head_dim is None else {"head_dim": self.head_dim}
        return Qwen2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.eps,
            rope_parameters=dict(self.rope),
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.max_position_embeddings,
            bos_token_id=0,
            eos_token_id=0,
            use_sliding_window=False,
            **extra,
        )


def _default(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(**extra: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": THETA_LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **extra,
    }


SHAPES: dict[str, Shape] = {
    "heads-0.5b": Shape("14 heads on 2 of 64 and a tied head, as 0.5B", 896, 14, 2, 608, 304, tied=True),
    "heads-1.5b": Shape(
        "6 heads on 1 of 128, tied, theta of Qwen2-Math", 768, 6, 1, 1120, 256, tied=True, rope=_default(THETA_MATH)
    ),
    "heads-7b": Shape("7 heads on 1 of 128, untied, as one of 7B's 4 groups", 896, 7, 1, 592, 320, dtype="float32"),
    "heads-72b": Shape(
        "8 key/value heads of 128, F/C = 29568/8192, eps of the 72B base",
        *(384, 16, 8, 1386, 288),
        head_dim=128,
        eps=1e-5,
    ),
    "mha": Shape(
        "8 heads on 8 of 64: no sharing", 512, 8, 8, 640, 512, eps=1e-5, rope=_default(THETA_MATH), dtype="float32"
    ),
    "odd": Shape(
        "odd sizes: C = 3 x 64, F = 3 x 7 x 11, a prime vocabulary", 192, 3, 1, 231, 317, num_layers=3, dtype="float32"
    ),
    "one-layer": Shape(
        "a single layer stored as float16, and the 32,768 positions of the large models",
        *(128, 2, 2, 200, 130),
        num_layers=1,
        dtype="float16",
        max_position_embeddings=32768,
    ),
    "yarn": Shape(
        "YaRN far beyond the original 32 positions", 256, 4, 2, 352, 160, rope=_yarn(), max_position_embeddings=128
    ),
    "yarn-options": Shape(
        "YaRN with every option set",
        *(256, 2, 1, 352, 160),
        rope=_yarn(beta_fast=16.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
        dtype="float32",
        eps=1e-5,
        max_position_embeddings=128,
    ),
    "yarn-mscale": Shape(
        "YaRN with mscale",
        *(256, 2, 2, 224, 160),
        rope=_yarn(mscale=0.7, mscale_all_dim=1.3),
        tied=True,
        max_position_embeddings=128,
    ),
    "linear-rope": Shape(
        "positions interpolated by 2",
        *(256, 4, 1, 352, 224),
        rope={"rope_type": "linear", "rope_theta": THETA_MATH, "factor": 2.0},
    ),
}
TINY = Shape("small enough for the onnx reference evaluator", 64, 2, 1, 96, 64, num_layers=2, dtype="float32")


def save_checkpoint(shape: Shape, folder: Path, *, seed: int = 0, shard_bytes: int = 1 << 20) -> Path:
    """Write a checkpoint of that shape in several shards."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = Qwen2ForCausalLM(shape.config())

    def normal(like: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("k_proj.bias"):
                weight.copy_(normal(weight, 1.0) + torch.where(normal(weight, 1.0) > 1, 6.0, 0.0))
            elif name.endswith(".bias"):
                weight.copy_(normal(weight, 0.5))
            elif "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            elif "embed_tokens" in name:
                weight.copy_(normal(weight, RESIDUAL_STD))
            else:
                scale = RESIDUAL_STD if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                weight.copy_(normal(weight, scale * weight.shape[1] ** -0.5))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def load_reference(folder: Path) -> Any:
    """transformers' model of a checkpoint, weights widened to float32, the plainest attention."""
    torch.set_num_threads(1)  # more only spin: the shapes are small
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of every position, ids int64[B, S] → float32[B, S, V]."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).logits.float().numpy()
    return logits


def random_ids(shape: Shape, num_tokens: int, seed: int = 1) -> NDArray[np.int64]:
    """Tokens over the whole vocabulary, its last row among them: int64[S]."""
    ids = np.random.default_rng(seed).integers(0, shape.vocab_size, num_tokens)
    ids[num_tokens // 2] = shape.vocab_size - 1
    return ids
