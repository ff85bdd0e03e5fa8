"""SmoothQuant W8A8 in TensorRT-LLM checkpoints: what all ranks hold, and the logits with activations in int8."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen_rt.benchmarks.nano.heldout import excluded_questions
from qwen_rt.benchmarks.nano.problems import stream
from qwen_rt.benchmarks.nano.prompts import IM_END, instruct_prompt
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.quantize.forward import Forward, multiply
from qwen_rt.export.quantize.plan import layer_matrices
from qwen_rt.export.quantize.prepare import prepare
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.spec import ModelSpec

from ..checkpoints import save_checkpoint
from ..foreign import layouts
from ..foreign.kit import write_checkpoint
from .quantize.models import ArrayRows, nano_texts, nano_weights, with_outliers
from .test_trtllm import IDS, QUANTIZED, SHAPE, TIED, TPS, assert_equal, logits, refused, rows_of, write
from .trtllm_reader import SMOOTHQUANT, Arrays, TrtllmCheckpoint
from .trtllm_w8a8 import W8a8Forward

INT8 = Scheme("int8")
MAX_NANO_ERROR = {1: 0.02, 2: 0.016, 4: 0.012}
"""Seen: 0.0165, 0.0132 and 0.0100; 0.0234 at one rank without smoothing."""


def with_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Give a random checkpoint tokens to read a text with: its numbers, as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(SHAPE, tmp_path_factory.mktemp("smoothquant") / "source")
    return with_tokenizer(folder, SHAPE.vocab_size)


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> QuantizeOptions:
    """Options of the command: int8 activations, and a text for the tokenizer of the random checkpoints."""
    text = tmp_path_factory.mktemp("text") / "numbers.txt"
    text.write_text(" ".join(str(i * i % 317) for i in range(160)))
    return QuantizeOptions(calibrate=text, activations="int8")


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> QuantizeOptions:
    """The same with a text for nano: eight solved problems of those it was trained on."""
    problems = itertools.islice(stream(77, excluded_questions()), 8)
    text = tmp_path_factory.mktemp("text") / "solved.txt"
    text.write_text("\n".join(instruct_prompt(problem.question) + problem.solution + IM_END for problem in problems))
    return QuantizeOptions(calibrate=text, activations="int8")


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with some channels of every unit's input up to thirty times as large as the others."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("loud")
    spec, arrays = nano_weights()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(Checkpoint.open("nano").path / name, folder / name)
    tensors = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in with_outliers(arrays, spec).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edited(folder: Path | str, options: QuantizeOptions) -> tuple[ModelSpec, Arrays]:
    """The parameters that a bundle of the same options would hold, not rounded yet."""
    opened = Checkpoint.open(folder)
    prepared = prepare(opened, "int8", options, "cpu", quiet=True)
    shapes = opened.spec.parameters()
    arrays = {name: prepared.edited.rows(name, 0, shape[0]) for name, shape in shapes.items()}
    prepared.rows.close()
    return opened.spec, arrays


def in_int8(spec: ModelSpec, arrays: Mapping[str, NDArray[np.float32]]) -> Arrays:
    """The same with the layers' matrices rounded as our int8 bundles round them; the rest is exact in bf16 already."""
    matrices = set(layer_matrices(spec))
    return {
        name: dequantize(quantize_rows(name, array, INT8)) if name in matrices else array
        for name, array in arrays.items()
    }


def error(found: NDArray[Any], exact: torch.Tensor) -> float:
    """‖found - exact‖ / ‖exact‖ over all logits."""
    return float(np.linalg.norm(found - exact.numpy()) / np.linalg.norm(exact.numpy()))


def held_out(forward: Callable[[list[int]], torch.Tensor | NDArray[Any]]) -> torch.Tensor:
    """Logits of nano's held-out texts, one behind the other: [712, V]."""
    return torch.cat([torch.as_tensor(forward(ids)) for ids in nano_texts()[1]])


