"""Bars: which row counts, what passes, and what a malformed file says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import bars, harness
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.errors import UsageError

from .rows import decode_row, gpu_row

ONE = """
[[bar]]
id = "one"
issue = 3
text = "1 row"
op = "<="
limit = 1.2
unit = "×"
peer = "another 1.5"
from = [
  { benchmark = "latency", contender = "qwen-rt", where = { rows = 1, prompt = [127, 128] }, value = "itl_ms / 3" },
  { benchmark = "kernels", contender = "step", where = { rows = 1 }, value = "itl_us / 3000" },
]
"""
MANY = """
[[bar]]
id = "many"
issue = 4
text = "16 rows over 1"
op = "<"
limit = 1.15
from = [
  { benchmark = "latency", contender = "qwen-rt", where.rows = 16, base.rows = 1, value = "itl_ms / base.itl_ms" },
]
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "bars.toml"
    file.write_text(text, encoding="utf-8")
    return file


def verdict(folder: Path, text: str, rows: list[Any]) -> bars.Verdict:
    (only,) = bars.judge(bars.load(write(folder, text)), rows)
    return only


def test_passing_short_and_missing(tmp_path: Path) -> None:
    passed = verdict(tmp_path, ONE, [decode_row(1, 128, 3.3)])
    assert (passed.state, passed.value) == ("PASS", pytest.approx(1.1))
    short = verdict(tmp_path, ONE, [decode_row(1, 127, 3.9)])
    assert (short.state, short.value) == ("SHORT", pytest.approx(1.3))
    missing = verdict(tmp_path, ONE, [decode_row(2, 128, 3.3), decode_row(1, 64, 3.3)])
    assert (missing.state, missing.value, missing.row) == ("NO ROW", None, None)


@pytest.mark.parametrize(
    ("op", "limit", "state"),
    [("<=", 1.1, "PASS"), ("<", 1.1, "SHORT"), (">=", 1.1, "PASS"), (">", 1.1, "SHORT"), (">", 1.0, "PASS")],
)
def test_every_comparison(tmp_path: Path, op: str, limit: float, state: str) -> None:
    text = ONE.replace('"<="', f'"{op}"').replace("1.2", str(limit)).replace("itl_ms / 3", "itl_ms")
    assert verdict(tmp_path, text, [decode_row(1, 128, 1.1)]).state == state


def test_the_newest_row_counts_and_the_last_of_one_date(tmp_path: Path) -> None:
    rows = [decode_row(1, 128, 3.3, date="2026-02-01T00:00:00Z"), decode_row(1, 128, 3.9)]
    assert verdict(tmp_path, ONE, rows).state == "PASS"
    rows = [decode_row(1, 128, 3.3), decode_row(1, 128, 3.9)]
    assert verdict(tmp_path, ONE, rows).state == "SHORT"


def _on(gpu: str | None, row: dict[str, Any]) -> dict[str, Any]:
    name = None if gpu is None else row["device"]["gpu"] | {"name": f"NVIDIA {gpu} 80GB"}
    return row | {"device": row["device"] | {"gpu": name}}


def test_every_kind_of_gpu_is_judged(tmp_path: Path) -> None:
    """The newest row of one card does not stand for another; a source that no card has leaves all to the next."""
    rows = [_on("H2", decode_row(1, 128, 3.9)), _on("H2", decode_row(1, 128, 4.2)), _on("H1", decode_row(1, 128, 3.3))]
    step = gpu_row("kernels", "step", {"itl_us": 3300.0}, rows=1, prompt=127, date="2027-01-01T00:00:00Z")
    loaded = bars.load(write(tmp_path, ONE))
    verdicts = bars.judge(loaded, [*rows, _on("H3", step)])
    assert [(v.gpu, v.state, v.value) for v in verdicts] == [
        ("H1", "PASS", pytest.approx(1.1)),
        ("H2", "SHORT", pytest.approx(1.4)),
    ]
    assert [v.to_dict()["gpu"] for v in verdicts] == ["H1", "H2"]
    assert bars.render(verdicts).splitlines()[2:] == ["H1: 1 pass, 0 short", "H2: 0 pass, 1 short"]
    place = "latency qwen-rt, 2026-01-02, 0123456789"
    assert bars.markdown(verdicts).splitlines()[2:] == [
        f"| 1 row | <= 1.2 × | 1.1 | **1.4, short** | another 1.5 | H1/H2: {place} |"
    ]
    assert bars.markdown(verdicts, brief=True).splitlines() == [
        "| bar | limit | H1 | H2 | peer |",
        "|---|---|--:|--:|---|",
        "| 1 row | <= 1.2 × | 1.1 | **1.4, short** | another 1.5 |",
    ]
    bare = bars.judge(loaded, [_on(None, decode_row(1, 128, 3.3)), rows[0]])
    assert bars.markdown(bare).splitlines()[0] == "| bar | limit | H2 | no GPU | peer | rows |"
    (fallen_back,) = bars.judge(loaded, [_on("H3", step)])
    assert (fallen_back.gpu, fallen_back.state) == ("H3", "PASS")


