"""transformers' model of any checkpoint in float32, and what it makes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.row_reader import CheckpointRows, RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["greedy_ids", "load_reference", "model_of_rows", "reference_logits"]


def load_reference(checkpoint: Checkpoint, num_threads: int = 0) -> Any:
    """Load a checkpoint into `Qwen2ForCausalLM`, float32, with the plainest attention.

    transformers reads a checkpoint of floats itself. Of a quantized one it would need the library of its layout; its
    matrices are dequantized by this package instead (`model_of_rows`).

    Args:
        checkpoint: Floats, or quantized in a layout that this package knows.
        num_threads: Of torch; 0 leaves them as they are.
    """
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if num_threads:
        torch.set_num_threads(num_threads)
    if checkpoint.quantized:
        with CheckpointRows(checkpoint) as rows:
            return model_of_rows(checkpoint.path, checkpoint.spec, rows)
    model: Any = Qwen2ForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def model_of_rows(folder: Path, spec: ModelSpec, rows: RowSource) -> Any:
    """Make transformers' model of a `config.json` from rows, one parameter after the other.

    The peak of memory is the model in float32 and its largest parameter.

    Args:
        folder: With config.json; what it says of quantization is left out.
        spec: The same model; names the parameters.
        rows: Where they come from.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config: Any = Qwen2Config.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    for name, shape in spec.parameters().items():
        model.load_state_dict({name: torch.from_numpy(rows.rows(name, 0, shape[0]))}, strict=False, assign=True)
    if spec.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = Qwen2RotaryEmbedding(config)  # its frequencies are no parameter and stored nowhere
    return model.eval()


def reference_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits of every position: float32[T, V]."""
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def greedy_ids(model: Any, ids: Sequence[int], num_tokens: int, num_known: int) -> list[int]:
    """Continue a text greedily, by the best of the first `num_known` tokens."""
    import torch

    found: list[int] = []
    past, token = None, torch.tensor([list(ids)])
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(token, past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = out.logits[:, -1:, :num_known].argmax(-1)
            found.append(int(token))
    return found
