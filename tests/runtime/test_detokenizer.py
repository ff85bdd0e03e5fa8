"""Streaming detokenization: the pieces joined are the full decode, whatever the ids."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from qwen_rt.runtime.detokenizer import IncrementalDetokenizer
from qwen_rt.runtime.tokenizer import Tokenizer

from .byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(
    (AddedToken("<tool_call>", special=False), AddedToken("é☃", special=False, normalized=False))
)
BYTE_TO_ID = {TOKENIZER.id_to_bytes(i): i for i in range(256)}


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def ids_of(data: bytes) -> list[int]:
    return [BYTE_TO_ID[bytes([byte])] for byte in data]


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 20)), st.booleans())
def test_random_ids(ids: list[int], skip: bool) -> None:
    assert "".join(stream(TOKENIZER, ids, skip=skip)) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_random_text(text: str, as_bytes: bool) -> None:
    ids = ids_of(text.encode()) if as_bytes else TOKENIZER.encode(text)
    pieces = stream(TOKENIZER, ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    if as_bytes:
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_replaced_as_in_one_go(data: bytes) -> None:
    assert "".join(stream(TOKENIZER, ids_of(data))) == data.decode("utf-8", "replace")


def test_characters_come_out_whole() -> None:
    assert stream(TOKENIZER, ids_of("a€😀".encode())) == ["a", "", "", "€", "", "", "", "😀", ""]


def test_a_refuted_beginning_comes_out_as_soon_as_it_is_refuted() -> None:
    assert stream(TOKENIZER, ids_of(b"\xf0\x9f\x98A\xe2")) == ["", "", "", "\ufffdA", "", "\ufffd"]


def test_special_tokens_do_not_break_a_character() -> None:
    first, second = ids_of("é".encode())
    im_end = TOKENIZER.special_tokens["<|im_end|>"]
    assert "".join(stream(TOKENIZER, [first, im_end, second])) == "é"
    assert "".join(stream(TOKENIZER, [first, im_end, second], skip=False)) == "\ufffd<|im_end|>\ufffd"


def test_flush_begins_a_new_text() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    half = ids_of("é".encode())[0]
    assert detokenizer.push(half) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ids_of(b"a")[0]) == "a"
    assert detokenizer.flush() == ""
