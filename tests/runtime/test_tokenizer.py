"""Tokenizer: the files it loads, special tokens, bytes of tokens, and one clear line for every broken folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, processors

from qwen_rt.errors import TextError, UsageError
from qwen_rt.runtime.tokenizer import Tokenizer

from .byte_tokenizer import SPECIAL_TOKENS, backend, byte_tokenizer, vocabulary, write_config, write_json, write_merges

NUM_BPE = len(vocabulary())
CONFIG: dict[str, Any] = {
    "added_tokens_decoder": {
        str(NUM_BPE + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(SPECIAL_TOKENS)
    },
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "special": True},
    "bos_token": None,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}


@pytest.mark.parametrize("write", [write_json, write_merges])
@pytest.mark.parametrize("config", [None, CONFIG])
def test_both_file_formats_are_the_same_tokenizer(
    write: Callable[[Path, dict[str, Any] | None], None], config: dict[str, Any] | None, tmp_path: Path
) -> None:
    write(tmp_path, config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens == {token: NUM_BPE + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.vocab_size == NUM_BPE + 3
    text = "hello wórld<|im_end|>\r\n  12 e\u0301 don't"
    assert tokenizer.encode(text) == byte_tokenizer().encode(text)
    assert tokenizer.eos_id == (None if config is None else NUM_BPE + 2)
    assert tokenizer.pad_id == (None if config is None else NUM_BPE)
    assert tokenizer.bos_id is None


def test_added_tokens_json_of_a_checkpoint_without_a_list(tmp_path: Path) -> None:
    write_merges(tmp_path)
    added = {"<|im_end|>": NUM_BPE + 1, "<|endoftext|>": NUM_BPE}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert Tokenizer.from_folder(tmp_path).special_tokens == added


def test_config_adds_the_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    declared = dict(CONFIG["added_tokens_decoder"])
    declared[str(NUM_BPE + 3)] = {"content": "<tool_call>", "special": False, "normalized": False}
    write_json(tmp_path, CONFIG | {"added_tokens_decoder": declared, "additional_special_tokens": ["<|extra|>"]})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.added_tokens["<tool_call>"] == NUM_BPE + 3
    assert "<tool_call>" not in tokenizer.special_tokens
    assert tokenizer.special_tokens["<|extra|>"] == NUM_BPE + 4


def test_special_tokens_in_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer((AddedToken("<tool_call>", special=False),))
    text = "he<|im_end|>ll<tool_call>"
    parsed, literal = tokenizer.encode(text), tokenizer.encode(text, allow_special=False)
    assert tokenizer.special_tokens["<|im_end|>"] in parsed
    assert not tokenizer.special_ids.intersection(literal)
    assert tokenizer.added_tokens["<tool_call>"] in literal  # as transformers' split_special_tokens
    assert tokenizer.decode(literal) == text
    assert tokenizer.decode(parsed) == "hell<tool_call>"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text
    assert tokenizer.encode(text) == parsed


def test_add_special_tokens_runs_the_files_own_template() -> None:
    built = backend()
    bos = ("<|im_start|>", NUM_BPE + 1)
    built.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer = Tokenizer(built)
    assert tokenizer.encode("he")[0] == bos[1]
    assert tokenizer.encode("he", add_special_tokens=False) == tokenizer.encode("he")[1:]


def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    built = backend()
    built.enable_truncation(2)
    built.enable_padding(length=50)
    assert len(Tokenizer(built).encode("abcdef")) == 6


def test_ids_beyond_the_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    for token_id in (tokenizer.vocab_size, 152_063, -1):
        assert tokenizer.id_to_token(token_id) is None
        assert tokenizer.id_to_bytes(token_id) == b""
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("hi"), 10**12]) == "hi"


def test_bytes_of_added_tokens_are_their_text() -> None:
    tokenizer = byte_tokenizer((AddedToken("é☃ x", special=False, normalized=False),))
    assert tokenizer.id_to_bytes(tokenizer.added_tokens["é☃ x"]) == "é☃ x".encode()
    assert tokenizer.decode(tokenizer.encode("aé☃ xb")) == "aé☃ xb"


TOKENIZER = byte_tokenizer()


@settings(deadline=None)
@given(st.text())
def test_round_trip_is_nfc(text: str) -> None:
    ids = TOKENIZER.encode(text, allow_special=False)
    assert TOKENIZER.decode(ids) == TOKENIZER._backend.normalizer.normalize_str(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_decode_equals_the_librarys(ids: list[int], skip: bool) -> None:
    expected = TOKENIZER._backend.decode(ids, skip_special_tokens=skip)
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == expected


def test_encode_refuses_what_is_no_text() -> None:
    with pytest.raises(UsageError, match=r"text\[2\]='\\udc80', a lone surrogate"):
        TOKENIZER.encode("ab\udc80")
    with pytest.raises(UsageError, match="text=7"):
        TOKENIZER.encode(7)  # type: ignore[arg-type]


def test_chat_templates_of_the_config(tmp_path: Path) -> None:
    write_json(tmp_path, CONFIG | {"chat_template": "A"})
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "A"}
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write_config(tmp_path, CONFIG | {"chat_template": named})
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("C")
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "C", "tool_use": "B"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in"),
        ({"vocab.json": "{}"}, "no tokenizer in"),
        ({"tokenizer.json": ""}, "tokenizer.json"),
        ({"tokenizer.json": "[1, 2]"}, "tokenizer.json"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "UTF-8"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"}, "vocab.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "merges.txt"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": "[]"}, "holds a list; expected a JSON object"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}'}, "added_tokens_decoder"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"1": {}}}'}, "added_tokens_decoder"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": [1]}'}, "added_tokens_decoder"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"9": {"content": "<x>"}}}'}, "'<x>' has id 9; expected"),
        ({"tokenizer_config.json": '{"eos_token": 7}'}, "7 is no text"),
        ({"tokenizer_config.json": '{"additional_special_tokens": 7}'}, "additional_special_tokens"),
        ({"tokenizer_config.json": '{"chat_template": 7}'}, "chat_template"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "x"}]}'}, "chat_template"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "x", "template": 7}]}'}, "chat_template"),
    ],
)
def test_broken_files_give_one_line(files: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    if "tokenizer_config.json" in files:
        write_json(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_added_tokens_json_with_wrong_ids(tmp_path: Path) -> None:
    write_merges(tmp_path)
    for content in ('{"<x>": "1"}', '{"<x>": 5}'):
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(TextError, match=r"added_tokens\.json|has id 5"):
            Tokenizer.from_folder(tmp_path)


def test_other_kinds_of_tokenizer_are_refused() -> None:
    with pytest.raises(TextError, match="tokenizer model=WordLevel; expected Qwen2's BPE"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    built = backend()
    built.decoder = decoders.WordPiece()
    with pytest.raises(TextError, match="tokenizer decoder=WordPiece; expected Qwen2's ByteLevel"):
        Tokenizer(built)
