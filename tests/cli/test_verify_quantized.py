"""`verify` on quantized bundles: tables, JSON, pictures, answers, and weights that were broken on their way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.row_reader import CheckpointRows

from ..cases import Zoo
from ..foreign import layouts
from ..foreign.kit import write_checkpoint
from .conftest import Cli
from .kit import NANO_FOLDER, names, rehash, shared_graph

QUICK = ["--num-tokens", "64", "--greedy-tokens", "4", "--quiet", "--threads", "1"]
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in int4, keys and values in fp8; not to be changed."""
    folder = tmp_path_factory.mktemp("quantized") / "nano-int4"
    build(shared_graph(), folder, BuildOptions(precision="int4", quantize=QuantizeOptions(kv_cache="fp8"), quiet=True))
    return folder


def test_a_quantized_bundle_passes(int4: Path, workplace: Path, cli: Cli) -> None:
    result = cli("verify", int4, *QUICK, "--exact-match", "12", "--json", "out.json", "--picture", "errors.svg")
    assert (result.code, result.err) == (0, ""), result.out
    lines = result.out.splitlines()
    assert lines[-1] == "passed"
    assert sum("  int4 g128  " in line or "  fp8  " in line for line in lines) == 4  # a line for each layer
    assert any(line.startswith("tolerances: int4+kv-fp8") for line in lines)
    found = json.loads((workplace / "out.json").read_text())
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["own weights: largest error of a logit, relative"]["value"] < 0.02
    assert checks["exact match on the nano set, of 12"]["value"] == 1.0
    assert 1e-4 < checks["mean KL of the next token, nats"]["value"] < 0.5
    assert checks["mean KL of the next token, nats"]["value"] == pytest.approx(found["gate"]["kl_mean"], rel=0.05)
    assert checks["positions with the same best token"]["bound"] == "reported"
    gate = found["gate"]
    assert gate["passed"]
    assert (gate["precision"], gate["kv_format"], len(gate["layers"])) == ("int4", "fp8", 4)
    # Seven matrices, three biases, two norms and a cache a layer; embeddings, the last norm, the head.
    assert len(gate["tensors"]) == 4 * 13 + 3
    picture = (workplace / "errors.svg").read_bytes()
    assert b"<svg" in picture
    assert cli("verify", int4, *QUICK, "--exact-match", "0", "--picture", "again.svg").code == 0
    # Names of clip paths are drawn at random by matplotlib; the rest is the same.
    assert abs(len((workplace / "again.svg").read_bytes()) - len(picture)) < 200
    assert names(workplace) == {"out.json", "errors.svg", "again.svg"}


def _permute_scales(bundle: Path, name: str) -> None:
    """Give every row the scales of another, in a file that the manifest then agrees with."""
    ref = Bundle.open(bundle).tensors()[f"{name}_scale"]
    data = bytearray(ref.path.read_bytes())
    part = slice(ref.offset, ref.offset + ref.nbytes)
    scales = np.frombuffer(bytes(data[part]), np.uint8).reshape(ref.shape[0], -1)
    data[part] = scales[np.random.default_rng(0).permutation(len(scales))].tobytes()
    ref.path.write_bytes(data)
    rehash(bundle, f"graph/{ref.path.name}")


def test_permuted_scales_are_named(int4: Path, tmp_path: Path, workplace: Path, cli: Cli) -> None:
    """The graph computes with the wrong scales faithfully: its own weights agree, the source's do not."""
    broken = Path(shutil.copytree(int4, tmp_path / "broken"))
    _permute_scales(broken, DOWN)
    result = cli("verify", broken, *QUICK, "--exact-match", "0", "--json", "out.json", "--picture", "errors.png")
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[-1] == "FAILED"
    assert "gate FAILED" in result.out
    found = json.loads((workplace / "out.json").read_text())
    assert found["gate"]["worst"]["name"] == DOWN
    assert found["gate"]["failures"][0].startswith(f"{DOWN}: scale error")
    assert found["gate"]["failures"][0].endswith("scales in another order")
    assert all(check["passed"] for check in found["checks"] if check["name"].startswith("own weights: "))
    assert (workplace / "errors.png").read_bytes()[1:4] == b"PNG"


def test_pictures_that_cannot_be_drawn_are_refused(int4: Path, bundle: Path, workplace: Path, cli: Cli) -> None:
    cli("verify", int4, "--picture", "x.jpg").refused(2, "--picture x.jpg", "expected a name ending in .svg or .png")
    cli("verify", bundle, "--picture", "x.svg").refused(2, "--picture with a bundle of floats", "leave out --picture")
    cli("verify", int4, "--exact-match", "-1").refused(2, "exact_match=-1", "expected 0 or more")
    assert names(workplace) == set()


@pytest.mark.parametrize("name", ["nano", "heads-7b", "yarn", "one-layer"])
def test_a_reference_made_of_rows_is_the_one_that_transformers_loads(name: str, zoo: Zoo) -> None:
    from qwen_rt.benchmarks.verify_reference import load_reference, model_of_rows, reference_logits

    checkpoint = Checkpoint.open("nano" if name == "nano" else zoo.case(name).checkpoint)
    ids = [1, 5, 2, 7, 7, 0, 3]
    with CheckpointRows(checkpoint) as rows:
        made = model_of_rows(checkpoint.path, checkpoint.spec, rows)
    loaded = load_reference(checkpoint, num_threads=1)
    assert np.array_equal(reference_logits(made, ids), reference_logits(loaded, ids))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in made.parameters())


def _written(name: str, rows: int, columns: int) -> layouts.Written | None:
    return None if name == "lm_head.weight" else layouts.gptq(rows, columns, act_order=True, seed=len(name))


def test_a_quantized_checkpoint_is_its_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers taken over as they are lose nothing: the tolerances are those of a lossless bundle."""
    from qwen_rt.benchmarks.verify import verify

    write_checkpoint(tmp_path / "gptq", _written)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_FOLDER / file, tmp_path / "gptq" / file)
    build(tmp_path / "gptq", tmp_path / "bundle", BuildOptions(quiet=True))
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    monkeypatch.setattr("qwen_rt.benchmarks.verify._read_ids", lambda *_: ids)  # the tokenizer is nano's, the model not
    result = verify(tmp_path / "bundle", greedy_tokens=4, num_threads=1, quiet=True)
    assert result.passed, result.table()
    assert (result.kind, result.num_tokens) == ("lossless", 12)
    assert result.gate is not None
    assert result.gate.worst.output_error < 1e-5
    assert "the checkpoint is not nano" in result.notes[-1]
    values: dict[str, Any] = {check.name: check.value for check in result.checks}
    assert values["mean KL of the next token, nats"] < 1e-8
