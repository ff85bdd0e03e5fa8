"""Calls of the graph: bound, run, and captured once a number of rows so that a decode step is one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from qwen_rt import tensors
from qwen_rt.errors import QwenRtError
from qwen_rt.ops import BLOCK_SIZE, COUNTER_BYTES, MAX_ROWS, OPS
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.graph import INT64, GraphRunner
from qwen_rt.runtime.cuda.memory import Resources, align, measured
from qwen_rt.runtime.cuda.sampling import RowBuffers, SamplePlan
from qwen_rt.runtime.cuda.weights import FLOAT, INT32
from qwen_rt.spec import ModelSpec

__all__ = [
    "BUCKETS",
    "WIDTHS",
    "ModelCalls",
    "StepGraphs",
    "bucket_of",
    "buckets_up_to",
    "graph_workspace",
    "width_of",
    "widths_up_to",
]

BUCKETS = (1, 2, 4, *range(8, MAX_ROWS + 1, 8))
"""Numbers of rows that decode steps are captured for; a step of fewer rows is padded with idle ones."""

WIDTHS = (8, 32, 128, 512)
"""Widths of block tables that steps are captured for. Attention launches blocks for all tokens that a table can hold,
and those that find none still take their time: a request of 500 tokens must not pay for a context of 32768. The width
does not change a result."""

_WARM_UPS = 2  # the first loads kernels and grows ONNX Runtime's arena; the second shows that it has stopped growing
_SIZES_TRIED = 256


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Return the buckets of a session: those below `max_rows`, and `max_rows`."""
    return (*(bucket for bucket in BUCKETS if bucket < max_rows), max_rows)


def bucket_of(num_rows: int, max_rows: int) -> int:
    """Return the smallest bucket with room for `num_rows`."""
    return next(bucket for bucket in buckets_up_to(max_rows) if bucket >= num_rows)


def widths_up_to(max_blocks: int) -> tuple[int, ...]:
    """Return the widths of a session: those below `max_blocks`, and `max_blocks`."""
    return (*(width for width in WIDTHS if width < max_blocks), max_blocks)


def width_of(num_blocks: int, max_blocks: int) -> int:
    """Return the smallest width with room for `num_blocks`."""
    return next(width for width in widths_up_to(max_blocks) if width >= num_blocks)


