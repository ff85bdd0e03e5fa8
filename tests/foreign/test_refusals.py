"""Damaged and foreign configs, tensors and values: one clear line each, which names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.foreign import read_quantization
from qwen_rt.spec import ModelSpec

from . import layouts
from .kit import CONFIG, MODULE, NAME, open_refusal, refusal, write_checkpoint, write_matrix
from .layouts import Written

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CT = layouts.compressed_integers(16, 64).config


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **changes}


def weights(**changes: Any) -> dict[str, Any]:
    """The config of compressed-tensors with other fields of its weights."""
    config: dict[str, Any] = json.loads(json.dumps(CT))
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ("fp8", 'quantization_config="fp8"; expected a JSON object'),
        ([1], "quantization_config=a list of 1"),
        ({"bits": 4}, "quantization_config lacks quant_method; expected a whole quantization config"),
        ({"quant_method": None}, "quantization_config.quant_method=null"),
        ({"quant_method": ["gptq"]}, "quantization_config.quant_method=a list of 1; expected a text"),
        *(
            ({"quant_method": name, "bits": 4}, f'quantization_config.quant_method="{name}"; expected one of gptq, awq')
            for name in ("bitsandbytes", "hqq", "aqlm", "marlin", "quark", "torchao", "fbgemm_fp8", "modelopt", "gguf")
        ),
        ({"quant_method": "gptq"}, "quantization_config lacks bits"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config lacks group_size"),
        (changed(GPTQ, bits=3), "quantization_config.bits=3; expected 4 or 8"),
        (changed(GPTQ, bits="4"), 'quantization_config.bits="4"; expected an integer from 1 to 32'),
        (changed(GPTQ, bits=True), "quantization_config.bits=true"),
        (changed(GPTQ, group_size=0), "quantization_config.group_size=0; expected -1 for a whole row"),
        (changed(GPTQ, group_size=-2), "quantization_config.group_size=-2"),
        (changed(GPTQ, group_size=1e9), "quantization_config.group_size=1000000000.0"),
        (changed(GPTQ, checkpoint_format="marlin"), 'checkpoint_format="marlin"; expected "gptq" or "gptq_v2"'),
        (changed(GPTQ, format="gptq_p"), 'quantization_config.format="gptq_p"; expected "gptq" or "gptq_v2"'),
        (changed(GPTQ, is_marlin_format=True), '="marlin"; expected "gptq" or "gptq_v2"; take another quantized'),
        (changed(GPTQ, sym="yes"), 'quantization_config.sym="yes"; expected true or false'),
        (changed(GPTQ, desc_act=1), "quantization_config.desc_act=1"),
        (changed(GPTQ, pack_dtype="int64"), 'quantization_config.pack_dtype="int64"; expected "int32"'),
        (changed(GPTQ, adapter={"rank": 8}), "quantization_config.adapter"),
        (changed(GPTQ, dynamic=[1]), "quantization_config.dynamic=a list of 1"),
        (changed(GPTQ, dynamic={"+:a": {"bits": 2}}), "quantization_config.dynamic.+:a.bits=2; expected 4 or 8"),
        (changed(GPTQ, dynamic={"+:(": {}}), 'the pattern "(" of the quantization config has a group without an end'),
        (changed(AWQ, bits=8), "quantization_config.bits=8; expected 4"),
        (changed(AWQ, version="gemv"), 'quantization_config.version="gemv"; expected "gemm"'),
        (changed(AWQ, version="marlin"), 'quantization_config.version="marlin"'),
        (changed(AWQ, backend="llm-awq"), 'quantization_config.backend="llm-awq"'),
        (changed(AWQ, zero_point="no"), "quantization_config.zero_point"),
        (changed(AWQ, modules_to_not_convert="lm_head"), 'modules_to_not_convert="lm_head"; expected a list of names'),
        ({"quant_method": "awq", "bits": 4}, "quantization_config lacks group_size"),
        (changed(FP8, weight_block_size=[128]), "weight_block_size=a list of 1; expected two integers"),
        (changed(FP8, weight_block_size=[0, 128]), "weight_block_size[0]=0"),
        (changed(FP8, weight_block_size=["128", 128]), 'weight_block_size[0]="128"'),
        (changed(FP8, activation_scheme="token"), 'activation_scheme="token"; expected "dynamic" or "static"'),
        (changed(FP8, fmt="e5m2"), 'quantization_config.fmt="e5m2"; expected "e4m3"'),
        (changed(FP8, is_checkpoint_fp8_serialized=False), "is_checkpoint_fp8_serialized=false; expected true"),
        (changed(FP8, modules_to_not_convert=[1]), "modules_to_not_convert=a list of 1; expected a list of names"),
        ({"quant_method": "compressed-tensors"}, "quantization_config lacks format"),
        (changed(CT, format="marlin-24"), 'quantization_config.format="marlin-24"; expected "pack-quantized" or'),
        (changed(CT, format="nvfp4-pack-quantized"), 'format="nvfp4-pack-quantized"'),
        (changed(CT, config_groups={}), "config_groups=an object of 0 keys"),
        (changed(CT, config_groups={"group_0": ["Linear"]}), "group_0=a list of 1; expected a JSON object"),
        (changed(CT, ignore="lm_head"), 'quantization_config.ignore="lm_head"; expected a list of names'),
        (changed(CT, ignore=["re:(a"]), 'the pattern "(a" of the quantization config'),
        (changed(CT, sparsity_config={"format": "sparse-24-bitmask"}), 'sparsity_config.format="sparse-24-bitmask"'),
        (changed(CT, transform_config={"config_groups": {"u": {}}}), "transform_config: rotations are not computed"),
        (weights(num_bits=2), "config_groups.group_0.weights.num_bits=2; expected 4 or 8"),
        (weights(type="float"), 'weights.type="float"; expected "int"'),
        (weights(type="uint"), 'weights.type="uint"'),
        (weights(strategy="tensor_group"), 'weights.strategy="tensor_group"'),
        (weights(strategy="block"), 'weights.strategy="block"; expected "tensor" or "channel" or "group"'),
        (weights(group_size=None), "group_0.weights.group_size=null"),
        (weights(group_size=0), "weights.group_size=0"),
        (weights(dynamic=True), "weights.dynamic=true; expected false"),
        (weights(symmetric=None, num_bits=None, type=None, group_size="x"), 'weights.group_size="x"'),
    ],
)  # fmt: skip
def test_configs(config: Any, fragment: str) -> None:
    text = refusal(lambda: read_quantization({"quantization_config": config}))
    assert fragment in text
    assert refusal(lambda: ModelSpec.from_config({**CONFIG, "quantization_config": config})) == text


def test_what_is_read_and_what_to_do_is_said() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_quantization({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert str(caught.value) == (
        'quantization_config.quant_method="bitsandbytes"; expected one of gptq, awq, compressed-tensors, fp8; '
        "take one of those, or the unquantized checkpoint and let the build quantize it"
    )


def test_two_configs() -> None:
    assert read_quantization({"quantization_config": GPTQ, "compression_config": GPTQ}) is not None
    with pytest.raises(CheckpointError, match=r"config.json has both quantization_config and compression_config, and"):
        read_quantization({"quantization_config": GPTQ, "compression_config": AWQ})


@pytest.mark.parametrize("empty", [None, {}, [], False, ""])
def test_no_config(empty: Any) -> None:
    assert read_quantization({"quantization_config": empty}) is None


class TestParts:
    @pytest.mark.parametrize(
        ("write", "part"),
        [
            (layouts.gptq, "qweight"),
            (layouts.gptq, "qzeros"),
            (layouts.gptq, "scales"),
            (layouts.awq, "qweight"),
            (layouts.awq, "qzeros"),
            (layouts.awq, "scales"),
            (layouts.compressed_integers, "weight_packed"),
            (layouts.compressed_integers, "weight_scale"),
            (layouts.compressed_fp8, "weight"),
            (layouts.compressed_fp8, "weight_scale"),
            (layouts.fp8, "weight"),
            (layouts.fp8, "weight_scale_inv"),
        ],
    )
    def test_missing_or_of_another_shape_or_dtype(
        self, tmp_path: Path, write: Callable[..., Written], part: str
    ) -> None:
        written = write(16, 64)
        dtype, array = written.tensors[part]
        del written.tensors[part]
        text = refusal(lambda: write_matrix(tmp_path / "a", written))
        assert text.startswith(f"tensor {MODULE}.{part} is missing; expected ")
        other = array.reshape(-1)[: array.size // 2] if array.size > 1 else np.zeros(3, array.dtype)
        written.tensors[part] = (dtype, other)
        text = refusal(lambda: write_matrix(tmp_path / "b", written))
        assert text.startswith(f"tensor {MODULE}.{part} is {dtype} [")
        assert text.endswith("download the shards and config.json again")
        written.tensors[part] = ("F64", np.zeros(array.shape))
        text = refusal(lambda: write_matrix(tmp_path / "c", written))
        assert text.startswith(f"tensor {MODULE}.{part} is F64 {list(array.shape)}; expected ")

    def test_missing_zero_points(self, tmp_path: Path) -> None:
        written = layouts.compressed_integers(16, 64, symmetric=False)
        del written.tensors["weight_zero_point"]
        text = refusal(lambda: write_matrix(tmp_path, written))
        assert f"tensor {MODULE}.weight_zero_point is missing; expected I32 or I8 [2, 2]" in text

    @pytest.mark.parametrize(
        "write",
        [
            lambda: layouts.gptq(16, 64),
            lambda: layouts.awq(16, 64),
            lambda: layouts.compressed_integers(16, 64),
            lambda: layouts.compressed_fp8(16, 64, strategy="group"),
        ],
    )
    def test_a_group_size_that_does_not_divide(self, tmp_path: Path, write: Callable[[], Written]) -> None:
        written = write()
        text = json.dumps(written.config).replace('"group_size": 32', '"group_size": 48')
        assert text != json.dumps(written.config)
        written.config = json.loads(text)
        text = refusal(lambda: write_matrix(tmp_path, written))
        if written.config["quant_method"] == "compressed-tensors" and "float" in json.dumps(written.config):
            assert f"does not divide the 64 columns of {NAME}" in text
        else:
            assert text.startswith(f"group_size=48 does not divide the 64 columns of {NAME}; expected a divisor of 64")

    def test_groups_that_are_too_small(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64, group_size=8)
        assert f"{NAME} has a scale for every 8 of its 64 columns" in refusal(write_matrix(tmp_path, written).load)

    @pytest.mark.parametrize(("rows", "columns"), [(12, 64), (16, 36)])
    def test_words_that_are_not_full(self, tmp_path: Path, rows: int, columns: int) -> None:
        written = layouts.gptq(rows, columns, group_size=-1)
        assert f"{NAME} has {rows if rows == 12 else columns} " in refusal(lambda: write_matrix(tmp_path, written))

    def test_both_scales(self, tmp_path: Path) -> None:
        written = layouts.fp8(16, 64)
        written.tensors["weight_scale"] = written.tensors["weight_scale_inv"]
        text = refusal(lambda: write_matrix(tmp_path, written))
        assert f"{NAME} has both weight_scale_inv and weight_scale; expected one of them" in text

    def test_a_float_weight_beside(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64)
        written.tensors["weight"] = ("F16", np.zeros((16, 64), np.float16))
        assert f"{NAME} is stored beside {MODULE}.g_idx" in refusal(lambda: write_matrix(tmp_path, written))

    def test_quantized_tensors_and_no_config(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, lambda name, n, k: None if "head" in name else layouts.gptq(n, k))
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        text = open_refusal(tmp_path)
        assert f"{tmp_path} holds quantized matrices (model.layers.0.mlp.down_proj.qweight, " in text
        assert text.endswith("a quantization_config in config.json that says how; download config.json again")

    def test_a_matrix_that_is_not_there_at_all(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, lambda name, n, k: None if "head" in name else layouts.gptq(n, k))
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        assert "lacks 12 of 27 tensors: model.layers.1.input_layernorm.weight" in open_refusal(tmp_path)


def damage(written: Written, part: str, value: float, at: int = 5) -> None:
    dtype, array = written.tensors[part]
    array = array.copy()
    if dtype == "BF16":
        array.reshape(-1)[at % array.size] = layouts.to_bf16(np.array([value], np.float32))[0]
    else:
        array.reshape(-1)[at % array.size] = value
    written.tensors[part] = (dtype, array)


class TestValues:
    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        ("write", "part"),
        [
            (lambda: layouts.gptq(16, 64), "scales"),
            (lambda: layouts.gptq(16, 64, bits=8), "scales"),
            (lambda: layouts.awq(16, 64), "scales"),
            (lambda: layouts.compressed_integers(16, 64), "weight_scale"),
            (lambda: layouts.compressed_integers(16, 64, bits=8, packed=False, strategy="tensor"), "weight_scale"),
            (lambda: layouts.compressed_fp8(16, 64), "weight_scale"),
            (lambda: layouts.fp8(16, 64, scale_shape=(16,), scale_name="weight_scale"), "weight_scale"),
            (lambda: layouts.fp8(200, 256), "weight_scale_inv"),
            (lambda: layouts.fp8(16, 64, scale_shape=()), "weight_scale_inv"),
        ],
    )
    def test_scales(self, tmp_path: Path, write: Callable[[], Written], part: str, value: float) -> None:
        written = write()
        damage(written, part, value)
        matrix = write_matrix(tmp_path, written)
        text = refusal(matrix.load)
        assert f"scales in {MODULE}.{part} are unusable, the first {value:g} at [" in text
        assert "expected finite scales other than zero" in text

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        written = layouts.fp8(16, 64)
        damage(written, "weight", 0x7F)
        damage(written, "weight", 0xFF, 70)
        text = refusal(write_matrix(tmp_path, written).load)
        assert f"2 of 1024 numbers in {NAME} are nan, the first at [0, 5]" in text

    @pytest.mark.parametrize("value", [1e-9, 1e5])
    @pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
    def test_scales_that_float16_cannot_hold(self, tmp_path: Path, value: float, scale_dtype: str) -> None:
        written = layouts.compressed_integers(16, 64, scale_dtype=scale_dtype)
        damage(written, "weight_scale", value)
        text = refusal(write_matrix(tmp_path, written).load)
        assert f"1 of 32 scales of {NAME} do not fit float16, the first {value:.3g}"[:60] in text
        written = layouts.compressed_integers(16, 64, bits=8, scale_dtype=scale_dtype)
        damage(written, "weight_scale", value)
        write_matrix(tmp_path, written).load()

    @pytest.mark.parametrize(
        ("value", "fragment"), [(-1, "puts column 5 into group -1"), (2, "into group 2; expected 0 to 1")]
    )
    def test_group_indices(self, tmp_path: Path, value: int, fragment: str) -> None:
        written = layouts.gptq(16, 64)
        damage(written, "g_idx", value)
        matrix = write_matrix(tmp_path, written)
        assert f"{MODULE}.g_idx" in refusal(matrix.load)
        assert fragment in refusal(lambda: matrix.scheme)

    def test_groups_of_unequal_size(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64)
        damage(written, "g_idx", 1)
        text = refusal(write_matrix(tmp_path, written).load)
        assert f"{MODULE}.g_idx puts 31 columns into group 0; expected group_size=32 in each" in text

    def test_zero_points_out_of_range(self, tmp_path: Path) -> None:
        written = layouts.compressed_integers(16, 64, bits=4, strategy="tensor", symmetric=False)
        damage(written, "weight_zero_point", 8)
        text = refusal(write_matrix(tmp_path, written).load)
        assert f"{MODULE}.weight_zero_point holds 8; expected -8 to 7" in text

    def test_another_weight_shape(self, tmp_path: Path) -> None:
        written = layouts.compressed_integers(16, 64)
        damage(written, "weight_shape", 65, 1)
        text = refusal(write_matrix(tmp_path, written).load)
        assert f"{MODULE}.weight_shape says [16, 65]; expected [16, 64]" in text

    def test_a_file_that_was_cut(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64)
        matrix = write_matrix(tmp_path, written)
        shard = tmp_path / "matrix.safetensors"
        shard.write_bytes(shard.read_bytes()[:-10])
        text = refusal(matrix.load)
        assert "within tensor" in text
        assert "download it again" in text
        shard.unlink()
        assert "cannot be read" in refusal(matrix.load)


def test_a_whole_checkpoint_is_refused_in_a_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, lambda name, n, k: None if "head" in name else layouts.gptq(n, k))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = open_refusal(tmp_path)
    # 64 divides hidden_size, so the first refusal is that of the scales, or of the matrix that it does not divide.
    assert "model.layers.0." in text
