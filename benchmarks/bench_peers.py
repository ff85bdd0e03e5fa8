"""Times qwen-rt and other engines on the same GPU in the same run: same shapes, lengths and greedy settings.

    qwen-rt bench peers 1.5b 7b --vllm-python vllm/bin/python --ort-genai-python genai/bin/python

For each model and precision first our session is timed as `bench latency` does, then each peer in a process of its own
(`peers.py`, `peer_worker.py`), the GPU to itself. Weights are random: ours made on the device, vLLM's its dummy ones,
ORT GenAI's in a model that its own builder made from a checkpoint of random numbers.

Rows go to `latency.jsonl`, with the settings that ours have: `decode` and `prefill` at the same points, and of peers a
`session` with the seconds from start to ready. The floor is that of our weights at that precision, for everybody, over
the bandwidth measured in this run. A peer's tokens are compared with no reference: the check of its rows says what was
looked at. Points that a peer cannot run are told in a line; the others have their rows.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.bench_latency import Gpu, Model, find_model, measure, open_gpu
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.benchmarks.latency import Plan, prefill_metrics, token_metrics
from qwen_rt.benchmarks.peers import PEERS, Peer, events_of, fields_of, find_python, task_of
from qwen_rt.benchmarks.peers_report import peers_text
from qwen_rt.errors import MissingDependencyError, QwenRtError, UsageError, one_line

__all__ = ["OUR_NAME", "Plan", "measure_peer", "run"]

OUR_NAME = "qwen-rt"
_CHECK = (
    "as many tokens as asked, all of the vocabulary; no reference; equal_share: greedy tokens of two requests alike"
)

Write = Callable[..., None]
"""Takes contender, metrics, settings, check and versions, and makes a row."""


def measure_peer(
    peer: Peer,
    python: str,
    model: Model,
    plan: Plan,
    gpu: Gpu,
    write: Write,
    log: Path,
    *,
    timeout_s: float,
    device: int,
) -> None:
    """Time one peer at all points of a plan; rows are written as they come.

    Args:
        peer: Which.
        python: Its interpreter.
        model: A shape, from `find_model`.
        plan: What is timed.
        gpu: What was measured of the GPU.
        write: Gets every row's parts.
        log: A new file for what the peer prints.
        timeout_s: For all of it.
        device: The GPU's number.

    Raises:
        MissingDependencyError: It is not installed.
        QwenRtError: It failed, answered nonsense, was not done in time, or could not run some points.
    """
    settings: dict[str, Any] = {"model": model.name, "weights": model.precision, "kv_cache": model.kv_format}
    settings |= {"source": model.source, "layers": model.shape.layers}
    check: dict[str, Any] = {"passed": True, "what": _CHECK}
    versions: dict[str, str] = {}
    refused: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen-rt-peer-")))
        task = task_of(peer, model.shape, model.precision, plan, folder)
        events = stack.enter_context(
            contextlib.closing(events_of(peer, python, task, log, timeout_s=timeout_s, device=device))
        )
        for event in events:
            kind = event["event"]
            if kind == "progress":
                _say(f"{model.name} {model.precision}, {peer.name}: {event.get('text')}")
            elif kind == "ready":
                load_s, versions, engine = fields_of(event, "load_s", "versions", "engine")
                settings |= {"engine": engine}
                session = settings | {"what": "session", "max_length": plan.max_length}
                write(peer.name, {"load_s": float(load_s)}, session, check, versions)
            elif kind == "decode":
                rows, prompt, samples, share = fields_of(event, "rows", "prompt", "step_ms", "equal_share")
                seen = check | {"equal_share": share}
                times = _samples(peer, samples)
                metrics = token_metrics(model.shape, model.floor_bytes, rows, prompt, times, gpu.bandwidth)
                point = {"what": "decode", "rows": rows, "prompt": prompt}
                write(peer.name, metrics, settings | point, seen, versions)
            elif kind == "first_token":
                prompt, samples, share = fields_of(event, "prompt", "ms", "equal_share")
                seen = check | {"equal_share": share}
                metrics = prefill_metrics(model.shape, prompt, _samples(peer, samples), [], gpu.matrix_rate)
                write(peer.name, metrics, settings | {"what": "prefill", "prompt": prompt}, seen, versions)
            elif kind == "refused":
                rows, prompt, message = fields_of(event, "rows", "prompt", "message")
                refused.setdefault(one_line(str(message)), []).append(f"{rows} rows at {prompt} tokens")
    if refused:
        told = "; ".join(f"{', '.join(points)}: {message}" for message, points in refused.items())
        raise QwenRtError(f"{peer.name}, {model.name} {model.precision}: no figure for {told}", fix=f"see {log}")


def _samples(peer: Peer, given: object) -> list[float]:
    """Return times as a worker gave them.

    Raises:
        QwenRtError: They are no positive numbers.
    """
    if isinstance(given, list) and given and all(isinstance(item, int | float) and item > 0 for item in given):
        return [float(item) for item in given]
    raise QwenRtError(f"{peer.name}: its worker gave {given!r:.80} as times", "positive numbers")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    names: Sequence[str],
    precisions: Sequence[str],
    plan: Plan,
    *,
    peers: Sequence[str] = (),
    pythons: Mapping[str, str | None] | None = None,
    layers: int | None = None,
    timeout_s: float = 900.0,
    logs: Path | None = None,
    device: int = 0,
    output: Path | None = None,
    quiet: bool = False,
) -> int:
    """Time models one after another, each by every contender; print tables and append rows.

    Args:
        names: Shapes.
        precisions: Of their layers.
        plan: What is timed.
        peers: Which must be there; empty for all, each where it is installed.
        pythons: Peer → its interpreter; None for this one.
        layers: If fewer than the shapes have.
        timeout_s: For one model in one peer.
        logs: Folder for what peers print; None for a new one among temporary files.
        device: The GPU's number.
        output: The file of rows; None writes none.
        quiet: No progress on stderr.

    Returns:
        0, or 1 if a peer that is there failed or lacks a point, or one of `peers` is not there.

    Raises:
        QwenRtError: Something of ours is absent, does not fit or is not correct; one line.
    """
    for name in names:
        if name not in SHAPES:
            raise UsageError(f"model {name!r}", f"one of {', '.join(SHAPES)}", "peers are timed with random weights")
    chosen = [PEERS[name] for name in dict.fromkeys(peers or PEERS)]
    interpreters = {peer.name: find_python(peer, (pythons or {}).get(peer.name)) for peer in chosen}
    models = [find_model(name, layers, device, quiet, precision) for name in names for precision in precisions]
    folder = Path(tempfile.mkdtemp(prefix="qwen-rt-peers-")) if logs is None else logs
    folder.mkdir(parents=True, exist_ok=True)
    gpu = open_gpu(device, with_matrix_rate=True)
    described, run_name = gpu.describe(), harness.new_run()
    ours = harness.versions("onnxruntime-gpu") | dict(gpu.versions)
    of_gpu = {"qwen-rt": __version__} | {
        name: gpu.versions[name] for name in ("driver", "cuda") if name in gpu.versions
    }
    rows: list[dict[str, Any]] = []

    def write(
        contender: str,
        metrics: dict[str, Any],
        settings: dict[str, Any],
        check: dict[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        used = ours if contender == OUR_NAME else dict(versions) | of_gpu
        row = harness.make_row(
            "latency", contender, metrics, settings, check=check, run=run_name, used=used, gpu=described
        )
        rows.append(row)
        if output is not None:
            harness.append_row(row, output)

    def write_ours(metrics: dict[str, Any], settings: dict[str, Any], check: dict[str, Any]) -> None:
        write(OUR_NAME, metrics, settings, check, {})

    failed = False
    absent: set[str] = set()
    for model in models:
        first = len(rows)
        measure(model, plan, gpu, write_ours, quiet=quiet)
        for peer in chosen:
            if peer.name in absent:
                continue
            if model.precision not in peer.precisions:
                _say(f"{peer.name}: not timed at {model.precision}, only at {', '.join(peer.precisions)}")
                continue
            log = folder / f"{peer.name}-{model.name}-{model.precision}.log"
            python = interpreters[peer.name]
            try:
                measure_peer(peer, python, model, plan, gpu, write, log, timeout_s=timeout_s, device=device)
            except MissingDependencyError as error:
                _say(str(error))
                absent.add(peer.name)
            except QwenRtError as error:
                _say(str(error))
                failed = True
        print(peers_text(rows[first:]), flush=True)
    return int(failed or bool(absent.intersection(peers)))
