"""optimum and ONNX Runtime GenAI, from the registry, load our folders and write what transformers writes."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen_rt.export.layouts.folder import export_layout

from . import environments

NUM_TOKENS = 64
QUESTIONS = (
    "What is 123 * 45?",
    "Grace buys 23 cards at $6 each and pays with $200. How much change does Grace get?",
    "What is 17 + 25?",
)
NANO = Path(str(importlib.resources.files("qwen_rt.nano") / "config.json")).parent


class Reference(NamedTuple):
    """Prompts, and the tokens with which transformers goes on: alone, in float32, greedy, never ending."""

    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The portable graph of a copy of nano: hard links to the package itself would stay, and onnx refuses those."""
    from qwen_rt.export.build import BuildOptions, build

    folder = tmp_path_factory.mktemp("layouts")
    shutil.copytree(NANO, folder / "nano")
    build(str(folder / "nano"), folder / "portable", BuildOptions(target="portable", quiet=True))
    return folder / "portable"


@pytest.fixture(scope="module")
def reference() -> Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(NANO, local_files_only=True)
    prompts = [tokenizer(_chat(tokenizer, question))["input_ids"] for question in QUESTIONS]
    prompts.append(tokenizer("7")["input_ids"])
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        limits: dict[str, Any] = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        tokens.append(out[0, len(prompt) :].tolist())
    return Reference(prompts, tokens)


def _chat(tokenizer: Any, question: str) -> str:
    """A question as nano was trained on it."""
    content = f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


@pytest.mark.slow
@pytest.mark.parametrize("layout", environments.SEES_OURS)
def test_the_tokens_are_those_of_transformers(
    layout: str, reference: Reference, portable: Path, tmp_path: Path
) -> None:
    """Each prompt alone, then all in one batch, which optimum pads on the left and GenAI on the right."""
    environments.python_of(layout)
    export_layout(portable, tmp_path / layout, layout, quiet=True)
    prompts, expected = reference
    task = {"folder": str(tmp_path / layout), "num_tokens": NUM_TOKENS}
    found = environments.run(layout, task | {"batches": [[prompt] for prompt in prompts] + [prompts]})
    pins = (environments.ROOT / f"requirements/layout-{layout}.txt").read_text("utf-8")
    for name, version in found["versions"].items():
        if pin := re.search(rf"^{name}==(.+)$", pins, re.MULTILINE):
            assert version == pin[1]
    assert found["text"] == "What is 17 + 25?"
    *alone, together = found["tokens"]
    assert alone == [[tokens] for tokens in expected]
    assert together == expected


@pytest.mark.slow
def test_genai_without_a_shared_cache_buffer(reference: Reference, portable: Path, tmp_path: Path) -> None:
    """What the session does when a reader of the folder turns the setting off."""
    environments.python_of("genai")
    export_layout(portable, tmp_path / "genai", "genai", quiet=True)
    search = {"past_present_share_buffer": False}
    task = {"folder": str(tmp_path / "genai"), "num_tokens": NUM_TOKENS, "search": search}
    assert environments.run("genai", task | {"batches": [reference.prompts]})["tokens"] == [reference.tokens]
