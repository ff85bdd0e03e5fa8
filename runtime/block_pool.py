"""Which blocks of a paged KV cache are free: a stack of numbers and a flag a block, no tensors."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_rt.errors import CapacityError, UsageError

__all__ = ["BlockPool"]


class BlockPool:
    """The blocks 1 to `num_blocks` - 1 of a cache; block 0 is scratch and never given out.

    The same calls in the same order give the same blocks. Taking and returning a block costs O(1).

    Args:
        num_blocks: Blocks of the cache, the scratch block included.
        block_size: Tokens of a block.

    Attributes:
        num_blocks, block_size: As given.

    Raises:
        UsageError: There is no block beside the scratch block, or a block holds no token.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise UsageError(
                f"num_blocks={num_blocks}, block_size={block_size}",
                "at least 2 blocks, one of them scratch, of at least 1 token",
                "give the cache more memory",
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, 0, -1))  # the last one goes first
        self._is_free = [False] + [True] * (num_blocks - 1)

    @property
    def num_usable(self) -> int:
        """Blocks that can be given out when none is taken."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` blocks.

        Returns:
            Their numbers, 1 to `num_blocks` - 1, each different.

        Raises:
            UsageError: `count` is negative.
            CapacityError: Fewer are free; then none is taken.
        """
        if count < 0:
            raise UsageError(f"{count} cache blocks", "0 or more")
        if count > len(self._free):
            raise CapacityError(
                f"{count} cache blocks", f"at most {len(self._free)}, those that are free", "return some first"
            )
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Return blocks, each of which must be taken; after an error none of them has been returned.

        Raises:
            UsageError: A block is not in the pool, is free already, or is named twice.
        """
        returned = list(blocks)
        for block in returned:
            if not 1 <= block < self.num_blocks:
                raise UsageError(f"cache block {block}", f"1 to {self.num_usable}, block 0 being scratch")
            if self._is_free[block]:
                raise UsageError(f"cache block {block} is free already", "a block that is taken")
        if len(set(returned)) != len(returned):
            raise UsageError(f"cache blocks {returned}", "each block once")
        for block in reversed(returned):  # so that a sequence that is retried gets the same ones
            self._is_free[block] = True
            self._free.append(block)
