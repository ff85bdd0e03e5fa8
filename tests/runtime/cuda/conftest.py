"""The fake GPU: compiled once, and every test that uses it must leave it empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_rt.runtime.cuda.session import CudaSession

from .fake import FakeGpu, compile_fake
from .kit import open_session


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    return compile_fake(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def gpu(fake_library: Path) -> Iterator[FakeGpu]:
    """A fake GPU; after the test nothing of it may be taken."""
    gpu = FakeGpu(fake_library)
    gpu.library.fake_fail_at(-1)
    before = gpu.live()  # what an earlier test has left: that one fails, not all after it
    yield gpu
    gpu.library.fake_fail_at(-1)
    assert gpu.live() == before


@pytest.fixture
def session(gpu: FakeGpu, tmp_path: Path) -> Iterator[CudaSession]:
    """A session of the small model."""
    with open_session(gpu, tmp_path) as session:
        yield session
