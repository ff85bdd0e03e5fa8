"""Statistics, rows and what they must not tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import harness
from qwen_rt.errors import VerificationError

CHECK = {"passed": True, "what": "tokens equal"}


def write(folder: Path, metrics: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"settings": {"batch": 1}, "check": CHECK, "run": "run-1", "folder": folder} | changes
    settings = arguments.pop("settings")
    return harness.write_row("bench", "qwen-rt", metrics, settings, **arguments)


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [([3.0], 0.9, 3.0), ([1, 2, 3, 4], 0.5, 2.5), ([4, 1, 3, 2], 0.5, 2.5), (range(11), 0.1, 1.0), ([1, 2], 1.0, 2.0)],
)
def test_percentile_is_linear_between_sorted_samples(samples: Any, share: float, expected: float) -> None:
    assert harness.percentile(list(samples), share) == pytest.approx(expected)


def test_percentile_agrees_with_numpy() -> None:
    import numpy

    samples = numpy.random.default_rng(0).normal(size=37)
    for share in (0.0, 0.1, 0.33, 0.5, 0.9, 1.0):
        assert harness.percentile(samples.tolist(), share) == pytest.approx(numpy.quantile(samples, share))


def test_no_samples_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="no samples"):
        harness.summarize([])


def test_summary_rounds_to_significant_digits() -> None:
    assert harness.summarize([1234.56, 1234.56]) == {"median": 1235.0, "p10": 1235.0, "p90": 1235.0, "n": 2}
    assert harness.summarize([0.000123456])["median"] == 0.0001235


def test_a_written_row_reads_back_with_every_field(tmp_path: Path) -> None:
    row = write(tmp_path, {"itl_ms": harness.summarize([1.0, 2.0]), "peak_rss_gb": 0.1}, bars={"a": harness.bar(1, 2)})
    assert harness.read_rows(tmp_path) == [row]
    assert set(harness.FIELDS) <= set(row)
    assert harness.problems_of(row) == []
    assert row["bars"] == {"a": {"limit": 2, "value": 1.0, "met": True}}
    write(tmp_path, {"itl_ms": 2.0})
    assert len(harness.read_rows(tmp_path)) == 2


def test_a_row_is_one_line_whatever_its_texts_hold(tmp_path: Path) -> None:
    """What Unicode and `str.splitlines` take for the end of a line is none here."""
    row = write(tmp_path, {"itl_ms": 1.0}, settings={"model": "a\u2028b\x85c\x0bd\ne"})
    assert harness.read_rows(tmp_path) == [row]


def test_a_torn_line_costs_no_other_row(tmp_path: Path) -> None:
    row = write(tmp_path, {"itl_ms": 1.0})
    file = tmp_path / "bench.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    write(tmp_path, {"itl_ms": 2.0})
    lines = file.read_bytes().split(b"\n")
    assert (lines[0], lines[1]) == (whole[:-1], whole[:40])
    assert json.loads(lines[2])["metrics"] == {"itl_ms": 2.0}
    with pytest.raises(ValueError, match=r"bench\.jsonl:2 is no JSON: "):
        harness.read_rows(tmp_path)
    file.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    assert harness.read_rows(tmp_path)[0] == row


def test_a_row_goes_out_whole_or_not_at_all(tmp_path: Path) -> None:
    """A process that may write 15 kB writes a short line, and of one of 40 kB nothing."""
    program = (
        "import resource, signal, sys, pathlib\n"
        "from qwen_rt.benchmarks.row_file import append_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))\n"
        "append_line(pathlib.Path(sys.argv[1]), b'a' * 20)\n"
        "append_line(pathlib.Path(sys.argv[1]), b'b' * 40_000)\n"
    )
    file = tmp_path / "rows" / "bench.jsonl"
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "StorageError: " in done.stderr
    assert file.read_bytes() == b"a" * 20 + b"\n"


@pytest.mark.parametrize("check", [{}, {"passed": False}, {"passed": 1}])
def test_no_number_without_a_passed_check(tmp_path: Path, check: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match="did not pass"):
        write(tmp_path, {"itl_ms": 1.0}, check=check)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metrics", [{"itl": 1.0}, {"itl_ms": "fast"}, {"itl_ms": float("nan")}, {"itl_ms": {"median": 1.0}}, {}]
)
def test_malformed_metrics_are_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="metric"):
        write(tmp_path, metrics)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/models/qwen", ".../qwen"),
        ("run --bundle=/data/x/nano-cpu now", "run --bundle=.../nano-cpu now"),
        ("~/models/qwen", ".../qwen"),
        ('"/a/b c', '".../b c'),
        ("tok/s and 1/2 and GB/s", "tok/s and 1/2 and GB/s"),
        ("core/nano/config.json", "core/nano/config.json"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_folders_of_the_machine_stay_out(text: str, expected: str) -> None:
    assert harness.hide_paths({"a": [text]}) == {"a": [expected]}


def test_rows_hide_paths_in_every_text(tmp_path: Path) -> None:
    row = write(tmp_path, {"itl_ms": 1.0}, settings={"model": "/mnt/big/model"}, check=CHECK | {"of": ["/a/b/c"]})
    assert row["settings"] == {"model": ".../model"}
    assert row["check"]["of"] == [".../c"]


def test_command_names_the_module_and_relative_paths() -> None:
    root = harness.RESULTS_FOLDER.parent.parent
    argv = [str(root / "benchmarks" / "bench_x.py"), "--work", "/mnt/scratch", f"--model={root}/core/nano", "-n", "3"]
    expected = "python -m qwen_rt.benchmarks.bench_x --work .../scratch --model=core/nano -n 3"
    assert harness.command_line(argv) == expected


def test_git_state_outside_a_checkout_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS_FOLDER", tmp_path / "benchmarks" / "results")
    assert harness.git_state() == ("unknown", None)


def test_device_and_versions_are_filled() -> None:
    assert harness.device()["num_cores"] >= 1
    assert {"python", "qwen-rt"} <= set(harness.versions("no-such-package-here"))


def test_every_committed_row_has_the_needed_fields() -> None:
    for file in sorted(harness.RESULTS_FOLDER.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            assert harness.problems_of(row) == [], f"{file.name}:{number}"
            assert row["benchmark"] == file.stem, f"{file.name}:{number}"
