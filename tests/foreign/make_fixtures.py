r"""Write `fixtures/` anew: checkpoints that the reference libraries wrote, with what those libraries make of them.

    python -m venv build/foreign                       # an environment of its own: torch and transformers as in .venv
    build/foreign/bin/pip install torch==2.13.0 transformers==5.23.0 compressed-tensors==0.12.2
    build/foreign/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9 auto-gptq==0.7.1
    build/foreign/bin/pip install --no-deps accelerate threadpoolctl datasets torchao dill multiprocess xxhash pandas \
        pyarrow pypcre logbar tokenicer defuser device-smi
    build/foreign/bin/pip download --no-deps --no-build-isolation gptqmodel==7.7.0 && tar xf gptqmodel-7.7.0.tar.gz
    export GPTQMODEL_CPU_WORKERS=2 PYTHONPATH=gptqmodel-7.7.0
    build/foreign/bin/python tests/foreign/make_fixtures.py [NAME ...]

None of these needs a GPU; GPTQModel runs from its source archive, without the kernels that its build compiles. Each
fixture is a folder: a checkpoint (`config.json`, `model.safetensors`) and `expected.safetensors` with every quantized
matrix as the library dequantizes it, in its dtype, and for whole models also `ids` and `logits`, by the library's own
forward pass with float32 scales. `made_with.json` names the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

FIXTURES = Path(__file__).resolve().parent / "fixtures"
VOCAB = 64
FFN = 80  # the rest are zeros, as in the 29696 = 29568 + 128 of the quantized 72B releases


def tiny_model(folder: Path, kv_heads: int, padded_ffn: int) -> Path:
    """A Qwen2 of one layer whose MLP is padded with zeros, and a tokenizer of words."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        intermediate_size=padded_ffn,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        use_sliding_window=False,
    )
    model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.5 if name.endswith("bias") else weight.shape[-1] ** -0.5)
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight[FFN:] = 0
        mlp.up_proj.weight[FFN:] = 0
        mlp.down_proj.weight[:, FFN:] = 0
    model.half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w0", unk_token="w0").save_pretrained(
        folder
    )
    return folder


def keep(name: str, checkpoint: Path, expected: dict[str, torch.Tensor], packages: tuple[str, ...]) -> None:
    """Put a fixture in its place."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(checkpoint / "model.safetensors", folder)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / "expected.safetensors")
    versions = {package: importlib.metadata.version(package) for package in (*packages, "torch", "transformers")}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


def by_gptqmodel(name: str, kv_heads: int = 1, padded_ffn: int = 96, **options: Any) -> None:
    """Quantize the tiny model with GPTQModel, load it again on the CPU, and take its weights and logits."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    with tempfile.TemporaryDirectory() as temporary:
        source, out = tiny_model(Path(temporary, "source"), kv_heads, padded_ffn), Path(temporary, "out")
        torch.manual_seed(1)
        samples = [
            {"input_ids": torch.randint(2, VOCAB, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(16)
        ]
        model = GPTQModel.load(str(source), QuantizeConfig(**options), dtype=torch.float16)
        model.quantize(samples, batch_size=1)
        model.save(str(out))
        backend = BACKEND.AWQ_TORCH if options.get("quant_method") == "awq" else BACKEND.GPTQ_TORCH
        loaded = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16).model
        expected = {}
        for module_name, module in loaded.named_modules():
            if hasattr(module, "qweight"):
                expected[f"{module_name}.weight"] = dequantized(module)
        ids = torch.arange(2, 26)[None] * 7 % VOCAB
        loaded.float()
        for module_name, module in list(loaded.named_modules()):
            if hasattr(module, "qweight"):
                module.scales = module.scales.float()
                if options.get("quant_method") == "awq":  # its forward pass refuses float32
                    linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
                    linear.weight.data = dequantized(module)
                    if module.bias is not None:
                        linear.bias.data = module.bias.float()
                    loaded.set_submodule(module_name, linear)
        with torch.no_grad():
            expected["logits"] = loaded(ids).logits
        expected["ids"] = ids
        keep(name, out, expected, ("gptqmodel",))


def dequantized(module: Any) -> torch.Tensor:
    """A matrix [N, K] as a module of GPTQModel dequantizes it."""
    if hasattr(module, "dequantize_weight"):
        weight: torch.Tensor = module.dequantize_weight().T
        return weight
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).T


def linear_of(rows: int, columns: int, seed: int) -> torch.nn.Linear:
    """A layer of float16 numbers whose columns differ in size."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = (torch.randn(rows, columns) * torch.rand(columns) * 0.1).half().float()
    return linear


def asymmetric(weight: torch.Tensor, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [N, G] of groups of columns, from their least and largest."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        scale = ((high - low) / (2**bits - 1)).half().float()
        scales.append(scale)
        zeros.append(torch.round(-low / scale).clamp(1, 2**bits - 1))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def write_linear(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """The tensors of a lone layer, under the name of one of a Qwen2, and the config that belongs to them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    prefix = "model.layers.0.mlp.up_proj."
    save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


