"""Measure kernels and whole models on this GPU, and hold the committed figures against the bars of an issue.

`bench kernels` times every plugin op at the shapes of the Qwen2 models, `bench latency` whole models through ONNX
Runtime: time per token by rows and by prompt, time to the first token, load time and memory; `bench peers` times other
engines beside ours. `bench timeline` shows where host and device are during decode steps. Weights are random, made on
the device. Nothing is timed before it is checked. Figures are relative to the bandwidth measured in the same run.
`bench bars` needs no GPU: it reads the committed rows and exits 1 if a bar is missed or has no row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from qwen_rt.errors import MissingDependencyError, UsageError
from qwen_rt.ops import MAX_ROWS

HELP = "measure kernels and models on this GPU, and the bars of an issue"
EPILOG = """\
example:
  qwen-rt bench kernels --model 7b --rows 1 16
  qwen-rt bench latency 1.5b 7b --picture latency.svg
  qwen-rt bench latency math-7b --prompts 128 6144
  qwen-rt bench peers 7b --vllm-python ../vllm/bin/python
  qwen-rt bench timeline 1.5b --picture timeline.svg
  qwen-rt bench bars --issue 3
"""

MODELS = ("0.5b", "1.5b", "7b", "72b")
PRECISIONS = ("bf16", "fp8", "int8", "int4")
_KERNELS_EPILOG = """\
example:
  qwen-rt bench kernels
  qwen-rt bench kernels --model 72b --rows 1 2 4 8 16 32 64 --op lm_head down_residual
"""
_LATENCY_EPILOG = """\
example:
  qwen-rt bench latency 7b
  qwen-rt bench latency 72b --layers 20 --rows 1 16 --prompts 128 --ttft 6144
  qwen-rt bench latency 7b --precision fp8 int4 --kv-cache fp8 --rows 1
  qwen-rt bench latency math-7b --output math-7b.jsonl
"""
_TIMELINE_EPILOG = """\
example:
  qwen-rt bench timeline
  qwen-rt bench timeline 7b --rows 16 --prompt 1024 --steps 12 --picture timeline.svg
  qwen-rt bench timeline math-7b --dry
"""
_BARS_EPILOG = """\
example:
  qwen-rt bench bars
  qwen-rt bench bars --issue 3 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands below `qwen-rt bench` and their options."""
    from qwen_rt.cli import peers_args

    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def command(name: str, text: str, description: str, epilog: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    _add_kernels(
        command(
            "kernels",
            "every plugin op at every Qwen2 shape",
            "Time every plugin op: µs among others of its kind and alone, GB/s, % of the read bandwidth and of the\n"
            "roofline, both measured in the same run. Each op is first compared with a float64 reference. Needs torch.",
            _KERNELS_EPILOG,
        )
    )
    _add_latency(
        command(
            "latency",
            "whole models: by rows, by prompt, first token, load, memory",
            "Time whole models on one GPU: ms a token by rows and by prompt with their ratio to the floor (bytes of\n"
            "all linear weights and the LM head over the read bandwidth), time to the first token, load time, memory,\n"
            "host time of a step. A model is a shape with random weights (" + ", ".join(MODELS) + ") or a\n"
            "bundle of target cuda. Greedy tokens of prefill and of decode steps are compared first.",
            _LATENCY_EPILOG,
        )
    )
    peers_args.add_peers_arguments(command("peers", *peers_args.TEXTS))
    _add_timeline(
        command(
            "timeline",
            "where host and device are during decode steps",
            "Record decode steps as the engine runs them: when the host launches, waits and reads, when the device\n"
            "computes; its idle time between steps, the host's time of a step, and how early a step is launched.\n"
            "Steps without events are timed beside them. Models and checks are those of `bench latency`.",
            _TIMELINE_EPILOG,
        )
    )
    _add_bars(
        command(
            "bars",
            "the newest committed rows against the bars",
            "Print a line for each bar: passed, short, or without a row. Exits 1 unless all are passed. Needs no GPU.",
            _BARS_EPILOG,
        )
    )


def rows_of(text: str) -> int:
    """Read a number of rows; argparse tells the message of the error."""
    return _number(text, 1, MAX_ROWS)


def tokens_of(text: str) -> int:
    """Read a number of tokens."""
    return _number(text, 1, 1 << 20)


def steps_of(text: str) -> int:
    """Read a number of recorded steps."""
    return _number(text, 1, 64)


def _number(text: str, low: int, high: int) -> int:
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    from qwen_rt.ops import OPS

    ops = [op.name for op in OPS]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="shapes (default: all)")
    parser.add_argument("--rows", nargs="+", type=rows_of, default=[1, 16], metavar="N", help="rows (default: 1 16)")
    parser.add_argument(
        "--prompt",
        nargs="+",
        type=tokens_of,
        default=[127],
        metavar="N",
        help="tokens before the new one (default: 127)",
    )
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"some of {', '.join(ops)}")
    parser.add_argument("--step", action="store_true", help="also time all ops of a decode step chained in one graph")
    _add_precision(parser, "bf16")
    _add_kv_cache(parser, "bf16")
    add_output(parser, "kernels")


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=["1.5b", "7b"],
        metavar="MODEL",
        help=f"{', '.join(MODELS)}, or a bundle (default: 1.5b 7b)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=rows_of,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N",
        help="rows that decode at once, at a prompt of 128 tokens (default: 1 2 4 8 16 32 64)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=tokens_of,
        default=[1, 128, 6144, 14336, 30720],
        metavar="N",
        help="prompt lengths, with the fewest rows (default: 1 128 6144 14336 30720)",
    )
    parser.add_argument(
        "--ttft",
        nargs="*",
        type=tokens_of,
        default=[6144],
        metavar="N",
        help="prompts to the first token (default: 6144)",
    )
    parser.add_argument("--layers", type=tokens_of, metavar="N", help="fewer layers than the shape has")
    _add_precision(parser, None, several=True)
    _add_kv_cache(parser, None, several=True)
    parser.add_argument(
        "--steps", type=tokens_of, default=64, metavar="N", help="decode steps of a figure (default: 64)"
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios, .svg or .png")
    add_output(parser, "latency")


def _add_precision(parser: argparse.ArgumentParser, default: str | None, *, several: bool = False) -> None:
    parser.add_argument(
        "--precision",
        nargs="+" if several else None,
        choices=PRECISIONS,
        default=default,
        help="of a shape's layers, random weights; embedding and LM head stay bf16 (default: bf16)",
    )


def _add_kv_cache(parser: argparse.ArgumentParser, default: str | None, *, several: bool = False) -> None:
    from qwen_rt.ops import KV_CACHE_FORMATS

    parser.add_argument(
        "--kv-cache",
        nargs="+" if several else None,
        choices=list(KV_CACHE_FORMATS),
        default=default,
        help="of a shape's keys and values, with random offsets where they are quantized (default: bf16)",
    )


def _add_timeline(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(MODELS)
    parser.add_argument(
        "model", nargs="?", default="1.5b", metavar="MODEL", help=f"{names}, or a bundle (default: 1.5b)"
    )
    parser.add_argument("--rows", type=rows_of, default=1, metavar="N", help="rows that decode at once (default: 1)")
    parser.add_argument("--prompt", type=tokens_of, default=128, metavar="N", help="tokens of each row (default: 128)")
    parser.add_argument("--steps", type=steps_of, default=8, metavar="N", help="steps, 1 to 64 (default: 8)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the steps, .svg")
    add_output(parser, "timeline")


def add_output(parser: argparse.ArgumentParser, benchmark: str) -> None:
    """Declare where rows go, and what is told meanwhile."""
    text = f"file that rows are appended to (default: benchmarks/results/{benchmark}.jsonl of a checkout)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    parser.add_argument("--dry", action="store_true", help="print, but write no rows")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_bars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--issue", type=tokens_of, metavar="N", help="only the bars of this issue")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="result rows (default: those of a checkout)")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="other bars than benchmarks/bars.toml")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Measure, or hold against the bars."""
    if args.what == "bars":
        return _run_bars(args)
    from qwen_rt.benchmarks import harness
    from qwen_rt.cli import peers_args

    benchmark = "latency" if args.what == "peers" else args.what
    output = None if args.dry else harness.results_file(benchmark, args.output)
    if output is None and not args.dry:
        raise UsageError("no file for the rows", "--output FILE outside a checkout", "or --dry to write none")
    runs = {"kernels": _run_kernels, "latency": _run_latency, "peers": peers_args.run_peers, "timeline": _run_timeline}
    return runs[args.what](args, output)


