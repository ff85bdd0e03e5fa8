"""The portability card of an engine bundle: which library, which GPUs and which shapes its engines were compiled for.

    BUNDLE/engine/rank{r}.engine    the compiled engine of a rank, weights inside
    BUNDLE/engine/card.json         this card

An engine says nothing before it is loaded, and then only that it does not fit. The card is read first, and its check
names what differs and the command that builds a fitting one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_rt.errors import BundleError, CheckpointError
from qwen_rt.manifest_fields import REBUILD, Fields
from qwen_rt.strict_json import parse_object, show

__all__ = [
    "CARD_FILE",
    "ENGINE_FOLDER",
    "ENGINE_TARGETS",
    "PROFILES",
    "EngineCard",
    "EngineProfile",
    "engine_file",
    "engine_files",
]

ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets whose bundles hold compiled engines."""

ENGINE_FOLDER = "engine"
CARD_FILE = f"{ENGINE_FOLDER}/card.json"

FORMAT = "qwen-rt-engine-card"
FORMAT_VERSION = 1
PROFILES = ("prefill", "decode")
"""Names of the optimization profiles, in the order of their numbers in the engine."""

_CHIEF_LAYERS = (
    "ATTENTION",
    "KV_CACHE_UPDATE",
    "ROTARY_EMBEDDING",
    "MATRIX_MULTIPLY",
    "DEQUANTIZE",
    "DIST_COLLECTIVE",
    "NORMALIZATION",
)
_CAPABILITY = re.compile(r"[1-9]\d?\.\d")
_DTYPES = ("float32", "bfloat16", "float16")


def engine_file(rank: int) -> str:
    """Name of a rank's engine in its bundle."""
    return f"{ENGINE_FOLDER}/rank{rank}.engine"


def engine_files(target: str, num_ranks: int) -> list[str]:
    """Names of a bundle's engines; none for a target that has a graph."""
    return [engine_file(rank) for rank in range(num_ranks)] if target in ENGINE_TARGETS else []


@dataclass(frozen=True)
class EngineProfile:
    """Shapes that an optimization profile takes: 1 to `max_batch` rows of 1 to `max_tokens` tokens each."""

    max_batch: int
    max_tokens: int


