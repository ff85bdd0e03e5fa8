"""The session: pieces of prompts, buckets, captured steps, rows of the cache, memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_rt.errors import CapacityError, QwenRtError, UsageError
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.tensorrt.cache import KvPool, LeasedCache
from qwen_rt.runtime.tensorrt.engine import PREFILL
from qwen_rt.runtime.tensorrt.platform import Platform
from qwen_rt.runtime.tensorrt.session import TensorRtSession
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32, PORTABLE_RELATIVE

from ...cli.kit import edit_manifest
from ...compare import assert_close
from ..cuda.fake import FakeGpu
from .fake import FakeTensorRt
from .kit import CAPACITY, PROFILES, make_bundle, make_card, make_engine, open_session, put_engine

MIB = 1 << 20


@pytest.fixture
def session(bundle: Path, platform: Platform) -> Iterator[TensorRtSession]:
    opened = open_session(bundle, platform)
    yield opened
    opened.close()


def ids_of(lengths: Sequence[int], vocab_size: int = 1100) -> np.ndarray:
    """Right-padded prompts."""
    rng = np.random.default_rng(5)
    ids = rng.integers(0, vocab_size, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return ids


def feed(session: Any, cache: Any, lengths: Sequence[int], first_row: int = 0) -> np.ndarray:
    starts, last = np.zeros(len(lengths), np.int64), np.array(lengths) - 1
    logits: np.ndarray = session.run(cache, first_row, ids_of(lengths), starts, last).copy()
    return logits


def step(session: Any, cache: Any, lengths: Sequence[int], token: int = 7, first_row: int = 0) -> np.ndarray:
    ids, zeros = np.full((len(lengths), 1), token), np.zeros(len(lengths), np.int64)
    logits: np.ndarray = session.run(cache, first_row, ids, np.array(lengths), zeros).copy()
    return logits


@pytest.mark.parametrize("sizes", [PROFILES[0], (1, 96), (4, 16), (2, 7), (3, 1)], ids=str)
def test_a_prompt_may_be_larger_than_the_prefill_profile(
    sizes: tuple[int, int],
    nano_bundle: Path,
    graph: onnx.ModelProto,
    spec: ModelSpec,
    platform: Platform,
    nano: LLM,
    tmp_path: Path,
) -> None:
    """Pieces of rows and of tokens, the last of one token: the same logits as the CPU's, then and in a step behind."""
    bundle = make_bundle(nano_bundle, tmp_path / "b", b"", "tensorrt-rtx", "1.7.1.116")
    told = {"prefill": sizes, "decode": PROFILES[1]}
    profiles = {name: type(make_card("tensorrt", "1").profiles["prefill"])(*size) for name, size in told.items()}
    card = make_card("tensorrt-rtx", "1.7.1.116", profiles=profiles)
    put_engine(bundle, make_engine(graph, spec, (sizes, PROFILES[1])), card)
    lengths = (15, 3, 29, 1, 22)
    session = open_session(bundle, platform)
    found, expected = [], []
    for one, results in ((session, found), (nano.session, expected)):
        cache = one.new_cache(len(lengths), 60)
        results += [feed(one, cache, lengths), step(one, cache, lengths)]
        cache.close()
    session.close()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, relative=CHUNKING_RELATIVE_FP32, what="logits")


def test_a_later_chunk_of_several_rows(session: TensorRtSession, nano: LLM) -> None:
    lengths, more = (9, 4, 6), ids_of((5, 5, 5))
    cache = session.new_cache(3, 40)
    feed(session, cache, lengths)
    found = session.run(cache, 0, more, np.array(lengths), np.array([4, 2, 0])).copy()
    for row, (length, index) in enumerate(zip(lengths, (4, 2, 0), strict=True)):
        own = nano.session.new_cache(1, 40)
        prompt = ids_of(lengths)[row : row + 1, :length]
        nano.session.run(own, 0, prompt, np.zeros(1, np.int64), np.array([length - 1]))
        alone = nano.session.run(own, 0, more[row : row + 1], np.array([length]), np.array([index]))
        assert_close(found[row : row + 1], alone, relative=CHUNKING_RELATIVE_FP32, what=f"row {row}")


