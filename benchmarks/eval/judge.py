r"""The process in which math-verify runs: a request a line on stdin, a reply a line on stdout, both JSON.

    {"equal": [a, b]}      → {"value": true | false}
    {"extract": text}      → {"value": answer | null}

What a model writes may make a computer algebra system work for hours (``10^{10^{10}}``), in code that no Python signal
handler interrupts. So each request has CPU seconds, after which the kernel ends this process (SIGPROF), and the process
has an upper limit of memory. The parent takes the end of the process for an answer that cannot be decided.

    python -P -m qwen_rt.benchmarks.eval.judge CPU_SECONDS
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MAX_MEMORY_BYTES = 4 << 30


def main() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes stdin
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify  # a second of imports: before any clock runs

    seconds = float(sys.argv[1])
    _reply(replies, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            value = _equal(parse, verify, *request["equal"]) if "equal" in request else _extract(parse, request)
        except Exception:  # whatever it stumbled on, it is no answer that anybody can read
            value = False if "equal" in request else None
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, value)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _reply(replies: Any, value: object) -> None:
    replies.write(json.dumps({"value": value}) + "\n")
    replies.flush()


def _equal(parse: Any, verify: Any, expected: str, found: str) -> bool:
    """Compare two answers; math-verify's own time limits, which need signal handlers, are off."""
    gold, target = (parse(f"${text}$", parsing_timeout=None) for text in (expected, found))
    return bool(verify(gold, target, timeout_seconds=None))


def _extract(parse: Any, request: dict[str, str]) -> str | None:
    """Find an answer in a text that marks none."""
    found = parse(request["extract"], parsing_timeout=None)
    return str(found[-1]) if found else None


if __name__ == "__main__":
    main()
