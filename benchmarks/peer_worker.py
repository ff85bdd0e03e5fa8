"""Another engine in a process of its own, timed at the points that `bench peers` gives it.

    python peer_worker.py KIND      KIND: vllm, ort-genai
    stdin    the task, one JSON object: `config` (a config.json), `precision`, `folder`, `points` [[rows, prompt], …],
             `first_token_prompts`, `steps`, `repeats`, `max_rows`, `max_length`
    stdout   one JSON object a line, by `event`:
             progress     text
             ready        load_s, versions {package: version}, engine {option: value}
             decode       rows, prompt, step_ms […], num_tokens, equal_share
             first_token  prompt, ms […], equal_share
             refused      rows, prompt, message: the engine raised an error there; the other points follow
             done         at the end
             missing      message: the engine is not installed here
             failed       message

`step_ms`: from one token of all rows to the next, on the host's clock, as the engine hands them out. `ms`: from sending
a prompt until its first token is there, with `steps` more tokens before the next prompt is sent. Greedy, the end token
ignored. What one row needs comes first, so that a batch which an engine cannot run costs nothing else. Before a point
is timed, a shorter request of the same shape runs; `equal_share` is how many of its tokens the timed one gave too, and
for first tokens how many of the first request's the others gave.

This file imports only the standard library and the engine of its kind: their environments have no qwen-rt.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

WARM_UP_TOKENS = 16
EXTRA_TOKENS = 16
"""Asked for beyond `steps` where several rows decode: they do not start at once, and only steps of all rows count."""

_GROUP = {"targets": ["Linear"], "output_activations": None}
_FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_FP8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = _GROUP | {"weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8": _compressed("float-quantized", _FP8_WEIGHTS, _FP8_INPUTS),
    "int4": _compressed("pack-quantized", _INT4_WEIGHTS, None),
}
"""Precision → `quantization_config` of a compressed-tensors checkpoint; embedding and LM head stay bf16."""


class Request:
    """What one batch of equal prompts gave.

    Attributes:
        first_s: Seconds until the first token of all rows.
        step_s: Seconds between tokens of all rows.
        tokens: Of every row.
    """

    def __init__(self, first_s: float, step_s: list[float], tokens: list[list[int]]) -> None:
        self.first_s, self.step_s, self.tokens = first_s, step_s, tokens


class Vllm:
    """vLLM's offline engine with dummy weights: CUDA graphs, no prefix cache, no tokenizer."""

    def load(self, task: dict[str, Any], say: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Start the engine; return versions and options."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        vllm: Any = importlib.import_module("vllm")

        config = dict(task["config"])
        if task["precision"] != "bf16":
            config["quantization_config"] = QUANTIZATION[task["precision"]]
        folder = Path(task["folder"])
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        sizes = sorted({rows for rows, _ in task["points"]} | {1})
        options: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": task["max_length"],
            "max_num_seqs": max(task["max_rows"], 1),
            "max_num_batched_tokens": max(8192, task["max_length"]),
            "gpu_memory_utilization": 0.85,
            "compilation_config": {"cudagraph_capture_sizes": sizes},
        }
        say("starting the engine, compiling, capturing graphs")
        llm = vllm.LLM(model=str(folder), skip_tokenizer_init=True, **options)
        self.llm, self.engine = llm, llm.llm_engine
        self.library = vllm
        self.delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self.count = 0
        return _versions("vllm", "torch", "transformers", "compressed-tensors", "triton", "flashinfer-python"), options

    def request(self, ids: list[int], rows: int, num_tokens: int) -> Request:
        """Send equal prompts at once and take every step of the engine; those count that give each row a token."""
        params = self.library.SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=num_tokens, detokenize=False, output_kind=self.delta
        )
        tokens: dict[str, list[int]] = {}
        start = time.perf_counter()
        for _ in range(rows):
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": ids}, params)
            tokens[str(self.count)] = []
        steps: list[tuple[float, int]] = []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            new = [(output.request_id, output.outputs[0].token_ids) for output in outputs]
            if any(part for _, part in new):
                steps.append((now, sum(len(part) == 1 for _, part in new)))
            for name, part in new:
                tokens[name if name in tokens else name.partition("-")[0]] += part  # some releases append to the name
        pairs = itertools.pairwise(steps)
        step_s = [after - before for (before, least), (after, most) in pairs if least == most == rows]
        first = next((now for now, count in steps if count == rows), steps[0][0])
        return Request(first - start, step_s, list(tokens.values()))


