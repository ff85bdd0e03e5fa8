"""Decode steps as CUDA graphs: inputs up, the engine, logits down, in one launch.

TensorRT keeps state of a shape in its context, so every captured step has a context of its own; all share one scratch
memory. A step is first run as it is, which is also the warm-up that a capture needs, and captured behind it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from qwen_rt.errors import QwenRtError
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.memory import Resources, measured
from qwen_rt.runtime.tensorrt.engine import Context

__all__ = ["MAX_STEPS", "CapturedSteps"]

MAX_STEPS = 24
"""Captured steps that are kept; the one used longest ago goes for the next."""


@dataclass
class _Step:
    """A context whose addresses and shapes are a step's, and its graph; 0 until it is captured."""

    context: Context
    graph: int = 0


class CapturedSteps:
    """The captured steps of a session.

    Args:
        cuda: The CUDA runtime.
        resources: Owner of the captured graphs.
        stream: Where steps run.
        open_context: Makes a context of the decode profile for steps that will be captured.
        enqueue: Enqueues a step with a context: (context, first row in the pool, rows).
        add_bytes: Is told what the driver lost to a capture.

    Attributes:
        trouble: Why steps are run uncaptured; empty as long as captures work.
    """

    def __init__(
        self,
        cuda: Cudart,
        resources: Resources,
        stream: int,
        open_context: Callable[[], Context],
        enqueue: Callable[[Context, int, int], None],
        add_bytes: Callable[[int], None],
    ) -> None:
        self._cuda, self._resources, self._stream = cuda, resources, stream
        self._open_context, self._enqueue, self._add_bytes = open_context, enqueue, add_bytes
        self._steps: dict[tuple[int, int], _Step] = {}
        self.trouble = ""

    def __len__(self) -> int:
        return sum(1 for step in self._steps.values() if step.graph)

    def run(self, first_row: int, num_rows: int) -> None:
        """Enqueue the step over rows of the pool; where it is new, wait for it and capture it for the next time.

        Args:
            first_row: In the pool.
            num_rows: A bucket.

        Raises:
            QwenRtError: TensorRT or CUDA refuses to run it. A capture that fails is a warning, once.
        """
        key = first_row, num_rows
        step = self._steps.pop(key, None)
        if step is None:
            step = self._make_room()
        self._steps[key] = step  # behind the others: it has been used last
        if step.graph:
            self._cuda.graph_launch(step.graph, self._stream)
            return
        with measured(self._cuda, self._add_bytes):
            self._enqueue(step.context, first_row, num_rows)
            self._cuda.stream_synchronize(self._stream)
            if not self.trouble:
                self._try_capture(step, first_row, num_rows)

    def _make_room(self) -> _Step:
        while len(self._steps) >= MAX_STEPS:
            self._drop(next(iter(self._steps)))
        return _Step(self._open_context())

    def _try_capture(self, step: _Step, first_row: int, num_rows: int) -> None:
        try:
            if not step.context.can_capture(self._stream):
                raise QwenRtError("TensorRT says that this engine cannot be captured")
            step.graph = self._resources.graph_exec(self._capture(step.context, first_row, num_rows))
        except QwenRtError as error:
            self.trouble = str(error)
            warnings.warn(f"decode steps run uncaptured, and slower: {error}", RuntimeWarning, stacklevel=2)

    def _capture(self, context: Context, first_row: int, num_rows: int) -> int:
        self._cuda.capture_begin(self._stream)
        try:
            self._enqueue(context, first_row, num_rows)
        except BaseException:
            with contextlib.suppress(QwenRtError):  # the stream must leave capture mode; the first error is the one
                if graph := self._cuda.capture_end(self._stream):
                    self._cuda.graph_destroy(graph)
            raise
        return self._cuda.capture_end(self._stream)

    def _drop(self, key: tuple[int, int]) -> None:
        step = self._steps.pop(key)
        if step.graph:
            self._resources.release(step.graph)
        step.context.close()

    def close(self) -> None:
        """Destroy graphs and contexts; nothing may be running."""
        while self._steps:
            self._drop(next(iter(self._steps)))
