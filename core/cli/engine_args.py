"""What `qwen-rt build` takes of its own for compiled engines: --target tensorrt and tensorrt-rtx."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_rt.engine_card import CARD_FILE, ENGINE_TARGETS, EngineCard
from qwen_rt.errors import UsageError, one_line

if TYPE_CHECKING:
    from qwen_rt.export.tensorrt.options import EngineOptions

__all__ = ["add_engine_arguments", "engine_options", "library_silenced", "report_card"]

_FLAGS = ("compute_capability", "max_batch", "prefill_tokens", "timing_cache", "optimization_level")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only these targets have."""
    group = parser.add_argument_group("compiled engines (--target tensorrt, tensorrt-rtx)")
    group.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="N.N",
        help="GPUs to compile for, such as 8.9 or 8.0 8.9 12.0; none of them has to be there (default: all from 8.0 on "
        "that have the numbers of the precision). tensorrt compiles for the GPU of this machine only",
    )
    group.add_argument("--max-batch", type=int, metavar="N", help="rows that the engine takes at a time (default: 8)")
    group.add_argument(
        "--prefill-tokens",
        type=int,
        metavar="N",
        help="tokens of a prompt that the engine takes at a time; longer ones are cut (default: 1024)",
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="file that keeps what TensorRT measured (default: one for each version in ~/.cache/qwen-rt/timing); "
        "tensorrt-rtx measures nothing",
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        metavar="N",
        help="0 builds fastest, 5 searches longest (default: the library's)",
    )


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The options of an engine as they were given; the defaults for a target that has none.

    Raises:
        UsageError: One of them for another target.
    """
    from qwen_rt.export.tensorrt.options import DEFAULT_MAX_BATCH, EngineOptions

    if args.target not in ENGINE_TARGETS:
        for name in _FLAGS:
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                expected = " or ".join(f"--target {target}" for target in ENGINE_TARGETS)
                raise UsageError(f"{flag} with target {args.target}", expected, f"leave {flag} out")
        return EngineOptions()
    return EngineOptions(
        compute_capabilities=tuple(args.compute_capability or ()),
        max_batch=DEFAULT_MAX_BATCH if args.max_batch is None else args.max_batch,
        prefill_tokens=args.prefill_tokens,
        tensor_parallel=1 if args.tp is None else args.tp,
        timing_cache=args.timing_cache,
        optimization_level=args.optimization_level,
    )


def report_card(folder: Path) -> None:
    """Print what a finished bundle of engines was compiled for, and what of."""
    card = EngineCard.from_json((folder / CARD_FILE).read_bytes(), str(folder / CARD_FILE))
    print(one_line(card.summary()))
    print(one_line(f"network: {card.network_summary()}"))
    for name, layers in card.engine.items():
        print(one_line(f"{name}: {sum(layers.values())} compiled layers, " + card.listed(layers)))


@contextlib.contextmanager
def library_silenced(args: argparse.Namespace) -> Iterator[None]:
    """Keep what TensorRT prints by itself off the terminal; our progress stays, and so does all of it with --debug."""
    if args.target not in ENGINE_TARGETS or getattr(args, "debug", False):
        yield
        return
    try:
        ours = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
        is_plain = sys.stderr is not None and sys.stderr.fileno() == 2
    except (OSError, ValueError):  # no stderr, or one of a program around us
        yield
        return
    before, ends = sys.stderr, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    with ours:
        if is_plain:
            sys.stderr = ours
        os.dup2(ends, 2)
        os.close(ends)
        try:
            yield
        finally:
            os.dup2(ours.fileno(), 2)
            sys.stderr = before
