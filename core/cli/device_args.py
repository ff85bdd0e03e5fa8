"""Options of `generate` and `chat` that say how a bundle is loaded: threads, the GPU and its cache, the weights."""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["add_device_arguments", "loading_options"]


def add_device_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the options of loading; which of them apply depends on the bundle's target. Returns their group."""
    group = parser.add_argument_group("loading")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="target cpu: threads (default: all cores)")
    group.add_argument("--device", type=int, default=0, metavar="N", help="targets of GPUs: which one (default: 0)")
    group.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="targets of GPUs: memory of the KV cache, in bytes or as 8GiB or 24GB (default: what the weights leave "
        "free); a request that does not fit waits, or is refused if it never can",
    )
    group.add_argument("--checkpoint", metavar="FOLDER", help="where the weights are, if they have moved")
    return group


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options as arguments of `LLM`; loading shows its progress on a terminal only."""
    return {
        "num_threads": args.threads,
        "device": args.device,
        "kv_memory": args.kv_memory,
        "checkpoint": args.checkpoint,
        "quiet": sys.stderr is None or not sys.stderr.isatty(),
    }
