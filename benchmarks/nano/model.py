"""The nano model's shape, its int4 rounding for robust training, and its files in the Hugging Face layout."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from .prompts import ENDOFTEXT, IM_END
from .tokenizer import padded_vocab_size, save_tokenizer

NUM_SHARDS = 2
GROUP_SIZE = 128


@dataclass(frozen=True)
class Shape:
    """The model's dimensions; head_dim is 128, as in Qwen2-Math."""

    hidden_size: int = 512
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 2048


def config_json(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``config.json`` with the fields a released Qwen2 has."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(ENDOFTEXT),
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pad_token_id": tokenizer.token_to_id(ENDOFTEXT),
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": shape.max_position_embeddings,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": padded_vocab_size(tokenizer),
    }


def generation_config_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``generation_config.json`` as Qwen2-Math-Instruct has it."""
    end = tokenizer.token_to_id(ENDOFTEXT)
    return {
        "bos_token_id": end,
        "do_sample": False,
        "eos_token_id": [tokenizer.token_to_id(IM_END), end],
        "max_new_tokens": 512,
        "pad_token_id": end,
    }


def build_model(shape: Shape, tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return a freshly initialised fp32 model with tied embeddings."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in config_json(shape, tokenizer).items() if key != "torch_dtype"}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    model: Qwen2ForCausalLM = Qwen2ForCausalLM(Qwen2Config(**fields, dtype=torch.float32))
    return model


def is_quantizable(name: str) -> bool:
    """Return whether int4 applies to this parameter: the linear layers' weights, not embeddings, norms, biases."""
    return name.endswith("proj.weight")


def round_int4(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight to symmetric int4 in groups of 128 inputs, ``w ≈ s·q``, ``q`` in -8..7, ``s = max|w|/7``.

    Args:
        weight: f32[out, in], ``in`` a multiple of 128.

    Returns:
        f32[out, in], the dequantized weight.
    """
    groups = weight.reshape(weight.shape[0], -1, GROUP_SIZE)  # [out, in/128, 128]
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 7
    return (groups / scale).round().clamp(-8, 7).mul(scale).reshape(weight.shape)


def save_checkpoint(
    model: Qwen2ForCausalLM, shape: Shape, tokenizer: Tokenizer, output_dir: Path, readme: str = ""
) -> None:
    """Write the checkpoint: everything into a temporary folder, which then takes the place of ``output_dir``.

    Args:
        model: the model; its weights are rounded to bf16. The tied ``lm_head`` is not stored.
        shape: its dimensions.
        tokenizer: its tokenizer.
        output_dir: the folder to create or replace.
        readme: the model card's text; empty for none.
    """
    staging = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    tensors = {
        name: value.detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    total_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    weight_map: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    filled_bytes = 0
    for name, value in tensors.items():
        number = min(filled_bytes * NUM_SHARDS // total_bytes, NUM_SHARDS - 1)
        shards[number][name] = value
        weight_map[name] = f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        filled_bytes += value.numel() * value.element_size()
    for number, shard in enumerate(shards):
        save_file(shard, staging / f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(staging / "model.safetensors.index.json", index)
    _write_json(staging / "config.json", config_json(shape, tokenizer))
    _write_json(staging / "generation_config.json", generation_config_json(tokenizer))
    save_tokenizer(tokenizer, staging, shape.max_position_embeddings)
    for path in staging.iterdir():
        path.chmod(0o644)
    if readme:
        (staging / "README.md").write_text(readme, encoding="utf-8")
    if output_dir.exists():
        replaced = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.replaced")
        output_dir.rename(replaced)
        staging.rename(output_dir)
        shutil.rmtree(replaced)
    else:
        staging.rename(output_dir)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
