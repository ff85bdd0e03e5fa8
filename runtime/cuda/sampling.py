"""What the device needs to know of each row: packed on the host, uploaded in one copy, sampled by the `sample` op.

The arrays of a set of rows lie behind each other on the device and, alike, in pinned memory. What a step produces lies
in pinned memory that the device writes to directly, in a ring: the host reads tokens without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import UsageError
from qwen_rt.ops import COUNTER_BYTES, find_op
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Layout, Resources, align
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampler import LogitsError, SampleResult, TokenLogprobs
from qwen_rt.runtime.sampling_params import MAX_LOGPROBS, SamplingParams

__all__ = [
    "EDIT_SIZES",
    "MAX_EDITS",
    "RING",
    "RowBuffers",
    "SamplePlan",
    "edits_of",
    "is_penalised",
    "plan_of",
    "row_layout",
    "sample_workspace",
]

RING = 8
"""Steps whose results are kept: more than can be under way."""

MAX_EDITS = 512
"""Most logits of a row that logit_bias and min_tokens may change."""

EDIT_SIZES = (0, 8, 32, 128, MAX_EDITS)
"""Numbers of edits that a step is captured for."""

_ALWAYS = 2**31 - 1
_IDLE = -1  # position of a row that takes no part
_EDIT_BYTES = 12  # id i32, value f32, until i32
_SAMPLE_TENSORS = tuple(tensor.name for tensor in find_op("sample").tensors)


@dataclass(frozen=True)
class SamplePlan:
    """Which inputs and outputs of the `sample` op a set of rows needs; each plan is a launch of its own.

    Attributes:
        full: Whether any row needs more than the largest logit.
        counts: Whether any row has penalties.
        num_edits: Width of the edits, one of a few sizes.
        logprobs: Whether any row wants log probabilities.
    """

    full: bool = False
    counts: bool = False
    num_edits: int = 0
    logprobs: bool = False


def is_penalised(params: SamplingParams) -> bool:
    """Say whether a request needs the counts of its tokens."""
    return params.repetition_penalty != 1 or bool(params.presence_penalty) or bool(params.frequency_penalty)


def edits_of(params: SamplingParams, num_tokens: int) -> list[tuple[int, float, int]]:
    """Return what changes single logits: (token id, value added, number of outputs until which it is).

    Args:
        params: The request's settings.
        num_tokens: Ids from here on are never chosen anyway.

    Raises:
        UsageError: More than `MAX_EDITS`.
    """
    edits = [(token, value, _ALWAYS) for token, value in params.logit_bias.items()]
    if params.min_tokens:
        stops = sorted(token for token in params.all_stop_token_ids if token < num_tokens)
        edits += [(token, -np.inf, min(params.min_tokens, _ALWAYS)) for token in stops]
    if len(edits) > MAX_EDITS:
        raise UsageError(
            f"logit_bias and the stop tokens of min_tokens name {len(edits)} tokens",
            f"at most {MAX_EDITS} on a GPU",
            "name fewer",
        )
    return edits


def plan_of(rows: Sequence[RowState], num_tokens: int) -> SamplePlan:
    """Return the smallest plan that serves all rows.

    Raises:
        UsageError: A row with more than `MAX_EDITS` edits.
    """
    most = max((len(edits_of(row.params, num_tokens)) for row in rows), default=0)
    counts = any(is_penalised(row.params) for row in rows)
    logprobs = any(row.params.logprobs is not None for row in rows)
    sampled = any(not row.params.greedy for row in rows)
    num_edits = next(size for size in EDIT_SIZES if size >= most)
    return SamplePlan(sampled or counts or logprobs or most > 0, counts, num_edits, logprobs)


def row_layout(num_rows: int, num_ids: int, max_blocks: int) -> Layout:
    """Return the layout of `RowBuffers` on the device.

    Args:
        num_rows: Rows, sequences: B.
        num_ids: Tokens of a call, R.
        max_blocks: Width of the block tables.
    """
    i64, i32, f32 = np.int64, np.int32, np.float32
    fields: dict[str, tuple[Any, tuple[int, ...]]] = {
        "ids": (i64, (num_ids,)),
        "positions": (i64, (num_ids,)),
        "query_starts": (i32, (num_rows + 1,)),
        "logits_indices": (i64, (num_rows,)),
        "num_outputs": (i64, (num_rows,)),
        "seeds": (i64, (num_rows,)),
        "step": (i64, (1,)),
        "temperature": (f32, (num_rows,)),
        "top_p": (f32, (num_rows,)),
        "min_p": (f32, (num_rows,)),
        "top_k": (i32, (num_rows,)),
        "penalties": (f32, (num_rows, 3)),
        "count_slots": (i32, (num_rows,)),
        "block_tables": (i32, (num_rows, max_blocks)),
        "edits": (np.uint8, (num_rows * MAX_EDITS * _EDIT_BYTES,)),
    }
    return Layout(fields)


def _results_layout(num_rows: int) -> Layout:
    return Layout(
        {
            "history": (np.int64, (RING * num_rows,)),
            "logprobs": (np.float32, (RING * num_rows,)),
            "top_ids": (np.int32, (RING * num_rows * MAX_LOGPROBS,)),
            "top_logprobs": (np.float32, (RING * num_rows * MAX_LOGPROBS,)),
        }
    )


class RowBuffers:
    """The rows of one kind of call: all decoding rows, or the one that is prefilled.

    Args:
        cuda: The runtime.
        resources: Owner of the pinned memory.
        layout: Of `row_layout`.
        base: Device address of `layout.nbytes` bytes.
        stream: Uploads go there.
        advances: Whether a step moves every position on by one (decoding).

    Attributes:
        host: The arrays in pinned memory; `upload` sends them.
        device: Name → device address.
        num_rows: Rows that there is room for.
    """

    def __init__(
        self, cuda: Cudart, resources: Resources, layout: Layout, base: int, stream: int, *, advances: bool
    ) -> None:
        self._cuda, self._stream, self._advances = cuda, stream, advances
        self.num_rows = layout.fields["top_k"][1][0]
        staging = resources.pinned(layout.nbytes)
        self._source, self._base = staging.host, base
        self._fixed_bytes = layout.offsets["edits"]
        self.host = layout.views(staging)
        self.device = layout.addresses(base)
        results = _results_layout(self.num_rows)
        mapped = resources.pinned(results.nbytes)
        self._results = results.views(mapped)
        self._result_addresses = results.addresses(mapped.device)
        self._uploaded = resources.event()
        self._no_logprobs: dict[int, tuple[None, ...]] = {}
        self._histories: dict[int, NDArray[np.int64]] = {}
        self._clear()

    def wait_upload(self) -> None:
        """Wait until the arrays in pinned memory may be written again."""
        self._cuda.event_synchronize(self._uploaded)

    def write_rows(
        self, rows: Sequence[RowState], slots: Sequence[int], plan: SamplePlan, num_tokens: int, width: int
    ) -> None:
        """Write how each row is sampled and where its cache lies; the rows behind them are idle.

        Args:
            rows: What to write.
            slots: Row of the counts of each, or -1.
            plan: How many edits a row has.
            num_tokens: Tokens of the tokenizer.
            width: Of the block tables, with room for every row's blocks.
        """
        self._clear()
        tables = self.host["block_tables"].reshape(-1)[: self.num_rows * width].reshape(self.num_rows, width)
        host, edits = self.host, self._edit_arrays(plan.num_edits)
        edits[0].fill(-1)
        for index, row in enumerate(rows):
            params = row.params
            tables[index, : len(row.blocks)] = row.blocks
            host["num_outputs"][index] = len(row.output_ids)
            host["seeds"].view(np.uint64)[index] = row.seed
            host["temperature"][index] = 0.0 if params.greedy else params.temperature
            host["top_k"][index], host["top_p"][index] = min(params.top_k, num_tokens), params.top_p
            host["min_p"][index] = params.min_p
            # The order of runtime/sampler.py's steps and of the kernel.
            host["penalties"][index] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            host["count_slots"][index] = slots[index]
            for place, values in enumerate(edits_of(params, num_tokens)):
                for array, value in zip(edits, values, strict=True):
                    array[index, place] = value

    def upload(self, plan: SamplePlan) -> None:
        """Enqueue sending everything to the device."""
        nbytes = self._fixed_bytes + self.num_rows * plan.num_edits * _EDIT_BYTES
        self._cuda.copy(self._base, self._source, nbytes, self._stream)
        self._cuda.event_record(self._uploaded, self._stream)

    def _clear(self) -> None:
        host = self.host
        for array in host.values():
            array.fill(0)
        host["positions"].fill(_IDLE)
        host["top_p"].fill(1.0)
        host["penalties"][:, 0] = 1.0
        host["count_slots"].fill(-1)
        host["query_starts"][:] = np.arange(self.num_rows + 1)
        host["logits_indices"][:] = np.arange(self.num_rows)

    def _edit_arrays(self, width: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
        """View the start of the edits as ids, values and limits [num_rows, width] behind each other."""
        count = self.num_rows * width
        words = self.host["edits"][: 3 * 4 * count].view(np.int32).reshape(3, self.num_rows, width)
        return words[0], words[1].view(np.float32), words[2]

    # ---------------------------------------------------------------- the op

    def launch_sample(
        self,
        library: PluginLibrary,
        plan: SamplePlan,
        num_rows: int,
        *,
        logits: int,
        counts: tuple[int, int] | None,
        dims: tuple[int, int],
        workspace: tuple[int, int],
    ) -> None:
        """Enqueue the `sample` op over the first `num_rows` rows; the tokens become the next call's `ids`.

        Args:
            library: The plugin library.
            plan: What to pass.
            num_rows: Rows of this call.
            logits: Device address of f32[num_rows, V].
            counts: Device address and rows of the counts; needed if the plan has counts.
            dims: V and the tokens of the tokenizer.
            workspace: Device address and bytes.
        """
        at, out = self.device, self._result_addresses
        edits = at["edits"], self.num_rows * plan.num_edits * 4
        vocab, num_tokens = dims
        given: dict[str, int] = {"logits": logits, "step": at["step"], "next_ids": at["ids"], "next_step": at["step"]}
        given["history"] = out["history"]
        if self._advances:
            given |= {"positions": at["positions"], "next_positions": at["positions"]}
        if plan.full:
            given |= {name: at[name] for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "num_outputs")}
            given["next_num_outputs"] = at["num_outputs"]
        if plan.counts and counts is not None:
            given |= {"penalties": at["penalties"], "count_slots": at["count_slots"]}
            given |= {"counts": counts[0], "next_counts": counts[0]}
        if plan.num_edits:
            names = ("edit_ids", "edit_values", "edit_until")
            given |= {name: edits[0] + index * edits[1] for index, name in enumerate(names)}
        if plan.logprobs:
            given |= {name: out[name] for name in ("logprobs", "top_ids", "top_logprobs")}
        slots = counts[1] if plan.counts and counts is not None else 0
        library.launch(
            "sample",
            [given.get(name) for name in _SAMPLE_TENSORS],
            (num_rows, vocab, slots, plan.num_edits, RING),
            (float(num_tokens),),
            stream=self._stream,
            workspace=workspace[0],
            workspace_bytes=workspace[1],
        )

    def result(self, step: int, bucket: int, rows: Sequence[SamplingParams], plan: SamplePlan) -> SampleResult:
        """Read what a step that is complete has chosen.

        Args:
            step: Its number on the device.
            bucket: Rows of the launch.
            rows: The settings of the rows that are real.
            plan: The launch's.

        Raises:
            LogitsError: Rows whose logits are NaN, +inf or all -inf.
        """
        slot, num_rows = step % RING, len(rows)
        history = self._histories.get(bucket)
        if history is None:
            history = self._histories[bucket] = self._results["history"][: RING * bucket].reshape(RING, bucket)
        tokens = history[slot, :num_rows].copy()
        if tokens.min() < 0:
            bad = [row for row, token in enumerate(tokens.tolist()) if token < 0]
            raise LogitsError(
                f"logits of row {', '.join(map(str, bad))} hold NaN or +inf, or are all -inf",
                "finite logits",
                "check the model's precision and the request's penalties",
                rows=bad,
            )
        if not plan.logprobs:
            none = self._no_logprobs.get(num_rows)
            if none is None:
                none = self._no_logprobs[num_rows] = (None,) * num_rows
            return SampleResult(tokens, none)
        return SampleResult(tokens, tuple(self._logprobs(slot, bucket, row, p) for row, p in enumerate(rows)))

    def _logprobs(self, slot: int, bucket: int, row: int, params: SamplingParams) -> TokenLogprobs | None:
        if params.logprobs is None:
            return None
        place = slot * bucket + row
        top = slice(place * MAX_LOGPROBS, place * MAX_LOGPROBS + params.logprobs)
        ids = self._results["top_ids"][top].astype(np.int64)
        logprobs = self._results["top_logprobs"][top].astype(np.float64)
        real = ids >= 0  # a vocabulary may have fewer tokens than were asked for
        return TokenLogprobs(float(self._results["logprobs"][place]), ids[real], logprobs[real])


def sample_workspace(library: PluginLibrary, max_rows: int, vocab: int, slots: int) -> int:
    """Return the bytes of workspace that the `sample` op wants in any of its uses."""
    needed = max(
        library.workspace_bytes("sample", (rows, vocab, slots, edits, RING))
        for rows in range(1, max_rows + 1)
        for edits in (EDIT_SIZES[0], EDIT_SIZES[-1])
    )
    return align(max(needed, COUNTER_BYTES))
