"""The Qwen2 decoder over a short text in float32, whose matrices are never held whole: they pass by in blocks of rows.

    forward = Forward(spec, rows)                       # rows: any RowSource, quantized or not
    hidden = forward.embed(token_ids)                   # f32[T, C]
    for index in range(spec.num_layers):
        hidden = forward.run_layer(index, hidden)
    logits = forward.logits(hidden)                     # f32[T, V]

A layer has four units: matrices that read the same input. Between them stand norms, rope, attention and activation.

| unit      | input                    | matrices                     |
|-----------|--------------------------|------------------------------|
| `qkv`     | input_layernorm          | q_proj, k_proj, v_proj       |
| `o`       | attention                | o_proj                       |
| `gate_up` | post_attention_layernorm | gate_proj, up_proj           |
| `down`    | silu(gate) · up          | down_proj                    |

`Forward.layer` steps through them one by one, for whoever wants their inputs or multiplies by other weights:

    step = forward.layer(index, hidden)
    while step.unit:
        step.advance([multiply(rows, name, step.x) for name in step.names])
    hidden = step.hidden

Memory is the activations and `_BLOCKS_AHEAD + 1` blocks for each source, whatever the size of the model.

Source of the formulas: Hugging Face transformers 5.23.0, `models/qwen2/modeling_qwen2.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.export.passes.decoder import EMBEDDING, head_name
from qwen_rt.quantization import fake_quantize_kv, key_offset_name, value_offset_name
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["UNITS", "Block", "Forward", "LayerPass", "matrix_names", "multiply", "read_blocks"]

UNITS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Unit → its matrices within a layer, in the order of the computation."""

BLOCK_BYTES = 8 << 20
"""Of a block in float32: enough rows for a product of full speed, and no larger than the activations of 128 tokens."""

_NUM_READERS = 2
_BLOCKS_AHEAD = 2

_READERS = ThreadPoolExecutor(_NUM_READERS, "read-rows")
"""Started by the first read, and kept: with every new thread the C library would start another heap, whose free memory
no other thread uses, and blocks would pile up in them."""


def matrix_names(layer: int, unit: str) -> tuple[str, ...]:
    """Names of a unit's matrices, as the checkpoint has them."""
    return tuple(f"model.layers.{layer}.{name}.weight" for name in UNITS[unit])


@dataclass(frozen=True, eq=False)
class Block:
    """Rows `start … stop - 1` of a matrix from each source, f32[stop - start, K], and what was found in them."""

    name: str
    start: int
    stop: int
    rows: tuple[Tensor, ...]
    found: Any = None


Inspect = Callable[[str, int, Sequence[NDArray[np.float32]]], Any]
"""Given the name of a matrix, the number of a first row, and the rows of each source; runs in the threads that read."""


def read_blocks(sources: Sequence[RowSource], names: Sequence[str], inspect: Inspect | None = None) -> Iterator[Block]:
    """Read matrices in blocks of rows, the same of every source; threads read ahead of whoever takes the blocks.

    Args:
        sources: Where the rows come from; all have the matrices in the same shape.
        names: The matrices, one after the other.
        inspect: Called for each block; what it returns is `Block.found`.

    Yields:
        The blocks, in order; their tensors belong to the taker.

    Raises:
        CheckpointError: Sources disagree on a shape, or as they say.
    """
    waiting = iter([part for name in names for part in _parts(sources, name)])

    def read(name: str, start: int, stop: int) -> Block:
        rows = [source.rows(name, start, stop) for source in sources]
        found = None if inspect is None else inspect(name, start, rows)
        return Block(name, start, stop, tuple(map(torch.from_numpy, rows)), found)

    ahead: deque[Future[Block]] = deque(_READERS.submit(read, *part) for part in islice(waiting, _BLOCKS_AHEAD))
    try:
        while ahead:
            block = ahead.popleft().result()
            ahead.extend(_READERS.submit(read, *part) for part in islice(waiting, 1))
            yield block
    finally:
        for future in ahead:
            future.cancel()
        wait(ahead)  # whoever closes the sources next finds no one reading


