"""Sizes of the Qwen2 models that kernels and sessions are timed at, and what they must read and compute.

The floor of a decode step is the bytes of all linear weights and the LM head as stored, once, over the read bandwidth
measured in the same run. The roofline of an op is the longer of its bytes over that bandwidth and its arithmetic over
the measured matrix rate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qwen_rt.quantization import DEFAULT_SCHEMES, Scheme
from qwen_rt.spec import ModelSpec

__all__ = ["SHAPES", "ModelShape", "OpCost"]


@dataclass(frozen=True)
class OpCost:
    """What one call of an op needs.

    Attributes:
        read_bytes: The large reads that decide its time: weights, keys and values, or logits.
        moved_bytes: Everything it must read and write once, activations too.
        flops: Multiplications and additions of its products.
    """

    read_bytes: int
    moved_bytes: int
    flops: int

    def roofline_us(self, bandwidth: float, matrix_rate: float | None) -> float:
        """Return the shortest possible time in µs.

        Args:
            bandwidth: Bytes a second.
            matrix_rate: bf16 operations a second; None leaves arithmetic out, which no decode op is bound by.
        """
        arithmetic = self.flops / matrix_rate if matrix_rate else 0.0
        return 1e6 * max(self.moved_bytes / bandwidth, arithmetic)


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

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> ModelShape:
        """Take the sizes of a model."""
        return cls(
            hidden=spec.hidden_size,
            layers=spec.num_layers,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            ffn=spec.intermediate_size,
            vocab=spec.vocab_size,
            tied=spec.tie_word_embeddings,
        )

    def with_layers(self, layers: int | None) -> ModelShape:
        """Return the same model with another number of layers; None keeps it."""
        return self if layers is None else dataclasses.replace(self, layers=layers)

    def config(self) -> dict[str, Any]:
        """Return a `config.json` of a checkpoint with these sizes, bf16."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            "eos_token_id": 151645,
        }

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

    def layer_bytes(self, precision: str = "bf16") -> dict[str, int]:
        """Stored bytes of a layer's matrices, scales included, by op; a precision in its default scheme."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "rmsnorm_qkv": [(q_width + 2 * kv_width, self.hidden)],
            "o_proj_residual": [(self.hidden, q_width)],
            "rmsnorm_gate_up_silu": [(2 * self.ffn, self.hidden)],
            "down_residual": [(self.hidden, self.ffn)],
        }
        scheme = DEFAULT_SCHEMES.get(precision)
        return {op: sum(_stored_bytes(scheme, shape) for shape in shapes) for op, shapes in sizes.items()}

    @property
    def floor_bytes(self) -> int:
        """Bytes of all linear weights and the LM head in bf16: what every step must read."""
        return self.floor_bytes_at("bf16")

    def floor_bytes_at(self, precision: str) -> int:
        """Bytes of all linear weights as stored at a precision, and of the LM head in bf16."""
        return self.layers * sum(self.layer_bytes(precision).values()) + 2 * self.hidden * self.vocab

    def kv_bytes(self, tokens: int, kv_format: str = "bf16") -> int:
        """Bytes of keys and values of `tokens` tokens over all layers, and of the scales of a quantized cache."""
        head_bytes = 2 * self.head_dim if kv_format == "bf16" else self.head_dim + 4
        return 2 * self.layers * self.kv_heads * head_bytes * tokens

    @property
    def stored_bytes(self) -> int:
        """Bytes of the matrices as a session holds them: `floor_bytes`, and the embedding where it is not the head."""
        return self.floor_bytes + (0 if self.tied else 2 * self.hidden * self.vocab)

    def prefill_flops(self, tokens: int) -> int:
        """Operations of reading a prompt and choosing one token: products, causal attention, one row of the head.

        The last layer works for one row behind its attention.
        """
        layer = sum(self.layer_parameters.values())
        behind_attention = layer - self.layer_parameters["rmsnorm_qkv"]
        products = 2 * (tokens * (self.layers * layer - behind_attention) + behind_attention)
        attention = 2 * tokens * tokens * self.layers * self.heads * self.head_dim
        return products + attention + 2 * self.hidden * self.vocab

    def op_cost(self, op: str, rows: int, length: int, precision: str = "bf16", kv_format: str = "bf16") -> OpCost:
        """Return what one call of a decode op needs at `rows` rows that have `length` tokens each.

        Args:
            op: Which.
            rows: Decode rows.
            length: Tokens of every row.
            precision: Of the layers' matrices.
            kv_format: Of the KV cache.

        Raises:
            KeyError: There is no such op in a decode step.
        """
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = q_width + 2 * kv_width
        if op == "lm_head":
            weights = self.hidden * self.vocab
            return OpCost(2 * weights, 2 * weights + rows * (2 * self.hidden + 4 * self.vocab), 2 * rows * weights)
        if op == "rope_kv_append_attention":
            layer = self.with_layers(1)
            read, written = layer.kv_bytes(rows * length, kv_format), layer.kv_bytes(rows, kv_format)
            return OpCost(read, read + written + 2 * rows * (qkv + q_width), 4 * rows * length * q_width)
        if op == "sample":
            read = 4 * rows * self.vocab
            return OpCost(read, read + 8 * rows, 0)
        if op == "embed":
            read = 2 * rows * self.hidden
            return OpCost(read, 2 * read + 8 * rows, 0)
        op = op.removeprefix("select_")  # reads as much
        weights, stored = self.layer_parameters[op], self.layer_bytes(precision)[op]
        activations = {
            "rmsnorm_qkv": self.hidden + qkv,
            "o_proj_residual": q_width + 2 * self.hidden,
            "rmsnorm_gate_up_silu": self.hidden + self.ffn,
            "down_residual": self.ffn + 2 * self.hidden,
        }[op]
        return OpCost(stored, stored + 2 * rows * activations, 2 * rows * weights)


def _stored_bytes(scheme: Scheme | None, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [N, K] and its scales; None: bf16."""
    if scheme is None:
        return 2 * shape[0] * shape[1]
    item_bytes = {"F8_E4M3": 1, "I8": 1, "U8": 1, "F16": 2, "F32": 4, "I32": 4}
    return sum(item_bytes[dtype] * math.prod(size) for dtype, size in scheme.parts(shape).values())


SHAPES = {
    "0.5b": ModelShape(896, 24, 14, 2, 64, 4864, 151936, True),
    "1.5b": ModelShape(1536, 28, 12, 2, 128, 8960, 151936, True),
    "7b": ModelShape(3584, 28, 28, 4, 128, 18944, 152064),
    "72b": ModelShape(8192, 80, 64, 8, 128, 29568, 152064),
}
