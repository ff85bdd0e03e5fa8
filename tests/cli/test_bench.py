"""`qwen-rt bench`: help, bars from result rows, one clear line where a GPU, torch or the plugin library is absent."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks import bars, bench_latency
from qwen_rt.benchmarks.kernel_shapes import SHAPES
from qwen_rt.errors import MissingDependencyError

from .conftest import Cli
from .kit import child, command, environment, names

BAR = """
[[bar]]
id = "one"
issue = 7
text = "1 row"
op = "<="
limit = 1.2
from = [{ benchmark = "latency", contender = "qwen-rt", where.rows = 1, value = "itl_to_floor_ratio" }]
"""


def row(ratio: float, date: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "benchmark": "latency",
        "contender": "qwen-rt",
        "run": "run-1",
        "date": date,
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "qwen-rt bench latency",
        "device": {"cpu": "A CPU"},
        "versions": {"python": "3.12"},
        "settings": {"rows": 1},
        "check": {"passed": True},
        "metrics": {"itl_to_floor_ratio": ratio},
    }


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Options that name a folder of rows and a file of bars."""
    (tmp_path / "results").mkdir()
    (tmp_path / "bars.toml").write_text(BAR, encoding="utf-8")
    return ["bench", "bars", "--results", str(tmp_path / "results"), "--bars", str(tmp_path / "bars.toml")]


