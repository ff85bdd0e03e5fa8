"""The card of an engine, held against the bundle, the machine and the engine itself, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_rt.bundle import Bundle
from qwen_rt.engine_card import CARD_FILE, PROFILES, EngineCard
from qwen_rt.errors import BundleError, UnsupportedModelError
from qwen_rt.manifest_fields import REBUILD
from qwen_rt.targets import RTX_CAPABILITIES

__all__ = ["check_profiles", "fitting_card", "read_card"]


def fitting_card(bundle: Bundle, version: str, sm: int) -> EngineCard:
    """Read the card and refuse an engine that cannot run here.

    Args:
        bundle: Of target `tensorrt` or `tensorrt-rtx`.
        version: Of that library, as installed.
        sm: Compute capability of the GPU, 89 for 8.9.

    Raises:
        BundleError: No readable card, one of another bundle, or an engine of another flavour, version or GPU.
        UnsupportedModelError: TensorRT-RTX does not support the GPU, so that no engine of it can be built.
    """
    card, target, capability = read_card(bundle), bundle.manifest.target, f"{sm // 10}.{sm % 10}"
    if target == "tensorrt-rtx" and not capability.startswith(RTX_CAPABILITIES):
        raise UnsupportedModelError(
            f"TensorRT-RTX does not support compute capability {capability}, that of this GPU",
            f"one of {', '.join(RTX_CAPABILITIES)}x",
            "use a bundle of target cuda or tensorrt",
        )
    card.check(target, version, capability, str(bundle.path))
    return card


def check_profiles(card: EngineCard, limits: Sequence[tuple[int, int]], file: Path, rebuild: str) -> None:
    """Compare the profiles of a loaded engine with its card.

    Args:
        card: The card.
        limits: Rows and tokens of the largest call of each profile.
        file: The engine, for the message.
        rebuild: The next step, for the message.

    Raises:
        BundleError: They differ.
    """
    for name, (rows, tokens) in zip(PROFILES, limits, strict=True):
        told = card.profiles[name]
        if (rows, tokens) != (told.max_batch, told.max_tokens):
            raise BundleError(
                f"profile {name} of {file} takes {rows} rows of {tokens} tokens",
                f"{told.max_batch} of {told.max_tokens}, as {CARD_FILE} says",
                rebuild,
            )


def read_card(bundle: Bundle) -> EngineCard:
    """Read an engine's card and hold it against the manifest, which lists and hashes all files of the bundle.

    Raises:
        BundleError: There is none, it is malformed, or it tells of another engine than the manifest.
    """
    file = bundle.path / CARD_FILE
    try:
        card = EngineCard.from_json(file.read_bytes(), str(file))
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}", "the card of the engine", REBUILD) from None
    manifest = bundle.manifest
    for name, told, wanted in (
        ("max_length", card.max_length, manifest.max_length),
        ("compute_dtype", card.compute_dtype, manifest.compute_dtype),
        ("precision", card.precision, manifest.precision),
        ("engines", card.num_ranks, manifest.tensor_parallel),
    ):
        if told != wanted:
            raise BundleError(f"{file}: {name}={told}", f"{wanted}, as the manifest says", REBUILD)
    return card
