"""Every layout and option, written number by number: what is read stands for exactly what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.quantization import Scheme, dequantize, unpack_nibbles

from . import layouts
from .kit import assert_exact, refusal, write_matrix
from .layouts import Written


class TestGptq:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
    @pytest.mark.parametrize("sym", [True, False])
    @pytest.mark.parametrize("act_order", [True, False])
    @pytest.mark.parametrize("group_size", [16, 32, 64, 128])
    def test_options(
        self, tmp_path: Path, bits: int, version: str, sym: bool, act_order: bool, group_size: int
    ) -> None:
        written = layouts.gptq(24, 256, bits=bits, version=version, sym=sym, act_order=act_order, group_size=group_size)
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        assert tensor.scheme == Scheme(f"int{bits}", group_size, sym, act_order)

    @pytest.mark.parametrize(("columns", "groups"), [(256, 128), (192, 64), (96, 32), (48, 16), (40, 0)])
    def test_int4_rows_are_given_groups(self, tmp_path: Path, columns: int, groups: int) -> None:
        written = layouts.gptq(16, columns, group_size=-1)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("int4", groups, False)

    def test_int8_rows_keep_one_scale(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 192, bits=8, group_size=-1, sym=True)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("int8")

    @pytest.mark.parametrize(("group_size", "stored"), [(512, 256), (48, 16), (96, 32)])
    def test_other_group_sizes_are_split(self, tmp_path: Path, group_size: int, stored: int) -> None:
        written = layouts.gptq(8, 1536, group_size=group_size, act_order=True)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("int4", stored, False, True)

    def test_without_g_idx(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64, g_idx=False)
        assert "g_idx" not in write_matrix(tmp_path, written).parts
        assert_exact(write_matrix(tmp_path, written), written)

    def test_the_tensors_decide_and_not_the_config(self, tmp_path: Path) -> None:
        """sym and desc_act say how a checkpoint was made; kernels go by the tensors."""
        written = layouts.gptq(16, 64, act_order=True)
        written.config |= {"desc_act": False, "sym": True}
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("int4", 32, False, True)

    @pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
    def test_scales_of_other_dtypes(self, tmp_path: Path, scale_dtype: str) -> None:
        written = layouts.gptq(16, 64, bits=8, scale_dtype=scale_dtype)
        assert_exact(write_matrix(tmp_path, written), written)

    def test_f32_scales_of_int4_are_rounded_once(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64, scale_dtype="F32")
        found = dequantize(write_matrix(tmp_path, written).load())
        np.testing.assert_allclose(found, written.weight, rtol=2.0**-11)

    def test_more_rows_than_a_block(self, tmp_path: Path) -> None:
        written = layouts.gptq(520, 32, act_order=True, group_size=16)
        assert_exact(write_matrix(tmp_path, written), written)

    def test_dynamic_rules(self, tmp_path: Path) -> None:
        written = layouts.gptq(16, 64, bits=8, group_size=16)
        written.config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dynamic": {"-:.*down_proj": {}, r"+:.*\.0\.mlp\.up.*": {"bits": 8, "group_size": 16}, ".*": {"bits": 4}},
        }
        assert_exact(write_matrix(tmp_path, written), written)
        written.config["dynamic"] = {r"-:.*\.mlp\.": {}}
        text = refusal(lambda: write_matrix(tmp_path, written))
        assert "model.layers.0.mlp.up_proj is stored quantized (g_idx, qweight, qzeros and 1 more)" in text
        assert "the GPTQ config leaves that module as it was" in text

    @pytest.mark.parametrize(("columns", "rows"), [(464, 16), (32, 464)])
    def test_the_padding_of_72b(self, tmp_path: Path, columns: int, rows: int) -> None:
        """29696 = 29568 + 128 columns of down_proj and rows of the others, at a sixty-fourth of the size."""
        written = layouts.gptq(rows, columns, group_size=16, sym=True)
        qweight, qzeros = written.tensors["qweight"][1], written.tensors["qzeros"][1]
        # AutoGPTQ stores zeros as 8, the zero point, with a scale of 2/15.
        if columns == 464:
            qweight[-2:] = -0x77777778
            written.weight[:, -16:] = 0
        else:
            qweight[:, -16:] = -0x77777778
            written.weight[-16:] = 0
        assert (qzeros == 0x77777777).all()
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        assert tensor.scheme == Scheme("int4", 16)
        assert tensor.shape == (rows, columns)

    def test_bytes_are_repacked_not_rounded(self, tmp_path: Path) -> None:
        """Four bits stay the same four bits; eight lose their offset."""
        written = layouts.gptq(8, 32)
        tensor = write_matrix(tmp_path, written).load()
        word = int(written.tensors["qweight"][1].view(np.uint32)[0, 3])
        assert unpack_nibbles(tensor.values, 32)[3, :8].tolist() == [(word >> 4 * i) & 15 for i in range(8)]
        written = layouts.gptq(8, 32, bits=8)
        tensor = write_matrix(tmp_path, written).load()
        word = int(written.tensors["qweight"][1].view(np.uint32)[0, 3])
        assert tensor.values[3, :4].tolist() == [((word >> 8 * i) & 255) - 128 for i in range(4)]


class TestAwq:
    @pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
    def test_group_sizes(self, tmp_path: Path, group_size: int) -> None:
        written = layouts.awq(24, 128, group_size=group_size)
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        assert tensor.scheme == Scheme("int4", 128 if group_size == -1 else group_size, symmetric=False)

    def test_more_rows_than_a_block(self, tmp_path: Path) -> None:
        written = layouts.awq(264, 32)
        assert_exact(write_matrix(tmp_path, written), written)

    @pytest.mark.parametrize(
        "config",
        [
            {"w_bit": 4, "q_group_size": 32, "version": "GEMM"},
            {"bits": 4, "group_size": 32},
            {"bits": 4, "group_size": 32, "checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32"},
            {"bits": 4, "group_size": 32, "zero_point": False, "modules_to_not_convert": None, "backend": "autoawq"},
        ],
    )
    def test_configs(self, tmp_path: Path, config: dict[str, Any]) -> None:
        written = layouts.awq(16, 64)
        written.config = {"quant_method": "awq", **config}
        assert_exact(write_matrix(tmp_path, written), written)


class TestCompressedTensors:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_integers(self, tmp_path: Path, bits: int, symmetric: bool, strategy: str, packed: bool) -> None:
        written = layouts.compressed_integers(20, 96, bits=bits, symmetric=symmetric, strategy=strategy, packed=packed)
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        stored = f"int{bits if packed else 8}"
        groups = 32 if strategy == "group" or stored == "int4" else 0
        assert (tensor.scheme.format, tensor.scheme.group_size, tensor.scheme.symmetric) == (stored, groups, symmetric)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_act_order(self, tmp_path: Path, bits: int, symmetric: bool) -> None:
        written = layouts.compressed_integers(
            20, 128, bits=bits, symmetric=symmetric, act_order=True, scale_dtype="F16"
        )
        assert assert_exact(write_matrix(tmp_path, written), written).scheme.permuted

    def test_an_order_that_was_never_filled(self, tmp_path: Path) -> None:
        written = layouts.compressed_integers(8, 64)
        written.tensors["weight_g_idx"] = ("I32", np.full(64, -1, np.int32))
        assert not assert_exact(write_matrix(tmp_path, written), written).scheme.permuted

    def test_ragged_words(self, tmp_path: Path) -> None:
        """A row whose columns do not fill its last word."""
        written = layouts.compressed_integers(5, 42, strategy="channel", symmetric=False)
        assert written.tensors["weight_packed"][1].shape == (5, 6)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("int4", 0, False)

    @pytest.mark.parametrize("packed", [True, False])
    def test_zero_points_that_a_symmetric_scheme_stores(self, tmp_path: Path, packed: bool) -> None:
        written = layouts.compressed_integers(8, 64, bits=8, packed=packed)
        written.tensors["weight_zero_point"] = ("I8", np.zeros((8, 2), np.int8))
        assert assert_exact(write_matrix(tmp_path, written), written).scheme.symmetric

    @pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
    @pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
    def test_fp8(self, tmp_path: Path, strategy: str, scale_dtype: str) -> None:
        written = layouts.compressed_fp8(40, 128, strategy=strategy, scale_dtype=scale_dtype)
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        assert tensor.scheme == Scheme("fp8", {"group": 32, "block": 64}.get(strategy, 0))

    def test_naive_is_one_of_the_others(self, tmp_path: Path) -> None:
        for i, written in enumerate(
            [layouts.compressed_fp8(16, 64), layouts.compressed_integers(16, 64, bits=8, packed=False)]
        ):
            written.config["format"] = "naive-quantized"
            assert_exact(write_matrix(tmp_path / str(i), written), written)

    def test_groups_of_mixed_precision(self, tmp_path: Path) -> None:
        """A module's name comes before a pattern, a pattern before a class."""
        written = layouts.compressed_integers(16, 64, bits=8, packed=False, strategy="channel")
        fp8 = layouts.compressed_fp8(16, 64).config["config_groups"]["group_0"]
        mine = written.config["config_groups"]["group_0"]
        written.config |= {
            "format": "mixed-precision",
            "config_groups": {
                "a": {**fp8, "targets": ["Linear"], "format": "float-quantized"},
                "b": {**fp8, "targets": ["re:.*mlp.*"], "format": "float-quantized"},
                "c": {**mine, "targets": ["model.layers.0.mlp.up_proj"], "format": "int-quantized"},
            },
        }
        assert_exact(write_matrix(tmp_path, written), written)
        written.config["config_groups"]["c"]["targets"] = ["re:.*up_proj$"]
        written.config["config_groups"]["b"]["targets"] = ["re:.*self_attn"]
        assert_exact(write_matrix(tmp_path, written), written)

    def test_an_ignored_module(self, tmp_path: Path) -> None:
        written = layouts.compressed_integers(16, 64)
        written.config["ignore"] = ["lm_head", "re:.*mlp.up_proj"]
        text = refusal(lambda: write_matrix(tmp_path, written))
        assert "model.layers.0.mlp.up_proj is stored quantized (weight_packed, weight_scale, weight_shape)" in text
        assert "the compressed-tensors config leaves that module as it was" in text

    def test_old_configs(self, tmp_path: Path) -> None:
        """No method and no strategy, under the key of old versions, a block as text."""
        written = layouts.compressed_fp8(16, 64, strategy="block")
        written.config["config_groups"]["group_0"]["weights"]["block_structure"] = "16x64"
        del written.config["quant_method"]
        assert_exact(write_matrix(tmp_path / "a", written), written)
        written = layouts.compressed_integers(16, 64)
        written.config["config_groups"]["group_0"]["weights"]["strategy"] = None
        assert_exact(write_matrix(tmp_path / "b", written), written)
        written = layouts.compressed_integers(16, 64, strategy="channel")
        written.config["config_groups"]["group_0"]["weights"] |= {"strategy": None, "group_size": -1}
        assert_exact(write_matrix(tmp_path / "c", written), written)


