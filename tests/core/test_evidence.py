"""What doctor and README say was executed is what the committed rows say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qwen_rt import doctor
from qwen_rt.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
EVIDENCE = {target.name: target.evidence for target in TARGETS}


def devices() -> tuple[set[str], set[str]]:
    """Processors and GPUs of all committed rows."""
    found: tuple[set[str], set[str]] = set(), set()
    for file in RESULTS:
        for line in file.read_text("utf-8").splitlines():
            device = json.loads(line)["device"]
            gpu = device.get("gpu")
            found[gpu is not None].add(device["cpu"] if gpu is None else gpu["name"])
    return found


def executed(target: str) -> str:
    """The part that says where it was executed."""
    return next((part for part in EVIDENCE[target].split(";") if part.startswith("executed: ")), "")


def test_the_devices_are_those_of_the_rows() -> None:
    cpus, gpus = devices()
    assert set(re.findall(r"NVIDIA [^,;(]*?(?= and | \()", executed("cuda"))) == gpus
    assert all(name in executed("cpu") for name in cpus)


def test_no_row_is_of_an_engine() -> None:
    """As soon as one is, it has to be said which."""
    for target in ("tensorrt", "tensorrt-rtx", "trtllm"):
        assert not executed(target)
        assert "never" in EVIDENCE[target] or "no engine has been executed" in EVIDENCE[target]
    rows = [json.loads(line) for file in RESULTS for line in file.read_text("utf-8").splitlines()]
    assert not [row["benchmark"] for row in rows if row["device"].get("gpu") and '"tensorrt' in json.dumps(row)]


def test_doctor_prints_it_for_every_target() -> None:
    report = doctor.collect()
    text = " ".join(doctor.render(report).split())
    for status in report.targets:
        assert status.evidence == EVIDENCE[status.name]
        assert status.evidence in text


def test_the_readme_says_the_same() -> None:
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    section = readme.split("## What was executed", 1)[1].split(" ## ", 1)[0]
    for name in ("H100", "H200", "8.0, 8.9 and 12.0", "never", "stand-in"):
        assert name in section
