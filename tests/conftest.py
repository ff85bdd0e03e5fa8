"""Fixtures that cost seconds to make: one of each a session, made when a test first asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qwen_rt.runtime.llm import LLM

    from .cases import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Random checkpoints of many shapes, with their bundles and reference logits."""
    from .cases import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def nano_portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The portable graph of the checkpoint that ships with the package; bundles built from it need no new trace."""
    from qwen_rt.export.build import BuildOptions, build

    folder = tmp_path_factory.mktemp("nano") / "portable"
    build("nano", folder, BuildOptions(target="portable", quiet=True))
    return folder


@pytest.fixture(scope="session")
def nano_bundle(nano_portable: Path) -> Path:
    """A CPU bundle of the checkpoint that ships with the package."""
    from qwen_rt.export.build import BuildOptions, build

    folder = nano_portable.parent / "cpu"
    build(nano_portable, folder, BuildOptions(quiet=True))
    return folder


@pytest.fixture(scope="session")
def nano(nano_bundle: Path) -> LLM:
    """The nano model, loaded."""
    from qwen_rt.runtime.llm import LLM

    return LLM(nano_bundle, num_threads=1)
