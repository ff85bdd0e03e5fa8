import json
from pathlib import Path

import pytest
import tokenizers

from qwen_rt.benchmarks.nano import data, prompts
from qwen_rt.benchmarks.nano import tokenizer as nano_tokenizer
from qwen_rt.benchmarks.nano.heldout import load

CHECKPOINT_DIR = Path(__file__).parents[2] / "core" / "nano"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))


def test_training_reproduces_the_shipped_tokenizer(tokenizer, tmp_path):
    nano_tokenizer.save_tokenizer(nano_tokenizer.train_tokenizer(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((CHECKPOINT_DIR / name).read_text())


@pytest.mark.parametrize(
    "text",
    [
        "What is 123 + 456?",
        "  two  spaces\n\n\ttabs \r\n end ",
        "Größe, naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी",
        "数学は楽しい 한국어 🧮👩‍👩‍👧‍👦 ∑∫√ ×÷",
        "\u0000\u0007 \u200b\ufeff",
        "I'LL don't we've",
        "",
    ],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_every_byte_is_in_the_vocabulary(tokenizer):
    assert set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert tokenizer.encode("1234567890").tokens == list("1234567890")
    merged = [token for token in tokenizer.get_vocab() if len(token) > 1 and any(map(str.isdigit, token))]
    assert merged == []


def test_special_tokens_are_atomic_and_follow_the_vocabulary(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in prompts.SPECIAL_TOKENS]
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    total = tokenizer.get_vocab_size(with_added_tokens=True)
    assert ids == list(range(total - 3, total))
    assert size in (total, total - 3)
    for token, number in zip(prompts.SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer.encode(f"a{token}b").ids.count(number) == 1
        assert tokenizer.decode([number]) == ""


def test_the_vocabulary_fits_the_config(tokenizer):
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    assert config["vocab_size"] == nano_tokenizer.padded_vocab_size(tokenizer) <= nano_tokenizer.MAX_VOCAB_SIZE
    assert config["eos_token_id"] == tokenizer.token_to_id(prompts.IM_END)
    assert config["pad_token_id"] == tokenizer.token_to_id(prompts.ENDOFTEXT)


def test_the_chat_template_renders_the_training_prompt():
    import jinja2

    template = json.loads((CHECKPOINT_DIR / "tokenizer_config.json").read_text())["chat_template"]
    render = jinja2.Environment().from_string(template).render
    user = {"role": "user", "content": f"2 + 2\n{prompts.INSTRUCTION}"}
    assert render(messages=[user], add_generation_prompt=True) == prompts.instruct_prompt("2 + 2")
    system = {"role": "system", "content": "Be brief."}
    bare = {"role": "user", "content": "2 + 2"}
    assert render(messages=[system, bare], add_generation_prompt=True) == prompts.chat_prompt("2 + 2", "Be brief.")


def test_only_the_assistants_tokens_are_targets(tokenizer):
    encoder = data.Encoder(tokenizer, tokenizer.token_to_id(prompts.ENDOFTEXT))
    rows = load()[:4]
    batch = encoder.micro_batch(
        [prompts.instruct_prompt(row["question"]) + row["solution"] + prompts.IM_END for row in rows]
    )
    length = batch.input_ids.shape[1]
    assert length % data.LENGTH_MULTIPLE == 0
    for number, row in enumerate(rows):
        targets = batch.targets[batch.positions // length == number]
        assert tokenizer.decode(targets.tolist(), skip_special_tokens=False) == row["solution"] + prompts.IM_END


def test_batches_are_reproducible(tokenizer):
    encoder = data.Encoder(tokenizer, tokenizer.token_to_id(prompts.ENDOFTEXT))
    first, again = (next(data.steps(encoder, 3, 32, 2)) for _ in range(2))
    assert len(first) == 2
    for one, other in zip(first, again, strict=True):
        assert (one.input_ids == other.input_ids).all()
        assert (one.targets == other.targets).all()