def graph_workspace(
    library: PluginLibrary,
    spec: ModelSpec,
    max_rows: int,
    chunk_tokens: int,
    max_blocks: int,
    groups: Collection[int] = (),
    kv_format: str = "bf16",
) -> int:
    """Return the workspace that serves every op of the graph in every call: the largest that any wants.

    Args:
        library: The plugin library.
        spec: The model's hyperparameters.
        max_rows: Most rows of a decode step.
        chunk_tokens: Most tokens of a prefill.
        max_blocks: Width of a block table.
        groups: Scales that a row of a quantized matrix has, all that occur.
        kv_format: Of the KV cache.
    """
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    num_blocks = max_rows * max_blocks + 1
    known = {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "q_width": q_width,
        "kv_width": kv_width,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "num_blocks": num_blocks,
        "scale_blocks": 0 if kv_format == "bf16" else num_blocks,
        "block_size": BLOCK_SIZE,
        "max_blocks": max_blocks,
        "width": q_width,
        "ffn": spec.intermediate_size,
    }
    prefills = {*range(1, chunk_tokens + 1, max(1, chunk_tokens // _SIZES_TRIED)), chunk_tokens}
    calls = [(rows, rows) for rows in range(1, max_rows + 1)] + [(rows, 1) for rows in sorted(prefills)]
    # What an op wants depends on whether a row has no scale, one, or several.
    kinds = (0, *sorted({min(count, 2) for count in groups}))
    needed = COUNTER_BYTES
    for op in OPS:
        if op.has_workspace and op.name != "sample":
            for rows, sequences in calls:
                for count in kinds if "groups" in op.dims else (0,):
                    values = known | {"rows": rows, "sequences": sequences, "groups": count}
                    needed = max(needed, library.workspace_bytes(op.name, [values[dim] for dim in op.dims]))
    return align(needed)


@dataclass
class ModelCalls:
    """Runs the graph over the tokens of some buffers; binds anew only what differs from the call before.

    Attributes:
        runner: The loaded graph, weights and cache bound.
        logits: Device address of f32[max_rows, V].
        vocab: V.
    """

    runner: GraphRunner
    logits: int
    vocab: int
    _bound: tuple[int, int, int, int] = (0, 0, 0, 0)

    def enqueue(self, buffers: RowBuffers, num_tokens: int, num_rows: int, width: int) -> None:
        """Enqueue the graph: R = `num_tokens`, B = `num_rows`; the logits of row b come at `logits + 4 · b · V`.

        Args:
            buffers: The rows.
            num_tokens: Tokens of all of them.
            num_rows: How many.
            width: Of the block tables, as they were written.
        """
        at, runner = buffers.device, self.runner
        key = at["ids"], num_tokens, num_rows, width
        if key != self._bound:
            self._bound = (0, 0, 0, 0)
            runner.bind_input(tensors.INPUT_IDS, INT64, (num_tokens,), at["ids"])
            runner.bind_input(tensors.POSITIONS, INT64, (num_tokens,), at["positions"])
            runner.bind_input(tensors.QUERY_STARTS, INT32, (num_rows + 1,), at["query_starts"])
            runner.bind_input(tensors.BLOCK_TABLES, INT32, (num_rows, width), at["block_tables"])
            runner.bind_input(tensors.LOGITS_INDICES, INT64, (num_rows,), at["logits_indices"])
            runner.bind_output(tensors.LOGITS, FLOAT, (num_rows, self.vocab), self.logits)
            self._bound = key
        runner.run()


class StepGraphs:
    """Captured decode steps, one for each bucket, width of block tables and plan that has been asked for.

    Args:
        cuda: The runtime.
        resources: Owner of the captured graphs.
        stream: Where steps run.
        enqueue: Enqueues a step (graph, then `sample`) of a bucket and a width under a plan; every row is idle then.
        add_bytes: Is told what the driver lost to a capture.
    """

    def __init__(
        self,
        cuda: Cudart,
        resources: Resources,
        stream: int,
        enqueue: Callable[[int, int, SamplePlan], None],
        add_bytes: Callable[[int], None],
    ) -> None:
        self._cuda, self._resources, self._stream = cuda, resources, stream
        self._enqueue, self._add_bytes = enqueue, add_bytes
        self._graphs: dict[tuple[int, int, SamplePlan], int] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, bucket: int, width: int, plan: SamplePlan) -> int | None:
        """Return the launchable graph of a bucket and a width under a plan, None if it has not been captured."""
        return self._graphs.get((bucket, width, plan))

    def capture(self, bucket: int, width: int, plan: SamplePlan) -> int:
        """Capture a step; the rows on the device must be idle, they are run through it."""
        cuda, stream = self._cuda, self._stream
        with measured(cuda, self._add_bytes):
            for _ in range(_WARM_UPS):
                self._enqueue(bucket, width, plan)
            cuda.stream_synchronize(stream)
            cuda.capture_begin(stream)
            try:
                self._enqueue(bucket, width, plan)
            except BaseException:
                with contextlib.suppress(QwenRtError):  # the stream must leave capture mode; the first error is the one
                    if graph := cuda.capture_end(stream):
                        cuda.graph_destroy(graph)
                raise
            executable = self._resources.graph_exec(cuda.capture_end(stream))
        self._graphs[bucket, width, plan] = executable
        return executable

    def close(self) -> None:
        """Destroy all captured graphs."""
        while self._graphs:
            _, executable = self._graphs.popitem()
            self._resources.release(executable)
