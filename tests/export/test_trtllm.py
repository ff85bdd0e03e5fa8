"""TensorRT-LLM checkpoints: the parameters that all ranks hold together, and the logits they make."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError, StorageError
from qwen_rt.export.quantize.forward import Forward
from qwen_rt.export.quantize.plan import layer_matrices
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.export.trtllm import TrtllmOptions, TrtllmResult, convert
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.row_reader import CheckpointRows
from qwen_rt.spec import ModelSpec

from ..cases import NUM_TOKENS
from ..checkpoints import SHAPES, Shape, random_ids, save_checkpoint
from ..foreign import layouts
from ..foreign.kit import write_checkpoint
from .quantize.models import ArrayRows
from .trtllm_reader import Arrays, TrtllmCheckpoint

SHAPE = Shape("8 heads on 2 of 64, a prime vocabulary, sides that 8 ranks can share in int4", 512, 8, 2, 512, 317)
TIED = dataclasses.replace(SHAPE, num_kv_heads=4, tied=True, dtype="float16", vocab_size=256)
TPS = (1, 2, 4, 8)
SCHEMES = {"fp8": Scheme("fp8"), "int4": Scheme("int4", 64)}
IDS = random_ids(SHAPE, NUM_TOKENS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(SHAPE, tmp_path_factory.mktemp("trtllm") / "source")


def write(source: Path | str, out: Path, **options: Any) -> TrtllmResult:
    return convert(source, out, TrtllmOptions(quiet=True, num_workers=2, **options))


def rows_of(folder: Path | str) -> tuple[ModelSpec, Arrays]:
    """Every parameter of a checkpoint as float32, dequantized."""
    opened = Checkpoint.open(folder)
    with CheckpointRows(opened) as rows:
        return opened.spec, {name: rows.rows(name, 0, shape[0]) for name, shape in opened.spec.parameters().items()}


def rounded(spec: ModelSpec, arrays: Mapping[str, NDArray[np.float32]], scheme: Scheme | None, dtype: str) -> Arrays:
    """What our own formats make of the parameters: matrices in a scheme, the rest in a dtype."""
    matrices = set(layer_matrices(spec)) if scheme is not None else set()
    found = {}
    for name, array in arrays.items():
        if name in matrices and scheme is not None:
            found[name] = dequantize(quantize_rows(name, array, scheme))
        else:
            found[name] = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
    return found


def logits(spec: ModelSpec, arrays: Mapping[str, NDArray[np.float32]]) -> torch.Tensor:
    return Forward(spec, ArrayRows(arrays)).run(IDS % spec.vocab_size)


def assert_equal(found: Arrays, expected: Arrays, spec: ModelSpec) -> None:
    if spec.tie_word_embeddings:
        assert np.array_equal(found.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    different = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert not different
    assert torch.equal(logits(spec, found), logits(spec, expected))


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "int4"])
def test_all_ranks_together(source: Path, tmp_path: Path, precision: str, tp: int) -> None:
    """Floats as they are, quantized matrices as our own formats round them: bit for bit, and so are the logits."""
    options: dict[str, Any] = {"quantize": QuantizeOptions(group_size=64)} if precision == "int4" else {}
    result = write(source, tmp_path / "out", precision=precision, tp=tp, **options)
    spec, arrays = rows_of(source)
    read = TrtllmCheckpoint(tmp_path / "out")
    dtype = "float16" if precision == "fp16" else "bfloat16"
    assert read.config["dtype"] == dtype
    assert_equal(read.parameters(), rounded(spec, arrays, SCHEMES.get(precision), dtype), spec)
    files = json.loads((tmp_path / "out" / "qwen-rt.json").read_text())["files"]
    assert {name: entry["nbytes"] for name, entry in files.items()} == {
        file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")
    }
    assert result.nbytes == sum(entry["nbytes"] for entry in files.values())
    assert f"--workers {tp}" in result.command


@pytest.mark.parametrize("tp", TPS)
def test_int8_is_rounded_by_the_builder(source: Path, tmp_path: Path, tp: int) -> None:
    """W8A16 holds the floats; rounded as trtllm-build does on each rank, the logits stay within int8's error."""
    write(source, tmp_path / "out", precision="int8", tp=tp)
    spec, arrays = rows_of(source)
    read = TrtllmCheckpoint(tmp_path / "out")
    assert read.algorithm == "W8A16"
    assert_equal(read.parameters(), arrays, spec)
    exact = logits(spec, arrays)
    error = torch.linalg.vector_norm(logits(spec, read.parameters(builder=True)) - exact) / exact.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize(("precision", "group_size", "wanted"), [("int4", 64, 1024), ("int8", None, 1024)])
