"""The bars of an issue, as `bars.toml` states them, against the newest result rows.

A bar takes a value from the metrics of one row for each kind of GPU that it was measured on: its sources are tried in
order, the first that has a value serves, and of its rows of one kind of GPU the newest counts that has what the value
needs. So a card on which a bar is missed is not hidden behind one on which it is met. A value is arithmetic on metrics
(`first_token_ms * matrix_tflop_s / 790`; of samples the median counts); `base.NAME` is a metric of the row of the SAME
RUN that differs as `base` says: in settings, and in `contender` to compare with a peer.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """How a bar stands on one kind of GPU, as `H100`, or without any; `value` and `row` are None if no row serves."""

    bar: Bar
    state: State
    gpu: str = ""
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
            "gpu": self.gpu,
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
        The verdicts on each bar, in order: one for each kind of GPU that it was measured on, by name.

    Raises:
        UsageError: No bar belongs to the issue.
    """
    chosen = [bar for bar in bars if issue in (None, bar.issue)]
    if not chosen:
        known = ", ".join(map(str, sorted({bar.issue for bar in bars})))
        raise UsageError(f"issue={issue} has no bars", f"one of {known}" if known else "", "name another")
    return [verdict for bar in chosen for verdict in _verdicts(bar, rows)]


def _verdicts(bar: Bar, rows: Sequence[Row]) -> list[Verdict]:
    by_gpu: dict[str, list[Row]] = {}
    for row in rows:
        by_gpu.setdefault(gpu_of(row), []).append(row)
    for source in bar.sources:
        found = {gpu: value for gpu in sorted(by_gpu) if (value := _value_of(source, by_gpu[gpu]))}
        if found:
            return [
                Verdict(bar, "PASS" if bar.met_by(value) else "SHORT", gpu, value, row)
                for gpu, (value, row) in found.items()
            ]
    return [Verdict(bar, "NO ROW")]


def _show(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _limit(bar: Bar) -> str:
    return f"{bar.op} {bar.limit:g}{' ' + bar.unit if bar.unit else ''}"


def _place(row: Row) -> str:
    changed = " with changes" if row["dirty"] else ""
    return f"{row['benchmark']} {row['contender']}, {row['date'][:10]}, {row['commit'][:10]}{changed}"


def render(verdicts: Sequence[Verdict]) -> str:
    """Return a line for each verdict and one that counts: for a terminal."""
    names = max((len(verdict.bar.id) for verdict in verdicts), default=0)
    gpus = max((len(verdict.gpu) for verdict in verdicts), default=0)
    limits = max((len(_limit(verdict.bar)) for verdict in verdicts), default=0)
    lines = []
    for verdict in verdicts:
        bar, row = verdict.bar, verdict.row
        peer = f"  [{bar.peer}]" if bar.peer else ""
        place = "–" if row is None else _place(row)
        numbers = f"{verdict.gpu:{gpus}}  {_show(verdict.value):>8} {_limit(bar):{limits}}"
        lines.append(f"{verdict.state:6}  {bar.id:{names}}  {numbers}  {place}  {bar.text}{peer}")
    return "\n".join([*lines, *_counts(verdicts)])


def _counts(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for gpu in sorted({verdict.gpu for verdict in verdicts if verdict.row is not None}):
        states = [verdict.state for verdict in verdicts if verdict.gpu == gpu and verdict.row is not None]
        lines.append(f"{gpu or 'no GPU'}: {states.count('PASS')} pass, {states.count('SHORT')} short")
    without = sum(verdict.row is None for verdict in verdicts)
    return [*lines, f"{without} without a row"] if without else lines


def markdown(verdicts: Sequence[Verdict], brief: bool = False) -> str:
    """Return a Markdown table with a line for each bar and a column for each kind of GPU.

    Args:
        verdicts: From `judge`.
        brief: Leave out the column of rows, and of bars with one text all but the last, whose limit is the later one.
    """
    gpus = sorted({verdict.gpu for verdict in verdicts if verdict.row is not None}, key=lambda gpu: (not gpu, gpu))
    by_bar: dict[str, dict[str, Verdict]] = {}
    for verdict in verdicts:
        by_bar.setdefault(verdict.bar.id, {})[verdict.gpu] = verdict
    lines = {"": [*("bar", "limit"), *(gpu or "no GPU" for gpu in gpus), "peer", "rows"]}
    for name, found in by_bar.items():
        bar = next(iter(found.values())).bar
        values = [_cell(found.get(gpu)) for gpu in gpus]
        lines[bar.text if brief else name] = [bar.text, _limit(bar), *values, bar.peer, _places(found.values())]
    table = [cells[:-1] if brief else cells for cells in lines.values()]
    head, *rest = [f"| {' | '.join(cells)} |" for cells in table]
    rule = f"|---|---|{'--:|' * len(gpus)}{'---|' * (len(table[0]) - len(gpus) - 2)}"
    return "\n".join([head, rule, *rest]) + "\n"


def _places(verdicts: Iterable[Verdict]) -> str:
    """Say which rows the values are of, those of one date together."""
    gpus: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.row is not None:
            gpus.setdefault(_place(verdict.row), []).append(verdict.gpu)
    return "; ".join(f"{'/'.join(on)}: {place}" if any(on) else place for place, on in gpus.items()) or "no row"


def _cell(verdict: Verdict | None) -> str:
    if verdict is None or verdict.row is None:
        return "–"
    return _show(verdict.value) if verdict.state == "PASS" else f"**{_show(verdict.value)}, short**"
