"""Tables from the result rows: printed, drawn as a picture, or put into documents between their markers.

    <!-- results:cpu_decode -->
    … replaced by the table …
    <!-- /results -->

A table has the newest row for each contender and settings. Slower results stay in: nothing is left out or reordered by
who wins. The last column compares the headline number with that of qwen-rt in the same run under the same settings;
rows of different runs are never divided by each other.

    python -m qwen_rt.benchmarks.report
    python -m qwen_rt.benchmarks.report --update README.md docs/performance.md
    python -m qwen_rt.benchmarks.report --check README.md docs/performance.md
    python -m qwen_rt.benchmarks.report cpu_decode --picture decode.svg
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks import bars
from qwen_rt.benchmarks.harness import UNITS, gpu_of, number_of, read_rows, settings_of
from qwen_rt.benchmarks.latency_report import draw_latency, latency_tables, load_pyplot
from qwen_rt.benchmarks.peers_report import has_peers, peers_rows, peers_tables
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.storage import atomic_write_bytes

OURS = "qwen-rt"
_BLOCK = re.compile(r"(<!-- results:([\w.-]+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- results:([\w.-]+) -->")

_MAY_BE_EMPTY = ("latency", "peers", "nano_quantized_cuda")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the table of a benchmark looks: the metrics in order; the first one is the headline."""

    metrics: tuple[str, ...]


LAYOUTS = {
    "cpu_decode": Layout(("itl_ms", "decode_tok_s", "first_token_ms", "floor_ms", "itl_floor_ratio")),
    "cpu_start": Layout(("first_text_s",)),
    "cpu_05b": Layout(
        (
            "itl_ms",
            "itl_floor_ratio",
            "first_token_ms",
            "load_s",
            "peak_rss_gb",
            "running_anonymous_gb",
            "build_s",
            "build_peak_rss_gb",
        )
    ),
    "nano_accuracy": Layout(
        (
            "exact_match_ratio",
            "same_answers_as_transformers_ratio",
            "same_tokens_as_transformers_ratio",
            "throughput_tok_s",
        )
    ),
    "ort_weights": Layout(("create_s", "peak_rss_mb", "chain_ms", "weights_read_gb_s", "read_bandwidth_gb_s")),
    "nano_quantized": Layout(("exact_match_ratio", "weights_mb")),
    "nano_quantized_cuda": Layout(("exact_match_ratio", "lost_ratio", "throughput_tok_s")),
    "cuda_accuracy": Layout(
        ("logits_cosine_ratio", "logits_relative_error_ratio", "own_weights_cosine_ratio", "same_best_token_ratio")
    ),
    "quantize": Layout(
        (
            "peak_rss_gb",
            "input_gb_s",
            "disk_read_gb_s",
            "disk_write_gb_s",
            "input_gb",
            "output_gb",
            "weights_s",
            "wall_s",
        )
    ),
    "export_72b": Layout(("wall_s", "peak_rss_gb", "graph_mb", "output_mb", "checkpoint_gb")),
}
"""Benchmark → layout; one without an entry shows all its metrics in the order of its newest row."""

_TITLES = {
    "itl_ms": "ms a token",
    "decode_tok_s": "tok/s",
    "first_token_ms": "first token, ms",
    "first_text_s": "first text, s",
    "floor_ms": "floor, ms",
    "itl_floor_ratio": "× floor",
    "running_anonymous_gb": "own memory, GB",
}
_UNIT_TEXT = {
    "_gb_s": "GB/s",
    "_tok_s": "tok/s",
    "_tflop_s": "TFLOP/s",
    "_ms": "ms",
    "_us": "µs",
    "_s": "s",
    "_gb": "GB",
    "_mb": "MB",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_ratio": "×",
}


