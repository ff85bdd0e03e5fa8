r"""Regular expressions of quantization configs, matched in bounded time.

A config is somebody else's file, and Python's `re` takes time exponential in the length of a hostile pattern. Here a
pattern maps the set of positions it may start at to the set it may end at, so a match takes polynomial time, and a
budget bounds even that. Read are literals, `.`, classes, the escapes `\d \D \w \W \s \S` and those of
punctuation, groups, `|`, `^`, `$`, lookahead and quantifiers; anything else is refused.
"""

from __future__ import annotations

import string
from collections.abc import Callable

from qwen_rt.errors import UnsupportedModelError
from qwen_rt.strict_json import show

__all__ = ["Pattern"]

_MAX_CHARS = 1000
_MAX_DEPTH = 8
_MAX_REPEATS = 100
_MAX_STEPS = 20_000

_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SPACE = frozenset(string.whitespace)
_KNOWN_ESCAPES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}


class _Text:
    """The text that is matched, and how many steps are left."""

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, _MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _TooManyStepsError


class _TooManyStepsError(Exception):
    """A match that takes longer than any sensible pattern does."""


_Ends = frozenset[int]
_Node = Callable[[_Text, _Ends], _Ends]
_START: _Ends = frozenset({0})


class Pattern:
    """A compiled pattern.

    Args:
        pattern: The pattern, without the `re:` that configs put before it.

    Raises:
        UnsupportedModelError: Not a pattern, or one with syntax that is not read.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        if len(pattern) > _MAX_CHARS:
            raise self._refusal(f"{len(pattern)} characters", f"at most {_MAX_CHARS}")
        self._at = 0
        self._node = self._alternatives(0)
        if self._at < len(pattern):
            raise self._refusal(f"{show(pattern[self._at])} at {self._at}")

    def matches(self, text: str) -> bool:
        """Whether the pattern matches at the beginning of `text`, as `re.match` does; text without line ends.

        Raises:
            UnsupportedModelError: It takes too many steps.
        """
        state = _Text(text)
        try:
            return bool(self._node(state, _START))
        except _TooManyStepsError:
            raise self._refusal("too many repetitions") from None

    def _refusal(self, problem: str, expected: str = "a plain regular expression") -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the pattern {show(self.pattern)} of the quantization config has {problem}",
            expected,
            "write it otherwise, or list the modules by name",
        )

    def _peek(self) -> str:
        return self.pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self.pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _alternatives(self, depth: int) -> _Node:
        """`a|b|c`."""
        if depth > _MAX_DEPTH:
            raise self._refusal(f"groups nested more than {_MAX_DEPTH} deep")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        if len(branches) == 1:
            return branches[0]

        def match(state: _Text, starts: _Ends) -> _Ends:
            return frozenset().union(*(branch(state, starts) for branch in branches))

        return match

    def _sequence(self, depth: int) -> _Node:
        """Quantified atoms, one after the other."""
        items: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._quantified(self._atom(depth)))

        def match(state: _Text, starts: _Ends) -> _Ends:
            for item in items:
                if not starts:
                    break
                starts = item(state, starts)
            return starts

        return match

    def _quantified(self, atom: _Node) -> _Node:
        low, high = 1, 1
        if self._take("*"):
            low, high = 0, _MAX_REPEATS * _MAX_CHARS
        elif self._take("+"):
            low, high = 1, _MAX_REPEATS * _MAX_CHARS
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            low, high = self._bounds()
        else:
            return atom
        self._take("?")  # a lazy quantifier matches the same texts
        if self._peek() and self._peek() in "*+?{":
            raise self._refusal(f"a quantifier of a quantifier at {self._at}")

        def match(state: _Text, starts: _Ends) -> _Ends:
            ends = starts if low == 0 else frozenset()
            for count in range(1, high + 1):
                state.spend(1)
                following = atom(state, starts)
                if count >= low:
                    if following <= ends:
                        break
                    ends |= following
                elif not following:
                    break
                starts = following
            return ends

        return match

    def _bounds(self) -> tuple[int, int]:
        """`m}`, `m,}` or `m,n}`."""
        end = self.pattern.find("}", self._at)
        low, comma, high = self.pattern[self._at : end].partition(",") if end >= 0 else ("", "", "")
        numbers = [part for part in (low, high) if part]
        if not low or not all(part.isascii() and part.isdigit() and len(part) <= 3 for part in numbers):
            raise self._refusal(f"a brace at {self._at - 1}", "{m}, {m,} or {m,n}")
        least = int(low)
        most = int(high) if high else _MAX_REPEATS if comma else least
        if not least <= most <= _MAX_REPEATS:
            raise self._refusal(f"{{{low}{comma}{high}}}", f"at most {_MAX_REPEATS} repetitions")
        self._at = end + 1
        return least, most

    def _atom(self, depth: int) -> _Node:
        at = self._at
        if self._take("("):
            return self._group(depth)
        if self._take("["):
            return self._class()
        if self._take("^"):
            return lambda state, starts: starts & _START
        if self._take("$"):
            return lambda state, starts: starts & {len(state.text)}
        if self._take("."):
            return _one(lambda char: True)
        if self._take("\\"):
            chars, negated = self._escape()
            return _one(lambda char: (char in chars) is not negated)
        char = self._peek()
        if char in "*+?{}]":
            raise self._refusal(f"{show(char)} at {at}")
        self._at += 1
        return _one(lambda other: other == char)

    def _group(self, depth: int) -> _Node:
        ahead = self._take("?=")
        negative = not ahead and self._take("?!")
        if not ahead and not negative and not self._take("?:") and self._peek() == "?":
            raise self._refusal(f"a special group at {self._at - 1}")
        inner = self._alternatives(depth + 1)
        if not self._take(")"):
            raise self._refusal("a group without an end")
        if not ahead and not negative:
            return inner
        return lambda state, starts: frozenset(
            start for start in starts if bool(inner(state, frozenset({start}))) is ahead
        )

    def _escape(self) -> tuple[frozenset[str], bool]:
        """What stands behind a backslash: (characters, whether all others are meant)."""
        char = self._peek()
        self._at += 1
        if char.lower() in _KNOWN_ESCAPES:
            return _KNOWN_ESCAPES[char.lower()], char.isupper()
        if not char or char.isalnum():
            raise self._refusal(f"a backslash before {show(char)}")
        return frozenset({char}), False

    def _class(self) -> _Node:
        """`abc]`, `^a-z]` and so on."""
        negated = self._take("^")
        chars: set[str] = set()
        first = True
        while first or self._peek() != "]":
            first = False
            char = self._peek()
            if not char:
                raise self._refusal("a class without an end")
            if self._take("\\"):
                found, others = self._escape()
                if others or (len(found) > 1 and self._peek() == "-"):
                    raise self._refusal("an escape in a class")
                chars |= found
                continue
            self._at += 1
            if self._peek() == "-" and self.pattern[self._at + 1 : self._at + 2] not in ("", "]", "\\"):
                last = self.pattern[self._at + 1]
                self._at += 2
                if not char.isascii() or not last.isascii() or last < char:
                    raise self._refusal(f"a range of {show(char)} to {show(last)}")
                chars |= {chr(code) for code in range(ord(char), ord(last) + 1)}
            else:
                chars.add(char)
        self._at += 1
        return _one(lambda char: (char in chars) is not negated)


def _one(accepts: Callable[[str], bool]) -> _Node:
    """A node that matches one character."""

    def match(state: _Text, starts: _Ends) -> _Ends:
        state.spend(1 + len(starts))
        return frozenset(at + 1 for at in starts if at < len(state.text) and accepts(state.text[at]))

    return match
