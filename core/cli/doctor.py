"""Say what this machine can run, what is missing, and how to get it.

Lists processor, memory, GPUs and drivers, ONNX Runtime's providers, TensorRT flavours, nvcc and the packages that
matter, then every target as ready or not, each with the command that makes it ready.
"""

from __future__ import annotations

import argparse
import json

HELP = "what this machine can run, and what is missing"
EPILOG = """\
example:
  qwen-rt doctor
  qwen-rt doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Look around and print."""
    from qwen_rt import doctor

    report = doctor.collect()
    print(json.dumps(report.to_dict(), indent=2) if args.json else doctor.render(report))
    return 0
