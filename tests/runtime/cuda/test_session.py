"""The session on the fake GPU: real packing, capturing, feeding back and accounting; a model that needs all of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.cuda.sampling import RING, SamplePlan
from qwen_rt.runtime.cuda.session import CudaSession
from qwen_rt.runtime.executor import PagedExecutor
from qwen_rt.runtime.paged_engine import PagedEngine
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampler import LogitsError
from qwen_rt.runtime.sampling_params import SamplingParams

from ..byte_tokenizer import byte_tokenizer
from .fake import BROKEN, FakeGpu, continuation, request
from .kit import VOCAB, decode, feed, open_session, prompt_of


def test_it_is_a_paged_executor(session: CudaSession) -> None:
    executor: PagedExecutor = session
    assert (executor.block_size, executor.max_rows, executor.chunk_tokens) == (64, 12, 32)
    assert executor.num_blocks == (4 << 20) // (2 * 2 * 64 * 20 * 2)


def test_rows_of_all_lengths_decode_to_what_the_model_says(session: CudaSession) -> None:
    """Chunks, block tables, positions, feedback, buckets and joins: the model's answer depends on each."""
    free = iter(np.random.default_rng(1).permutation(np.arange(1, session.num_blocks)).tolist())
    lengths = (1, 2, 31, 32, 33, 63, 64, 65, 130)
    rows = [request(prompt_of(n, n), [next(free) for _ in range(-(-(n + 40) // 64))]) for n in lengths]
    for row in rows[:4]:
        feed(session, row)
    decode(session, rows[:4], 9)
    for row in rows[4:]:
        feed(session, row)
    decode(session, rows, 11)
    decode(session, rows[::-1][:3], 5)
    for row in rows:
        assert row.output_ids == continuation(row.prompt_ids, len(row.output_ids), VOCAB), len(row.prompt_ids)
    assert [len(row.output_ids) for row in rows] == [21, 21, 21, 21, 12, 12, 17, 17, 17]


def test_steps_are_replays_of_few_captures(session: CudaSession, gpu: FakeGpu) -> None:
    rows = [request(prompt_of(5, seed), [1 + seed]) for seed in range(3)]
    for row in rows:
        feed(session, row)
    graph, launches = gpu.graphs[-1], gpu.library.fake_launches()
    before = len(graph.runs)
    decode(session, rows, 20)
    decode(session, rows, 20)
    assert graph.runs[before:] == [(4, 4)] * 3, "two warm-ups and the capture of the bucket of 4, once"
    assert gpu.library.fake_launches() == launches + 40
    assert gpu.live()["exec"] == 1
    assert session.steps == 40


def test_capture_all_captures_nothing_later(gpu: FakeGpu, tmp_path: Path) -> None:
    with open_session(gpu, tmp_path, capture="all") as session:
        assert gpu.live()["exec"] == 2 * len((1, 2, 4, 8, 12))
        row = request(prompt_of(5), [1])
        feed(session, row)
        runs = len(gpu.graphs[-1].runs)
        decode(session, [row], 3)
        assert len(gpu.graphs[-1].runs) == runs


def test_the_ring_goes_round(session: CudaSession) -> None:
    row = request(prompt_of(3), [1, 2])
    feed(session, row)
    for _ in range(5):
        decode(session, [row], RING - 1)
    assert row.output_ids == continuation(row.prompt_ids, 1 + 5 * (RING - 1), VOCAB)


def test_ids_beyond_the_tokenizer_are_never_chosen(gpu: FakeGpu, tmp_path: Path) -> None:
    with open_session(gpu, tmp_path, num_tokens=40) as session:
        row = request(prompt_of(7), [1])
        feed(session, row)
        decode(session, [row], 30)
        assert row.output_ids == continuation(row.prompt_ids, 31, VOCAB, 40)
        assert max(row.output_ids) < 40


# ---------------------------------------------------------------- sampling


def test_seeds_and_output_counts_reach_their_rows(session: CudaSession) -> None:
    """The fake op draws (seed + outputs) mod V for rows with a temperature."""
    rows = [
        request(prompt_of(4, 1), [1], seed=2**64 - 3, temperature=0.7),
        request(prompt_of(4, 2), [2], seed=5),
        request(prompt_of(4, 3), [3], seed=7, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1),
    ]
    for row in rows:
        feed(session, row)
    decode(session, rows, 5)
    decode(session, rows[1:], 2)
    assert rows[0].output_ids == [(2**64 - 3 + n) % 2**64 % VOCAB for n in range(6)]
    assert rows[1].output_ids == continuation(rows[1].prompt_ids, 8, VOCAB)
    assert rows[2].output_ids == [7 + n for n in range(8)]


def test_bias_and_min_tokens_change_logits_as_long_as_they_should(session: CudaSession) -> None:
    plain = continuation(prompt_of(6), 1, VOCAB)[0]
    biased = request(prompt_of(6), [1], logit_bias={50: 30.0})
    waiting = request(prompt_of(6), [2], min_tokens=2, stop_token_ids=(plain, *range(20)))
    for row in (biased, waiting):
        feed(session, row)
    decode(session, [waiting, biased], 4)
    assert biased.output_ids == [50] * 5
    assert waiting.output_ids[0] == plain + 1, "the peak is a stop token; the next logit is the second"
    tokens = [*waiting.prompt_ids, *waiting.output_ids[:2]]
    assert waiting.output_ids[2:] == continuation(tokens, 3, VOCAB)


def test_counts_follow_a_request_and_are_rebuilt_when_lost(session: CudaSession) -> None:
    """With a frequency penalty of 2 a peak of 1 never comes twice in the fake model: the second highest is chosen."""
    penalised = [request([seed + 20], [1 + seed], frequency_penalty=2.0) for seed in range(2)]
    plain = request([40], [3])
    for row in (*penalised, plain):
        feed(session, row)
    decode(session, [penalised[0], plain, penalised[1]], 3)
    built = penalised[0]
    decode(session, [plain, penalised[1]], 3)
    decode(session, [built, penalised[1]], 3)
    for row in penalised:
        expected: list[int] = []
        counts = np.zeros(VOCAB)
        for _ in row.output_ids:
            logits = np.zeros(VOCAB)
            peak = continuation([*row.prompt_ids, *expected], 1, VOCAB)[0]
            logits[peak] = 1
            logits[peak + 1 : peak + 2] = 0.5
            expected.append(int(np.argmax(logits - 2 * counts)))
            counts[expected[-1]] += 1
        assert row.output_ids == expected
    assert plain.output_ids == continuation(plain.prompt_ids, 7, VOCAB)


def test_log_probabilities_come_with_the_rows_that_asked(session: CudaSession) -> None:
    rows = [request(prompt_of(4, n), [n + 1], logprobs=wanted) for n, wanted in enumerate((None, 0, 20))]
    first = [feed(session, row) for row in rows]
    assert [result.logprobs[0] is None for result in first] == [True, False, False]
    (result,) = decode(session, rows, 1)
    none, chosen, top = result.logprobs
    assert none is None
    assert chosen is not None
    assert (chosen.logprob, chosen.top_ids.size) == (1.0, 0)
    assert top is not None
    token = int(result.token_ids[2])
    assert top.top_ids.tolist() == list(range(token, token + 18)), "-1 marks places that no token has"
    assert top.top_logprobs.tolist() == [-float(k) for k in range(18)]


def test_rows_without_a_largest_logit_are_named(session: CudaSession) -> None:
    broken = request([BROKEN, 20], [1])
    with pytest.raises(LogitsError, match="row 0") as caught:
        feed(session, broken)
    assert caught.value.rows == (0,)
    broken.output_ids.append(5)
    fine = request(prompt_of(4), [2])
    feed(session, fine)
    session.set_rows([fine, broken])
    number = session.launch_step()
    with pytest.raises(LogitsError) as caught:
        session.wait_step(number)
    assert caught.value.rows == (1,)
    session.set_rows([fine])
    assert session.wait_step(session.launch_step()).token_ids.tolist() == continuation(fine.prompt_ids, 2, VOCAB)[1:]


# ---------------------------------------------------------------- refusals


def test_calls_out_of_order_are_refused(session: CudaSession) -> None:
    with pytest.raises(UsageError, match="no rows"):
        session.launch_step()
    row = request(prompt_of(4), [1])
    with pytest.raises(UsageError, match="no output token"):
        session.set_rows([row])
    feed(session, row)
    for rows in ([], [row] * 13):
        with pytest.raises(UsageError, match="max_rows=12"):
            session.set_rows(rows)
    session.set_rows([row])
    first, second = session.launch_step(), session.launch_step()
    with pytest.raises(UsageError, match="two steps"):
        session.launch_step()
    with pytest.raises(UsageError, match="under way"):
        session.set_rows([row])
    for number in (second, second + 1):
        with pytest.raises(UsageError, match="wait in order"):
            session.wait_step(number)
    tokens = [int(session.wait_step(number).token_ids[0]) for number in (first, second)]
    assert tokens == continuation(row.prompt_ids, 3, VOCAB)[1:]


@pytest.mark.parametrize(
    ("blocks", "prompt", "text"),
    [
        ((), [20], "0 cache blocks"),
        ((0,), [20], "does not exist"),
        ((100_000,), [20], "does not exist"),
        ((1,), [VOCAB], "vocabulary"),
        ((1,), [-1], "vocabulary"),
        ((1,), [], "0 tokens"),
        ((1,), [20] * 33, "33 tokens"),
        (tuple(range(1, 7)), [20], "6 cache blocks"),
    ],
)
def test_a_prefill_that_cannot_be_is_refused(
    session: CudaSession, blocks: tuple[int, ...], prompt: list[int], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        session.prefill(request(prompt, blocks), np.array(prompt, np.int64), 0, is_last=True)


def test_positions_end_with_the_context(session: CudaSession) -> None:
    row = request([20] * 300, range(1, 6))
    with pytest.raises(CapacityError, match="max_length=300"):
        session.prefill(row, np.array([20, 20], np.int64), 299, is_last=True)


# ---------------------------------------------------------------- time


def test_a_step_costs_the_host_little(session: CudaSession) -> None:
    rows = [request(prompt_of(4, seed), [1 + seed]) for seed in range(12)]
    for row in rows:
        feed(session, row)
    best = float("inf")
    for _ in range(5):
        session.set_rows(rows)
        seconds, steps, fake = session.host_seconds, session.steps, 0.0
        for _ in range(20):
            started = time.perf_counter()
            session._cuda.graph_launch(session.graph, session._stream)  # the fake device works in the launch itself
            fake += time.perf_counter() - started
        session.set_rows(rows)
        for _ in range(20):
            session.wait_step(session.launch_step())
        best = min(best, (session.host_seconds - seconds - fake) / (session.steps - steps))
    assert best < 50e-6


def test_timing_gives_one_figure_a_step(session: CudaSession) -> None:
    assert session.time_decode(3, 70, 5) == [1.5] * 5
    assert session.time_prefill(70, 2) == [1.5] * 2
    with pytest.raises(UsageError, match="no rows"):
        session.launch_step()
    row = request(prompt_of(4), [1])
    feed(session, row)
    decode(session, [row], 2)
    assert row.output_ids == continuation(row.prompt_ids, 3, VOCAB)
    for call in (lambda: session.time_decode(0, 1, 1), lambda: session.time_decode(1, 1, 0)):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(CapacityError):
        session.time_decode(1, 300, 5)
    with pytest.raises(UsageError):
        session.time_prefill(5, 0)


def test_the_paged_engine_runs_requests_on_it(session: CudaSession) -> None:
    """More requests than rows, prompts of many chunks, ends at different times: each gets its own continuation."""
    tokenizer = byte_tokenizer()
    rng = np.random.default_rng(3)
    sizes = [(int(rng.integers(1, 120)), int(rng.integers(1, 60))) for _ in range(40)]
    requests = [
        Request(index, prompt_of(length, index), SamplingParams(temperature=0.0), count, tokenizer)
        for index, (length, count) in enumerate(sizes)
    ]
    engine = PagedEngine(session, VOCAB, 10)
    for _ in engine.run(requests):
        pass
    for request_, (_, count) in zip(requests, sizes, strict=True):
        found = list(request_.output().token_ids)
        assert found == continuation(request_.prompt_ids, count, VOCAB), request_.index


def test_plans_are_as_small_as_the_rows_allow(session: CudaSession) -> None:
    row = request(prompt_of(4), [1])
    feed(session, row)
    session.set_rows([row])
    assert session._plan == SamplePlan()


def test_logits_can_be_read_for_checks(session: CudaSession) -> None:
    rows = [request(prompt_of(4, seed), [1 + seed]) for seed in range(2)]
    for row in rows:
        feed(session, row)
        assert int(session.read_logits(1)[0].argmax()) == row.output_ids[0]
    session.set_rows(rows)
    tokens = session.wait_step(session.launch_step()).token_ids
    logits = session.read_logits(2)
    assert logits.shape == (2, VOCAB)
    assert logits.argmax(1).tolist() == tokens.tolist()
    with pytest.raises(UsageError, match="num_rows=13"):
        session.read_logits(13)
