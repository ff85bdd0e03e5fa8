"""How often each token occurs in the prompt and the output of the rows that have penalties, on the device.

A row of the counts is a slot: i32[vocab], bit 31 set for tokens of the prompt, the rest the occurrences in the output.
A request keeps its slot from its prefill on, so that the device goes on counting; only a slot that does not agree with
what the host knows is built anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Resources
from qwen_rt.runtime.cuda.sampling import is_penalised
from qwen_rt.runtime.executor import RowState

__all__ = ["CountSlots", "token_counts"]

_PROMPT_BIT = np.int32(-(2**31))
_INT32_BYTES = 4


def token_counts(prompt_ids: Sequence[int], output_ids: Sequence[int], vocab: int) -> NDArray[np.int32]:
    """Return a slot's content: int32[vocab]."""
    counts = np.bincount(np.asarray(output_ids, np.int64), minlength=vocab).astype(np.int32)
    counts[np.asarray(prompt_ids, np.int64)] |= _PROMPT_BIT
    return counts


@dataclass
class _Slot:
    """A request's slot, and how many of its output tokens the device has counted."""

    row: RowState
    index: int
    num_counted: int


class CountSlots:
    """The slots of all requests; memory is taken when the first request with penalties comes.

    Args:
        cuda: The runtime.
        allocate: Gives device memory: bytes → address.
        resources: Owner of the pinned memory.
        stream: Uploads go there.
        num_slots: More than rows that decode, so that a prefill always finds one.
        vocab: V.
    """

    def __init__(
        self,
        cuda: Cudart,
        allocate: Callable[[int], int],
        resources: Resources,
        stream: int,
        num_slots: int,
        vocab: int,
    ) -> None:
        self._cuda, self._allocate, self._resources, self._stream = cuda, allocate, resources, stream
        self.num_slots, self._vocab = num_slots, vocab
        self._base = 0
        self._staging: NDArray[np.int32] | None = None
        self._staging_address = 0
        self._slots: dict[int, _Slot] = {}  # id of the RowState → its slot; the slot's reference keeps the id taken
        self._active: tuple[_Slot, ...] = ()

    @property
    def device(self) -> tuple[int, int] | None:
        """Address and number of slots; None before the first request with penalties."""
        return (self._base, self.num_slots) if self._base else None

    def assign_prefill(self, row: RowState) -> int:
        """Return the slot of a request whose prompt has just been fed, -1 if it needs none."""
        return self._assign(row, keep=()) if is_penalised(row.params) else -1

    def assign(self, rows: Sequence[RowState]) -> list[int]:
        """Return the slot of every decoding row, -1 for those that need none; slots of other requests become free."""
        wanted = {id(row) for row in rows}
        self._slots = {key: slot for key, slot in self._slots.items() if key in wanted}
        indices = [self._assign(row, keep=wanted) if is_penalised(row.params) else -1 for row in rows]
        self._active = tuple(self._slots.values())
        return indices

    def count_step(self) -> None:
        """Note that a launched step counts one more token of every row of the last `assign`."""
        for slot in self._active:
            slot.num_counted += 1

    def count_prefill(self, row: RowState) -> None:
        """Note that a prefill's launch has counted the first token of a request."""
        if slot := self._slots.get(id(row)):
            slot.num_counted += 1

    def _assign(self, row: RowState, keep: Sequence[int] | set[int]) -> int:
        slot = self._slots.get(id(row))
        if slot is None:
            used = {slot.index for slot in self._slots.values()}
            if len(used) == self.num_slots:  # the oldest that is not decoding: it is built anew if it comes back
                active = {id(slot.row) for slot in self._active} | set(keep)
                oldest = next(key for key in self._slots if key not in active)
                used.discard(self._slots.pop(oldest).index)
            index = next(index for index in range(self.num_slots) if index not in used)
            slot = self._slots[id(row)] = _Slot(row, index, -1)
        if slot.num_counted != len(row.output_ids):
            self._build(slot)
        return slot.index

    def _build(self, slot: _Slot) -> None:
        if self._staging is None:
            nbytes = self._vocab * _INT32_BYTES
            pinned = self._resources.pinned(nbytes)
            self._base = self._allocate(self.num_slots * nbytes)
            self._staging, self._staging_address = pinned.array(np.int32, (self._vocab,)), pinned.host
        self._staging[:] = token_counts(slot.row.prompt_ids, slot.row.output_ids, self._vocab)
        target = self._base + slot.index * self._vocab * _INT32_BYTES
        self._cuda.copy(target, self._staging_address, self._vocab * _INT32_BYTES, self._stream)
        self._cuda.stream_synchronize(self._stream)  # the staging row is used for the next slot at once
        slot.num_counted = len(slot.row.output_ids)
