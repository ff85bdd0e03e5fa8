"""The bars of an issue, as `bars.toml` states them, against the newest result rows.

A bar takes a value from the metrics of one row: its sources are tried in order, and of a source's rows the newest one
counts that has what the value needs. A value is arithmetic on metrics (`first_token_ms * matrix_tflop_s / 790`; of
samples the median counts); `base.NAME` is a metric of the row of the SAME RUN that differs as `base` says: in settings,
and in `contender` to compare with a peer.

    [[bar]]
    id = "7b-16-rows"                 unique
    issue = 3
    text = "7B bf16, 16 rows over 1 row"
    op = "<="                         <=, <, >= or >
    limit = 1.15
    unit = "×"                        optional, shown behind the numbers
    peer = "vLLM 1.06"                optional, shown
    from = [                          in order of preference
      { benchmark = "latency", contender = "qwen-rt", where.rows = 16, base.rows = 1, value = "itl_ms / base.itl_ms" },
    ]

`where` names settings; a list means any of its values. `most_gpu_gb` leaves out rows of GPUs with more memory.
"""

from __future__ import annotations

import ast
import operator
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwen_rt.benchmarks.harness import gpu_of, number_of, settings_of
from qwen_rt.errors import UsageError

__all__ = ["BARS_FILE", "Bar", "Source", "Verdict", "judge", "load", "markdown", "render"]

BARS_FILE = Path(__file__).with_name("bars.toml")

