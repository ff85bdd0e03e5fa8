"""Blocks of a paged cache: each has one owner at most, whatever is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.block_pool import BlockPool


def test_scratch_is_never_given_out_and_every_other_block_is() -> None:
    pool = BlockPool(6, 16)
    assert (pool.num_usable, pool.num_free) == (5, 5)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0
    assert pool.allocate(0) == ()


def test_blocks_for_tokens() -> None:
    pool = BlockPool(6, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_too_many_take_none() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="3 cache blocks; expected at most 2, those that are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    with pytest.raises(UsageError, match="-1 cache blocks"):
        pool.allocate(-1)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0], "cache block 0; expected 1 to 4, block 0 being scratch"),
        ([5], "cache block 5; expected 1 to 4"),
        ([-1], "cache block -1; expected"),
        ([1, 4], "cache block 4 is free already"),
        ([1, 1], "each block once"),
    ],
)
def test_what_cannot_be_returned(blocks: list[int], message: str) -> None:
    pool = BlockPool(5, 16)
    assert pool.allocate(3) == (1, 2, 3)
    with pytest.raises(UsageError, match=message):
        pool.free(blocks)
    assert pool.num_free == 1  # not even the good ones of the list
    pool.free([1, 2, 3])
    with pytest.raises(UsageError, match="cache block 2 is free already"):
        pool.free([2])
    assert pool.num_free == 4


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (0, 16), (2, 0)])
def test_a_pool_without_a_block_or_a_token(num_blocks: int, block_size: int) -> None:
    with pytest.raises(UsageError, match=f"num_blocks={num_blocks}, block_size={block_size}; expected at least 2"):
        BlockPool(num_blocks, block_size)


@given(st.integers(2, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_any_calls_keep_owners_apart_and_repeat(num_blocks: int, calls: list[tuple[bool, int]]) -> None:
    def play() -> list[tuple[int, ...]]:
        pool, held, given_out = BlockPool(num_blocks, 4), [], []
        for takes, number in calls:
            if takes and number <= pool.num_free:
                held.append(pool.allocate(number))
                given_out.append(held[-1])
            elif not takes and held:
                pool.free(held.pop(number % len(held)))
            taken = [block for blocks in held for block in blocks]
            assert len(set(taken)) == len(taken)
            assert 0 not in taken
            assert pool.num_free == pool.num_usable - len(taken)
        return given_out

    assert play() == play()
