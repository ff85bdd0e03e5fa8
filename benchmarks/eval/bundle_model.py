"""A bundle as the model of an evaluation; it is loaded when the first answer is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.eval.models import Job, Reply, Sampling
from qwen_rt.benchmarks.eval.prompts import Kind
from qwen_rt.bundle import MANIFEST_FILE, Bundle, file_sha256
from qwen_rt.errors import CapacityError, UsageError
from qwen_rt.runtime.chat_template import ChatTemplate
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["BundleModel"]

_GROUP_BATCHES = 32
"""Batches that are handed to the engine together: rows run empty at the end of a group only."""


class BundleModel:
    """Answers with a bundle, by continuous batching.

    Args:
        bundle: Folder that `qwen-rt build` wrote.
        sampling: How tokens are chosen; defaults of the model's generation_config.json are not used.
        batch: Answers at once.
        loading: More arguments of `LLM`.

    Raises:
        BundleError: It is no bundle, or is incomplete.
        TextError: Its tokenizer cannot be read.
    """

    def __init__(
        self,
        bundle: str | Path,
        sampling: Sampling,
        *,
        batch: int = 32,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        if batch < 1:
            raise UsageError(f"batch={batch}", "at least 1")
        self._loading = dict(loading or {})
        self._bundle = Bundle.open(bundle, "size", self._loading.get("checkpoint"))
        self._tokenizer = Tokenizer.from_folder(self._bundle.path)
        self._sampling, self._batch = sampling, batch
        self._template: ChatTemplate | None = None
        self._llm: LLM | None = None

    @property
    def default_format(self) -> Kind:
        """`instruct` if the bundle has a chat template, else `few-shot`."""
        return "instruct" if self._tokenizer.chat_templates else "few-shot"

    def describe(self) -> dict[str, Any]:
        """Name, target and precision of the bundle, and the hash of its manifest, which holds those of its files."""
        manifest = self._bundle.manifest
        return {
            "bundle": self._bundle.path.resolve().name,
            "manifest_sha256": file_sha256(self._bundle.path / MANIFEST_FILE),
            "target": manifest.target,
            "precision": manifest.precision,
        }

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse prompts that leave no room for an answer.

        Raises:
            CapacityError: A prompt is as long as the bundle's `max_length`, or longer.
            TextError: There is no chat template, or it fails.
        """
        most = self._bundle.manifest.max_length - 1
        checked: set[str] = set()
        for job in jobs:
            if job.prompt.digest in checked:
                continue
            checked.add(job.prompt.digest)
            length = len(self._encode(job))
            if length > most:
                raise CapacityError(
                    f"the prompt of problem {job.key[1]} of {job.key[0]} has {length} tokens",
                    f"at most {most}, one less than the bundle's max_length",
                    "pass fewer --shots, or build the bundle with a larger --max-length",
                )

    def answer(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Answer prompts; yields each answer as soon as it has ended."""
        if self._llm is None:
            self._llm = LLM(self._bundle.path, max_num_seqs=self._batch, **self._loading)
        size = _GROUP_BATCHES * self._batch
        for start in range(0, len(jobs), size):
            group = jobs[start : start + size]
            prompts, params = [self._encode(job) for job in group], [self._params(job) for job in group]
            for index, output in self._llm.generate_each(prompts, params):
                yield group[index], Reply(output.text, len(output.token_ids), output.finish_reason)

    def close(self) -> None:
        """Give the model's memory back."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()

    def _encode(self, job: Job) -> list[int]:
        if not job.prompt.is_chat:
            return self._tokenizer.encode(job.prompt.text)
        if self._template is None:
            self._template = ChatTemplate.from_tokenizer(self._tokenizer)
        return self._template.encode(self._tokenizer, job.prompt.messages)

    def _params(self, job: Job) -> SamplingParams:
        sampling = self._sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=job.seed,
            stop=job.prompt.stop,
        )
