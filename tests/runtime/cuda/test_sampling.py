"""What is sent for each row, byte by byte, and which slot counts whose tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import UsageError
from qwen_rt.runtime.cuda.counts import CountSlots, token_counts
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.sampling import MAX_EDITS, RowBuffers, SamplePlan, edits_of, plan_of, row_layout
from qwen_rt.runtime.sampling_params import SamplingParams

from .fake import FakeGpu, request

VOCAB = 100
ROWS, BLOCKS = 4, 3


@pytest.fixture
def resources(gpu: FakeGpu) -> Iterator[Resources]:
    resources = Resources(gpu.cuda)
    yield resources
    resources.close()


@pytest.fixture
def buffers(gpu: FakeGpu, resources: Resources) -> RowBuffers:
    layout = row_layout(ROWS, ROWS, BLOCKS)
    base, _ = resources.device(layout.nbytes)
    return RowBuffers(gpu.cuda, resources, layout, base, resources.stream(), advances=True)


def edits(buffers: RowBuffers, plan: SamplePlan) -> list[list[tuple[int, float, int]]]:
    """Read the edits back as the kernel would: three arrays [rows, width] behind each other."""
    count = ROWS * plan.num_edits
    raw = buffers.host["edits"].tobytes()
    parts = [
        np.frombuffer(raw, dtype, count, 4 * count * index).reshape(ROWS, -1)
        for index, dtype in enumerate((np.int32, np.float32, np.int32))
    ]
    return [
        [(int(i), float(v), int(u)) for i, v, u in zip(*(part[row] for part in parts), strict=True) if i >= 0]
        for row in range(ROWS)
    ]


def test_every_field_of_every_row_is_packed(buffers: RowBuffers) -> None:
    busy = request(
        [5, 6], [2, 1], seed=2**64 - 1, temperature=0.7, top_k=500, top_p=0.9, min_p=0.05,
        repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=-0.4,
    )  # fmt: skip
    busy.output_ids = [1, 2, 3]
    plain = request([5], [3], seed=9)
    plan = plan_of((busy, plain), VOCAB)
    buffers.write_rows((busy, plain), (7, -1), plan, VOCAB, BLOCKS)
    host = {name: array.tolist() for name, array in buffers.host.items()}
    assert host["num_outputs"] == [3, 0, 0, 0]
    assert buffers.host["seeds"].view(np.uint64).tolist() == [2**64 - 1, 9, 0, 0]
    assert host["temperature"] == pytest.approx([0.7, 0, 0, 0])
    assert host["top_k"] == [VOCAB, 0, 0, 0]
    assert host["top_p"] == pytest.approx([0.9, 1, 1, 1])
    assert host["min_p"] == pytest.approx([0.05, 0, 0, 0])
    assert host["penalties"][0] == pytest.approx([1.2, 0.3, -0.4])
    assert host["penalties"][1:] == [[1, 0, 0]] * 3
    assert host["count_slots"] == [7, -1, -1, -1]
    assert host["block_tables"] == [[2, 1, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert host["positions"] == [-1] * 4
    assert host["query_starts"] == [0, 1, 2, 3, 4]
    assert host["logits_indices"] == [0, 1, 2, 3]
    buffers.write_rows((), (), plan, VOCAB, BLOCKS)
    assert buffers.host["block_tables"].max() == 0
    assert buffers.host["count_slots"].tolist() == [-1] * 4


def test_narrow_block_tables_lie_at_the_start(buffers: RowBuffers) -> None:
    rows = (request([5], [2, 1]), request([5], [1]))
    buffers.write_rows(rows, (-1, -1), SamplePlan(), VOCAB, 2)
    assert buffers.host["block_tables"].ravel().tolist() == [2, 1, 1, 0, *[0] * (ROWS * BLOCKS - 4)]


def test_edits_are_packed_row_by_row(buffers: RowBuffers) -> None:
    biased = request([5], [1], logit_bias={8: 1.5, 3: -2.0})
    waiting = request([5], [2], min_tokens=4, stop_token_ids=(60, 50, VOCAB + 5))
    plain = request([5], [3])
    rows = (biased, plain, waiting)
    plan = plan_of(rows, VOCAB)
    assert plan == SamplePlan(full=True, num_edits=8)
    buffers.write_rows(rows, (-1,) * 3, plan, VOCAB, BLOCKS)
    always = 2**31 - 1
    expected = [[(8, 1.5, always), (3, -2.0, always)], [], [(50, -np.inf, 4), (60, -np.inf, 4)], []]
    assert edits(buffers, plan) == expected
    buffers.write_rows((plain,), (-1,), plan, VOCAB, BLOCKS)
    assert edits(buffers, plan) == [[]] * 4


def test_what_is_uploaded_is_what_was_written(gpu: FakeGpu, buffers: RowBuffers, resources: Resources) -> None:
    row = request([5], [1], logit_bias=dict.fromkeys(range(100), 1.0))
    plan = plan_of((row,), VOCAB)
    assert plan.num_edits == 128
    buffers.write_rows((row,), (-1,), plan, VOCAB, BLOCKS)
    buffers.upload(plan)
    buffers.wait_upload()
    back = resources.pinned(8 << 10)
    stream = resources.stream()
    for name, array in buffers.host.items():
        nbytes = 12 * ROWS * 128 if name == "edits" else array.nbytes
        gpu.cuda.copy(back.host, buffers.device[name], nbytes, stream)
        assert back.array(np.uint8, (nbytes,)).tobytes() == array.tobytes()[:nbytes], name


@pytest.mark.parametrize(
    ("params", "plan"),
    [
        ({}, SamplePlan()),
        ({"temperature": 1e-6}, SamplePlan()),
        ({"min_tokens": 3}, SamplePlan()),
        ({"stop_token_ids": (3,)}, SamplePlan()),
        ({"temperature": 0.5}, SamplePlan(full=True)),
        ({"logprobs": 0}, SamplePlan(full=True, logprobs=True)),
        ({"presence_penalty": 0.5}, SamplePlan(full=True, counts=True)),
        ({"repetition_penalty": 0.9}, SamplePlan(full=True, counts=True)),
        ({"logit_bias": {1: 0.5}}, SamplePlan(full=True, num_edits=8)),
        ({"logit_bias": dict.fromkeys(range(9), 0.5)}, SamplePlan(full=True, num_edits=32)),
        ({"logit_bias": dict.fromkeys(range(MAX_EDITS), 0.5)}, SamplePlan(full=True, num_edits=MAX_EDITS)),
    ],
)
def test_plans_take_no_more_than_the_settings_need(params: dict[str, Any], plan: SamplePlan) -> None:
    plain = request([1], [1])
    assert plan_of((plain, request([1], [1], **params)), 10_000) == plan
    assert plan_of((plain,), 10_000) == SamplePlan()


def test_too_many_edits_are_refused_with_the_number() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(500), 1.0), min_tokens=1, stop_token_ids=tuple(range(20)))
    with pytest.raises(UsageError, match="name 520 tokens; expected at most 512"):
        edits_of(params, 10_000)
    assert len(edits_of(params, 12)) == 512, "stop tokens beyond the tokenizer need no edit"


# ---------------------------------------------------------------- counts


def test_counts_mark_the_prompt_and_count_the_output() -> None:
    counts = token_counts([3, 3, 5], [5, 7, 7], 10)
    assert counts.dtype == np.int32
    assert counts.view(np.uint32).tolist() == [0, 0, 0, 2**31, 0, 2**31 + 1, 0, 2, 0, 0]


@pytest.fixture
def slots(gpu: FakeGpu, resources: Resources) -> CountSlots:
    return CountSlots(gpu.cuda, lambda size: resources.device(size)[0], resources, resources.stream(), 3, VOCAB)


def content(gpu: FakeGpu, resources: Resources, slots: CountSlots, slot: int) -> list[int]:
    assert slots.device is not None
    back = resources.pinned(4 * VOCAB)
    gpu.cuda.copy(back.host, slots.device[0] + 4 * VOCAB * slot, 4 * VOCAB, resources.stream())
    return back.array(np.int32, (VOCAB,)).tolist()


def test_memory_is_taken_for_the_first_request_with_penalties(slots: CountSlots) -> None:
    assert slots.assign([request([1], [1])]) == [-1]
    assert slots.assign_prefill(request([1], [1])) == -1
    assert slots.device is None
    slots.assign_prefill(request([1], [1], presence_penalty=1.0))
    assert slots.device is not None
    assert slots.device[1] == 3


def test_a_request_keeps_its_slot_and_is_rebuilt_only_when_it_must(
    gpu: FakeGpu, resources: Resources, slots: CountSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = CountSlots._build
    monkeypatch.setattr(CountSlots, "_build", lambda self, slot: (built.append(slot.row), real(self, slot)))
    first, second = (request([token], [1], presence_penalty=1.0) for token in (1, 2))
    mine = slots.assign_prefill(first)
    slots.count_prefill(first)
    first.output_ids.append(9)
    other = slots.assign_prefill(second)
    slots.count_prefill(second)
    second.output_ids.append(9)
    assert mine != other
    assert slots.assign([second, first]) == [other, mine]
    slots.count_step()
    first.output_ids.append(4)
    second.output_ids.append(4)
    assert slots.assign([first, second]) == [mine, other]
    assert len(built) == 2, "once each, at the prefill"
    assert slots.assign([first]) == [mine]
    second.output_ids.append(5)
    (again, _) = slots.assign([second, first])
    assert len(built) == 3, "its slot was given up, and it has gone on"
    assert content(gpu, resources, slots, again) == token_counts([2], [9, 4, 5], VOCAB).tolist()
    first.output_ids.append(8)  # a token that the device has not counted
    slots.assign([first, second])
    assert built[3:] == [first]


def test_more_prefills_than_slots_take_the_oldest_that_does_not_run(slots: CountSlots) -> None:
    rows = [request([token], [1], presence_penalty=1.0) for token in range(6)]
    (running,) = (slots.assign_prefill(rows[0]),)
    slots.count_prefill(rows[0])
    rows[0].output_ids.append(1)
    assert slots.assign(rows[:1]) == [running]
    indices = [slots.assign_prefill(row) for row in rows[1:]]
    assert running not in indices
    assert indices[0] == indices[2] != indices[1]
    assert len(set(slots.assign(rows[3:]))) == 3
