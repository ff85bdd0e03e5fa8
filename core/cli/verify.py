"""Compare a bundle with transformers on the checkpoint that it was built from.

Both read the same text. The bundle reads it token by token through its KV cache, transformers in one pass in float32;
the logits of every position are compared, and some positions once more through prefill. Then both continue the text
greedily. Prints a table; exits 1 if a line is out of tolerance. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "compare a bundle with transformers"
EPILOG = """\
example:
  qwen-rt verify nano-cpu
  qwen-rt verify math-1.5b --text book.txt --num-tokens 1024 --json verify.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt verify`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `qwen-rt build` wrote")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the checkpoint, if it is no longer where it was")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: a built-in one)")
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens of it (default: 256)")
    parser.add_argument("--greedy-tokens", type=int, default=256, metavar="N", help="tokens to continue (default: 256)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="target cuda: which GPU (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Verify, print the table, return 0 or 1."""
    from qwen_rt.benchmarks.verify import verify

    result = verify(
        args.bundle,
        checkpoint=args.checkpoint,
        text_file=args.text,
        num_tokens=args.num_tokens,
        greedy_tokens=args.greedy_tokens,
        num_threads=args.threads,
        device=args.device,
        quiet=args.quiet,
    )
    print(result.table())
    if args.json is not None:
        from qwen_rt.storage import atomic_write_bytes

        atomic_write_bytes(args.json, (json.dumps(result.to_dict(), indent=2) + "\n").encode())
    return 0 if result.passed else 1
