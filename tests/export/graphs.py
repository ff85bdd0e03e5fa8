"""Running a graph outside of the package's own session: ONNX Runtime and onnx's reference evaluator, same feeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.spec import ModelSpec

Feeds = dict[str, NDArray[Any]]
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def cache_feeds(spec: ModelSpec, num_rows: int, capacity: int, dtype: str = "float32", seed: int = 0) -> Feeds:
    """Past tensors full of noise: a graph must not care what the unwritten rows hold."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, spec.num_kv_heads, capacity, spec.head_dim)
    names = [name(i) for i in range(spec.num_layers) for name in (tensors.past_key, tensors.past_value)]
    return {name: rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for name in names}


def all_positions(
    spec: ModelSpec, ids: NDArray[np.int64], capacity: int | None = None, dtype: str = "float32"
) -> Feeds:
    """One prefill whose S rows are the same text, each asking for another position's logits."""
    num_tokens = len(ids)
    return {
        tensors.INPUT_IDS: np.tile(ids, (num_tokens, 1)),
        **cache_feeds(spec, num_tokens, capacity or num_tokens + 3, dtype),
        tensors.WRITE_INDICES: np.zeros(num_tokens, np.int64),
        tensors.KV_LENGTHS: np.full(num_tokens, num_tokens, np.int64),
        tensors.LOGITS_INDICES: np.arange(num_tokens),
    }


def ragged_step(spec: ModelSpec, vocab_size: int, starts: list[int], num_tokens: int, capacity: int) -> Feeds:
    """New tokens at other positions in each row, over a cache of noise."""
    rng = np.random.default_rng(3)
    write_indices = np.array(starts, np.int64)
    return {
        tensors.INPUT_IDS: rng.integers(0, vocab_size, (len(starts), num_tokens)),
        **cache_feeds(spec, len(starts), capacity),
        tensors.WRITE_INDICES: write_indices,
        tensors.KV_LENGTHS: write_indices + num_tokens,
        tensors.LOGITS_INDICES: np.arange(len(starts)) % num_tokens,
    }


def ort_session(graph: str | bytes, weights: Path | None = None) -> ort.InferenceSession:
    """A CPU session on a graph whose external data lies in `weights`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if weights is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights))
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def portable_session(folder: Path) -> ort.InferenceSession:
    """The graph of `qwen-rt export` on ONNX Runtime alone, weights where it says they are."""
    bundle = Bundle.open(folder)
    (weights,) = {path.parent for path in bundle.weight_files.values()}
    return ort_session(bundle.graph_file.read_bytes(), weights)


def run_model(model: ir.Model, weights: Path, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """All outputs of an in-memory graph, by name. Each past tensor is copied: nothing is written in place."""
    session = ort_session(ir.serde.serialize_model(model).SerializeToString(), weights)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v.copy() for k, v in feeds.items()}), strict=True))


def reference_evaluator(folder: Path) -> ReferenceEvaluator:
    """Onnx's own evaluator on a self-contained portable graph."""
    return ReferenceEvaluator(onnx.load(str(Bundle.open(folder).graph_file)))
