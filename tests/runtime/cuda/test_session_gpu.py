"""The session on a real GPU, on nano: answers, independence of batch mates, memory, time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_rt.benchmarks.nano.heldout import load as load_problems
from qwen_rt.bundle import Bundle
from qwen_rt.errors import CapacityError
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.quantization import decode_fp8
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.cuda.steps import BUCKETS
from qwen_rt.runtime.cuda.weights import BF16, FLOAT, FLOAT8, FLOAT16, INT8, UINT8, RandomWeights
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams

from .gpu_kit import KV_BYTES, MEGABYTE, feed, make_rows, run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(library: PluginLibrary, nano_portable: Path) -> Path:
    from qwen_rt.export.build import BuildOptions, build

    folder = nano_portable.parent / "cuda"
    build(nano_portable, folder, BuildOptions(target="cuda", quiet=True))
    return folder


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[CudaSession]:
    with CudaSession(Bundle.open(bundle), kv_memory=KV_BYTES, quiet=True) as session:
        yield session


def test_greedy_answers_are_those_of_the_cpu(bundle: Path, nano: LLM) -> None:
    prompts = [[{"role": "user", "content": row["question"]}] for row in load_problems()[:20]]
    encoded = [nano.encode_chat(prompt) for prompt in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=300, eos_token_ids=nano.spec.eos_token_ids)
    expected = nano.generate(encoded, params)
    with LLM(bundle, kv_memory=KV_BYTES) as llm:
        found = llm.generate(encoded, params)
    different = [(a.text, b.text) for a, b in zip(found, expected, strict=True) if a.text != b.text]
    assert not different


needs_invariance = pytest.mark.skipif(
    os.environ.get("QWEN_RT_BATCH_INVARIANT") != "1", reason="more than 32 rows: needs QWEN_RT_BATCH_INVARIANT=1"
)


@pytest.mark.parametrize(
    "num_rows", [2, 3, 7, 8, 32, *(pytest.param(rows, marks=needs_invariance) for rows in (33, 64))]
)
def test_batch_mates_do_not_change_a_bit(session: CudaSession, num_rows: int) -> None:
    """Tokens and log probabilities of a request alone, and among others, in the first row and in the last."""
    rows = make_rows(session, [17, 70, *range(5, 3 + num_rows)][:num_rows])
    for row in rows:
        feed(session, row)
    watched, start = rows[1], list(rows[1].output_ids)
    alone = run(session, [watched], 20)
    for place in (0, num_rows - 1):
        watched.output_ids = list(start)
        others = [row for row in rows if row is not watched]
        together = run(session, [*others[:place], watched, *others[place:]], 20)
        for one, many in zip(alone, together, strict=True):
            assert one.token_ids[0] == many.token_ids[place]
            first, second = one.logprobs[0], many.logprobs[place]
            assert first is not None
            assert second is not None
            assert first.logprob == second.logprob
            assert first.top_ids.tolist() == second.top_ids.tolist()
            assert first.top_logprobs.tolist() == second.top_logprobs.tolist()


def test_more_than_32_batch_mates_do_not_where_that_is_asked_for(library: PluginLibrary) -> None:
    """In a process of its own, because the library reads the variable once."""
    tests = [f"{__file__}::test_batch_mates_do_not_change_a_bit[{rows}]" for rows in (2, 33, 64)]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"QWEN_RT_BATCH_INVARIANT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-2000:]
    assert "3 passed" in child.stdout


def test_prompts_do_not_depend_on_what_runs(session: CudaSession) -> None:
    row, mate = make_rows(session, [150, 20])
    first = feed(session, row)
    feed(session, mate)
    run(session, [mate], 5)
    again = feed(session, row)
    assert first.token_ids.tolist() == again.token_ids.tolist()
    assert first.logprobs[0] is not None
    assert again.logprobs[0] is not None
    assert first.logprobs[0].logprob == again.logprobs[0].logprob


def test_seeded_sampling_repeats_and_seeds_differ(session: CudaSession) -> None:
    answers = []
    for shift in (0, 0, 1):
        rows = make_rows(session, [12, 30], temperature=1.2, top_k=50, top_p=0.95, frequency_penalty=0.3)
        for row in rows:
            row.seed += shift
            feed(session, row)
        run(session, rows, 30)
        answers.append([row.output_ids for row in rows])
    assert answers[0] == answers[1] != answers[2]


def test_every_bucket_agrees_with_a_prefill_of_the_same_tokens(session: CudaSession) -> None:
    """A step's choice is at most a rounding error worse than what a prefill of the same tokens would choose."""
    for bucket in BUCKETS:
        rows = make_rows(session, [9 + index for index in range(bucket)])
        for row in rows:
            feed(session, row)
        run(session, rows, 4)
        row = rows[-1]
        fed = RowState((*row.prompt_ids, *row.output_ids[:-1]), row.params, 0, row.blocks)
        top = feed(session, fed).logprobs[0]
        assert top is not None
        choice = top.top_ids.tolist().index(row.output_ids[-1])
        assert top.top_logprobs[0] - top.top_logprobs[choice] < 0.1, bucket


