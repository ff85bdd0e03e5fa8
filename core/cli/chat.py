"""Talk to a bundle.

Type a message and press Enter. Ctrl-C stops an answer and keeps what was said (before the first word it takes the
message back); at the prompt it clears the line. /reset forgets the conversation, /history shows it, /exit (or Ctrl-D)
leaves. Arrow keys recall earlier lines.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from qwen_rt.cli.device_args import add_device_arguments, loading_options
from qwen_rt.cli.generate import BOXED
from qwen_rt.cli.sampling_args import add_sampling_arguments, sampling_overrides
from qwen_rt.errors import CapacityError, TextError, UsageError, one_line

if TYPE_CHECKING:
    from qwen_rt.runtime.llm import LLM

HELP = "talk to a bundle"
EPILOG = """\
example:
  qwen-rt chat nano-cpu --boxed
  qwen-rt chat math-7b-cuda --device 1 --kv-memory 4GiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt chat`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `qwen-rt build` wrote")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's own)")
    parser.add_argument("--boxed", action="store_true", help="ask for reasoning and a boxed answer, as Qwen2-Math does")
    add_sampling_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load the bundle and hold the conversation."""
    from qwen_rt.runtime.llm import LLM
    from qwen_rt.runtime.sampling_params import SamplingParams, resolve_stop_tokens

    with LLM(args.bundle, max_num_seqs=1, **loading_options(args)) as llm:
        overrides = sampling_overrides(args)
        if "stop_token_ids" in overrides:
            overrides["stop_token_ids"] = resolve_stop_tokens(llm.tokenizer, overrides["stop_token_ids"])
        # what the first answer would refuse is refused now
        SamplingParams.from_generation_config(llm.generation_config, **overrides)
        if _interactive():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # line editing and recall for input()
            print("Type a message; /reset, /history, /exit. Ctrl-C stops an answer.", file=sys.stderr)
        suffix = BOXED if args.boxed else ""
        return converse(llm, args.system, suffix, overrides, between_tokens=llm.bundle.manifest.target != "cpu")


def converse(
    llm: LLM, system: str | None, suffix: str, overrides: dict[str, Any], *, between_tokens: bool = False
) -> int:
    """Read messages until end of input; returns exit code 0.

    Args:
        llm: The model.
        system: The system message, or None.
        suffix: Goes behind every message.
        overrides: Sampling options.
        between_tokens: Let Ctrl-C stop an answer between two tokens only. A GPU answers within milliseconds, and what
            was launched there must be noted before anything else happens.
    """
    first = [{"role": "system", "content": system}] if system is not None else []
    messages = list(first)
    with _CtrlC(_interactive()) as ctrl_c:
        while (line := _read_line(ctrl_c)) not in (None, "/exit"):
            if not line:
                continue
            if line == "/reset":
                messages = list(first)
                print("(conversation forgotten)", file=sys.stderr)
            elif line == "/history":
                for message in messages:
                    print(f"{message['role']}: {message['content']}", file=sys.stderr)
            elif line.startswith("/"):
                print(f"unknown command {one_line(line)}; /reset, /history or /exit", file=sys.stderr)
            else:
                messages = _turn(llm, messages, line + suffix, overrides, ctrl_c, between_tokens)
    return 0


def _interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


class _CtrlC:
    """Ctrl-C on a terminal: an exception where a block allows it, once, and nothing anywhere else.

    Whenever and however often it is pressed, the program stays up and the conversation whole. Where input comes from a
    pipe, Ctrl-C means what it always does.
    """

    def __init__(self, on_terminal: bool) -> None:
        self._on_terminal, self._allowed, self._noting, self._noted = on_terminal, False, False, False

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._previous = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *error: object) -> None:
        if self._on_terminal:
            signal.signal(signal.SIGINT, self._previous)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt
        self._noted = self._noting

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let it raise `KeyboardInterrupt`; to be entered inside the `try` that catches it."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Let it be noted, for `check` to raise; to be entered inside the `try` that catches it."""
        self._noting, self._noted = True, False
        try:
            yield
        finally:
            self._noting = self._noted = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if it was pressed in this `noted` block."""
        if self._noted:
            self._noted = False
            raise KeyboardInterrupt


def _read_line(ctrl_c: _CtrlC) -> str | None:
    """Return the next message or command; None at the end of input, "" where there is nothing to do."""
    try:
        with ctrl_c.allowed():
            return input("> " if _interactive() else "").strip()
    except (EOFError, RuntimeError):  # RuntimeError: stdin was closed by whoever started us
        if _interactive():
            print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        if not _interactive():
            raise
        print(file=sys.stderr)
    except UnicodeDecodeError as error:
        problem = UsageError(f"the message cannot be read: {error}", "UTF-8 text")
        if not _interactive():
            raise problem from None
        print(f"qwen-rt: {problem}", file=sys.stderr)
    return ""


def _turn(
    llm: LLM,
    messages: list[dict[str, str]],
    text: str,
    overrides: dict[str, Any],
    ctrl_c: _CtrlC,
    between_tokens: bool,
) -> list[dict[str, str]]:
    """Answer one message; returns the conversation, as it was if there is no answer."""
    asked = [*messages, {"role": "user", "content": text}]
    pieces: list[str] = []
    try:
        with ctrl_c.noted() if between_tokens else ctrl_c.allowed():
            for chunk in llm.stream(asked, **overrides):
                ctrl_c.check()
                pieces.append(chunk.text)
                print(chunk.text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        if not _interactive():
            raise
        print(" [stopped]")
        if not pieces:
            return messages
    except CapacityError as error:
        print(f"qwen-rt: {error}; /reset starts anew", file=sys.stderr)
        return messages
    except (UsageError, TextError) as error:
        if not _interactive():
            raise
        print(f"qwen-rt: {error}", file=sys.stderr)
        return messages
    return [*asked, {"role": "assistant", "content": "".join(pieces)}]
