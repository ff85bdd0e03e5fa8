"""What the reference libraries write and read: the same weights, bit for bit, and the same logits.

compressed-tensors and transformers are asked live; what GPTQModel, AutoGPTQ, AutoAWQ and an older compressed-tensors
made lies in `fixtures/`, written by `make_fixtures.py`. A library multiplies in the dtype of its scales: what is read
here has to round to that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.foreign import find_matrices, read_quantization
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize
from qwen_rt.row_reader import CheckpointRows
from qwen_rt.safetensors_header import read_header

from .kit import MODULE, NAME

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ["gptqmodel-int4-act-order", "gptqmodel-int4-asym", "gptqmodel-int8-v2", "gptqmodel-awq"]
LINEARS = {
    "autogptq-int4": Scheme("int4", 64, False),
    "autogptq-int8": Scheme("int8", 0, False),
    "autoawq-g64": Scheme("int4", 64, False),
    "autoawq-row": Scheme("int4", 128, False),
    "compressed-tensors-int4-act-order": Scheme("int4", 32, False, True),
    "compressed-tensors-int8-act-order": Scheme("int8", 32, False, True),
}
LOGIT_TOLERANCE = 1e-5  # float32 sums of a hundred terms in another order


def load_matrix(folder: Path, shape: tuple[int, int]) -> QuantizedTensor:
    quantization = read_quantization(json.loads((folder / "config.json").read_text()))
    assert quantization is not None
    stored = read_header(folder / "model.safetensors").tensors
    matrix = find_matrices(quantization, {NAME: shape}, stored)[NAME]
    tensor = matrix.load()
    assert matrix.scheme == tensor.scheme
    return tensor


def assert_rounds_to(found: NDArray[np.float32], theirs: torch.Tensor) -> None:
    rounded = torch.from_numpy(found).to(theirs.dtype)
    assert torch.equal(rounded, theirs), f"{(rounded.float() - theirs.float()).abs().max()}"


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' Qwen2 in float32 with the weights that are read here."""
    checkpoint = Checkpoint.open(folder)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**config, attn_implementation="eager")).float()
    with CheckpointRows(checkpoint) as rows:
        state = {
            name: torch.from_numpy(rows.rows(name, 0, shape[0])) for name, shape in checkpoint.spec.parameters().items()
        }
    model.load_state_dict(state)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


@pytest.mark.parametrize("name", LINEARS)
def test_layers_of_fixtures(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")[NAME]
    tensor = load_matrix(FIXTURES / name, (expected.shape[0], expected.shape[1]))
    assert tensor.scheme == LINEARS[name]
    assert_rounds_to(dequantize(tensor), expected)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_fixtures(name: str) -> None:
    """A Qwen2 that GPTQModel quantized, its MLP padded with zeros as in the 72B releases."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    ids, logits = expected.pop("ids"), expected.pop("logits")
    checkpoint = Checkpoint.open(FIXTURES / name)
    assert checkpoint.quantized.keys() == expected.keys()
    assert checkpoint.unexpected == ()
    with CheckpointRows(checkpoint) as rows:
        for weight_name, theirs in expected.items():
            found = rows.rows(weight_name, 0, theirs.shape[0])
            assert_rounds_to(found, theirs)
            if weight_name.endswith("down_proj.weight"):
                # The zeros that pad the MLP stay zeros, whatever GPTQ did to the columns before them.
                assert not found[:, 80:].any()
                assert found[:, :80].any(axis=0).all()
    ours = logits_of(FIXTURES / name, ids)
    assert float((ours - logits).abs().max() / logits.abs().max()) < LOGIT_TOLERANCE


def test_fixtures_show_what_they_are_for() -> None:
    schemes = {
        name: {matrix.scheme for matrix in Checkpoint.open(FIXTURES / name).quantized.values()} for name in MODELS
    }
    assert any(scheme.permuted for scheme in schemes["gptqmodel-int4-act-order"])
    assert all(scheme.symmetric and scheme.group_size == 32 for scheme in schemes["gptqmodel-int4-act-order"])
    assert Scheme("int4", 16, symmetric=False) in schemes["gptqmodel-int4-asym"]
    assert all(scheme.format == "int8" and scheme.group_size == 0 for scheme in schemes["gptqmodel-int8-v2"])


def qparams(weight: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points from the least and largest numbers, in the shapes of compressed-tensors."""
    rows, columns = weight.shape
    if args.strategy == "block":
        height, width = args.block_structure or (1, 1)
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        parts = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
    elif args.strategy == "group":
        parts = weight.unflatten(1, (-1, args.group_size or 1))
    else:
        parts = weight[:, None] if args.strategy == "channel" else weight.reshape(1, 1, -1)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    half = 2.0 ** (args.num_bits - 1)
    if args.type == "float" or args.symmetric:
        scale = (torch.maximum(-low, high) / (448 if args.type == "float" else half - 0.5)).to(dtype)
        zero = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (2 * half - 1)).to(dtype)
        zero = (torch.round(-low / scale.float()) - half).clamp(-half, half - 1)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return scale, zero.to(torch.int8)