class TestFp8:
    @pytest.mark.parametrize("shape", [(256, 256), (200, 384), (64, 128), (129, 128)])
    @pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
    def test_blocks(self, tmp_path: Path, shape: tuple[int, int], scale_dtype: str) -> None:
        written = layouts.fp8(*shape, scale_dtype=scale_dtype)
        tensor = assert_exact(write_matrix(tmp_path, written), written)
        assert tensor.scheme == Scheme("fp8", 0 if shape[1] == 128 else 128)

    @pytest.mark.parametrize(
        ("columns", "block", "group_size"),
        [(192, (128, 128), 64), (176, (128, 128), 16), (96, (128, 128), 0), (1024, (64, 512), 256), (96, (1, 32), 32)],
    )
    def test_blocks_that_are_cut_short(
        self, tmp_path: Path, columns: int, block: tuple[int, int], group_size: int
    ) -> None:
        """Columns in smaller groups have the same scales."""
        written = layouts.fp8(40, columns, block=block)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("fp8", group_size)

    @pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (24,), (24, 1)])
    @pytest.mark.parametrize("scale_name", ["weight_scale", "weight_scale_inv"])
    def test_rows_and_whole_matrices(self, tmp_path: Path, scale_shape: tuple[int, ...], scale_name: str) -> None:
        written = layouts.fp8(24, 72, scale_shape=scale_shape, scale_name=scale_name)
        assert assert_exact(write_matrix(tmp_path, written), written).scheme == Scheme("fp8")

    def test_blocks_that_the_config_leaves_out(self, tmp_path: Path) -> None:
        written = layouts.fp8(200, 256)
        del written.config["weight_block_size"]
        assert_exact(write_matrix(tmp_path, written), written)

    def test_no_group_size_fits(self, tmp_path: Path) -> None:
        text = refusal(write_matrix(tmp_path, layouts.fp8(40, 136)).load)
        assert "model.layers.0.mlp.up_proj.weight has a scale for every 128 of its 136 columns" in text


ALL: dict[str, Written] = {
    "gptq": layouts.gptq(16, 64),
    "awq": layouts.awq(16, 64),
    "packed": layouts.compressed_integers(16, 64, symmetric=False),
    "int8": layouts.compressed_integers(16, 64, bits=8, packed=False),
    "compressed-fp8": layouts.compressed_fp8(16, 64),
    "fp8": layouts.fp8(16, 64),
}


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_counted(tmp_path: Path, name: str) -> None:
    matrix = write_matrix(tmp_path, ALL[name])
    assert matrix.nbytes == sum(array.nbytes for _, array in ALL[name].tensors.values())
    assert matrix.shape == (16, 64)
