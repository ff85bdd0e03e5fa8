"""The engines of a bundle: one for each rank, and the card that says what they were compiled for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qwen_rt.bundle import FileEntry
from qwen_rt.engine_card import EngineCard
from qwen_rt.export.tensorrt.builder import BuildPlan, compile_engine
from qwen_rt.export.tensorrt.flavour import Flavour
from qwen_rt.export.tensorrt.histogram import check_engine
from qwen_rt.export.tensorrt.network import parse
from qwen_rt.export.tensorrt.options import EngineOptions, profiles
from qwen_rt.export.tensorrt.pack import pack_linears
from qwen_rt.export.tensorrt.progress import STEPS
from qwen_rt.export.tensorrt.timing_cache import default_cache, has_timing_cache
from qwen_rt.export.tensorrt.weights import MappedWeights
from qwen_rt.progress import format_count, progress
from qwen_rt.spec import ModelSpec
from qwen_rt.storage import AtomicFile, atomic_write_bytes, require_free_space

__all__ = ["EngineFacts", "make_plan", "write_card", "write_engine"]


@dataclass(frozen=True)
class EngineFacts:
    """What is known of an engine once it is built: the histograms and the weights' hash of its card."""

    network: dict[str, int]
    engine: dict[str, dict[str, int]]
    weights_sha256: str


def make_plan(flavour: Flavour, options: EngineOptions, capabilities: Sequence[str]) -> BuildPlan:
    """How to compile, of settled options."""
    cache = options.timing_cache or default_cache(flavour) if has_timing_cache(flavour.target) else None
    return BuildPlan(tuple(capabilities), profiles(options), cache, options.optimization_level)


def write_engine(
    flavour: Flavour,
    model: ir.Model,
    plan: BuildPlan,
    path: Path,
    spec: ModelSpec,
    title: str,
    quiet: bool,
) -> tuple[FileEntry, EngineFacts]:
    """Compile a lowered graph into a file, which appears under its name when whole.

    Args:
        flavour: The library.
        model: A graph of `lower_tensorrt`; it is changed.
        plan: How.
        path: The engine.
        spec: Of the rank that the graph is for.
        title: What to call it in the progress.
        quiet: No progress.

    Returns:
        Size and hash of the file, and what is known of the engine.

    Raises:
        GraphError: The library refuses the graph, or it fell apart.
        StorageError: The file cannot be written.
    """
    parts = pack_linears(model)
    with MappedWeights(model, parts, path.parent) as weights:
        require_free_space(path.parent, weights.nbytes)
        digest = weights.sha256()
        network = parse(flavour, model, weights, spec.num_heads)
        for value in model.graph.initializers.values():  # the parser has its own copy of the small ones
            value.const_value = None
        hashed, nbytes = hashlib.sha256(), 0
        with (
            AtomicFile(path) as file,
            progress(2 * STEPS, f"{title}, {format_count(weights.nbytes, 'B')} of weights", quiet=quiet) as bar,
        ):

            def write(data: Any) -> None:
                nonlocal nbytes
                file.write(data)
                hashed.update(data)
                nbytes += len(data)
                share = min(1.0, nbytes / max(1, weights.nbytes))
                bar.update(max(0, STEPS + int(STEPS * share) - bar.done))

            layers = compile_engine(flavour, network, plan, bar, write, weights.release)
            bar.update(2 * STEPS - bar.done)
            check_engine(layers, spec.num_layers, flavour.title)
        facts = EngineFacts(network.layers, layers, digest)
        del network  # before the weights that it points to
    return FileEntry(nbytes, hashed.hexdigest()), facts


def write_card(path: Path, card: EngineCard) -> FileEntry:
    """Write a card; returns its entry in the manifest."""
    data = card.to_json()
    atomic_write_bytes(path, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