def test_the_memory_report_agrees_with_the_driver(session: CudaSession) -> None:
    for row in (rows := make_rows(session, [40, 20])):
        feed(session, row)
    run(session, rows, 3)
    report = session.memory_report()
    assert report.unaccounted_share < 0.02, str(report)
    assert report.weights >= session.spec.weight_bytes("bfloat16")


def test_closing_returns_the_memory(bundle: Path, cuda: Cudart) -> None:
    """Loaded kernels stay with the process, so the first round is what later ones are measured against."""
    left = []
    for _ in range(3):
        with CudaSession(Bundle.open(bundle), kv_memory=4 * KV_BYTES, quiet=True) as session:
            rows = make_rows(session, [40])
            feed(session, rows[0])
            run(session, rows, 3)
            inside, _ = cuda.memory_info()
        session.close()
        left.append(cuda.memory_info()[0])
        assert left[-1] - inside > 4 * KV_BYTES
    assert abs(left[1] - left[0]) <= 8 * MEGABYTE
    assert abs(left[2] - left[1]) <= 2 * MEGABYTE


def test_a_step_costs_the_host_less_than_50_us(session: CudaSession) -> None:
    rows = make_rows(session, [20] * 8, logprobs=None)
    for row in rows:
        feed(session, row)
    session.set_rows(rows)
    seconds, steps = session.host_seconds, session.steps
    for _ in range(100):
        session.wait_step(session.launch_step())
    assert (session.host_seconds - seconds) / (session.steps - steps) < 50e-6


def test_a_cache_too_small_is_one_line(bundle: Path) -> None:
    with pytest.raises(CapacityError, match=r"KV cache: kv_memory=1000 is .*; expected at least .* 2 blocks"):
        CudaSession(Bundle.open(bundle), kv_memory=1000, quiet=True)
    with pytest.raises(CapacityError, match=r"the model needs .* GB of KV cache.* GB free"):
        CudaSession(Bundle.open(bundle), kv_memory=1 << 50, quiet=True)


def test_timing_is_plausible(session: CudaSession) -> None:
    decode, prefill = session.time_decode(4, 100, 20), session.time_prefill(100, 3)
    assert len(decode) == 20
    assert 0 < np.median(decode) < 20
    assert len(prefill) == 3
    assert 0 < np.median(prefill) < 1000


def test_weights_load_from_the_page_cache(session: CudaSession) -> None:
    stats = session.load_stats
    assert stats.nbytes == session.spec.weight_bytes("bfloat16")
    assert stats.gb_s > 0.01  # nano is too small for a rate; benchmarks/ measures one