@dataclass(frozen=True)
class EngineCard:
    """What an engine was compiled for, and from what.

    Attributes:
        flavour: `tensorrt` or `tensorrt-rtx`, as `--target` takes it.
        version: Of that library; an engine is read by this one only.
        compute_capabilities: Of the GPUs that it runs on, such as `8.9`.
        precision: How the layers' matrices are stored, as in the manifest.
        compute_dtype: Of activations and of the cache.
        max_length: Rows of the cache, which are allocated for every row of the batch.
        profiles: The shapes of prefill and of decode, in the order of the engine's profiles.
        network: Layer type → number, of the network that was compiled (`KV_CACHE_UPDATE`, `ATTENTION`, …); of one rank.
        engine: Profile → kind of the compiled layers → number; empty where the library did not tell.
        weights_sha256: For each rank, over names, dtypes, shapes and bytes of the weights in its engine.
        command: What built it, without the compute capabilities and the output folder.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    compute_dtype: str
    max_length: int
    profiles: Mapping[str, EngineProfile]
    network: Mapping[str, int]
    engine: Mapping[str, Mapping[str, int]]
    weights_sha256: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def num_ranks(self) -> int:
        """Engines in the bundle."""
        return len(self.weights_sha256)

    def to_json(self) -> bytes:
        """Return the card as JSON with sorted keys."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "flavour": self.flavour,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "precision": self.precision,
            "compute_dtype": self.compute_dtype,
            "max_length": self.max_length,
            "profiles": {name: vars(profile) for name, profile in self.profiles.items()},
            "network": dict(self.network),
            "engine": {name: dict(layers) for name, layers in self.engine.items()},
            "weights_sha256": list(self.weights_sha256),
            "command": list(self.command),
        }
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, source: str = CARD_FILE) -> EngineCard:
        """Parse and check a card that anyone may have written.

        Raises:
            BundleError: It is no card, of a newer format, or a field is missing or malformed.
        """
        try:
            document = parse_object(data, source, REBUILD)
        except CheckpointError as error:
            raise BundleError(error.what, error.expected, error.fix) from None
        take = Fields(document, source)
        take.choice("format", (FORMAT,))
        if take.integer("format_version", 1) > FORMAT_VERSION:
            found = show(document["format_version"])
            fix = "upgrade qwen-rt (pip install -U qwen-rt), or build the bundle again with this version"
            raise BundleError(f"{source}: format_version={found}", f"{FORMAT_VERSION} or older", fix)
        capabilities = _strings(take, document, "compute_capabilities")
        for one in capabilities:
            if not _CAPABILITY.fullmatch(one):
                raise BundleError(f"{source}: compute_capabilities has {show(one)}", "numbers such as 8.9", REBUILD)
        profiles = take.objects("profiles")
        if sorted(profiles) != sorted(PROFILES):
            found = show(", ".join(sorted(profiles)))
            raise BundleError(f"{source}: profiles={found}", " and ".join(PROFILES), REBUILD)
        hashes = _strings(take, document, "weights_sha256")
        for index, one in enumerate(hashes):
            Fields({"weights_sha256": one}, f"{source}: rank {index}").sha256("weights_sha256")
        return cls(
            flavour=take.choice("flavour", ENGINE_TARGETS),
            version=take.string("version"),
            compute_capabilities=capabilities,
            precision=take.string("precision"),
            compute_dtype=take.choice("compute_dtype", _DTYPES),
            max_length=take.integer("max_length", 1),
            profiles={name: _profile(Fields(profiles[name], f"{source}: profile {name}")) for name in PROFILES},
            network=_counts(take.object("network"), f"{source}: network"),
            engine={
                name: _counts(layers, f"{source}: engine {show(name)}")
                for name, layers in take.objects("engine").items()
            },
            weights_sha256=hashes,
            command=_strings(take, document, "command"),
        )

    def check(self, flavour: str, version: str, compute_capability: str, folder: str = "BUNDLE") -> None:
        """Refuse to load the engines where they cannot run.

        Args:
            flavour: What is installed here, `tensorrt` or `tensorrt-rtx`.
            version: Of it, as its module's `__version__`.
            compute_capability: Of the GPU, such as `8.9`.
            folder: The bundle, for the command in the message.

        Raises:
            BundleError: Another flavour, version or GPU; the message ends with the command that builds a fitting one.
        """
        if flavour != self.flavour:
            again = self.rebuild_command(folder, flavour=flavour)
            raise BundleError(f"{folder} holds engines of {self.flavour}", f"engines of {flavour}", f"build: {again}")
        if version != self.version:
            raise BundleError(
                f"{folder} was built by {self.flavour} {self.version}, and {version} is installed",
                "the same version",
                f"build: {self.rebuild_command(folder)}",
            )
        if compute_capability not in self.compute_capabilities:
            again = self.rebuild_command(folder, (compute_capability,))
            raise BundleError(
                f"{folder} was built for compute capability {', '.join(self.compute_capabilities)}",
                f"{compute_capability}, that of this GPU",
                f"build: {again}",
            )

    def summary(self) -> str:
        """One line: library, GPUs, shapes."""
        shapes = ", ".join(f"{name} {one.max_batch} x {one.max_tokens}" for name, one in self.profiles.items())
        ranks = f", {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return (
            f"{self.flavour} {self.version} for compute capability {', '.join(self.compute_capabilities)}{ranks}; "
            f"at most {shapes} tokens, {self.max_length} in all"
        )

    def network_summary(self) -> str:
        """The layers that the network stands or falls with, then how many others there are."""
        chosen = {name: self.network[name] for name in _CHIEF_LAYERS if name in self.network}
        return f"{self.listed(chosen)}, others {sum(self.network.values()) - sum(chosen.values())}"

    @staticmethod
    def listed(counts: Mapping[str, int]) -> str:
        """`NAME number, …`, the most frequent first."""
        return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))

    def rebuild_command(
        self, folder: str = "BUNDLE", compute_capabilities: tuple[str, ...] = (), flavour: str | None = None
    ) -> str:
        """Return the command line that builds the bundle again, for other GPUs or another flavour if given."""
        words = list(self.command)
        if flavour is not None and flavour != self.flavour:
            pairs = zip(["", *words], words, strict=False)
            words = [flavour if before == "--target" else word for before, word in pairs]
        chosen = compute_capabilities or self.compute_capabilities
        if (flavour or self.flavour) == "tensorrt-rtx":
            words += ["--compute-capability", *chosen]
        return shlex.join([*words, "-o", folder, "--force"])


def _profile(take: Fields) -> EngineProfile:
    return EngineProfile(take.integer("max_batch", 1), take.integer("max_tokens", 1))


def _counts(document: Mapping[str, Any], source: str) -> dict[str, int]:
    take = Fields(document, source)
    return {name: take.integer(name, 0) for name in document}


def _strings(take: Fields, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of at least one string."""
    values = document.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and "\0" not in v for v in values):
        raise BundleError(f"{take.source}: {key}={show(values)}", "a list of strings", REBUILD)
    return tuple(values)
