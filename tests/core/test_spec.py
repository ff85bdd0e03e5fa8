"""ModelSpec and RopeSpec: released configs, Hugging Face's defaults, the rope formulas, and every refusal."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from qwen_rt.errors import CheckpointError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.spec import ModelSpec, RopeSpec

from .configs import QWEN2_MATH_7B, RELEASED, YARN, config_with, released_config


def refusal(config: Any) -> QwenRtError:
    with pytest.raises(QwenRtError) as caught:
        ModelSpec.from_config(config)
    assert "\n" not in str(caught.value)
    assert "expected " in str(caught.value)
    return caught.value


class TestReleasedConfigs:
    def test_qwen2_math_7b(self) -> None:
        spec = ModelSpec.from_config(QWEN2_MATH_7B)
        assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (3584, 28, 28, 4)
        assert (spec.head_dim, spec.intermediate_size, spec.vocab_size) == (128, 18944, 152064)
        assert (spec.rms_norm_eps, spec.max_position_embeddings, spec.context_length) == (1e-6, 4096, 4096)
        assert spec.rope == RopeSpec(theta=10_000.0)
        assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (151643, (151645,), None)
        assert (spec.dtype, spec.qkv_bias, spec.tie_word_embeddings, spec.sliding_window) == (
            "bfloat16",
            True,
            False,
            None,
        )

    @pytest.mark.parametrize("size", RELEASED)
    def test_number_of_parameters(self, size: str) -> None:
        spec = ModelSpec.from_config(released_config(size))
        assert spec.num_parameters == RELEASED[size][1]
        assert spec.weight_bytes("bfloat16") == 2 * spec.num_parameters

    def test_parameters_of_the_72b(self) -> None:
        shapes = ModelSpec.from_config(released_config("72B")).parameters()
        assert len(shapes) == 963
        assert shapes["model.embed_tokens.weight"] == (152064, 8192)
        assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 8192)
        assert shapes["model.layers.79.self_attn.k_proj.bias"] == (1024,)
        assert shapes["model.layers.0.self_attn.o_proj.weight"] == (8192, 8192)
        assert shapes["model.layers.0.mlp.down_proj.weight"] == (8192, 29568)
        assert shapes["lm_head.weight"] == (152064, 8192)

    def test_tied_model_has_no_lm_head(self) -> None:
        assert "lm_head.weight" not in ModelSpec.from_config(released_config("0.5B")).parameters()

    def test_head_dim_apart_from_hidden_size(self) -> None:
        shapes = ModelSpec.from_config(config_with(head_dim=64)).parameters()
        assert shapes["model.layers.0.self_attn.q_proj.weight"] == (28 * 64, 3584)
        assert shapes["model.layers.0.self_attn.o_proj.weight"] == (3584, 28 * 64)

    def test_bytes(self) -> None:
        spec = ModelSpec.from_config(released_config("72B"))
        assert spec.kv_bytes_per_token("bfloat16") == 327_680
        assert spec.kv_bytes_per_token("float8_e4m3fn") == 163_840
        with pytest.raises(UsageError, match='dtype="int3"; expected one of float32'):
            spec.weight_bytes("int3")

    def test_transformers_5_layout_is_the_same_model(self) -> None:
        new = config_with(
            rope_theta=...,
            torch_dtype=...,
            dtype="bfloat16",
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            layer_types=["full_attention"] * 28,
            sliding_window=None,
        )
        assert ModelSpec.from_config(new) == ModelSpec.from_config(QWEN2_MATH_7B)

    def test_defaults_are_hugging_faces(self) -> None:
        spec = ModelSpec.from_config(
            {
                "model_type": "qwen2",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 32,
                "intermediate_size": 96,
                "vocab_size": 100,
            }
        )
        assert (spec.num_kv_heads, spec.max_position_embeddings, spec.rms_norm_eps) == (32, 32768, 1e-6)
        assert (spec.rope.theta, spec.tie_word_embeddings, spec.dtype) == (10_000.0, False, "float32")
        assert spec.eos_token_ids == ()

    def test_null_kv_heads_is_multi_head_attention(self) -> None:
        assert ModelSpec.from_config(config_with(num_key_value_heads=None)).num_kv_heads == 28

    def test_several_eos_ids(self) -> None:
        assert ModelSpec.from_config(config_with(eos_token_id=[151645, 151643])).eos_token_ids == (151645, 151643)

    @pytest.mark.parametrize("size", RELEASED)
    def test_same_parameters_as_transformers(self, size: str) -> None:
        import torch
        import transformers

        config = {**released_config(size), "num_hidden_layers": 1, "max_window_layers": 1}
        with torch.device("meta"):
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
        theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            del theirs["lm_head.weight"]
        assert ModelSpec.from_config(config).parameters() == theirs


class TestRoundTrip:
    @pytest.mark.parametrize(
        "config", [QWEN2_MATH_7B, config_with(rope_scaling=YARN, eos_token_id=[1, 2]), released_config("0.5B")]
    )
    def test_through_json(self, config: dict[str, Any]) -> None:
        spec = ModelSpec.from_config(config)
        again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert hash(again) == hash(spec)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_layers": ...}, "model spec lacks num_layers"),
            ({"extra": 1}, "model spec has unknown extra"),
            ({"num_layers": True}, "num_layers=true; expected an integer from 1 to 10000"),
            ({"num_layers": 10**9}, "num_layers=1000000000"),
            ({"rope": []}, "rope=a list of 0; expected a JSON object"),
            ({"rope": {"theta": 1e6}}, "rope lacks attention_factor, beta_fast, beta_slow and 6 more"),
            ({"eos_token_ids": 5}, "eos_token_ids=5; expected a list"),
            ({"eos_token_ids": [None]}, "eos_token_id=null"),
            ({"sliding_window": 4096}, "sliding_window=4096; expected full attention"),
            ({"architecture": "LlamaForCausalLM"}, 'architecture="LlamaForCausalLM"; expected Qwen2ForCausalLM'),
            ({"qkv_bias": 1}, "qkv_bias=1; expected true or false"),
            ({"dtype": ["bfloat16"]}, "dtype=a list of 1"),
            ({"head_dim": 127}, "head_dim=127; expected an even number"),
        ],
    )
    def test_tampered_dict_is_refused(self, change: dict[str, Any], message: str) -> None:
        data = {**ModelSpec.from_config(QWEN2_MATH_7B).to_dict(), **change}
        with pytest.raises(QwenRtError) as caught:
            ModelSpec.from_dict({key: value for key, value in data.items() if value is not ...})
        assert message in str(caught.value)

    def test_tampered_rope_is_refused(self) -> None:
        data = ModelSpec.from_config(QWEN2_MATH_7B).to_dict()
        for change, message in (
            ({"kind": "dynamic"}, 'rope_type="dynamic"; expected default, linear or yarn'),
            ({"kind": []}, "rope_type=a list of 0"),
            ({"factor": 2.0}, "rope factor=2.0; expected 1 for the default rope"),
            ({"kind": "yarn", "factor": 2.0}, "original_max_position_embeddings=null"),
            ({"theta": math.nan}, "rope_theta=NaN"),
        ):
            with pytest.raises(QwenRtError, match=r"rope|original_max") as caught:
                ModelSpec.from_dict({**data, "rope": {**data["rope"], **change}})
            assert message in str(caught.value)

    def test_not_a_dict(self) -> None:
        with pytest.raises(CheckpointError, match="model spec=3; expected a JSON object"):
            ModelSpec.from_dict(3)  # type: ignore[arg-type]


class TestUnsupported:
    @pytest.mark.parametrize(
        ("change", "fragments"),
        [
            ({"model_type": "llama"}, ['model_type="llama"', "Qwen2, Qwen2-Math, Qwen2.5"]),
            ({"model_type": "qwen2_moe"}, ['model_type="qwen2_moe"']),
            ({"model_type": ["qwen2"]}, ["model_type=a list of 1"]),
            ({"architectures": ["Qwen2ForRewardModel"]}, ['architecture "Qwen2ForRewardModel"', "Qwen2ForCausalLM"]),
            ({"architectures": [7]}, ["architecture 7"]),
            ({"hidden_act": "gelu"}, ['hidden_act="gelu"', '"silu"']),
            ({"hidden_act": {}}, ["hidden_act=an object of 0 keys"]),
            ({"is_causal": False}, ["is_causal=false"]),
            (
                {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                ['quant_method="bitsandbytes"', "one of gptq, awq, compressed-tensors, fp8", "the unquantized"],
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ["quantization_config.bits=3", "4 or 8"]),
            ({"vision_config": {"depth": 32}}, ["config.json has vision_config", "text-only"]),
            ({"image_token_id": 5, "video_token_id": 6}, ["config.json has image_token_id, video_token_id"]),
            ({"head_dim": 127}, ["head_dim=127", "even"]),
            ({"num_key_value_heads": 5}, ["num_attention_heads=28 with num_key_value_heads=5"]),
            ({"torch_dtype": "float8_e4m3fn"}, ['dtype="float8_e4m3fn"', "bfloat16, float16, float32"]),
            ({"torch_dtype": 16}, ["dtype=16"]),
            ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
            ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
            ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, ['rope_type="mrope"']),
            (
                {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
                ["rope_scaling has mrope_section", 'rope_type="default" does not take'],
            ),
            ({"rope_scaling": {"factor": 4.0}}, ["rope_scaling has factor"]),
            ({"rope_scaling": {**YARN, "temperature": 2, "alpha": 1}}, ["rope_scaling has alpha, temperature"]),
            ({"rope_parameters": {"full_attention": {}}, "rope_theta": ...}, ["rope_parameters has full_attention"]),
            *(
                ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, [f'rope_type="{kind}"', "linear or yarn"])
                for kind in ("dynamic", "longrope", "llama3", "ntk")
            ),
            ({"rope_scaling": {"rope_type": {}}}, ["rope_type=an object of 0 keys"]),
        ],
    )
    def test_refused_by_name(self, change: dict[str, Any], fragments: list[str]) -> None:
        error = refusal(config_with(**change))
        assert isinstance(error, UnsupportedModelError)
        for fragment in fragments:
            assert fragment in str(error)


class TestSlidingWindow:
    @pytest.mark.parametrize(
        "change",
        [
            {"max_window_layers": 28},
            {"max_window_layers": 99},
            {"max_window_layers": 0, "sliding_window": 4096},
            {"max_window_layers": 0, "sliding_window": None},
            {"layer_types": ["full_attention"] * 28, "max_window_layers": 0, "sliding_window": 16},
            {"layer_types": ["sliding_attention"] * 28, "sliding_window": 4096},
        ],
    )
    def test_honoured_where_it_changes_nothing(self, change: dict[str, Any]) -> None:
        assert ModelSpec.from_config(config_with(use_sliding_window=True, **change)).sliding_window is None

    @pytest.mark.parametrize(
        ("change", "num_windowed"),
        [
            ({"max_window_layers": 21, "sliding_window": 4095}, 7),
            ({"max_window_layers": 0, "sliding_window": 1}, 28),
            ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"], "sliding_window": 512}, 1),
            ({"max_window_layers": 27, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 1),
        ],
    )
    def test_refused_where_it_takes_effect(self, change: dict[str, Any], num_windowed: int) -> None:
        config = config_with(use_sliding_window=True, **change)
        error = refusal(config)
        assert isinstance(error, UnsupportedModelError)
        for name in ("sliding_window", "max_window_layers"):
            assert f"{name}={config[name]}" in str(error)
        assert "use_sliding_window=true" in str(error)
        assert f"{num_windowed} layers would see a window" in str(error)

    def test_layer_types_must_agree(self) -> None:
        error = refusal(config_with(layer_types=["sliding_attention"] * 28))
        assert "layer_types names 28 sliding_attention layers, but use_sliding_window=false" in str(error)

    @pytest.mark.parametrize("layer_types", [[], "full_attention", ["full_attention"] * 27, {}])
    def test_layer_types_must_be_a_list_of_all_layers(self, layer_types: Any) -> None:
        assert "expected a list of 28 names" in str(refusal(config_with(layer_types=layer_types)))

    def test_unknown_layer_type(self) -> None:
        error = refusal(config_with(layer_types=["full_attention"] * 27 + ["linear_attention"]))
        assert 'layer_types has "linear_attention"' in str(error)


INTEGERS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
]


class TestMalformed:
    @pytest.mark.parametrize(
        "value", [True, "28", 28.0, 0, -28, 2**31, pytest.param(10**5000, id="5000-digits"), math.nan, [28], {"n": 28}]
    )
    @pytest.mark.parametrize("key", INTEGERS)
    def test_integers(self, key: str, value: Any) -> None:
        error = refusal(config_with(**{key: value}))
        assert isinstance(error, CheckpointError)
        assert str(error).startswith(f"{key}=")
        assert len(str(error)) < 300

    @pytest.mark.parametrize(
        "value", [True, "1e-6", 0, -1e-6, math.nan, math.inf, -math.inf, pytest.param(10**400, id="400-digits"), [1]]
    )
    @pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
    def test_numbers(self, key: str, value: Any) -> None:
        error = refusal(config_with(**{key: value}))
        assert isinstance(error, CheckpointError)
        assert f"{key}=" in str(error)

    @pytest.mark.parametrize("key", ["tie_word_embeddings", "use_sliding_window", "is_causal"])
    @pytest.mark.parametrize("value", [0, 1, "true", []])
    def test_booleans(self, key: str, value: Any) -> None:
        assert f"{key}=" in str(refusal(config_with(**{key: value})))

    @pytest.mark.parametrize("key", [k for k in INTEGERS if k not in ("num_key_value_heads", "head_dim")][:5])
    def test_required(self, key: str) -> None:
        for value in (None, ...):
            assert f"config.json lacks {key}; expected an integer" in str(refusal(config_with(**{key: value})))

    @pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
    @pytest.mark.parametrize("value", [-1, 152064, True, 1.0, "<|endoftext|>", [None], [[1]]])
    def test_token_ids(self, key: str, value: Any) -> None:
        assert f"{key}=" in str(refusal(config_with(**{key: value})))

    @pytest.mark.parametrize(
        ("change", "fragment"),
        [
            ({"architectures": "Qwen2ForCausalLM"}, 'architectures="Qwen2ForCausalLM"; expected a list'),
            ({"architectures": ..., "model_type": ...}, "neither model_type nor architectures"),
            (
                {"architectures": ..., "model_type": ..., "architecture": "Q", "mapping": {}, "quantization": {}},
                "is of a TensorRT-LLM checkpoint; expected one in the Hugging Face layout",
            ),
            ({"hidden_size": 3585}, "hidden_size=3585 with num_attention_heads=28"),
            ({"num_hidden_layers": 10_001}, "num_hidden_layers=10001; expected an integer from 1 to 10000"),
            ({"rope_scaling": 4.0}, "rope_scaling=4.0; expected an object or null"),
            ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
            ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor=0.5; expected 1 or more"),
            ({"rope_scaling": {"type": "linear", "factor": True}}, "factor=true"),
            ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, 'contradicts type="linear"'),
            ({"rope_scaling": {**YARN, "rope_theta": 1e6}}, "contradicts rope_theta=10000"),
            ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}, "beta_slow=32"),
            ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate=1; expected true or false"),
            ({"rope_scaling": {**YARN, "mscale": math.inf}}, "mscale=Infinity"),
            ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings=0"),
            (
                {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
                "rope_scaling and rope_parameters differ",
            ),
            ({"sliding_window": "4096"}, 'sliding_window="4096"'),
            ({"max_window_layers": -1}, "max_window_layers=-1"),
        ],
    )
    def test_others(self, change: dict[str, Any], fragment: str) -> None:
        error = refusal(config_with(**change))
        assert isinstance(error, CheckpointError)
        assert fragment in str(error)

    @pytest.mark.parametrize("config", [None, [], "qwen2", 7])
    def test_not_an_object(self, config: Any) -> None:
        assert "config.json holds" in str(refusal(config))

    def test_hostile_text_stays_on_one_line(self) -> None:
        error = refusal(config_with(model_type="llama\nTraceback \x1b[31m" + "x" * 5000))
        assert "\x1b" not in str(error)
        assert len(str(error)) < 400