@pytest.mark.parametrize("count", [1, 2, 1_000_003, 20_000_000])
def test_random_weights_are_normal_and_repeat(library: PluginLibrary, cuda: Cudart, count: int) -> None:
    fill = ctypes.CDLL(str(library.path)).qwen_rt_fill_random
    fill.argtypes = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_void_p
    )  # fmt: skip
    resources = Resources(cuda)
    try:
        stream = resources.stream()
        device, _ = resources.device(2 * count + 2)
        pinned = resources.pinned(2 * count + 2)

        def draw(seed: int, std: float = 0.02) -> np.ndarray:
            cuda.fill(device, 0xFF, 2 * count + 2, stream)
            assert fill(device, count, BF16, std, seed, stream) == 0
            cuda.copy(pinned.host, device, 2 * count + 2, stream)
            cuda.stream_synchronize(stream)
            assert pinned.array(np.uint16, (count + 1,))[count] == 0xFFFF, "written beyond the end"
            bits = pinned.array(np.uint16, (count,)).astype(np.uint32) << 16
            return bits.view(np.float32)

        first, second, other = draw(1), draw(1), draw(2)
        assert np.isfinite(first).all()
        assert (first == second).all()
        if count < 1000:
            return
        # Means of n normal numbers vary by std / sqrt(n): five of those; the same for squares, times sqrt(2).
        scaled = first.astype(np.float64) / 0.02
        assert abs(scaled.mean()) < 5 / np.sqrt(count)
        assert abs((scaled**2).mean() - 1) < 5 * np.sqrt(2 / count) + 2**-9
        assert abs((scaled**4).mean() - 3) < 5 * np.sqrt(96 / count) + 2**-7
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(count)
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(count)
        assert fill(device, count, BF16, float("nan"), 1, stream) != 0
        assert fill(device + 1, count, BF16, 0.1, 1, stream) != 0
        assert fill(device, count, 11, 0.1, 1, stream) != 0, "no such element type"
    finally:
        resources.close()


@pytest.mark.parametrize(
    ("element_type", "dtype"), [(FLOAT, "<f4"), (FLOAT16, "<f2"), (FLOAT8, "u1"), (INT8, "i1"), (UINT8, "u1")]
)
def test_random_quantized_weights_are_whole(
    library: PluginLibrary, cuda: Cudart, element_type: int, dtype: str
) -> None:
    fill = ctypes.CDLL(str(library.path)).qwen_rt_fill_random
    fill.argtypes = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_void_p
    )  # fmt: skip
    count, size = 1_000_003, {FLOAT8: 120.0, INT8: 36.0}.get(element_type, 0.01)
    nbytes = count * np.dtype(dtype).itemsize
    resources = Resources(cuda)
    try:
        stream = resources.stream()
        device, _ = resources.device(nbytes)
        pinned = resources.pinned(nbytes)
        assert fill(device, count, element_type, size, 5, stream) == 0
        cuda.copy(pinned.host, device, nbytes, stream)
        cuda.stream_synchronize(stream)
        values = pinned.array(np.dtype(dtype), (count,))
        if element_type == FLOAT8:
            assert ((values & 0x7F) != 0x7F).all(), "NaN"
            values = decode_fp8(values)
        values = values.astype(np.float64)
        if element_type in (FLOAT, FLOAT16):
            assert (values > 0.69 * size).all()
            assert (values < 1.31 * size).all()
        elif element_type == UINT8:
            assert np.array_equal(np.unique(values), np.arange(256))
        else:
            assert abs(values.mean()) < 0.01 * size
            assert abs(values.std() / size - 1) < 0.02
    finally:
        resources.close()


def test_random_weights_make_a_session(bundle: Path, library: PluginLibrary) -> None:
    opened = Bundle.open(bundle)
    source = RandomWeights(library.path)
    with CudaSession(opened, kv_memory=KV_BYTES, weights=source, quiet=True) as session:
        rows = make_rows(session, [33, 8])
        for row in rows:
            feed(session, row)
        for result in run(session, rows, 10):
            assert all(entry is not None and np.isfinite(entry.logprob) for entry in result.logprobs)