def test_an_engine_of_float16(
    nano_portable: Path, nano_bundle: Path, spec: ModelSpec, platform: Platform, nano: LLM, tmp_path: Path
) -> None:
    """A cache of two bytes a number; ONNX Runtime has float16 on the CPU."""
    import onnx_ir as ir

    from qwen_rt.export.passes.lower_tensorrt import lower_tensorrt
    from qwen_rt.export.source import open_source

    model = open_source(nano_portable).load_graph()
    assert model is not None
    lowered = ir.serde.serialize_model(lower_tensorrt(model, spec, CAPACITY, "float16"))
    bundle = make_bundle(nano_bundle, tmp_path / "b", make_engine(lowered, spec), "tensorrt-rtx", "1.7.1.116")
    edit_manifest(bundle, lambda document: document.update(compute_dtype="float16", kv_dtype="float16"))
    put_engine(bundle, card=make_card("tensorrt-rtx", "1.7.1.116", compute_dtype="float16"))
    session, lengths = open_session(bundle, platform), (15, 3, 9)
    results = []
    for one in (session, nano.session):
        cache = one.new_cache(3, 60)
        results.append(np.concatenate([feed(one, cache, lengths), step(one, cache, lengths)]))
        cache.close()
    session.close()
    assert_close(*results, relative=PORTABLE_RELATIVE["float16"], what="logits")


def test_steps_are_captured_once_a_bucket_and_replayed(
    session: TensorRtSession, trt: FakeTensorRt, gpu: FakeGpu
) -> None:
    cache = session.new_cache(5, 60)
    assert (cache.num_rows, cache.num_leased) == (5, 6)
    lengths = [4, 3, 5, 2, 6]
    feed(session, cache, lengths)
    trt._log.clear()
    launched = gpu.library.fake_launches()
    first = step(session, cache, lengths)
    assert trt._log == [(1, (6, 1), False), (1, (6, 1), True)]  # run, which warms up, and captured
    assert gpu.library.fake_launches() == launched
    again = step(session, cache, lengths)  # the same tokens at the same places
    np.testing.assert_array_equal(again, first)
    assert gpu.library.fake_launches() == launched + 1
    for rows in (3, 4, 2, 1, 3):
        np.testing.assert_array_equal(np.argmax(step(session, cache, lengths[:rows]), 1), np.argmax(first[:rows], 1))
    assert len(session.steps) == 4  # 6, 4, 2 and 1 rows
    assert len(trt._log) == 8
    assert session.steps.trouble == ""


def test_idle_rows_touch_no_other_request(session: TensorRtSession) -> None:
    """Behind the rows of a step lie free rows, and behind those another run's."""
    one, two = session.new_cache(3, 60), session.new_cache(2, 60)
    assert (one.first, one.num_leased, two.first, two.num_leased) == (0, 4, 4, 2)
    feed(session, two, [5, 8])
    expected = step(session, two, [5, 8])
    feed(session, one, [4, 6, 3])
    for _ in range(3):
        step(session, one, [4, 6, 3])
        step(session, one, [4, 6])
    np.testing.assert_array_equal(step(session, two, [5, 8]), expected)


def test_a_step_in_the_middle_of_rows_is_not_filled_up(session: TensorRtSession, trt: FakeTensorRt) -> None:
    """A prompt of one token behind running rows: what is behind it may be taken."""
    cache = session.new_cache(4, 60)
    feed(session, cache, [4, 6])
    feed(session, cache, [5], first_row=3)
    expected = step(session, cache, [5], first_row=3)
    trt._log.clear()
    step(session, cache, [0], first_row=2)
    assert trt._log == [(1, (1, 1), False)]
    np.testing.assert_array_equal(step(session, cache, [5], first_row=3), expected)
    assert len(session.steps) == 0


def test_a_moved_row_goes_on_as_it_was(session: TensorRtSession) -> None:
    cache = session.new_cache(4, 60)
    feed(session, cache, [4, 6, 9])
    expected = step(session, cache, [9], first_row=2)
    cache.move_row(2, 0, 9)
    np.testing.assert_array_equal(step(session, cache, [9], first_row=0), expected)