Row = Mapping[str, Any]
State = Literal["PASS", "SHORT", "NO ROW"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_BAR_KEYS = {"id": str, "issue": int, "text": str, "op": str, "limit": (int, float), "from": list}
_BAR_OPTIONS = {"unit": str, "peer": str}
_SOURCE_KEYS = {"benchmark": str, "contender": str, "where": dict, "value": str}
_SOURCE_OPTIONS = {"base": dict, "most_gpu_gb": (int, float)}
_FORM = "keys as the head of benchmarks/bars.py lists them"


@dataclass(frozen=True)
class Source:
    """Where a value comes from: rows of a benchmark whose settings are as `where` says."""

    benchmark: str
    contender: str | list[str]
    where: Mapping[str, Any]
    value: str
    base: Mapping[str, Any] | None = None
    most_gpu_gb: float | None = None

    def of_base(self) -> Source:
        """The same source with what `base` changes."""
        changes = dict(self.base or {})
        contender = changes.pop("contender", self.contender)
        return replace(self, contender=contender, where={**self.where, **changes})


@dataclass(frozen=True)
class Bar:
    """One limit; `peer` is what the best peer reaches."""

    id: str
    issue: int
    text: str
    op: str
    limit: float
    sources: tuple[Source, ...]
    unit: str = ""
    peer: str = ""

    def met_by(self, value: float) -> bool:
        """Say whether a value is on the right side of the limit."""
        return _COMPARE[self.op](value, self.limit)


@dataclass(frozen=True)
class Verdict:
    """How a bar stands; `value` and `row` are None where no row serves."""

    bar: Bar
    state: State
    value: float | None = None
    row: Row | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        bar, row = self.bar, self.row
        place = None if row is None else {name: row[name] for name in ("benchmark", "contender", "settings", "date")}
        return {
            "id": bar.id,
            "issue": bar.issue,
            "text": bar.text,
            "state": self.state,
            "value": self.value,
            "op": bar.op,
            "limit": bar.limit,
            "unit": bar.unit,
            "peer": bar.peer,
            "row": None if row is None or place is None else place | {"commit": row["commit"], "dirty": row["dirty"]},
        }


def _checked(where: str, data: object, needed: Mapping[str, Any], optional: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a TOML table if it has all needed keys and no unknown one, each of its type."""
    if not isinstance(data, dict):
        raise UsageError(f"{where} is {data!r}", "a table", "correct it")
    for name in needed.keys() - data.keys():
        raise UsageError(f"{where} lacks {name!r}", _FORM, "add it")
    for name in data.keys() - needed.keys() - optional.keys():
        raise UsageError(f"{where} has the unknown key {name!r}", _FORM, "remove it")
    for name, value in data.items():
        if not isinstance(value, needed.get(name) or optional[name]) or isinstance(value, bool):
            raise UsageError(f"{where}: {name}={value!r}", _FORM, "correct it")
    return data


def _source(where: str, data: object) -> Source:
    fields = _checked(where, data, _SOURCE_KEYS, _SOURCE_OPTIONS)
    source = Source(**fields)
    names = _names(_parse(where, source.value))
    if any(name.startswith("base.") for name in names) != (source.base is not None):
        raise UsageError(f"{where}: value={source.value!r}", "base.NAME exactly if `base` is given", "correct it")
    return source


def load(file: Path | None = None) -> tuple[Bar, ...]:
    """Read the bars, in the order of the file.

    Args:
        file: None for the one beside this module.

    Raises:
        UsageError: It is not there, no TOML, or a bar is malformed; the message names the bar and the key.
    """
    file = BARS_FILE if file is None else file
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file.name} could not be read: {error.strerror}", "", "name another file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file.name} is no TOML: {error}", "", "correct it") from None
    tables = document.get("bar")
    if not isinstance(tables, list) or set(document) != {"bar"}:
        raise UsageError(f"{file.name} has {', '.join(document) or 'nothing'}", "[[bar]] tables only", "correct it")
    bars: list[Bar] = []
    for number, table in enumerate(tables, 1):
        where = f"{file.name}, bar {number}"
        fields = dict(_checked(where, table, _BAR_KEYS, _BAR_OPTIONS))
        where = f"{file.name}, bar {fields['id']!r}"
        if fields["op"] not in _COMPARE:
            raise UsageError(f"{where}: op={fields['op']!r}", " or ".join(_COMPARE), "correct it")
        if fields["id"] in {bar.id for bar in bars}:
            raise UsageError(f"{where} is there twice", "unique ids", "rename one")
        given = fields.pop("from")
        if not given:
            raise UsageError(f"{where}: from=[]", "one source at least", "add it")
        bars.append(Bar(sources=tuple(_source(where, item) for item in given), **fields))
    return tuple(bars)


def _parse(where: str, text: str) -> ast.expr:
    """Parse the arithmetic of a value.

    Raises:
        UsageError: It has anything but metrics, `base.NAME`, numbers, + - * / and brackets.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise UsageError(f"{where}: value={text!r}", "arithmetic on metrics", "correct it") from None
    if not _is_arithmetic(tree):
        raise UsageError(f"{where}: value={text!r}", "metrics, base.NAME, numbers and + - * /", "correct it")
    return tree


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _ARITHMETIC and _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "base"
    return isinstance(node, ast.Name)


def _names(node: ast.expr) -> set[str]:
    if isinstance(node, ast.BinOp):
        return _names(node.left) | _names(node.right)
    return set() if isinstance(node, ast.Constant) else {ast.unparse(node)}


def _evaluate(node: ast.expr, metrics: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_evaluate(node.left, metrics), _evaluate(node.right, metrics))
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float)
        return node.value
    return metrics[ast.unparse(node)]


def _matches(row: Row, source: Source) -> bool:
    settings = settings_of(row)

    def agrees(found: object, wanted: object) -> bool:
        return bool(found in wanted if isinstance(wanted, list) else found == wanted)

    return (
        row["benchmark"] == source.benchmark
        and agrees(row["contender"], source.contender)
        and row["check"].get("passed") is True
        and all(name in settings and agrees(settings[name], wanted) for name, wanted in source.where.items())
        and (source.most_gpu_gb is None or _gpu_gb(row) <= source.most_gpu_gb)
    )


def _gpu_gb(row: Row) -> float:
    """Memory of the row's GPU; infinite if there is none or it is not known."""
    return float((row["device"].get("gpu") or {}).get("memory_gb", "inf"))


def _metrics(row: Row, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name in row["metrics"] if (value := number_of(row, name)) is not None}


def _newest_first(rows: Sequence[Row]) -> list[Row]:
    """Order by date; of one date the row written last comes first."""
    return [row for _, row in sorted(enumerate(rows), key=lambda item: (str(item[1]["date"]), item[0]), reverse=True)]


def _value_of(source: Source, rows: Sequence[Row]) -> tuple[float, Row] | None:
    """Return the value by the newest row that has all it needs, and that row."""
    tree = _parse(source.benchmark, source.value)
    names = _names(tree)
    for row in _newest_first([row for row in rows if _matches(row, source)]):
        metrics = _metrics(row)
        if source.base is not None:
            base = source.of_base()
            bases = [other for other in rows if other["run"] == row["run"] and _matches(other, base)]
            metrics |= _metrics(_newest_first(bases)[0], "base.") if bases else {}
        if names <= metrics.keys():
            try:
                return _evaluate(tree, metrics), row
            except ZeroDivisionError:
                continue
    return None


def judge(bars: Sequence[Bar], rows: Sequence[Row], issue: int | None = None) -> list[Verdict]:
    """Hold the newest rows against the bars.

    Args:
        bars: From `load`.
        rows: From `harness.read_rows`.
        issue: Only the bars of this one; None for all.

    Returns:
        A verdict for each bar, in order.

    Raises:
        UsageError: No bar belongs to the issue.
    """
    chosen = [bar for bar in bars if issue in (None, bar.issue)]
    if not chosen:
        known = ", ".join(map(str, sorted({bar.issue for bar in bars})))
        raise UsageError(f"issue={issue} has no bars", f"one of {known}" if known else "", "name another")
    verdicts = []
    for bar in chosen:
        found = next((value for source in bar.sources if (value := _value_of(source, rows))), None)
        if found is None:
            verdicts.append(Verdict(bar, "NO ROW"))
        else:
            verdicts.append(Verdict(bar, "PASS" if bar.met_by(found[0]) else "SHORT", *found))
    return verdicts


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _limit(bar: Bar) -> str:
    return f"{bar.op} {bar.limit:g}{' ' + bar.unit if bar.unit else ''}"


def _place(row: Row | None) -> str:
    if row is None:
        return "–"
    changed = " with changes" if row["dirty"] else ""
    gpu = f", {gpu_of(row)}" if gpu_of(row) else ""
    return f"{row['benchmark']} {row['contender']}{gpu}, {row['date'][:10]}, {row['commit'][:10]}{changed}"


def render(verdicts: Sequence[Verdict]) -> str:
    """Return a line for each bar and one that counts: for a terminal."""
    width = max((len(verdict.bar.id) for verdict in verdicts), default=0)
    limits = max((len(_limit(verdict.bar)) for verdict in verdicts), default=0)
    lines = []
    for verdict in verdicts:
        bar = verdict.bar
        peer = f"  [{bar.peer}]" if bar.peer else ""
        line = f"{verdict.state:6}  {bar.id:{width}}  {_show(verdict.value):>8} {_limit(bar):{limits}}"
        lines.append(f"{line}  {_place(verdict.row)}  {bar.text}{peer}")
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in ("PASS", "SHORT", "NO ROW")}
    lines.append(f"{counts['PASS']} pass, {counts['SHORT']} short, {counts['NO ROW']} without a row")
    return "\n".join(lines)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Return the same as a Markdown table."""
    lines = ["| bar | value | limit | | peer | row |", "|---|--:|---|---|---|---|"]
    for verdict in verdicts:
        bar = verdict.bar
        cells = [bar.text, _show(verdict.value), _limit(bar), verdict.state.lower(), bar.peer, _place(verdict.row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
