"""What a quantized build writes: the manifest, the same bytes every time, the gate's verdict, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.bundle import MANIFEST_FILE, Bundle, Manifest
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, UsageError, VerificationError
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.export.passes.decoder import EMBEDDING, HEAD
from qwen_rt.export.quantize import pieces
from qwen_rt.gate_result import GateResult
from qwen_rt.quantization import QuantizedTensor, Scheme, dequantize, key_offset_name, part_name
from qwen_rt.row_reader import CheckpointRows, StoredRows
from qwen_rt.runtime.llm import LLM

from ...cli.kit import contents, copy_nano, names, shared_graph
from .kit import all_matrices

SPEC = Checkpoint.open("nano").spec
QUESTION = "What is 17 + 25?\nPlease reason step by step, and put your final answer within \\boxed{}."


def built(out: Path, precision: str = "int4", source: Path | None = None, **options: Any) -> Manifest:
    quantize = options.pop("quantize", QuantizeOptions())
    return build(
        source or shared_graph(), out, BuildOptions(precision=precision, quantize=quantize, quiet=True, **options)
    )


def answer(bundle: Path) -> str:
    with LLM(bundle, num_threads=1) as llm:
        return llm.chat([{"role": "user", "content": QUESTION}], temperature=0.0).text


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_a_precision(precision: str, tmp_path: Path) -> None:
    manifest = built(tmp_path / "out", precision)
    quantization = manifest.quantization
    assert quantization is not None
    wanted = {"fp8": Scheme("fp8"), "int8": Scheme("int8"), "int4": Scheme("int4", 128)}[precision]
    assert quantization.weights == dict.fromkeys(all_matrices(SPEC), wanted)
    assert (manifest.precision, quantization.method, quantization.kv_format) == (precision, "rtn", None)
    assert manifest.gate is not None
    assert GateResult.from_dict(manifest.gate).passed
    assert list(manifest.checkpoint.shards) == ["model-00001-of-00002.safetensors"], "only the embeddings stay there"
    assert Manifest.from_json(manifest.to_json()) == manifest
    bundle = Bundle.open(tmp_path / "out", "full")
    assert bundle.manifest == manifest
    tensors = bundle.tensors()
    with CheckpointRows(Checkpoint.open("nano")) as rows, StoredRows(tensors, quantization.weights) as stored:
        for name in all_matrices(SPEC):
            source, found = rows.rows(name, 0, 9999), stored.rows(name, 0, 9999)
            error = np.linalg.norm(found - source) / np.linalg.norm(source)
            assert 0.002 < error < {"fp8": 0.03, "int8": 0.015, "int4": 0.13}[precision], name
    assert "\\boxed{42}" in answer(tmp_path / "out")


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """Whatever the number of workers, and whether from the checkpoint or from its portable graph."""
    options = QuantizeOptions(kv_cache="fp8", lm_head="int8")
    built(tmp_path / "one", quantize=options, num_workers=1)
    built(tmp_path / "many", quantize=options, num_workers=5)
    build("nano", tmp_path / "traced", BuildOptions(precision="int4", quantize=options, quiet=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "traced")


def test_everything_at_once(tmp_path: Path) -> None:
    """Head and embeddings of a tied model, a cache, zero points, rounded activations; nothing stays elsewhere."""
    options = QuantizeOptions(
        symmetric=False, group_size=64, lm_head="int4", embedding="fp8", kv_cache="int8", activations="int8"
    )
    manifest = built(tmp_path / "out", quantize=options, self_contained=True)
    quantization = manifest.quantization
    assert quantization is not None
    assert quantization.weights[HEAD] == Scheme("int4", 64, symmetric=False)
    assert quantization.weights[EMBEDDING] == Scheme("fp8")
    assert (quantization.kv_format, quantization.activations) == ("int8", "int8")
    assert manifest.kv_dtype == "float32", "on the CPU"
    assert not manifest.checkpoint.shards
    tensors = Bundle.open(tmp_path / "out", "full").tensors()
    assert tensors[key_offset_name(0)].dtype == "F32"
    assert set(quantization.report) == {"kv_cache"}
    assert "\\boxed{42}" in answer(tmp_path / "out")


def test_one_table_for_a_tied_model(tmp_path: Path) -> None:
    manifest = built(tmp_path / "out", "int8", quantize=QuantizeOptions(lm_head="int8", embedding="int8"))
    assert manifest.quantization is not None
    assert EMBEDDING in manifest.quantization.weights
    assert HEAD not in manifest.quantization.weights
    assert not manifest.checkpoint.shards
    assert "\\boxed{42}" in answer(tmp_path / "out")


def test_only_the_cache(tmp_path: Path) -> None:
    manifest = built(tmp_path / "out", "auto", quantize=QuantizeOptions(kv_cache="fp8"), target="cuda")
    assert (manifest.precision, manifest.kv_dtype) == ("bf16", "float8_e4m3fn")
    assert manifest.quantization is not None
    assert not manifest.quantization.weights
    assert manifest.gate is not None
    assert GateResult.from_dict(manifest.gate).kv_format == "fp8"


@pytest.mark.parametrize(("precision", "stored"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_a_quantized_cache_beside_floats_of_a_precision(precision: str, stored: str, tmp_path: Path) -> None:
    """The weights are stored as the manifest says; biases that the cache's offsets changed are not rounded again."""
    manifest = built(tmp_path / "out", precision, quantize=QuantizeOptions(kv_cache="int8"))
    assert manifest.precision == precision
    tensors = Bundle.open(tmp_path / "out", "full").tensors()
    found = {name: tensors[name].dtype for name in SPEC.parameters()}
    biases = {name for name in found if name.endswith(("k_proj.bias", "v_proj.bias"))}
    assert {found[name] for name in biases} == {"F32"}
    assert {dtype for name, dtype in found.items() if name not in biases} == {stored}
    assert bool(manifest.checkpoint.shards) == (stored == "BF16")
    assert "\\boxed{42}" in answer(tmp_path / "out")


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "overrides.toml"
    file.write_text('"model.layers.0.*" = "bf16"\n"*.down_proj" = { precision = "int4", group_size = 32 }\n')
    manifest = built(tmp_path / "out", "int8", quantize=QuantizeOptions(overrides=file))
    assert manifest.precision == "mixed"
    assert manifest.quantization is not None
    found = manifest.quantization.weights
    assert "model.layers.0.self_attn.q_proj.weight" not in found
    assert found["model.layers.0.mlp.down_proj.weight"] == Scheme("int4", 32)
    assert found["model.layers.1.self_attn.q_proj.weight"] == Scheme("int8")
    assert "\\boxed{42}" in answer(tmp_path / "out")


