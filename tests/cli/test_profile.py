"""`qwen-rt profile`: options, files, a bundle of target cpu from end to end, what it says without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Cli
from .kit import child, environment, names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["7b", "--rows", "0"], ("--rows", "'0' is no whole number from 1 to 64")),
        (["7b", "--steps", "65"], ("--steps", "1 to 64")),
        (["7b", "--prefill", "none"], ("--prefill", "'none' is no whole number")),
        (["7b", "--method", "nsys"], ("--method", "'auto', 'cupti', 'cut'")),
        (["no-such-model"], ("'no-such-model'; expected a bundle, or one of 0.5b, 1.5b, 7b, 72b",)),
        (["7b", "--picture", "a.jpg"], ("--picture a.jpg", ".svg or .png")),
        (["7b", "--json", "none/a.json"], ("--json none/a.json", "folder that exists")),
        (["7b", "--trace", "none/a.json"], ("--trace none/a.json", "folder that exists")),
        (["7b", "--threads", "2"], ("--threads 2", "a bundle of target cpu")),
        ([], ("MODEL",)),
    ],
)
def test_bad_options(options: list[str], words: tuple[str, ...], cli: Cli, workplace: Path) -> None:
    cli("profile", *options).refused(2, *words)
    assert names(workplace) == set()


def test_bundles_that_do_not_fit(cli: Cli, bundle: Path, graph: Path) -> None:
    cli("profile", graph).refused(2, "is of target portable; expected target cuda")
    for option in (["--layers", "2"], ["--precision", "fp8"], ["--kv-cache", "int8"]):
        cli("profile", bundle, *option).refused(2, f"{option[0]} {option[1]} with", "a bundle has its own")
    cli("profile", bundle, "--prompt", "1000000").refused(2, "positions; expected at most")


def test_a_cpu_bundle(cli: Cli, bundle: Path, workplace: Path) -> None:
    files = ["--json", "p.json", "--trace", "t.json", "--picture", "p.svg"]
    shown = cli("profile", bundle, "--steps", "6", "--prompt", "16", "--prefill", "24", "--threads", "1", *files)
    assert (shown.code, shown.err) == (0, "")
    assert names(workplace) == {"p.json", "t.json", "p.svg"}
    document = json.loads((workplace / "p.json").read_text(encoding="utf-8"))
    assert (document["schema"], len(document["profiles"])) == (1, 2)
    for found in document["profiles"]:
        assert sum(cause["us"] for cause in found["causes"]) == pytest.approx(found["lost_us"], abs=0.05)
        assert found["lost_us"] == pytest.approx(found["step_us"] - found["floor_us"], abs=0.01)
        assert f"{found['step_us']:.1f} µs a" in shown.out
        assert {"Gemm qkv_proj", "GroupQueryAttention"} <= {op["op"] for op in found["ops"]}
    assert {"onnxruntime", "qwen-rt"} <= document["versions"].keys()
    trace = json.loads((workplace / "t.json").read_text(encoding="utf-8"))
    assert {event["pid"] for event in trace["traceEvents"]} == {1, 2}
    assert (workplace / "p.svg").read_bytes().startswith(b"<?xml")


def test_without_a_gpu(workplace: Path) -> None:
    done = child(["profile", "7b", "--json", "p.json"], cwd=workplace, env=environment(CUDA_VISIBLE_DEVICES=""))
    done.refused(1, "no NVIDIA driver|no NVIDIA GPU|CUDA runtime|plugin library")
    assert names(workplace) == set()
