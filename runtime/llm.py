"""The Python API: load a bundle, generate, stream, chat, on the CPU or on a GPU as the bundle was built for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qwen_rt.bundle import Bundle, Check
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import BundleError, CapacityError, UsageError
from qwen_rt.runtime.chat_template import ChatTemplate
from qwen_rt.runtime.engine import Engine
from qwen_rt.runtime.outputs import RequestOutput, StreamChunk
from qwen_rt.runtime.paged_engine import PagedEngine
from qwen_rt.runtime.request import Request
from qwen_rt.runtime.sampling_params import SamplingParams, resolve_stop_tokens
from qwen_rt.runtime.session import CpuSession
from qwen_rt.runtime.tokenizer import Tokenizer
from qwen_rt.sizes import parse_size

if TYPE_CHECKING:
    from qwen_rt.runtime.tensorrt.session import TensorRtSession

__all__ = ["LLM"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A loaded bundle; where it runs is the bundle's target.

        llm = LLM("nano-cpu")
        print(llm.chat([{"role": "user", "content": "What is 17 + 25?"}]).text)

    A bundle of a GPU's target holds GPU memory until it is closed: use it as a context manager, or call `close`.

    Args:
        bundle: Folder that `qwen-rt build` wrote.
        num_threads: Target cpu: threads for one operator; 0 takes every core.
        max_num_seqs: Most requests that run at once; more wait for a free row. Target cuda: 64 at most run at once;
            an engine has a limit of its own.
        device: Targets of GPUs: number of the GPU.
        kv_memory: Targets of GPUs: memory of the KV cache, in bytes or as a text such as `8GiB`; None: what the GPU
            has left when the weights are loaded, for an engine no more than `max_num_seqs` rows.
        check: How much of the bundle to hash before it is loaded, see `Bundle.open`.
        checkpoint: Folder to take referenced shards from, if they have moved since the build.
        quiet: Report no progress of the loading on stderr.

    Attributes:
        bundle: The opened bundle.
        tokenizer: The bundle's tokenizer.
        spec: The model's hyperparameters.
        max_length: Tokens that prompt and output can have together.
        generation_config: Defaults of sampling, from `generation_config.json`.

    Raises:
        BundleError: It is no bundle, is incomplete, or was changed after the build.
        TextError: Its tokenizer cannot be read.
        UsageError: An argument that cannot be used, or that means nothing to the bundle's target.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        num_threads: int = 0,
        max_num_seqs: int = 32,
        device: int = 0,
        kv_memory: int | str | None = None,
        check: Check = "auto",
        checkpoint: str | Path | None = None,
        quiet: bool = True,
    ) -> None:
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("num_threads", num_threads, 0),
            ("device", device, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value}", f"an integer of at least {least}")
        kv_bytes = None if kv_memory is None else parse_size(kv_memory, "kv_memory")
        opened = Bundle.open(bundle, check, checkpoint)
        self.bundle = opened
        target = opened.manifest.target
        self.spec, self.max_length = opened.manifest.model, opened.manifest.max_length
        if target in ("cuda", *ENGINE_TARGETS):
            _refuse("num_threads", num_threads, 0, target, "cpu")
        else:
            _refuse("device", device, 0, target, "cuda")
            _refuse("kv_memory", kv_memory, None, target, "cuda")
        self.tokenizer = Tokenizer.from_folder(opened.path)
        self.generation_config = _read_generation_config(opened.path)
        self._template: ChatTemplate | None = None
        num_tokens = min(self.tokenizer.vocab_size, self.spec.vocab_size)
        self._engine: Engine | PagedEngine | None
        self._compiled: TensorRtSession | None = None
        if target == "cuda":
            self._engine = _load_cuda(opened, device, kv_bytes, max_num_seqs, num_tokens, quiet)
        elif target in ENGINE_TARGETS:
            self._compiled = _load_compiled(opened, device, kv_bytes, max_num_seqs)
            self._engine = Engine(self._compiled, num_tokens, self._compiled.max_rows)
        else:
            self._engine = Engine(CpuSession(opened, num_threads), num_tokens, max_num_seqs)

    @property
    def session(self) -> Any:
        """The loaded graph, of the bundle's target: a `CpuSession`, a `CudaSession` or a `TensorRtSession`."""
        engine = self._running()
        return engine.executor if isinstance(engine, PagedEngine) else engine.session

    def close(self) -> None:
        """Give the model's memory back and generate nothing more. Closing twice does nothing."""
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        finally:
            if isinstance(engine, PagedEngine):
                engine.executor.close()
            if self._compiled is not None:
                self._compiled.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> Engine | PagedEngine:
        if self._engine is None:
            raise UsageError(f"{self.bundle.path} is closed", "an open one", "load it again")
        return self._engine

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
            CapacityError: A prompt is as long as the bundle's `max_length`, or longer; or, with target cuda, it and
                its `max_tokens` are more than the KV cache holds.
            UsageError: A setting cannot be used, or the model is closed.
        """
        outputs = dict(self.generate_each(prompts, params, **overrides))
        return [outputs[index] for index in range(len(outputs))]

    def generate_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continue prompts as `generate` does; yields each prompt's number and output as soon as it has ended.

        Args:
            prompts: As in `generate`.
            params: As in `generate`.
            **overrides: As in `generate`.
        """
        requests = self._requests(self._as_prompts(prompts), params, overrides)
        chunks = self._running().run(requests)
        return ((c.index, requests[c.index].output()) for c in chunks if c.finish_reason is not None)

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
        return self._running().run(self._requests(prompts, params, overrides))

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
        if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts of type {type(prompts).__name__}", "a text, token ids, or a list of these")
        items = list(prompts)
        if not items:
            raise UsageError("no prompt", "a text, token ids, or a list of these")
        if _are_ids(items):
            return [[int(item) for item in items]]  # type: ignore[arg-type]
        encoded: list[list[int]] = []
        for item in items:
            if isinstance(item, str):
                encoded.append(self.tokenizer.encode(item))
            elif isinstance(item, Sequence) and not isinstance(item, bytes | bytearray) and _are_ids(item):
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
        many: Sequence[SamplingParams | None]
        if params is None or isinstance(params, SamplingParams):
            many = [params] * len(prompts)
        elif isinstance(params, Sequence) and all(isinstance(one, SamplingParams | None) for one in params):
            many = params
        else:
            fix = "pass temperature=0.7 and so on by name"
            raise UsageError(f"params={params!r:.80}", "SamplingParams, or a list with one for each prompt", fix)
        if len(many) != len(prompts):
            raise UsageError(f"{len(many)} sampling params for {len(prompts)} prompts", "one, or one for each prompt")
        if "stop_token_ids" in overrides:
            overrides = overrides | {"stop_token_ids": resolve_stop_tokens(self.tokenizer, overrides["stop_token_ids"])}
        capacity = self._running().capacity
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
            asked = overrides.get("max_tokens") if given is None else given.max_tokens
            if asked is None:  # the caller wants as many as fit, and the cache may hold fewer than the context
                max_tokens = max(1, min(max_tokens, capacity - len(prompt_ids)))
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