def put(place: list[str], *rows: dict[str, Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(place[3]) / "latency.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("what", ["kernels", "latency", "peers", "timeline", "bars"])
def test_each_benchmark_has_help_with_examples_that_parse(what: str, cli: Cli) -> None:
    shown = cli("bench", what, "--help")
    assert (shown.code, shown.err) == (0, "")
    lines = [line.strip() for line in shown.out.split("\nexample:\n")[1].splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["qwen-rt", "bench", what]
        importlib.import_module("qwen_rt.cli")._parse(words[1:])
    assert max(map(len, shown.out.splitlines())) <= 120


def test_the_shapes_of_the_command_are_those_of_the_benchmarks() -> None:
    assert tuple(SHAPES) == importlib.import_module("qwen_rt.cli.bench").MODELS


def test_which_benchmark_must_be_said(cli: Cli) -> None:
    cli("bench").refused(2, "WHAT", "see qwen-rt bench --help")
    cli("bench", "kernel").refused(2, "'kernels', 'latency', 'peers', 'timeline', 'bars'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["kernels", "--rows", "0"], ("--rows", "'0' is no whole number from 1 to 64")),
        (["kernels", "--rows", "65"], ("'65' is no whole number from 1 to 64",)),
        (["latency", "--rows", "one"], ("'one' is no whole number",)),
        (["latency", "--prompts", "-3"], ("--prompts",)),
        (["kernels", "--model", "3b"], ("--model", "'3b'")),
        (["kernels", "--op", "softmax"], ("--op", "'softmax'")),
        (["bars", "--issue", "three"], ("'three' is no whole number",)),
        (["latency", "no-such-model", "--dry"], ("no-such-model", "0.5b, 1.5b, 7b, 72b, or a bundle")),
        (["latency", "7b", "--picture", "a.jpg", "--dry"], ("a.jpg", ".svg or .png")),
        (["peers", "--peer", "tensorrt"], ("--peer", "'tensorrt'")),
        (["peers", "--precision", "int8"], ("--precision", "'int8'")),
        (["peers", "no-such-model", "--dry"], ("no-such-model", "0.5b, 1.5b, 7b, 72b", "random weights")),
        (["peers", "7b", "--vllm-python", "none/python", "--dry"], ("--vllm-python none/python is no program",)),
        (["timeline", "--rows", "1", "16"], ("unrecognized|--rows|model '16'",)),
        (["timeline", "--steps", "65"], ("--steps", "'65' is no whole number from 1 to 64")),
        (["timeline", "--steps", "0"], ("'0' is no whole number from 1 to 64",)),
        (["timeline", "--prompt", "0"], ("--prompt", "'0' is no whole number")),
        (["timeline", "no-such-model", "--dry"], ("no-such-model", "0.5b, 1.5b, 7b, 72b, or a bundle")),
        (["timeline", "--picture", "a.png", "--dry"], ("--picture a.png", "ending in .svg")),
        (["timeline", "--picture", "none/a.svg", "--dry"], ("--picture", "folder that exists")),
        (["latency", "some", "--layers", "2", "--dry"], ("--layers 2 with some",)),
    ],
)
def test_bad_options(options: list[str], words: tuple[str, ...], cli: Cli, workplace: Path) -> None:
    cli("bench", *options).refused(2, *words)
    assert names(workplace) == set()


def test_a_bundle_of_another_target(cli: Cli, bundle: Path, graph: Path) -> None:
    cli("bench", "latency", bundle, "--dry").refused(2, "is of target cpu; expected target cuda", "--target cuda")
    cli("bench", "latency", graph, "--dry").refused(2, "is of target portable; expected target cuda")
    cli("bench", "timeline", bundle, "--dry").refused(2, "is of target cpu; expected target cuda", "--target cuda")


def test_bars_pass(place: list[str], cli: Cli) -> None:
    put(place, row(1.3, "2026-01-01T00:00:00Z"), row(1.1, "2026-01-02T00:00:00Z"))
    shown = cli(*place)
    assert (shown.code, shown.err) == (0, "")
    first, count = shown.out.splitlines()
    assert first.startswith("PASS    one")
    assert "1.1 <= 1.2  latency qwen-rt, 2026-01-02, 0123456789  1 row" in first
    assert count == "no GPU: 1 pass, 0 short"
    (plain,) = json.loads(cli(*place, "--json").out)
    assert (plain["state"], plain["value"]) == ("PASS", 1.1)


def test_a_short_bar_and_a_missing_row_fail(place: list[str], cli: Cli) -> None:
    shown = cli(*place)
    assert (shown.code, shown.err) == (1, "")
    assert shown.out.startswith("NO ROW  one")
    put(place, row(1.3, "2026-01-01T00:00:00Z"))
    shown = cli(*place, "--issue", "7")
    assert (shown.code, shown.err) == (1, "")
    assert shown.out.startswith("SHORT   one")
    cli(*place, "--issue", "8").refused(2, "issue=8 has no bars", "one of 7")


def test_bars_that_cannot_be_read(place: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bars.toml").write_text(BAR.replace('"<="', '"=<"'), encoding="utf-8")
    cli(*place).refused(2, r"bars.toml, bar 'one': op='=<'; expected <= or < or >= or >")
    (tmp_path / "bars.toml").write_text(BAR, encoding="utf-8")
    (tmp_path / "results" / "latency.jsonl").write_text("[1]\n", encoding="utf-8")
    cli(*place).refused(2, r"latency.jsonl:1 is no object")
    (tmp_path / "results" / "latency.jsonl").write_text("{\n", encoding="utf-8")
    cli(*place).refused(2, "cannot be read")
    put(place, {"benchmark": "latency"})
    cli(*place).refused(2, "row 1 of .* lacks schema, contender")
    cli("bench", "bars", "--results", tmp_path / "none").refused(2, "no result rows in")


def test_the_bars_of_the_project_are_told(cli: Cli) -> None:
    shown = cli("bench", "bars", "--issue", "3")
    assert shown.err == ""
    told, counts = [], []
    for line in shown.out.splitlines():
        (told if re.match("PASS  |SHORT |NO ROW", line) else counts).append(line)
    ids = {line.removeprefix("NO ROW").split()[0 if line.startswith("NO ROW") else 1] for line in told}
    assert ids == {bar.id for bar in bars.load() if bar.issue == 3}
    assert all(re.fullmatch(r".+: \d+ pass, \d+ short|\d+ without a row", line) for line in counts)
    assert shown.code == int(any(not line.startswith("PASS") for line in told))


def test_without_a_gpu(workplace: Path) -> None:
    """One line that says what is missing, before anything is loaded; no row."""
    env = environment(CUDA_VISIBLE_DEVICES="")
    kernels = child(["bench", "kernels", "--output", "rows.jsonl"], cwd=workplace, env=env)
    kernels.refused(1, "torch .* is a CPU build|torch finds no GPU")
    for what in ("latency", "peers", "timeline"):
        whole = child(["bench", what, "7b", "--output", "rows.jsonl"], cwd=workplace, env=env)
        whole.refused(1, "no NVIDIA driver|no NVIDIA GPU|CUDA runtime|plugin library")
    assert names(workplace) == set()


def test_without_torch(workplace: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from qwen_rt.cli import main\n"
        "sys.exit(main(['bench', 'kernels', '--dry']))"
    )
    done = subprocess.run(
        [command()[0], "-c", code], capture_output=True, text=True, cwd=workplace, env=environment(), check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "`bench kernels` needs torch, which is not installed; pip install torch" in done.stderr


def test_without_the_plugin_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        """A device of compute capability 9.0."""

        def open_device(self, device: int) -> int:
            return 90

    monkeypatch.setattr(bench_latency, "Cudart", Cuda)
    monkeypatch.setattr("qwen_rt.plugins.build.cache_folder", lambda: tmp_path)
    with pytest.raises(MissingDependencyError, match=r"plugin library|libqwen_rt_plugins"):
        bench_latency.open_gpu(0, with_matrix_rate=False)


def test_outside_a_checkout_a_file_must_be_named(cli: Cli, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setattr("qwen_rt.benchmarks.harness.RESULTS_FOLDER", workplace / "benchmarks" / "results")
    cli("bench", "latency", "7b").refused(2, "no file for the rows", "--output FILE")
    cli("bench", "timeline").refused(2, "no file for the rows", "--output FILE")
    cli("bench", "bars").refused(2, "no result rows in")
    assert names(workplace) == set()