@pytest.mark.parametrize("tp", TPS)
def test_all_ranks_together(source: Path, smooth: QuantizeOptions, tmp_path: Path, tp: int) -> None:
    """Parameters and logits of every tp are, bit for bit, those of our own int8 with the same text.

    Two key/value heads are repeated over four and eight ranks, the prime vocabulary is padded. What the int8 values
    stand for makes the same logits in the rank by rank forward. With int8 inputs, scales found over all ranks give the
    same logits at every tp; with those that each rank finds alone, as in engines, they stay close to the float model's.
    """
    write(source, tmp_path / "out", precision="int8", tp=tp, quantize=smooth)
    spec, arrays = rows_of(source)
    read = TrtllmCheckpoint(tmp_path / "out")
    assert read.algorithm == SMOOTHQUANT
    expected = in_int8(*edited(source, smooth))
    assert_equal(read.parameters(), expected, spec)
    stood_for = logits(spec, expected).numpy()
    np.testing.assert_allclose(W8a8Forward(read, "none").logits(IDS), stood_for, rtol=1e-4, atol=1e-4)
    exact = logits(spec, arrays)
    together = W8a8Forward(read, "all").logits(IDS)
    write(source, tmp_path / "one", precision="int8", tp=1, quantize=smooth)
    alone = W8a8Forward(TrtllmCheckpoint(tmp_path / "one")).logits(IDS)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)
    assert 0 < error(W8a8Forward(read).logits(IDS), exact) < 0.03


@pytest.mark.parametrize("tp", MAX_NANO_ERROR)
def test_nano(solved: QuantizeOptions, tmp_path: Path, tp: int) -> None:
    """Held-out texts: logits close to the float model's, and another token first at 3 of 712 places at most."""
    write("nano", tmp_path / "out", precision="int8", tp=tp, quantize=solved)
    spec, arrays = nano_weights()
    exact = held_out(Forward(spec, ArrayRows(arrays)).run)
    found = held_out(W8a8Forward(TrtllmCheckpoint(tmp_path / "out")).logits)
    assert error(found.numpy(), exact) < MAX_NANO_ERROR[tp]
    assert (found.argmax(-1) != exact.argmax(-1)).sum() <= 3


def test_smoothing_helps(loud: Path, solved: QuantizeOptions, tmp_path: Path) -> None:
    """With loud channels the factors of the text take away a third of the error or more; seen: 0.23 for 0.45."""
    write(loud, tmp_path / "out", precision="int8", quantize=solved)
    spec, arrays = rows_of(loud)
    exact, plain = held_out(Forward(spec, ArrayRows(arrays)).run), in_int8(spec, arrays)
    unsmoothed = error(held_out(lambda ids: w8a8_logits(spec, plain, ids)).numpy(), exact)
    smoothed = error(held_out(W8a8Forward(TrtllmCheckpoint(tmp_path / "out")).logits).numpy(), exact)
    assert smoothed < 0.67 * unsmoothed


def w8a8_logits(spec: ModelSpec, arrays: Arrays, ids: list[int]) -> torch.Tensor:
    """Our forward with the inputs of the layers' matrices rounded to int8, a scale a token."""
    forward = Forward(spec, ArrayRows(arrays))
    hidden = forward.embed(ids)
    for layer in range(spec.num_layers):
        step = forward.layer(layer, hidden)
        while step.unit:
            scale = step.x.abs().amax(-1, keepdim=True) / 127
            x = (step.x / scale).round() * scale
            step.advance([multiply(forward.rows, name, x) for name in step.names])
        hidden = step.hidden
    return forward.logits(hidden)


def test_wider_mlp(smooth: QuantizeOptions, tmp_path: Path) -> None:
    """An MLP that is no multiple of 16 on each rank is stored with zeros behind it; the last rank has nothing else."""
    shape = dataclasses.replace(SHAPE, intermediate_size=552, num_layers=1)
    folder = with_tokenizer(save_checkpoint(shape, tmp_path / "source"), shape.vocab_size)
    write(folder, tmp_path / "out", precision="int8", tp=8, quantize=smooth)
    read = TrtllmCheckpoint(tmp_path / "out")
    assert read.config["intermediate_size"] == 640
    spec, arrays = rows_of(folder)
    assert_equal(read.parameters(ffn=552), in_int8(*edited(folder, smooth)), spec)
    assert not read.ranks[7]["transformer.layers.0.mlp.fc.weight"].any()
    assert 0 < error(W8a8Forward(read).logits(IDS), logits(spec, arrays)) < 0.03