def test_a_size_budget(tmp_path: Path) -> None:
    total = 2 * sum(int(np.prod(SPEC.parameters()[name])) for name in [*all_matrices(SPEC), EMBEDDING])
    file = tmp_path / "chosen.toml"
    manifest = built(tmp_path / "out", quantize=QuantizeOptions(size_budget=int(0.45 * total), write_overrides=file))
    assert manifest.precision == "mixed"
    assert manifest.quantization is not None
    assert "mixed" in manifest.quantization.report
    formats = {scheme.format for scheme in manifest.quantization.weights.values()}
    assert "int4" in formats
    stored = sum(entry.nbytes for name, entry in manifest.files.items() if name.endswith(".safetensors"))
    assert stored < 0.45 * total
    again = built(tmp_path / "again", quantize=QuantizeOptions(overrides=file))
    assert again.quantization is not None
    assert again.quantization.weights == manifest.quantization.weights


def budgeted_bytes(bundle: Path) -> int:
    """Stored bytes of all layers' matrices and of what makes the logits: what a size budget is about."""
    tensors = Bundle.open(bundle, "size").tensors()
    head = HEAD if HEAD in tensors else EMBEDDING
    names = [part_name(name, part) for name in (*all_matrices(SPEC), head) for part in ("weight", "scale")]
    return sum(tensors[name].nbytes for name in names if name in tensors)


