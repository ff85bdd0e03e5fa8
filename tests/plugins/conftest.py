"""What tests of the kernels share: ops called on the GPU that is there, and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from qwen_rt.errors import MissingDependencyError

from .ort_stub.kit import Stub, compile_stub

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller


@pytest.fixture(scope="module")
def call() -> OpCaller:
    """Ops of the library that is built of the present sources; skips where there is none, or no GPU that it is for."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    from qwen_rt.benchmarks.kernel_step import OpCaller
    from qwen_rt.plugins.library import load

    try:
        library = load()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    capability = torch.cuda.get_device_capability()
    if capability[0] * 10 + capability[1] not in library.sms:
        pytest.skip(f"the plugin library is for SMs {library.sms}, this GPU is {capability}")
    return OpCaller(library)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers for every test on the GPU, whose errors show before the next begins."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(20261123)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return compile_stub(tmp_path_factory.mktemp("ort_stub"))


@pytest.fixture
def stub(compiled: Stub) -> Iterator[Stub]:
    compiled.library.stub_clear()
    yield compiled
    compiled.library.stub_clear()
