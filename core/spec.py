"""What a Qwen2 checkpoint is, from its `config.json`: sizes, rope, and the name and shape of every tensor.

Reading is strict: what this package would compute wrongly is refused by name, what is malformed is refused with its
value, and no size is believed before it is bounded.

Source: Hugging Face transformers 5.23.0, `models/qwen2/configuration_qwen2.py` and `modeling_qwen2.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen_rt.errors import CheckpointError, UnsupportedModelError, UsageError
from qwen_rt.foreign.config import read_quantization
from qwen_rt.rope import RopeKind, RopeSpec, check_head_dim
from qwen_rt.strict_json import INT_MAX, check_bool, check_float, check_int, name_some, show

__all__ = ["ModelDtype", "ModelSpec", "RopeKind", "RopeSpec"]

ModelDtype = Literal["bfloat16", "float16", "float32"]

_ARCHITECTURE = "Qwen2ForCausalLM"
_FAMILY = "Qwen2, Qwen2-Math, Qwen2.5 or Qwen2.5-Math dense"
_FIX_CHOOSE = f"choose a {_FAMILY} checkpoint"
_FIX_MANIFEST = "export the bundle again"
_FIX_CONFIG = "correct config.json or download it again"

_MAX_LAYERS = 10_000
_MAX_HEADS = 65_536
_MAX_EPS = 0.1

# Spec field → (key in config.json, largest value). The keys before `num_kv_heads` have no default that makes sense.
_SIZES: dict[str, tuple[str, int]] = {
    "hidden_size": ("hidden_size", INT_MAX),
    "num_layers": ("num_hidden_layers", _MAX_LAYERS),
    "num_heads": ("num_attention_heads", _MAX_HEADS),
    "intermediate_size": ("intermediate_size", INT_MAX),
    "vocab_size": ("vocab_size", INT_MAX),
    "num_kv_heads": ("num_key_value_heads", _MAX_HEADS),
    "max_position_embeddings": ("max_position_embeddings", INT_MAX),
}
_DEFAULT_SIZES = {"num_kv_heads": 32, "max_position_embeddings": 32_768}

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

# Keys whose presence means another model around, or other mathematics inside, the plain decoder.
_MULTIMODAL_KEYS = (
    "vision_config",
    "audio_config",
    "text_config",
    "thinker_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "mrope_section",
)


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model that its graph, its cache and its kernels depend on, checked on construction.

    Attributes:
        architecture: `"Qwen2ForCausalLM"`.
        hidden_size: C.
        num_layers: Decoder layers.
        num_heads: H, query heads.
        num_kv_heads: Hkv, key and value heads; divides H.
        head_dim: D, even.
        intermediate_size: F, width of the MLP.
        vocab_size: V, rows of the embedding with their padding; the tokenizer may know fewer.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope: The rotary embedding.
        tie_word_embeddings: Whether the LM head is the embedding.
        max_position_embeddings: As in config.json; see `context_length`.
        qkv_bias: Whether q, k and v have biases; so they do in Qwen2.
        dtype: What the checkpoint is meant to compute in.
        bos_token_id: None if there is none.
        eos_token_ids: Any of them ends a sequence; may be empty.
        pad_token_id: None if there is none.
        sliding_window: None: windows that take effect are refused.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool = True
    dtype: ModelDtype = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.architecture != _ARCHITECTURE:
            raise UnsupportedModelError(f"architecture={show(self.architecture)}", _ARCHITECTURE, _FIX_CHOOSE)
        for name, (_, high) in _SIZES.items():
            check_int(name, getattr(self, name), 1, high)
        check_head_dim(self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_heads} with num_key_value_heads={self.num_kv_heads}",
                "a multiple: every key head serves equally many query heads",
                _FIX_CONFIG,
            )
        object.__setattr__(self, "rms_norm_eps", check_float("rms_norm_eps", self.rms_norm_eps, 0.0, _MAX_EPS))
        for name in ("tie_word_embeddings", "qkv_bias"):
            check_bool(name, getattr(self, name))
        if self.dtype not in get_args(ModelDtype):
            raise UnsupportedModelError(f"dtype={show(self.dtype)}", ", ".join(get_args(ModelDtype)), _FIX_CHOOSE)
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            for token_id in ids:
                if token_id is not None or name == "eos_token_id":
                    check_int(name, token_id, 0, self.vocab_size - 1)
        if self.sliding_window is not None:
            raise UnsupportedModelError(f"sliding_window={show(self.sliding_window)}", "full attention", _FIX_CHOOSE)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelSpec:
        """Read a `config.json` as transformers 4 or 5 wrote it.

        A missing or null key takes the default of Hugging Face's Qwen2Config, except the sizes of the model, which
        are required. A missing dtype is float32, torch's default.

        Raises:
            UnsupportedModelError: Another architecture, a quantization that is not read, a sliding window that takes
                effect, a rope kind or an activation that is not implemented.
            CheckpointError: A key missing, of the wrong type, out of range, or contradicting another.
        """
        if not isinstance(config, dict):
            raise CheckpointError(f"config.json holds {show(config)}", "a JSON object", _FIX_CONFIG)
        _refuse_other_models(config)
        sizes = _read_sizes(config)
        rope = RopeSpec.from_config(config, sizes["max_position_embeddings"])
        dtype: Any = _default(config, "dtype", _default(config, "torch_dtype", "float32"))
        eos = config.get("eos_token_id")
        spec = cls(
            architecture=_ARCHITECTURE,
            **sizes,
            rms_norm_eps=_default(config, "rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=_default(config, "tie_word_embeddings", False),
            dtype=dtype,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_token_id=config.get("pad_token_id"),
        )
        _refuse_sliding_window(config, spec)
        return spec

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """Read back what `to_dict` wrote, as strictly as `from_config` reads.

        Raises:
            UnsupportedModelError: As `from_config`.
            CheckpointError: A key missing, unknown, of the wrong type or out of range.
        """
        fields = dict(_exact_keys(cls, "model spec", data))
        fields["rope"] = RopeSpec(**_exact_keys(RopeSpec, "rope", fields["rope"]))
        if not isinstance(fields["eos_token_ids"], list):
            raise CheckpointError(f"eos_token_ids={show(fields['eos_token_ids'])}", "a list", _FIX_MANIFEST)
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, for the manifest of a bundle."""
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @property
    def context_length(self) -> int:
        """Positions the model is good for: `max_position_embeddings`, or what YaRN extends the original ones to."""
        original = self.rope.original_max_position_embeddings
        if self.rope.kind != "yarn" or original is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * self.rope.factor))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name every tensor as Hugging Face does, with its shape; matrices are [rows out, columns in]."""
        width, ffn = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, width)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (width,)
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
                if self.qkv_bias:
                    shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (width, q_rows)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (ffn, width)
            shapes[f"{layer}.mlp.up_proj.weight"] = (ffn, width)
            shapes[f"{layer}.mlp.down_proj.weight"] = (width, ffn)
        shapes["model.norm.weight"] = (width,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, width)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Count of weights, a tied LM head not counted twice."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all parameters stored in `dtype`, scales of quantized weights not counted.

        Raises:
            UsageError: `dtype` is not a known name.
        """
        return self.num_parameters * _bytes_of(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token adds over all layers.

        Raises:
            UsageError: `dtype` is not a known name.
        """
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _bytes_of(dtype)

    @property
    def kv_scale_bytes_per_token(self) -> int:
        """Bytes that one token adds to the scales of a quantized cache: a float32 for each key and value of a head."""
        return 2 * self.num_layers * self.num_kv_heads * 4


def _bytes_of(dtype: str) -> int:
    if dtype not in _BYTES_OF_DTYPE:
        raise UsageError(f"dtype={show(dtype)}", f"one of {', '.join(_BYTES_OF_DTYPE)}", "name one of them")
    return _BYTES_OF_DTYPE[dtype]


def _default(config: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of `key`, or `default` where it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def _exact_keys(cls: type[ModelSpec] | type[RopeSpec], what: str, data: object) -> dict[str, Any]:
    """Return `data` if it is an object with exactly the fields of `cls`."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}={show(data)}", "a JSON object", _FIX_MANIFEST)
    names = {field.name for field in dataclasses.fields(cls)}
    for problem, keys in (("lacks", names - set(data)), ("has unknown", set(data) - names)):
        if keys:
            raise CheckpointError(f"{what} {problem} {name_some(map(str, keys))}", "exactly its fields", _FIX_MANIFEST)
    return data


