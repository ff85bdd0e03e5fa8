"""Running a portable graph and its lowering side by side: ONNX Runtime on dense caches, references on a paged one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator

from qwen_rt import tensors
from qwen_rt.export.passes.compute_dtype import set_compute_dtype
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.plugins.reference_ops import reference_evaluator_ops
from qwen_rt.spec import ModelSpec

from .graphs import Feeds, cache_feeds, ort_session

Chunk = tuple[int, NDArray[np.int64]]
"""A sequence's number and its next tokens, int64[S]."""

CACHES = ((tensors.past_key, tensors.present_key), (tensors.past_value, tensors.present_value))
SCALES = (
    (tensors.past_key_scale, tensors.present_key_scale),
    (tensors.past_value_scale, tensors.present_value_scale),
)
KV_DTYPES: dict[str, Any] = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}


def proto_of(model: ir.Model) -> onnx.ModelProto:
    """A graph without its weights."""
    return ir.serde.serialize_model(model)


def shared_name(spec: ModelSpec, names: tuple[Any, ...] = CACHES) -> list[tuple[str, str]]:
    """Past and present name of every cache, or of all that `names` has for a layer."""
    return [(past(i), present(i)) for i in range(spec.num_layers) for past, present in names]


class DenseModel:
    """A portable graph on ONNX Runtime, computing in float32; each sequence has a dense cache of its own."""

    def __init__(self, model: ir.Model, weights: Path, spec: ModelSpec, capacity: int) -> None:
        self.spec, self.capacity = spec, capacity
        set_compute_dtype(model, "float32")
        self.session: ort.InferenceSession = ort_session(proto_of(model).SerializeToString(), weights)
        self.caches: dict[int, Feeds] = {}
        self.lengths: dict[int, int] = {}

    def call(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Feed chunks one after the other; logits after each, float32[B, V]."""
        return np.stack([self._feed(sequence, ids) for sequence, ids in chunks])

    def _feed(self, sequence: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        start = self.lengths.get(sequence, 0)
        stop = start + len(ids)
        cache = self.caches.get(sequence) or cache_feeds(self.spec, 1, self.capacity)
        names = [value.name for value in self.session.get_outputs()]
        feeds = cache | {
            tensors.INPUT_IDS: ids[None],
            tensors.WRITE_INDICES: np.array([start]),
            tensors.KV_LENGTHS: np.array([stop]),
            tensors.LOGITS_INDICES: np.array([len(ids) - 1]),
        }
        found: Feeds = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.caches[sequence] = {past: found[present] for past, present in shared_name(self.spec)}
        self.lengths[sequence] = stop
        logits: NDArray[np.float32] = found[tensors.LOGITS][0]
        return logits

    def cached(self, sequence: int) -> dict[str, NDArray[Any]]:
        """Past name → the valid rows of a sequence, [Hkv, T, D]."""
        return {name: array[0, :, : self.lengths[sequence]] for name, array in self.caches[sequence].items()}


class PagedModel:
    """A lowered graph on the numpy references: all sequences share a pool of blocks in random order.

    Every slot that no token was written to holds `poison`, block 0 and the blocks of nobody too; so do the entries of
    block tables that nothing may read, and in a decode step `query_starts` and `logits_indices`. With a `kv_format` so
    do the scales, and the eight bits hold what comes closest: no number in fp8, the largest in int8.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Path,
        spec: ModelSpec,
        capacity: int,
        bf16: bool = False,
        poison: float = np.nan,
        kv_format: str | None = None,
    ) -> None:
        self.spec = spec
        proto = proto_of(model)
        load_external_data_for_model(proto, str(weights))
        self.evaluator = ReferenceEvaluator(proto, new_ops=reference_evaluator_ops(bf16))
        self.max_blocks = -(-capacity // BLOCK_SIZE)
        num_blocks = 1 + 6 * self.max_blocks
        self.free = [int(block) for block in 1 + np.random.default_rng(0).permutation(num_blocks - 1)]
        shape = (num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        dtype = KV_DTYPES.get(str(kv_format), ml_dtypes.bfloat16 if bf16 else np.float64)
        filling = -128 if kv_format == "int8" else poison
        self.shared = shared_name(spec)
        self.pool: Feeds = {past: np.full(shape, filling, dtype) for past, _ in self.shared}
        if kv_format is not None:
            scales = shared_name(spec, SCALES)
            self.pool |= {past: np.full(shape[:3], poison, np.float32) for past, _ in scales}
            self.shared += scales
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def call(self, chunks: Sequence[Chunk]) -> NDArray[np.float64]:
        """Feed chunks in one call; logits after each, float64[B, V]."""
        tables = np.full((len(chunks), self.max_blocks), np.iinfo(np.int32).max, np.int32)
        positions = []
        for row, (sequence, ids) in enumerate(chunks):
            start = self.lengths.get(sequence, 0)
            stop = start + len(ids)
            own = self.blocks.setdefault(sequence, [])
            while len(own) * BLOCK_SIZE < stop:
                own.append(self.free.pop())
            tables[row, : len(own)] = own
            positions.append(np.arange(start, stop))
            self.lengths[sequence] = stop
        starts = np.cumsum([0, *(len(ids) for _, ids in chunks)])
        indices = starts[1:] - 1
        if starts[-1] == len(chunks):  # a decode step reads neither
            starts, indices = np.full_like(starts, -7), np.full_like(indices, 1 << 40)
        feeds = self.pool | {
            tensors.INPUT_IDS: np.concatenate([ids for _, ids in chunks]),
            tensors.POSITIONS: np.concatenate(positions),
            tensors.QUERY_STARTS: starts.astype(np.int32),
            tensors.BLOCK_TABLES: tables,
            tensors.LOGITS_INDICES: indices,
            tensors.WORKSPACE: np.zeros(0, np.uint8),
        }
        before = {name: array.tobytes() for name, array in self.pool.items()}
        found = dict(zip(self.evaluator.output_names, self.evaluator.run(None, feeds), strict=True))
        written = [name for name, array in self.pool.items() if array.tobytes() != before[name]]
        assert not written, f"{written} should have been copied, not written in place"
        self.pool = {past: found[present] for past, present in self.shared}
        logits: NDArray[np.float64] = found[tensors.LOGITS]
        return logits

    def cached(self, sequence: int) -> dict[str, NDArray[Any]]:
        """Past name → the valid rows of a sequence as numbers, [Hkv, T, D]; scales [Hkv, T], which they count by."""
        found = {}
        for name, pool in self.pool.items():
            own = pool[self.blocks[sequence]].swapaxes(0, 1)  # [Hkv, blocks, 64, …]
            found[name] = own.reshape(own.shape[0], -1, *own.shape[3:])[:, : self.lengths[sequence]].astype(np.float64)
        return found

    def untouched(self) -> dict[str, NDArray[Any]]:
        """Past name → every slot that holds no token, [slots, …]: all `poison`, if nothing was written astray."""
        used = np.zeros((len(next(iter(self.pool.values()))), BLOCK_SIZE), bool)
        for sequence, own in self.blocks.items():
            for index in range(self.lengths[sequence]):
                used[own[index // BLOCK_SIZE], index % BLOCK_SIZE] = True
        return {name: pool.swapaxes(1, 2)[~used] for name, pool in self.pool.items()}
