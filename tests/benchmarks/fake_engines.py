"""Stand-ins for other engines: a worker that answers as a test wants, and packages named like the engines."""

from __future__ import annotations

import textwrap
from pathlib import Path

ANSWERS = """
import json, os, subprocess, sys, time

task = json.loads(sys.stdin.readline())


def answer(event, **fields):
    print(json.dumps({"event": event} | fields), flush=True)


def ready():
    print("loading", file=sys.stderr, flush=True)
    answer("progress", text="loading")
    answer("ready", load_s=2.5, versions={"python": "3.12", sys.argv[1]: "9.8"}, engine={"graphs": True})


def points():
    for rows, prompt in task["points"]:
        answer("decode", rows=rows, prompt=prompt, step_ms=[4.0] * task["steps"], num_tokens=9, equal_share=0.5)
    for prompt in task["first_token_prompts"]:
        answer("first_token", prompt=prompt, ms=[20.0] * task["repeats"], equal_share=1.0)
"""
"""Start of a worker."""

FAKE_VLLM = {
    "vllm/sampling_params.py": """
        class RequestOutputKind:
            DELTA = "delta"
        """,
    "vllm/__init__.py": """
        import json, os, pathlib, types


        class SamplingParams:
            def __init__(self, **given):
                self.__dict__.update(given)


        class Engine:
            def __init__(self):
                self.left, self.waiting = {}, []

            def add_request(self, name, prompt, params):
                assert params.ignore_eos and params.temperature == 0.0 and params.output_kind == "delta"
                self.waiting.append((name, params.max_tokens))
                return name + "-inside"

            def has_unfinished_requests(self):
                return bool(self.left or self.waiting)

            def step(self):
                for name, count in self.waiting[:2]:  # two requests start in each step
                    self.left[name] = count
                del self.waiting[:2]
                gone = [name for name, count in self.left.items() if count == 1]
                outputs = []
                for name in self.left:
                    self.left[name] -= 1
                    part = types.SimpleNamespace(token_ids=[TOKEN])
                    outputs.append(types.SimpleNamespace(request_id=name, outputs=[part]))
                for name in gone:
                    del self.left[name]
                return outputs


        TOKEN = int(os.environ.get("FAKE_TOKEN", "7"))


        class LLM:
            def __init__(self, model, **options):
                print("vllm prints on stdout")
                config = json.loads(pathlib.Path(model, "config.json").read_text())
                assert options["load_format"] == "dummy" and options["skip_tokenizer_init"]
                assert not options["enable_prefix_caching"]
                if os.environ.get("FAKE_FAILURE"):
                    raise RuntimeError("no kernel for " + str(config.get("quantization_config", {}).get("format")))
                self.llm_engine = Engine()
        """,
}

FAKE_GENAI = {
    "onnxruntime_genai/models/__init__.py": "",
    "onnxruntime_genai/models/builder.py": """
        import json, pathlib, sys

        options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert options["-e"] == "cuda" and "enable_cuda_graph=true" in sys.argv
        source = pathlib.Path(options["-i"])
        assert list(source.glob("*.safetensors")) and (source / "tokenizer.json").is_file()
        built = pathlib.Path(options["-o"])
        built.mkdir()
        print("built", options["-p"])
        (built / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 1}}))
        """,
    "onnxruntime_genai/__init__.py": """
        import json, os, pathlib


        class Model:
            def __init__(self, folder):
                config = json.loads(pathlib.Path(folder, "genai_config.json").read_text())
                assert config["model"]["eos_token_id"] == [151935], config


        class GeneratorParams:
            def __init__(self, model):
                self.options = {}

            def set_search_options(self, **options):
                self.options = options


        class Generator:
            def __init__(self, model, params):
                self.rows, self.length = params.options["batch_size"], params.options["max_length"]
                self.tokens = []

            def append_tokens(self, ids):
                assert isinstance(ids[0], list) == (self.rows > 1)
                if self.rows > 1 and os.environ.get("FAKE_NO_BATCH"):
                    raise RuntimeError("batch_size must be 1")
                self.tokens = [list(row) for row in (ids if self.rows > 1 else [ids])]

            def generate_next_token(self):
                for row in self.tokens:
                    row.append(5)
                assert len(self.tokens[0]) <= self.length

            def get_sequence(self, row):
                return self.tokens[row]
        """,
}


def write_worker(folder: Path, body: str) -> Path:
    """Write a worker that reads its task and then does what `body` says."""
    file = folder / "worker.py"
    file.write_text(ANSWERS + textwrap.dedent(body), encoding="utf-8")
    return file


def write_package(folder: Path, files: dict[str, str]) -> Path:
    """Write a package's files; returns the folder for PYTHONPATH."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
    return folder
