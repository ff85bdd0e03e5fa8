"""Real engines of TensorRT-RTX, compiled without a GPU: what is in them, for which GPUs, and that builds repeat."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_rt.benchmarks.bench_tensorrt import MODELS
from qwen_rt.benchmarks.checkpoints import write_repeated
from qwen_rt.bundle import Bundle
from qwen_rt.engine_card import ENGINE_TARGETS, EngineProfile, engine_file
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.quantization import FORMATS

from ..cli.kit import contents
from .kit import CAPABILITIES, FLOATS, MAX_LENGTH, QUANTIZED, assert_histogram, engine_build, needs_rtx, same_bundle

needs_rtx()
pytestmark = pytest.mark.trt


def _num_linears(num_layers: int, precision: str) -> int:
    return (7 if precision in FORMATS else 4) * num_layers + 1


@pytest.mark.parametrize(
    ("precision", "capability"),
    [(p, c) for p in (*FLOATS, *QUANTIZED) for c in CAPABILITIES if (p, c) != ("fp8", "8.0")],
)
def test_nano(precision: str, capability: str, nano_portable: Path, tmp_path: Path) -> None:
    card = engine_build(
        nano_portable, tmp_path / "out", precision, (capability,), gate=(precision, capability) == ("int8", "8.9")
    )
    assert_histogram(card, 4, _num_linears(4, precision), precision in FORMATS, has_embedding=False)
    assert card.compute_capabilities == (capability,)
    assert (card.flavour, card.precision, card.max_length) == ("tensorrt-rtx", precision, MAX_LENGTH)
    assert card.compute_dtype == ("float16" if precision == "fp16" else "bfloat16")
    assert card.profiles == {"prefill": EngineProfile(8, MAX_LENGTH), "decode": EngineProfile(8, 1)}
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.kv_dtype == manifest.compute_dtype == card.compute_dtype
    assert manifest.tools["tensorrt-rtx"] == card.version
    assert not manifest.checkpoint.shards
    assert set(manifest.files) >= {"engine/rank0.engine", "engine/card.json", "tokenizer.json", "config.json"}
    assert not [name for name in contents(tmp_path / "out") if name.startswith("graph/")]
    weights = {"bf16": 16.9e6, "fp16": 16.9e6, "fp8": 10.4e6, "int8": 10.4e6, "int4": 7.4e6}[precision]
    nbytes = manifest.files[engine_file(0)].nbytes
    assert weights < nbytes < weights + 8e6, "the engine holds the weights once"


def test_one_engine_for_every_gpu(nano_portable: Path, tmp_path: Path) -> None:
    """The default: all from 8.0 on, and those of the precision."""
    everything = engine_build(nano_portable, tmp_path / "all", capabilities=())
    assert set(CAPABILITIES) < set(everything.compute_capabilities)
    assert "7.5" not in everything.compute_capabilities
    quantized = engine_build(nano_portable, tmp_path / "fp8", "fp8", capabilities=())
    assert set(everything.compute_capabilities) - set(quantized.compute_capabilities) == {"8.0", "8.6"}


def test_everything_quantized(nano_portable: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(embedding="int8", lm_head="int8")
    card = engine_build(nano_portable, tmp_path / "out", "int4", quantize=options)
    assert card.network["DEQUANTIZE"] == 4 * 7 + 2


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_an_engine_for_each_rank(precision: str, nano_portable: Path, tmp_path: Path) -> None:
    card = engine_build(nano_portable, tmp_path / "out", precision, CAPABILITIES, tensor_parallel=2)
    assert card.num_ranks == 2
    assert len(set(card.weights_sha256)) == 2
    assert card.network["DIST_COLLECTIVE"] == 2 * 4 + 1
    assert card.engine["decode"]["comm_allreduce"] == 2 * 4
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.tensor_parallel == 2
    assert {engine_file(0), engine_file(1)} < set(manifest.files)
    assert "--tp 2" in card.rebuild_command()


def test_equal_builds_give_equal_bundles(nano_portable: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        engine_build(nano_portable, tmp_path / name, "int4", CAPABILITIES)
    assert same_bundle(tmp_path / "first", tmp_path / "second")


def test_rows_and_tokens(nano_portable: Path, tmp_path: Path) -> None:
    """One row alone is not compiled: the fused products of fp8 and int8 need two."""
    card = engine_build(nano_portable, tmp_path / "out", max_batch=1, prefill_tokens=32, optimization_level=0)
    assert card.profiles == {"prefill": EngineProfile(2, 32), "decode": EngineProfile(2, 1)}
    assert "--max-batch 1 --prefill-tokens 32 --optimization-level 0" in card.rebuild_command()


def test_the_command_on_a_card(nano_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds the same from every working folder: names of files are absolute, and the gate stays off."""
    monkeypatch.chdir(tmp_path)
    Path("keep.toml").write_text('"model.layers.0.mlp.down_proj" = "bf16"\n')
    given = QuantizeOptions(overrides=Path("keep.toml"))
    words = engine_build(nano_portable, tmp_path / "out", "int8", quantize=given).command
    assert words[words.index("--overrides") + 1] == str(tmp_path / "keep.toml")
    assert "--no-gate" in words


@pytest.fixture(scope="module")
def layer_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 7B's width: 0.48 GB of random numbers."""
    folder = tmp_path_factory.mktemp("layer-7b")
    write_repeated(folder, MODELS["7b"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*FLOATS, *QUANTIZED])
def test_a_layer_of_7b(precision: str, layer_7b: Path, tmp_path: Path) -> None:
    capabilities = CAPABILITIES[1:] if precision == "fp8" else CAPABILITIES
    card = engine_build(layer_7b, tmp_path / "out", precision, capabilities)
    assert card.compute_capabilities == capabilities
    assert_histogram(card, 1, _num_linears(1, precision), precision in FORMATS, has_embedding=False)


def test_targets_of_engines() -> None:
    assert ENGINE_TARGETS == ("tensorrt", "tensorrt-rtx")
