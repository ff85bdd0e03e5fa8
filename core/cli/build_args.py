"""What `export` and `build` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rt.bundle import Manifest
from qwen_rt.errors import one_line
from qwen_rt.progress import format_count

__all__ = ["add_build_arguments", "report"]


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare source, output and the options that both commands take."""
    source = "checkpoint folder (Hugging Face layout), portable graph, or `nano`"
    parser.add_argument("source", metavar="CHECKPOINT", help=source)
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--max-length", metavar="N", type=int, help="tokens of prompt and output together (default: the model's)"
    )
    parser.add_argument("--self-contained", action="store_true", help="copy the weights into the folder")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle or graph")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def report(manifest: Manifest, output: Path) -> int:
    """Print one line about a finished folder; returns exit code 0."""
    own = sum(entry.nbytes for entry in manifest.files.values())
    linked = sum(shard.nbytes for shard in manifest.checkpoint.shards.values())
    where = f"{format_count(own, 'B')} in {output}"
    if linked:
        where += f", {format_count(linked, 'B')} of weights stay in {manifest.checkpoint.path}"
    print(one_line(f"{manifest.target} {manifest.precision}, {manifest.model.num_layers} layers: {where}"))
    return 0
