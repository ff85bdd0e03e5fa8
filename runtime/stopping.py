"""Stop strings over streamed text: a stop string may begin in one piece of text and end in a later one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen_rt.errors import UsageError

__all__ = ["StopChecker"]


@dataclass(slots=True)
class _Node:
    """One state of the automaton: the longest suffix of the text so far that begins a stop string."""

    depth: int
    next: dict[str, _Node] = field(default_factory=dict)
    fail: _Node | None = None  # the next shorter such suffix; None at the root
    stop: str | None = None  # the longest stop string that ends here


class StopChecker:
    """Cuts a text stream at the first stop string.

    The first is the one that is complete first, the longest of those that end at the same character: so the outcome
    depends on the text alone, not on how the tokens cut it. Text that may be the beginning of a stop string is held
    back, and no more than that. An Aho-Corasick automaton: time proportional to the piece and the longest stop string.

    Args:
        stops: The stop strings; none is allowed, and then text passes through.
        include_stop_str: Leave the stop string that matched at the end of the text.

    Attributes:
        matched: The stop string that ended the text, or None.

    Raises:
        UsageError: a stop string is empty or not a string.

    Source: A. Aho, M. Corasick, "Efficient string matching", CACM 18(6), 1975.
    """

    def __init__(self, stops: Iterable[str] = (), *, include_stop_str: bool = False) -> None:
        self._root = _build_automaton(stops)
        self._include_stop_str = include_stop_str
        self._state = self._root
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, *, check: bool = True) -> str:
        """Take a piece of text and return what is now certain to belong to the output.

        Args:
            piece: The next text, of any length.
            check: False lets this piece through and forgets any beginning before it: for the first ``min_tokens``.

        Returns:
            Text to emit; always empty after a match.
        """
        if self.matched is not None:
            return ""
        text = self._held + piece
        if not check:
            self._held, self._state = "", self._root
            return text
        state = self._state
        for index, char in enumerate(piece, start=len(self._held)):
            state = _step(state, char)
            if state.stop is not None:
                self.matched, self._held = state.stop, ""
                return text[: index + 1 - (0 if self._include_stop_str else len(state.stop))]
        certain = len(text) - state.depth
        self._state, self._held = state, text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return the text held back: the output ended for another reason than a stop string."""
        held, self._held, self._state = self._held, "", self._root
        return held


def _step(state: _Node, char: str) -> _Node:
    while char not in state.next and state.fail is not None:
        state = state.fail
    return state.next.get(char, state)


def _build_automaton(stops: Iterable[str]) -> _Node:
    root = _Node(depth=0)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stop={stop!r}", "strings of at least one character")
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(depth=node.depth + 1))
        node.stop = stop
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.next.items():
            child.fail = root if node.fail is None else _step(node.fail, char)
            child.stop = child.stop or child.fail.stop
            queue.append(child)
    return root