def _read_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Read the integers of `_SIZES` and `head_dim`, naming keys as config.json does."""
    sizes: dict[str, Any] = {}
    for name, (key, high) in _SIZES.items():
        value = _default(config, key, _DEFAULT_SIZES.get(name))
        if value is None:
            raise CheckpointError(f"config.json lacks {key}", "an integer", "download config.json again")
        sizes[name] = check_int(key, value, 1, high)
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]  # null means multi-head attention; missing means 32
    head_dim = config.get("head_dim")
    if head_dim is None:
        hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
        if hidden_size % num_heads:
            raise CheckpointError(
                f"hidden_size={hidden_size} with num_attention_heads={num_heads} and no head_dim",
                "a multiple",
                _FIX_CONFIG,
            )
        head_dim = hidden_size // num_heads
    check_head_dim(head_dim)
    sizes["head_dim"] = head_dim
    return sizes


def _refuse_other_models(config: dict[str, Any]) -> None:
    """Refuse what is not a plain, causal Qwen2 decoder, or is quantized in a way that is not read."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type is None and not architectures:
        if {"architecture", "mapping", "quantization"} <= config.keys():
            raise CheckpointError(
                "config.json is of a TensorRT-LLM checkpoint",
                "one in the Hugging Face layout",
                "name the checkpoint that it was converted from",
            )
        raise CheckpointError(
            "config.json has neither model_type nor architectures", 'model_type="qwen2"', "download config.json again"
        )
    if model_type not in (None, "qwen2"):
        raise UnsupportedModelError(f"model_type={show(model_type)}", f'"qwen2" ({_FAMILY})', _FIX_CHOOSE)
    if architectures is not None and not isinstance(architectures, list):
        raise CheckpointError(f"architectures={show(architectures)}", "a list of names", _FIX_CONFIG)
    for architecture in architectures or ():
        if architecture != _ARCHITECTURE:
            raise UnsupportedModelError(f"architecture {show(architecture)}", _ARCHITECTURE, _FIX_CHOOSE)
    read_quantization(config)
    present = [key for key in _MULTIMODAL_KEYS if config.get(key) is not None]
    if present:
        raise UnsupportedModelError(f"config.json has {name_some(present)}", "a text-only model", _FIX_CHOOSE)
    hidden_act = _default(config, "hidden_act", "silu")
    if hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act={show(hidden_act)}", '"silu"', _FIX_CHOOSE)
    if not check_bool("is_causal", _default(config, "is_causal", True)):
        raise UnsupportedModelError("is_causal=false", "a causal language model", _FIX_CHOOSE)


