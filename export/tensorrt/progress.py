"""The builder's own progress on our bar, and its way to be stopped."""

from __future__ import annotations

import threading
from typing import Any

from qwen_rt.progress import Progress

__all__ = ["STEPS", "make_monitor"]

STEPS = 1000
"""Steps of the bar while the library compiles; writing the engine takes as many again."""


def make_monitor(module: Any, bar: Progress, cancelled: threading.Event) -> Any:
    """Return a progress monitor for the library.

    The builder reports phases within phases, each with its number of steps. A phase takes up one step of the phase
    around it, so the bar goes from 0 to `STEPS` once, and never back.

    Args:
        module: The library.
        bar: Is told of progress, `STEPS` steps in all, from the builder's thread.
        cancelled: Once set, the builder is told to stop at its next step.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._shares: dict[str, tuple[float, float]] = {}  # phase → where it begins, length of one of its steps
            self._lock = threading.Lock()
            self._shown = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                start, share = self._shares.get(parent_phase or "", (0.0, 1.0 if not self._shares else 0.0))
                self._shares[phase_name] = start, share / max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._shares:
                    start, share = self._shares[phase_name]
                    self._shares[phase_name] = start + share, share
                    self._show(start + share)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._shares.pop(phase_name, None)

        def _show(self, share: float) -> None:
            reached = min(STEPS, int(share * STEPS))
            if reached > self._shown:
                bar.update(reached - self._shown)
                self._shown = reached

    return Monitor()