def _parts(sources: Sequence[RowSource], name: str) -> list[tuple[str, int, int]]:
    shapes = {tuple(source.shape(name)) for source in sources}
    if len(shapes) > 1:
        raise CheckpointError(f"{name} has shapes {sorted(shapes)}", "one shape in all sources", "build again")
    rows, columns = shapes.pop()
    step = max(1, BLOCK_BYTES // (4 * columns))
    return [(name, start, min(start + step, rows)) for start in range(0, rows, step)]


@torch.no_grad()
def multiply(rows: RowSource, name: str, x: Tensor) -> Tensor:
    """Multiply by a matrix, block by block: `y = x Wᵀ`.

    Args:
        rows: Where the matrix comes from.
        name: The matrix, [N, K].
        x: f32[..., K].

    Returns:
        f32[..., N].

    Raises:
        CheckpointError: The matrix is missing or has another K.
    """
    shape = rows.shape(name)
    if shape[-1] != x.shape[-1]:
        raise CheckpointError(f"{name} has shape {list(shape)}", f"{x.shape[-1]} columns", "build again")
    y = x.new_empty(*x.shape[:-1], shape[0])
    for block in read_blocks((rows,), (name,)):
        y[..., block.start : block.stop] = x @ block.rows[0].T
    return y


class Forward:
    """A model whose parameters come from a `RowSource`.

    Args:
        spec: The model.
        rows: Its parameters. Threads read from it.
        kv_format: Round keys and values as a cache of that format does; the source then has the offsets
            (`key_offset_name`, `value_offset_name`) that its k and v biases lack. None keeps them as they are.
    """

    def __init__(self, spec: ModelSpec, rows: RowSource, kv_format: str | None = None) -> None:
        self.spec, self.rows, self.kv_format = spec, rows, kv_format
        self._inv_freq = spec.rope.inv_freq(spec.head_dim).astype(np.float64)  # [D/2]

    def vector(self, name: str) -> Tensor:
        """Read a parameter whole: a norm, a bias, or the offset of a cache."""
        return torch.from_numpy(self.rows.rows(name, 0, self.rows.shape(name)[0]))

    @torch.no_grad()
    def embed(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> Tensor:
        """Look up the embeddings of one text, or of several equally long ones.

        Args:
            token_ids: int[T] or int[B, T].

        Returns:
            f32[T, C] or f32[B, T, C].

        Raises:
            UsageError: No token, or one outside the vocabulary.
        """
        ids = np.asarray(token_ids, np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            found = f"from {ids.min()} to {ids.max()}" if ids.size else "none"
            raise UsageError(f"token ids {found}", f"some of 0 to {self.spec.vocab_size - 1}")
        distinct, places = np.unique(ids, return_inverse=True)
        table = np.concatenate([self.rows.rows(EMBEDDING, i, i + 1) for i in distinct.tolist()])
        return torch.from_numpy(table[places.reshape(ids.shape)])

    def layer(self, index: int, hidden: Tensor) -> LayerPass:
        """Enter a layer with the hidden states before it: f32[..., T, C]."""
        return LayerPass(self, index, hidden)

    @torch.no_grad()
    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        overrides: Mapping[str, NDArray[np.float32] | Tensor] | None = None,
        observe: Callable[[str, Tensor], object] | None = None,
    ) -> Tensor:
        """Run one layer.

        Args:
            index: Which.
            hidden: f32[..., T, C], left as it is.
            overrides: Name of a matrix → f32[N, K] to multiply by instead of the source's.
            observe: Told each unit and its input, f32[..., T, K].

        Returns:
            f32[..., T, C], the hidden states after the layer.
        """
        given = {name: _tensor(weight) for name, weight in (overrides or {}).items()}
        step = self.layer(index, hidden)
        while step.unit:
            if observe is not None:
                observe(step.unit, step.x)
            step.advance(
                [step.x @ given[name].T if name in given else multiply(self.rows, name, step.x) for name in step.names]
            )
        return step.hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Input of the head: f32[..., T, C]."""
        return _rms_norm(hidden, self.vector("model.norm.weight"), self.spec.rms_norm_eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after the last layer: f32[..., T, C] → f32[..., T, V]."""
        return multiply(self.rows, head_name(self.spec), self.final_norm(hidden))

    @torch.no_grad()
    def run(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> Tensor:
        """Logits of a text, all layers: int[T] → f32[T, V]."""
        hidden = self.embed(token_ids)
        for index in range(self.spec.num_layers):
            hidden = self.run_layer(index, hidden)
        return self.logits(hidden)

    def rotary(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of the positions 0 to T - 1, scaled as YaRN asks: f32[T, D/2] each."""
        angles = np.arange(num_tokens)[:, None] * self._inv_freq  # [T, D/2]
        scaling = self.spec.rope.attention_scaling
        cos, sin = np.cos(angles) * scaling, np.sin(angles) * scaling
        return torch.from_numpy(cos.astype(np.float32)), torch.from_numpy(sin.astype(np.float32))


class LayerPass:
    """One text on its way through one layer, unit by unit.

    Attributes:
        index: The layer.
        hidden: f32[..., T, C]: the residual stream, after every unit that has been passed and writes to it.
        unit: The unit to come, `""` after the last.
        x: Its input, f32[..., T, K].
    """

    def __init__(self, forward: Forward, index: int, hidden: Tensor) -> None:
        self._forward, self._spec = forward, forward.spec
        self.index, self.hidden = index, hidden
        self.unit, self.x = "qkv", self._norm("input_layernorm")

    @property
    def names(self) -> tuple[str, ...]:
        """Matrices of the unit to come."""
        return matrix_names(self.index, self.unit)

    @torch.no_grad()
    def advance(self, outputs: Sequence[Tensor]) -> None:
        """Take what the unit's matrices made of `x`, and go on to the next unit.

        Args:
            outputs: For each of `names` f32[..., T, N], biases not added.
        """
        if self.unit == "qkv":
            self.unit, self.x = "o", self._attend(*outputs)
        elif self.unit == "o":
            self.hidden = self.hidden + outputs[0]
            self.unit, self.x = "gate_up", self._norm("post_attention_layernorm")
        elif self.unit == "gate_up":
            self.unit, self.x = "down", functional.silu(outputs[0]) * outputs[1]
        else:
            self.hidden = self.hidden + outputs[0]
            self.unit, self.x = "", self.hidden

    @torch.no_grad()
    def _norm(self, name: str) -> Tensor:
        weight = self._forward.vector(f"model.layers.{self.index}.{name}.weight")
        return _rms_norm(self.hidden, weight, self._spec.rms_norm_eps)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Products of q, k and v → causal attention, f32[..., T, H·D]."""
        spec, kv_format = self._spec, self._forward.kv_format
        cos, sin = self._forward.rotary(q.shape[-2])
        query = _turn(self._heads("q_proj", q, spec.num_heads), cos, sin)
        key = _turn(self._heads("k_proj", k, spec.num_kv_heads), cos, sin)
        value = self._heads("v_proj", v, spec.num_kv_heads)
        if kv_format is not None:
            key_offset = self._forward.vector(key_offset_name(self.index))[:, None]  # [Hkv, 1, D]
            value_offset = self._forward.vector(value_offset_name(self.index))[:, None]
            turned = _turn(key_offset.expand(-1, q.shape[-2], -1), cos, sin)  # [Hkv, T, D]
            key, value = _as_stored(key, kv_format) + turned, _as_stored(value, kv_format) + value_offset
        group = spec.num_heads // spec.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)  # [B, H, T, D]
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(q.shape)

    def _heads(self, name: str, product: Tensor, num_heads: int) -> Tensor:
        """Add the bias and split into heads: f32[..., T, heads·D] → f32[B, heads, T, D]."""
        if self._spec.qkv_bias:
            product = product + self._forward.vector(f"model.layers.{self.index}.self_attn.{name}.bias")
        return product.reshape(-1, product.shape[-2], num_heads, self._spec.head_dim).transpose(1, 2)


def _tensor(weight: NDArray[np.float32] | Tensor) -> Tensor:
    """As a tensor; only of an array that cannot be written, as torch demands, is a copy made."""
    return weight if isinstance(weight, Tensor) else torch.from_numpy(np.require(weight, np.float32, "W"))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of heads f32[..., T, D] by the angles of their positions, f32[T, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _as_stored(x: Tensor, kv_format: str) -> Tensor:
    return torch.from_numpy(fake_quantize_kv(x.numpy(), kv_format))
