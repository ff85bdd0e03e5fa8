r"""The answer in a model's output: what is marked as one, found without parsing any mathematics.

In this order: the last closed ``\boxed{...}``, what follows the last ``####``, what follows the last "answer is" up to
the end of its sentence. An output that marks nothing and was not cut off is left to math-verify, see
`Grader.extract`.
"""

from __future__ import annotations

import re

from qwen_rt.benchmarks.nano.prompts import boxed_content

__all__ = ["MAX_ANSWER_CHARS", "find_answer", "said_answer", "tidy"]

MAX_ANSWER_CHARS = 1000
"""An answer longer than this is none that anybody expects, and is never parsed."""

_SAID = re.compile(r"\banswer\s*(?:is|:)\s*:?", re.IGNORECASE)
_HASHES = re.compile(r"####\s*([^\n]+)")
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)")
_MATHS = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_NUMBER = re.compile(r"[$€£]?\s*([-+−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)(\s*%)?")
# A unit or the rest of the sentence; what goes on as a formula is none.
_AFTER_NUMBER = re.compile(r"\s+[^\W\d_]{2,}|\s+[^\W\d_]\s*$|\s*[,;:)]|\s*$")


def find_answer(text: str) -> str | None:
    """Return the marked answer of an output, or None if nothing is marked."""
    boxed = boxed_content(text)
    if boxed is not None:
        return tidy(boxed)
    if hashes := _HASHES.findall(text):
        return tidy(hashes[-1])
    return said_answer(text)


def said_answer(text: str) -> str | None:
    """Return what follows the last "answer is" or "answer:": a formula, a number, or the words of the sentence."""
    said = list(_SAID.finditer(text))
    if not said:
        return None
    rest = text[said[-1].end() :].lstrip().split("\n", 1)[0].replace("**", "").strip()
    rest = _SENTENCE_END.split(rest, maxsplit=1)[0]
    if formula := _MATHS.search(rest):
        return tidy(next(group for group in formula.groups() if group))
    if (number := _NUMBER.match(rest)) and _AFTER_NUMBER.match(rest, number.end()):
        return tidy("".join(number.groups("")))
    return tidy(rest)


def tidy(answer: str) -> str | None:
    """Return an answer on one line without dollar signs around formulas and full stop; None if nothing is left."""
    plain = re.sub(r"(?<!\\)\$", "", answer)
    plain = " ".join(plain.split()).removesuffix(".").strip()
    return plain or None
