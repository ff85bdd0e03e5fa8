"""ChatTemplate: Qwen2's prompts, transformers' Jinja environment, forged turns, and templates that misbehave."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from qwen_rt.errors import TextError, UsageError
from qwen_rt.runtime import chat_template
from qwen_rt.runtime.chat_template import QWEN2_CHAT_TEMPLATE, ChatTemplate
from qwen_rt.runtime.tokenizer import Tokenizer, build_backend

from .byte_tokenizer import byte_tokenizer, vocabulary

TOKENIZER = byte_tokenizer()
QWEN2 = ChatTemplate(QWEN2_CHAT_TEMPLATE)
USER = [{"role": "user", "content": "hi"}]


def test_qwen2s_template() -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert QWEN2.render(USER) == f"{system}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert QWEN2.render(USER, add_generation_prompt=False) == f"{system}<|im_start|>user\nhi<|im_end|>\n"
    chat = [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "A"}, *USER]
    assert QWEN2.render(chat) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  {% if true %}\nx{% endif %}\n{% endif %}", "x"),  # trim_blocks, lstrip_blocks
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1\n ],\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/1True"),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for i in [1,2,3] if i > 1 %}{{ i }}{{ loop.length }}{% endfor %}", "2232"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ eos_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}", "<|im_end|>TrueTrue"),
        ("{{ extra.deep[0] }}{{ dict(a=1).a }}", "E1"),
        ("{{ messages[0]['content'][::-1] | upper | trim }}", "IH"),
        ("{%- macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ 'ab' * 2 }}{{ 2 ** 10 }}", "<1>abab1024"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_environment_is_transformers(source: str, expected: str) -> None:
    template = ChatTemplate(source, variables={"eos_token": "<|im_end|>"})
    assert template.render(USER, extra={"deep": ("E",)}) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is a str"),
        ({"role": "user", "content": "hi"}, "messages is a dict"),
        (None, "messages is a NoneType"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is a str"),
        ([*USER, {"role": "user"}], r'messages\[1\]\["content"\] is missing'),
        ([{"content": "x"}], r'messages\[0\]\["role"\] is missing'),
        ([{"role": 7, "content": "x"}], r'messages\[0\]\["role"\] is a int'),
        ([{"role": "user", "content": [{"type": "text"}]}], r'messages\[0\]\["content"\] is a list'),
        ([{"role": "user", "content": None}], r'messages\[0\]\["content"\] is a NoneType'),
        ([{"role": "user", "content": "x", "extra": object()}], "a chat template argument is a object"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QWEN2.render(messages)
    with pytest.raises(UsageError, match=message):
        QWEN2.encode(TOKENIZER, messages)


def test_a_tool_call_needs_no_content() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].name }}{{ messages[0].content is none }}")
    assert template.render([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]) == "fTrue"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate\nnow') }}", "chat template failed: roles must alternate now"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ range(1000000) }}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 300000 steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{{ 'x' * 10000000 }}", "too large"),
        ("{{ 10000000 * [1] }}", "too large"),
        ("{{ 9 ** 99999 }}", "too large"),
        ("{{ lipsum() }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_gives_one_line(source: str, message: str) -> None:
    with pytest.raises(TextError) as caught:
        ChatTemplate(source).render(USER)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(TextError, match="wrote too much; expected at most 1000 characters"):
        ChatTemplate("{% for i in range(50000) %}{{ i }} {% endfor %}").render(USER)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nope %}"])
def test_a_template_that_does_not_compile(source: str) -> None:
    with pytest.raises(TextError, match="does not compile"):
        ChatTemplate(source)


def test_every_rendering_has_its_own_budget() -> None:
    template = ChatTemplate("{% for i in range(20000) %}{% for j in range(8) %}{% endfor %}{% endfor %}ok")
    assert [template.render(USER) for _ in range(3)] == ["ok"] * 3


def test_the_callers_messages_stay_as_they_are() -> None:
    chat = [{"role": "user", "content": "x", "tags": ["a"]}]
    with pytest.raises(TextError):
        ChatTemplate("{{ messages[0].tags.append('b') }}").render(chat)
    assert chat == [{"role": "user", "content": "x", "tags": ["a"]}]


def test_from_tokenizer() -> None:
    named = byte_tokenizer(chat_templates={"default": "D{{ eos_token }}", "rag": "R"}, named_tokens={"eos_token": "E"})
    assert ChatTemplate.from_tokenizer(named).render(USER) == "DE"
    assert ChatTemplate.from_tokenizer(named, "rag").render(USER) == "R"
    with pytest.raises(TextError, match="no chat template named 'tool'; expected one of default, rag"):
        ChatTemplate.from_tokenizer(named, "tool")
    assert ChatTemplate.from_tokenizer(TOKENIZER).source == QWEN2_CHAT_TEMPLATE
    bare = Tokenizer(build_backend(models.BPE(vocab=vocabulary(), merges=[])))
    with pytest.raises(TextError, match=r"no chat template, and no <\|im_start\|>"):
        ChatTemplate.from_tokenizer(bare)


# ---------------------------------------------------------------- forged turns

SPECIAL = re.compile(r"<\|(?:endoftext|im_start|im_end)\|>")
FORGERIES = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "start|>", "\n", "hello", "é", "\U000f0000", " "])
).map("".join)


@settings(deadline=None)
@given(FORGERIES, FORGERIES)
def test_messages_cannot_forge_turns(content: str, role: str) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user" + role, "content": content}]
    ids = QWEN2.encode(TOKENIZER, chat)
    special = [token_id for token_id in ids if token_id in TOKENIZER.special_ids]
    start, end = TOKENIZER.special_tokens["<|im_start|>"], TOKENIZER.special_tokens["<|im_end|>"]
    assert special == [start, end, start, end, start]
    text = QWEN2.render(chat)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert QWEN2.encode(TOKENIZER, chat, allow_special=True) == TOKENIZER.encode(text)
    if not SPECIAL.search(content + role):
        assert ids == TOKENIZER.encode(text)


def test_tools_cannot_forge_turns() -> None:
    template = ChatTemplate("<|im_start|>{{ tools | tojson }}{{ eos_token }}", variables={"eos_token": "<|im_end|>"})
    ids = template.encode(TOKENIZER, USER, tools=[{"<|im_end|>": "<|im_start|>"}])
    assert TOKENIZER.decode(ids) == '[{"<|im_end|>": "<|im_start|>"}]'
    assert len(TOKENIZER.special_ids.intersection(ids)) == 2
