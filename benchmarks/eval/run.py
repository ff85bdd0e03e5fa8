"""An evaluation from problems to a table: ask what is not answered yet, grade, keep, count."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.benchmarks.eval.datasets import Dataset, load_datasets
from qwen_rt.benchmarks.eval.grading import Grader
from qwen_rt.benchmarks.eval.models import MAX_SEED, Job, Model, Sampling
from qwen_rt.benchmarks.eval.prompts import Kind, PromptFormat, make_format
from qwen_rt.benchmarks.eval.records import (
    ANSWERS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    Answer,
    AnswerFile,
    open_answers,
)
from qwen_rt.benchmarks.eval.results import count, markdown
from qwen_rt.errors import StorageError, UsageError
from qwen_rt.progress import progress
from qwen_rt.storage import atomic_write_bytes

__all__ = ["Plan", "evaluate"]

FORMAT, FORMAT_VERSION = "qwen-rt-eval", 1
MAX_SAMPLES = 1024


@dataclass(frozen=True)
class Plan:
    """What to evaluate on, and how; the model comes beside it.

    Attributes:
        datasets: As `load_datasets` takes them.
        output: Folder of answers and results.
        layout: Layout of the files; None tells it from the first row.
        limit: Only so many problems of each dataset; None for all.
        format: Prompt format; None for the one that suits the model.
        template_file: The user's own template.
        shots: Worked examples of few-shot; None for the usual number.
        stop: Texts that end an answer.
        sampling: How tokens are chosen.
        samples: Answers to each problem.
        force: Throw away what an earlier evaluation left in the folder.
        quiet: No progress on stderr.
    """

    datasets: tuple[str, ...]
    output: Path
    layout: str | None = None
    limit: int | None = None
    format: Kind | None = None
    template_file: Path | None = None
    shots: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    force: bool = False
    quiet: bool = False


def evaluate(plan: Plan, make_model: Callable[[], Model]) -> dict[str, Any]:
    """Answer all problems, or those that an earlier run has left, and count.

    Args:
        plan: What to evaluate.
        make_model: Gives the model; called when datasets and options have been checked.

    Returns:
        The results, as they stand in results.json.

    Raises:
        UsageError: The plan does not hold together, or a dataset cannot be read.
        StorageError: The folder holds something else, or cannot be written.
        QwenRtError: What the model raises; all answers that came before are kept.
        ModuleNotFoundError: math-verify is not installed.
    """
    if not 1 <= plan.samples <= MAX_SAMPLES:
        raise UsageError(f"samples={plan.samples}", f"1 to {MAX_SAMPLES}")
    if plan.samples > 1 and plan.sampling.temperature == 0:
        raise UsageError(f"samples={plan.samples} with temperature 0", "answers that differ", "pass --temperature 0.7")
    if not all(plan.stop):
        raise UsageError("an empty text to stop at", "at least one character")
    datasets = load_datasets(plan.datasets, plan.layout, plan.limit)
    chosen = None if plan.format is None else _format(plan, plan.format)
    with Grader() as grader, contextlib.closing(make_model()) as model:
        prompt_format = chosen or _format(plan, model.default_format)
        settings = _settings(plan, datasets, model, prompt_format)
        jobs = _jobs(plan, datasets, prompt_format)
        with open_answers(plan.output, settings, force=plan.force) as answers:
            _answer(plan, datasets, model, jobs, answers, grader)
            results = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "settings": settings,
                "samples": plan.samples,
                "limit": plan.limit,
                "datasets": [count(dataset, answers.answers, plan.samples, grader) for dataset in datasets],
            }
            answers.sync()
            text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            atomic_write_bytes(plan.output / RESULTS_FILE, text.encode("utf-8", "backslashreplace"))
            atomic_write_bytes(plan.output / TABLE_FILE, markdown(results).encode("utf-8", "backslashreplace"))
    return results


def _format(plan: Plan, kind: Kind) -> PromptFormat:
    return make_format(kind, template_file=plan.template_file, shots=plan.shots, stop=plan.stop)


def _settings(plan: Plan, datasets: Sequence[Dataset], model: Model, prompt_format: PromptFormat) -> dict[str, Any]:
    """All that an answer and its grade depend on; how many are asked for, and how many at once, is not in it."""
    return {
        "model": model.describe(),
        "prompt": prompt_format.describe(),
        "sampling": asdict(plan.sampling),
        "datasets": {dataset.name: {"layout": dataset.layout, "sha256": dataset.sha256} for dataset in datasets},
        "versions": {"qwen-rt": __version__, "math-verify": importlib.metadata.version("math-verify")},
    }


def _jobs(plan: Plan, datasets: Sequence[Dataset], prompt_format: PromptFormat) -> list[Job]:
    """Every answer that the results need, in order."""
    jobs = []
    for dataset in datasets:
        for problem in dataset.problems:
            prompt = prompt_format.prompt(problem, dataset.style)
            keys = ((dataset.name, problem.id, sample) for sample in range(plan.samples))
            jobs += [Job(key, prompt, _seed(plan.sampling, key)) for key in keys]
    return jobs


def _seed(sampling: Sampling, key: tuple[str, str, int]) -> int | None:
    """The seed of one answer, whichever others are asked for: from the evaluation's seed and the answer's key."""
    if sampling.temperature == 0:
        return None
    digest = hashlib.sha256(json.dumps([sampling.seed, *key]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


def _answer(
    plan: Plan,
    datasets: Sequence[Dataset],
    model: Model,
    jobs: Sequence[Job],
    answers: AnswerFile,
    grader: Grader,
) -> None:
    """Get, grade and keep every answer that is not there yet."""
    expected = {(dataset.name, problem.id): problem.answer for dataset in datasets for problem in dataset.problems}
    for job in jobs:
        there = answers.answers.get(job.key)
        if there is not None and there.prompt != job.prompt.digest:
            what = f"{plan.output / ANSWERS_FILE}: problem {job.key[1]} was answered with another prompt"
            raise StorageError(what, fix="choose another folder, or pass --force to start over")
    todo = [job for job in jobs if job.key not in answers.answers]
    if not todo:
        return
    model.check(todo)
    num_there = len(jobs) - len(todo)
    what = "answers" if num_there == 0 else f"answers ({num_there} were there)"
    with progress(len(todo), what, quiet=plan.quiet) as bar, contextlib.ExitStack() as stack:
        replies = model.answer(todo)
        if isinstance(replies, Generator):
            stack.callback(replies.close)  # what runs ends before anything else is told of
        for job, reply in replies:
            grade = grader.grade(reply.text, expected[job.key[:2]], is_cut_off=reply.finish_reason == "length")
            dataset, problem_id, sample = job.key
            answers.append(
                Answer(
                    dataset=dataset,
                    id=problem_id,
                    sample=sample,
                    prompt=job.prompt.digest,
                    seed=job.seed,
                    finish_reason=reply.finish_reason,
                    num_tokens=reply.num_tokens,
                    expected=expected[job.key[:2]],
                    extracted=grade.extracted,
                    correct=grade.correct,
                    undecided=grade.undecided,
                    output=reply.text,
                )
            )
            bar.update()
