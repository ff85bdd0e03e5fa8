"""Compare a bundle with transformers on the checkpoint that it was built from, and a quantized one with its weights.

Both read the same text. The bundle reads it token by token through its KV cache, transformers in one pass in float32;
the logits of every position are compared, some positions once more through prefill, and the distributions of the next
token. Then both continue the text greedily. A bundle of the nano model answers problems too.

Of a quantized bundle every matrix is compared with the checkpoint's, layer by layer, and the runtime with float32 on
the bundle's own weights. Prints tables; exits 1 if a line is out of tolerance. Needs the extras `export` and `bench`.
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
  qwen-rt verify math-1.5b-int4 --picture errors.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt verify`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `qwen-rt build` wrote")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the checkpoint, if it is no longer where it was")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: a built-in one)")
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens of it (default: 256)")
    parser.add_argument("--greedy-tokens", type=int, default=256, metavar="N", help="tokens to continue (default: 256)")
    parser.add_argument(
        "--exact-match",
        type=int,
        metavar="N",
        help="problems of the nano set to answer (default: 200 for a bundle of nano, else none)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="targets of GPUs: which one (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="quantized bundles: draw the errors by layer, .svg or .png"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Verify, print the table, return 0 or 1."""
    from qwen_rt.benchmarks.verify import verify
    from qwen_rt.benchmarks.verify_picture import check_picture, draw_errors
    from qwen_rt.bundle import Bundle
    from qwen_rt.errors import UsageError
    from qwen_rt.storage import atomic_write_bytes

    if args.picture is not None:
        check_picture(args.picture)
        if Bundle.open(args.bundle, "size", args.checkpoint).manifest.quantization is None:
            raise UsageError("--picture with a bundle of floats", "a quantized one", "leave out --picture")
    result = verify(
        args.bundle,
        checkpoint=args.checkpoint,
        text_file=args.text,
        num_tokens=args.num_tokens,
        greedy_tokens=args.greedy_tokens,
        exact_match=args.exact_match,
        num_threads=args.threads,
        device=args.device,
        quiet=args.quiet,
    )
    print(result.table())
    if args.json is not None:
        atomic_write_bytes(args.json, (json.dumps(result.to_dict(), indent=2) + "\n").encode())
    if args.picture is not None and result.gate is not None:
        draw_errors(result.gate, Path(args.bundle).name, args.picture)
    return 0 if result.passed else 1
