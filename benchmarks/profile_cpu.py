"""Where a decode step of a CPU bundle goes: microseconds per kind of node, and what Python adds around the graph.

The table has the means of ONNX Runtime's own profile, which adds some microseconds to every node; the lines below it
compare, without the profiler, the graph alone (`run_with_iobinding`), the session around it, and the engine.

    python -m qwen_rt.benchmarks.profile_cpu BUNDLE --batch 1
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen_rt.benchmarks.cpu_contest import step_weights
from qwen_rt.benchmarks.harness import percentile
from qwen_rt.benchmarks.measure import num_cores, read_bandwidth
from qwen_rt.errors import QwenRtError
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams


def node_times(profile: Path, num_steps: int) -> dict[str, tuple[float, int]]:
    """Return, for each kind of node, its microseconds and its nodes per step, over the last `num_steps` runs.

    Args:
        profile: What ONNX Runtime wrote.
        num_steps: Runs to take, from the end.
    """
    events = json.loads(profile.read_text())
    runs = [event for event in events if event.get("name") == "model_run"][-num_steps:]
    begin, end = runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"]
    spent: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and begin <= event["ts"] <= end:
            kind = _kind(name, event["args"]["op_name"])
            spent[kind] += event["dur"]
            counts[kind] += 1
    whole = sum(run["dur"] for run in runs)
    spent["(between nodes)"] = whole - sum(spent.values())
    ordered = sorted(spent, key=lambda kind: -spent[kind])
    return {kind: (spent[kind] / num_steps, round(counts[kind] / num_steps)) for kind in ordered}


def _kind(node: str, op: str) -> str:
    """Operator, and which projection where a model has several."""
    for part in ("lm_head", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"):
        if part in node:
            return f"{op} {part}"
    return op


def profile_nodes(bundle: str, batch: int, prompt_tokens: int, num_steps: int, threads: int) -> dict[str, Any]:
    """Run decode steps under ONNX Runtime's profiler; returns `node_times`."""
    made: list[Any] = []
    original = ort.InferenceSession

    class Profiled(original):  # type: ignore[misc, valid-type]  # the session has no option for it: benchmarks only
        def __init__(self, model: Any, options: Any, **more: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ort")
            super().__init__(model, options, **more)
            made.append(self)

    with tempfile.TemporaryDirectory() as folder:
        ort.InferenceSession = Profiled
        try:
            llm = LLM(bundle, num_threads=threads)
        finally:
            ort.InferenceSession = original
        _generate(llm, batch, prompt_tokens, num_steps + 10)
        return node_times(Path(made[0].end_profiling()), num_steps)


def _prompts(llm: LLM, batch: int, prompt_tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, llm.tokenizer.vocab_size, (batch, prompt_tokens)).tolist()  # type: ignore[no-any-return]


def _generate(llm: LLM, batch: int, prompt_tokens: int, num_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    llm.generate(_prompts(llm, batch, prompt_tokens), params)


def _clock(owner: Any, name: str, times: list[tuple[float, float]], keep: Callable[..., bool]) -> None:
    """Replace a method by one that notes when it began and ended."""
    method = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = method(*arguments)
        if keep(*arguments):
            times.append((begin, time.perf_counter()))
        return result

    setattr(owner, name, timed)


class _Graph:
    """Stands in for the ONNX Runtime session and times its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)


def layers_of_a_step(bundle: str, batch: int, prompt_tokens: int, num_steps: int, threads: int) -> dict[str, float]:
    """Return the median microseconds of a step: graph, session around it, engine around that."""
    llm = LLM(bundle, num_threads=threads)
    session: Any = llm.session
    session._session = _Graph(session._session)
    graph: list[tuple[float, float]] = []
    outer: list[tuple[float, float]] = []
    _clock(session._session, "run_with_iobinding", graph, lambda *_: True)
    _clock(session, "run", outer, lambda *arguments: True)
    _generate(llm, batch, prompt_tokens, num_steps + 10)
    graph, outer = graph[-num_steps:], outer[-num_steps:]

    def median_us(seconds: Sequence[float]) -> float:
        return 1e6 * percentile(seconds, 0.5)

    turn = median_us([after[1] - before[1] for before, after in itertools.pairwise(outer)])
    run = median_us([end - begin for begin, end in outer])
    alone = median_us([end - begin for begin, end in graph])
    return {"graph": alone, "session around it": run - alone, "engine, sampler, text": turn - run, "whole step": turn}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Where a decode step of a CPU bundle goes.")
    parser.add_argument("bundle", help="folder that `qwen-rt build` wrote")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of the prompts (default: 64)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps (default: 100)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads (default: all cores)")
    args = parser.parse_args(argv)
    try:
        for batch in args.batch:
            shape = (args.bundle, batch, args.prompt_tokens, args.steps, args.threads)
            nodes = profile_nodes(*shape)
            print(f"\n| batch {batch}: node | us a step | nodes |\n|---|---|---|")
            for kind, (spent_us, count) in nodes.items():
                print(f"| {kind} | {spent_us:.1f} | {count or ''} |")
            print("\n| part of a step | us |\n|---|---|")
            for name, spent_us in layers_of_a_step(*shape).items():
                print(f"| {name} | {spent_us:.1f} |")
        weight_bytes = 4 * step_weights(LLM(args.bundle).spec)
        rate = read_bandwidth(weight_bytes, threads=args.threads)["gb_s"]
        print(f"\nfloor: {weight_bytes / 1e6:.1f} MB of weights at {rate} GB/s: {weight_bytes / rate / 1e3:.1f} us")
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