@pytest.mark.parametrize("options", [{"embedding": "int8"}, {"embedding": "fp8", "lm_head": "int8"}])
def test_a_size_budget_counts_a_tied_head_once_and_as_it_is_read(options: dict[str, str], tmp_path: Path) -> None:
    quantize = QuantizeOptions(size_budget=6_000_000, **options)  # type: ignore[arg-type]
    manifest = built(tmp_path / "out", quantize=quantize, gate=False)
    assert manifest.quantization is not None
    assert budgeted_bytes(tmp_path / "out") == manifest.quantization.report["mixed"]["stored_bytes"] <= 6_000_000


def test_a_size_budget_counts_floats_as_they_are_stored(tmp_path: Path) -> None:
    """A checkpoint in float32: what stays as it is takes four bytes a weight, and the bundle keeps to its budget."""
    build(shared_graph(), tmp_path / "wide", BuildOptions(precision="fp32", self_contained=True, quiet=True))
    weights = next((tmp_path / "wide" / "graph").glob("*.safetensors"))
    source = copy_nano(tmp_path / "checkpoint")
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()
    weights.rename(source / "model.safetensors")
    total = 4 * sum(int(np.prod(SPEC.parameters()[name])) for name in [*all_matrices(SPEC), EMBEDDING])
    options = QuantizeOptions(size_budget=int(0.45 * total))
    manifest = built(tmp_path / "out", source=source, quantize=options, self_contained=True, gate=False)
    assert manifest.quantization is not None
    stored = budgeted_bytes(tmp_path / "out")
    assert stored == manifest.quantization.report["mixed"]["stored_bytes"] <= options.size_budget  # type: ignore[operator]
    tensors = Bundle.open(tmp_path / "out", "size").tensors()
    assert any(tensors[name].dtype == "F32" for name in all_matrices(SPEC)), "some were raised to floats"