def test_wider_mlp(tmp_path: Path, precision: str, group_size: int | None, wanted: int) -> None:
    """An MLP that no whole number of tiles fits, as 72B's 29,568 over 8 GPUs, is stored with zeros behind it."""
    shape = dataclasses.replace(SHAPE, intermediate_size=576, num_layers=1)
    folder = save_checkpoint(shape, tmp_path / "source")
    write(folder, tmp_path / "out", precision=precision, tp=8, quantize=QuantizeOptions(group_size=group_size))
    spec, arrays = rows_of(folder)
    read = TrtllmCheckpoint(tmp_path / "out")
    assert read.config["intermediate_size"] == wanted
    assert_equal(read.parameters(ffn=576), rounded(spec, arrays, SCHEMES.get(precision), "bfloat16"), spec)
    logits_of_zeros = logits(dataclasses.replace(spec, intermediate_size=wanted), read.parameters())
    torch.testing.assert_close(logits_of_zeros, logits(spec, read.parameters(ffn=576)), rtol=1e-4, atol=1e-5)


def test_tied_float16(tmp_path: Path) -> None:
    """`auto` keeps float16, and the head of a tied model is written out."""
    folder = save_checkpoint(TIED, tmp_path / "source")
    spec, arrays = rows_of(folder)
    for tp in TPS:
        result = write(folder, tmp_path / f"tp{tp}", tp=tp)
        assert (result.precision, result.dtype) == ("fp16", "float16")
        assert_equal(TrtllmCheckpoint(tmp_path / f"tp{tp}").parameters(), arrays, spec)


QUANTIZED = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
WRITERS: dict[str, Callable[[int, int], layouts.Written]] = {
    "int4": lambda n, k: layouts.gptq(n, k, group_size=64, sym=True),
    "fp8": lambda n, k: layouts.compressed_fp8(n, k),
}


@pytest.mark.parametrize("precision", WRITERS)
@pytest.mark.parametrize("tp", [1, 4])
def test_quantized_checkpoints(tmp_path: Path, precision: str, tp: int) -> None:
    """GPTQ and fp8 matrices are taken over number by number."""
    source = tmp_path / "source"
    write_checkpoint(source, lambda name, n, k: None if "head" in name else WRITERS[precision](n, k), QUANTIZED)
    assert write(source, tmp_path / "out", tp=tp).precision == precision
    spec, arrays = rows_of(source)
    read = TrtllmCheckpoint(tmp_path / "out")
    matrices = layer_matrices(spec)
    found = read.parameters()
    assert not [name for name in matrices if not np.array_equal(found[name], arrays[name])]
    assert "quantized" in refused(source, tmp_path / "again", precision=precision)
    write(source, tmp_path / "floats", tp=tp, precision="bf16")
    assert_equal(TrtllmCheckpoint(tmp_path / "floats").parameters(), rounded(spec, arrays, None, "bfloat16"), spec)


