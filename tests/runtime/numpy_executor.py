"""A paged executor in numpy, float64, of the steps of `plugins/reference.py`; holds the engine to the protocol.

Steps are computed when they are launched and handed out when they are waited for, so a token that the engine has not
seen yet has already been fed to the next step. A block is filled with NaN when a request takes it over: whatever is
read before it is written shows in the logits. Every call is noted in `calls`; a broken rule raises `BrokenRuleError`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.errors import QwenRtError
from qwen_rt.plugins import reference
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import Sampler, SampleResult
from qwen_rt.spec import ModelSpec, RopeSpec

F64 = NDArray[np.float64]
Piece = tuple[RowState, int, list[int]]  # a request, the position of its first token, tokens

_SCRATCH = 0


class BrokenRuleError(AssertionError):
    """The engine did what the protocol forbids."""


class ForcedError(QwenRtError):
    """What `fail_at` asked for."""


def require(holds: object, rule: str) -> None:
    if not holds:
        raise BrokenRuleError(rule)


class NumpyExecutor:
    """See the module.

    Args:
        spec: The model.
        weights: Hugging Face tensor name → array.
        num_tokens: Ids from here on are never chosen.

    Attributes:
        calls: (name, facts …) of every call so far.
        fail_at: (name of a call, which of them from 0): that call raises `ForcedError`.
        takes_any_tokens: Whether `set_rows` may name other tokens than were handed out.
    """

    takes_any_tokens = False

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Any],
        *,
        max_length: int = 512,
        block_size: int = 16,
        num_blocks: int = 256,
        max_rows: int = 8,
        chunk_tokens: int = 64,
        num_tokens: int | None = None,
    ) -> None:
        self.spec, self.max_length, self.block_size, self.num_blocks = spec, max_length, block_size, num_blocks
        self.max_rows, self.chunk_tokens = max_rows, chunk_tokens
        self.fail_at: tuple[str, int] | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.is_closed = False
        self._weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self._inv_freq = spec.rope.inv_freq(spec.head_dim)
        shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self._cache = np.full(shape, np.nan)
        self._cache[:, :, _SCRATCH] = 0.0
        self._sampler = Sampler([], spec.vocab_size, [], num_tokens=num_tokens)
        self._sampler_rows: dict[int, int] = {}  # id of a row → the sampler's number for it
        self._chosen: dict[int, list[int]] = {}  # id of a row → tokens handed out or about to be
        self._known: list[RowState] = []  # keeps the ids above unique
        self._num_read: dict[int, int] = {}  # id of a row → tokens of its prompt that were read
        self._taken_by: dict[int, RowState] = {}  # block → the row that was the last to begin with it
        self._rows: list[RowState] = []
        self._under_way: deque[tuple[int, SampleResult]] = deque()
        self._next_number = 0
        self._num_calls: Counter[str] = Counter()

    # ---------------------------------------------------------------- the protocol

    def prefill(
        self, row: RowState, token_ids: NDArray[np.int64], position: int, *, is_last: bool
    ) -> SampleResult | None:
        self._note("prefill", position, len(token_ids), is_last)
        require(not self._under_way, "a prompt is read while no step is under way")
        require(token_ids.dtype == np.int64, "token_ids are int64")
        require(1 <= len(token_ids) <= self.chunk_tokens, "1 to chunk_tokens tokens a call")
        require(row.output_ids == [], "the prompt comes first")
        require(tuple(token_ids) == row.prompt_ids[position : position + len(token_ids)], "the row's own prompt")
        require(is_last == (position + len(token_ids) == len(row.prompt_ids)), "is_last at the end of the prompt")
        if position == 0:
            self._cache[:, :, list(row.blocks)] = np.nan
            self._taken_by |= dict.fromkeys(row.blocks, row)
            self._known.append(row)
            self._num_read[id(row)] = 0
        self._check_blocks(row)
        require(self._num_read[id(row)] == position, "chunks follow each other")
        self._num_read[id(row)] += len(token_ids)
        logits = self._forward([(row, position, token_ids.tolist())])
        if not is_last:
            return None
        params = dataclasses.replace(row.params, seed=row.seed)
        self._sampler_rows[id(row)] = self._sampler.add(params, row.prompt_ids)
        result = self._sampler.sample(logits.astype(np.float32), [self._sampler_rows[id(row)]])
        self._chosen[id(row)] = result.token_ids.tolist()
        return result

    def set_rows(self, rows: Sequence[RowState]) -> None:
        self._note("set_rows", len(rows))
        require(not self._under_way, "rows change only while no step is under way")
        require(1 <= len(rows) <= self.max_rows, "1 to max_rows rows")
        require(len({id(row) for row in rows}) == len(rows), "every row once")
        for row in rows:
            self._check_blocks(row)
            require(row.output_ids, "a row has a token to feed")
            if self.takes_any_tokens:
                self._chosen[id(row)] = list(row.output_ids)
            require(row.output_ids == self._chosen[id(row)], "the tokens that were handed out")
        self._rows = list(rows)

    def launch_step(self) -> int:
        self._note("launch", self._next_number)
        require(self._rows, "rows are set")
        require(len(self._under_way) < 2, "at most two steps under way")
        pieces: list[Piece] = []
        for row in self._rows:
            chosen = self._chosen[id(row)]
            position = len(row.prompt_ids) + len(chosen) - 1
            require(position < min(self.max_length, len(row.blocks) * self.block_size), "positions within the blocks")
            pieces.append((row, position, chosen[-1:]))
        logits = self._forward(pieces)
        result = self._sampler.sample(logits.astype(np.float32), [self._sampler_rows[id(row)] for row in self._rows])
        for row, token in zip(self._rows, result.token_ids.tolist(), strict=True):
            self._chosen[id(row)].append(token)
        number, self._next_number = self._next_number, self._next_number + 1
        self._under_way.append((number, result))
        return number

    def wait_step(self, number: int) -> SampleResult:
        require(self._under_way and self._under_way[0][0] == number, "steps are waited for in order, once")
        _, result = self._under_way.popleft()
        self._note("wait", number)
        return result

    def close(self) -> None:
        require(not self._under_way, "nothing under way")
        self.is_closed = True

    # ---------------------------------------------------------------- rules

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def _note(self, name: str, *facts: Any) -> None:
        require(not self.is_closed, "open")
        self.calls.append((name, *facts))
        count = self._num_calls[name]
        self._num_calls[name] += 1
        if self.fail_at == (name, count):
            raise ForcedError(f"{name} {count} failed")

    def _check_blocks(self, row: RowState) -> None:
        require(all(1 <= block < self.num_blocks for block in row.blocks), "blocks in range, scratch excluded")
        require(len(set(row.blocks)) == len(row.blocks), "every block once")
        require(len(row.blocks) * self.block_size > len(row.prompt_ids), "blocks for the prompt and a token")
        require(all(self._taken_by[block] is row for block in row.blocks), "blocks that no other row has taken since")

    # ---------------------------------------------------------------- the model

    def _forward(self, pieces: Sequence[Piece]) -> F64:
        """Return the logits of the last token of every piece, f64[N, V]."""
        spec, w = self.spec, self._weights
        ids = [token for _, _, tokens in pieces for token in tokens]
        positions = np.concatenate([np.arange(start, start + len(tokens)) for _, start, tokens in pieces])
        ends = np.cumsum([len(tokens) for _, _, tokens in pieces])
        cos, sin = reference.rotary_tables(positions[None], self._inv_freq, spec.rope.attention_scaling)
        hidden = reference.embed(w["model.embed_tokens.weight"], ids)  # [T, C]
        for index in range(spec.num_layers):
            layer = f"model.layers.{index}"
            normed = reference.rms_norm(hidden, w[f"{layer}.input_layernorm.weight"], spec.rms_norm_eps)

            def heads(name: str, num_heads: int, layer: str = layer, normed: F64 = normed) -> F64:
                proj = f"{layer}.self_attn.{name}_proj"
                flat = reference.linear(normed, w[f"{proj}.weight"], w.get(f"{proj}.bias"))
                return flat.reshape(1, -1, num_heads, spec.head_dim).transpose(0, 2, 1, 3)  # [1, heads, T, D]

            q = reference.apply_rotary(heads("q", spec.num_heads), cos, sin)[0]
            k = reference.apply_rotary(heads("k", spec.num_kv_heads), cos, sin)[0]
            v = heads("v", spec.num_kv_heads)[0]
            spans = [slice(end - len(tokens), end) for (_, _, tokens), end in zip(pieces, ends, strict=True)]
            out = [
                self._attention(index, row, start, q[:, span], k[:, span], v[:, span])
                for (row, start, _), span in zip(pieces, spans, strict=True)
            ]
            hidden = hidden + reference.linear(np.concatenate(out), w[f"{layer}.self_attn.o_proj.weight"])
            normed = reference.rms_norm(hidden, w[f"{layer}.post_attention_layernorm.weight"], spec.rms_norm_eps)
            hidden = hidden + reference.mlp(
                normed, *(w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            )
        last = reference.rms_norm(hidden[ends - 1], w["model.norm.weight"], spec.rms_norm_eps)
        logits = reference.linear(
            last, w["model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"]
        )
        require(np.isfinite(logits).all(), "nothing is read before it is written")
        self.logits = logits
        return logits

    def _attention(self, layer: int, row: RowState, start: int, q: F64, k: F64, v: F64) -> F64:
        """Write keys and values through the block table and attend causally; q [H, S, D] → [S, H * D]."""
        num_new, size = q.shape[1], self.block_size
        total = start + num_new
        table = np.array(row.blocks)
        at = np.arange(start, total)
        self._cache[layer, 0, table[at // size], at % size] = k.transpose(1, 0, 2)
        self._cache[layer, 1, table[at // size], at % size] = v.transpose(1, 0, 2)
        kv = self._cache[layer][:, table[: -(-total // size)]].reshape(2, -1, *self._cache.shape[4:])[:, :total]
        keys, values = kv.transpose(0, 2, 1, 3)  # [Hkv, T, D]
        group = self.spec.num_heads // self.spec.num_kv_heads
        grouped = q.reshape(-1, group * num_new, self.spec.head_dim)  # [Hkv, group * S, D]
        scores = (grouped @ keys.transpose(0, 2, 1)).reshape(-1, group, num_new, total) * self.spec.head_dim**-0.5
        scores = np.where(np.arange(total) <= at[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = weights.reshape(-1, group * num_new, total) @ values
        heads_first = out.reshape(self.spec.num_heads, num_new, self.spec.head_dim)
        flat: F64 = heads_first.transpose(1, 0, 2).reshape(num_new, -1)  # [S, H * D]
        return flat


# ---------------------------------------------------------------- models


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every tensor of a checkpoint, in float32."""
    return {name: to_float32(ref, checkpoint.read(name)) for name, ref in checkpoint.tensors.items()}


def tiny_model(vocab_size: int, seed: int = 0) -> tuple[ModelSpec, dict[str, Any]]:
    """Two layers of random weights whose next token depends on all that came before."""
    spec = ModelSpec(
        architecture="Qwen2ForCausalLM",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=vocab_size,
        rms_norm_eps=1e-6,
        rope=RopeSpec.from_config({"rope_theta": 1e4}, 512),
        tie_word_embeddings=False,
        max_position_embeddings=512,
        dtype="float32",
    )
    random = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in spec.parameters().items():
        if len(shape) == 1:
            weights[name] = random.normal(0, 1, shape) if name.endswith("bias") else np.ones(shape)
        else:
            weights[name] = random.normal(0, 1, shape) * (1 if "embed" in name else 2 / np.sqrt(shape[1]))
    return spec, weights
