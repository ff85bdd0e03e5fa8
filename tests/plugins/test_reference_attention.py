"""Attention over a quantized cache: against the formula on dense arrays, and what is stored, read and refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.ops import BLOCK_SIZE, KV_CACHE_FORMATS
from qwen_rt.plugins import reference
from qwen_rt.plugins.reference_attention import quantize_kv, rope_kv_append_attention
from qwen_rt.plugins.reference_rounding import round_bf16
from qwen_rt.quantization import KV_FORMATS, KV_LARGEST, decode_fp8, fake_quantize_kv, round_fp8
from qwen_rt.rope import RopeSpec

F64 = NDArray[np.float64]

HEADS, KV_HEADS, HEAD_DIM, SCALING = 4, 2, 32, 1.25
Q_WIDTH, KV_WIDTH = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SCALE, INV_FREQ = HEAD_DIM**-0.5, RopeSpec(theta=1e4).inv_freq(HEAD_DIM)
DTYPES: dict[str, Any] = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
NUM_TOKENS = 70


def offsets_of(size: float, seed: int = 1) -> dict[str, F64]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((KV_HEADS, HEAD_DIM)) * size for name in ("k_offset", "v_offset")}


def empty_cache(kv_format: str, num_blocks: int = 7) -> dict[str, NDArray[Any]]:
    """Pools and scales that hold no number, or in int8 the largest there is."""
    shape = (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    filling = -128 if kv_format == "int8" else np.nan
    pools = {name: np.full(shape, filling, DTYPES[kv_format]) for name in ("k_cache", "v_cache")}
    return pools | {name: np.full(shape[:3], np.nan, np.float32) for name in ("k_scales", "v_scales")}


class Paged:
    """Two sequences on scattered blocks of one pool."""

    tables = np.array([[4, 2, 99], [5, 1, -7]])

    def __init__(self, kv_format: str, offsets: dict[str, F64] | None = None, bf16: bool = False) -> None:
        self.kv_format, self.offsets, self.bf16 = kv_format, offsets or {}, bf16
        self.cache = empty_cache(kv_format)

    def call(self, chunks: list[tuple[int, F64, int]]) -> F64:
        """Feed (sequence, qkv, first position): outputs of all rows, [rows, q_width]."""
        starts = np.cumsum([0, *(len(qkv) for _, qkv, _ in chunks)])
        out, *written = rope_kv_append_attention(
            np.concatenate([qkv for _, qkv, _ in chunks]),
            np.concatenate([start + np.arange(len(qkv)) for _, qkv, start in chunks]),
            starts,
            INV_FREQ,
            self.tables[[sequence for sequence, _, _ in chunks]],
            **self.cache,
            **self.offsets,
            scale=SCALE,
            rope_scaling=SCALING,
            kv_format=KV_CACHE_FORMATS[self.kv_format],
            bf16=self.bf16,
        )
        self.cache = dict(zip(self.cache, written, strict=True))
        return out

    def numbers(self, letter: str, sequence: int, count: int) -> F64:
        """Stored numbers times their scales, [Hkv, count, D]."""
        pool, scales = (self.cache[f"{letter}_{kind}"][self.tables[sequence, :2]] for kind in ("cache", "scales"))
        values = decode_fp8(pool.view(np.uint8)) if self.kv_format == "fp8" else pool
        whole = values.astype(np.float64) * scales[..., None]
        return whole.swapaxes(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)[:, :count]


def rows_of(num_rows: int, seed: int = 0) -> F64:
    return np.random.default_rng(seed).standard_normal((num_rows, Q_WIDTH + 2 * KV_WIDTH))


def heads(flat: F64) -> F64:
    return flat.reshape(len(flat), -1, HEAD_DIM).swapaxes(0, 1)


def turn(x: F64) -> F64:
    """`R(position) x` of [heads, S, D], from position 0."""
    return reference.apply_rotary(x[None], *reference.rotary_tables(np.arange(x.shape[1])[None], INV_FREQ, SCALING))[0]


def split(qkv: F64) -> tuple[F64, F64, F64]:
    q, k, v = np.split(qkv, (Q_WIDTH, Q_WIDTH + KV_WIDTH), axis=-1)
    return turn(heads(q)), turn(heads(k)), heads(v)


def turned_offset(offset: F64, count: int) -> F64:
    return turn(np.repeat(offset[:, None], count, axis=1))


def attend(query: F64, keys: F64, values: F64) -> F64:
    """Dense attention from position 0, [S, q_width]."""
    attended = reference.attention(query[None], keys[None], values[None], [0], SCALE)[0]
    return attended.swapaxes(0, 1).reshape(query.shape[1], -1)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("with_offsets", [True, False])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_it_is_attention_over_rounded_keys_and_values(kv_format: str, with_offsets: bool) -> None:
    """Chunk by chunk across the end of a block, then a decode step, against the whole text at once."""
    texts = [rows_of(NUM_TOKENS, seed) for seed in (0, 1)]
    paged = Paged(kv_format, offsets_of(50.0) if with_offsets else None)
    expected = []
    for qkv in texts:
        query, key, value = split(qkv)
        keys, values = fake_quantize_kv(key, kv_format), fake_quantize_kv(value, kv_format)
        if with_offsets:
            keys = keys + turned_offset(paged.offsets["k_offset"], NUM_TOKENS)
            values = values + paged.offsets["v_offset"][:, None]
        expected.append(attend(query, keys, values))
    for parts in ([(0, 50), (0, 3)], [(50, 69), (3, 69)], [(69, 70), (69, 70)]):
        found = paged.call([(b, texts[b][start:stop], start) for b, (start, stop) in enumerate(parts)])
        wanted = np.concatenate([expected[b][start:stop] for b, (start, stop) in enumerate(parts)])
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    for sequence, qkv in enumerate(texts):
        _, key, value = split(qkv)
        for letter, x in (("k", key), ("v", value)):
            found = paged.numbers(letter, sequence, NUM_TOKENS)
            np.testing.assert_allclose(found, fake_quantize_kv(x, kv_format), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_how_a_prompt_is_cut_does_not_matter(kv_format: str, bf16: bool) -> None:
    """Tokens of the same call are seen as the cache gives them back, so that a prefill is many decode steps."""
    qkv = round_bf16(rows_of(9))
    whole, steps = (Paged(kv_format, offsets_of(20.0), bf16) for _ in range(2))
    at_once = whole.call([(0, qkv, 0)])
    one_by_one = np.concatenate([steps.call([(0, qkv[i : i + 1], i)]) for i in range(len(qkv))])
    np.testing.assert_array_equal(one_by_one, at_once)
    for name, array in whole.cache.items():
        assert array.tobytes() == steps.cache[name].tobytes(), name


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_rounding_as_a_kernel_does(kv_format: str) -> None:
    """Keys are rounded once, to eight bits: the cache is that of exact numbers. Outputs differ by roundings of 2⁻⁸."""
    qkv = round_bf16(rows_of(40))
    exact, rounded = (Paged(kv_format, offsets_of(0.5), bf16) for bf16 in (False, True))
    outs = [paged.call([(0, qkv, 0)]) for paged in (exact, rounded)]
    np.testing.assert_array_equal(round_bf16(outs[1]), outs[1])
    assert 2**-14 < np.abs(outs[1] - outs[0]).max() / np.abs(outs[0]).max() < 2**-6
    for name, array in exact.cache.items():
        assert array.tobytes() == rounded.cache[name].tobytes(), name


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_eight_bits_and_a_scale(kv_format: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, HEAD_DIM)) * np.exp(rng.standard_normal((200, 1)) * 8)
    numbers, scales = quantize_kv(x, kv_format)
    assert numbers.dtype == DTYPES[kv_format]
    values = numbers.astype(np.float64)
    assert (np.abs(values).max(-1) == KV_LARGEST[kv_format]).all()
    np.testing.assert_array_equal(values * scales.astype(np.float64)[:, None], fake_quantize_kv(x, kv_format))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_vectors_of_zeros_and_vectors_without_numbers(kv_format: str) -> None:
    x = np.stack([np.zeros(8), np.full(8, 1e-60), np.full(8, np.nan), np.full(8, np.inf)])
    numbers, scales = quantize_kv(x, kv_format)
    assert (scales[:2] == 0).all()
    assert (numbers[:2].astype(np.float64) == 0).all()
    assert not np.isfinite(scales[2:]).any()
    paged = Paged(kv_format, offsets_of(3.0))
    zeros = np.zeros((5, Q_WIDTH + 2 * KV_WIDTH))
    found = paged.call([(1, zeros, 0)])  # equal scores, so the mean of the values, which are their offset
    wanted = np.repeat(paged.offsets["v_offset"], HEADS // KV_HEADS, axis=0).reshape(-1)
    np.testing.assert_allclose(found, np.tile(wanted, (5, 1)), rtol=1e-12)


def test_fp8_may_come_as_bits() -> None:
    qkv = rows_of(5)
    numbers, bits = (Paged("fp8") for _ in range(2))
    bits.cache |= {name: bits.cache[name].view(np.uint8) for name in ("k_cache", "v_cache")}
    np.testing.assert_array_equal(bits.call([(0, qkv, 0)]), numbers.call([(0, qkv, 0)]))
    assert bits.cache["k_cache"].dtype == np.uint8
    assert bits.cache["k_cache"].tobytes() == numbers.cache["k_cache"].tobytes()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_only_slots_of_tokens_are_written_and_inputs_stay(kv_format: str) -> None:
    paged = Paged(kv_format, offsets_of(1.0))
    given, before = paged.cache, {name: array.tobytes() for name, array in paged.cache.items()}
    paged.call([(0, rows_of(66), 0), (1, rows_of(2), 0)])
    assert {name: array.tobytes() for name, array in given.items()} == before, "copies go out"
    used = np.zeros((7, BLOCK_SIZE), bool)
    used[4], used[2, :2], used[5, :2] = True, True, True
    for name, filling in empty_cache(kv_format).items():
        written = paged.cache[name].swapaxes(1, 2)
        assert written[~used].tobytes() == filling.swapaxes(1, 2)[~used].tobytes(), name
        assert np.isfinite(written[used].astype(np.float64)).all()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_idle_rows_append_nothing(kv_format: str) -> None:
    paged = Paged(kv_format)
    before = {name: array.tobytes() for name, array in paged.cache.items()}
    out = paged.call([(0, rows_of(1), -1), (1, rows_of(1), 3 * BLOCK_SIZE)])
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()
    assert {name: array.tobytes() for name, array in paged.cache.items()} == before


def test_a_quantized_cache_needs_scales() -> None:
    paged = Paged("int8")
    del paged.cache["v_scales"]
    with pytest.raises(ValueError, match="a cache of format int8 has no scales"):
        paged.call([(0, rows_of(1), 0)])


# ---------------------------------------------------------------- large key biases


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_an_offset_of_hundreds_costs_nothing(kv_format: str) -> None:
    """Where a per-tensor scale loses the keys, what is left without the offset is as exact as without any bias.

    The bias is where Qwen2 has it, in the dimensions that turn slowly: there it changes little from key to key, so
    that the scores are decided by the rest. A score errs by 2.6 % (fp8; int8 0.7 %) of |q| / sqrt(D) = 1, which is as
    much of a probability; values as much: 1.4 · 0.026 = 3.7 % of an output.
    """
    rng = np.random.default_rng(7)
    bias = rng.choice([-1.0, 1.0], (KV_HEADS, HEAD_DIM)) * rng.uniform(100, 300, (KV_HEADS, HEAD_DIM))
    bias[:, np.arange(HEAD_DIM) % (HEAD_DIM // 2) < HEAD_DIM // 4] = 0
    qkv = rows_of(NUM_TOKENS)
    query, key, value = split(qkv)
    whole_key = key + turned_offset(bias, NUM_TOKENS)
    exact = attend(query, whole_key, value)

    def error(found: F64) -> float:
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    ours = Paged(kv_format, {"k_offset": bias}).call([(0, qkv, 0)])
    assert error(ours) < {"fp8": 0.05, "int8": 0.012}[kv_format]
    scale = np.abs(whole_key).max() / 448
    assert error(attend(query, round_fp8(whole_key / scale) * scale, value)) > 0.8, "one scale for the tensor"
    assert error(attend(query, fake_quantize_kv(whole_key, kv_format), value)) > 0.4, "a scale for each vector"
    assert error(attend(query, round_bf16(whole_key), value)) > 5 * error(ours), "bfloat16"