NAME = "model.layers.0.mlp.up_proj.weight"


def by_autogptq(name: str, bits: int, group_size: int) -> None:
    """Pack a layer with AutoGPTQ's plain kernel, and multiply the identity by it."""
    for part in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        # The packages themselves import what transformers 5 no longer has; the layer does not.
        if part not in sys.modules:
            stub = types.ModuleType(part)
            root = Path(importlib.metadata.distribution("auto-gptq").locate_file("auto_gptq"))
            stub.__path__ = [str(root.joinpath(*part.split(".")[1:]))]
            sys.modules[part] = stub
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    rows, columns = 32, 256
    linear = linear_of(rows, columns, bits)
    width = columns if group_size == -1 else group_size
    scales, zeros = asymmetric(linear.weight.data, torch.arange(columns) // width, bits)
    layer: Any = QuantLinear(bits, group_size, columns, rows, bias=False, weight_dtype=torch.float16)
    layer.pack(linear, scales, zeros.clone(), None)
    layer.scales = scales.T.contiguous().half()
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
    layer.scales = layer.scales.float()
    with torch.no_grad():
        weight = layer(torch.eye(columns)).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False}
    with tempfile.TemporaryDirectory() as temporary:
        keep(name, write_linear(Path(temporary), config, tensors), {NAME: weight}, ("auto-gptq",))


def by_autoawq(name: str, group_size: int) -> None:
    """Pack a layer with AutoAWQ, and dequantize it with AutoAWQ."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    rows, columns = 32, 256
    linear = linear_of(rows, columns, 3)
    width = columns if group_size == -1 else group_size
    scales, zeros = asymmetric(linear.weight.data, torch.arange(columns) // width, 4)
    layer = WQLinear_GEMM.from_linear(linear, 4, width, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, width).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    with tempfile.TemporaryDirectory() as temporary:
        keep(name, write_linear(Path(temporary), config, tensors), {NAME: weight}, ("autoawq",))


def by_compressed_tensors_with_order(name: str, bits: int) -> None:
    """Pack a layer with an act-order, as compressed-tensors did before it gave them up."""
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    rows, columns, group_size = 32, 256, 32
    linear = linear_of(rows, columns, 10 + bits)
    g_idx = (torch.randperm(columns) // group_size).to(torch.int32)
    scales, zeros = asymmetric(linear.weight.data, g_idx, bits)
    points = (zeros - 2 ** (bits - 1)).to(torch.int8)
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=group_size, actorder="group")
    values = quantize(linear.weight.data, scales, points, args, dtype=torch.int8, g_idx=g_idx)
    weight = dequantize(values, scales, points, args, g_idx=g_idx)
    packed = PackedQuantizationCompressor().compress_weight(
        linear.weight.data, scales, args, zero_point=points, g_idx=g_idx
    )
    tensors = {**packed, "weight_scale": scales}
    tensors.setdefault("weight_g_idx", g_idx)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
        "ignore": ["lm_head"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        keep(name, write_linear(Path(temporary), config, tensors), {NAME: weight}, ("compressed-tensors",))


CASES: dict[str, Callable[[str], None]] = {
    "gptqmodel-int4-act-order": lambda name: by_gptqmodel(name, bits=4, group_size=32, desc_act=True, sym=True),
    "gptqmodel-int4-asym": lambda name: by_gptqmodel(name, bits=4, group_size=16, desc_act=False, sym=False),
    "gptqmodel-int8-v2": lambda name: by_gptqmodel(
        name, bits=8, group_size=-1, desc_act=False, sym=False, format="gptq_v2", act_group_aware=False
    ),
    "gptqmodel-awq": lambda name: by_gptqmodel(
        name, kv_heads=2, padded_ffn=128, bits=4, group_size=32, quant_method="awq", format="gemm"
    ),
    "autogptq-int4": lambda name: by_autogptq(name, 4, 64),
    "autogptq-int8": lambda name: by_autogptq(name, 8, -1),
    "autoawq-g64": lambda name: by_autoawq(name, 64),
    "autoawq-row": lambda name: by_autoawq(name, -1),
    "compressed-tensors-int4-act-order": lambda name: by_compressed_tensors_with_order(name, 4),
    "compressed-tensors-int8-act-order": lambda name: by_compressed_tensors_with_order(name, 8),
}


def main(names: list[str]) -> None:
    """Make the named fixtures, or all."""
    for name in names or list(CASES):
        CASES[name](name)
        print(name, sum(file.stat().st_size for file in (FIXTURES / name).iterdir()), "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
