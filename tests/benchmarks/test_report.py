"""Tables from rows, and documents that carry them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import harness, report
from qwen_rt.errors import UsageError


def row(contender: str, itl_ms: float, run: str = "run-1", date: str = "2026-01-01T00:00:00Z", **settings: Any) -> Any:
    return {
        "schema": harness.SCHEMA,
        "benchmark": "cpu_decode",
        "contender": contender,
        "run": run,
        "date": date,
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python -m qwen_rt.benchmarks.bench_cpu_decode",
        "device": {"cpu": "A CPU", "num_cores": 2, "memory_gb": 25.0, "gpu": None},
        "versions": {"python": "3.11"},
        "settings": {"batch": 1, "new_tokens": 8, "precision": "fp32"} | settings,
        "check": {"passed": True},
        "metrics": {"itl_ms": {"median": itl_ms, "p10": itl_ms, "p90": itl_ms, "n": 3}, "decode_tok_s": 1e3 / itl_ms},
    }


ROWS = [
    row("qwen-rt", 9.0, run="run-0", date="2025-12-01T00:00:00Z"),
    row("qwen-rt", 2.0),
    row("transformers fp32", 1.0, precision="bf16"),
    row("qwen-rt", 4.0, batch=8),
    row("transformers fp32", 10.0, batch=8),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_sample_rows_are_rows() -> None:
    assert [harness.problems_of(r) for r in ROWS] == [[]] * len(ROWS)


def test_only_the_newest_row_of_each_contender_and_settings_is_shown() -> None:
    assert [r["metrics"]["itl_ms"]["median"] for r in report.newest(ROWS, "cpu_decode")] == [2.0, 1.0, 4.0, 10.0]


def test_a_table_compares_within_settings_and_keeps_what_is_faster_than_ours() -> None:
    lines = report.table(ROWS, "cpu_decode").splitlines()
    assert cells(lines[0]) == ["", "batch", "precision", "ms a token", "tok/s", "ms a token / ours"]
    assert [cells(line)[-1] for line in lines[2:6]] == ["1.00", "0.50", "1.00", "2.50"]
    assert "A CPU, 2 cores" in lines[-1]
    assert "New tokens 8" in lines[-1]


def test_rows_of_different_runs_are_not_divided() -> None:
    rows = [row("qwen-rt", 2.0), row("transformers fp32", 1.0, run="run-2")]
    assert cells(report.table(rows, "cpu_decode").splitlines()[3])[-1] == "–"


def test_a_benchmark_without_a_layout_shows_all_its_metrics() -> None:
    rows = [r | {"benchmark": "other"} for r in ROWS]
    assert "decode, tok/s" in report.table(rows, "other") or "tok/s" in report.table(rows, "other")


def write_results(folder: Path, rows: list[Any]) -> None:
    import json

    folder.mkdir(exist_ok=True)
    (folder / "cpu_decode.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_update_then_check_then_a_new_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    write_results(results, ROWS)
    page.write_text("before\n<!-- results:cpu_decode -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    check = ["--results", str(results), "--check", str(page)]
    assert report.main(check) == 1
    assert "out of date" in capsys.readouterr().err
    assert report.main(["--results", str(results), "--update", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results:cpu_decode -->\n|")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert report.main(check) == 0
    write_results(results, [*ROWS, row("qwen-rt", 1.5, run="run-3", date="2026-02-01T00:00:00Z")])
    assert report.main(check) == 1


def test_update_leaves_other_documents_alone(tmp_path: Path) -> None:
    write_results(tmp_path, ROWS)
    page = tmp_path / "page.md"
    page.write_text("nothing here\n", encoding="utf-8")
    assert report.main(["--results", str(tmp_path), "--update", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == "nothing here\n"


def test_markers_that_cannot_be_filled_are_refused() -> None:
    with pytest.raises(UsageError, match="no results of nothing"):
        report.update("<!-- results:nothing -->\n<!-- /results -->\n", ROWS)
    with pytest.raises(UsageError, match="not closed"):
        report.update("<!-- results:cpu_decode -->\n", ROWS)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cpu_decode.jsonl").write_text("{}\n{")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: the result rows cannot be read: cpu_decode.jsonl:2 is no JSON")
    assert report.main(["--check", str(tmp_path / "none.md")]) == 2
    assert "none.md cannot be read: " in capsys.readouterr().err


def test_picture(tmp_path: Path) -> None:
    write_results(tmp_path, ROWS)
    for name in ("bars.svg", "bars.png"):
        file = tmp_path / name
        assert report.main(["cpu_decode", "--results", str(tmp_path), "--picture", str(file)]) == 0
        assert file.stat().st_size > 1000
    assert report.main(["--results", str(tmp_path / "empty"), "--picture", "x.png"]) == 2


def test_committed_documents_are_up_to_date() -> None:
    root = harness.RESULTS_FOLDER.parent.parent
    rows = harness.read_rows()
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            assert report.update(text, rows, file.name) == text, f"run: {report.__name__} --update {file.name}"