def test_tied_float16(smooth: QuantizeOptions, tmp_path: Path) -> None:
    """A float16 checkpoint keeps its dtype beside the int8 matrices."""
    folder = with_tokenizer(save_checkpoint(TIED, tmp_path / "source"), TIED.vocab_size)
    write(folder, tmp_path / "out", precision="int8", tp=4, quantize=smooth)
    spec, _ = rows_of(folder)
    read = TrtllmCheckpoint(tmp_path / "out")
    assert read.config["dtype"] == "float16"
    assert_equal(read.parameters(), in_int8(*edited(folder, smooth)), spec)


def test_small_blocks(source: Path, smooth: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the rows are cut into blocks, the same files come out."""
    write(source, tmp_path / "large", precision="int8", tp=4, quantize=smooth)
    monkeypatch.setattr("qwen_rt.export.trtllm.writer.BLOCK_BYTES", 15 * 4 * 512)
    write(source, tmp_path / "small", precision="int8", tp=4, quantize=smooth)
    for file in (tmp_path / "large").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "small" / file.name).read_bytes()


def test_files(source: Path, smooth: QuantizeOptions, tmp_path: Path) -> None:
    """Names, dtypes and shapes that TensorRT-LLM's loader demands of a layer, no more; the mode in both JSONs."""
    result = write(source, tmp_path / "out", precision="int8", tp=4, quantize=smooth)
    assert (result.precision, result.dtype, result.quant_algo) == ("int8", "bfloat16", SMOOTHQUANT)
    rank, prefix = TrtllmCheckpoint(tmp_path / "out").ranks[3], "transformer.layers.1."
    found = {name.removeprefix(prefix): tensor for name, tensor in rank.items() if name.startswith(prefix)}
    i8, f32, bf16 = torch.int8, torch.float32, torch.bfloat16
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        "input_layernorm.weight": (bf16, (512,)),
        "input_layernorm.scale_to_int": (f32, (1,)),
        "attention.qkv.weight": (i8, (256, 512)),
        "attention.qkv.per_channel_scale": (f32, (1, 256)),
        "attention.qkv.bias": (bf16, (256,)),
        "attention.dense.weight": (i8, (512, 128)),
        "attention.dense.per_channel_scale": (f32, (1, 512)),
        "attention.dense.smoother": (f32, (1, 128)),
        "post_layernorm.weight": (bf16, (512,)),
        "post_layernorm.scale_to_int": (f32, (1,)),
        "mlp.fc.weight": (i8, (128, 512)),
        "mlp.fc.per_channel_scale": (f32, (1, 128)),
        "mlp.gate.weight": (i8, (128, 512)),
        "mlp.gate.per_channel_scale": (f32, (1, 128)),
        "mlp.proj.weight": (i8, (512, 128)),
        "mlp.proj.per_channel_scale": (f32, (1, 512)),
        "mlp.proj.smoother": (f32, (1, 128)),
    }
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["exclude_modules"]) == (SMOOTHQUANT, None)
    marker = json.loads((tmp_path / "out" / "qwen-rt.json").read_text())
    assert (marker["precision"], marker["quant_algo"], marker["method"]) == ("int8", SMOOTHQUANT, "smoothquant")


def int8_rows(rows: int, columns: int) -> layouts.Written:
    return layouts.compressed_integers(rows, columns, bits=8, strategy="channel", packed=False)