class OrtGenAI:
    """ONNX Runtime GenAI on CUDA, a model of its own builder from the checkpoint in `folder`; CUDA graphs."""

    def load(self, task: dict[str, Any], say: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Build the model and load it; return versions and options."""
        import onnxruntime_genai as og

        self.og = og
        folder = Path(task["folder"])
        built = folder / "onnx"
        options = {"precision": task["precision"], "execution_provider": "cuda", "enable_cuda_graph": "true"}
        say(f"building the model, {task['precision']}")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(built)]
        command += ["-p", task["precision"], "-e", "cuda", "-c", str(folder / "cache")]
        done = subprocess.run(
            [*command, "--extra_options", "enable_cuda_graph=true"], stdout=sys.stderr, stderr=sys.stderr, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the model builder ended with {done.returncode}")
        for file in folder.glob("*.safetensors"):
            file.unlink()  # room on the disk; the built model has its own
        settings = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
        settings["model"]["eos_token_id"] = [task["config"]["vocab_size"] - 1]  # an end token that hardly comes
        (built / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
        say("loading the model")
        self.model = og.Model(str(built))
        return _versions("onnxruntime-genai-cuda", "onnxruntime-genai", "onnxruntime-gpu"), options

    def request(self, ids: list[int], rows: int, num_tokens: int) -> Request:
        """Run one generator, its cache as long as needed; making it is not timed."""
        og = self.og
        params = og.GeneratorParams(self.model)
        length = len(ids) + num_tokens
        params.set_search_options(do_sample=False, batch_size=rows, max_length=length, past_present_share_buffer=True)
        generator = og.Generator(self.model, params)
        times = []
        start = time.perf_counter()
        generator.append_tokens([ids] * rows if rows > 1 else ids)
        for _ in range(num_tokens):
            generator.generate_next_token()
            times.append(time.perf_counter())
        tokens = [[int(token) for token in generator.get_sequence(row)][len(ids) :] for row in range(rows)]
        return Request(times[0] - start, [after - before for before, after in itertools.pairwise(times)], tokens)


KINDS: dict[str, type[Any]] = {"vllm": Vllm, "ort-genai": OrtGenAI}
_MODULES = {"vllm": "vllm", "ort-genai": "onnxruntime_genai"}


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class WrongOutputError(Exception):
    """What an engine gave cannot be an answer; nothing of it is timed then."""


def _alike(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of tokens that two requests have in common, as far as both reach."""
    pairs = [pair for old, new in zip(one, other, strict=True) for pair in zip(old, new)]  # noqa: B905
    return round(sum(old == new for old, new in pairs) / len(pairs), 4)


def measure(engine: Any, task: dict[str, Any], answer: Any) -> None:
    """Time every point of a task.

    Raises:
        WrongOutputError: The engine gave too few tokens, or ids outside the vocabulary.
    """
    vocab, steps = task["config"]["vocab_size"], task["steps"]

    def request(prompt: int, rows: int, num_tokens: int) -> Request:
        done: Request = engine.request([token % vocab for token in range(prompt)], rows, num_tokens)
        if [len(row) for row in done.tokens] != [num_tokens] * rows:
            given = sorted(map(len, done.tokens))
            raise WrongOutputError(f"{rows} rows gave {given} tokens instead of {num_tokens} each")
        if not all(0 <= token < vocab for row in done.tokens for token in row):
            raise WrongOutputError("a token lies outside the vocabulary")
        return done

    def decode(rows: int, prompt: int) -> None:
        before = request(prompt, rows, WARM_UP_TOKENS)
        timed = request(prompt, rows, steps + 1 + (EXTRA_TOKENS if rows > 1 else 0))
        samples = [1e3 * seconds for seconds in timed.step_s[:steps]]
        if len(samples) < steps:
            raise RuntimeError(f"only {len(samples)} of {steps} steps had a token of all {rows} rows")
        share = _alike(before.tokens, timed.tokens)
        answer("decode", rows=rows, prompt=prompt, step_ms=samples, num_tokens=steps + 1, equal_share=share)

    def first_token(rows: int, prompt: int) -> None:
        request(prompt, rows, WARM_UP_TOKENS)
        done = [request(prompt, rows, steps + 1) for _ in range(task["repeats"])]
        share = min(_alike(done[0].tokens, other.tokens) for other in done)
        answer("first_token", prompt=prompt, ms=[1e3 * one.first_s for one in done], equal_share=share)

    todo = [(decode, rows, prompt) for rows, prompt in task["points"] if rows == 1]
    todo += [(first_token, 1, prompt) for prompt in task["first_token_prompts"]]
    todo += [(decode, rows, prompt) for rows, prompt in task["points"] if rows > 1]
    for work, rows, prompt in todo:
        try:
            work(rows, prompt)
        except WrongOutputError:
            raise
        except Exception as error:
            print(f"{rows} rows, prompt {prompt}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            answer("refused", rows=rows, prompt=prompt, message=f"{type(error).__name__}: {error}")


def main(kind: str, answers: TextIO) -> None:
    """Do the task on stdin."""

    def answer(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event} | fields), file=answers, flush=True)

    def say(text: str) -> None:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
        answer("progress", text=text)

    task = json.loads(sys.stdin.readline())
    engine = KINDS[kind]()
    start = time.perf_counter()
    try:
        versions, options = engine.load(task, say)
        answer("ready", load_s=time.perf_counter() - start, versions=versions, engine=options)
        measure(engine, task, answer)
        answer("done")
    except ModuleNotFoundError as error:
        event = "missing" if error.name == _MODULES[kind] else "failed"
        answer(event, message=f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        answer("failed", message=f"{type(error).__name__}: {error}")
        raise


def _end_with_parent(interval_s: float = 1.0) -> None:
    """End this worker and its children once nobody waits for its answers: they would keep the GPU's memory."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(interval_s)
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Answers have a stdout of their own: libraries and child processes print to stderr instead.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], _answers)
