r"""How a problem is put to a model.

    instruct   a chat: system "You are a helpful assistant.", user "{question}\nPlease reason step by step, ..."
    few-shot   plain text, for base models: k worked examples, "Question: ...\nAnswer: ..." each, then the question
    raw        plain text of the user's own

`{question}` in a template is replaced as it stands; no other brace means anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_rt.benchmarks.eval.datasets import Problem, Style
from qwen_rt.benchmarks.eval.shots import SHOTS
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION, SYSTEM
from qwen_rt.errors import UsageError

__all__ = ["FORMATS", "Prompt", "PromptFormat", "make_format"]

Kind = Literal["instruct", "few-shot", "raw"]
FORMATS: tuple[Kind, ...] = ("instruct", "few-shot", "raw")
HOLE = "{question}"
NEXT_QUESTION = "Question:"


@dataclass(frozen=True)
class Prompt:
    """What a model gets.

    Attributes:
        text: The user's message of a chat, or plain text to continue.
        is_chat: Which of the two.
        stop: Texts that end the answer.
    """

    text: str
    is_chat: bool
    stop: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation; only of a chat."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]

    @property
    def digest(self) -> str:
        """Names the prompt: the first 16 hex digits of a SHA-256."""
        whole = json.dumps(self.messages) if self.is_chat else self.text
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class PromptFormat:
    """A way to put problems.

    Attributes:
        kind: `instruct`, `few-shot` or `raw`.
        templates: Style of a dataset → template with `{question}`.
        stop: Texts that end an answer.
        shots: Worked examples for each style; None where there are none.
    """

    kind: Kind
    templates: Mapping[Style, str]
    stop: tuple[str, ...]
    shots: int | None = None

    def prompt(self, problem: Problem, style: Style) -> Prompt:
        """Put a problem."""
        return Prompt(self.templates[style].replace(HOLE, problem.question), self.kind == "instruct", self.stop)

    def describe(self) -> dict[str, Any]:
        """What of it decides an answer, as JSON data."""
        whole = json.dumps([self.templates["words"], self.templates["math"]])
        digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
        return {"format": self.kind, "shots": self.shots, "templates_sha256": digest, "stop": list(self.stop)}


def make_format(
    kind: Kind, *, template_file: Path | None = None, shots: int | None = None, stop: tuple[str, ...] = ()
) -> PromptFormat:
    """Return a format, checked.

    Args:
        kind: Which one.
        template_file: The user's template: the message of `instruct`, or all of the text for `raw`.
        shots: Worked examples of `few-shot`; None for as many as Qwen2-Math was evaluated with: 8 word
            problems, or 4 in mathematics.
        stop: Texts that end an answer, beside "Question:" of `few-shot`.

    Raises:
        UsageError: The options do not go together, or the template cannot be read or has no `{question}`.
    """
    if kind != "few-shot" and shots is not None:
        raise UsageError(f"shots={shots} with prompt format {kind}", "few-shot", "pass --prompt few-shot")
    if kind == "few-shot":
        if template_file is not None:
            raise UsageError("a template with few-shot", "one of the two", "pass --prompt raw, or instruct")
        most = max(map(len, SHOTS.values()))
        if shots is not None and not 0 <= shots <= most:
            raise UsageError(f"shots={shots}", f"0 to {most}")
        templates: dict[Style, str] = {style: _few_shot(style, shots) for style in SHOTS}
        return PromptFormat(kind, templates, (NEXT_QUESTION, *stop), shots)
    if template_file is not None:
        template = _read_template(template_file)
    elif kind == "raw":
        raise UsageError("raw without a template", "a text with {question}", "pass --prompt-file FILE")
    else:
        template = f"{HOLE}\n{INSTRUCTION}"
    return PromptFormat(kind, {"words": template, "math": template}, stop)


def _few_shot(style: Style, shots: int | None) -> str:
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOTS[style][:shots])
    return f"{examples}Question: {HOLE}\nAnswer:"


def _read_template(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"template {file} cannot be read: {reason}", "a UTF-8 text with {question}") from None
    if HOLE not in text:
        raise UsageError(f"template {file} has no {HOLE}", "the place of the question", f"write {HOLE} into it")
    return text
