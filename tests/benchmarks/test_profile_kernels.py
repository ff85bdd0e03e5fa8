"""From records of kernels to ops: names, order in a step, several kernels an op, records that are missing."""

from __future__ import annotations

import itertools

import pytest

from qwen_rt.benchmarks.profile import kernels
from qwen_rt.benchmarks.profile.cupti import Activity
from qwen_rt.benchmarks.profile.gpu_steps import HostSpan, Prefixes
from qwen_rt.benchmarks.profile.kernels import demangle, letter_of, ops_of_kernels, ops_of_step, short_name
from qwen_rt.benchmarks.profile.on_cuda import calls_of, cuts_of, decode_steps, prefill_steps, prefix_step
from qwen_rt.benchmarks.profile.waterfall import make_waterfall
from qwen_rt.errors import QwenRtError
from qwen_rt.ops import OPS

from . import profile_kit as kit


def test_every_op_of_the_table_has_kernels() -> None:
    assert set(kernels._PATTERNS) == {op.name for op in OPS}
    assert set(ops_of_step(2)) == {op.name for op in OPS}


def test_ops_of_a_step() -> None:
    ops = ops_of_step(3)
    assert len(ops) == 3 * 5 + 3
    assert (ops.count("o_proj_residual"), ops.count("select_o_proj_residual")) == (2, 1)
    assert ops_of_step(3, samples=False) == ops[:-1]


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        (kit.EMBED, "e"),
        (kit.skinny(True), "S"),
        (kit.skinny(False), "s"),
        (kit.ATTENTION, "a"),
        (kit.APPEND, "a"),
        (kit.OVER_CACHE, "a"),
        ("_ZN7qwen_rt23dequantize_cache_kernelILNS_8KvFormatE1ELi128EEEvNS_14Prefill8ParamsE", "a"),
        (kit.NORM, "n"),
        (kit.ROUND, "q"),
        (kit.SLAB, "d"),
        (kit.REORDER, "r"),
        (kit.GATHER, "g"),
        (kit.GATE, "u"),
        (kit.LIBRARY, "m"),
        ("_ZN7cutlass13device_kernelINS_4gemm6kernelEEEvT_", "m"),
        ("_ZN8cublasLt19splitKreduce_kernelILi32EEEvv", "m"),
        (kit.GREEDY, "p"),
        ("_ZN7qwen_rt13choose_kernelENS_12SampleParamsEi", "p"),
        ("copy", None),
        ("fill", None),
        ("_ZN7qwen_rt11read_kernelEPK5uint4lPj", None),
        ("_ZN4cuda3elseEv", None),
    ],
)
def test_letters(name: str, letter: str | None) -> None:
    assert letter_of(name) == letter


def test_the_letters_of_the_sources() -> None:
    """Every kernel that the plugins have is known, but for those that no step runs."""
    import re
    from pathlib import Path

    sources = Path(kernels.__file__).resolve().parents[2] / "plugins" / "csrc"
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(sources.rglob("*.cu*")))
    names = set(
        re.findall(r"__global__ void(?:\s+__launch_bounds__\([^;{]*?\))?\s+(\w+)\(const|\b(\w+_kernel)\(", text)
    )
    found = {name for pair in names for name in pair if name} - {"device_kernel"}
    assert found >= {"embed_kernel", "greedy_kernel", "attention_decode_kernel"}
    assert {name for name in found if letter_of(f"_ZN7qwen_rt{len(name)}{name}Ev") is None} <= {
        "read_kernel",
        "fill_random_kernel",
    }


