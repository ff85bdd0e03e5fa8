import json
import struct
from pathlib import Path

import pytest

from qwen_rt.benchmarks.nano.heldout import load

CHECKPOINT_DIR = Path(__file__).parents[2] / "core" / "nano"


def header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        (num_bytes,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(num_bytes))
    tensors.pop("__metadata__", None)
    return tensors


def test_the_index_names_every_tensor_and_its_shard():
    index = json.loads((CHECKPOINT_DIR / "model.safetensors.index.json").read_text())
    shards = {path.name: header(path) for path in CHECKPOINT_DIR.glob("*.safetensors")}
    assert len(shards) == 2
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    ends = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors.values())
    assert index["metadata"]["total_size"] == ends
    assert "lm_head.weight" not in tensors
    assert 5e6 < ends / 2 < 10e6


def test_the_shapes_follow_the_config():
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    tensors = {name: item for path in CHECKPOINT_DIR.glob("*.safetensors") for name, item in header(path).items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    assert hidden // heads == 128
    assert heads > config["num_key_value_heads"]
    assert tensors["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], hidden]
    assert tensors["model.layers.0.self_attn.k_proj.bias"]["shape"] == [config["num_key_value_heads"] * 128]
    assert len({name.split(".")[2] for name in tensors if ".layers." in name}) == config["num_hidden_layers"]


def test_the_checkpoint_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in CHECKPOINT_DIR.iterdir() if path.is_file()) < 19_000_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_shipped_weights_answer_heldout_questions_right():
    from qwen_rt.benchmarks.nano.evaluate import evaluate

    rows = sorted(load(), key=lambda row: len(row["solution"]))[300:320]
    outcomes = evaluate(CHECKPOINT_DIR, rows, "cpu")
    assert [outcome.output for outcome in outcomes] == [row["solution"] for row in rows]