def test_quantized_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """Zero points, act-order, int8 and a matrix left in floats have no place in the format."""
    writers: dict[str, Callable[[str, int, int], layouts.Written | None]] = {
        "asymmetric": lambda name, n, k: layouts.gptq(n, k, group_size=64),
        "permuted": lambda name, n, k: layouts.gptq(n, k, group_size=64, sym=True, act_order=True),
        "int8": lambda name, n, k: layouts.gptq(n, k, bits=8, group_size=64, sym=True),
        "floats": lambda name, n, k: None if "up_proj" in name else layouts.gptq(n, k, group_size=64, sym=True),
    }
    for word, writer in writers.items():
        write_checkpoint(tmp_path / word, writer, QUANTIZED)
        assert word in refused(tmp_path / word, tmp_path / "out")


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_small_blocks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """However the rows are cut into blocks, the same files come out."""
    options: dict[str, Any] = {"quantize": QuantizeOptions(group_size=64)} if precision == "int4" else {}
    write(source, tmp_path / "large", precision=precision, tp=4, **options)
    monkeypatch.setattr("qwen_rt.export.trtllm.writer.BLOCK_BYTES", 15 * 4 * 512)
    write(source, tmp_path / "small", precision=precision, tp=4, **options)
    for file in (tmp_path / "large").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "small" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["heads-0.5b", "heads-72b", "mha", "odd", "linear-rope"])
def test_other_shapes(tmp_path: Path, name: str) -> None:
    """Head counts of released models, odd sizes, linear rope: fp8 and bf16 over as many ranks as fit."""
    shape = SHAPES[name]
    folder = save_checkpoint(shape, tmp_path / "source")
    spec, arrays = rows_of(folder)
    tp = max(n for n in TPS if shape.num_heads % n == 0 and shape.intermediate_size % n == 0)
    for precision in ("bf16", "fp8"):
        write(folder, tmp_path / precision, precision=precision, tp=tp)
        read = TrtllmCheckpoint(tmp_path / precision)
        assert_equal(read.parameters(), rounded(spec, arrays, SCHEMES.get(precision), "bfloat16"), spec)
        scaling = read.config["rotary_scaling"]
        assert scaling == ({"type": "linear", "rope_type": "linear", "factor": 2.0} if name == "linear-rope" else None)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_calibrated(tmp_path: Path, precision: str) -> None:
    """Factors of a calibration travel with norms and neighbours: the model is the same but for its rounding."""
    text = tmp_path / "text.txt"
    text.write_text("What is 123 * 45? 123 * 45 = 5535. " * 6)
    result = write("nano", tmp_path / "out", precision=precision, tp=2, quantize=QuantizeOptions(calibrate=text))
    assert result.precision == precision
    spec, arrays = rows_of("nano")
    found = TrtllmCheckpoint(tmp_path / "out").parameters()
    assert any(not np.array_equal(found[name], arrays[name]) for name in arrays if "layernorm" in name)
    exact = logits(spec, arrays)
    error = torch.linalg.vector_norm(logits(spec, found) - exact) / exact.norm()
    assert error < (0.3 if precision == "int4" else 1e-4)


def test_config(source: Path, tmp_path: Path) -> None:
    """Every field that TensorRT-LLM's Qwen reads, from the checkpoint."""
    write(source, tmp_path / "out", precision="int4", quantize=QuantizeOptions(group_size=64), tp=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["qwen_type"]) == ("Qwen2ForCausalLM", "qwen2")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in sizes] == [512, 512, 2, 8, 2]
    assert (config["vocab_size"], config["head_size"], config["norm_epsilon"]) == (317, 64, 1e-6)
    assert (config["rotary_base"], config["position_embedding_type"]) == (1e6, "rope_gpt_neox")
    assert (config["attn_bias"], config["mlp_bias"], config["hidden_act"]) == (True, False, "silu")
    assert {name: value for name, value in config["quantization"].items() if value is not None} == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": False,
    }


