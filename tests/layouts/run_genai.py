"""Run by a Python that has onnxruntime-genai: greedy tokens of a folder, a prompt alone or a batch padded on the right.

stdin: {"folder": …, "batches": [[[ids], …], …], "num_tokens": N}; stdout: {"tokens": [[[ids], …], …], "versions": {…}}
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    task = json.load(sys.stdin)
    model = og.Model(task["folder"])
    tokenizer = og.Tokenizer(model)
    with open(f"{task['folder']}/genai_config.json", encoding="utf-8") as file:
        pad = json.load(file)["model"]["pad_token_id"]
    found = []
    for prompts in task["batches"]:
        width = max(map(len, prompts))
        params = og.GeneratorParams(model)
        end = width + task["num_tokens"]
        params.set_search_options(max_length=end, min_length=end, batch_size=len(prompts), **task.get("search", {}))
        generator = og.Generator(model, params)
        padded = [prompt + [pad] * (width - len(prompt)) for prompt in prompts]
        generator.append_tokens(np.array(padded, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([[int(token) for token in generator.get_sequence(row)[width:]] for row in range(len(prompts))])
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    text = tokenizer.decode(tokenizer.encode("What is 17 + 25?"))
    print(json.dumps({"tokens": found, "versions": versions, "text": text}))


if __name__ == "__main__":
    main()
