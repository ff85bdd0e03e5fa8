"""What an evaluation asks of a model, be it a bundle or an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_rt.benchmarks.eval.prompts import Kind, Prompt
from qwen_rt.errors import UsageError

__all__ = ["Job", "Model", "Reply", "Sampling"]

MAX_SEED = 2**31
"""Seeds stay below: servers take them as 32-bit integers."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, the same for every answer.

    Attributes:
        temperature: 0 is greedy.
        top_p: Keep the most probable tokens until they have this probability.
        max_tokens: Tokens of an answer at most.
        seed: Decides the seed of each answer; no matter when greedy.

    Raises:
        UsageError: A value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature={self.temperature}", "a number from 0 to 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}", "a number above 0 and at most 1")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens={self.max_tokens}", "at least 1")
        if not 0 <= self.seed < MAX_SEED:
            raise UsageError(f"seed={self.seed}", f"an integer from 0 to {MAX_SEED - 1}")


@dataclass(frozen=True)
class Job:
    """An answer that is wanted.

    Attributes:
        key: Names it: dataset, problem id, number of the sample.
        prompt: What is asked.
        seed: Of its sampling; None when greedy.
    """

    key: tuple[str, str, int]
    prompt: Prompt
    seed: int | None


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        text: The output.
        num_tokens: Tokens of it; None if the server does not say.
        finish_reason: `stop`, `length`, or what a server calls it.
    """

    text: str
    num_tokens: int | None
    finish_reason: str


class Model(Protocol):
    """Something that answers prompts."""

    @property
    def default_format(self) -> Kind:
        """The prompt format that suits it."""

    def describe(self) -> dict[str, Any]:
        """What of it decides an answer, as JSON data without secrets and folders."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse what could not be answered, before anything is."""

    def answer(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Answer prompts in any order; yields each as soon as it is there."""

    def close(self) -> None:
        """Give back what it holds."""
