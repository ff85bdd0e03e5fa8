"""Schemes of all matrices: defaults, options, and files of overrides, good and bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_rt.errors import UsageError
from qwen_rt.export.quantize.plan import SchemeOptions, base_scheme, layer_matrices, plan_schemes
from qwen_rt.quantization import DEFAULT_SCHEMES, Scheme
from qwen_rt.rope import RopeSpec
from qwen_rt.spec import ModelSpec

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def _spec(tied: bool = False, hidden: int = 256, ffn: int = 384) -> ModelSpec:
    return ModelSpec(
        "Qwen2ForCausalLM",
        hidden_size=hidden,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=ffn,
        vocab_size=320,
        rms_norm_eps=1e-6,
        rope=RopeSpec(),
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )


def _overrides(folder: Path, text: str) -> Path:
    file = folder / "overrides.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_all_matrices_of_the_layers_and_nothing_else(precision: str) -> None:
    spec = _spec()
    names = layer_matrices(spec)
    assert len(set(names)) == 12 * 7
    assert set(names) <= set(spec.parameters())
    schemes = plan_schemes(spec, SchemeOptions(precision))
    assert schemes == dict.fromkeys(names, DEFAULT_SCHEMES[precision])


def test_options() -> None:
    spec = _spec()
    schemes = plan_schemes(
        spec, SchemeOptions("int4", group_size=64, symmetric=False, lm_head="int4", embedding="int8")
    )
    assert schemes.pop(EMBEDDING) == Scheme("int8")
    assert set(schemes) == {*layer_matrices(spec), HEAD}
    assert set(schemes.values()) == {Scheme("int4", 64, symmetric=False)}
    assert plan_schemes(spec, SchemeOptions("int4", group_size=64, lm_head="int8"))[HEAD] == Scheme("int8")
    assert HEAD not in plan_schemes(spec, SchemeOptions("int4", lm_head="none"))
    assert base_scheme("int4", 0) == Scheme("int4", 0)


def test_a_tied_head_has_its_own_scheme_unless_it_is_that_of_the_embeddings() -> None:
    spec = _spec(tied=True)
    assert plan_schemes(spec, SchemeOptions("int4", lm_head="int8"))[HEAD] == Scheme("int8")
    both = plan_schemes(spec, SchemeOptions("int4", lm_head="int8", embedding="int8"))
    assert EMBEDDING in both
    assert HEAD not in both


def test_lines_of_an_override_file_decide_and_later_ones_win(tmp_path: Path) -> None:
    file = _overrides(
        tmp_path,
        """
        "model.layers.1.*" = "int8"
        "model.layers.1.mlp.down_proj.weight" = "bf16"
        "*.mlp.down_proj" = { precision = "int4", group_size = 64 }
        "model.layers.2.self_attn.[qkv]_proj.weight" = { precision = "int4", group_size = 32, symmetric = false }
        "model.layers.3.self_attn.o_proj" = "fp32"
        "lm_head" = "fp8"
        """,
    )
    spec = _spec()
    schemes = plan_schemes(spec, SchemeOptions("int4", overrides=file))
    assert schemes["model.layers.1.self_attn.q_proj.weight"] == Scheme("int8")
    assert schemes["model.layers.10.self_attn.q_proj.weight"] == Scheme("int4", 128)
    assert schemes[DOWN] == Scheme("int4", 64)
    assert schemes["model.layers.2.self_attn.v_proj.weight"] == Scheme("int4", 32, symmetric=False)
    assert schemes["model.layers.2.self_attn.o_proj.weight"] == Scheme("int4", 128)
    assert "model.layers.3.self_attn.o_proj.weight" not in schemes
    assert schemes[HEAD] == Scheme("fp8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"model.layers.12.*" = "int8"', r"model.layers.12.\* fits no matrix; expected names such as"),
        ('"*" = "int3"', r"\* = int3; expected one of bf16, fp16, fp32, fp8, int8, int4"),
        ('"*" = 4', r"\* = 4; expected one of"),
        ('"*" = { precision = "int4", groups = 4 }', r"groups.*; expected one of"),
        ('"*" = { group_size = 64 }', r"group_size.*; expected one of"),
        ('"*" = { precision = "int4", group_size = "64" }', "group_size an integer"),
        ('"*" = { precision = "int4", group_size = true }', "group_size an integer"),
        ('"*" = { precision = "int4", symmetric = 1 }', "symmetric true or false"),
        ('"*" = { precision = "int8", symmetric = false }', "zero points with int8"),
        ('"model.layers.*" = { precision = "int4", group_size = 48 }', "group_size=48; expected 0 .* or one of"),
        (
            '"model.layers.0.self_attn.q_proj" = "int8"',
            r"q_proj.weight in int8 and .*k_proj.weight in int4 g128; expected one precision .*; name them all",
        ),
        ('"model.layers.0.mlp.up_proj" = "bf16"', "gate_proj.weight in int4 g128 and .*up_proj.weight in bf16"),
        ('"model.embed_tokens" = "int4"', "embeddings in int4; expected fp8 or int8"),
        ("= 1", r"overrides.toml is not TOML: .*; expected "),
    ],
)
def test_bad_override_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan_schemes(_spec(), SchemeOptions("int4", overrides=_overrides(tmp_path, text)))


def test_override_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        plan_schemes(_spec(), SchemeOptions("int4", overrides=tmp_path / "missing.toml"))
    (tmp_path / "latin.toml").write_bytes(b'"\xe4" = "int8"')
    with pytest.raises(UsageError, match="cannot be read"):
        plan_schemes(_spec(), SchemeOptions("int4", overrides=tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SchemeOptions("int3"), "precision=int3; expected one of fp8, int8, int4"),
        (SchemeOptions("int8", symmetric=False), "zero points with int8; expected int4"),
        (SchemeOptions("int4", lm_head="int3"), "--lm-head int3; expected one of none"),
        (SchemeOptions("int4", embedding="int4"), "embeddings in int4"),
        (SchemeOptions("int4", group_size=256), "group_size=256 does not divide the 384 columns of .*down_proj"),
    ],
)
def test_bad_options(options: SchemeOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_schemes(_spec(), options)


def test_an_odd_number_of_columns_is_refused_for_int4_only() -> None:
    spec = _spec(ffn=231)
    with pytest.raises(UsageError, match=r"group_size=128 does not divide the 231 columns of .*down_proj"):
        plan_schemes(spec, SchemeOptions("int4"))
    with pytest.raises(UsageError, match="has 231 columns; expected an even number for int4"):
        plan_schemes(spec, SchemeOptions("int4", group_size=0))
    assert len(plan_schemes(spec, SchemeOptions("int8"))) == 84