def _refuse_sliding_window(config: dict[str, Any], spec: ModelSpec) -> None:
    """Refuse a sliding window unless no layer has one or it spans the whole context."""
    enabled = check_bool("use_sliding_window", _default(config, "use_sliding_window", False))
    window = config.get("sliding_window", 4096)
    if window is not None:
        check_int("sliding_window", window)
    max_window_layers = check_int("max_window_layers", _default(config, "max_window_layers", 28), 0)
    layer_types = config.get("layer_types")
    if layer_types is None:
        num_windowed = max(0, spec.num_layers - max_window_layers) if enabled else 0
    else:
        num_windowed = _count_windowed(layer_types, spec.num_layers)
        if num_windowed and not (enabled and window is not None):
            raise CheckpointError(
                f"layer_types names {num_windowed} sliding_attention layers, but use_sliding_window={show(enabled)} "
                f"and sliding_window={show(window)}",
                "settings that agree",
                _FIX_CONFIG,
            )
    if num_windowed and window is not None and window < spec.context_length:
        raise UnsupportedModelError(
            f"use_sliding_window=true with sliding_window={window}, max_window_layers={max_window_layers}, "
            f"num_hidden_layers={spec.num_layers}: {num_windowed} layers would see a window",
            f"no windowed layer, or a window of the whole context ({spec.context_length} positions)",
            "set use_sliding_window to false if the model was trained with full attention",
        )


def _count_windowed(layer_types: object, num_layers: int) -> int:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(f"layer_types={show(layer_types)}", f"a list of {num_layers} names", _FIX_CONFIG)
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"layer_types has {show(layer_type)}", "full_attention", _FIX_CHOOSE)
    return layer_types.count("sliding_attention")
