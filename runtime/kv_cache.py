"""The KV cache of a session: one buffer per layer and kind, allocated for what is asked and written in place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.errors import CapacityError
from qwen_rt.spec import ModelSpec

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of up to `num_rows` sequences of up to `capacity` tokens.

    Memory is claimed from the operating system but not touched: a page costs nothing until a token is written there.

    Args:
        spec: The model's hyperparameters.
        num_rows: B, sequences that can run at once.
        capacity: Tmax, tokens that a sequence can reach.

    Attributes:
        keys, values: Per layer float32[B, Hkv, Tmax, D]; rows are contiguous, so any range of rows is a view.

    Raises:
        CapacityError: The memory cannot be had.
    """

    def __init__(self, spec: ModelSpec, num_rows: int, capacity: int) -> None:
        self.num_layers, self.num_rows, self.capacity = spec.num_layers, num_rows, capacity
        shape = (num_rows, spec.num_kv_heads, capacity, spec.head_dim)
        try:
            self.keys = [np.zeros(shape, np.float32) for _ in range(spec.num_layers)]
            self.values = [np.zeros(shape, np.float32) for _ in range(spec.num_layers)]
        except MemoryError:
            total = num_rows * capacity * spec.kv_bytes_per_token("float32")
            raise CapacityError(
                f"a KV cache of {num_rows} rows x {capacity} tokens takes {total / 1e9:.1f} GB",
                "less than the free memory",
                "lower max_tokens or max_num_seqs",
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes claimed by all layers."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
        """Yield (past name, present name, view of rows `start … stop - 1`) for every layer's key and value."""
        for layer in range(self.num_layers):
            yield tensors.past_key(layer), tensors.present_key(layer), self.keys[layer][start:stop]
            yield tensors.past_value(layer), tensors.present_value(layer), self.values[layer][start:stop]

    def move_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of a row over another row."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :num_tokens] = buffer[source, :, :num_tokens]

    def close(self) -> None:
        """Let the memory go. Closing twice does nothing."""
        self.keys, self.values = [], []
