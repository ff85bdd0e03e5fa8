"""Show what is in a bundle, a portable graph or a checkpoint.

Model, target, precision, files with their sizes, operators of the graph; --layers adds a row for every layer.
Reads headers and the graph only: a 72B checkpoint takes no time.
"""

from __future__ import annotations

import argparse
import json

HELP = "what is in a bundle, a graph or a checkpoint"
EPILOG = """\
example:
  qwen-rt inspect nano --layers
  qwen-rt inspect nano-cpu --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt inspect`."""
    parser.add_argument("path", metavar="FOLDER", help="bundle, portable graph or checkpoint (or `nano`)")
    parser.add_argument("--layers", action="store_true", help="add a row for every layer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from qwen_rt.inspection import inspect

    found = inspect(args.path)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.render(args.layers))
    return 0
