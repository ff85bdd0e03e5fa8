"""Stop strings: cut at the right place however the text is split, and nothing held back longer than needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.errors import UsageError
from qwen_rt.runtime.stopping import StopChecker

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text("abc", max_size=5), max_size=8)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Reference: where the first stop string that is complete ends, and the longest one that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@settings(deadline=None)
@given(STOPS, PIECES, st.booleans())
def test_against_the_definition(stops: list[str], pieces: list[str], include: bool) -> None:
    checker = StopChecker(stops, include_stop_str=include)
    text, emitted = "", ""
    for piece in pieces:
        text += piece
        emitted += checker.push(piece)
        if checker.matched is None:
            held = text[len(emitted) :]
            longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
            assert len(held) == longest
            assert text.startswith(emitted)
    emitted += checker.flush()
    found = first_stop(text, stops)
    if found is None:
        assert (emitted, checker.matched) == (text, None)
    else:
        end, stop = found
        assert emitted == text[: end if include else end - len(stop)]
        assert checker.matched == stop
        assert include or not any(other in emitted for other in stops)


def test_a_stop_string_over_three_pieces() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert [checker.push(piece) for piece in ("4.\n", "\nUs", "ers")] == ["4.", "", "\n\nUsers"]
    assert [checker.push(piece) for piece in ("\n\nUse", "r: hi", "more")] == ["", "", ""]
    assert checker.matched == "\n\nUser:"


def test_unchecked_pieces_pass_and_are_forgotten() -> None:
    checker = StopChecker(["END"])
    assert checker.push("E") == ""
    assert checker.push("ND EN", check=False) == "END EN"
    assert checker.push("D") == "D"
    assert checker.push("xEND") == "x"
    assert checker.matched == "END"


def test_flush_starts_anew() -> None:
    checker = StopChecker(["ab"])
    assert checker.push("a") == ""
    assert checker.flush() == "a"
    assert checker.push("b") == "b"


@pytest.mark.parametrize("stops", [[""], [7], ["a", ""]])
def test_bad_stop_strings(stops: list[str]) -> None:
    with pytest.raises(UsageError, match="stop="):
        StopChecker(stops)
