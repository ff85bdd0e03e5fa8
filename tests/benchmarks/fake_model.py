"""A small model that benchmarks time: a real session on the fake GPU of the session's own tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qwen_rt.benchmarks.bench_latency import Gpu, Model
from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.benchmarks.latency import Plan
from qwen_rt.runtime.cuda.session import CudaSession

from ..runtime.cuda.fake import FakeGpu, make_graph, small_spec, write_shards


def model_on(gpu: FakeGpu, weights: Path, source: str) -> Model:
    """Write the model's shards into a new folder; its sessions say that they took a second to load."""
    spec = small_spec()
    weights.mkdir()
    write_shards(spec, weights)
    graph = make_graph(spec, weights)

    @contextlib.contextmanager
    def start(_: Gpu, plan: Plan) -> Iterator[tuple[CudaSession, float]]:
        with CudaSession.from_graph(
            graph,
            spec,
            plan.max_length,
            base_dir=weights,
            max_rows=plan.max_rows,
            kv_memory=plan.kv_bytes(spec),
            quiet=True,
            platform=gpu.platform(),
        ) as session:
            yield session, 1.0

    shape = ModelShape.from_spec(spec)
    return Model("tiny", shape, "bf16", "bf16", shape.floor_bytes, source, start)
