"""`config.json` of a TensorRT-LLM checkpoint, and the command that builds an engine from it.

Source: TensorRT-LLM 1.2, `models/qwen/config.py` and `models/modeling_utils.py` (`PretrainedConfig`, `QuantConfig`).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.errors import UnsupportedModelError
from qwen_rt.export.trtllm import smoothquant
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec

__all__ = ["ENGINE_RELEASE", "build_command", "check_rope", "quant_algo", "trtllm_config"]

ENGINE_RELEASE = "1.2"
"""The last release line of TensorRT-LLM that has trtllm-build."""

_QUANT_ALGOS = {"fp8": "FP8_PER_CHANNEL_PER_TOKEN", "int8": "W8A16", "int4": "W4A16_AWQ"}

_MAX_BATCH_SIZE = 8


def check_rope(spec: ModelSpec) -> None:
    """Refuse a rotary embedding that has not been mapped.

    Raises:
        UnsupportedModelError: YaRN.
    """
    if spec.rope.kind == "yarn":
        raise UnsupportedModelError(
            "rope_type=yarn for target trtllm",
            "default or linear rope",
            "remove rope_scaling, or choose another target",
        )


def quant_algo(precision: str, scheme: Scheme | None) -> str | None:
    """What TensorRT-LLM calls the way the layers' matrices are stored; None for floats.

    Args:
        precision: Of the layers' matrices.
        scheme: Their scheme, if they are stored quantized.
    """
    return smoothquant.QUANT_ALGO if smoothquant.is_smoothquant(scheme) else _QUANT_ALGOS.get(precision)


def trtllm_config(
    spec: ModelSpec, tp: int, dtype: str, precision: str, scheme: Scheme | None, ffn: int
) -> dict[str, Any]:
    """What `config.json` says.

    Args:
        spec: The model.
        tp: Ranks.
        dtype: `bfloat16` or `float16`, of activations and of all that is not quantized.
        precision: Of the layers' matrices.
        scheme: Their scheme, if they are stored quantized.
        ffn: Width of the MLP as stored.
    """
    rope = spec.rope
    scaling = {"type": "linear", "rope_type": "linear", "factor": rope.factor} if rope.kind == "linear" else None
    return {
        "producer": {"name": "qwen-rt", "version": __version__},
        "architecture": spec.architecture,
        "qwen_type": "qwen2",
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": ffn,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_size": spec.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": spec.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": spec.max_position_embeddings,
        "seq_length": spec.context_length,
        "rotary_base": rope.theta,
        "rotary_scaling": scaling,
        "attn_bias": spec.qkv_bias,
        "mlp_bias": False,
        "use_logn_attn": False,
        "disable_weight_only_quant_plugin": False,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "num_labels": 1,
        "mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1},
        "quantization": {
            "quant_algo": quant_algo(precision, scheme),
            "kv_cache_quant_algo": None,
            "group_size": scheme.group_size if scheme is not None and scheme.group_size else 128,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
        },
    }


def build_command(folder: Path, tp: int, max_length: int) -> str:
    """The `trtllm-build` line that makes engines of a checkpoint folder, one for each rank."""
    engines = folder.with_name(f"{folder.name}-engine")
    words = ["trtllm-build", "--checkpoint_dir", str(folder), "--output_dir", str(engines), "--gemm_plugin", "auto"]
    words += ["--max_batch_size", str(_MAX_BATCH_SIZE), "--max_seq_len", str(max_length), "--workers", str(tp)]
    return shlex.join(words)