def _refuse(name: str, value: object, unset: object, target: str, wanted: str) -> None:
    """Refuse an option that was given and means nothing to the bundle's target."""
    if value != unset:
        raise UsageError(f"{name}={value} with a bundle of target {target}", f"one of target {wanted}", "leave it out")


def _load_cuda(
    bundle: Bundle, device: int, kv_memory: int | None, max_num_seqs: int, num_tokens: int, quiet: bool
) -> PagedEngine:
    from qwen_rt.ops import MAX_ROWS
    from qwen_rt.runtime.cuda.session import CudaSession  # who runs on the CPU never loads it

    session = CudaSession(
        bundle,
        device=device,
        kv_memory=kv_memory,
        max_rows=min(max_num_seqs, MAX_ROWS),
        num_tokens=num_tokens,
        quiet=quiet,
    )
    try:
        return PagedEngine(session, num_tokens, max_num_seqs, check=session.check_params)
    except BaseException:
        session.close()
        raise


def _load_compiled(bundle: Bundle, device: int, kv_memory: int | None, max_num_seqs: int) -> TensorRtSession:
    from qwen_rt.runtime.tensorrt.session import TensorRtSession

    return TensorRtSession(bundle, device=device, kv_memory=kv_memory, max_rows=max_num_seqs)


def _are_ids(items: Iterable[object]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


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
