"""Where every benchmark writes its numbers: one JSON object a line, with all it takes to judge and to repeat them.

    benchmarks/results/<benchmark>.jsonl
      schema, benchmark, contender, run, date      what was measured, and in which run: only rows of one run compare
      commit, dirty, command                       which code, and how to run it again
      device, versions, settings                   on what, with what, how
      check                                        the reference check that passed before the timing
      metrics                                      numbers with their unit in the name; samples as median, p10, p90, n
      bars                                         limits that the benchmark was set, and whether they were met

A row without a passed check cannot be written.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.benchmarks.row_file import append_line
from qwen_rt.errors import VerificationError
from qwen_rt.machine import read_cpu

__all__ = [
    "FIELDS",
    "RESULTS_FOLDER",
    "SCHEMA",
    "UNITS",
    "append_row",
    "bar",
    "command_line",
    "device",
    "git_state",
    "hide_paths",
    "make_row",
    "new_run",
    "number_of",
    "percentile",
    "problems_of",
    "read_rows",
    "results_file",
    "settings_of",
    "summarize",
    "versions",
    "write_row",
]

RESULTS_FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 1
FIELDS = (
    "schema",
    "benchmark",
    "contender",
    "run",
    "date",
    "commit",
    "dirty",
    "command",
    "device",
    "versions",
    "settings",
    "check",
    "metrics",
)
"""What every row has; `bars` is optional."""

UNITS = ("_gb_s", "_tok_s", "_tflop_s", "_ms", "_us", "_s", "_gb", "_mb", "_bytes", "_tokens", "_ratio")
"""How the name of a metric ends."""

_OLDER_SETTINGS = {
    "latency": {"kv_cache": "bf16"},
    "timeline": {"kv_cache": "bf16"},
    "cuda_accuracy": {"drawn": "plain"},
}
"""Benchmark → settings that its first rows do not name, as there was one value only."""

_STATISTICS = ("median", "p10", "p90", "n")
_MAX_BUSY_SHARE = 0.1
_PACKAGES = ("onnxruntime", "onnx", "torch", "transformers", "numpy")
# An absolute path of two parts or more, at the start of a text or after what may stand before one.
_PATH = re.compile(r"""(?:(?<=^)|(?<=[\s=:,;'"(\[]))~?/(?:[^\s/:,;'"()\[\]]+/)+([^\s/:,;'"()\[\]]*)""")


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the sample below which `share` of them lie, linear between neighbours (numpy's default).

    Raises:
        ValueError: There is no sample.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Iterable[float], digits: int = 4) -> dict[str, float | int]:
    """Return median, p10, p90 and n, rounded to `digits` significant digits."""
    values = list(samples)
    points = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    return {name: _round(percentile(values, share), digits) for name, share in points.items()} | {"n": len(values)}


def _round(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def bar(value: float, limit: float) -> dict[str, float | bool]:
    """A limit that `value` should stay below."""
    return {"limit": limit, "value": _round(value), "met": value < limit}


def hide_paths(value: Any) -> Any:
    """Return JSON data whose texts name no folder of this machine: `/a/b/model` becomes `.../model`."""
    if isinstance(value, str):
        return _PATH.sub(lambda match: f".../{match[1]}", value)
    if isinstance(value, Mapping):
        return {str(key): hide_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths(item) for item in value]
    return value


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command that started this program: modules by name, paths inside the checkout relative to it."""
    arguments = list(sys.argv if argv is None else argv)
    script = Path(arguments[0])
    package = RESULTS_FOLDER.parent
    if script.suffix == ".py" and script.resolve().parent == package:
        program = ["python", "-m", f"qwen_rt.benchmarks.{script.stem}"]
    elif script.name == "__main__.py":
        program = ["qwen-rt"]
    else:
        program = [script.name]
    return shlex.join([*program, *(_relative(argument) for argument in arguments[1:])])


def _relative(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if value.startswith(("/", "~")):
        path = Path(value)
        root = RESULTS_FOLDER.parent.parent
        value = str(path.relative_to(root)) if path.is_relative_to(root) else f".../{path.name}"
    return option + equals + value


def results_file(benchmark: str, given: Path | None = None) -> Path | None:
    """Return where the rows of a benchmark go: a given file, else the results of a checkout; None outside one."""
    if given is not None:
        return given
    in_checkout = (RESULTS_FOLDER.parent.parent / "pyproject.toml").is_file()
    return RESULTS_FOLDER / f"{benchmark}.jsonl" if in_checkout else None


def git_state() -> tuple[str, bool | None]:
    """Return the commit of the checkout and whether it has changes beside results; ("unknown", None) outside one."""
    root = RESULTS_FOLDER.parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown", None
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
    return commit, bool(changes)


def device() -> dict[str, Any]:
    """Describe the processor as this process may use it."""
    cpu = read_cpu()
    found: dict[str, Any] = {"cpu": cpu.model, "num_cores": cpu.num_usable_cores, "flags": list(cpu.flags)}
    found["memory_gb"] = None if cpu.memory_bytes is None else _round(cpu.memory_bytes / 1e9, 3)
    return found


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, qwen-rt, what most benchmarks use, and `packages`, where installed."""
    found = {"python": platform.python_version(), "qwen-rt": __version__}
    for name in (*_PACKAGES, *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _busy_share(seconds: float = 0.5) -> float:
    """Share of all cores' time that this machine spends on others' work, this process asleep; 0 where unknown."""

    def times() -> list[int]:
        return [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]

    try:
        before = times()
        time.sleep(seconds)
        spent = [after - old for old, after in zip(before, times(), strict=True)]
    except (OSError, ValueError):
        return 0.0
    return 1 - (spent[3] + spent[4]) / max(sum(spent), 1)  # idle and iowait


def new_run() -> str:
    """Return the name of a run that starts now, which all its rows carry; warns if the machine is busy."""
    busy = _busy_share()
    if busy > _MAX_BUSY_SHARE:
        print(f"warning: other programs take {busy:.0%} of this machine; times will be too long", file=sys.stderr)
    return f"{now()}-{os.getpid()}"


def make_row(
    benchmark: str,
    contender: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    check: Mapping[str, Any],
    run: str,
    used: Mapping[str, str] | None = None,
    bars: Mapping[str, Any] | None = None,
    gpu: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make a row without writing it.

    Args:
        benchmark: Name of the benchmark and of its file.
        contender: What was measured (`qwen-rt`, `transformers fp32`, …).
        metrics: Name with unit → a number, or a dict as `summarize` makes it.
        settings: All that decides the numbers: shapes, lengths, precision, threads. Not how often it was measured.
        check: What was compared before the timing; `passed` must be true.
        run: From `new_run`.
        used: Package → version; None for those of this process.
        bars: Name → `bar`.
        gpu: The GPU that was measured, as it calls itself; None for a CPU benchmark.

    Returns:
        The row.

    Raises:
        VerificationError: The check has not passed: there is no number without one.
        ValueError: A field is malformed.
    """
    if check.get("passed") is not True:
        raise VerificationError(f"{benchmark}, {contender}: the check did not pass", fix="see its output; no row then")
    commit, dirty = git_state()
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "contender": contender,
        "run": run,
        "date": now(),
        "commit": commit,
        "dirty": dirty,
        "command": command_line(),
        "device": device() | {"gpu": None if gpu is None else dict(gpu)},
        "versions": dict(versions() if used is None else used),
        "settings": dict(settings),
        "check": dict(check),
        "metrics": {
            name: _round(value) if isinstance(value, float) else dict(value) if isinstance(value, Mapping) else value
            for name, value in metrics.items()
        },
    }
    if bars:
        row["bars"] = dict(bars)
    row = hide_paths(row)
    if problems := problems_of(row):
        raise ValueError(f"{benchmark}, {contender}: {'; '.join(problems)}")
    return row


def append_row(row: Mapping[str, Any], file: Path) -> None:
    """Append a row to a file of rows, whole or not at all: see `append_line`."""
    append_line(file, json.dumps(row, ensure_ascii=False, allow_nan=False).encode())


def write_row(
    benchmark: str,
    contender: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    folder: Path | None = None,
    file: Path | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Make a row (`rest` as `make_row` takes it) and append it to the results of its benchmark.

    Args:
        benchmark: As for `make_row`.
        contender: As for `make_row`.
        metrics: As for `make_row`.
        settings: As for `make_row`.
        folder: Where the file is; None for `RESULTS_FOLDER`.
        file: The file itself, whatever its name; None for `<benchmark>.jsonl` in `folder`.
        rest: `check`, `run` and what else `make_row` takes.

    Returns:
        The row.

    Raises:
        VerificationError: The check has not passed.
        ValueError: A field is malformed.
    """
    row = make_row(benchmark, contender, metrics, settings, **rest)
    append_row(row, (RESULTS_FOLDER if folder is None else folder) / f"{benchmark}.jsonl" if file is None else file)
    return row


def number_of(row: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric of a row, of samples their median; None if the row lacks it."""
    value: float | Mapping[str, float] | None = row["metrics"].get(metric)
    return value["median"] if isinstance(value, Mapping) else value


def gpu_of(row: Mapping[str, Any]) -> str:
    """Return the short name of a row's GPU, as `H100`, or nothing."""
    words = str((row["device"].get("gpu") or {}).get("name", "")).removeprefix("NVIDIA ").split()
    return words[0] if words else ""


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a row, those included that rows of its benchmark have named later only."""
    return {**_OLDER_SETTINGS.get(row["benchmark"], {}), **row["settings"]}


def problems_of(row: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with a row; empty if it can be committed."""
    problems = [f"{name} is missing" for name in FIELDS if name not in row]
    if problems:
        return problems
    if row["schema"] != SCHEMA:
        problems.append(f"schema={row['schema']!r}, expected {SCHEMA}")
    for name in ("benchmark", "contender", "run", "date", "commit", "command"):
        if not isinstance(row[name], str) or not row[name]:
            problems.append(f"{name} is no text")
    for name in ("device", "versions", "settings", "check", "metrics"):
        if not isinstance(row[name], Mapping) or not row[name]:
            problems.append(f"{name} is no object, or empty")
    if problems:
        return problems
    if row["check"].get("passed") is not True:
        problems.append("the check did not pass")
    for name, value in row["metrics"].items():
        if not name.endswith(UNITS):
            problems.append(f"metric {name} has no unit ({', '.join(UNITS)})")
        if isinstance(value, Mapping):
            if tuple(value) != _STATISTICS or not all(_is_number(value[key]) for key in _STATISTICS):
                problems.append(f"metric {name} is no {', '.join(_STATISTICS)}")
        elif not _is_number(value):
            problems.append(f"metric {name}={value!r} is no finite number")
    if hide_paths(dict(row)) != dict(row):
        problems.append("a text names a folder of the machine it was run on")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_rows(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return all rows of all benchmarks, file by file, oldest first.

    Raises:
        ValueError: A line is no JSON object; says which.
    """
    rows = []
    for file in sorted((RESULTS_FOLDER if folder is None else folder).glob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(), 1):  # those of str split at U+2028 too
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file.name}:{number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file.name}:{number} is no object")
            rows.append(row)
    return rows