def newest(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Return the newest row for each contender, settings and GPU, in order of the first; of `latency` only ours."""
    latest: dict[str, Row] = {}
    for row in rows:
        if row["benchmark"] == benchmark and (benchmark != "latency" or row["contender"] == OURS):
            key = json.dumps([row["contender"], settings_of(row), gpu_of(row)], sort_keys=True)
            if key not in latest or row["date"] >= latest[key]["date"]:
                latest[key] = row
    return list(latest.values())


def _title(metric: str) -> str:
    if metric in _TITLES:
        return _TITLES[metric]
    unit = next(unit for unit in UNITS if metric.endswith(unit))
    return f"{metric.removesuffix(unit).replace('_', ' ').replace('rss', 'RSS')}, {_UNIT_TEXT[unit]}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if 0.99 < value < 1:  # cosines and shares that are nearly all
        return f"{value:.5f}".rstrip("0")
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _show(value: object) -> str:
    if isinstance(value, list) and len(set(map(str, value))) > 1 and all(isinstance(item, int) for item in value):
        return f"{min(value)} to {max(value)}"
    return ", ".join(map(str, dict.fromkeys(map(str, value)))) if isinstance(value, list) else str(value)


def _settings_split(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that all rows share, and the names of those that differ."""
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    texts = {name: {json.dumps(row["settings"].get(name)) for row in rows} for name in names}
    shared = {name: rows[0]["settings"][name] for name in names if len(texts[name]) == 1}
    return shared, [name for name in names if len(texts[name]) > 1]


def _group(row: Row) -> str:
    """What rows must have in common to be compared: the run, and all settings but those of the contender itself."""
    return json.dumps([row["run"], {k: v for k, v in row["settings"].items() if k != "precision"}], sort_keys=True)


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """Our row beside `row`: the first of ours in the same group."""
    return next((r for r in rows if str(r["contender"]).startswith(OURS) and _group(r) == _group(row)), None)


def _ratio(row: Row, rows: Sequence[Row], headline: str) -> str:
    ours = _baseline(row, rows)
    mine, theirs = (None if ours is None else number_of(ours, headline)), number_of(row, headline)
    return "–" if not mine or theirs is None else f"{theirs / mine:.2f}"


def table(rows: Sequence[Row], benchmark: str) -> str:
    """Return the Markdown table of a benchmark, with a line about the machine and the command under it.

    `latency` has a table for each kind of our rows, `peers` has all contenders of the runs in which there were several;
    `bars` is the table of all bars, which no run makes; `bars-brief` lacks where its values come from.

    Raises:
        UsageError: There is no such benchmark.
    """
    if benchmark in ("bars", "bars-brief"):
        return bars.markdown(bars.judge(bars.load(), rows), brief=benchmark == "bars-brief")
    if benchmark == "peers" and has_peers(rows):
        chosen = peers_rows(rows)
        return peers_tables(chosen) + "\n" + "\n".join(_footnotes(chosen, {})) + "\n"
    chosen = newest(rows, benchmark)
    if not chosen:
        known = sorted({str(row["benchmark"]) for row in rows})
        raise UsageError(f"no results of {benchmark}", "one of " + ", ".join(known) if known else "", "run it first")
    if benchmark == "latency":
        chosen.sort(key=_latency_order)
        return latency_tables(chosen) + "\n" + "\n".join(_footnotes(chosen, {})) + "\n"
    metrics = [
        name for name in _metrics_of(benchmark, chosen) if any(number_of(row, name) is not None for row in chosen)
    ]
    shared, differing = _settings_split(chosen)
    compared = len(chosen) > 1 and any(not str(row["contender"]).startswith(OURS) for row in chosen)
    titles = ["", *(name.replace("_", " ") for name in differing), *map(_title, metrics)]
    lines = ["| " + " | ".join(titles + ([f"{_title(metrics[0])} / ours"] if compared else [])) + " |"]
    lines.append("|---" * (1 + len(differing)) + "|--:" * (len(metrics) + compared) + "|")
    for row in chosen:
        cells = [str(row["contender"]), *(_show(row["settings"].get(name, "–")) for name in differing)]
        cells += [_number(number_of(row, name)) for name in metrics]
        lines.append("| " + " | ".join(cells + ([_ratio(row, chosen, metrics[0])] if compared else [])) + " |")
    return "\n".join([*lines, "", *_footnotes(chosen, shared)]) + "\n"


def _latency_order(row: Row) -> tuple[Any, ...]:
    settings = settings_of(row)
    prompt, rows = settings.get("prompt", 0), settings.get("rows", 0)
    stored = settings.get("weights", ""), settings["kv_cache"], settings["source"]
    return gpu_of(row), settings["model"], *stored, settings["layers"], rows > 1, prompt, rows


def _metrics_of(benchmark: str, rows: Sequence[Row]) -> list[str]:
    if benchmark in LAYOUTS:
        return list(LAYOUTS[benchmark].metrics)
    return list(dict.fromkeys(name for row in reversed(rows) for name in row["metrics"]))


def _footnotes(rows: Sequence[Row], shared: Mapping[str, Any]) -> list[str]:
    """What the numbers were measured with: one line for each machine and state of the code among the rows."""
    settings = "; ".join(f"{name.replace('_', ' ')} {_show(value)}" for name, value in shared.items())
    lines = dict.fromkeys(_provenance(row) for row in rows)
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in row["versions"].items():
            versions.setdefault(package, {})[version] = None
    used = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    commands = dict.fromkeys(f"`{row['command']}`" for row in rows)
    text = [f"Medians. {settings[:1].upper()}{settings[1:]}." if settings else "Medians."]
    return [" ".join([*text, *lines]) + f" {used}. {', '.join(commands)}"]


def _provenance(row: Row) -> str:
    machine = row["device"]
    gpu = f"{machine['gpu']['name']}, " if machine.get("gpu") else ""
    memory = f", {machine['memory_gb']:.0f} GB" if machine.get("memory_gb") else ""
    changed = " with changes" if row["dirty"] else ""
    commit = row["commit"][:10]
    return f"{gpu}{machine['cpu']}, {machine['num_cores']} cores{memory}; {row['date'][:10]}, commit {commit}{changed}."


def update(text: str, rows: Sequence[Row], source: str = "document") -> str:
    """Return a document with every table between markers made anew; `latency` may have no rows yet.

    Raises:
        UsageError: A marker names a benchmark without results, or is not closed.
    """
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise UsageError(f"{source}: a results marker is not closed", "<!-- /results --> on a line of its own after it")

    def made(benchmark: str) -> str:
        there = has_peers(rows) if benchmark == "peers" else newest(rows, benchmark)
        if benchmark in _MAY_BE_EMPTY and not there:
            return "No rows yet.\n"
        return table(rows, benchmark)

    return _BLOCK.sub(lambda match: f"{match[1]}{made(match[2])}{match[4]}", text)


def draw(rows: Sequence[Row], benchmark: str, file: Path) -> None:
    """Draw the headline number of a benchmark as bars, one group for each settings, with the spread from p10 to p90.

    Raises:
        UsageError: There is no such benchmark.
        MissingDependencyError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    table(rows, benchmark)
    chosen = newest(rows, benchmark)
    if benchmark == "latency":
        draw_latency(chosen, file)
        return
    headline = _metrics_of(benchmark, chosen)[0]
    _, differing = _settings_split(chosen)
    labels = [", ".join([str(row["contender"]), *_label(row, differing)]) for row in chosen]
    values = [number_of(row, headline) or 0.0 for row in chosen]
    spreads = [_spread(row, headline) for row in chosen]
    colors = ["#1f6f8b" if str(row["contender"]).startswith(OURS) else "#b9c4c9" for row in chosen]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(chosen) + 1.2), layout="constrained")
    drawn = axes.barh(labels, values, color=colors, xerr=list(zip(*spreads, strict=True)), ecolor="#5a6468")
    axes.bar_label(drawn, [f" {_number(value)}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"{_title(headline)}, median with p10 to p90")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    # Without a date in it, the same rows give the same file.
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _label(row: Row, differing: Sequence[str]) -> list[str]:
    return [f"{name.replace('_', ' ')} {row['settings'][name]}" for name in differing if name == "batch"]


def _spread(row: Row, metric: str) -> tuple[float, float]:
    value = row["metrics"].get(metric)
    if not isinstance(value, Mapping):
        return 0.0, 0.0
    return max(0.0, value["median"] - value["p10"]), max(0.0, value["p90"] - value["median"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print, draw, update or check."""
    parser = argparse.ArgumentParser(description="Tables and pictures from the result rows.")
    parser.add_argument("benchmark", nargs="*", help="which benchmarks (default: all that have results)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--update", nargs="+", type=Path, metavar="FILE", help="make the tables in these files anew")
    group.add_argument("--check", nargs="+", type=Path, metavar="FILE", help="exit 1 if --update would change a file")
    group.add_argument("--picture", type=Path, metavar="FILE", help="draw one benchmark, .svg or .png")
    args = parser.parse_args(argv)
    try:
        try:
            rows = read_rows(args.results)
        except ValueError as error:
            raise UsageError(f"the result rows cannot be read: {error}", "one JSON object a line") from None
        return _run(args, rows)
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    names = args.benchmark or list(dict.fromkeys(str(row["benchmark"]) for row in rows))
    if args.picture:
        if len(names) != 1:
            raise UsageError(f"--picture with {len(names)} benchmarks", "one", "name it before --picture")
        draw(rows, names[0], args.picture)
        return 0
    stale = False
    for file in args.update or args.check or ():
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read: {error}", "a UTF-8 document with markers") from None
        fresh = update(text, rows, str(file))
        if fresh == text:
            continue
        if args.update:
            atomic_write_bytes(file, fresh.encode())
            print(f"updated {file}")
        else:
            stale = True
            print(f"{file} is out of date: python -m qwen_rt.benchmarks.report --update {file}", file=sys.stderr)
    if not args.update and not args.check:
        print("\n".join(f"## {name}\n\n{table(rows, name)}" for name in names))
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
