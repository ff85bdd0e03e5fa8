"""The session and its cache: written in place, sized as asked, freed when dropped, right for every batch."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError, CapacityError
from qwen_rt.runtime.kv_cache import KVCache
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.session import CpuSession
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32

from ..compare import assert_close

ZERO = np.zeros(1, np.int64)


def filled(cache: KVCache, value: float) -> KVCache:
    for array in (*cache.keys, *cache.values):
        array[:] = value
    return cache


def test_a_cache_has_the_size_that_was_asked(nano: LLM) -> None:
    spec, cache = nano.spec, nano.session.new_cache(3, 50)
    assert (cache.num_rows, cache.capacity, cache.num_layers) == (3, 50, spec.num_layers)
    assert {array.shape for array in (*cache.keys, *cache.values)} == {(3, spec.num_kv_heads, 50, spec.head_dim)}
    assert {array.dtype for array in (*cache.keys, *cache.values)} == {np.dtype(np.float32)}
    assert cache.nbytes == 3 * 50 * spec.kv_bytes_per_token("float32")


def test_a_cache_beyond_the_memory_is_one_clear_error(nano: LLM) -> None:
    with pytest.raises(CapacityError, match=r"KV cache of 1000000 rows x 1000000 tokens takes [\d.]+ GB"):
        nano.session.new_cache(10**6, 10**6)


def test_exactly_the_new_rows_are_written_and_in_place(nano: LLM) -> None:
    """The arrays that the caller holds change at the rows that were asked for, and at no other byte."""
    cache = filled(nano.session.new_cache(3, 20), 7.0)
    addresses = [array.ctypes.data for array in (*cache.keys, *cache.values)]
    nano.session.run(cache, 1, np.array([[5, 6, 7]]), np.array([4]), np.array([2]))
    assert [array.ctypes.data for array in (*cache.keys, *cache.values)] == addresses
    for array in (*cache.keys, *cache.values):
        assert (array[1, :, 4:7] != 7.0).all()
        array[1, :, 4:7] = 7.0
        assert (array == 7.0).all()


def test_a_ragged_decode_step_writes_one_row_of_each_sequence(nano: LLM) -> None:
    cache = filled(nano.session.new_cache(4, 9), 0.5)
    positions = np.array([8, 0, 3, 5])
    nano.session.run(cache, 0, np.array([[3], [4], [5], [6]]), positions, np.zeros(4, np.int64))
    for array in (*cache.keys, *cache.values):
        written = (array != 0.5).all(axis=(1, 3))  # [B, Tmax]
        assert np.array_equal(written, np.arange(9) == positions[:, None])
        untouched = np.broadcast_to(~written[:, None, :, None], array.shape)
        assert (array[untouched] == 0.5).all()


def test_no_operator_copies_the_cache(nano_bundle: Path, tmp_path: Path) -> None:
    """As ONNX Runtime itself counts: what a decode step touches does not grow with the capacity of the cache."""
    opened = Bundle.open(nano_bundle)
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(next(iter(opened.weight_files.values())).parent))
    session = CpuSession(opened, 1)
    session._session = ort.InferenceSession(opened.graph_file.read_bytes(), options, providers=["CPUExecutionProvider"])
    session.run(session.new_cache(1, 2000), 0, np.array([[5]]), np.array([3]), ZERO)
    events = json.loads(Path(session._session.end_profiling()).read_text())
    kernels = [
        event["args"] for event in events if event.get("cat") == "Node" and "output_size" in event.get("args", {})
    ]
    names = {event["op_name"] for event in kernels}
    assert "GroupQueryAttention" in names
    assert not names & {"TensorScatter", "ScatterND", "ScatterElements", "Where", "Transpose", "MatMul", "Attention"}
    cache_bytes = 2000 * opened.manifest.model.num_kv_heads * opened.manifest.model.head_dim * 4
    big = {event["op_name"] for event in kernels if int(event["output_size"]) >= cache_bytes}
    assert big <= {"GroupQueryAttention"}  # whose outputs are the cache itself, as the tests above show


def test_a_step_of_a_large_cache_takes_no_memory_for_it(nano: LLM) -> None:
    """Pages of a cache are claimed, not touched: of 2 GB for 64 rows a step over one row uses next to nothing."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    nano.session.run(nano.session.new_cache(1, 8), 0, np.array([[5]]), ZERO, ZERO)
    before = resident_bytes()
    cache = nano.session.new_cache(64, 4096)
    assert cache.nbytes > 2**31 - 1
    nano.session.run(cache, 63, np.array([[5, 6, 7]]), ZERO, np.array([2]))
    nano.session.run(cache, 63, np.array([[8]]), np.array([3]), ZERO)
    assert resident_bytes() - before < 64 << 20


def test_logits_are_those_of_the_token_asked_for(nano: LLM) -> None:
    ids = np.array(nano.tokenizer.encode("What is 17 + 25?"))
    cache = nano.session.new_cache(1, len(ids))
    stepwise = [nano.session.run(cache, 0, ids[None, [i]], np.array([i]), ZERO)[0].copy() for i in range(len(ids))]
    for index in range(len(ids)):
        fresh = nano.session.new_cache(1, len(ids))
        whole = nano.session.run(fresh, 0, ids[None], ZERO, np.array([index]))
        assert whole.shape == (1, nano.spec.vocab_size)
        assert whole.dtype == np.float32
        assert_close(whole[0], stepwise[index], relative=CHUNKING_RELATIVE_FP32)


def test_interleaved_caches_and_shapes_do_not_disturb_each_other(nano: LLM) -> None:
    """More shapes and caches at once than the session keeps bindings for."""
    ids = np.array(nano.tokenizer.encode("12 + 34 = 46. What is 5 times 7?"))[:12]
    caches = [nano.session.new_cache(rows, 12 + rows) for rows in (1, 2, 3, 4)]
    for i in range(len(ids)):
        step = []
        for cache in caches:
            for row in range(cache.num_rows):
                step.append(nano.session.run(cache, row, ids[None, [i]], np.array([i]), ZERO)[0].copy())
        for logits in step:
            assert np.array_equal(logits, step[0])


def test_a_dropped_cache_frees_its_memory(nano: LLM) -> None:
    cache = nano.session.new_cache(2, 16)
    alive = [weakref.ref(array) for array in (*cache.keys, *cache.values)]
    nano.session.run(cache, 0, np.array([[5], [6]]), np.zeros(2, np.int64), np.zeros(2, np.int64))
    nano.session.run(cache, 0, np.array([[5]]), np.ones(1, np.int64), ZERO)
    del cache
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_move_row_copies_what_was_asked(nano: LLM) -> None:
    cache = nano.session.new_cache(3, 6)
    for index, array in enumerate((*cache.keys, *cache.values)):
        array[:] = np.arange(array.size).reshape(array.shape) + index
    before = [array.copy() for array in (*cache.keys, *cache.values)]
    cache.move_row(2, 0, 4)
    for array, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert np.array_equal(array[0, :, :4], old[2, :, :4])
        assert np.array_equal(array[0, :, 4:], old[0, :, 4:])
        assert np.array_equal(array[1:], old[1:])


def test_other_targets_are_refused(nano_portable: Path) -> None:
    with pytest.raises(BundleError, match="has target portable"):
        CpuSession(Bundle.open(nano_portable))
