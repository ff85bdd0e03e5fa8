"""The Qwen2 decoder as torch modules that trace to opset-24 ONNX operators.

Submodules carry the names of Hugging Face's `Qwen2ForCausalLM`, so parameters get the checkpoint's tensor names and
graph nodes its module paths. Where ONNX has an operator for a whole step (RMSNormalization, RotaryEmbedding,
TensorScatter, Attention) the module emits it as one symbolic node instead of letting torch decompose it: that is what
TensorRT, ONNX Runtime and our own lowerings recognise.

Source: Hugging Face transformers, `models/qwen2/modeling_qwen2.py`; ONNX operators at opset 24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qwen_rt.spec import ModelSpec

__all__ = ["OPSET", "Qwen2ForCausalLM"]

OPSET = 24

Shape = Sequence[int | torch.SymInt]


def _emit(
    op: str, inputs: Sequence[Tensor | None], attrs: Mapping[str, object], dtype: torch.dtype, shape: Shape
) -> Tensor:
    """Emit one ONNX node and give its output a dtype and a shape, which is all that tracing needs."""
    return torch.onnx.ops.symbolic(op, inputs, attrs, dtype=dtype, shape=shape, version=OPSET)  # type: ignore[arg-type]


def _reshape(x: Tensor, dims: list[int], shape: Shape) -> Tensor:
    """Reshape with ONNX's constant `dims` (0 keeps a dimension): one node, no shape arithmetic in the graph."""
    target = _emit("Constant", (), {"value_ints": dims}, torch.int64, (len(dims),))
    return _emit("Reshape", (x, target), {}, x.dtype, shape)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis, computed in float32 (`Qwen2RMSNorm`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x: [..., C]`; same shape and dtype."""
        attrs = {"axis": -1, "epsilon": self.eps, "stash_type": 1}
        return _emit("RMSNormalization", (x, self.weight), attrs, x.dtype, x.shape)


class RotaryEmbedding(nn.Module):
    """cos and sin of every token's position, from `inv_freq` alone: no table, so no limit on positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.inv_freq = [float(f) for f in spec.rope.inv_freq(spec.head_dim)]
        self.scaling = float(spec.rope.attention_scaling)

    def forward(self, x: Tensor, write_indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin, `[B, S, D/2]` in the dtype of `x`, for positions `write_indices[b] + s`."""
        steps = torch.arange(num_tokens)
        positions = (write_indices.unsqueeze(1) + steps.unsqueeze(0)).to(torch.float32)
        inv_freq = _emit("Constant", (), {"value_floats": self.inv_freq}, torch.float32, (len(self.inv_freq),))
        angles = positions.unsqueeze(-1) * inv_freq  # [B, S, D/2]
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over a cache that is written in place (`Qwen2Attention`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=False)

    def _split_heads(self, x: Tensor, num_heads: int) -> Tensor:
        batch, tokens, _ = x.shape
        dims = [0, 0, num_heads, self.head_dim]
        return _reshape(x, dims, (batch, tokens, num_heads, self.head_dim)).transpose(1, 2)  # [B, H, S, D]

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        write_indices: Tensor,
        kv_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend `x: [B, S, C]`; returns the output `[B, S, C]` and the written caches `[B, Hkv, Tmax, D]`."""
        batch, tokens, _ = x.shape
        query = self._split_heads(self.q_proj(x), self.num_heads)
        key = self._split_heads(self.k_proj(x), self.num_kv_heads)
        value = self._split_heads(self.v_proj(x), self.num_kv_heads)
        query = _emit("RotaryEmbedding", (query, cos, sin), {"interleaved": 0}, query.dtype, query.shape)
        key = _emit("RotaryEmbedding", (key, cos, sin), {"interleaved": 0}, key.dtype, key.shape)
        scatter = {"axis": 2, "mode": "linear"}
        keys = _emit("TensorScatter", (past_key, key, write_indices), scatter, past_key.dtype, past_key.shape)
        values = _emit("TensorScatter", (past_value, value, write_indices), scatter, past_value.dtype, past_value.shape)
        attrs = {"is_causal": 1, "scale": self.head_dim**-0.5}
        out = _emit("Attention", (query, keys, values, None, None, None, kv_lengths), attrs, query.dtype, query.shape)
        width = self.num_heads * self.head_dim
        merged = _reshape(out.transpose(1, 2), [0, 0, width], (batch, tokens, width))  # [B, S, H·D]
        return self.o_proj(merged), keys, values


class MLP(nn.Module):
    """`down(silu(gate(x)) · up(x))` (`Qwen2MLP`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: [B, S, C]` to `[B, S, C]`."""
        return cast(Tensor, self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals (`Qwen2DecoderLayer`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, *attention_inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `x: [B, S, C]` to `[B, S, C]`; the other arguments and results are those of `Attention`."""
        attended, keys, values = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Qwen2Model(nn.Module):
    """Embedding, ONE decoder layer (`stamp` repeats it) and the final norm (`Qwen2Model`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.rotary_emb = RotaryEmbedding(spec)
        self.layers = nn.ModuleList([DecoderLayer(spec)])
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        write_indices: Tensor,
        kv_lengths: Tensor,
        logits_indices: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed hidden state `[B, C]` at `logits_indices`, and the written caches."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(x, write_indices, input_ids.shape[1])
        x, keys, values = self.layers[0](x, cos, sin, past_key, past_value, write_indices, kv_lengths)
        rows = logits_indices.unsqueeze(-1)  # [B, 1]
        x = _emit("GatherND", (x, rows), {"batch_dims": 1}, x.dtype, (x.shape[0], x.shape[2]))
        return self.norm(x), keys, values


class Qwen2ForCausalLM(nn.Module):
    """The traced root: the graph inputs and outputs of `qwen_rt.tensors` for a model of one layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.model = Qwen2Model(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        write_indices: Tensor,
        kv_lengths: Tensor,
        logits_indices: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `logits: float32[B, V]` and the written caches of the layer."""
        hidden, keys, values = self.model(input_ids, past_key, past_value, write_indices, kv_lengths, logits_indices)
        return self.lm_head(hidden).to(torch.float32), keys, values
