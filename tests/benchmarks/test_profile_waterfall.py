"""The arithmetic of `qwen-rt profile`: time given out once, losses that add up, causes, overlap, the middle half."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_rt.benchmarks.profile.waterfall import CAUSES, TINY_US, Call, Step, make_waterfall, middle_half

QKV, ATTENTION, DOWN = "rmsnorm_qkv", "rope_kv_append_attention", "down_residual"


def step_of(begin_us: float, *calls: tuple[str, float, float]) -> Step:
    return Step(begin_us, tuple(Call(op, start, end, ((f"{op}_kernel", start, end),)) for op, start, end in calls))


def test_gaps_and_busy_time() -> None:
    step = step_of(0, ("embed", 4, 6), (QKV, 7, 17), (DOWN, 20, 50))
    assert step.shares() == [(4, 2), (1, 10), (3, 30)]
    assert step.end_us == 50
    fall = make_waterfall([step], {QKV: 8.0, DOWN: 25.0}, {QKV: 800.0, DOWN: 2500.0})
    assert (fall.step_us, fall.floor_us, fall.lost_us, fall.between_us) == (50, 33, 17, 4)
    assert [(op.op, op.calls, op.busy_us, op.gap_us, op.lost_us) for op in fall.ops] == [
        ("embed", 1, 2, 0, 2),
        (QKV, 1, 10, 1, 3),
        (DOWN, 1, 30, 3, 8),
    ]
    assert fall.causes == {"gap": 4, "latency": 2, "rate": 7, "attention": 0, "between_steps": 4}
    assert fall.ops[1].kernels == {f"{QKV}_kernel": (1, 10)}
    assert fall.ops[2].read_bytes == 2500


def test_an_op_that_begins_under_the_one_before_has_no_gap_and_only_what_it_adds() -> None:
    step = step_of(0, (QKV, 0, 10), (ATTENTION, 6, 13), (DOWN, 9, 12), ("lm_head", 14, 20))
    assert step.shares() == [(0, 10), (0, 3), (0, 0), (1, 6)]
    fall = make_waterfall([step], {ATTENTION: 5.0, DOWN: 2.0})
    by_op = {op.op: op for op in fall.ops}
    assert by_op[ATTENTION].kernel_us == 7
    assert (by_op[ATTENTION].excess_us, by_op[DOWN].lost_us) == (-2, -2)
    assert fall.causes["attention"] == -2
    assert sum(fall.causes.values()) == pytest.approx(fall.lost_us)


def test_what_ends_under_the_step_before_costs_nothing() -> None:
    assert step_of(100, ("embed", 95, 98), (QKV, 97, 110)).shares() == [(0, 0), (0, 10)]


def test_the_cause_of_an_op() -> None:
    step = step_of(0, (QKV, 0, 10), (DOWN, 10, 20), (ATTENTION, 20, 30))
    fall = make_waterfall([step], {QKV: TINY_US, DOWN: TINY_US - 0.1, ATTENTION: 9.0})
    assert [op.cause for op in fall.ops] == ["rate", "latency", "attention"]


def test_several_steps_are_averaged() -> None:
    first = step_of(0, (QKV, 2, 12), (QKV, 14, 24))
    second = step_of(24, (QKV, 25, 45), (QKV, 45, 65))
    fall = make_waterfall([first, second], {QKV: 10.0})
    (qkv,) = fall.ops
    assert (qkv.calls, qkv.busy_us, qkv.floor_us, qkv.gap_us) == (2, 30, 20, 1)
    assert (fall.step_us, fall.step_range_us, fall.num_steps, fall.between_us) == (32.5, (24, 41), 2, 1.5)


@pytest.mark.parametrize("seed", range(20))
def test_causes_add_up_to_the_step_less_its_floor(seed: int) -> None:
    """Whatever overlaps what: the sum is exact."""
    rng = np.random.default_rng(seed)
    ops = ["embed", QKV, ATTENTION, DOWN, "lm_head"]
    floors = {op: float(rng.uniform(0, 8)) for op in ops}
    steps, begin = [], 0.0
    for _ in range(6):
        starts = np.sort(begin + rng.uniform(-3, 100, 40))
        calls = [(str(rng.choice(ops)), float(at), float(at + rng.exponential(4))) for at in starts]
        steps.append(step_of(begin, *calls))
        begin = max(steps[-1].end_us, begin)
    for step in steps:
        assert sum(map(sum, step.shares())) == pytest.approx(max(step.end_us, step.begin_us) - step.begin_us)
    fall = make_waterfall(steps, floors)
    assert set(fall.causes) == set(CAUSES)
    assert sum(fall.causes.values()) == pytest.approx(fall.step_us - fall.floor_us)
    assert sum(op.lost_us for op in fall.ops) + fall.between_us == pytest.approx(fall.lost_us)
    assert sum(op.busy_us + op.gap_us for op in fall.ops) + fall.between_us == pytest.approx(fall.step_us)


def test_without_steps_or_calls() -> None:
    for steps in ([], [Step(0, ())]):
        with pytest.raises(ValueError, match="no steps"):
            make_waterfall(steps, {})


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (3, 3), (4, 2), (8, 4), (9, 5)])
def test_the_middle_half(count: int, kept: int) -> None:
    steps = [step_of(0, (QKV, 0, 10 + (7 * number) % count)) for number in range(count)]
    chosen = middle_half(steps)
    lengths = sorted(step.end_us for step in steps)
    quarter = count // 4
    assert len(chosen) == kept
    assert sorted(step.end_us for step in chosen) == lengths[quarter : count - quarter]
    assert [steps.index(step) for step in chosen] == sorted(steps.index(step) for step in chosen)