@pytest.mark.parametrize("layers", [1, 2, 28, 80])
@pytest.mark.parametrize(
    "of_op",
    [kit.DECODE, kit.PREFILL, kit.FP8_ROW, kit.FP8_ROWS, kit.INT8_ROWS, kit.INT4_ROW, kit.INT8_PREFILL],
    ids=["decode", "prefill", "fp8-row", "fp8-rows", "int8-rows", "int4-row", "int8-prefill"],
)
def test_kernels_find_their_ops(layers: int, of_op: dict[str, list[str]]) -> None:
    ops = ops_of_step(layers)
    names = [name for op in ops for name in of_op[op]]
    expected = [place for place, op in enumerate(ops) for _ in of_op[op]]
    assert ops_of_kernels(names, ops) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rmsnorm_qkv": [kit.REORDER, kit.skinny(True)], "rmsnorm_gate_up_silu": [kit.REORDER, kit.skinny(True)]},
        {op: [*names, *names] for op, names in kit.DECODE.items() if "skinny" in names[0]},
        {"down_residual": [kit.REORDER, kit.skinny(False)], "sample": [kit.GREEDY, kit.GREEDY]},
    ],
)
def test_quantized_steps(changes: dict[str, list[str]]) -> None:
    """Columns in another order, and 64 rows in two launches."""
    ops, of_op = ops_of_step(4), kit.DECODE | changes
    names = [name for op in ops for name in of_op[op]]
    assert ops_of_kernels(names, ops) == [place for place, op in enumerate(ops) for _ in of_op[op]]


def test_a_quantized_prefill_with_slabs() -> None:
    of_op = kit.PREFILL | {
        "rmsnorm_qkv": [kit.NORM, *[kit.SLAB, kit.LIBRARY] * 3],
        "o_proj_residual": [kit.ROUND, kit.LIBRARY],
        "rmsnorm_gate_up_silu": [kit.NORM, *[kit.SLAB, kit.LIBRARY, kit.LIBRARY] * 2, kit.GATE],
        "down_residual": [kit.SLAB, kit.LIBRARY, kit.SLAB, kit.LIBRARY],
    }
    ops = ops_of_step(6)
    names = [name for op in ops for name in of_op[op]]
    assert ops_of_kernels(names, ops) == [place for place, op in enumerate(ops) for _ in of_op[op]]


def test_copies_are_of_no_op() -> None:
    ops = ops_of_step(1)
    names = ["copy", *(name for op in ops for name in kit.DECODE[op]), "fill"]
    assert ops_of_kernels(names, ops) == [None, *range(len(ops)), None]


def test_missing_kernels_are_noticed() -> None:
    ops = ops_of_step(2)
    names = [name for op in ops for name in kit.DECODE[op]]
    for index in range(len(names)):
        assert ops_of_kernels(names[:index] + names[index + 1 :], ops) is None


# ---------------------------------------------------------------- steps


def test_decode_steps() -> None:
    steps, lost = decode_steps(kit.steps(6, 2), 2)
    assert (len(steps), lost) == (4, 0)  # the first two warm up
    for step in steps:
        assert [call.op for call in step.calls] == list(ops_of_step(2))
        assert step.shares()[0] == pytest.approx((5.0, 10.0))
        assert all(share == pytest.approx((1.0, 10.0)) for share in step.shares()[1:])
    for before, after in itertools.pairwise(steps):
        assert after.begin_us == before.end_us


def test_overlapping_kernels() -> None:
    steps, _ = decode_steps(kit.steps(4, 2, apart_us=-4.0), 2)
    assert all(share == pytest.approx((0.0, 6.0)) for share in steps[0].shares()[1:])


def test_steps_with_missing_records_are_left_out() -> None:
    each = len(ops_of_step(2))
    records = kit.without(kit.steps(8, 2), 4 * each + 3)
    steps, lost = decode_steps(records, 2)
    assert lost == 1
    assert len(steps) == 4  # 2 and 3, 6 and 7: what follows the incomplete one has no beginning
    records = kit.without(kit.steps(8, 2), *range(4 * each, 4 * each + 1))  # without `embed`: two steps in one
    steps, lost = decode_steps(records, 2)
    assert (len(steps), lost) == (3, 1)
    assert decode_steps([], 2) == ([], 0)


