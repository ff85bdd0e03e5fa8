"""What the tests of compiled engines share: builds of nano and of one layer of 7B's width, and what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.bundle import MANIFEST_FILE, Bundle
from qwen_rt.engine_card import CARD_FILE, EngineCard
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.export.tensorrt.options import EngineOptions

from ..cli.kit import contents

CAPABILITIES = ("8.0", "8.9", "12.0")
FLOATS, QUANTIZED = ("bf16", "fp16"), ("fp8", "int8", "int4")
MAX_LENGTH = 128


def needs_rtx() -> Any:
    """Skip a module where TensorRT-RTX is not installed."""
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")


def engine_build(
    source: Path | str,
    out: Path,
    precision: str = "bf16",
    capabilities: tuple[str, ...] = ("8.9",),
    quantize: QuantizeOptions | None = None,
    gate: bool = False,
    **engine: Any,
) -> EngineCard:
    """Build a bundle of engines, open it with every hash checked, and return its card."""
    options = BuildOptions(
        target="tensorrt-rtx",
        precision=precision,
        max_length=MAX_LENGTH,
        quantize=quantize or QuantizeOptions(),
        gate=gate,
        engine=EngineOptions(compute_capabilities=capabilities, **engine),
        quiet=True,
    )
    manifest = build(source, out, options)
    bundle = Bundle.open(out, check="full")
    assert bundle.manifest == manifest
    assert not bundle.weight_files
    return EngineCard.from_json((out / CARD_FILE).read_bytes())


def same_bundle(one: Path, other: Path) -> bool:
    """Whether two bundles are alike in all but the order of the engine's own tables.

    The library puts those in the order of addresses, which differ from process to process. Size, card and the hash of
    the weights in it do not.
    """
    first, second = contents(one), contents(other)
    manifests = [json.loads(files.pop(MANIFEST_FILE)) for files in (first, second)]
    for files, manifest in zip((first, second), manifests, strict=True):
        for name in [name for name in files if name.endswith(".engine")]:
            assert len(files.pop(name)) == manifest["files"][name]["nbytes"]
            del manifest["files"][name]["sha256"]
    return first == second and manifests[0] == manifests[1]


def assert_histogram(card: EngineCard, num_layers: int, num_linears: int, quantized: bool, has_embedding: bool) -> None:
    """Hold the network and the engine of one rank against what a decoder of `num_layers` is made of.

    Args:
        card: Of the bundle.
        num_layers: Decoder layers.
        num_linears: Products: four a layer where q, k, v and gate, up are one each, else seven, and the LM head.
        quantized: Whether the layers' matrices are.
        has_embedding: Whether the embedding is quantized too.
    """
    network = card.network
    assert network["ATTENTION"] == num_layers
    assert network["KV_CACHE_UPDATE"] == 2 * num_layers
    assert network["ROTARY_EMBEDDING"] == 2 * num_layers
    assert network["ACTIVATION"] == num_layers  # the sigmoid of silu
    assert network["REDUCE"] == 2 * num_layers + 1  # the mean of each norm: the library has no layer for these norms
    assert network["MATRIX_MULTIPLY"] == num_linears
    assert network.get("DEQUANTIZE", 0) == (num_linears - 1 + has_embedding if quantized else 0)
    assert "SOFTMAX" not in network
    assert "SCATTER" not in network
    assert set(card.engine) == {"prefill", "decode"}
    for name, most in (("prefill", 17), ("decode", 15)):  # a fused layer; what is outside of them adds 8 at most
        assert sum(card.engine[name].values()) <= most * num_layers + 8, card.engine
