"""Talk to a bundle.

Type a message and press Enter. Ctrl-C stops an answer and keeps what was said; at the prompt it clears the line.
/reset forgets the conversation, /history shows it, /exit (or Ctrl-D) leaves. Arrow keys recall earlier lines.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from qwen_rt.cli.generate import BOXED
from qwen_rt.cli.sampling_args import add_sampling_arguments, sampling_overrides
from qwen_rt.errors import CapacityError

if TYPE_CHECKING:
    from qwen_rt.runtime.llm import LLM

HELP = "talk to a bundle"
EPILOG = """\
example:
  qwen-rt chat nano-cpu --boxed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt chat`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `qwen-rt build` wrote")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's own)")
    parser.add_argument("--boxed", action="store_true", help="ask for reasoning and a boxed answer, as Qwen2-Math does")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load the bundle and hold the conversation."""
    from qwen_rt.runtime.llm import LLM

    llm = LLM(args.bundle, num_threads=args.threads, max_num_seqs=1, checkpoint=args.checkpoint)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and recall for input()
        print("Type a message; /reset, /history, /exit. Ctrl-C stops an answer.", file=sys.stderr)
    return converse(llm, args.system, BOXED if args.boxed else "", sampling_overrides(args))


def converse(llm: LLM, system: str | None, suffix: str, overrides: dict[str, Any]) -> int:
    """Read messages until end of input; returns exit code 0."""
    first = [{"role": "system", "content": system}] if system is not None else []
    messages = list(first)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if not line:
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            messages = list(first)
            print("(conversation forgotten)", file=sys.stderr)
        elif line == "/history":
            for message in messages:
                print(f"{message['role']}: {message['content']}", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line}; /reset, /history or /exit", file=sys.stderr)
        else:
            messages.append({"role": "user", "content": line + suffix})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, overrides)})
            except CapacityError as error:
                messages.pop()
                print(f"qwen-rt: {error}; /reset starts anew", file=sys.stderr)


def _answer(llm: LLM, messages: list[dict[str, str]], overrides: dict[str, Any]) -> str:
    """Stream one answer; Ctrl-C ends it early."""
    pieces: list[str] = []
    stream = llm.stream(messages, **overrides)
    try:
        for chunk in stream:
            pieces.append(chunk.text)
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(pieces)
