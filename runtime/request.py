"""One request on its way: its prompt, what it has generated, and whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qwen_rt.runtime.detokenizer import IncrementalDetokenizer
from qwen_rt.runtime.outputs import RequestMetrics, RequestOutput, StreamChunk
from qwen_rt.runtime.sampler import TokenLogprobs
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.runtime.stopping import StopChecker
from qwen_rt.runtime.tokenizer import Tokenizer

__all__ = ["Request"]


class Request:
    """A prompt and the tokens chosen after it.

    Args:
        index: Its number in the call.
        prompt_ids: Prompt tokens, at least one.
        params: Settings; `max_tokens` is the number of tokens that fit.
        max_tokens: Tokens to generate at most.
        tokenizer: Turns tokens into text.

    Attributes:
        sampler_row: The sampler's number for it, once it runs.
        finish_reason: None while it runs.
    """

    def __init__(
        self, index: int, prompt_ids: Sequence[int], params: SamplingParams, max_tokens: int, tokenizer: Tokenizer
    ) -> None:
        self.index, self.prompt_ids, self.params, self.max_tokens = index, tuple(prompt_ids), params, max_tokens
        self.output_ids: list[int] = []
        self.sampler_row = -1
        self.finish_reason: str | None = None
        self._stop_reason: str | int | None = None
        self._stop_ids = params.all_stop_token_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopChecker(params.stop, include_stop_str=params.include_stop_str_in_output)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._start = time.perf_counter()
        self._first_token_s = self._finished_s = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> StreamChunk:
        """Take the next token; decides whether the request has ended and which text is now certain."""
        now = time.perf_counter() - self._start
        if not self.output_ids:
            self._first_token_s = now
        self._finished_s = now
        self.output_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        num_outputs = len(self.output_ids)
        if token_id in self._stop_ids:  # before min_tokens the sampler never chooses one
            self.finish_reason, self._stop_reason = "stop", token_id
            text = self._flush()
        else:
            text = self._stops.push(self._detokenizer.push(token_id), check=num_outputs >= self.params.min_tokens)
            if self._stops.matched is None and num_outputs == self.max_tokens:
                self.finish_reason = "length"
                text += self._flush()
            if self._stops.matched is not None:
                self.finish_reason, self._stop_reason = "stop", self._stops.matched
        self._text.append(text)
        return StreamChunk(self.index, text, token_id, self.finish_reason)

    def _flush(self) -> str:
        """The text held back for the end of a character or of a stop string."""
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()

    def output(self) -> RequestOutput:
        """The finished request."""
        return RequestOutput(
            prompt_token_ids=self.prompt_ids,
            text="".join(self._text),
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason or "length",
            stop_reason=self._stop_reason,
            metrics=RequestMetrics(self._first_token_s, self._finished_s),
            logprobs=tuple(self._logprobs),
        )
