r"""Let a bundle or an endpoint solve maths problems, and grade its answers.

A dataset is `nano`, the 1,000 held-out problems that ship with qwen-rt, or a jsonl file as GSM8K, MATH, MATH-500 and
Qwen2.5-Math's evaluation come: the layout is told from its first row. The model is asked in Qwen2-Math's formats: as an
instruct model to reason and put the answer within \boxed{}, or as a base model behind worked examples. math-verify
decides whether an answer equals the expected one. Needs the extra `eval`.

The folder gets answers.jsonl, one line an answer as soon as it is there, results.json and results.md. Rerun the same
command to go on where it stopped; more problems (--limit) and more samples may be asked for later. The key of an
endpoint is taken from OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_rt.cli.device_args import add_device_arguments, loading_options
from qwen_rt.errors import UsageError

if TYPE_CHECKING:
    from qwen_rt.benchmarks.eval.models import Model, Sampling

HELP = "accuracy on maths problems, of a bundle or an endpoint"
EPILOG = """\
example:
  qwen-rt eval nano-cpu --dataset nano -o nano-results
  qwen-rt eval math-7b-cuda --dataset gsm8k=gsm8k/test.jsonl --dataset math-500.jsonl --batch 64 -o math-results
  qwen-rt eval math-7b-cuda --dataset math-500.jsonl --samples 8 --temperature 0.7 --top-p 0.8 -o maj8-results
  qwen-rt eval base-7b-cuda --dataset test.jsonl --layout gsm8k --prompt few-shot --shots 4 -o base-results
  qwen-rt eval --endpoint http://127.0.0.1:8000/v1 --model math-7b --dataset nano --limit 100 -o served-results
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt eval`."""
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="folder that `qwen-rt build` wrote")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, type=Path, help="answers and results")
    parser.add_argument("--force", action="store_true", help="throw away the answers of an earlier run in the folder")
    parser.add_argument("--json", metavar="FILE", help="also write the results here (- for stdout, without the table)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--dataset",
        action="append",
        required=True,
        metavar="DATASET",
        help="nano, FILE.jsonl or NAME=FILE.jsonl; may be repeated",
    )
    group.add_argument(
        "--layout",
        metavar="LAYOUT",
        help="gsm8k, math, math-500, qwen2.5-math or qwen-rt (default: as the first row says)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each dataset")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        dest="format",
        metavar="FORMAT",
        choices=("instruct", "few-shot", "raw"),
        help="instruct (default if there is a chat template), few-shot, or raw with --prompt-file",
    )
    group.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="template with {question}: the user's message, or all of raw"
    )
    group.add_argument("--shots", type=int, metavar="N", help="worked examples of few-shot (default: 8 words, 4 maths)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end an answer before this; may be repeated")
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="tokens of an answer (default: 2048)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest tokens (default: 1)")
    group.add_argument("--samples", type=int, default=1, metavar="K", help="answers a problem, for mean@K and maj@K")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of which each answer's follows (default: 0)")
    group = parser.add_argument_group("endpoint")
    group.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible API instead of a bundle, to its /v1")
    group.add_argument("--model", metavar="NAME", help="the server's name of the model (default: its only one)")
    group.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: 8)")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds for one answer (default: 600)")
    add_device_arguments(parser).add_argument(
        "--batch", type=int, metavar="N", help="answers at once (default: 32; target cuda: at most 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    if (args.bundle is None) == (args.endpoint is None):
        raise UsageError(f"{'neither' if args.bundle is None else 'both'} BUNDLE and --endpoint", "one of the two")
    loading = {"--batch": args.batch, "--threads": args.threads, "--device": args.device}
    loading |= {"--kv-memory": args.kv_memory, "--checkpoint": args.checkpoint}
    serving = {"--model": args.model, "--concurrency": args.concurrency, "--timeout": args.timeout}
    for name, value in (serving if args.endpoint is None else loading).items():
        if value not in (None, 0):
            raise UsageError(f"{name} with {'a bundle' if args.endpoint is None else '--endpoint'}", fix="leave it out")

    from qwen_rt.benchmarks.eval.models import Sampling
    from qwen_rt.benchmarks.eval.results import table
    from qwen_rt.benchmarks.eval.run import Plan, evaluate

    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    plan = Plan(
        datasets=tuple(args.dataset),
        output=args.output,
        layout=args.layout,
        limit=args.limit,
        format=args.format,
        template_file=args.prompt_file,
        shots=args.shots,
        stop=tuple(args.stop or ()),
        sampling=sampling,
        samples=args.samples,
        force=args.force,
        quiet=args.quiet,
    )
    results = evaluate(plan, lambda: _model(args, sampling))
    document = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    if args.json == "-":
        print(document, end="")
        return 0
    print(table(results))
    if args.json is not None:
        from qwen_rt.storage import atomic_write_bytes

        atomic_write_bytes(Path(args.json), document.encode("utf-8", "backslashreplace"))
    return 0


def _model(args: argparse.Namespace, sampling: Sampling) -> Model:
    """The model that was asked for; only the modules that it needs are imported."""
    if args.endpoint is not None:
        from qwen_rt.benchmarks.eval.endpoint_model import EndpointModel

        given = {"concurrency": args.concurrency, "timeout_s": args.timeout}
        options = {name: value for name, value in given.items() if value is not None}
        return EndpointModel(args.endpoint, sampling, model=args.model, **options)
    from qwen_rt.benchmarks.eval.bundle_model import BundleModel

    loading = loading_options(args)
    loading["quiet"] = loading["quiet"] or args.quiet
    batch = 32 if args.batch is None else args.batch
    return BundleModel(args.bundle, sampling, batch=batch, loading=loading)
