"""The wheel by itself: it installs without torch, imports, has its data, and brings nothing generic along."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERIC = {"core", "export", "runtime", "plugins", "benchmarks", "tests", "docs", "cli", "nano"}


def _version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "core/_version.py").read_text("utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_the_changelog_starts_with_this_version() -> None:
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("no CHANGELOG.md")
    entries = re.findall(r"^## \[?(\d[^\]\s]*)\]?", changelog.read_text("utf-8"), re.MULTILINE)
    assert entries[0] == _version()


def test_the_lock_pins_exactly_and_brings_no_gpu_wheels() -> None:
    pins = [
        line for line in (ROOT / "requirements/dev.lock").read_text("utf-8").splitlines() if not line.startswith("#")
    ]
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin), pin
        assert not pin.startswith(("nvidia", "cuda", "triton")), pin
    assert pins == sorted(pins, key=lambda pin: pin.upper().encode())


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a clean copy, and the wheel from that sdist: what the sdist forgets, the wheel lacks."""
    # An egg-info left by an earlier build would add its own list of files.
    clean = tmp_path_factory.mktemp("source") / "qwen-rt"
    shutil.copytree(
        ROOT, clean, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo")
    )
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, clean, cwd=out)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a fresh environment with the wheel and what it requires, in the locked versions."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-qq", "install")
    _run(*pip, "-c", ROOT / "requirements/dev.lock", wheel, cwd=folder)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"qwen_rt", f"qwen_rt-{_version()}.dist-info"}
    assert "qwen_rt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {
        ("qwen_rt/" if folder == "core" else f"qwen_rt/{folder}/") + file.relative_to(ROOT / folder).as_posix()
        for folder in ("core", "export", "runtime", "plugins", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
    }
    packaged = {source for source in sources if "results/" not in source}
    assert packaged <= set(names), sorted(packaged - set(names))


@pytest.mark.slow
def test_the_wheel_holds_the_nano_model_and_its_held_out_problems(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("core/nano", "qwen_rt/nano"), ("benchmarks/nano", "qwen_rt/benchmarks/nano")):
        for file in (ROOT / folder).iterdir():
            if file.suffix in (".json", ".jsonl", ".safetensors"):
                assert f"{package}/{file.name}" in names
    assert any(name.startswith("qwen_rt/nano/") and name.endswith(".safetensors") for name in names)


@pytest.mark.slow
def test_it_runs_without_torch_and_transformers(environment: Path, tmp_path: Path) -> None:
    program = """
import importlib.util, json
absent = [name for name in ("torch", "transformers", "onnxscript", "safetensors") if not importlib.util.find_spec(name)]
import qwen_rt, qwen_rt.runtime, qwen_rt.plugins
from qwen_rt import doctor
report = doctor.collect()
print(json.dumps([absent, qwen_rt.__file__, report.export.state, report.targets[0].state, report.next_step]))
"""
    absent, file, export, cpu, next_step = json.loads(_run(environment / "python", "-c", program, cwd=tmp_path))
    assert absent == ["torch", "transformers", "onnxscript", "safetensors"]
    assert Path(file).is_relative_to(environment.parent)
    assert cpu == "ready"
    assert export == "missing"
    assert next_step.startswith("pip install 'torch>=2.11'")


@pytest.mark.slow
def test_the_command_answers(environment: Path, tmp_path: Path) -> None:
    assert "usage" in _run(environment / "qwen-rt", "--help", cwd=tmp_path).lower()
    assert _version() in _run(environment / "qwen-rt", "--version", cwd=tmp_path)


@pytest.mark.slow
def test_nothing_generic_lands_in_site_packages(environment: Path) -> None:
    purelib = sysconfig.get_path("purelib", vars={"base": str(environment.parent), "platbase": str(environment.parent)})
    present = {path.stem for path in Path(purelib).iterdir()}
    assert "qwen_rt" in present
    assert not present & GENERIC
