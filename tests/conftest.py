"""Fixtures that cost seconds to make: one of each a session, made when a test first asks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qwen_rt.plugins.library import PluginLibrary
    from qwen_rt.runtime.cuda.cudart import Cudart
    from qwen_rt.runtime.llm import LLM

    from .cases import Zoo


def pytest_configure() -> None:
    """Take Ctrl-C as a terminal would send it: what a shell starts with `&` in a script ignores it, children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def cuda() -> Cudart:
    """The CUDA runtime, with device 0 open; skips where a session cannot run."""
    import onnxruntime

    from qwen_rt.errors import QwenRtError
    from qwen_rt.runtime.cuda.cudart import Cudart

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime without CUDA")
    try:
        cuda = Cudart()
        cuda.open_device(0)
    except QwenRtError as error:
        pytest.skip(f"no usable GPU: {error}")
    return cuda


@pytest.fixture(scope="module")
def library(cuda: Cudart) -> PluginLibrary:
    """The plugin library for device 0; skips where there is none."""
    from qwen_rt.errors import MissingDependencyError
    from qwen_rt.plugins.library import load

    try:
        return load(sm=cuda.open_device(0))
    except MissingDependencyError as error:
        pytest.skip(str(error))
