"""Options that cannot be used: exit code 2, one line that says what would have been right, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Cli
from .kit import HOSTILE, child, names

SAMPLING = {
    "temperature": (["--temperature", "-1"], ("temperature=-1", "expected a finite number of at least 0")),
    "temperature nan": (["--temperature", "nan"], ("temperature=nan", "expected a finite number")),
    "temperature inf": (["--temperature", "inf"], ("temperature=inf", "expected a finite number")),
    "temperature word": (["--temperature", "hot"], ("--temperature", "invalid float value: 'hot'", "--help")),
    "top-p": (["--top-p", "1.5"], ("top_p=1.5", "expected a number above 0 and at most 1")),
    "top-p zero": (["--top-p", "0"], ("top_p=0", "expected")),
    "top-k": (["--top-k", "-3"], ("top_k=-3", "expected")),
    "min-p": (["--min-p", "2"], ("min_p=2", "expected")),
    "repetition": (["--repetition-penalty", "0"], ("repetition_penalty=0", "expected")),
    "presence": (["--presence-penalty", "3"], ("presence_penalty=3", "expected")),
    "frequency": (["--frequency-penalty", "-3"], ("frequency_penalty=-3", "expected")),
    "max-tokens": (["--max-tokens", "0"], ("max_tokens=0", "expected an integer of at least 1")),
    "max-tokens word": (["--max-tokens", "1.5"], ("--max-tokens", "invalid int value", "--help")),
    "min above max": (["--max-tokens", "2", "--min-tokens", "3"], ("min_tokens=3", "expected at most max_tokens=2")),
    "seed": (["--seed", "-1"], ("seed=-1", "expected")),
    "seed huge": (["--seed", str(2**64)], ("seed=", "expected")),
    "logprobs": (["--logprobs", "99"], ("logprobs=99", "expected")),
    "stop": (["--stop", ""], ("stop=", "expected strings of at least one character")),
    "stop-token text": (["--stop-token", "<|im_stop|>"], ("stop token", "expected a single token", "did you mean")),
    "stop-token id": (["--stop-token", "999999"], ("stop token 999999", "expected 0 to")),
    "stop-token huge": (["--stop-token", "9" * 40], ("stop token 9", "expected")),
    "stop-token controls": (["--stop-token", HOSTILE], ("stop token", "expected a single token")),
    "stop-token bytes": (["--stop-token", "caf\udce9"], ("lone surrogate", "expected valid Unicode text")),
    "bias shape": (["--logit-bias", "17"], ("--logit-bias 17", "expected TOKEN_ID:NUMBER")),
    "bias words": (["--logit-bias", "a:b"], ("--logit-bias a:b", "expected TOKEN_ID:NUMBER")),
    "bias range": (["--logit-bias", "17:1e9"], (r"logit_bias\[17\]", "expected a number from -100 to 100")),
    "bias nan": (["--logit-bias", "17:nan"], (r"logit_bias\[17\]", "expected")),
    "bias token": (["--logit-bias", "999999:1"], ("999999", "expected")),
    "bias negative token": (["--logit-bias=-1:1"], ("logit_bias token=-1", "expected a token id")),
    "threads": (["--threads", "-1"], ("threads", "expected an integer of at least 0")),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling_values_out_of_range(case: str, bundle: Path, workplace: Path, cli: Cli) -> None:
    options, words = SAMPLING[case]
    cli("generate", bundle, "hi", *options, "--json", "out.jsonl").refused(2, *words)
    # Before the first message, but for what only the sampler knows: the size of the vocabulary.
    cli("chat", bundle, *options, stdin="hi\n" if case == "bias token" else "").refused(2, *words)
    assert names(workplace) == set()


def test_prompts_that_cannot_be_used(bundle: Path, workplace: Path, cli: Cli) -> None:
    (workplace / "blank").write_text("\n  \n")
    (workplace / "latin").write_bytes(b"caf\xe9\n")
    (workplace / "file").write_text("hi\n")
    cli("generate", bundle, "").refused(2, "no prompt", "expected some text", "qwen-rt generate BUNDLE")
    cli("generate", bundle, stdin="").refused(2, "no prompt", "expected some text")
    cli("generate", bundle, stdin="\n\n").refused(2, "no prompt", "expected some text")
    cli("generate", bundle, "--file", "blank").refused(2, "no prompt")
    cli("generate", bundle, stdin=b"caf\xe9").refused(2, "stdin cannot be read", "expected utf-8 text")
    cli("generate", bundle, "--file", "latin").refused(2, "latin cannot be read", "expected a UTF-8 text file")
    cli("generate", bundle, "--file", "absent").refused(2, "absent cannot be read", "No such file", "expected a UTF-8")
    cli("generate", bundle, "--file", f"{HOSTILE}/x").refused(2, "cannot be read", "expected a UTF-8 text file")
    cli("generate", bundle, "--file", workplace).refused(2, "Is a directory", "expected a UTF-8 text file")
    cli("generate", bundle, "--file", "file", "hi").refused(2, "a prompt and --file", "expected one of the two")
    cli("generate", bundle, "--raw", "--boxed", "hi").refused(2, "--raw with --boxed", "expected one or the other")
    cli("generate", bundle, "caf\udce9").refused(2, "Unicode|UTF-8")
    cli("generate", bundle, "hi", "--batch", "0").refused(2, "expected an integer of at least 1")
    assert names(workplace) == {"blank", "latin", "file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(bundle: Path, workplace: Path, cli: Cli) -> None:
    (workplace / "secret").write_text("hi\n")
    (workplace / "secret").chmod(0)
    cli("generate", bundle, "--file", "secret").refused(2, "Permission denied", "expected a UTF-8 text file")


def test_a_prompt_longer_than_the_cache(graph: Path, workplace: Path, cli: Cli) -> None:
    assert cli("build", graph, "-o", "short", "--max-length", "16", "--quiet").code == 0
    long = "1 + " * 20
    words = (r"the prompt has \d+ tokens", "expected at most 15, one less than the bundle's max_length", "--max-length")
    cli("generate", "short", long).refused(2, *words)
    cli("generate", "short", "--raw", long, "--json", "out").refused(2, *words)
    cli("generate", "short", "--file", "absent").refused(2, "absent")
    assert names(workplace) == {"short"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-length", "0"], ("max-length=0", "expected 1 to 2048, the model's context length", "choose")),
        (["--max-length", "-5"], ("max-length=-5", "expected 1 to 2048")),
        (["--max-length", "2049"], ("max-length=2049", "expected 1 to 2048", "choose a smaller")),
        (["--max-length", "9" * 5000], ("--max-length|max-length=",)),
        (["--max-length", "long"], ("--max-length", "invalid int value: 'long'", "see qwen-rt build --help")),
        (
            ["--precision", "fp6"],
            ("--precision", "invalid choice: 'fp6'", "one of 'auto', 'fp32'|auto, fp32", "--help"),
        ),
        (["--precision", HOSTILE], ("--precision", "invalid choice")),
        (["--target", "gpu"], ("--target", "invalid choice: 'gpu'", "'cpu', 'cuda'|cpu, cuda", "--help")),
        (
            ["--target", "cuda", "--precision", "fp16"],
            ("precision=fp16 for target cuda", "expected bf16", "leave out --precision"),
        ),
        (["--target", "cuda", "--precision", "fp32"], ("precision=fp32 for target cuda", "expected bf16")),
        (["--target", "cuda", "--max-length", "2049"], ("max-length=2049", "expected 1 to 2048")),
        (["--nonsense"], ("unrecognized arguments: --nonsense", "--help")),
        (["more"], ("unrecognized arguments: more", "--help")),
    ],
)
def test_build_options(options: list[str], words: tuple[str, ...], graph: Path, workplace: Path, cli: Cli) -> None:
    cli("build", graph, "-o", "out", *options).refused(2, *words)
    assert names(workplace) == set()


def test_usage(bundle: Path, workplace: Path, cli: Cli) -> None:
    cli("buidl", "nano").refused(2, "invalid choice: 'buidl'", "did you mean build", "see qwen-rt --help")
    cli("frobnicate").refused(2, "invalid choice: 'frobnicate'", "one of .*inspect", "--help")
    cli(HOSTILE).refused(2, "invalid choice", "--help")
    cli("it's").refused(2, "invalid choice", "--help")
    cli("build", "nano").refused(2, "required: -o/--output", "see qwen-rt build --help")
    cli("build").refused(2, "required: CHECKPOINT, -o/--output", "--help")
    cli("generate").refused(2, "required: BUNDLE", "see qwen-rt generate --help")
    cli("generate", bundle, "a", "b").refused(2, "unrecognized arguments: b; see qwen-rt generate --help")
    cli("inspect").refused(2, "required: FOLDER")
    child(["generat", "x"], cwd=workplace).refused(2, "did you mean generate")
    assert names(workplace) == set()


def test_output_paths_in_the_way(graph: Path, workplace: Path, cli: Cli) -> None:
    (workplace / "file").write_text("mine")
    (workplace / "full").mkdir()
    (workplace / "full" / "thesis.tex").write_text("mine")
    cli("build", graph, "-o", "file").refused(
        1, "file exists and is a file", "expected a new or empty folder", "choose"
    )
    cli("build", graph, "-o", "file", "--force").refused(1, "is a file", "expected", "choose another path")
    cli("build", graph, "-o", "full").refused(1, "exists and is not empty", "expected a new or empty folder", "--force")
    cli("build", graph, "-o", "full", "--force").refused(1, "holds no manifest.json", "expected a folder that qwen")
    cli("build", graph, "-o", "no/parent").refused(
        1, "no is not a folder", "expected an existing folder", "run mkdir -p"
    )
    cli("build", graph, "-o", "file/x").refused(1, "is not a folder", "expected an existing folder")
    cli("build", graph, "-o", "x" * 300).refused(1, "too long", "shorter")
    cli("build", graph, "-o", f"no{HOSTILE}/out").refused(1, "is not a folder", "expected an existing folder")
    cli("build", graph, "-o", ".").refused(1, "working folder|not empty")
    assert names(workplace) == {"file", "full"}
    assert (workplace / "file").read_text() == "mine"
    assert names(workplace / "full") == {"thesis.tex"}


def test_output_may_not_replace_what_is_read(packed: Path, workplace: Path, cli: Cli) -> None:
    """`build graph -o graph --force` would make a bundle that refers to files it has just removed."""
    assert cli("export", packed.parent / "graph", "-o", "portable", "--self-contained", "--quiet").code == 0
    before = names(workplace / "portable" / "graph")
    line = cli("build", "portable", "-o", "portable", "--force").refused(
        1, "portable holds", "expected a folder of its own"
    )
    assert "choose another --output" in line
    assert names(workplace / "portable" / "graph") == before
    assert names(workplace) == {"portable"}


def test_json_files_that_cannot_be_written(bundle: Path, workplace: Path, cli: Cli) -> None:
    missing = cli("generate", bundle, "hi", "--max-tokens", "1", "--json", "no/out.jsonl")
    missing.refused(1, "no/out.jsonl", "create the folder first")
    cli("generate", bundle, "hi", "--max-tokens", "1", "--json", workplace).refused(1, "choose a file name")
    assert names(workplace) == set()
