"""Building and finding the plugin library, with a stand-in for nvcc that writes down what it is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_rt.errors import MissingDependencyError, QwenRtError, StorageError, UsageError
from qwen_rt.ops import OPS
from qwen_rt.plugins import build, library

NVCC = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + chr(10))
if "-c" in words and os.path.basename(words[words.index("-c") + 1]) in os.environ.get("FAKE_NVCC_FAILS", "").split():
    sys.exit("a.cu(3): error: no such instruction" + chr(10) + "1 error detected")
if "-c" in words:
    pathlib.Path(words[-1]).write_text(" ".join(word for word in words if word.startswith("-D")))
else:
    objects = [pathlib.Path(word) for word in words if word.endswith(".o")]
    pathlib.Path(words[-1]).write_bytes(b"".join(file.read_bytes() + bytes(1) for file in objects))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(build, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """What nvcc was called with, a JSON list a line."""
    path, nvcc = tmp_path / "calls", tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(python=sys.executable, log=str(path)))
    nvcc.chmod(0o755)
    sources = tmp_path / "csrc"
    for name in ("capi.cu", "kernels/same.cu", "common/same.cu", "ort/binding.cpp", "ort/op_table.h"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(name)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("FAKE_NVCC_FAILS", raising=False)
    return path


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def place(cache: Path, sms: str, *, sources: str | None = None, abi: int = build.ABI, age_s: int = 0) -> Path:
    """A file that says of itself what a library says."""
    path = cache / f"{sources or 'present'}-{sms}-{abi}" / build.LIBRARY_NAME
    path.parent.mkdir(parents=True)
    info = f"abi={abi} sources={sources or build.source_hash()} sms={sms} nvcc=13.0 ops=embed:1"
    path.write_bytes(b"\x7fELF" + bytes(100) + info.encode() + bytes(50))
    os.utime(path, (2_000_000_000 - age_s,) * 2)
    return path


# ---- compiling ----


def test_every_source_is_compiled_and_linked_once(log: Path) -> None:
    path = build.build((90, 80))
    *compiled, linked = calls(log)
    names = {Path(words[words.index("-c") + 1]).relative_to(build.SOURCES).as_posix() for words in compiled}
    assert names == {"capi.cu", "kernels/same.cu", "common/same.cu", "ort/binding.cpp"}
    objects = [words[-1] for words in compiled]
    assert len(set(objects)) == 4
    assert sorted(word for word in linked if word.endswith(".o")) == sorted(objects)
    assert "-ldl" in linked
    for words in compiled:
        assert "-gencode=arch=compute_80,code=sm_80" in words
        assert "-gencode=arch=compute_90a,code=sm_90a" in words  # wgmma
        assert "all-warnings" not in words
    assert path == build.library_path((80, 90))
    assert build.library_info(path) == {
        "abi": str(build.ABI),
        "sources": build.source_hash(),
        "sms": "80,90",
        "nvcc": "13.0",
        "ops": ",".join(f"{op.name}:{op.version}" for op in OPS),
        "werror": "0",
    }
    assert [file.name for file in path.parent.iterdir()] == [build.LIBRARY_NAME]


def test_what_is_built_is_not_built_again(log: Path) -> None:
    first = build.build()
    count = len(calls(log))
    assert build.build() == first
    assert len(calls(log)) == count
    build.build(force=True)
    assert len(calls(log)) == 2 * count
    build.build(werror=True)
    build.build(werror=True)
    assert len(calls(log)) == 3 * count
    assert build.library_info(first)["werror"] == "1"


def test_warnings_are_errors_on_request(log: Path) -> None:
    build.build(werror=True)
    *compiled, _ = calls(log)
    assert all("all-warnings" in words for words in compiled)
    (host,) = (words for words in compiled if any(word.endswith("binding.cpp") for word in words))
    assert host[host.index("-Xcompiler", host.index("all-warnings")) + 1] == "-Werror"


def test_a_line_per_file_on_stderr(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--sm", "120", "--jobs", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{build.library_path((120,))}\n"
    lines = err.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert {line.split()[1] for line in lines} == {"capi.cu", "kernels/same.cu", "common/same.cu", "ort/binding.cpp"}
    assert build.main(["--sm", "120", "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_failing_compiler_is_one_line_and_leaves_nothing(
    log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_NVCC_FAILS", "capi.cu")
    assert build.main(["--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: nvcc failed on capi.cu: a.cu(3): error: no such instruction; ")
    assert list(cache.rglob(build.LIBRARY_NAME)) == []
    assert list(cache.rglob("*.o")) == []
    assert build.find_library() is None


def test_sources_that_change_meanwhile_give_no_library(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(("first", "second"))
    monkeypatch.setattr(build, "source_hash", lambda: next(hashes))
    with pytest.raises(QwenRtError, match="the sources changed while they were compiled; build again"):
        build.build()
    assert build.built_libraries() == []


def test_a_folder_that_cannot_be_made_is_one_line(log: Path, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(StorageError, match="Not a directory"):
        build.build()


@pytest.mark.parametrize(("sms", "jobs"), [((), None), ((70,), None), ((90,), 0)])
def test_options_that_cannot_be_used(cache: Path, sms: tuple[int, ...], jobs: int | None) -> None:
    with pytest.raises(UsageError):
        build.build(sms, jobs=jobs)


def test_the_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        build.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "python -m qwen_rt.plugins.build --sm 80 --sm 89" in text
    assert "Exit codes: 0" in text
    assert build.main(["--sm", "75"]) == 2


# ---- the op table in the hash ----


def test_the_hash_covers_the_op_table_and_the_binding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    hashes = [build.source_hash()]
    (tmp_path / "binding.cpp").write_text("1")
    hashes.append(build.source_hash())
    for changed in (
        replace(OPS[0], version=OPS[0].version + 1),
        replace(OPS[0], dims=("vocab", "rows", "hidden")),
        replace(OPS[0], inputs=(replace(OPS[0].inputs[0], dtype="i32"), *OPS[0].inputs[1:])),
        replace(OPS[0], attributes=(("scale", 2.0),)),
        replace(OPS[0], has_workspace=True),
    ):
        monkeypatch.setattr(build, "OPS", (changed, *OPS[1:]))
        hashes.append(build.source_hash())
    assert len(set(hashes)) == len(hashes)


def test_a_wheel_gets_every_source() -> None:
    package = build.SOURCES.parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["qwen_rt.plugins"]
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    sources = {file for file in build.SOURCES.rglob("*") if file.suffix in (".cu", ".cuh", ".cpp", ".h")}
    assert build.SOURCES / "ort" / "binding.cpp" in sources
    assert sources <= packaged


# ---- finding and loading ----


def test_the_newest_library_of_these_sources_with_the_sms_is_found(cache: Path) -> None:
    assert build.find_library() is None
    old = place(cache, "80,90", age_s=100)
    new = place(cache, "90", age_s=50)
    place(cache, "80,89,90,120", sources="0123456789abcdef")
    place(cache, "80,86", abi=build.ABI - 1)
    assert build.find_library() == new
    assert build.find_library((90,)) == new
    assert build.find_library((80,)) == old
    assert build.find_library((90, 80)) == old
    assert build.find_library((86,)) is None
    assert build.built_libraries()[-1] == old


def test_a_file_that_is_no_library_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_bytes(os.urandom(1000))
    assert [build.library_info(tmp_path / name) for name in ("empty", "other", "missing", ".")] == [{}, {}, {}, {}]


@pytest.mark.parametrize(
    ("sms", "sources", "sm", "message"),
    [
        (None, None, None, "the plugin library is not built; run `python -m qwen_rt.plugins.build`"),
        (None, None, 80, "the plugin library is not built; run `python -m qwen_rt.plugins.build --sm 80`"),
        (
            "90",
            "0123456789abcdef",
            90,
            "the plugin library is of other sources than these; expected one of the present sources; "
            "run `python -m qwen_rt.plugins.build --sm 90`",
        ),
        (
            "90,120",
            None,
            80,
            "the plugin library has code for SM 9.0, 12.0, this GPU is SM 8.0; "
            "run `python -m qwen_rt.plugins.build --sm 80`",
        ),
    ],
    ids=["none", "none for an SM", "stale", "another SM"],
)
def test_why_there_is_no_library_is_said_in_one_line(
    cache: Path, sms: str | None, sources: str | None, sm: int | None, message: str
) -> None:
    if sms is not None:
        place(cache, sms, sources=sources)
    with pytest.raises(MissingDependencyError) as error:
        library.load(sm)
    assert str(error.value) == message


def test_a_library_is_loaded_with_and_without_naming_the_gpu(cache: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    ops = ",".join(f"{op.name}:{op.version}" for op in OPS)
    info = f"abi={build.ABI} sources={build.source_hash()} sms=80,90 nvcc=13.0 ops={ops} werror=0"
    path = build.library_path((80, 90))
    path.parent.mkdir(parents=True)
    program = f"""
        #include <cstdint>
        extern "C" const char* qwen_rt_build_info() {{ return "{info}"; }}
        extern "C" int64_t qwen_rt_workspace_bytes(const char*, const int64_t* dims, int n) {{ return dims[n - 1]; }}
    """
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=program, text=True, check=True)
    for found in (library.load(), library.load(90), library.load(sm=80)):
        assert found.path == path
        assert found.sms == (80, 90)
        assert found.build_info == build.library_info(path)
        assert found.workspace_bytes("lm_head", (1, 2, 3, 4)) == 4
    with pytest.raises(MissingDependencyError, match=r"has code for SM 8\.0, 9\.0, this GPU is SM 12\.0"):
        library.load(120)
