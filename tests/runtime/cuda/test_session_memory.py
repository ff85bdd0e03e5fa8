"""What a session refuses, and whose memory is whose: on the fake GPU, which counts every allocation."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import CapacityError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.runtime.cuda.memory import block_bytes
from qwen_rt.runtime.cuda.session import CudaSession

from .fake import FakeGpu, continuation, make_graph, request, write_shards
from .kit import SPEC, VOCAB, decode, feed, open_session, prompt_of


@pytest.mark.parametrize(
    "settings", [{"max_rows": 0}, {"max_rows": 65}, {"chunk_tokens": 0}, {"capture": "never"}, {"rows": 3}]
)
def test_settings_that_cannot_be_are_refused(gpu: FakeGpu, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        open_session(gpu, tmp_path, **settings)


def test_a_gpu_that_the_library_has_no_code_for_is_refused(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SM", "89")
    with pytest.raises(UnsupportedModelError, match=r"SM 9\.0, this GPU is SM 8\.9"):
        open_session(gpu, tmp_path)


def test_too_little_memory_is_told_before_anything_is_loaded(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TOTAL", str(200 << 20))
    with pytest.raises(CapacityError, match=r"0\.0 GB of weights, .*; 0\.2 GB free"):
        open_session(gpu, tmp_path)
    assert not gpu.graphs


@pytest.mark.parametrize("nbytes", [0, 1, 20479])
def test_a_cache_without_room_for_one_request_is_refused(gpu: FakeGpu, tmp_path: Path, nbytes: int) -> None:
    with pytest.raises(CapacityError, match=f"kv_memory={nbytes} is .* 2 blocks of 64 tokens"):
        open_session(gpu, tmp_path, kv_memory=nbytes)


# ---------------------------------------------------------------- memory


def test_the_cache_takes_what_is_left_but_no_more_than_can_be_filled(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(gpu, tmp_path, kv_memory=None) as session:
        assert session.num_blocks == 12 * 5 + 1
    monkeypatch.setenv("FAKE_TOTAL", str(360 << 20))
    with open_session(gpu, tmp_path, kv_memory=None, max_rows=64) as session:
        assert session.num_blocks == 64 * 5 + 1
        assert gpu.cuda.memory_info()[0] > (256 << 20) + int(0.03 * (360 << 20))


def test_the_report_agrees_with_the_driver(session: CudaSession, gpu: FakeGpu) -> None:
    row = request(prompt_of(4), [1], frequency_penalty=0.5)
    feed(session, row)
    decode(session, [row], 2)
    report = session.memory_report()
    assert report.unaccounted_share < 0.02
    assert report.driver_used == 8 * 2**30 - gpu.cuda.memory_info()[0]
    assert report.kv_cache == 4 << 20
    assert report.buffers > report.workspace > 0


def test_the_report_is_of_the_sessions_own_device(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever device the calling thread has, as that of the session that was opened last."""
    monkeypatch.setenv("FAKE_DEVICES", "2")
    with open_session(gpu, tmp_path, device=1) as session:
        expected = session.memory_report()
        gpu.cuda.set_device(0)
        assert session.memory_report() == expected
        assert expected.driver_used > 4 << 20
    gpu.cuda.set_device(0)


def test_closing_twice_gives_everything_back(gpu: FakeGpu, tmp_path: Path) -> None:
    session = open_session(gpu, tmp_path)
    row = request(prompt_of(4), [1], presence_penalty=1.0, logprobs=1)
    feed(session, row)
    session.set_rows([row])
    session.launch_step()  # under way while it is closed
    session.close()
    session.close()
    assert not gpu.live()
    assert not gpu.graphs[-1].is_open
    for call in (session.memory_report, session.launch_step, lambda: session.set_rows([row])):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_session_that_is_dropped_gives_everything_back(gpu: FakeGpu, tmp_path: Path) -> None:
    session = open_session(gpu, tmp_path)
    assert gpu.live()
    del session
    assert not gpu.live()


def test_any_failed_allocation_leaves_nothing_behind(gpu: FakeGpu, tmp_path: Path) -> None:
    def use() -> None:
        with open_session(gpu, tmp_path, capture="all", max_rows=2) as session:
            row = request(prompt_of(4), [1], presence_penalty=1.0)
            feed(session, row)
            decode(session, [row], 2)
            session.time_decode(2, 3, 2)

    gpu.library.fake_fail_at(-1)
    use()
    count = gpu.library.fake_allocations()
    assert count > 30
    for index in range(count):
        gpu.library.fake_fail_at(index)
        with pytest.raises(QwenRtError, match="cudaErrorMemoryAllocation"):
            use()
        assert not gpu.live(), f"allocation {index}"


def test_a_failing_graph_ends_its_capture(session: CudaSession, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    row = request(prompt_of(4), [1])
    feed(session, row)
    graph = gpu.graphs[-1]
    calls = iter((True, True, False))
    real = graph.run

    def run() -> None:
        if not next(calls):
            raise QwenRtError("ONNX Runtime failed: on purpose")
        real()

    monkeypatch.setattr(graph, "run", run)
    with pytest.raises(QwenRtError, match="on purpose"):
        session.set_rows([row])
    monkeypatch.undo()
    assert "graph" not in gpu.live()
    decode(session, [row], 3)
    assert row.output_ids == continuation(row.prompt_ids, 4, VOCAB)


def test_chunks_of_prompts_shrink_where_memory_is_short(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the cache that is asked for fits, else a request of the full length; and never below 512 tokens."""
    write_shards(SPEC, tmp_path)
    graph, one = make_graph(SPEC, tmp_path), block_bytes(SPEC)
    base: dict[str, Any] = {"base_dir": tmp_path, "platform": gpu.platform(), "max_rows": 2, "quiet": True}

    def chunk_with(total: int, **settings: Any) -> int:
        monkeypatch.setenv("FAKE_TOTAL", str(total))
        with CudaSession.from_graph(graph, SPEC, 8192, **base, **settings) as session:
            row = request(prompt_of(1200), range(1, 20))
            feed(session, row)
            assert row.output_ids == continuation(row.prompt_ids, 1, VOCAB)
            return session.chunk_tokens

    plenty, cache = 2 << 30, 40 * one
    assert chunk_with(plenty, kv_memory=cache) == 8192
    found = []
    for quarter in range(4 * 300, 4 * 320):  # the last is ample, the first too little for any chunk
        with contextlib.suppress(CapacityError):
            found.append(chunk_with(quarter << 18, kv_memory=cache))
    assert len(found) < 80
    assert sorted(set(found)) == list(dict.fromkeys(found)) == [512, 1024, 2048, 4096, 8192]
    fits = (320 << 20) + int(0.03 * (600 << 20)) + (256 << 20)
    assert chunk_with(fits) == 8192
    assert chunk_with(fits - (16 << 20)) < 8192
    assert chunk_with(plenty, kv_memory=cache, chunk_tokens=300) == 300
