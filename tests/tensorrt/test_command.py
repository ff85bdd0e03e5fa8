"""`qwen-rt build --target tensorrt-rtx` and `inspect` of what it wrote, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.cli import main
from qwen_rt.engine_card import CARD_FILE

from ..cli.kit import flip_byte, rehash, shared_graph
from .kit import needs_rtx


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_rtx()
    out = tmp_path_factory.mktemp("command") / "nano-rtx"
    arguments = ["build", str(shared_graph()), "-o", str(out), "--target", "tensorrt-rtx", "--max-length", "256"]
    assert main([*arguments, "--compute-capability", "8.9", "12.0", "--max-batch", "4", "--quiet"]) == 0
    return out


@pytest.mark.trt
def test_build(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it prints: results on stdout, progress on stderr, nothing of the library's own."""
    out = tmp_path / "out"
    arguments = ["build", str(shared_graph()), "-o", str(out), "--target", "tensorrt-rtx", "--max-length", "256"]
    assert main([*arguments, "--compute-capability", "8.9", "12.0", "--max-batch", "4"]) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"tensorrt-rtx bf16, 4 layers: 22.0 MB in {out}"
    assert lines[1].startswith("tensorrt-rtx 1.")
    assert lines[1].endswith(
        "for compute capability 8.9, 12.0; at most prefill 4 x 256, decode 4 x 1 tokens, 256 in all"
    )
    chief = "MATRIX_MULTIPLY 17, KV_CACHE_UPDATE 8, ROTARY_EMBEDDING 8, ATTENTION 4, others "
    assert lines[2].startswith(f"network: {chief}")
    assert [line.split(":")[0] for line in lines[3:]] == ["decode", "prefill"]
    assert all("engine for 8.9, 12.0, 16.9 MB of weights: " in line for line in printed.err.splitlines())
    assert (out / CARD_FILE).read_bytes() == (bundle / CARD_FILE).read_bytes()


@pytest.mark.trt
def test_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(shared_graph()), "-o", str(tmp_path / "out"), "--target", "tensorrt-rtx", "--quiet"]
    assert main([*arguments, "--max-length", "64", "--precision", "fp32"]) == 1
    printed = capfd.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert "/model/layers.0/self_attn/Attention" in line
    assert line.startswith("qwen-rt: error: ")


@pytest.mark.trt
def test_inspect(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--layers"]) == 0
    text = capsys.readouterr().out
    assert f"{bundle}: bundle of engines" in text
    for words in (
        "library      tensorrt-rtx 1.",
        "GPUs         compute capability 8.9, 12.0",
        "weights      bf16, in the engines, sha256 ",
        "profiles     at most prefill 4 rows x 256 tokens, decode 4 rows x 1 tokens",
        "compiled     decode ",
        "--compute-capability 8.9 12.0 -o ",
        "engine/rank0.engine",
        "layers, of one rank",
        "KV_CACHE_UPDATE 8",
    ):
        assert words in text, text
    assert main(["inspect", str(bundle), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["operators"]["ATTENTION"] == 4
    assert document["kind"] == "bundle of engines"


@pytest.mark.trt
def test_inspect_a_damaged_card(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    card = json.loads((copy / CARD_FILE).read_bytes())
    (copy / CARD_FILE).write_text(json.dumps(card | {"version": ""}))
    rehash(copy, CARD_FILE)
    assert main(["inspect", str(copy)]) == 1
    assert 'version=""; expected a non-empty string' in capsys.readouterr().err
    flip_byte(copy / "engine" / "rank0.engine")
    from qwen_rt.bundle import Bundle
    from qwen_rt.errors import BundleError

    with pytest.raises(BundleError, match=r"rank0\.engine of .* was changed after the build"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compute-capability", "8.9"], "--compute-capability with target cpu"),
        (["--max-batch", "4", "--target", "cuda"], "--max-batch with target cuda"),
        (["--prefill-tokens", "4", "--target", "trtllm"], "--prefill-tokens with target trtllm"),
        (["--timing-cache", "x"], "--timing-cache with target cpu"),
        (["--tp", "2"], "--tp with target cpu; expected --target trtllm, tensorrt or tensorrt-rtx"),
    ],
)
def test_options_of_other_targets(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "nano", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
