"""Trains the nano checkpoint's tokenizer: byte-level BPE in Qwen2's layout with at most 1,280 entries.

Qwen2's normaliser, pre-tokenizer and decoder; all 256 bytes are in the vocabulary, so any text encodes and decodes;
every digit is one token; the special tokens follow the BPE vocabulary, as in Qwen2.

Command line: ``python -m qwen_rt.benchmarks.nano.tokenizer OUTPUT_DIR``.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_rt.runtime.tokenizer import PRETOKENIZE_PATTERN

from .heldout import excluded_questions
from .problems import stream
from .prompts import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, INSTRUCTION, SPECIAL_TOKENS, SYSTEM

MAX_VOCAB_SIZE = 1280
VOCAB_MULTIPLE = 128
TOKENIZER_SEED = 7
NUM_TRAINING_PROBLEMS = 20_000
GENERAL_TEXT = """
This is a small language model for tests and demonstrations. It knows a little mathematics: whole numbers, simple
equations and short stories with numbers in them. Please ask it one question at a time. Hello! Thank you very much for
your question. I am sorry, I do not know the answer to that. Let us think about it step by step and check the result.
The user writes a message, the assistant reads it and writes a reply, one token after another, until it is finished.
There were people who could see that their time would come; some of them had been here before, others had not yet left
the house where they lived. What should we do now, and which of these numbers is larger? First, second, third, last.
Because every word is made of pieces, a short vocabulary still writes any sentence, only with more pieces per word.
"""


def _corpus() -> Iterator[str]:
    yield from [SYSTEM, INSTRUCTION, "system\n", "user\n", "assistant\n"] * 200
    yield from [GENERAL_TEXT] * 20
    for problem in islice(stream(TOKENIZER_SEED, excluded_questions()), NUM_TRAINING_PROBLEMS):
        yield problem.question
        yield problem.solution


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result depends on constants of this module and the problem generator alone."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([_added(token) for token in SPECIAL_TOKENS])
    return tokenizer


def _added(token: str) -> AddedToken:
    return AddedToken(token, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the vocabulary with its special tokens, rounded up to a multiple of 128: the config's ``vocab_size``."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def save_tokenizer(tokenizer: Tokenizer, output_dir: Path, max_length: int = 2048) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        tokenizer: a tokenizer from :func:`train_tokenizer`.
        output_dir: an existing folder.
        max_length: ``model_max_length``, in tokens.
    """
    tokenizer.save(str(output_dir / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (output_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description="Train the nano checkpoint's tokenizer.")
    parser.add_argument("output_dir", type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, output_dir)
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    print(f"wrote {output_dir}: {num_tokens} tokens, vocab_size {padded_vocab_size(tokenizer)}")


if __name__ == "__main__":
    main()