def test_a_calibrated_build(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 12 + 30? 12+30=42. The answer is \\boxed{42}.\n" * 40)
    manifest = built(tmp_path / "out", quantize=QuantizeOptions(calibrate=text, kv_cache="int8"))
    assert manifest.quantization is not None
    assert manifest.quantization.method == "awq"
    assert {"calibration", "kv_cache"} <= set(manifest.quantization.report)
    assert list(manifest.checkpoint.shards) == ["model-00001-of-00002.safetensors"], "the embeddings stay there"
    assert "\\boxed{42}" in answer(tmp_path / "out")
    text.write_text(text.read_text() + "more")
    again = built(tmp_path / "out", quantize=QuantizeOptions(calibrate=text, kv_cache="int8"), overwrite=True)
    assert again.quantization is not None


# ---------------------------------------------------------------- the gate


def break_pieces(monkeypatch: pytest.MonkeyPatch, name: str, harm: Any) -> None:
    """Let the quantizer store something else for one matrix."""
    original = pieces.quantize_rows

    def harmed(found: str, *arguments: Any, **options: Any) -> QuantizedTensor:
        tensor = original(found, *arguments, **options)
        return harm(tensor) if found == name else tensor

    monkeypatch.setattr(pieces, "quantize_rows", harmed)


def permute_scales(tensor: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(tensor.name, tensor.scheme, tensor.shape, tensor.values, tensor.scale[::-1].copy())


def zero(tensor: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(tensor.name, tensor.scheme, tensor.shape, tensor.values, np.zeros_like(tensor.scale))


@pytest.mark.parametrize("harm", [permute_scales, zero])
def test_a_broken_quantization_is_refused_and_named(harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    break_pieces(monkeypatch, name, harm)
    with pytest.raises(VerificationError, match=f"the accuracy gate failed: {name}: .*--no-gate"):
        built(tmp_path / "out", "int8")
    assert names(tmp_path) == {".out.partial"}, "what was written stays"
    monkeypatch.undo()
    manifest = built(tmp_path / "out", "int8", gate=False)
    assert manifest.gate == {"skipped": "--no-gate"}
    bundle = Bundle.open(tmp_path / "out", "full")
    with StoredRows(bundle.tensors(), manifest.quantization.weights) as stored:  # type: ignore[union-attr]
        found = stored.rows(name, 0, 9999)
    np.testing.assert_array_equal(found, dequantize(harm(_stored(name))), "finished as it was, not quantized again")
    assert names(tmp_path) == {"out"}


def _stored(name: str) -> QuantizedTensor:
    rows = CheckpointRows(Checkpoint.open("nano")).rows(name, 0, 9999)
    return pieces.quantize_rows(name, rows, Scheme("int8"))


def test_a_manifest_says_what_the_gate_found(tmp_path: Path) -> None:
    built(tmp_path / "out", "int8")
    document = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert document["gate"]["passed"] is True
    assert document["gate"]["num_tokens"] == 128
    assert len(document["gate"]["layers"]) == SPEC.num_layers


# ---------------------------------------------------------------- what is refused


def test_files_of_options_that_cannot_be_read(tmp_path: Path) -> None:
    for option in ("overrides", "calibrate"):
        for file in (tmp_path / "absent", tmp_path):
            with pytest.raises(UsageError, match=f"{file} cannot be read: .*; expected a"):
                built(tmp_path / "out", quantize=QuantizeOptions(**{option: file}))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "checkpoint")
    name = "model.layers.1.mlp.up_proj.weight"
    ref = Checkpoint.open(folder).tensors[name]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset + 2 * (5 * ref.shape[1] + 7))
        file.write((np.array(value, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds -?(nan|inf) in row 5, column 7; expected finite"):
        built(tmp_path / "out", "int8", folder)
    assert names(tmp_path) == {"checkpoint"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "int4", "quantize": QuantizeOptions(group_size=48)}, r"group_size=48; expected 0"),
        ({"precision": "int4", "quantize": QuantizeOptions(group_size=256)}, None),
        ({"precision": "int8", "quantize": QuantizeOptions(symmetric=False)}, "zero points with int8; expected int4"),
        ({"precision": "fp32", "quantize": QuantizeOptions(group_size=64)}, "--group-size without quantization"),
        ({"precision": "auto", "quantize": QuantizeOptions(lm_head="fp8")}, "--lm-head without quantization"),
        ({"precision": "int4", "quantize": QuantizeOptions(embedding="int4")}, "embeddings in int4"),
        ({"precision": "int4", "quantize": QuantizeOptions(kv_cache="fp4")}, "kv-cache=fp4"),
        ({"precision": "fp8", "quantize": QuantizeOptions(activations="int8")}, "--activations int8"),
        ({"precision": "int4", "target": "portable"}, "precision=int4 for a portable graph"),
        ({"precision": "int4", "quantize": QuantizeOptions(size_budget=1000)}, "1000|1 kB|budget"),
        ({"precision": "int4", "num_workers": -1}, "workers=-1"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    if message is None:  # 256 divides 512 and 768
        built(tmp_path / "out", **fields)
        return
    with pytest.raises(UsageError, match=message):
        built(tmp_path / "out", **fields)
    assert names(tmp_path) == set()


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    from qwen_rt.benchmarks.checkpoints import QWEN2_05B, write_random

    config = QWEN2_05B | {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    config |= {"intermediate_size": 160, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None}
    (tmp_path / "checkpoint").mkdir()
    write_random(tmp_path / "checkpoint", config)
    with pytest.raises(
        UsageError, match=r"group_size=128 does not divide the 96 columns of model.layers.0.*expected one of 16, 32;"
    ):
        built(tmp_path / "out", "int4", tmp_path / "checkpoint")
