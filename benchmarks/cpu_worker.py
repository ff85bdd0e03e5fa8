"""One contender in a process of its own, driven over pipes by `measure.Worker`.

    python cpu_worker.py KIND       KIND: qwen-rt, transformers, genai
    stdin   ["load", {…}]           stdout  {"answer": {"load_s": …, "versions": {…}}}
    stdin   ["generate", {…}]       stdout  {"answer": {"tokens": […], "first_s": …, "step_s": […]}}

All time the same things. `load_s`: from before the first import of a library until the model and its tokenizer are
ready. `first_s`: from the call until the first token is chosen. `step_s`: between the choices of neighbouring tokens.
This file imports only the standard library and what its kind needs: GenAI's environment has no qwen-rt.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Contender(Protocol):
    """What the driver can ask for."""

    def load(self, **options: Any) -> dict[str, Any]:
        """Load the model; returns the versions that take part."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Continue prompts greedily by exactly `num_tokens`; end tokens are ordinary tokens."""


def _versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _intervals(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


class QwenRt:
    """A bundle through the public API."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Open the bundle as `qwen-rt generate` does."""
        from qwen_rt.runtime.llm import LLM

        self.llm = LLM(model, num_threads=threads)
        self._step_ends: list[float] = []
        run = self.llm.session.run

        def timed(*arguments: Any) -> Any:
            logits = run(*arguments)
            if arguments[2].shape[1] == 1:  # input_ids int64[B, S]: a decode step
                self._step_ends.append(time.perf_counter())
            return logits

        # Between the ends of two steps lies one turn of the engine: sampling, text, bookkeeping and the graph.
        setattr(self.llm.session, "run", timed)  # noqa: B010
        return _versions("qwen-rt", "onnxruntime", "numpy") if _installed("qwen-rt") else _own_versions()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy generation by the engine."""
        from qwen_rt.runtime.sampling_params import SamplingParams

        self._step_ends.clear()
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        outputs = self.llm.generate(prompts, params)
        first_s = max(output.metrics.first_token_s for output in outputs)
        return {
            "tokens": [list(output.token_ids) for output in outputs],
            "first_s": first_s,
            "step_s": _intervals(self._step_ends),
        }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _own_versions() -> dict[str, str]:
    from qwen_rt._version import __version__

    return _versions("onnxruntime", "numpy") | {"qwen-rt": __version__}


class Transformers:
    """`generate` of transformers on torch."""

    def load(self, model: str, dtype: str, threads: int, attention: str = "sdpa") -> dict[str, Any]:
        """Load the checkpoint in `dtype`, with its tokenizer, as the qwen-rt bundle has one too."""
        import torch
        import transformers

        library: Any = transformers  # some releases are typed, some are not
        library.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.library = torch, library
        self.tokenizer = library.AutoTokenizer.from_pretrained(model)
        self.model = library.Qwen2ForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        self.model.generation_config.eos_token_id = None  # generate all tokens that are asked for
        self.model.generation_config.pad_token_id = 0
        return _versions("torch", "transformers", "numpy")

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Left-padded greedy generation; a stopping criterion that never stops notes the time of each token."""
        torch = self.torch
        ends: list[float] = []

        def clock(input_ids: Any, scores: Any, **unused: Any) -> Any:
            ends.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        start = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                use_cache=True,
                max_new_tokens=num_tokens,
                stopping_criteria=self.library.StoppingCriteriaList([clock]),
            )
        return {"tokens": out[:, longest:].tolist(), "first_s": ends[0] - start, "step_s": _intervals(ends)}


class GenAI:
    """ONNX Runtime GenAI on a model of its own builder."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load model and tokenizer. Its config is changed in memory: threads, and an end token that hardly comes."""
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(model)
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        last = json.loads(Path(model, "genai_config.json").read_text())["model"]["vocab_size"] - 1
        config.overlay(json.dumps({"model": {"decoder": decoder, "eos_token_id": [last]}}))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        return _versions("onnxruntime-genai", "onnxruntime", "numpy")

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy search with a cache of exactly the needed length."""
        og = self.og
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("prompts of one length only")
        times = []
        start = time.perf_counter()
        params = og.GeneratorParams(self.model)
        length = len(prompts[0]) + num_tokens
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=length, past_present_share_buffer=True
        )
        generator = og.Generator(self.model, params)
        generator.append_tokens(prompts if len(prompts) > 1 else prompts[0])
        for _ in range(num_tokens):
            generator.generate_next_token()
            times.append(time.perf_counter())
        tokens = [[int(t) for t in generator.get_sequence(row)][len(prompts[0]) :] for row in range(len(prompts))]
        return {"tokens": tokens, "first_s": times[0] - start, "step_s": _intervals(times)}


KINDS: dict[str, type[Any]] = {"qwen-rt": QwenRt, "transformers": Transformers, "genai": GenAI}


def _memory() -> dict[str, float]:
    """Resident memory in MB (1e6 bytes): the peak so far, and now in anonymous pages and in file pages."""
    names = {"VmHWM": "peak_rss_mb", "RssAnon": "anon_mb", "RssFile": "file_mb"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024 / 1e6
    return found


def main() -> None:
    """Answer requests until stdin ends. Answers have a stdout of their own: libraries print to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = KINDS[sys.argv[1]]()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            if method == "load":
                start = time.perf_counter()
                versions = contender.load(**arguments)
                answer: dict[str, Any] = {"load_s": time.perf_counter() - start, "versions": versions} | _memory()
            elif method == "memory":
                answer = _memory()
            else:
                answer = contender.generate(**arguments)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        else:
            print(json.dumps({"answer": answer}), file=answers, flush=True)


if __name__ == "__main__":
    main()