def refused(source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises(QwenRtError) as caught:
        write(source, out, **options)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"tp": 3}, ("tp=3", "1, 2, 4, 8")),
        ({"precision": "fp32"}, ("precision=fp32", "bf16, fp16")),
        ({"precision": "int4", "tp": 8}, ("int4 over 8 ranks", "a multiple of 1024", "smaller --group-size")),
        ({"precision": "int4", "quantize": QuantizeOptions(group_size=32)}, ("int4 g32", "64 or 128")),
        ({"precision": "int4", "quantize": QuantizeOptions(symmetric=False)}, ("--asymmetric", "leave")),
        ({"precision": "int8", "quantize": QuantizeOptions(group_size=64)}, ("group_size=64", "a scale a channel")),
        ({"precision": "fp8", "quantize": QuantizeOptions(kv_cache="fp8")}, ("--kv-cache", "target trtllm")),
        ({"quantize": QuantizeOptions(group_size=64)}, ("--group-size without quantization",)),
        ({"max_length": 513}, ("max-length=513", "1 to 512")),
    ],
)
def test_refusals(source: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    """One line that says what, and nothing is written."""
    message = refused(source, tmp_path / "out", **options)
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_refused_models(tmp_path: Path) -> None:
    """YaRN, and heads that the ranks cannot share."""
    assert "rope_type=yarn" in refused(save_checkpoint(SHAPES["yarn"], tmp_path / "yarn"), tmp_path / "out")
    odd = save_checkpoint(SHAPES["odd"], tmp_path / "odd")
    assert "choose --tp 1" in refused(odd, tmp_path / "out", tp=2)


def test_what_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    """`--force` replaces a folder of this kind and no other; a failed run leaves nothing."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"holds no qwen-rt\.json"):
        write(source, tmp_path / "own", overwrite=True)
    write(source, tmp_path / "out", tp=2)
    with pytest.raises(StorageError, match="not empty"):
        write(source, tmp_path / "out")
    write(source, tmp_path / "out", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "qwen-rt.json",
        "rank0.safetensors",
    ]
    assert not list(tmp_path.glob(".*"))


def test_values_beyond_float16(tmp_path: Path) -> None:
    """fp16 refuses what it cannot hold, and nothing of the folder stays."""
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(SHAPE, tmp_path / "source", shard_bytes=1 << 30)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "beyond float16" in refused(folder, tmp_path / "out", precision="fp16")


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what it wrote and the trtllm-build line, whole."""
    from qwen_rt.cli import main

    out = tmp_path / "out"
    assert main(["build", str(source), "-o", str(out), "--target", "trtllm", "--tp", "2", "--precision", "fp8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("trtllm fp8, bfloat16, 2 ranks: ")
    assert printed[2].startswith(f"trtllm-build --checkpoint_dir {out} --output_dir {out}-engine ")
    assert printed[2].endswith("--max_seq_len 512 --workers 2")
    assert main(["build", str(source), "-o", str(tmp_path / "cpu"), "--tp", "2"]) == 2
    assert "--tp with target cpu" in capsys.readouterr().err
    assert main(["build", str(source), "-o", str(tmp_path / "x"), "--target", "trtllm", "--tp", "16"]) == 2
    assert "tp=16; expected one of 1, 2, 4, 8" in capsys.readouterr().err
    for flag in ("--self-contained", "--no-gate"):
        assert main(["build", str(source), "-o", str(tmp_path / "x"), "--target", "trtllm", flag]) == 2
        assert f"{flag} with target trtllm; expected a target that" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_was_written_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Building from it, or looking at it, says what it is."""
    from qwen_rt.cli import main

    out = tmp_path / "out"
    write("nano", out)
    for words in (["inspect", str(out)], ["build", str(out), "-o", str(tmp_path / "again")]):
        assert main(words) == 1
        assert f"{out} is a checkpoint for TensorRT-LLM" in capsys.readouterr().err


def test_from_a_portable_graph(nano_portable: Path, tmp_path: Path) -> None:
    """What `qwen-rt export` wrote is a source too; the files are those of its checkpoint."""
    write(nano_portable, tmp_path / "graph")
    write("nano", tmp_path / "nano")
    for name in ("config.json", "qwen-rt.json", "rank0.safetensors"):
        assert (tmp_path / "graph" / name).read_bytes() == (tmp_path / "nano" / name).read_bytes()


def test_what_is_read_is_not_replaced(source: Path, tmp_path: Path) -> None:
    """--force on a folder that holds the checkpoint, or the text of the calibration: all of it stays."""
    out = tmp_path / "out"
    write(source, out)
    shutil.copytree(source, out / "source")
    (out / "text.txt").write_text("7 + 8 = 15")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    text = QuantizeOptions(calibrate=out / "text.txt")
    for read, options in ((out / "source", {}), (source, {"precision": "int8", "quantize": text})):
        with pytest.raises(StorageError, match=r"which is read; expected a folder of its own"):
            write(read, out, overwrite=True, **options)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
