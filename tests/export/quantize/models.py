"""Models in memory for the tests of calibration and mixed precision: their rows, rounded rows, and nano's own texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_rt.benchmarks.nano.heldout import excluded_questions, load
from qwen_rt.benchmarks.nano.problems import stream
from qwen_rt.benchmarks.nano.prompts import IM_END, instruct_prompt
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.quantize.forward import Forward
from qwen_rt.export.quantize.pieces import MatrixEdit
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

Arrays = dict[str, NDArray[np.float32]]


class ArrayRows:
    """A RowSource over arrays in memory."""

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        self.arrays = arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self.arrays[name][start:stop].copy()


class RoundedRows:
    """What a quantized bundle computes with: the rows of a source, rounded in their schemes."""

    def __init__(
        self,
        source: RowSource,
        schemes: Mapping[str, Scheme | None],
        edits: Mapping[str, MatrixEdit] | None = None,
    ) -> None:
        self._source, self._schemes, self._edits = source, schemes, edits or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        rows, scheme = self._source.rows(name, start, stop), self._schemes.get(name)
        if scheme is None:
            return rows
        edit = self._edits.get(name)
        return dequantize(quantize_rows(name, rows, scheme, start, None if edit is None else edit.importance))


def with_outliers(weights: Mapping[str, NDArray[np.float32]], spec: ModelSpec, seed: int = 5) -> Arrays:
    """Make some channels of every unit's input four to thirty times as large as the others, as in a trained model."""
    rng = np.random.default_rng(seed)
    found = {name: array.copy() for name, array in weights.items()}

    def loud(size: int) -> NDArray[np.float32]:
        factors = np.ones(size, np.float32)
        places = rng.choice(size, max(2, size // 40), replace=False)
        factors[places] = rng.uniform(4, 30, len(places))
        return factors

    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] *= loud(spec.hidden_size)
        values = loud(spec.num_kv_heads * spec.head_dim)
        found[f"{prefix}.self_attn.v_proj.weight"] *= values[:, None]
        found[f"{prefix}.self_attn.v_proj.bias"] *= values
        found[f"{prefix}.mlp.up_proj.weight"] *= loud(spec.intermediate_size)[:, None]
    return found


def hidden_states(rows: RowSource, spec: ModelSpec, texts: Iterable[Any]) -> torch.Tensor:
    """Output of the last layer for all tokens of some texts: f32[n, C]."""
    forward, found = Forward(spec, rows), []
    for ids in texts:
        hidden = forward.embed(ids)
        for layer in range(spec.num_layers):
            hidden = forward.run_layer(layer, hidden)
        found.append(hidden)
    return torch.cat(found)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over tokens of ‖found - expected‖ / ‖expected‖."""
    sizes = torch.linalg.vector_norm(found - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    return float(sizes.square().mean().sqrt())


@cache
def nano_weights() -> tuple[ModelSpec, Arrays]:
    from qwen_rt.row_reader import StoredRows

    opened = Checkpoint.open("nano")
    with StoredRows(opened.tensors) as rows:
        arrays = {name: rows.rows(name, 0, shape[0]) for name, shape in opened.spec.parameters().items()}
    return opened.spec, arrays


@cache
def nano_texts() -> tuple[list[list[int]], list[list[int]]]:
    """Solved problems in nano's tokens: some as it was trained on, some held out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Checkpoint.open("nano").path / "tokenizer.json"))
    seen = itertools.islice(stream(77, excluded_questions()), 8)
    seen_texts = [instruct_prompt(problem.question) + problem.solution + IM_END for problem in seen]
    held_out = [instruct_prompt(row["question"]) + row["solution"] + IM_END for row in load()[:5]]
    seen_ids, held_out_ids = (
        [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for texts in (seen_texts, held_out)
    )
    return seen_ids, held_out_ids
