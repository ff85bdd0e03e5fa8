"""The checkpoint's tokenizer: text to token ids and back, exactly as Hugging Face's Qwen2 tokenizer does.

Qwen2 uses byte-level BPE over NFC text, adds no BOS or EOS, and keeps its special tokens (``<|im_start|>``, …) after
the BPE vocabulary. The embedding matrix has more rows than the tokenizer has tokens (151,936 or 152,064 against
151,646): the padded ids are no tokens, and decode to nothing.

Source: transformers ``models/qwen2/tokenization_qwen2.py``; the files are those of a released Qwen2 checkpoint.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from qwen_rt.errors import TextError, UsageError

__all__ = ["PRETOKENIZE_PATTERN", "Tokenizer", "build_backend"]

PRETOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # what every Qwen2 checkpoint has, in id order


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's printable stand-in character of each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """Qwen2's byte-level BPE tokenizer. Safe to share between threads.

    Attributes:
        chat_templates: The checkpoint's chat templates by name (``"default"`` unless it names several); may be empty.
        named_tokens: ``bos_token``, ``eos_token``, ``pad_token``, … as the checkpoint sets them; unset ones are absent.
        special_tokens: Every special token with its id; decoding skips these.
        special_ids: The ids of ``special_tokens``.
        added_tokens: Every token outside the BPE vocabulary with its id, special or not.
        vocab_size: One more than the largest token id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_templates: Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a loaded backend; :meth:`from_folder` is the usual way in.

        Raises:
            TextError: the backend is not byte-level BPE.
        """
        for part, value, wanted in (
            ("model", backend.model, models.BPE),
            ("decoder", backend.decoder, decoders.ByteLevel),
        ):
            if not isinstance(value, wanted):
                raise TextError(f"tokenizer {part}={type(value).__name__}", f"Qwen2's {wanted.__name__}")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._literal_backend: tokenizers.Tokenizer | None = None
        self._literal_lock = threading.Lock()
        self._bytes_of_id: dict[int, bytes] = {}
        self.chat_templates = dict(chat_templates or {})
        self.named_tokens = dict(named_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint or bundle.

        Reads ``tokenizer.json``, or ``vocab.json`` + ``merges.txt`` where it is absent; then ``tokenizer_config.json``
        (added tokens, named tokens, chat templates) and ``chat_template.jinja``, which wins over the config's template.

        Args:
            path: The folder.

        Returns:
            The tokenizer.

        Raises:
            TextError: a file is missing, unreadable, or not a byte-level BPE tokenizer.
        """
        folder = Path(path)
        config_path = folder / "tokenizer_config.json"
        config = _read_object(config_path) if config_path.is_file() else {}
        fast = folder / "tokenizer.json"
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if fast.is_file():
            backend = _load_fast(fast)
        elif vocab.is_file() and merges.is_file():
            backend = _load_merges(vocab, merges)
            if not config.get("added_tokens_decoder"):
                _add_tokens(backend, _default_added_tokens(folder / "added_tokens.json"), source=folder)
        else:
            wanted = "tokenizer.json, or vocab.json and merges.txt"
            raise TextError(f"no tokenizer in {folder}", wanted, "copy them from the checkpoint")
        _add_tokens(backend, _declared_added_tokens(config, config_path), source=config_path)
        named = _named_tokens(config, config_path)
        extra = _extra_special_tokens(config, config_path)
        _add_tokens(backend, ((None, _special(token)) for token in (*named.values(), *extra)), source=config_path)
        return cls(backend, chat_templates=_chat_templates(folder, config), named_tokens=named)

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text without lone surrogates.
            add_special_tokens: Run the tokenizer's own template, as ``tokenizer(text)`` does in transformers. Qwen2's
                adds nothing; pass False for a text that a chat template has rendered.
            allow_special: Parse ``<|im_end|>`` and the other special tokens in the text as such. False takes them as
                ordinary characters, which is transformers' ``split_special_tokens=True``: use it for untrusted text.
                Added tokens that are not special (``<tool_call>``) are parsed either way, as in transformers.

        Returns:
            The ids.

        Raises:
            UsageError: text is no string, or not valid Unicode.
        """
        if not isinstance(text, str):
            raise UsageError(f"text={text!r}", "a string")
        backend = self._backend if allow_special else self._literal()
        try:
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            index = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if index is None:
                raise
            raise UsageError(f"text[{index}]={text[index]!r}, a lone surrogate", "valid Unicode text") from None
        return list(encoding.ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        Args:
            ids: The token ids.
            skip_special_tokens: Leave out the special tokens.

        Returns:
            The text.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.id_to_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, in the vocabulary's own spelling (``"Ġthe"``, ``"<|im_end|>"``), or None."""
        try:
            token_id: int | None = self._backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, as bytes of a command line that are not UTF-8 come
            return None
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, in the vocabulary's own spelling; None for an id that is no token."""
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._backend.id_to_token(int(token_id))
        return token

    def id_to_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes of a token, which may end inside a UTF-8 character; empty for an id that is no token."""
        found = self._bytes_of_id.get(token_id)
        if found is None:
            found = self._bytes_of_id[token_id] = self._spell(token_id)
        return found

    @property
    def eos_id(self) -> int | None:
        """The id of ``eos_token``, or None."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The id of ``pad_token``, or None."""
        return self._named_id("pad_token")

    @property
    def bos_id(self) -> int | None:
        """The id of ``bos_token``, or None: Qwen2 has none."""
        return self._named_id("bos_token")

    def _named_id(self, key: str) -> int | None:
        token = self.named_tokens.get(key)
        return None if token is None else self.token_to_id(token)

    def _spell(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens or not all(char in _BYTE_OF_CHAR for char in token):
            return token.encode("utf-8")
        return bytes(_BYTE_OF_CHAR[char] for char in token)

    def _literal(self) -> tokenizers.Tokenizer:
        """Return a second backend that takes special tokens as plain text: the switch is not safe to flip per call."""
        with self._literal_lock:
            if self._literal_backend is None:
                literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
                literal.encode_special_tokens = True
                self._literal_backend = literal
            return self._literal_backend


# ---------------------------------------------------------------- files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: {error}", "a readable UTF-8 file") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{path}: {error}", "valid JSON", "download the file again") from error
    if not isinstance(value, dict):
        raise TextError(f"{path} holds a {type(value).__name__}", "a JSON object")
    return value


def _load_fast(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise TextError(f"{path}: {error}", "a tokenizer of the tokenizers library", "download it again") from error


def _load_merges(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise TextError(f"{vocab} and {merges.name}: {error}", "a BPE vocabulary and its merges") from error
    return build_backend(model)


def build_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """Return Qwen2's text pipeline around a byte-level BPE model, without special tokens, as transformers builds it."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _add_tokens(
    backend: tokenizers.Tokenizer, wanted: Iterable[tuple[int | None, AddedToken]], *, source: Path
) -> None:
    """Add the tokens that the backend lacks, and check that each has the id its file gives it."""
    wanted = list(wanted)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for _, token in wanted if token.content not in known])
    for token_id, token in wanted:
        found = backend.token_to_id(token.content)
        if token_id is not None and found != token_id:
            raise TextError(
                f"{source}: token {token.content!r} has id {token_id}", f"{found}, its place in the vocabulary"
            )


def _default_added_tokens(path: Path) -> Iterator[tuple[int | None, AddedToken]]:
    """Yield the special tokens of a checkpoint whose config lists none: ``added_tokens.json``, or Qwen2's three."""
    if not path.is_file():
        yield from ((None, _special(token)) for token in DEFAULT_SPECIAL_TOKENS)
        return
    ids = _read_object(path)
    if not all(isinstance(value, int) for value in ids.values()):
        raise TextError(f"{path}: an id is no integer", '{"token": id, ...}')
    yield from ((ids[token], _special(token)) for token in sorted(ids, key=ids.__getitem__))


def _declared_added_tokens(config: Mapping[str, Any], path: Path) -> Iterator[tuple[int | None, AddedToken]]:
    """Yield ``added_tokens_decoder`` in id order: the order of adding gives the ids."""
    declared = config.get("added_tokens_decoder") or {}
    try:
        for key, token in sorted(declared.items(), key=lambda item: int(item[0])):
            flags = {name: token.get(name, False) for name in ("lstrip", "rstrip", "single_word", "special")}
            normalized = token.get("normalized", not flags["special"])
            yield int(key), AddedToken(_content(token), normalized=normalized, **flags)
    except (ValueError, TypeError, AttributeError) as error:
        raise TextError(f"{path}: added_tokens_decoder: {error}", '{"id": {"content": "...", ...}}') from error


def _named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    try:
        return {key: _content(config[key]) for key in NAMED_TOKEN_KEYS if config.get(key)}
    except TypeError as error:
        raise TextError(f"{path}: {error}", "eos_token, pad_token, … as strings") from error


def _extra_special_tokens(config: Mapping[str, Any], path: Path) -> list[str]:
    values = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    try:
        return [_content(value) for value in (values.values() if isinstance(values, dict) else values)]
    except TypeError as error:
        raise TextError(f"{path}: additional_special_tokens: {error}", "a list of strings") from error


def _content(token: Any) -> str:
    """Return the text of a token written as a string or as ``{"content": ...}``."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise TypeError(f"{token!r} is no text")
    return content


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by name: the config's string or list of named ones, then ``chat_template.jinja``."""
    value = config.get("chat_template")
    if isinstance(value, str):
        templates = {"default": value}
    else:
        try:
            templates = {_content(entry["name"]): _content(entry["template"]) for entry in value or []}
        except (TypeError, KeyError) as error:
            wanted = 'a string, or a list of {"name": ..., "template": ...}'
            raise TextError(f"{folder / 'tokenizer_config.json'}: chat_template: {error}", wanted) from error
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        templates["default"] = _read_text(own_file)
    return templates
