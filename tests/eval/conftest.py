"""Fixtures of the tests of evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen_rt.benchmarks.eval import endpoint_model
from qwen_rt.benchmarks.eval.grading import Grader


@pytest.fixture(scope="session")
def grader() -> Iterator[Grader]:
    """One process for all."""
    with Grader() as found:
        yield found


@pytest.fixture(autouse=True)
def _no_key_and_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_model, "BACKOFF_S", 0.001)
