"""`genai_config.json`: what ONNX Runtime GenAI has to know of a model.

Source: onnxruntime-genai 0.18, `src/config.cpp` and what its model builder writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_rt import tensors
from qwen_rt.errors import CheckpointError
from qwen_rt.export.layouts.graph import ATTENTION_MASK, POSITION_IDS
from qwen_rt.spec import ModelSpec

__all__ = ["genai_config"]

# generation_config.json → search; the names are the same on both sides.
_SEARCH_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "min_length": 0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def genai_config(
    spec: ModelSpec, config: Mapping[str, Any], generation: Mapping[str, Any], max_length: int, graph_file: str
) -> dict[str, Any]:
    """Describe a graph of `lower_layout` and how to search with it.

    Args:
        spec: The model's hyperparameters.
        config: The checkpoint's `config.json`: token ids that `generation` lacks.
        generation: The checkpoint's `generation_config.json`; empty if it has none.
        max_length: Positions that the graph can reach; GenAI allocates a cache of as many unless told otherwise.
        graph_file: Name of the graph in the same folder.

    Returns:
        The document, ready for `json.dumps`.

    Raises:
        CheckpointError: No end token is known, or one is no integer.
    """
    eos = _token_ids("eos_token_id", generation, config)
    if not eos:
        raise CheckpointError(
            "the checkpoint names no eos_token_id", "one in generation_config.json or config.json", "add it there"
        )
    pad = _token_ids("pad_token_id", generation, config) or eos
    bos = _token_ids("bos_token_id", generation, config)
    model: dict[str, Any] = {} if not bos else {"bos_token_id": bos[0]}
    model |= {
        "context_length": max_length,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": graph_file,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden_size,
            "inputs": {
                "input_ids": tensors.INPUT_IDS,
                "attention_mask": ATTENTION_MASK,
                "position_ids": POSITION_IDS,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": tensors.LOGITS,
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": spec.num_heads,
            "num_hidden_layers": spec.num_layers,
            "num_key_value_heads": spec.num_kv_heads,
        },
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": pad[0],
        "type": "qwen2",
        "vocab_size": spec.vocab_size,
    }
    search = {name: _given(generation, name, default) for name, default in _SEARCH_DEFAULTS.items()}
    search |= {
        "early_stopping": True,
        "max_length": max_length,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": dict(sorted(search.items()))}


def _given(generation: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting of the kind of its default; anything else is left to the default."""
    value = generation.get(name)
    kinds = (int, float) if isinstance(default, float) else type(default)
    return value if isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool) else default


def _token_ids(name: str, *documents: Mapping[str, Any]) -> list[int]:
    """The ids of the first document that has some."""
    for document in documents:
        value = document.get(name)
        if value is None:
            continue
        found = value if isinstance(value, list) else [value]
        if any(not isinstance(token, int) or isinstance(token, bool) for token in found):
            raise CheckpointError(f"{name}={value!r}", "a token id or a list of them", "correct the checkpoint's file")
        if found:
            return found
    return []
