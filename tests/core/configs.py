"""Configs of released checkpoints, to be changed by tests."""

from __future__ import annotations

from typing import Any

QWEN2_MATH_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# hidden, layers, heads, kv heads, ffn, vocab, tied → parameters, as the model cards and safetensors metadata say.
RELEASED = {
    "0.5B": ((896, 24, 14, 2, 4864, 151936, True), 494_032_768),
    "1.5B": ((1536, 28, 12, 2, 8960, 151936, True), 1_543_714_304),
    "3B": ((2048, 36, 16, 2, 11008, 151936, True), 3_085_938_688),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False), 7_615_616_512),
    "14B": ((5120, 48, 40, 8, 13824, 152064, False), 14_770_033_664),
    "32B": ((5120, 64, 40, 8, 27648, 152064, False), 32_763_876_352),
    "72B": ((8192, 80, 64, 8, 29568, 152064, False), 72_706_203_648),
}


def config_with(**changes: Any) -> dict[str, Any]:
    """Qwen2-Math-7B's config with keys replaced; `...` removes one."""
    merged = {**QWEN2_MATH_7B, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def released_config(size: str) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, ffn, vocab, tied = RELEASED[size][0]
    return config_with(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_window_layers=layers,
    )
