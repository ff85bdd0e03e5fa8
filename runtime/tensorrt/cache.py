"""The KV cache of an engine: every row that can run at once, allocated once; requests lease rows of it.

An engine wants one static length, so a row always holds Tmax tokens. Rows of a call lie behind each other: a call over
the rows r … r + B - 1 is the addresses of row r. All addresses stay as they are as long as the session lives, which is
what captured steps need.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.steps import bucket_of
from qwen_rt.runtime.tensorrt.engine import cache_pairs

__all__ = ["KvPool", "LeasedCache"]


class KvPool:
    """Memory of all rows.

    Args:
        cuda: The CUDA runtime.
        stream: Where copies go.
        address: Of `nbytes` bytes.
        num_layers: L.
        num_rows: Rows.
        row_bytes: Bytes of a row of one key or value tensor.
        capacity: Tmax, tokens that a row holds.

    Attributes:
        num_rows: As given.
        capacity: As given.
    """

    def __init__(
        self, cuda: Cudart, stream: int, address: int, num_layers: int, num_rows: int, row_bytes: int, capacity: int
    ) -> None:
        self._cuda, self._stream, self._address, self._row_bytes = cuda, stream, address, row_bytes
        self.num_layers, self.num_rows, self.capacity = num_layers, num_rows, capacity
        self._free = [(0, num_rows)]
        """Ranges (start, stop) that nobody has, in order, with something between any two."""
        self.is_open = True

    @staticmethod
    def nbytes(num_layers: int, num_rows: int, row_bytes: int) -> int:
        """Bytes that `num_rows` rows take over all layers."""
        return 2 * num_layers * num_rows * row_bytes

    def addresses(self, row: int) -> Iterator[tuple[str, str, int]]:
        """Yield (past name, present name, address of a row) for every key and value tensor."""
        tensor_bytes = self.num_rows * self._row_bytes
        for index, (past, present) in enumerate(cache_pairs(self.num_layers)):
            yield past, present, self._address + index * tensor_bytes + row * self._row_bytes

    def lease(self, num_rows: int, capacity: int) -> LeasedCache:
        """Take zeroed rows that lie behind each other: as many as a captured step for `num_rows` has, or fewer.

        Args:
            num_rows: Rows wanted, 1 at least.
            capacity: Tokens that a row has to hold.

        Raises:
            CapacityError: Longer than a row, or every row is leased.
            UsageError: The session is closed.
        """
        if not self.is_open:
            raise UsageError("the session is closed", "an open one", "load the bundle again")
        if capacity > self.capacity:
            raise CapacityError(
                f"a request of {capacity} tokens",
                f"at most {self.capacity}, the engine's --max-length",
                "lower max_tokens, or build the bundle with a larger --max-length",
            )
        wanted = bucket_of(min(num_rows, self.num_rows), self.num_rows)
        longest = max((stop - start for start, stop in self._free), default=0)
        if not longest:
            raise CapacityError(
                f"all {self.num_rows} rows of the KV cache are in use",
                "a free one",
                "finish or close another stream first, or raise max_num_seqs or --kv-memory",
            )
        taken = min(wanted, longest)
        index, (start, stop) = next((i, free) for i, free in enumerate(self._free) if free[1] - free[0] >= taken)
        # Attention multiplies what is out of sight by zero, and NaN times zero is NaN: neither fresh memory nor what a
        # request has left that overflowed may be there.
        for _, _, address in self.addresses(start):
            self._cuda.fill(address, 0, taken * self._row_bytes, self._stream)
        self._free[index : index + 1] = [(start + taken, stop)] if stop > start + taken else []
        return LeasedCache(self, start, min(num_rows, taken), taken)

    def give_back(self, start: int, num_rows: int) -> None:
        """Take rows back."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, (start, start + num_rows)]):
            if merged and merged[-1][1] == begin:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((begin, end))
        self._free = merged

    def copy_row(self, source: int, target: int) -> None:
        """Enqueue copying a row over another."""
        if not self.is_open:
            raise UsageError("the session is closed", "an open one", "load the bundle again")
        offset = (target - source) * self._row_bytes
        for _, _, address in self.addresses(source):
            self._cuda.copy(address + offset, address, self._row_bytes, self._stream)


class LeasedCache:
    """Rows of the pool that belong to one run of requests; they go back when it is closed or collected.

    Attributes:
        first: The first of them in the pool.
        num_rows: Rows that requests may use, numbered from 0.
        num_leased: Rows that it holds; those behind `num_rows` fill captured steps up.
        capacity: Tokens that a row holds.
    """

    def __init__(self, pool: KvPool, first: int, num_rows: int, num_leased: int) -> None:
        self.pool, self.first, self.num_rows, self.num_leased = pool, first, num_rows, num_leased
        self.capacity = pool.capacity
        self._give_back = weakref.finalize(self, pool.give_back, first, num_leased)
        self._give_back.atexit = False

    def move_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row over another row, all of it: a row's heads lie `capacity` tokens apart.

        Args:
            source: Row to copy.
            target: Row to overwrite.
            num_tokens: Tokens that matter.

        Raises:
            UsageError: No such row, or the cache is closed.
        """
        self.check_rows(min(source, target), abs(source - target) + 1)
        if num_tokens > 0:
            self.pool.copy_row(self.first + source, self.first + target)

    def check_rows(self, first_row: int, num_rows: int) -> None:
        """Refuse rows that are not leased: they belong to other requests.

        Raises:
            UsageError: They are not.
        """
        if not self._give_back.alive:
            raise UsageError("the cache is closed", "an open one", "make a new one")
        if first_row < 0 or num_rows < 1 or first_row + num_rows > self.num_rows:
            raise UsageError(f"rows {first_row} to {first_row + num_rows - 1}", f"0 to {self.num_rows - 1}")

    def close(self) -> None:
        """Give the rows back. Closing twice does nothing."""
        self._give_back()
