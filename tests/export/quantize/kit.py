"""Quantized weight files of a checkpoint, and the same model with the matrices that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.portable import QuantizedLocation, WeightLocation
from qwen_rt.export.quantize.pieces import quantized_piece, stored_piece
from qwen_rt.export.weights import Piece, float_piece, plan_files, write_weight_file
from qwen_rt.quantization import QuantizedTensor, Scheme, part_name
from qwen_rt.row_reader import CheckpointRows, StoredRows
from qwen_rt.safetensors_header import read_header
from qwen_rt.spec import ModelSpec

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def all_matrices(spec: ModelSpec) -> list[str]:
    return [f"model.layers.{i}.{name}.weight" for i in range(spec.num_layers) for name in MATRICES]


@dataclass
class Quantized:
    """Files of a quantized model: all parameters in one folder."""

    checkpoint: Checkpoint
    folder: Path
    locations: dict[str, WeightLocation]
    places: dict[str, QuantizedLocation]
    rows: StoredRows

    def state(self) -> dict[str, torch.Tensor]:
        """transformers' state dict with what the stored numbers stand for."""
        spec = self.checkpoint.spec
        found = {}
        for name, shape in spec.parameters().items():
            found[name] = torch.from_numpy(self.rows.rows(name, 0, shape[0]))
        return found


def permuted(tensor: QuantizedTensor, seed: int) -> QuantizedTensor:
    """The same stored numbers, said to belong to other columns."""
    perm = np.random.default_rng(seed).permutation(tensor.shape[1]).astype(np.int32)
    scheme = Scheme(tensor.scheme.format, tensor.scheme.group_size, tensor.scheme.symmetric, permuted=True)
    return QuantizedTensor(tensor.name, scheme, tensor.shape, tensor.values, tensor.scale, tensor.zero_point, perm)


def write_quantized(
    path: Path, schemes: Mapping[str, Scheme], folder: Path, float_dtype: str | None = None
) -> Quantized:
    """Quantize a checkpoint's matrices into `folder`; permuted schemes get columns in a random order."""
    checkpoint = Checkpoint.open(path)
    rows, shapes = CheckpointRows(checkpoint), checkpoint.spec.parameters()
    pieces: list[Piece] = []
    for name in [*shapes, *(name for name in schemes if name not in shapes)]:
        source = EMBEDDING if name not in shapes else name
        if name not in schemes:
            pieces.append(float_piece(rows, name, float_dtype or checkpoint.tensors[name].dtype))
        elif schemes[name].permuted:
            pieces.append(_permuted_piece(rows, name, schemes[name], shapes[source]))
        else:
            pieces.append(quantized_piece(rows, source, schemes[name], stored_name=name))
    folder.mkdir(parents=True)
    locations: dict[str, WeightLocation] = {}
    refs = {}
    with ThreadPoolExecutor(2) as pool:
        for plan in plan_files(pieces, folder):
            write_weight_file(plan, folder / plan.name, pool)
            locations.update(plan.locations)
            refs.update(read_header(folder / plan.name).tensors)
    places = {}
    for name, scheme in schemes.items():
        shape = shapes[EMBEDDING if name not in shapes else name]
        places[name] = QuantizedLocation(
            scheme, shape, {part: locations[part_name(name, part)] for part in scheme.parts(shape)}
        )
    return Quantized(checkpoint, folder, locations, places, StoredRows(refs, schemes))


def _permuted_piece(rows: CheckpointRows, name: str, scheme: Scheme, shape: tuple[int, ...]) -> Piece:
    from qwen_rt.export.quantize.rounding import quantize_rows

    unit = name.replace("q_proj", "qkv").replace("k_proj", "qkv").replace("v_proj", "qkv")
    seed = sum(unit.replace("gate_proj", "gu").replace("up_proj", "gu").encode())  # one order for a unit

    def load() -> QuantizedTensor:
        plain = Scheme(scheme.format, scheme.group_size, scheme.symmetric)
        return permuted(quantize_rows(name, rows.rows(name, 0, shape[0]), plain), seed)

    return stored_piece(name, scheme, shape, load)


def reference_of(model: Any, quantized: Quantized, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of transformers with the dequantized weights, float32[S, V]; `model` gets its own back."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    is_tied = quantized.checkpoint.spec.tie_word_embeddings
    head = model.lm_head.weight
    try:
        model.load_state_dict(quantized.state(), strict=False)
        if is_tied and HEAD in quantized.places:
            shape = quantized.checkpoint.spec.parameters()[EMBEDDING]
            model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(quantized.rows.rows(HEAD, 0, shape[0])))
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return logits
    finally:
        model.lm_head.weight = head
        model.load_state_dict(kept)


def run_cpu(model: ir.Model, quantized: Quantized, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of every position through ONNX Runtime and a shared cache, token by token: float32[S, V]."""
    spec = quantized.checkpoint.spec
    path = quantized.folder / "model.onnx"
    onnx.save(ir.serde.serialize_model(model), path)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = (1, spec.num_kv_heads, len(ids), spec.head_dim)
    binding = session.io_binding()
    for layer in range(spec.num_layers):
        for past, present in (
            (tensors.past_key(layer), tensors.present_key(layer)),
            (tensors.past_value(layer), tensors.present_value(layer)),
        ):
            shared = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(past, shared)
            binding.bind_ortvalue_output(present, shared)
    logits = np.empty((1, spec.vocab_size), np.float32)
    binding.bind_ortvalue_output(tensors.LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
    found = []
    for position, token in enumerate(ids):
        binding.bind_cpu_input(tensors.INPUT_IDS, np.array([[token]]))
        binding.bind_cpu_input(tensors.WRITE_INDICES, np.array([position]))
        binding.bind_cpu_input(tensors.KV_LENGTHS, np.array([position + 1]))
        binding.bind_cpu_input(tensors.LOGITS_INDICES, np.array([0]))
        session.run_with_iobinding(binding)
        found.append(logits[0].copy())
    return np.stack(found)
