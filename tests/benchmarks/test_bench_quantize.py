"""What `bench_quantize` reads from a build's progress."""

from __future__ import annotations

import io

import pytest

from qwen_rt.benchmarks.bench_quantize import weights_seconds
from qwen_rt.errors import QwenRtError
from qwen_rt.progress import Progress


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.44, 0.4), (41.6, 42.0), (60.0, 60.0), (185.2, 185.0), (599.0, 599.0), (7860.0, 7860.0)]
)
def test_seconds_are_those_of_the_progress(seconds: float, told: float) -> None:
    """To the unit that is told: minutes have their seconds."""
    times = iter([0.0, 0.0, *[seconds] * 9])
    stream = io.StringIO()
    with Progress(9 * 10**9, "weights", "B", stream=stream, clock=lambda: next(times)) as progress:
        progress.update(9 * 10**9)
    output = f"tracing: done 4 in 1.0 s\n{stream.getvalue()}cuda int4, 80 layers: 36.1 GB in out, 1 s\n"
    assert weights_seconds(output) == pytest.approx(told)


def test_a_build_that_tells_no_seconds() -> None:
    with pytest.raises(QwenRtError, match="no progress of the weights in 'nothing'"):
        weights_seconds("nothing")
