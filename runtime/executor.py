"""What the paged engine needs of a device: prefill a chunk, run a decode step, hand tokens back late.

`CudaSession` is the real one. The engine owns the plan (which request has which row and which cache blocks); an
executor owns buffers and does what it is told. Calls come from one thread.

Rows are numbered 0 … A - 1 without gaps. While their set stays the same, the executor feeds every step's tokens to the
next on its own: the engine launches a step before it has read the one before. To change the set the engine first waits
for every launched step, then tells all rows anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_rt.runtime.sampler import SampleResult
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.spec import ModelSpec

__all__ = ["PagedExecutor", "RowState"]


@dataclass
class RowState:
    """One request as an executor sees it.

    Attributes:
        prompt_ids: Its prompt.
        output_ids: Tokens chosen so far. The last one has not been fed to the model yet.
        params: How its tokens are chosen.
        seed: Of its random numbers, `params.seed` or a fresh one, 0 … 2**64 - 1.
        blocks: Cache blocks in order; enough for every position that it can reach.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    blocks: tuple[int, ...]
    output_ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Place in the sequence of the token that the next decode step feeds."""
        return len(self.prompt_ids) + len(self.output_ids) - 1


class PagedExecutor(Protocol):
    """Runs a model on a paged cache.

    Attributes:
        spec: The model's hyperparameters.
        max_length: Tokens that prompt and output can have together.
        block_size: Tokens of a cache block.
        num_blocks: Blocks of the cache. Block 0 is scratch and never given to a request.
        max_rows: Most requests that decode at once.
        chunk_tokens: Most tokens of one prefill call.
    """

    spec: ModelSpec
    max_length: int
    block_size: int
    num_blocks: int
    max_rows: int
    chunk_tokens: int

    def prefill(
        self, row: RowState, token_ids: NDArray[np.int64], position: int, *, is_last: bool
    ) -> SampleResult | None:
        """Feed a chunk of a request's prompt; after the last one, choose its first token.

        Args:
            row: The request; `output_ids` is empty.
            token_ids: int64[S], 1 to `chunk_tokens` tokens of the prompt.
            position: Place of the first of them; the earlier ones have been fed.
            is_last: Whether the chunk ends the prompt. Then the call waits for the result.

        Returns:
            The first token (one row) after the last chunk, else None.
        """
        ...

    def set_rows(self, rows: Sequence[RowState]) -> None:
        """Replace the set of decoding rows, 1 to `max_rows` of them, each with one output token at least.

        No step may be under way. The executor keeps no reference to `output_ids` and does not change it.
        """
        ...

    def launch_step(self) -> int:
        """Start a decode step over the rows of `set_rows` and return its number; does not wait for the device.

        At most two steps may be under way.
        """
        ...

    def wait_step(self, number: int) -> SampleResult:
        """Wait for a launched step, in order; return the token of every row, and log probabilities where asked for."""
        ...

    def close(self) -> None:
        """Give everything back. Closing twice does nothing."""
        ...
