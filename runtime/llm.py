"""The Python API: load a bundle, generate, stream, chat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.bundle import Bundle, Check
from qwen_rt.errors import BundleError, CapacityError, UsageError
from qwen_rt.runtime.chat_template import ChatTemplate
from qwen_rt.runtime.engine import Engine
from qwen_rt.runtime.outputs import RequestOutput, StreamChunk
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampling_params import SamplingParams, resolve_stop_tokens
from qwen_rt.runtime.session import CpuSession
from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["LLM"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A loaded bundle.

        llm = LLM("nano-cpu")
        print(llm.chat([{"role": "user", "content": "What is 17 + 25?"}]).text)

    Args:
        bundle: Folder that `qwen-rt build` wrote.
        num_threads: Threads for one operator; 0 takes every core.
        max_num_seqs: Most requests that run at once; more wait for a free row.
        check: How much of the bundle to hash before it is loaded, see `Bundle.open`.
        checkpoint: Folder to take referenced shards from, if they have moved since the build.

    Attributes:
        tokenizer: The bundle's tokenizer.
        spec: The model's hyperparameters.
        max_length: Tokens that prompt and output can have together.
        generation_config: Defaults of sampling, from `generation_config.json`.
        session: The graph, for those who want logits rather than text.

    Raises:
        BundleError: It is no bundle, is incomplete, or was changed after the build.
        TextError: Its tokenizer cannot be read.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        num_threads: int = 0,
        max_num_seqs: int = 32,
        check: Check = "auto",
        checkpoint: str | Path | None = None,
    ) -> None:
        if isinstance(max_num_seqs, bool) or not isinstance(max_num_seqs, int) or max_num_seqs < 1:
            raise UsageError(f"max_num_seqs={max_num_seqs}", "an integer of at least 1")
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 0:
            raise UsageError(f"num_threads={num_threads}", "an integer of at least 0")
        opened = Bundle.open(bundle, check, checkpoint)
        self.bundle = opened
        self.spec, self.max_length = opened.manifest.model, opened.manifest.max_length
        self.tokenizer = Tokenizer.from_folder(opened.path)
        self.generation_config = _read_generation_config(opened.path)
        self.session = CpuSession(opened, num_threads)
        num_tokens = min(self.tokenizer.vocab_size, self.spec.vocab_size)
        self._engine = Engine(self.session, num_tokens, max_num_seqs)
        self._template: ChatTemplate | None = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: A text, a list of token ids, or a list of these.
            params: Settings for all, or one for each prompt; None takes the model's `generation_config.json`.
            **overrides: Fields of `SamplingParams` that win over the model's defaults, without `params`.

        Returns:
            One output for each prompt, in order.

        Raises:
            CapacityError: A prompt is as long as the bundle's `max_length`, or longer.
            UsageError: A setting cannot be used.
        """
        requests = self._requests(self._as_prompts(prompts), params, overrides)
        for _ in self._engine.run(requests):
            pass
        return [request.output() for request in requests]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> Iterator[StreamChunk]:
        """Continue one prompt, or answer one conversation; yields every piece of text as soon as it is certain.

        Args:
            prompt: A text, token ids, or a list of messages.
            params: As in `generate`.
            **overrides: As in `generate`.
        """
        if isinstance(prompt, str) or not _is_messages(prompt):
            prompts = self._as_prompts(prompt)  # type: ignore[arg-type]
        else:
            prompts = [self.encode_chat(prompt)]  # type: ignore[arg-type]
        if len(prompts) != 1:
            raise UsageError(f"{len(prompts)} prompts", "one prompt to stream", "use generate for several")
        return self._engine.run(self._requests(prompts, params, overrides))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> RequestOutput:
        """Answer a conversation, rendered by the model's chat template.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": str}` each.
            params: As in `generate`.
            **overrides: As in `generate`.
        """
        return self.generate(self.encode_chat(messages), params, **overrides)[0]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt tokens of a conversation; special tokens in its messages count as plain text."""
        if self._template is None:
            self._template = ChatTemplate.from_tokenizer(self.tokenizer)
        return self._template.encode(self.tokenizer, messages)

    def _as_prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            return [self.tokenizer.encode(prompts)]
        items = list(prompts)
        if not items:
            raise UsageError("no prompt", "a text, token ids, or a list of these")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return [[int(item) for item in items]]  # type: ignore[arg-type]
        encoded: list[list[int]] = []
        for item in items:
            if isinstance(item, str):
                encoded.append(self.tokenizer.encode(item))
            elif isinstance(item, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in item):
                encoded.append([int(i) for i in item])
            else:
                raise UsageError(f"prompt of type {type(item).__name__}", "a text or a list of token ids")
        return encoded

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        overrides: dict[str, Any],
    ) -> list[Request]:
        if params is not None and overrides:
            raise UsageError(f"params and {min(overrides)}", "one of the two", "put it into SamplingParams")
        many = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(many) != len(prompts):
            raise UsageError(f"{len(many)} sampling params for {len(prompts)} prompts", "one, or one for each prompt")
        if "stop_token_ids" in overrides:
            overrides = overrides | {"stop_token_ids": resolve_stop_tokens(self.tokenizer, overrides["stop_token_ids"])}
        requests = []
        for index, (prompt_ids, given) in enumerate(zip(prompts, many, strict=True)):
            room = self._room(prompt_ids)
            if given is None:
                settings = SamplingParams.from_generation_config(
                    self.generation_config, num_prompt_tokens=len(prompt_ids), **overrides
                )
            elif not given.eos_token_ids:
                settings = dataclasses.replace(given, eos_token_ids=self._eos_token_ids())
            else:
                settings = given
            resolve_stop_tokens(self.tokenizer, settings.stop_token_ids)
            max_tokens = room if settings.max_tokens is None else min(settings.max_tokens, room)
            requests.append(Request(index, prompt_ids, settings, max_tokens, self.tokenizer))
        return requests

    def _room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens can follow a prompt."""
        if not prompt_ids:
            raise UsageError("the prompt has no token", "at least one", "write something")
        bad = next((i for i in prompt_ids if not 0 <= i < self.spec.vocab_size), None)
        if bad is not None:
            raise UsageError(f"prompt token {bad}", f"a token id from 0 to {self.spec.vocab_size - 1}")
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(prompt_ids)} tokens",
                f"at most {self.max_length - 1}, one less than the bundle's max_length",
                "shorten it, or build the bundle with a larger --max-length",
            )
        return room

    def _eos_token_ids(self) -> tuple[int, ...]:
        return SamplingParams.from_generation_config(self.generation_config).eos_token_ids


def _is_messages(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json`, or what config.json says of the end of a sequence where there is none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON: {error}", fix="build the bundle again") from None
        if not isinstance(found, dict):
            raise BundleError(f"{path} holds {type(found).__name__}", "an object", "build the bundle again")
        return found if name == "generation_config.json" else {"eos_token_id": found.get("eos_token_id")}
    return {}