def _run_kernels(args: argparse.Namespace, output: Path | None) -> int:
    try:
        from qwen_rt.benchmarks import bench_kernels
    except ModuleNotFoundError as error:
        _refuse_without_torch(error)

    what = ["ops", "step"] if args.step else ["ops"]
    bench_kernels.run(
        what,
        args.model,
        args.rows,
        args.prompt,
        args.op,
        output=output,
        precision=args.precision,
        kv_format=args.kv_cache,
        quiet=args.quiet,
    )
    return 0


def _refuse_without_torch(error: ModuleNotFoundError) -> NoReturn:
    if error.name != "torch":
        raise error
    raise MissingDependencyError(
        "`bench kernels` needs torch, which is not installed", fix="pip install torch, a CUDA build of it"
    ) from None


def _run_latency(args: argparse.Namespace, output: Path | None) -> int:
    from qwen_rt.benchmarks import bench_latency

    plan = bench_latency.Plan(
        rows=tuple(sorted(set(args.rows))),
        prompts=tuple(sorted(set(args.prompts))),
        first_token_prompts=tuple(sorted(set(args.ttft))),
        steps=args.steps,
    )
    bench_latency.run(
        args.models,
        plan,
        layers=args.layers,
        precisions=args.precision or [None],
        kv_formats=args.kv_cache or [None],
        device=args.device,
        output=output,
        picture=args.picture,
        quiet=args.quiet,
    )
    return 0


def _run_timeline(args: argparse.Namespace, output: Path | None) -> int:
    from qwen_rt.benchmarks import timeline

    timeline.run(
        args.model,
        args.rows,
        args.prompt,
        args.steps,
        device=args.device,
        output=output,
        picture=args.picture,
        quiet=args.quiet,
    )
    return 0


def _run_bars(args: argparse.Namespace) -> int:
    import json

    from qwen_rt.benchmarks import bars, harness

    folder = harness.RESULTS_FOLDER if args.results is None else args.results
    if not folder.is_dir():
        raise UsageError(f"no result rows in {folder}", "a folder of .jsonl files", "pass --results of a checkout")
    try:
        rows = harness.read_rows(folder)
    except ValueError as error:
        raise UsageError(f"the rows of {folder} cannot be read: {error}", "one JSON object a line") from None
    for number, row in enumerate(rows, 1):
        if lacks := [name for name in harness.FIELDS if name not in row]:
            raise UsageError(f"row {number} of {folder} lacks {', '.join(lacks)}", "rows as benchmarks write them")
    verdicts = bars.judge(bars.load(args.bars), rows, args.issue)
    if args.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2, ensure_ascii=False))
    else:
        print(bars.render(verdicts))
    return 0 if all(verdict.state == "PASS" for verdict in verdicts) else 1
