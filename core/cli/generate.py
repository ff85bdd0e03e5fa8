r"""Answer a prompt with a bundle; the text appears as it is generated.

The prompt is put into the model's chat template as a user message; --raw continues it as plain text instead, and
--boxed appends Qwen2-Math's instruction to reason step by step and to put the answer within \boxed{}. Several prompts
(--file, one a line) run as one batch. Without a prompt it is read from stdin.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_rt.cli.device_args import add_device_arguments, loading_options
from qwen_rt.cli.sampling_args import add_sampling_arguments, sampling_overrides
from qwen_rt.errors import UsageError

if TYPE_CHECKING:
    from qwen_rt.runtime.llm import LLM
    from qwen_rt.runtime.outputs import RequestOutput

HELP = "answer prompts with a bundle"
EPILOG = """\
example:
  qwen-rt generate nano-cpu --boxed "What is 123 * 45?"
  qwen-rt generate nano-cpu --boxed --file questions.txt --json answers.jsonl
  qwen-rt generate math-7b-cuda --file questions.txt --batch 64 --kv-memory 24GiB --stats
  echo "Once upon a time" | qwen-rt generate BUNDLE --raw --temperature 0.8 --seed 1
"""

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qwen-rt generate`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `qwen-rt build` wrote")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt (default: stdin)")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line; empty lines are skipped"
    )
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--boxed", action="store_true", help="ask for reasoning and a boxed answer, as Qwen2-Math does")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a prompt (- for stdout)")
    parser.add_argument("--stats", action="store_true", help="print tokens and timing to stderr")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="prompts at once (default: 32; target cuda: at most 64)"
    )
    add_sampling_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load the bundle and answer."""
    if args.raw and (args.boxed or args.system):
        raise UsageError("--raw with --boxed or --system", "one or the other")
    prompts = _prompts(args)
    from qwen_rt.runtime.llm import LLM

    with LLM(args.bundle, max_num_seqs=args.batch, **loading_options(args)) as llm:
        return _answer(llm, prompts, args)


def _answer(llm: LLM, prompts: list[str], args: argparse.Namespace) -> int:
    encoded = [llm.tokenizer.encode(p) if args.raw else llm.encode_chat(_messages(p, args)) for p in prompts]
    overrides = sampling_overrides(args)
    to_stdout = args.json is not None and str(args.json) == "-"
    if len(encoded) == 1 and args.json is None and not args.stats:
        for chunk in llm.stream(encoded[0], **overrides):
            print(chunk.text, end="", flush=True)
        print()
        return 0
    outputs = llm.generate(encoded, **overrides)
    if not to_stdout:
        for prompt, output in zip(prompts, outputs, strict=True):
            print(output.text if len(prompts) == 1 else f"> {prompt}\n{output.text}\n")
    if args.json is not None:
        lines = "".join(
            json.dumps(_record(p, o), ensure_ascii=False) + "\n" for p, o in zip(prompts, outputs, strict=True)
        )
        if to_stdout:
            sys.stdout.write(lines)
        else:
            from qwen_rt.storage import atomic_write_bytes

            atomic_write_bytes(args.json, lines.encode())
    if args.stats:
        print(_stats(llm, outputs), file=sys.stderr)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.file is not None and args.prompt is not None:
        raise UsageError("a prompt and --file", "one of the two")
    if args.prompt is not None:
        prompts = [args.prompt]
    elif args.file is not None:
        try:
            lines = args.file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--file {args.file} cannot be read: {error}", "a UTF-8 text file") from None
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = [_read_stdin().rstrip("\n")]
    if not prompts or not all(prompts):
        raise UsageError("no prompt", "some text", 'qwen-rt generate BUNDLE "PROMPT"')
    return [prompt + BOXED if args.boxed else prompt for prompt in prompts]


def _read_stdin() -> str:
    try:
        return sys.stdin.read() if sys.stdin is not None else ""  # None: closed by whoever started us
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin cannot be read: {error}", f"{sys.stdin.encoding} text") from None


def _messages(prompt: str, args: argparse.Namespace) -> list[dict[str, str]]:
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def _record(prompt: str, output: RequestOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": prompt,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "token_ids": list(output.token_ids),
        "metrics": dataclasses.asdict(output.metrics),
    }
    if output.logprobs:
        record["logprobs"] = [
            {"logprob": t.logprob, "top": [[int(i), float(p)] for i, p in zip(t.top_ids, t.top_logprobs, strict=True)]}
            for t in output.logprobs
        ]
    return record


def _stats(llm: LLM, outputs: list[RequestOutput]) -> str:
    tokens = sum(len(output.token_ids) for output in outputs)
    elapsed_s = max(output.metrics.finished_s for output in outputs)
    first_ms = 1e3 * min(output.metrics.first_token_s for output in outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return (
        f"{prompt} prompt tokens, {tokens} generated in {elapsed_s:.2f} s ({tokens / elapsed_s:.1f} tok/s), "
        f"first token after {first_ms:.0f} ms, {len(outputs)} requests on {llm.bundle.manifest.target}"
    )
