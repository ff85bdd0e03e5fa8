"""Attention over a quantized cache on the GPU: decode and prefill against float64, what is stored, what is not read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from qwen_rt.errors import QwenRtError, UnsupportedModelError
from qwen_rt.quantization import KV_FORMATS

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
from qwen_rt.benchmarks.quantized_cache import random_cache  # noqa: E402

from .attention_kit import OP, Paged, bits_of, check_stored  # noqa: E402
from .gpu_kit import check, nan_bf16  # noqa: E402

HEADS = {
    "0.5b": (14, 2, 64),
    "1.5b": (12, 2, 128),
    "7b": (28, 4, 128),
    "14b": (40, 8, 128),
    "72b": (64, 8, 128),
    "nano": (4, 2, 128),
}
RAGGED = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 300, 513, 1000, 2047, 2048, 4097, 0, 5000]
PREFILL_HUGE = 2**-4
"""Relative error of a prefill with offsets of 300 in 8 dims. It attends over keys in f16, where such an element errs by
0.25 / sqrt(12) = 0.07. With a query of about 1.2 that is 0.07 · 1.2 · sqrt(8 / 64) = 0.03 of a score, another for each
token, so as much of each probability and of a sum over few of them. Twice that; bf16 would err by 0.25."""


# ---------------------------------------------------------------- decode steps


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("block_size", [16, 64, 48])
@pytest.mark.parametrize("model", HEADS)
def test_decode_ragged(call: OpCaller, model: str, block_size: int, kv_format: str) -> None:
    case = Paged(HEADS[model], [length - 1 for length in RAGGED], kv_format=kv_format, block_size=block_size)
    before = case.cache.clone()
    reference, *news = case.reference()
    out = case.run(call)
    for row, length in enumerate(RAGGED):
        if length == 0:
            assert not out[row].any(), "an idle row is not zero"
        else:
            check(OP, out[row], reference[row])
    check_stored(case, (news[0], news[1]), before)
    assert call.counters_are_zero()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16])
def test_decode_groups(call: OpCaller, group: int, head_dim: int, kv_format: str) -> None:
    case = Paged((2 * group, 2, head_dim), [700, 5, 9000], kv_format=kv_format)
    reference, *_ = case.reference()
    check(OP, case.run(call), reference)


@pytest.mark.parametrize("offset", [0.0, 100.0, 300.0])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_decode_with_huge_offsets(call: OpCaller, model: str, kv_format: str, offset: float) -> None:
    """Offsets are added to bf16 outputs, whose rounding hides the rest: so they are zero for values, and then alone."""
    case = Paged(HEADS[model], [40, 1000, 5000, 30000], kv_format=kv_format, offset=offset)
    keys_only = dataclasses.replace(case.cache, value_offset=None)
    values_only = dataclasses.replace(case.cache.clone(), key_offset=None)
    for cache in (keys_only, values_only):
        case.cache = cache
        reference, *_ = case.reference()
        check(OP, case.run(call), reference)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_decode_with_huge_offsets_in_few_dims(call: OpCaller, model: str, kv_format: str) -> None:
    """As in released models: some parts of a head need all products of the offset, others one."""
    case = Paged(HEADS[model], [40, 1000, 5000, 30000], kv_format=kv_format, offset=1.0)
    case.cache = dataclasses.replace(case.cache, value_offset=None)
    case.cache.key_offset[:, -8:] *= 300
    reference, *_ = case.reference()
    check(OP, case.run(call), reference)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_decode_128k_tokens(call: OpCaller, kv_format: str) -> None:
    case = Paged(HEADS["7b"], [131071, 131070], kv_format=kv_format)
    check(OP, case.run(call), case.reference()[0])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("size", [0.0, 2.0**-130, 2.0**-60, 2.0**60])
def test_decode_vectors_of_any_size(call: OpCaller, kv_format: str, size: float) -> None:
    """All values of one size, some zero; keys of zero, whose scale is zero."""
    case = Paged(HEADS["nano"], [70, 0, 600], kv_format=kv_format, offset=0.0)
    width = case.kv_heads * case.head_dim
    case.qkv[:, -width:] *= size
    case.qkv[:, -2 * width : -width] = 0
    case.cache.key_scales[:, :, ::3] *= 0
    case.cache.value_scales.mul_(size)
    reference, *_ = case.reference()
    out = case.run(call)
    blocks, places = case.slots()
    assert not case.cache.key_scales[blocks, :, places].any()
    assert not case.cache.keys.float()[blocks, :, places].any()
    if size == 0:
        assert not out.any()
    elif size > 2**-126:
        check(OP, out / size, reference / size)
    assert out.isfinite().all()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_decode_values_of_very_different_sizes(call: OpCaller, kv_format: str) -> None:
    """The scale that weights are held against grows from token to token, and most of them are far below the largest."""
    case = Paged(HEADS["7b"], [3000], kv_format=kv_format, offset=0.0)
    sizes = torch.logspace(-12, 0, 64, base=2.0, device="cuda")
    case.cache.value_scales.mul_(sizes)
    check(OP, case.run(call), case.reference()[0])


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_numbers_that_are_not_finite_show(call: OpCaller, kv_format: str, what: str) -> None:
    case = Paged(HEADS["7b"], [500, 500], kv_format=kv_format)
    width = case.kv_heads * case.head_dim
    case.qkv[0, (-2 if what == "k" else -1) * width + 5] = float("nan")
    out = case.run(call).view(2, case.kv_heads, -1)
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_decode_does_not_depend_on_batch_mates(call: OpCaller, kv_format: str) -> None:
    lengths = [700, 33, 6000, 256, 4000, *range(100, 100 + 59)]
    for model in ("0.5b", "7b"):
        case = Paged(HEADS[model], [length - 1 for length in lengths], kv_format=kv_format)
        together = case.run(call)
        for row, length in enumerate(lengths[:6]):
            alone = case.run(call, slice(row, row + 1), slice(row, row + 1), max_length=length)
            assert torch.equal(alone[0], together[row]), length
            assert torch.equal(case.run(call, slice(0, row + 1), slice(0, row + 1))[row], together[row]), length


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_position_beyond_the_table(call: OpCaller, kv_format: str) -> None:
    case = Paged(HEADS["1.5b"], [127, 0], kv_format=kv_format)
    case.tables = case.tables[:, :2].contiguous()  # the first row's last token is the cache's last
    before = case.cache.clone()
    out = case.run(call)
    check(OP, out[0], case.reference()[0][0])
    case.positions[0] += 1
    case.cache = before.clone()
    out = case.run(call)
    assert out[0].isnan().all(), "a position beyond the cache must not pass unnoticed"
    assert out[1].isfinite().all()
    blocks, places = case.tables[1:, 0].long(), torch.zeros(1, dtype=torch.long, device="cuda")
    for after, old in zip(bits_of(case.cache), bits_of(before), strict=True):
        after[blocks, :, places] = old[blocks, :, places]
        assert torch.equal(after, old)


# ---------------------------------------------------------------- prefills

LENGTHS = {
    "two": ([0], [2]),
    "a tile and one": ([0], [129]),
    "behind earlier tokens": ([77], [200]),
    "ragged": ([0, 64, 100, 3], [5, 130, 1, 300]),
    "many tiles": ([513], [1000]),
}


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("model", HEADS)
def test_prefill(call: OpCaller, model: str, lengths: str, kv_format: str) -> None:
    case = Paged(HEADS[model], *LENGTHS[lengths], kv_format=kv_format)
    before = case.cache.clone()
    reference, *news = case.reference()
    out = case.run(call)
    check(OP, out, reference)
    check_stored(case, (news[0], news[1]), before)
    assert torch.equal(out, case.run(call)), "a second run differs"
    assert call.counters_are_zero()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_prefill_blocks_of_any_size(call: OpCaller, model: str, block_size: int, kv_format: str) -> None:
    case = Paged(HEADS[model], *LENGTHS["ragged"], kv_format=kv_format, block_size=block_size)
    check(OP, case.run(call), case.reference()[0])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_prefill_with_huge_offsets(call: OpCaller, model: str, kv_format: str) -> None:
    case = Paged(HEADS[model], *LENGTHS["ragged"], kv_format=kv_format, offset=1.0)
    case.cache.key_offset[:, -8:] *= 300  # in dims that turn slowly, as in released models
    reference, *_ = case.reference()
    error = case.run(call).double() - reference
    assert float(error.norm() / reference.norm()) < PREFILL_HUGE


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_prefill_batch_mates_do_not_change_a_bit(call: OpCaller, kv_format: str) -> None:
    case = Paged(HEADS["7b"], *LENGTHS["ragged"], kv_format=kv_format)
    together = case.run(call)
    assert torch.equal(together[5:135], case.run(call, rows=slice(5, 135), sequences=slice(1, 2)))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_chunks_then_decode_equal_one_call(call: OpCaller, kv_format: str) -> None:
    """What prefills cache does not depend on how the prompt was cut, bit for bit; decode steps are another kernel."""
    whole = Paged(HEADS["7b"], [0], [601], kv_format=kv_format)
    parts = Paged(HEADS["7b"], [0], [601], kv_format=kv_format)
    parts.qkv, parts.tables, parts.cache = whole.qkv, whole.tables, whole.cache.clone()
    reference, *_ = whole.reference()
    at_once = whole.run(call)
    outs = []
    for first, last in ((0, 200), (200, 201), (201, 600), (600, 601)):  # two of them are decode steps
        parts.query_starts = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
        outs.append(parts.run(call, rows=slice(first, last)))
    check(OP, torch.cat(outs), reference)
    torch.testing.assert_close(torch.cat(outs).float(), at_once.float(), rtol=2**-6, atol=2**-7)
    steps = torch.tensor([200, 600], device="cuda")
    blocks, places = whole.tables[0, steps // 64].long(), steps % 64
    for one, many in zip(bits_of(whole.cache), bits_of(parts.cache), strict=True):
        one[blocks, :, places] = many[blocks, :, places]
        assert torch.equal(one, many)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_prefill_of_idle_and_overlong_sequences(call: OpCaller, kv_format: str) -> None:
    case = Paged(HEADS["nano"], [0, 0, 0], [40, 70, 30], kv_format=kv_format)
    case.positions[40:110] += case.tables.shape[1] * 64
    case.positions[110:] = -1
    out = case.run(call)
    assert out[:40].isfinite().all()
    assert out[40:110].isnan().all()
    assert not out[110:].any()


# ---------------------------------------------------------------- refusals


def test_what_is_unsupported_is_refused(call: OpCaller) -> None:
    case = Paged((2, 1, 96), [5], kv_format="fp8")
    with pytest.raises(UnsupportedModelError, match="head_dim=96; expected 64 or 128"):
        case.run(call)
    case = Paged(HEADS["nano"], [5], kv_format="fp8", block_size=24)
    with pytest.raises(UnsupportedModelError, match="block_size=24; expected a multiple of 16"):
        case.run(call)
    case = Paged((34, 2, 64), [5], kv_format="int8")
    with pytest.raises(UnsupportedModelError, match="at most 16 times"):
        case.run(call)


def test_caches_that_do_not_fit_their_format_are_refused(call: OpCaller) -> None:
    case = Paged(HEADS["nano"], [5], kv_format="int8")
    tensors: dict[str, Any] = {
        "qkv": case.qkv,
        "positions": case.positions,
        "query_starts": case.query_starts,
        "inv_freq": case.inv_freq,
        "block_tables": case.tables,
        "out": nan_bf16(1, case.heads * case.head_dim),
    }
    quantized = case.cache.tensors()
    plain = random_cache("bf16", len(case.cache.keys), case.kv_heads, case.block_size, case.head_dim).tensors()
    refusals: list[tuple[dict[str, Any], float, str]] = [
        (quantized, 3, "kv_format=3; expected 0"),
        (quantized, 0, "kv_format=0 and given scales"),
        (plain, 2, "kv_format=2 and no scales"),
        (quantized | {"v_scales": None}, 1, "kv_format=1 and no scales"),
        (plain | {"k_offset": quantized["k_offset"]}, 0, "kv_format=0 and an offset"),
        (quantized | {"present_k_scales": case.cache.value_scales}, 2, "present_k_scales is another buffer"),
    ]
    for given, kv_format, message in refusals:
        with pytest.raises(QwenRtError, match=message):
            call(OP, tensors | given, scale=1.0, kv_format=kv_format)
