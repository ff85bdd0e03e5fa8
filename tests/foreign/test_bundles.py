"""Bundles of quantized checkpoints: the numbers are taken over, and give the logits of the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import UnsupportedModelError
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.row_reader import CheckpointRows, StoredRows
from qwen_rt.runtime.session import CpuSession
from qwen_rt.tensor_data import read_tensor
from qwen_rt.tolerances import KV_LOGITS_MIN_COSINE, KV_LOGITS_RELATIVE

from ..cases import all_at_once
from ..compare import assert_close
from ..export.paged import PagedModel
from . import layouts
from .kit import write_checkpoint
from .test_reference_libraries import FIXTURES, MODELS

RELATIVE = 1e-4
"""float32 sums in another order, as `tolerances.PARITY_RELATIVE_FP32`; ten times as tight as users are promised."""

CUDA = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 128}
"""A shape that the CUDA kernels take."""

Writer = Callable[[int, int], layouts.Written]
WRITERS: dict[str, Writer] = {
    "gptq-int4": lambda n, k: layouts.gptq(n, k),
    "gptq-int4-sym-g16": lambda n, k: layouts.gptq(n, k, group_size=16, sym=True),
    "gptq-int4-row": lambda n, k: layouts.gptq(n, k, group_size=-1),
    "gptq-int4-act-order": lambda n, k: layouts.gptq(n, k, act_order=True),
    "gptq-int8": lambda n, k: layouts.gptq(n, k, bits=8),
    "gptq-int8-act-order-v2": lambda n, k: layouts.gptq(n, k, bits=8, act_order=True, version="gptq_v2"),
    "awq": lambda n, k: layouts.awq(n, k),
    "compressed-int4": lambda n, k: layouts.compressed_integers(n, k),
    "compressed-fp8": lambda n, k: layouts.compressed_fp8(n, k),
    "fp8": lambda n, k: layouts.fp8(n, k),
}


def reference(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of transformers with the dequantized weights, float32[S, V]."""
    checkpoint = Checkpoint.open(folder)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**config, attn_implementation="eager")).float().eval()
    with CheckpointRows(checkpoint) as rows:
        state = {n: torch.from_numpy(rows.rows(n, 0, s[0])) for n, s in checkpoint.spec.parameters().items()}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def built(source: Path, out: Path, **options: Any) -> Bundle:
    build(source, out, BuildOptions(quiet=True, **options))
    return Bundle.open(out, "full")


