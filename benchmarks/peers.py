"""Other engines beside ours: which there are, how one is started, and the answers of its worker.

Each runs in a Python of its own (`--vllm-python`, `--ort-genai-python`), as `peer_worker.py`, which imports nothing of
qwen-rt and answers with one JSON object a line. What it and its libraries print otherwise goes to a log. A worker that
is not installed, fails, answers nonsense or takes too long ends in one line, and takes all its children with it.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen_rt.errors import MissingDependencyError, QwenRtError, UsageError

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_shapes import ModelShape
    from qwen_rt.benchmarks.latency import Plan

__all__ = ["PEERS", "WORKER", "Peer", "events_of", "fields_of", "find_python", "task_of"]

WORKER = Path(__file__).with_name("peer_worker.py")
_EVENTS = ("progress", "ready", "decode", "first_token", "refused", "done", "missing", "failed")
_LOG_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Peer:
    """Another engine.

    Attributes:
        name: As contender in the rows, as value of `--peer`, and as kind of the worker.
        title: As in tables.
        package: What pip installs.
        precisions: Of weights that it is timed with.
        needs_checkpoint: It reads weights and a tokenizer from files; else a config.json is enough.
    """

    name: str
    title: str
    package: str
    precisions: tuple[str, ...]
    needs_checkpoint: bool


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("vllm", "vLLM", "vllm", ("bf16", "fp8", "int4"), needs_checkpoint=False),
        Peer("ort-genai", "ORT GenAI", "onnxruntime-genai-cuda", ("bf16", "int4"), needs_checkpoint=True),
    )
}


def find_python(peer: Peer, given: str | None) -> str:
    """Return the interpreter of a peer; None stands for the one that runs this.

    Raises:
        UsageError: There is no such program.
    """
    if given is None:
        return sys.executable
    found = shutil.which(given)
    if found is None:
        fix = f"name the python of the environment that has {peer.package}"
        raise UsageError(f"--{peer.name}-python {given} is no program", "a Python interpreter", fix)
    return found


def task_of(peer: Peer, shape: ModelShape, precision: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Write what a peer reads into a folder and return its task.

    Args:
        peer: Whose.
        shape: The model.
        precision: Of the layers' matrices.
        plan: Points, steps and repeats.
        folder: An empty folder; takes a bf16 checkpoint of random weights where the peer needs one.
    """
    if peer.needs_checkpoint:
        from qwen_rt.benchmarks.checkpoints import write_repeated, write_tokenizer

        write_repeated(folder, shape.config(), num_shards=4)
        write_tokenizer(folder, shape.vocab)
    return {
        "config": shape.config(),
        "precision": precision,
        "folder": str(folder),
        "points": [list(point) for point in plan.points],
        "first_token_prompts": list(plan.first_token_prompts),
        "steps": plan.steps,
        "repeats": plan.repeats,
        "max_rows": plan.max_rows,
        "max_length": plan.max_length,
    }


def events_of(
    peer: Peer,
    python: str,
    task: Mapping[str, Any],
    log: Path,
    *,
    timeout_s: float,
    device: int = 0,
    worker: Path | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Run a peer's worker and yield its events until it is done: all but the last three that it lists.

    Args:
        peer: Which.
        python: Its interpreter.
        task: From `task_of`.
        log: A new file for all that it prints.
        timeout_s: For all of it, its start and loading included.
        device: The GPU's number, among those that this process may use.
        worker: Another script than `WORKER`.

    Raises:
        MissingDependencyError: The engine is not installed there.
        QwenRtError: It failed, answered nonsense, or was not done in time. All its processes are gone then.
    """
    deadline = time.monotonic() + timeout_s
    with log.open("wb") as log_stream:
        try:
            process = subprocess.Popen(
                [python, str(worker or WORKER), peer.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_stream,
                env=_environment(python, device),
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            raise QwenRtError(f"{peer.name}: {python} could not be started: {error.strerror}") from None
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    patience_s = 0.0
    try:
        with suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(task).encode() + b"\n")
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise QwenRtError(f"{peer.name}: not done after {timeout_s:g} s", fix=f"see {log}") from None
            if line is None:
                code = process.wait()
                raise QwenRtError(f"{peer.name}: ended with {code}: {_last_line(log)}", fix=f"see {log}")
            event = _parse(line)
            if event is None:
                said = line[:120].decode(errors="replace").strip()
                raise QwenRtError(f"{peer.name}: its worker said {said!r}", "events", f"see {log}")
            if event["event"] == "done":
                patience_s = 20.0
                return
            if event["event"] == "missing":
                fix = f"pip install {peer.package} in a venv of its own and name it with --{peer.name}-python"
                raise MissingDependencyError(f"{peer.name}: not installed in {python}", fix=fix)
            if event["event"] == "failed":
                raise QwenRtError(f"{peer.name}: {event.get('message', 'failed')}", fix=f"see {log}")
            yield event
    finally:
        _end(process, patience_s)
        reader.join(timeout=5)
        process.stdout.close()


def _environment(python: str, device: int) -> dict[str, str]:
    """Environment of a worker: one GPU, no script folder on its path, nothing of ours in another Python."""
    env = dict(os.environ)
    if Path(python) != Path(sys.executable):
        env.pop("PYTHONPATH", None)
    visible = [part for part in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    env["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
    return env | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.get("event") in _EVENTS else None


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Let a worker end by itself for so long, then end it and all that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def fields_of(event: Mapping[str, Any], *names: str) -> list[Any]:
    """Return fields of an event.

    Raises:
        QwenRtError: One is not there.
    """
    try:
        return [event[name] for name in names]
    except KeyError as error:
        raise QwenRtError(f"a worker's event {event.get('event')!r} lacks {error}", "all its fields") from None
