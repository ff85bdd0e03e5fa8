"""Chat messages to prompt text, by the checkpoint's own Jinja template, rendered as transformers renders it.

A template comes with the checkpoint and is a program: it runs in jinja2's sandbox, on plain data, with a bound on the
steps it takes and on the text it writes. The bound is best effort: jinja2 cannot limit a single string operation.

Source: transformers ``utils/chat_template_utils.py``; the default template is that of Qwen/Qwen2-7B-Instruct.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qwen_rt.errors import QwenRtError, TextError, UsageError
from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["QWEN2_CHAT_TEMPLATE", "ChatTemplate"]

QWEN2_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_STEPS = 300_000  # loop iterations and calls of one rendering: a second or so
MAX_PROMPT_CHARS = 16 * 2**20  # far beyond a context of 131,072 tokens
MAX_REPEAT = 2**20  # length of a string or list made by `*`
MAX_POWER_BITS = 4096
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # plane 15: characters that no text is made of


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    Args:
        source: The Jinja source.
        variables: More names for the template, such as ``eos_token``.

    Raises:
        TextError: the source does not compile.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._variables = dict(variables or {})
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TextError(f"chat template does not compile: {error}", "a Jinja template") from error

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, name: str = "default") -> ChatTemplate:
        """Return the tokenizer's template of that name, or Qwen2's where the checkpoint brings none.

        Raises:
            TextError: no template of that name, or no template at all and a vocabulary without ``<|im_start|>``.
        """
        templates = tokenizer.chat_templates
        if name in templates:
            return cls(templates[name], variables=tokenizer.named_tokens)
        if templates:
            raise TextError(f"no chat template named {name!r}", f"one of {', '.join(sorted(templates))}")
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys():
            raise TextError(
                "the checkpoint has no chat template, and no <|im_start|> for Qwen2's default one",
                "chat_template in tokenizer_config.json",
                "use plain prompts",
            )
        return cls(QWEN2_CHAT_TEMPLATE, variables=tokenizer.named_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Return the prompt text.

        Args:
            messages: ``{"role": str, "content": str}`` each; a message with ``tool_calls`` may have no content.
            add_generation_prompt: End with the beginning of the assistant's turn.
            **extra: More names for the template: ``tools``, ``documents``, …; plain data only.

        Returns:
            The text; encode it with ``add_special_tokens=False``.

        Raises:
            UsageError: the messages are not such a list, or an extra is not plain data.
            TextError: the template raised, or went past its bounds.
        """
        _check_messages(messages)
        data = {"tools": None, "documents": None, **self._variables, **extra, "messages": list(messages)}
        return self._run(_plain(data, str), add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        allow_special: bool = False,
        **extra: Any,
    ) -> list[int]:
        """Render and encode so that the text of a message cannot end its turn or forge another.

        Special tokens that the template writes are special. Those that stand in messages or extras are encoded as the
        characters they are made of, unless ``allow_special``. Without any, the ids are exactly those of the rendered
        text.

        Args:
            tokenizer: Encodes the text.
            messages: As in :meth:`render`.
            add_generation_prompt: As in :meth:`render`.
            allow_special: Parse special tokens wherever they stand, as transformers does.
            **extra: As in :meth:`render`.

        Returns:
            The token ids.

        Raises:
            UsageError: as in :meth:`render`, or text that is not valid Unicode.
            TextError: as in :meth:`render`.
        """
        _check_messages(messages)
        guard = _SpecialTokenGuard(tokenizer.special_tokens, [self.source, *_strings([messages, extra])])
        if allow_special or not guard.needed:
            text = self.render(messages, add_generation_prompt=add_generation_prompt, **extra)
            return tokenizer.encode(text, add_special_tokens=False)
        given = _plain({"tools": None, "documents": None, **extra, "messages": list(messages)}, guard.hide)
        text = self._run({**self._variables, **given}, add_generation_prompt)
        ids: list[int] = []
        for part in guard.split(text):
            token_id = tokenizer.special_tokens.get(part)
            if token_id is None:
                ids += tokenizer.encode(guard.show(part), add_special_tokens=False, allow_special=False)
            else:
                ids.append(token_id)
        return ids

    def _run(self, data: Mapping[str, Any], add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            self._environment.start_budget()
            for piece in self._template.generate(**data, add_generation_prompt=add_generation_prompt):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise TextError("chat template wrote too much", f"at most {MAX_PROMPT_CHARS} characters")
        except QwenRtError:
            raise
        except Exception as error:  # a template may raise anything that Python code may
            kind = "" if type(error) is jinja2.TemplateError else f" ({type(error).__name__})"
            raise TextError(f"chat template failed{kind}: {error}", fix="check the messages") from error
        return "".join(pieces)


class _SpecialTokenGuard:
    """Hides special tokens of given text behind private characters, so that the template's own can be told apart."""

    def __init__(self, special_tokens: Iterable[str], texts: Sequence[str]) -> None:
        tokens = sorted(special_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")
        self.needed = any(self._pattern.search(text) for text in texts[1:])
        taken = set().union(*texts) if self.needed else set()
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
        self._hidden = dict(zip(tokens, free, strict=False))
        self._shown = str.maketrans({char: token for token, char in self._hidden.items()})

    def hide(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._hidden[match[0]], text)

    def show(self, text: str) -> str:
        return text.translate(self._shown)

    def split(self, text: str) -> list[str]:
        """Return the text cut before and after each special token, the tokens included."""
        return [part for part in re.split(f"({self._pattern.pattern})", text) if part]


# ---------------------------------------------------------------- data


def _check_messages(messages: Any) -> None:
    wanted = 'a list of {"role": "user", "content": "..."}'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages is a {type(messages).__name__}", wanted)
    if not messages:
        raise UsageError("messages is empty", wanted)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"messages[{index}] is a {type(message).__name__}", wanted)
        for key in ("role", "content"):
            value = message.get(key)
            if not isinstance(value, str) and not (key == "content" and value is None and message.get("tool_calls")):
                found = f"is a {type(value).__name__}" if key in message else "is missing"
                raise UsageError(f'messages[{index}]["{key}"] {found}', "a string")


def _plain(value: Any, change: Callable[[str], str]) -> Any:
    """Copy plain data with each string changed: a template never touches the caller's objects."""
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, change): _plain(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, change) for item in value]
    raise UsageError(f"a chat template argument is a {type(value).__name__}", "str, number, bool, list or dict")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


# ---------------------------------------------------------------- jinja


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' template environment, with a budget of steps for each rendering."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
        self._budget = threading.local()
        self.filters["tojson"] = _to_json
        self.filters["count_steps"] = self._count_steps
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def start_budget(self) -> None:
        """Give the rendering that begins on this thread its steps."""
        self._budget.steps = MAX_STEPS

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # jinja2's signature
        """Count a step for every call that a template makes, macros and recursive loops included."""
        __self._count_step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse products and powers that would fill the memory."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            too_large = left.bit_length() * right > MAX_POWER_BITS
        else:
            pairs = ((left, right), (right, left))
            too_large = any(isinstance(n, int) and hasattr(x, "__len__") and len(x) * n > MAX_REPEAT for x, n in pairs)
        if too_large:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def _count_step(self) -> None:
        self._budget.steps -= 1
        if self._budget.steps < 0:
            raise SecurityError(f"more than {MAX_STEPS} steps")

    def _count_steps(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._count_step()
            yield item

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and make every loop count its iterations."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "count_steps", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return tree


class _GenerationBlock(Extension):
    """Accepts ``{% generation %}…{% endgeneration %}``, which marks the assistant's text for training masks."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """jinja2's namespace without underscore names, which could pass for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be a template's own name
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