def test_copies_within_and_before_a_step() -> None:
    records = kit.steps(4, 1)
    each = len(ops_of_step(1))
    late = records[3 * each - 1].end_ns
    records.insert(3 * each, Activity("copy", late + 500, late + 700, 7))
    steps, lost = decode_steps(sorted(records, key=lambda one: one.start_ns), 1)
    assert lost == 0 or steps  # a step with a copy is unlike the others
    calls = calls_of([*kit.step(10, 1), Activity("fill", 999_000, 999_500, 9)], ops_of_step(1))
    assert calls is not None
    assert calls[-1].op == "other"


def chunked(start_us: float) -> list[Activity]:
    """A prefill in two chunks, each behind a copy."""
    first = kit.step(start_us, 2, kit.PREFILL, samples=False)
    second = kit.step(start_us + 1900, 2, kit.PREFILL)
    copies = [Activity("copy", one[0].start_ns - 10_000, one[0].start_ns - 9_000, 7) for one in (first, second)]
    return sorted([*first, *second, *copies], key=lambda one: one.start_ns)


def test_prefills_in_chunks() -> None:
    warm_up, one, other = chunked(100), chunked(10_100), chunked(20_100)
    host = [
        HostSpan("prefill", 1000 * start, 1000 * end)
        for start, end in ((10_060, 10_070), (10_070, 14_000), (20_050, 20_070), (20_071, 24_000))
    ]
    steps = prefill_steps([*warm_up, *one, *other], host, 2, 2)
    assert [step.begin_us for step in steps] == [10_060.0, 20_050.0]
    step = steps[0]
    assert [call.op for call in step.calls] == ["other", *ops_of_step(2)[:-1], "other", *ops_of_step(2)]
    assert [name for name, _, _ in step.calls[2].kernels] == ["row_kernel<2, true, false>", kit.LIBRARY]
    fall = make_waterfall([step], {}, order=("embed", "rmsnorm_qkv"))
    assert fall.between_us == pytest.approx(30 + 9)  # before the copy, and from there to `embed`
    assert [op.op for op in fall.ops][:3] == ["embed", "rmsnorm_qkv", "other"]
    assert sum(fall.causes.values()) == pytest.approx(fall.lost_us)
    assert len(prefill_steps([*one, *kit.without(other, 6)], host, 2, 2)) == 1
    assert len(prefill_steps(one, host, 2, 2)) == 1
    assert prefill_steps([], [], 2, 2) == []


def test_cuts_and_what_each_op_adds() -> None:
    of_op = kit.DECODE | {"rmsnorm_qkv": [kit.REORDER, kit.skinny(True)]}
    names = [name for op in ops_of_step(2) for name in of_op[op]]
    cuts = cuts_of(names, 2)
    assert cuts == [1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]
    us = tuple(3.0 + 10 * index for index in range(len(cuts)))
    step = prefix_step(Prefixes(tuple(names), us), 2, period_us=us[-1] + 2.0)
    assert step.shares()[0] == (2.0, 3.0)
    assert all(share == (0.0, 10.0) for share in step.shares()[1:])
    assert step.end_us - step.begin_us == us[-1] + 2.0
    with pytest.raises(QwenRtError, match="14 kernels are not those of 2 layers"):
        cuts_of(names[:-1], 2)


def test_an_op_that_adds_nothing() -> None:
    step = prefix_step(Prefixes((), (3.0, 2.5, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0)), 1, period_us=9.0)
    assert [busy for _, busy in step.shares()] == [3.0, 0.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert step.begin_us == 0.0


def test_names() -> None:
    assert short_name(kit.skinny(True)) == "skinny_gemm"
    assert short_name(kit.NORM) == "row_kernel"
    assert demangle(kit.LIBRARY) == short_name(kit.LIBRARY) == kit.LIBRARY
    assert demangle("_Zbroken") == "_Zbroken"
    assert "skinny_gemm<" in demangle(kit.skinny(False))