def assert_same_numbers(source: Path, bundle: Bundle) -> None:
    """Every quantized matrix of the checkpoint lies in the bundle, number by number."""
    checkpoint, quantization = Checkpoint.open(source), bundle.manifest.quantization
    assert quantization is not None
    assert quantization.method == "checkpoint"
    assert quantization.weights == {name: matrix.scheme for name, matrix in checkpoint.quantized.items()}
    with StoredRows(bundle.tensors(), quantization.weights) as stored:
        for name, matrix in checkpoint.quantized.items():
            wanted = dequantize(matrix.load())
            np.testing.assert_array_equal(stored.rows(name, 0, len(wanted)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_gptqmodel_wrote(name: str, tmp_path: Path) -> None:
    bundle = built(FIXTURES / name, tmp_path / "out")
    assert_same_numbers(FIXTURES / name, bundle)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    ids, logits = expected["ids"][0].numpy(), expected["logits"][0].float().numpy()
    found = all_at_once(CpuSession(bundle, 1), ids)
    assert_close(found, reference(FIXTURES / name, ids), relative=RELATIVE)
    assert_close(found, logits, relative=1e-3, cosine=0.99999)  # in the library's own arithmetic


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    """On the CPU through ONNX Runtime, and the graph of target cuda through the references of its ops."""
    source = tmp_path / "checkpoint"
    write_checkpoint(source, lambda parameter, n, k: None if "head" in parameter else WRITERS[name](n, k), CUDA)
    ids = np.array([3, 0, 39, 7, 7, 12, 30, 1])
    wanted = reference(source, ids)
    cpu = built(source, tmp_path / "cpu")
    assert_same_numbers(source, cpu)
    assert_close(all_at_once(CpuSession(cpu, 1), ids), wanted, relative=RELATIVE)

    cuda = built(source, tmp_path / "cuda", target="cuda", self_contained=True)
    assert_same_numbers(source, cuda)
    graph = ir.serde.deserialize_model(onnx.load(str(cuda.graph_file), load_external_data=False))
    paged = PagedModel(graph, cuda.graph_file.parent, cuda.manifest.model, 64)
    found = np.concatenate([paged.call([(0, ids[i : i + 1])]) for i in range(len(ids))])
    # What is not quantized is float16 in the checkpoint and bfloat16 here.
    assert_close(found, wanted, relative=3e-2, cosine=0.999)


def test_dequantized_and_quantized_anew(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    write_checkpoint(source, lambda _, n, k: layouts.gptq(n, k, act_order=True), CUDA)
    ids = np.array([3, 0, 39, 7])
    floats = built(source, tmp_path / "floats", precision="fp32")
    assert floats.manifest.quantization is None
    assert_close(all_at_once(CpuSession(floats, 1), ids), reference(source, ids), relative=RELATIVE)
    anew = built(source, tmp_path / "anew", precision="int8")
    assert anew.manifest.quantization is not None
    assert set(anew.manifest.quantization.weights.values()) == {Scheme("int8")}
    assert anew.manifest.quantization.method == "rtn"


def test_a_calibration_of_the_cache_leaves_stored_numbers_and_norms_alone(tmp_path: Path) -> None:
    """A text shows which offsets a cache needs; factors for matrices that are not rounded anew would break them."""
    source, text = tmp_path / "checkpoint", tmp_path / "text.txt"
    write_checkpoint(source, lambda _, n, k: layouts.gptq(n, k, bits=8, group_size=-1), CUDA | {"vocab_size": 1152})
    shutil.copy(Checkpoint.open("nano").path / "tokenizer.json", source)
    text.write_text("What is 12 + 30? 12+30=42. The answer is \\boxed{42}.\n" * 20)
    bundle = built(source, tmp_path / "out", quantize=QuantizeOptions(calibrate=text, kv_cache="int8"))
    assert_same_numbers(source, bundle)
    kept = Checkpoint.open(source).tensors
    tensors = bundle.tensors()
    for name in (name for name in kept if name.endswith("norm.weight")):
        np.testing.assert_array_equal(read_tensor(tensors[name]), read_tensor(kept[name]))
    ids = np.array([3, 0, 39, 7, 7, 12, 30, 1])
    found, limits = all_at_once(CpuSession(bundle, 1), ids), (KV_LOGITS_RELATIVE["int8"], KV_LOGITS_MIN_COSINE["int8"])
    assert_close(found, reference(source, ids), relative=limits[0], cosine=limits[1])
    assert bundle.manifest.quantization is not None
    assert set(bundle.manifest.quantization.report) == {"calibration", "kv_cache"}


def test_columns_in_several_orders(tmp_path: Path) -> None:
    """A kernel reads its input in one order; the CPU permutes it for each matrix."""
    source = tmp_path / "checkpoint"

    def write(name: str, n: int, k: int) -> layouts.Written | None:
        return None if "head" in name else layouts.gptq(n, k, act_order=True, seed=len(name))

    write_checkpoint(source, write, CUDA)
    ids = np.array([3, 0, 39, 7])
    cpu = built(source, tmp_path / "cpu")
    assert_close(all_at_once(CpuSession(cpu, 1), ids), reference(source, ids), relative=RELATIVE)
    with pytest.raises(UnsupportedModelError, match=r"gate_proj.weight and .*up_proj.weight are ordered differently"):
        built(source, tmp_path / "cuda", target="cuda")
