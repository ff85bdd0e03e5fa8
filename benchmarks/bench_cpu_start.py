r"""From launching a process to the first byte of text: `qwen-rt generate` beside the same question to transformers.

Every run is a new process: interpreter, imports, loading, prompt and first token. Files are in the page cache. Before
the timing, both must print the same answer.

    python -m qwen_rt.benchmarks.bench_cpu_start
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_rt.benchmarks import harness
from qwen_rt.benchmarks.cpu_contest import number_from
from qwen_rt.benchmarks.measure import first_byte_seconds, num_cores, package_python
from qwen_rt.benchmarks.nano.heldout import load
from qwen_rt.benchmarks.nano.prompts import INSTRUCTION
from qwen_rt.errors import QwenRtError
from qwen_rt.export.build import BuildOptions, build

NAME = "cpu_start"
MAX_FIRST_TEXT_S = 2.0

_PEER = """
import sys
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM, TextStreamer
from transformers.utils import logging
logging.disable_progress_bar()
folder, question, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
chat = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
with torch.inference_mode():
    model.generate(**inputs, do_sample=False, streamer=streamer)
"""


def run(args: argparse.Namespace, folder: Path) -> int:
    """Build the bundle, check, time in turn, write two rows; returns the exit code."""
    started = harness.new_run()
    bundle = folder / "nano-cpu"
    manifest = build("nano", bundle, BuildOptions(quiet=True))
    question = load()[0]["question"]
    threads = ["--threads", str(args.threads)]
    commands = {
        "qwen-rt": package_python("-m", "qwen_rt", "generate", str(bundle), "--boxed", *threads, question),
        "transformers fp32": package_python(
            "-c", _PEER, manifest.checkpoint.path, f"{question}\n{INSTRUCTION}", str(args.threads)
        ),
    }
    texts = {name: first_byte_seconds(command)[1].strip() for name, command in commands.items()}
    passed = texts["qwen-rt"] == texts["transformers fp32"] and bool(texts["qwen-rt"])
    check = {"passed": passed, "what": "both print the same answer", "num_characters": len(texts["qwen-rt"])}
    if not passed:
        raise QwenRtError(f"the answers differ: {texts}", fix="no number then")
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            samples[name].append(first_byte_seconds(command)[0])
    missed = False
    for name, seconds in samples.items():
        settings = {"model": "nano", "prompt": "one held-out question", "threads": args.threads}
        bars = None
        if name == "qwen-rt":
            bars = {"first_text_s": harness.bar(harness.percentile(seconds, 0.5), MAX_FIRST_TEXT_S)}
            missed = not bars["first_text_s"]["met"]
        metrics = {"first_text_s": harness.summarize(seconds)}
        print(f"{name}: {metrics['first_text_s']}")
        harness.write_row(NAME, name, metrics, settings, check=check, run=started, bars=bars, folder=args.results)
    return int(missed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Seconds from launch to the first byte of text.")
    parser.add_argument("--runs", type=number_from(1), default=7, help="processes of each (default: 7)")
    parser.add_argument(
        "--threads", type=number_from(1), default=num_cores(), help="threads of both (default: all cores)"
    )
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--results", type=Path, help="folder of result rows (default: benchmarks/results)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            return run(args, Path(folder))
    except QwenRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