@pytest.mark.parametrize("tp", [1, 4])
def test_quantized_checkpoints(tmp_path: Path, tp: int) -> None:
    """int8 matrices of a W8A8 checkpoint are taken over number by number; what is in them is not smoothed again."""
    source, text = tmp_path / "source", tmp_path / "text.txt"
    write_checkpoint(source, lambda name, n, k: None if "head" in name else int8_rows(n, k), QUANTIZED)
    result = write(source, tmp_path / "out", tp=tp, quantize=QuantizeOptions(activations="int8"))
    assert (result.precision, result.quant_algo) == ("int8", SMOOTHQUANT)
    spec, arrays = rows_of(source)
    found = TrtllmCheckpoint(tmp_path / "out").parameters()
    assert not [name for name in layer_matrices(spec) if not np.array_equal(found[name], arrays[name])]
    assert "add --activations int8" in refused(source, tmp_path / "again")
    text.write_text("1 2 3")
    calibrated = QuantizeOptions(activations="int8", calibrate=text)
    assert "--calibrate of a checkpoint that is quantized" in refused(source, tmp_path / "again", quantize=calibrated)


def test_quantized_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """int8 activations want int8 rows; and no text changes a checkpoint that is quantized."""
    writers = {
        "int4": lambda n, k: layouts.gptq(n, k, group_size=64, sym=True),
        "zeros": lambda n, k: layouts.compressed_integers(
            n, k, bits=8, strategy="channel", packed=False, symmetric=False
        ),
    }
    for folder, writer in writers.items():
        write_checkpoint(
            tmp_path / folder, lambda name, n, k, writer=writer: None if "head" in name else writer(n, k), QUANTIZED
        )
    for name, part in {"int4": "int4 g64", "zeros": "int8 asymmetric"}.items():
        message = refused(tmp_path / name, tmp_path / "out", quantize=QuantizeOptions(activations="int8"))
        assert f"{part} with --activations int8" in message
    text = tmp_path / "text.txt"
    text.write_text("1 2 3")
    for options in (QuantizeOptions(calibrate=text), QuantizeOptions(group_size=64)):
        message = refused(tmp_path / "int4", tmp_path / "out", quantize=options)
        assert "of a checkpoint that is quantized; expected a checkpoint of floats" in message


@pytest.mark.parametrize(
    ("precision", "changes", "parts"),
    [
        ("int8", {"calibrate": None}, ("--activations int8 without --calibrate", "add --calibrate FILE")),
        ("int4", {}, ("precision=int4", "--precision int8")),
        ("auto", {}, ("precision=auto", "or a checkpoint of int8 matrices")),
        ("bf16", {}, ("precision=bf16", "leave --activations out")),
        ("int8", {"activations": "fp8"}, ("activations=fp8", "float32, int8")),
        ("int8", {"group_size": 64}, ("group_size=64", "a scale a channel")),
        ("int8", {"kv_cache": "int8"}, ("--kv-cache",)),
    ],
)
def test_refusals(
    source: Path,
    smooth: QuantizeOptions,
    tmp_path: Path,
    precision: str,
    changes: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    """One line that says what, and nothing is written."""
    options = dataclasses.replace(smooth, **changes)
    message = refused(source, tmp_path / "out", precision=precision, quantize=options)
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_widths_that_do_not_fit(smooth: QuantizeOptions, tmp_path: Path) -> None:
    """Sides of a matrix on a rank that int8 products cannot read 16 numbers at a time."""
    hidden = dataclasses.replace(SHAPE, hidden_size=264, head_dim=64)
    message = refused(save_checkpoint(hidden, tmp_path / "hidden"), tmp_path / "out", precision="int8", quantize=smooth)
    assert "hidden size of 264 on each; expected a multiple of 16" in message
    heads = dataclasses.replace(SHAPE, head_dim=24)
    narrow = save_checkpoint(heads, tmp_path / "heads")
    message = refused(narrow, tmp_path / "out", precision="int8", quantize=smooth, tp=8)
    assert "over 8 ranks with a query width of 24 on each" in message


def test_command_line(
    source: Path, smooth: QuantizeOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says that activations are int8 too, and without a text what to add."""
    from qwen_rt.cli import main

    words = ["build", str(source), "--target", "trtllm", "--precision", "int8", "--activations", "int8"]
    assert main([*words, "-o", str(tmp_path / "out"), "--calibrate", str(smooth.calibrate)]) == 0
    assert capsys.readouterr().out.startswith("trtllm int8 with int8 activations, bfloat16, 1 rank: ")
    assert main([*words, "-o", str(tmp_path / "none")]) == 2
    assert "add --calibrate FILE" in capsys.readouterr().err
