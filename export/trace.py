"""Trace one decoder layer, with the embedding before and the head after it, without loading a weight.

`torch.onnx.export` runs under `FakeTensorMode`: tensors have shapes and dtypes but no storage, so a 72B-sized layer
traces in seconds and a few hundred MB. The result is an `onnx_ir` model of one layer whose nodes are named after
Hugging Face module paths (`/model/layers.0/self_attn/q_proj/MatMul`), ready for `stamp`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_rt import tensors
from qwen_rt.export.modeling import OPSET, Qwen2ForCausalLM
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.spec import ModelSpec

__all__ = ["IR_VERSION", "TORCH_DTYPES", "trace_single_layer"]

IR_VERSION = 11
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SCOPES = "pkg.torch.onnx.name_scopes"


def trace_single_layer(spec: ModelSpec, dtype: str) -> ir.Model:
    """Trace a model of one decoder layer.

    Args:
        spec: The model's hyperparameters; `num_layers` is not looked at.
        dtype: `float32`, `bfloat16` or `float16`: dtype of weights, activations and cache.

    Returns:
        A model at opset 24 with the inputs and outputs of `qwen_rt.tensors` for layer 0. Initializers are named after
        Hugging Face tensors and carry a dtype and a shape but no data.
    """
    with FakeTensorMode(), _default_dtype(TORCH_DTYPES[dtype]):
        module = Qwen2ForCausalLM(spec).eval()
        batch, tokens, capacity = 2, 3, 16  # sizes of the example; all three axes stay dynamic
        # Every argument is a tensor of its own: torch would take one object passed twice for one input.
        caches = [torch.zeros(batch, spec.num_kv_heads, capacity, spec.head_dim) for _ in range(2)]
        indices = [torch.zeros(batch, dtype=torch.int64) for _ in range(3)]
        example = (torch.zeros(batch, tokens, dtype=torch.int64), *caches, *indices)
        batch_dim, tokens_dim, capacity_dim = torch.export.Dim("B"), torch.export.Dim("S"), torch.export.Dim("Tmax")
        rows, cache_dims = {0: batch_dim}, {0: batch_dim, 2: capacity_dim}
        with _quiet():
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                dynamic_shapes=({0: batch_dim, 1: tokens_dim}, cache_dims, cache_dims, rows, rows, rows),
                input_names=[
                    tensors.INPUT_IDS,
                    tensors.past_key(0),
                    tensors.past_value(0),
                    tensors.WRITE_INDICES,
                    tensors.KV_LENGTHS,
                    tensors.LOGITS_INDICES,
                ],
                output_names=[tensors.LOGITS, tensors.present_key(0), tensors.present_value(0)],
            )
    assert program is not None  # dynamo=True always returns a program
    model = program.model
    for weight in list(model.graph.initializers.values()):
        weight.const_value = None  # fake storage: nothing may read it
    _simplify(model)
    _tie_head(model, spec)
    _rename(model)
    _strip_metadata(model)
    model.ir_version = IR_VERSION
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes about packages that we do not use and axis names that share a symbol."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _simplify(model: ir.Model) -> None:
    """Shared constants become shared initializers; nodes without effect go away. No weight is read."""
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    for name in weights:  # hidden from the passes, which would look into them
        model.graph.initializers.pop(name)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    IdentityEliminationPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    for name, value in weights.items():
        if value.uses():
            model.graph.initializers[name] = value


def _tie_head(model: ir.Model, spec: ModelSpec) -> None:
    """With tied embeddings the head multiplies by the embedding itself, as the checkpoint stores it once."""
    if spec.tie_word_embeddings:
        head = model.graph.initializers.pop(HEAD)
        head.replace_all_uses_with(model.graph.initializers[EMBEDDING])


def _module_path(node: ir.Node) -> str:
    """`/model/layers.0/self_attn/q_proj` from the module scopes that torch records (`…self_attn.q_proj`)."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    modules = [s for s in scopes[:-1] if s and not s.startswith("_")]
    path = modules[-1] if modules else "model"
    return "/" + re.sub(r"\.(?!\d)", "/", path)


def _rename(model: ir.Model) -> None:
    """Name nodes after their module and operator, values after the node that makes them, constants after their user."""
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    seen: Counter[str] = Counter()
    constants: Counter[str] = Counter()
    for node in model.graph:
        path = _module_path(node)
        stem = f"{path}/{node.op_type}"
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem] - 1}"
        for index, output in enumerate(node.outputs):
            if output.name not in fixed:
                output.name = f"{node.name}/output_{index}"
        for value in node.inputs:
            if value is not None and value.const_value is not None and not str(value.name).startswith("/"):
                constants[path] += 1
                del model.graph.initializers[str(value.name)]
                value.name = f"{path}/constant_{constants[path] - 1}"
                model.graph.initializers[value.name] = value


def _strip_metadata(model: ir.Model) -> None:
    """Drop what torch notes about itself: source lines of this machine have no place in an artefact."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "qwen2"
    model.producer_name, model.producer_version, model.doc_string = "qwen-rt", None, None
    model.functions.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.meta.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            output.meta.clear()
