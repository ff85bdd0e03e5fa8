"""Sizes of the Qwen2 models that kernels are tested and timed at, and the bytes that a decode step must read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHAPES", "ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model; the names are those of `config.json`, shortened."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False

    @property
    def layer_parameters(self) -> dict[str, int]:
        """Weights of a layer's matrices, by op."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "rmsnorm_qkv": self.hidden * (q_width + 2 * kv_width),
            "o_proj_residual": self.hidden * q_width,
            "rmsnorm_gate_up_silu": 2 * self.hidden * self.ffn,
            "down_residual": self.hidden * self.ffn,
        }

    @property
    def floor_bytes(self) -> int:
        """Bytes of all linear weights and the LM head in bf16: what every step must read."""
        return 2 * (self.layers * sum(self.layer_parameters.values()) + self.hidden * self.vocab)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in bf16, over all layers."""
        return 4 * self.layers * self.kv_heads * self.head_dim * tokens


SHAPES = {
    "0.5b": ModelShape(896, 24, 14, 2, 64, 4864, 151936, True),
    "1.5b": ModelShape(1536, 28, 12, 2, 128, 8960, 151936, True),
    "7b": ModelShape(3584, 28, 28, 4, 128, 18944, 152064),
    "72b": ModelShape(8192, 80, 64, 8, 128, 29568, 152064),
}
