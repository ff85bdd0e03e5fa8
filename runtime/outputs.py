"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_rt.runtime.sampler import TokenLogprobs

__all__ = ["RequestMetrics", "RequestOutput", "StreamChunk"]


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock seconds of one request, from the call that submitted it.

    Attributes:
        first_token_s: Until its first token was chosen.
        finished_s: Until its last one was.
    """

    first_token_s: float
    finished_s: float


@dataclass(frozen=True)
class StreamChunk:
    """What one step adds to one request.

    Attributes:
        index: Which request of the call.
        text: New text, whole characters; may be empty.
        token_id: The token that was chosen.
        finish_reason: None while it runs; then `stop` (a stop token or stop string) or `length`.
    """

    index: int
    text: str
    token_id: int
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt_token_ids: The prompt as the model saw it.
        text: Generated text, without stop string and special tokens.
        token_ids: Generated tokens, a final stop token included.
        finish_reason: `stop` or `length`.
        stop_reason: The stop string or stop token id that ended it; None for `length`.
        logprobs: One entry a token, if asked for.
        metrics: Timing.
    """

    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None
    metrics: RequestMetrics
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