def test_a_brief_table_has_the_later_of_two_limits(tmp_path: Path) -> None:
    tighter = ONE.replace('"one"', '"tighter"').replace("1.2", "1.05").replace("issue = 3", "issue = 4")
    verdicts = bars.judge(bars.load(write(tmp_path, ONE + tighter)), [decode_row(1, 128, 3.3)])
    lines = bars.markdown(verdicts, brief=True).splitlines()
    assert lines[2:] == ["| 1 row | <= 1.05 × | **1.1, short** | another 1.5 |"]
    assert len(bars.markdown(verdicts).splitlines()) == 4


def test_a_second_source_serves_only_without_a_first(tmp_path: Path) -> None:
    step = gpu_row("kernels", "step", {"itl_us": 3900.0}, rows=1, prompt=127, date="2027-01-01T00:00:00Z")
    fallen_back = verdict(tmp_path, ONE, [step])
    assert (fallen_back.state, fallen_back.row) == ("SHORT", step)
    assert verdict(tmp_path, ONE, [step, decode_row(1, 128, 3.3)]).state == "PASS"


def test_rows_without_the_metric_or_a_passed_check_do_not_count(tmp_path: Path) -> None:
    bare = gpu_row("latency", "qwen-rt", {"floor_ms": 3.0}, rows=1, prompt=128, date="2027-01-01T00:00:00Z")
    assert verdict(tmp_path, ONE, [bare]).state == "NO ROW"
    assert verdict(tmp_path, ONE, [bare, decode_row(1, 128, 3.3)]).state == "PASS"
    assert verdict(tmp_path, ONE, [decode_row(1, 128, 3.3, passed=False)]).state == "NO ROW"


def test_a_base_is_of_the_same_run(tmp_path: Path) -> None:
    rows = [decode_row(16, 128, 3.3), decode_row(1, 128, 3.0), decode_row(1, 128, 1.0, run="run-2")]
    assert verdict(tmp_path, MANY, rows).value == pytest.approx(1.1)
    assert verdict(tmp_path, MANY, [rows[0], rows[2]]).state == "NO ROW"
    later = decode_row(16, 128, 9.9, run="run-3", date="2027-01-01T00:00:00Z")
    assert verdict(tmp_path, MANY, [*rows, later]).value == pytest.approx(1.1)  # its run has no 1 row


def test_a_base_may_be_another_contender(tmp_path: Path) -> None:
    text = MANY.replace("where.rows = 16, base.rows = 1", 'where.rows = 1, base.contender = ["one", "two"]')
    rows = [decode_row(1, 128, 3.0), decode_row(1, 128, 4.0, run="run-2")]
    assert verdict(tmp_path, text, rows).state == "NO ROW"
    theirs = decode_row(1, 128, 4.5) | {"contender": "two"}
    assert verdict(tmp_path, text, [*rows, theirs]).value == pytest.approx(3 / 4.5)
    others = [theirs | {"run": "run-3"}, decode_row(2, 128, 4.5) | {"contender": "two"}]
    assert verdict(tmp_path, text, [*rows, *others]).state == "NO ROW"


def test_only_rows_of_small_gpus(tmp_path: Path) -> None:
    text = ONE.replace("value = ", "most_gpu_gb = 86, value = ", 1)
    row = decode_row(1, 128, 3.3)  # on a GPU of 100 GB
    assert verdict(tmp_path, text, [row]).state == "NO ROW"
    device = row["device"] | {"gpu": row["device"]["gpu"] | {"memory_gb": 85.2}}
    assert verdict(tmp_path, text, [row | {"device": device}]).state == "PASS"
    for unknown in ({}, {"gpu": None}, {"gpu": {"name": "A GPU"}}):
        assert verdict(tmp_path, text, [row | {"device": unknown}]).state == "NO ROW"


def test_rows_from_before_there_were_quantized_caches(tmp_path: Path) -> None:
    text = ONE.replace("rows = 1, prompt = [127, 128]", 'rows = 1, kv_cache = "bf16"')
    assert verdict(tmp_path, text, [decode_row(1, 128, 3.3)]).state == "PASS"
    assert verdict(tmp_path, text, [decode_row(1, 128, 3.3, kv_cache="fp8")]).state == "NO ROW"


