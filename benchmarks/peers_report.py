"""Contenders side by side: rows of runs of `bench peers` as text and as Markdown, and who is fastest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_rt.benchmarks.harness import number_of
from qwen_rt.benchmarks.latency_report import gpu_line
from qwen_rt.benchmarks.peers import PEERS

__all__ = ["OURS", "has_peers", "peer_runs", "peers_rows", "peers_tables", "peers_text"]

OURS = "qwen-rt"
_TITLES = {OURS: OURS} | {peer.name: peer.title for peer in PEERS.values()}
_KEYS = ("model", "weights", "layers", "what", "rows", "prompt")
_TIE = 1.01
"""Ratio below which two contenders count as equal."""

Row = Mapping[str, Any]
Table = tuple[list[str], int, list[list[str]]]


def peer_runs(rows: Sequence[Row]) -> set[str]:
    """Return the runs of `latency` rows in which somebody else was timed too."""
    return {str(row["run"]) for row in rows if row["benchmark"] == "latency" and row["contender"] != OURS}


def has_peers(rows: Sequence[Row]) -> bool:
    """Say whether there is any row of a peer."""
    return bool(peer_runs(rows))


def _point(row: Row) -> str:
    return json.dumps([row["settings"].get(name) for name in _KEYS])


def peers_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows to be shown: of each point those of the newest run in which a peer has it, ours included."""
    runs = peer_runs(rows)
    chosen = [row for row in rows if row["benchmark"] == "latency" and row["run"] in runs]
    newest: dict[str, Row] = {}
    for row in chosen:
        point = _point(row)
        if row["contender"] != OURS and (point not in newest or row["date"] >= newest[point]["date"]):
            newest[point] = row
    return [row for row in chosen if (last := newest.get(_point(row))) is not None and last["run"] == row["run"]]


def _fastest(times: Mapping[str, float]) -> str:
    """Say who is fastest and by what factor over the next; `–` where there is only one."""
    ordered = sorted(times.items(), key=lambda item: item[1])
    if len(ordered) < 2:
        return "–"
    (name, best), (_, following) = ordered[:2]
    return f"{_TITLES.get(name, name)}, {following / best:.2f} ×" if following / best >= _TIE else "equal"


def _tables(rows: Sequence[Row]) -> list[Table]:
    """Return titles, the number of columns that are text, and cells: of decode steps, and of first tokens."""
    present = {str(row["contender"]) for row in rows}
    names = [name for name in _TITLES if name in present] + sorted(present - set(_TITLES))
    titles = [_TITLES.get(name, name) for name in names]
    tables: list[Table] = []
    for what, metric, ratio in (("decode", "itl_ms", "itl_to_floor_ratio"), ("prefill", "first_token_ms", None)):
        points: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row["settings"].get("what") == what:
                points.setdefault(_point(row), {})[str(row["contender"])] = row
        if not points:
            continue
        cells = []
        for by_name in sorted(points.values(), key=_order):
            settings = next(iter(by_name.values()))["settings"]
            times = {name: value for name in names if (value := _number(by_name.get(name), metric)) is not None}
            line = [str(settings["model"]), str(settings["weights"])]
            line += [str(settings["rows"])] if what == "decode" else []
            line.append(str(settings["prompt"]))
            if ratio:
                line.append(_show(_number(next(iter(by_name.values())), "floor_ms")))
            line += [_show(times.get(name)) for name in names]
            if ratio:
                line += [_show(_number(by_name.get(name), ratio)) for name in names]
            cells.append([*line, _fastest(times)])
        if ratio:
            head = ["model", "weights", "rows", "prompt", "floor, ms"]
            head += [f"{title}, ms a token" for title in titles] + [f"{title} × floor" for title in titles]
        else:
            head = ["model", "weights", "prompt", *(f"{title}, first token, ms" for title in titles)]
        tables.append(([*head, "fastest, over the next"], 2, cells))
    return tables


def _order(by_name: Mapping[str, Row]) -> tuple[Any, ...]:
    settings = next(iter(by_name.values()))["settings"]
    rows = settings.get("rows", 0)
    return settings["model"], settings["layers"], settings["weights"], rows > 1, settings["prompt"], rows


def _number(row: Row | None, metric: str) -> float | None:
    return None if row is None else number_of(row, metric)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _shares(rows: Sequence[Row]) -> list[str]:
    """Say how many greedy tokens of a peer's two requests of one prompt were alike, at its worst point."""
    lowest: dict[str, float] = {}
    for row in rows:
        share = row["check"].get("equal_share")
        if row["contender"] != OURS and share is not None:
            lowest[str(row["contender"])] = min(share, lowest.get(str(row["contender"]), 1.0))
    if not lowest:
        return []
    told = ", ".join(f"{_TITLES.get(name, name)} {share:.4g}" for name, share in lowest.items())
    return [f"Greedy tokens alike in a peer's two requests of one prompt, the lowest share of its points: {told}."]


def peers_tables(rows: Sequence[Row]) -> str:
    """Return Markdown tables of rows that `peers_rows` chose."""
    tables = []
    for titles, num_texts, cells in _tables(rows):
        rule = "|---" * num_texts + "|--:" * (len(titles) - num_texts - 1) + "|---|"
        first, *rest = ("| " + " | ".join(line) + " |" for line in (titles, *cells))
        tables.append("\n".join([first, rule, *rest]))
    return "\n\n".join([*tables, *_shares(rows)]) + "\n"


def peers_text(rows: Sequence[Row]) -> str:
    """Return aligned tables for a terminal, under a line about the GPU; `rows` are of one run."""
    blocks = [gpu_line(rows[0]["device"]["gpu"])]
    for titles, num_texts, cells in _tables(rows):
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        last = len(titles) - 1
        lines = [
            "  ".join(
                cell.ljust(width) if index < num_texts or index == last else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (titles, *cells)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *_shares(rows)])
