"""The part of a build that compiles: which GPUs, every rank's engine in its file, and the card."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from qwen_rt.bundle import WEIGHTS_FOLDER, FileEntry
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.engine_card import CARD_FILE, EngineCard, engine_file
from qwen_rt.errors import GraphError
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.passes.decoder import EMBEDDING
from qwen_rt.export.passes.dequantize import check_tensorrt_scheme
from qwen_rt.export.passes.shard import Shard, check_columns, shard_spec
from qwen_rt.export.portable import QuantizedLocation, WeightLocation
from qwen_rt.export.settings import FROM_CHECKPOINT, QuantizeOptions, Settings
from qwen_rt.export.source import Source
from qwen_rt.export.tensor_parallel import parameter_parts
from qwen_rt.export.tensorrt.engines import EngineFacts, make_plan, write_card, write_engine
from qwen_rt.export.tensorrt.flavour import load_flavour
from qwen_rt.machine import Started, gpu_probe_command, read_gpus
from qwen_rt.quantization import Scheme
from qwen_rt.storage import atomic_write_bytes

__all__ = ["EngineJob"]

_OLDEST = (8, 0)  # what is compiled for without being asked: these and newer ones
_OLDEST_OF_FORMAT = {"bf16": (8, 0), "fp8": (8, 9)}
"""Numbers → the first compute capability whose GPUs have them."""


class Keep(Protocol):
    """Writes a file of the bundle unless an earlier build left it whole."""

    def __call__(self, name: str, write: Callable[[Path], FileEntry]) -> None: ...


class EngineJob:
    """Compiles the engines of one build.

    Args:
        checkpoint: The model.
        settings: Of a target of compiled engines.
        stage: The folder that becomes the bundle.

    Raises:
        MissingDependencyError: What compiles is not installed.
        UsageError: A compute capability that it does not compile for.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, stage: Path) -> None:
        assert settings.engine is not None
        self._checkpoint, self._settings, self._stage, self._options = checkpoint, settings, stage, settings.engine
        self._flavour = load_flavour(settings.target)
        wanted = self._options.compute_capabilities
        self.compute_capabilities = self._flavour.choose_capabilities(wanted, _present_capability)

    def tools(self) -> dict[str, str]:
        """Package → version of what compiles."""
        return {self._flavour.target: self._flavour.version}

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        """Refuse what could not be compiled, before anything is computed for it.

        Args:
            schemes: Name of each quantized matrix → how it is to be stored.

        Raises:
            UsageError: A form that TensorRT lacks, or one that cannot be cut where the ranks' parts meet.
            GraphError: A compute capability that lacks a format, with the first layer that has such a matrix.
        """
        spec, num_ranks = self._checkpoint.spec, self._options.tensor_parallel
        parts, shapes = parameter_parts(spec, num_ranks, spec.intermediate_size), spec.parameters()
        for name, scheme in schemes.items():
            shape = shapes[name if name in shapes else EMBEDDING]  # of a tied model the head may be stored apart
            check_tensorrt_scheme(name, scheme, shape[1])
            if num_ranks > 1 and parts[name].num_columns:
                check_columns(name, scheme, parts[name].num_columns)
        for one in self.compute_capabilities:
            for layer, (form, needed) in self._oldest(schemes).items():
                if _numbers(one) < needed:
                    raise GraphError(
                        f"{self._flavour.title} does not compile layer {layer}, {form}, for compute capability {one}",
                        f"{needed[0]}.{needed[1]} or newer",
                        "choose another --compute-capability, or another --precision",
                    )

    def choose(self, schemes: Mapping[str, Scheme]) -> None:
        """Choose the compute capabilities if they were left open: all from 8.0 on that have the formats.

        Args:
            schemes: What `check` took.
        """
        if not self.compute_capabilities:
            least = max([_OLDEST, *(needed for _, needed in self._oldest(schemes).values())])
            known = self._flavour.known_capabilities
            self.compute_capabilities = tuple(one for one in known if _numbers(one) >= least)

    def _oldest(self, schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, tuple[int, int]]]:
        """Layer → its numbers, and the first compute capability that has them."""
        forms = {name.removesuffix(".weight"): scheme.format for name, scheme in schemes.items()}
        if self._settings.dtype == "bfloat16":
            forms["model.layers.0.self_attn"] = "bf16"
        return {layer: (form, _OLDEST_OF_FORMAT.get(form, (0, 0))) for layer, form in forms.items()}

    def write(
        self,
        source: Source,
        locations: Mapping[str, WeightLocation],
        quantized: Mapping[str, QuantizedLocation],
        precision: str,
        keep: Keep,
        files: dict[str, FileEntry],
    ) -> None:
        """Write every rank's engine and the card; then nothing needs the weights in the stage any more.

        Args:
            source: What the build began with.
            locations: Where weights lie, relative to the stage or absolute.
            quantized: Where the parts of quantized matrices lie.
            precision: As the manifest has it.
            keep: Writes a file of the bundle.
            files: The files of the bundle; those of weights are taken out.
        """
        places = {name: self._absolute(place) for name, place in locations.items()}
        moved = {
            name: QuantizedLocation(
                entry.scheme, entry.shape, {part: self._absolute(place) for part, place in entry.parts.items()}
            )
            for name, entry in quantized.items()
        }
        facts = []
        for rank in range(self._options.tensor_parallel):
            name = engine_file(rank)
            write = partial(self._write_rank, rank=rank, source=source, locations=places, quantized=moved)
            keep(name, write)
            found = self._facts(rank, files[name])
            if found is None:  # an engine of an earlier build, of which nothing is known
                (self._stage / name).unlink()
                keep(name, write)
                found = self._facts(rank, files[name])
                assert found is not None
            facts.append(found)
        card = EngineCard(
            flavour=self._flavour.target,
            version=self._flavour.version,
            compute_capabilities=self.compute_capabilities,
            precision=precision,
            compute_dtype=self._settings.dtype,
            max_length=self._settings.max_length,
            profiles=make_plan(self._flavour, self._options, self.compute_capabilities).profiles,
            network=facts[0].network,
            engine=facts[0].engine,
            weights_sha256=tuple(one.weights_sha256 for one in facts),
            command=tuple(self._command(source)),
        )
        keep(CARD_FILE, partial(write_card, card=card))
        for name in [name for name in files if name.startswith(f"{WEIGHTS_FOLDER}/")]:
            del files[name]

    def _absolute(self, place: WeightLocation) -> WeightLocation:
        if place.file.is_absolute() or not (self._stage / place.file).is_file():
            return place
        return WeightLocation(self._stage / place.file, place.offset, place.nbytes, place.dtype, place.shape)

    def _write_rank(
        self,
        path: Path,
        rank: int,
        source: Source,
        locations: Mapping[str, WeightLocation],
        quantized: Mapping[str, QuantizedLocation],
    ) -> FileEntry:
        gc.collect()  # what another rank left
        num_ranks = self._options.tensor_parallel
        title = "engine" + (f" {rank + 1} of {num_ranks}" if num_ranks > 1 else "")
        entry, facts = write_engine(
            self._flavour,
            self._graph(rank, source, locations, quantized),
            make_plan(self._flavour, self._options, self.compute_capabilities),
            path,
            shard_spec(self._checkpoint.spec, Shard(rank, num_ranks)),
            f"{title} for {', '.join(self.compute_capabilities)}",
            self._settings.quiet,
        )
        document = {"engine_sha256": entry.sha256, "facts": vars(facts)}
        atomic_write_bytes(self._facts_file(rank), json.dumps(document).encode())
        return entry

    def _graph(
        self,
        rank: int,
        source: Source,
        locations: Mapping[str, WeightLocation],
        quantized: Mapping[str, QuantizedLocation],
    ) -> ir.Model:
        settings, num_ranks = self._settings, self._options.tensor_parallel
        return lowered_graph(
            self._checkpoint,
            settings.target,
            settings.max_length,
            locations,
            source.load_graph(),
            quantized=quantized,
            dtype=settings.dtype,
            shard=Shard(rank, num_ranks),
        )

    def _facts_file(self, rank: int) -> Path:
        return (self._stage / engine_file(rank)).with_suffix(".facts.json")  # swept when the bundle is done

    def _facts(self, rank: int, engine: FileEntry) -> EngineFacts | None:
        try:
            document = json.loads(self._facts_file(rank).read_bytes())
            return EngineFacts(**document["facts"]) if document["engine_sha256"] == engine.sha256 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _command(self, source: Source) -> list[str]:
        """The command line of this build, without compute capabilities and output."""
        settings, options = self._settings, self._options
        asked = "auto" if settings.precision == FROM_CHECKPOINT else settings.precision
        given: dict[str, object] = {
            "--precision": asked,
            "--max-length": settings.max_length,
            "--max-batch": options.max_batch,
            "--prefill-tokens": options.prefill_tokens,
            "--tp": options.tensor_parallel if options.tensor_parallel > 1 else None,
            "--optimization-level": options.optimization_level,
            "--no-gate": True if settings.is_quantized and not settings.gate else None,
        }
        words = ["qwen-rt", "build", source.origin, "--target", settings.target]
        for flag, value in (given | _quantize_flags(settings.quantize)).items():
            if value is not None:
                words += [flag, str(value)] if value is not True else [flag]
        return words


def _quantize_flags(options: QuantizeOptions) -> dict[str, object]:
    return {
        "--group-size": options.group_size,
        "--asymmetric": None if options.symmetric else True,
        "--lm-head": options.lm_head,
        "--embedding": options.embedding,
        "--overrides": _absolute(options.overrides),
        "--size-budget": options.size_budget,
        "--calibrate": _absolute(options.calibrate),
    }


def _absolute(file: Path | None) -> Path | None:
    """A name that holds in every working folder, as the command on a card has to."""
    return None if file is None else file.absolute()


def _present_capability() -> str | None:
    gpus = read_gpus(Started(gpu_probe_command())).gpus
    return gpus[0].compute_capability if gpus else None


def _numbers(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)