def test_division_by_zero_is_no_value(tmp_path: Path) -> None:
    rows = [decode_row(16, 128, 3.3), decode_row(1, 128, 0.0)]
    assert verdict(tmp_path, MANY, rows).state == "NO ROW"


def test_bars_of_one_issue(tmp_path: Path) -> None:
    loaded = bars.load(write(tmp_path, ONE + MANY))
    assert [bar.id for bar in loaded] == ["one", "many"]
    assert [v.bar.id for v in bars.judge(loaded, [], 4)] == ["many"]
    with pytest.raises(UsageError, match=r"issue=5 has no bars; expected one of 3, 4"):
        bars.judge(loaded, [], 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[bar]", "bars.toml is no TOML"),
        ("", r"bars.toml has nothing"),
        ("[bars]\n", r"bars.toml has bars; expected \[\[bar\]\]"),
        ("bar = 3\n", r"bars.toml has bar;"),
        ("bar = [1]\n", r"bar 1 is 1; expected a table"),
        (ONE.replace("limit = 1.2\n", ""), r"bar 1 lacks 'limit'"),
        (ONE.replace("limit = 1.2", 'limit = "fast"'), r"bar 1: limit='fast'"),
        (ONE.replace("limit = 1.2", "limit = true"), r"bar 1: limit=True"),
        (ONE.replace('"<="', '"=<"'), r"bar 'one': op='=<'; expected <= or < or >= or >"),
        (ONE.replace("unit", "units"), r"bar 1 has the unknown key 'units'"),
        (ONE + ONE, r"bar 'one' is there twice"),
        (ONE.split("from")[0] + "from = []\n", r"bar 'one': from=\[\]"),
        (ONE.split("from")[0] + "from = [3]\n", r"bar 'one' is 3; expected a table"),
        (ONE.replace('value = "itl_ms / 3"', 'value = "itl_ms /"'), r"bar 'one': value='itl_ms /'"),
        (ONE.replace('value = "itl_ms / 3"', "value = \"__import__('os')\""), r"expected metrics, base.NAME, numbers"),
        (ONE.replace('value = "itl_ms / 3"', 'value = "itl_ms ** 3"'), r"expected metrics, base.NAME, numbers"),
        (ONE.replace('value = "itl_ms / 3"', 'value = "other.itl_ms"'), r"expected metrics, base.NAME, numbers"),
        (ONE.replace('value = "itl_ms / 3"', 'value = "itl_ms / base.itl_ms"'), r"exactly if `base` is given"),
        (MANY.replace(" / base.itl_ms", ""), r"exactly if `base` is given"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        bars.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml could not be read"):
        bars.load(tmp_path / "none.toml")


def test_lines_and_table(tmp_path: Path) -> None:
    rows = [decode_row(1, 128, 3.3, dirty=True)]
    verdicts = bars.judge(bars.load(write(tmp_path, ONE + MANY)), rows)
    first, second, *counts = bars.render(verdicts).splitlines()
    date = "2026-01-02, 0123456789 with changes"
    assert " ".join(first.split()) == f"PASS one A 1.1 <= 1.2 × latency qwen-rt, {date} 1 row [another 1.5]"
    assert second.startswith("NO ROW  many")
    assert counts == ["A: 1 pass, 0 short", "1 without a row"]
    table = bars.markdown(verdicts).splitlines()
    assert table[0] == "| bar | limit | A | peer | rows |"
    assert table[2] == f"| 1 row | <= 1.2 × | 1.1 | another 1.5 | A: latency qwen-rt, {date} |"
    assert table[3] == "| 16 rows over 1 | < 1.15 | – |  | no row |"
    plain = verdicts[0].to_dict()
    assert (plain["state"], plain["row"]["commit"], plain["row"]["settings"]["rows"]) == ("PASS", "0123456789abcdef", 1)
    assert verdicts[1].to_dict()["row"] is None


ISSUES: dict[int, dict[str, tuple[str, float]]] = {
    3: {
        "7b-1-row": ("<=", 1.2),
        "1.5b-1-row": ("<=", 1.7),
        "7b-16-rows": ("<=", 1.15),
        "1.5b-16-rows": ("<=", 1.15),
        "7b-first-token-6144": ("<=", 139.5),
        "7b-prompt-30720": ("<=", 1.15),
        "host": ("<", 50),
        "nano-answers": (">=", 0.99),
        "7b-4-layers-logits": (">=", 0.999),
        "load": (">=", 10),
        "memory": ("<=", 0.02),
        "idle": ("<=", 0.01),
        "host-1.5b": ("<", 50),
    },
    5: {
        "72b-fp8-1-row": ("<=", 1.1),
        "7b-bf16-1-row": ("<=", 1.12),
        "7b-fp8-1-row": ("<=", 1.2),
        "7b-int4-1-row": ("<=", 1.45),
        "1.5b-bf16-1-row": ("<=", 1.4),
        "1.5b-fp8-1-row": ("<=", 1.7),
        "72b-fp8-16-rows": ("<=", 1.1),
        "7b-bf16-16-rows": ("<=", 1.1),
        "72b-fp8-64-rows": ("<=", 1.503),
        "7b-bf16-64-rows": ("<=", 1.627),
        "7b-fp8-64-rows": ("<=", 2.373),
        "1.5b-bf16-64-rows": ("<=", 5.25),
        "72b-fp8-prompt-30720": ("<=", 1.1),
        "72b-fp8-kv-part": (">=", 1.7),
        "72b-fp8-first-token-6144": ("<=", 765),
        "7b-fp8-first-token-6144": ("<=", 89.7),
        "72b-fp8-one-gpu": (">=", 16384),
        "nano-fp8": ("<=", 0.5),
        "nano-int8": ("<=", 0.5),
        "nano-int4": ("<=", 2),
        "7b-4-layers-fp8": (">=", 0.998),
        "7b-4-layers-int8": (">=", 0.998),
        "7b-4-layers-int4": (">=", 0.99),
        "beside-a-peer": ("<=", 1),
        "72b-fp8-start": ("<", 20),
    },
    6: {"72b-engine-memory": ("<", 1.5)},
}


def test_the_bars_of_the_project() -> None:
    loaded = bars.load()
    found: dict[int, dict[str, tuple[str, float]]] = {}
    for bar in loaded:
        found.setdefault(bar.issue, {})[bar.id] = bar.op, bar.limit
        for source in bar.sources:
            models = source.where.get("model", [])
            for model in models if isinstance(models, list) else [models]:
                assert re.sub(r"-\d+-layers$", "", model) in (*SHAPES, "nano"), bar.id
    assert found == ISSUES


def test_what_the_kv_part_and_the_one_gpu_take() -> None:
    """Rows as `bench latency` writes them: a run with both caches, and a session on a card of 80 GB."""
    long = {"model": "72b-40-layers", "weights": "fp8", "what": "decode", "rows": 1, "prompt": 30720}
    rows = [
        gpu_row("latency", "qwen-rt", {"kv_part_ms": 2.0}, **long, kv_cache="bf16"),
        gpu_row("latency", "qwen-rt", {"kv_part_ms": 1.0}, **long, kv_cache="fp8"),
        gpu_row("latency", "qwen-rt", {"kv_tokens": 30912}, model="72b", weights="fp8", what="session"),
    ]
    rows[2]["device"]["gpu"]["memory_gb"] = 85.0
    rows.append(gpu_row("nano_quantized_cuda", "qwen-rt", {"lost_ratio": 0.004}, variant="fp8", num_problems=1000))
    found = {v.bar.id: (v.state, v.value) for v in bars.judge(bars.load(), rows, 5) if v.state != "NO ROW"}
    assert found == {
        "72b-fp8-kv-part": ("PASS", 2.0),
        "72b-fp8-one-gpu": ("PASS", 30912),
        "nano-fp8": ("PASS", pytest.approx(0.4)),
    }


def test_the_bar_of_the_first_token_is_scaled_by_the_matrix_rate() -> None:
    """139.5 ms at 790 TFLOP/s: a slower device has the more time."""
    metrics = {"first_token_ms": 150.0, "matrix_tflop_s": 700.0}
    row = gpu_row("latency", "qwen-rt", metrics, weights="bf16", what="prefill", prompt=6144, source="random")
    found = {v.bar.id: v for v in bars.judge(bars.load(), [row])}["7b-first-token-6144"]
    assert (found.state, found.value) == ("PASS", pytest.approx(150 * 700 / 790))


def test_committed_kernel_steps_serve_until_there_are_sessions() -> None:
    found = {v.bar.id: v for v in bars.judge(bars.load(), harness.read_rows())}
    for name in ("7b-1-row", "1.5b-1-row", "7b-16-rows", "1.5b-16-rows", "7b-prompt-30720"):
        row = found[name].row
        assert row is not None
        assert (row["benchmark"], row["contender"]) in (("kernels", "step"), ("latency", "qwen-rt"))