def test_captured_steps_that_were_used_long_ago_go(
    session: TensorRtSession, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_rt.runtime.tensorrt.steps.MAX_STEPS", 2)
    cache = session.new_cache(5, 60)
    feed(session, cache, [4, 3, 5, 2, 6])
    for rows in (1, 2, 1, 4, 1):
        step(session, cache, [4, 3, 5, 2][:rows])
    assert len(session.steps) == 2
    assert gpu.live()["exec"] == 2
    launched = gpu.library.fake_launches()
    step(session, cache, [4])
    step(session, cache, [4, 3, 5, 2])
    assert gpu.library.fake_launches() == launched + 2


@pytest.mark.parametrize("rtx", [True, False])
def test_an_engine_that_cannot_be_captured_runs_all_the_same(
    rtx: bool, session: TensorRtSession, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu
) -> None:
    cache = session.new_cache(2, 60)
    feed(session, cache, [4, 3])
    trt._can_capture = False
    if not rtx:  # the full TensorRT is not asked: it refuses inside of the capture
        monkeypatch.setattr("qwen_rt.runtime.tensorrt.engine.Context.can_capture", lambda self, stream: True)
    before = gpu.live()
    with pytest.warns(RuntimeWarning, match="decode steps run uncaptured, and slower"):
        expected = step(session, cache, [4, 3])
    assert session.steps.trouble
    assert gpu.live() == before
    np.testing.assert_array_equal(step(session, cache, [4, 3]), expected)


def test_rows_that_are_not_leased_are_refused(session: TensorRtSession, bundle: Path, platform: Platform) -> None:
    cache = session.new_cache(3, 60)
    for first, count in ((0, 4), (3, 1), (-1, 1)):
        with pytest.raises(UsageError, match="expected 0 to 2"):
            feed(session, cache, [4] * count, first_row=first)
    with pytest.raises(UsageError, match="rows"):
        cache.move_row(0, 3, 1)
    with pytest.raises(CapacityError, match=f"positions 0 to {CAPACITY - 1}"):
        step(session, cache, [CAPACITY])
    with pytest.raises(CapacityError, match=f"at most {CAPACITY}"):
        session.new_cache(1, CAPACITY + 1)
    other = open_session(bundle, platform)
    with pytest.raises(UsageError, match="another session"):
        feed(other, cache, [4])
    other.close()
    cache.close()
    cache.close()
    with pytest.raises(UsageError, match="the cache is closed"):
        feed(session, cache, [4])


def test_rows_go_back_in_any_order(gpu: FakeGpu) -> None:
    stream, memory = gpu.cuda.stream_create(), gpu.cuda.malloc(KvPool.nbytes(1, 8, 256))
    pool = KvPool(gpu.cuda, stream, memory, 1, 8, 256, 16)
    held = [pool.lease(2, 16) for _ in range(4)]
    assert [cache.first for cache in held] == [0, 2, 4, 6]
    with pytest.raises(CapacityError, match="all 8 rows"):
        pool.lease(1, 16)
    held[1].close()
    held[2].close()
    wide = pool.lease(7, 16)
    assert (wide.first, wide.num_rows, wide.num_leased) == (2, 4, 4)
    del wide
    gc.collect()
    held[0].close()
    held[3].close()
    assert pool.lease(8, 16).first == 0
    gpu.cuda.free(memory)
    gpu.cuda.stream_destroy(stream)


def test_what_is_refused_while_running_is_one_line(session: TensorRtSession, trt: FakeTensorRt) -> None:
    cache = session.new_cache(1, 60)
    trt._refusal = "device fault\nsecond line"
    with pytest.raises(QwenRtError, match=r"rank0.engine: TensorRT refuses to run: .*device fault second line"):
        feed(session, cache, [4])
    trt._refusal = ""
    feed(session, cache, [4])


# ---------------------------------------------------------------- memory


def test_the_memory_report_adds_up(session: TensorRtSession, spec: ModelSpec) -> None:
    cache = session.new_cache(2, 60)
    feed(session, cache, [4, 3])
    step(session, cache, [4, 3])
    report = session.memory_report()
    rows = 2 * spec.num_layers * session.max_rows * spec.num_kv_heads * CAPACITY * spec.head_dim * 4
    assert rows <= report.kv_cache < rows + 2 * MIB
    assert report.workspace == 4 * MIB  # the larger profile's, in pages of the driver
    assert report.total == report.driver_used


def test_the_report_is_of_the_sessions_own_device(
    bundle: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEVICES", "2")
    session = open_session(bundle, platform, device=1)
    expected = session.memory_report()
    platform.cuda.set_device(0)
    assert session.memory_report() == expected
    assert expected.driver_used > MIB
    session.close()
    platform.cuda.set_device(0)


def test_rows_are_zeroed_when_they_are_leased(session: TensorRtSession, spec: ModelSpec) -> None:
    """Fresh memory of the fake is not zero, and a request may leave NaN: nothing of it may reach a sum."""
    cache = session.new_cache(2, 60)
    expected = step(session, cache, [0, 0])
    assert np.isfinite(expected).all()
    size = spec.num_kv_heads * CAPACITY * spec.head_dim * 4
    for _, _, address in session._pool.addresses(cache.first + 1):
        ctypes.memset(address, 255, size)
    assert np.isnan(step(session, cache, [0, 0])[1]).all()
    cache.close()
    np.testing.assert_array_equal(step(session, session.new_cache(2, 60), [0, 0]), expected)


@pytest.mark.parametrize(("nbytes", "rows"), [(2, 2), (2.9, 2), (100, 6)])
def test_memory_of_the_cache_bounds_the_rows(
    nbytes: float, rows: int, bundle: Path, platform: Platform, spec: ModelSpec
) -> None:
    row = 2 * spec.num_layers * spec.num_kv_heads * CAPACITY * spec.head_dim * 4
    session = open_session(bundle, platform, kv_memory=int(nbytes * row))
    assert session.max_rows == rows
    session.close()
    with pytest.raises(CapacityError, match=f"kv_memory={row - 1} is .* expected at least 2.6 MB, a row of 320 tokens"):
        open_session(bundle, platform, kv_memory=row - 1)


def test_a_gpu_that_is_too_small(bundle: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    for total, message in (
        (50 << 10, r"the model needs 0\.0 GB of weights; 0\.0 GB free"),
        (4 * MIB, r"the model needs 0\.0 GB of workspace and 0\.0 GB of KV cache; 0\.0 GB free"),
        (260 * MIB, "KV cache: the memory left for it is"),
    ):
        monkeypatch.setenv("FAKE_TOTAL", str(total))
        with pytest.raises(CapacityError, match=message):
            open_session(bundle, platform)


def test_every_allocation_that_fails_leaves_nothing(bundle: Path, platform: Platform, gpu: FakeGpu) -> None:
    gpu.library.fake_fail_at(-1)
    session = open_session(bundle, platform)
    count = gpu.library.fake_allocations()
    session.close()
    session.close()
    assert count >= 6
    before = gpu.live()
    for index in range(count):
        gpu.library.fake_fail_at(index)
        with pytest.raises(QwenRtError):
            open_session(bundle, platform)
        gpu.library.fake_fail_at(-1)
        assert gpu.live() == before


def test_a_capture_that_finds_no_memory_is_a_warning(session: TensorRtSession, gpu: FakeGpu) -> None:
    cache = session.new_cache(1, 60)
    feed(session, cache, [4])
    gpu.library.fake_fail_at(1)  # the graph is the first thing that a step takes, its executable the second
    with pytest.warns(RuntimeWarning, match="cudaErrorMemoryAllocation"):
        expected = step(session, cache, [4])
    gpu.library.fake_fail_at(-1)
    np.testing.assert_array_equal(step(session, cache, [4]), expected)


def test_a_session_that_is_forgotten_gives_all_back(bundle: Path, platform: Platform, gpu: FakeGpu) -> None:
    before = gpu.live()
    session = open_session(bundle, platform)
    cache = session.new_cache(1, 60)
    assert isinstance(cache, LeasedCache)
    feed(session, cache, [4])
    step(session, cache, [4])
    del session, cache
    gc.collect()
    assert gpu.live() == before


def test_prefill_and_decode_share_their_scratch(session: TensorRtSession) -> None:
    scratch = {context._context._scratch for context in session._contexts}
    assert len(scratch) == 1
    assert session._contexts[PREFILL]._context._profile == 0
