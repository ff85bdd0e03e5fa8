"""Run by a Python that has optimum-onnx: greedy tokens of a folder, one prompt alone or a batch padded on the left.

stdin: {"folder": …, "batches": [[[ids], …], …], "num_tokens": N}; stdout: {"tokens": [[[ids], …], …], "versions": {…}}
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    task = json.load(sys.stdin)
    model = ORTModelForCausalLM.from_pretrained(task["folder"], local_files_only=True, use_cache=True)
    tokenizer = AutoTokenizer.from_pretrained(task["folder"], local_files_only=True)
    found = []
    for prompts in task["batches"]:
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=task["num_tokens"],
            max_new_tokens=task["num_tokens"],
        )
        found.append(out[:, width:].tolist())
    versions = {
        name: importlib.metadata.version(name) for name in ("optimum", "optimum-onnx", "onnxruntime", "transformers")
    }
    text = tokenizer.decode(tokenizer("What is 17 + 25?")["input_ids"])
    print(json.dumps({"tokens": found, "versions": versions, "text": text}))


if __name__ == "__main__":
    main()