def compressed(folder: Path, format_: str, args: QuantizationArgs, dtype: torch.dtype) -> torch.Tensor:
    """Compress a layer with the library, store it, and return what the library makes of it again."""
    torch.manual_seed(3)
    weight = torch.randn(40, 192) * torch.rand(192) * 0.2
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format_)
    scale, zero = qparams(weight, args, dtype)
    state = {"weight": weight.to(dtype), "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    packed = compressor.compress(state, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({f"{MODULE}.{key}": value.contiguous() for key, value in packed.items()}, folder / "model.safetensors")
    theirs: torch.Tensor = compressor.decompress(packed, scheme)["weight"]
    return theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("format_", "args"),
    [
        *(
            (format_, {"num_bits": bits, "symmetric": symmetric, **strategy})
            for format_, bits in (("pack-quantized", 4), ("pack-quantized", 8), ("int-quantized", 8))
            for symmetric in (True, False)
            for strategy in ({"strategy": "group", "group_size": 32}, {"strategy": "channel"})
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "actorder": "weight"}),
        *(
            ("float-quantized", {"num_bits": 8, "type": "float", **strategy})
            for strategy in (
                {"strategy": "tensor"},
                {"strategy": "channel"},
                {"strategy": "group", "group_size": 64},
                {"strategy": "block", "block_structure": [16, 64]},
                {"strategy": "block", "block_structure": [128, 128]},
            )
        ),
    ],
)
def test_compressed_tensors(tmp_path: Path, format_: str, args: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = compressed(tmp_path, format_, QuantizationArgs(**args), dtype)
    found = dequantize(load_matrix(tmp_path, (40, 192)))
    if args["num_bits"] == 4 and dtype == torch.float32:
        # int4 has float16 scales here: rounded once.
        np.testing.assert_allclose(found, theirs.numpy(), rtol=2.0**-11)
    else:
        assert_rounds_to(found, theirs)


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ],
)
def test_a_whole_checkpoint_that_transformers_reads(tmp_path: Path, format_: str, options: dict[str, Any]) -> None:
    """transformers loads a compressed checkpoint by way of compressed-tensors; the logits are the same."""
    torch.manual_seed(5)
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=40,
        bos_token_id=0,
        eos_token_id=0,
        use_sliding_window=False,
    )
    model: Any = Qwen2ForCausalLM(config).float()
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format_)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        scale, _ = qparams(weight, args, torch.float16)
        state = {"weight": weight, "weight_scale": scale.float()}
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{key}": value for key, value in compressor.compress(state, scheme).items()}
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "float32",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": format_,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**json.loads(scheme.model_dump_json()), "format": format_}},
            "ignore": ["lm_head"],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "model.safetensors")
    theirs: Any = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.arange(24)[None] * 5 % 40
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = logits_of(tmp_path, ids)
    assert float((ours - expected).abs().max() / expected.abs().max()) < LOGIT_TOLERANCE
    with torch.no_grad():
        unquantized = model.eval()(ids).logits
    assert float((unquantized - expected).abs().max() / expected.abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "grid"), [((256, 384), (2, 3)), ((384, 128), (3, 1)), ((64, 256), (1, 2)), ((64, 96), ())]
)
def test_fp8_of_transformers(tmp_path: Path, shape: tuple[int, int], grid: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    weight = torch.randn(shape).clamp(-400, 400).to(torch.float8_e4m3fn)
    scale = (torch.rand(grid) * 0.01 + 1e-4).to(dtype)
    save_file({f"{MODULE}.weight": weight, f"{MODULE}.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128] if grid else None,
        "modules_to_not_convert": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale)
    assert_rounds_to(dequantize(load_matrix(tmp_path, shape)), theirs)
