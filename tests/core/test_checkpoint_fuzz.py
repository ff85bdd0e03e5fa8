"""Thousands of damaged checkpoints: each parses within bounds or raises QwenRtError, in bounded memory and time.

Seeded, so that a failure names its case and comes back.
"""

from __future__ import annotations

import json
import math
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.safetensors_header import BYTES_OF_DTYPE, ShardHeader, read_header, write_header
from qwen_rt.spec import ModelSpec

NUM_HEADERS = 6_000
NUM_CONFIGS = 1_500
NUM_FOLDERS = 600
MAX_PEAK_BYTES = 64 << 20
MAX_SECONDS = 20.0

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32},
    "max_position_embeddings": 4096,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [1, 2],
    "layer_types": ["full_attention"],
}
CONFIG_ONLY_KEYS = ["rope_parameters", "head_dim", "quantization_config", "dtype", "bos_token_id", "vision_config"]

HOSTILE_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 4, 8, 16, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**19, 10**25),
    *(0.0, -0.0, 1.0, 4.0, 0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *("", "BF16", "F32", "U8", "default", "yarn", "qwen2", "../x", "/", "a\nb", "\x00", "\u2028", "\ud800", "x" * 300),
    *([], {}, [[]], [None], [0, 0], [0, 2**63], [2**62, 2**62], [10**19] * 16, [1] * 5000, {"": {}}, {"a": [{}]}),
]


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes longer than that many damaged files should."""
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < MAX_SECONDS


def outcome(case: str, parse: Callable[[], object]) -> object | None:
    """What `parse` returned, or None if it refused in one printable line.

    Any other exception fails the test and names the case, as does using more than `MAX_PEAK_BYTES`.
    """
    tracemalloc.start()
    parsed, message = None, ""
    try:
        parsed = parse()
    except QwenRtError as error:
        message = str(error)
    except Exception as error:
        pytest.fail(f"{case}: {type(error).__name__}: {error}")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES, case
    assert message.isprintable(), case
    assert len(message) < 3000, case
    return parsed


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        found.append((value, key))
        found += places(child)
    return found


def mutate_json(rng: random.Random, document: dict[str, Any], extra_keys: list[str]) -> dict[str, Any]:
    """Replace, delete, swap, nudge, rename or add one to three things anywhere in a document."""
    mutated: dict[str, Any] = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        spots = places(mutated)
        if not spots:
            break
        container, key = rng.choice(spots)
        action = rng.randrange(6)
        if action == 0:
            container[key] = rng.choice(HOSTILE_VALUES)
        elif action == 1:
            del container[key]
        elif action == 2:
            other, other_key = rng.choice(spots)
            container[key] = json.loads(json.dumps(other[other_key])) if rng.random() < 0.5 else None
        elif action == 3 and isinstance(container[key], int | float):
            container[key] = rng.choice(
                [container[key] + 1, -container[key], container[key] * 2**40, str(container[key])]
            )
        elif action == 4 and isinstance(container, dict):
            container[rng.choice(["", "__metadata__", "a\nb", "dtype", key + "x"])] = container.pop(key)
        else:
            mutated[rng.choice(extra_keys)] = rng.choice(HOSTILE_VALUES)
    return mutated


def damage_text(rng: random.Random, text: bytes) -> bytes:
    """Damage text without regard to its meaning, or with regard to how parsers break."""
    at = rng.randrange(len(text) + 1)
    action = rng.randrange(10)
    if action == 0:
        flipped = bytearray(text)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if action == 1:
        return text[:at]
    if action == 2:
        end = rng.randrange(len(text) + 1)
        return text[:at] + text[min(at, end) : end] + text[at:]
    if action == 3:
        return text[:at] + rng.randbytes(rng.randint(1, 20)) + text[at:]
    if action == 4:
        digits = [i for i, byte in enumerate(text) if byte in b"0123456789"]
        i = rng.choice(digits)
        number = rng.choice([b"-", b"9", b"e9", b".5", b"9" * 18, b"9" * 30, b"9" * 6000, b"1e999", b"NaN", b"true"])
        return text[:i] + number + text[i + rng.randrange(2) :]
    if action == 5:
        depth = rng.choice([1, 50, 900, 1100, 20_000])
        opening = rng.choice([b"[", b'{"a":'])
        return text[:at] + opening * depth + text[at:]
    if action == 6:
        middle = text[1:-1].rstrip(b" }")
        return text[:1] + middle + b"}," + middle + b"}}"  # every key twice
    if action == 7:
        return (
            text[:at]
            + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800", b"\x00", b"\xef\xbb\xbf"])
            + text[at:]
        )
    if action == 8:
        return text + rng.choice([b" " * 1000, b"\n", b"}", b"{}", b"\x00", text])
    return text[:at] + rng.choice([b"[],", b"{},", b",", b'"', b"\\"]) * rng.choice([1, 10, 5000]) + text[at:]


def base_headers(rng: random.Random) -> list[tuple[bytes, int]]:
    """(JSON, bytes of data) of headers that parse."""
    bases = []
    for num_tensors in (1, 2, 5, 30):
        tensors = [
            (f"model.layers.{i}.weight", rng.choice(list(BYTES_OF_DTYPE)), [rng.randint(0, 5) for _ in range(i % 4)])
            for i in range(num_tensors)
        ]
        header, ranges = write_header(tensors, {"format": "pt"} if num_tensors % 2 else None)
        bases.append((header[8:], sum(part.nbytes for part in ranges.values())))
    return bases


def damaged_file(rng: random.Random, text: bytes, num_data_bytes: int) -> bytes:
    """A safetensors file with something wrong in its JSON, its length field or its size; now and then nothing."""
    kind = rng.randrange(4)
    if kind == 0:
        text = damage_text(rng, text)
    elif kind in (1, 2):
        document = mutate_json(rng, json.loads(text), ["__metadata__", "b", ""])
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.3:
            # Data of the size that the damaged offsets ask for: only the checks of each tensor can refuse it.
            ends = [spot[key] for spot, key in places(document) if key == 1 and isinstance(spot, list)]
            num_data_bytes = max((end for end in ends if isinstance(end, int) and 0 <= end < 5000), default=0)
    length = len(text)
    if kind == 3:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**32, 2**63, 2**64 - 1, 100_000_001, length])
        num_data_bytes += rng.choice([-1, 1, 1000, 0, -num_data_bytes])
    content = struct.pack("<Q", length) + text + bytes(max(0, num_data_bytes))
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.05 else content


def rewrite(file: FileIO, content: bytes) -> None:
    """Replace what an open file holds: opening one anew for each case takes most of the time on some disks."""
    file.seek(0)
    file.write(content)
    file.truncate()


def assert_in_bounds(case: str, header: ShardHeader, file_nbytes: int) -> None:
    end = header.header_nbytes
    for name, ref in header.tensors.items():
        assert ref.name == name, case
        assert ref.offset == end, case
        assert all(type(dim) is int and dim >= 0 for dim in ref.shape), case
        assert ref.nbytes == BYTES_OF_DTYPE[ref.dtype] * math.prod(ref.shape), case
        end += ref.nbytes
    assert end == header.nbytes == file_nbytes, case
    assert all(isinstance(text, str) for item in header.metadata.items() for text in item), case


def test_headers(tmp_path: Path) -> None:
    rng = random.Random(20261123)
    bases = base_headers(rng)
    path = tmp_path / "model.safetensors"
    num_parsed = 0
    with open(path, "wb", buffering=0) as file, bounded():
        for i in range(NUM_HEADERS):
            content = damaged_file(rng, *rng.choice(bases))
            rewrite(file, content)
            header = outcome(f"header {i}", lambda: read_header(path))
            if isinstance(header, ShardHeader):
                num_parsed += 1
                assert_in_bounds(f"header {i}", header, len(content))
    # Some damage is harmless; if nearly all or nearly none were, this test would look in the wrong place.
    assert 0.03 * NUM_HEADERS < num_parsed < 0.5 * NUM_HEADERS


def test_library_accepts_no_less(tmp_path: Path) -> None:
    """What parses here parses in the safetensors library: our reader is the stricter one."""
    import safetensors

    rng = random.Random(7)
    bases = base_headers(rng)
    path = tmp_path / "model.safetensors"
    num_parsed = 0
    with open(path, "wb", buffering=0) as file:
        for i in range(2_000):
            rewrite(file, damaged_file(rng, *rng.choice(bases)))
            header = outcome(f"header {i}", lambda: read_header(path))
            if isinstance(header, ShardHeader):
                num_parsed += 1
                with safetensors.safe_open(path, "np") as theirs:
                    assert set(theirs.keys()) == set(header.tensors)
    assert num_parsed > 50


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + b"[" * 3_000_000,
        b'{"a":[' + b"[]," * 300_000 + b"[]]}",
        b'{"a":' + b"9" * 3_000_000 + b"}",
        b'{"a":0.' + b"9" * 3_000_000 + b"}",
        b'{"a":{"dtype":"U8","shape":[' + b"9999999999999999999," * 200_000 + b'1],"data_offsets":[0,1]}}',
        b'{"' + b"a" * 3_000_000 + b'":3}',
        b"{" + b" " * 5_000_000 + b"}",
        b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
        b"{" + b'"a":0,' * 100_000 + b'"a":0}',
        b'{"a":"' + b"\\u0041" * 500_000 + b'"}',
        b"{" + b"\x00" * 5_000_000,
    ],
)
def test_large_hostile_headers(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with bounded():
        outcome(repr(text[:20]), lambda: read_header(path))


def test_configs() -> None:
    rng = random.Random(1)
    num_parsed = 0
    with bounded():
        for i in range(NUM_CONFIGS):
            config = mutate_json(rng, CONFIG, list(CONFIG) + CONFIG_ONLY_KEYS)
            spec = outcome(f"config {i}", lambda config=config: ModelSpec.from_config(config))  # type: ignore[misc]
            if isinstance(spec, ModelSpec):
                num_parsed += 1
                assert spec.rope.inv_freq(spec.head_dim).shape == (spec.head_dim // 2,)
                assert math.isfinite(spec.rope.attention_scaling)
                if spec.num_layers < 100:
                    assert spec.num_parameters > 0
                assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert 0.03 * NUM_CONFIGS < num_parsed < 0.5 * NUM_CONFIGS


def test_spec_dicts() -> None:
    rng = random.Random(2)
    good = ModelSpec.from_config(CONFIG).to_dict()
    with bounded():
        for i in range(NUM_CONFIGS):
            data = mutate_json(rng, good, list(good))
            outcome(f"spec {i}", lambda data=data: ModelSpec.from_dict(data))  # type: ignore[misc]


def test_folders(tmp_path: Path) -> None:
    """Damage to config.json, the index and generation_config.json of a checkpoint of two shards."""
    rng = random.Random(3)
    weight_map: dict[str, str] = {}
    items = list(ModelSpec.from_config(CONFIG).parameters().items())
    for shard, part in (("a.safetensors", items[:6]), ("b.safetensors", items[6:])):
        header, ranges = write_header([(name, "BF16", shape) for name, shape in part])
        (tmp_path / shard).write_bytes(header + bytes(sum(r.nbytes for r in ranges.values())))
        weight_map |= {name: shard for name, _ in part}
    documents: dict[str, dict[str, Any]] = {
        "config.json": CONFIG,
        "model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": weight_map},
        "generation_config.json": {"eos_token_id": [1], "temperature": 0.7},
    }
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(tmp_path / name, "wb", buffering=0)) for name in documents}
        for name, document in documents.items():
            rewrite(files[name], json.dumps(document).encode())
        assert Checkpoint.open(tmp_path).spec == ModelSpec.from_config(CONFIG)
        stack.enter_context(bounded())
        num_parsed = 0
        for i in range(NUM_FOLDERS):
            name = rng.choice(list(documents))
            good = json.dumps(documents[name]).encode()
            if rng.random() < 0.5:
                content = damage_text(rng, good)
            else:
                content = json.dumps(mutate_json(rng, documents[name], list(CONFIG))).encode()
            rewrite(files[name], content)
            checkpoint = outcome(f"{name} {i}", lambda: Checkpoint.open(tmp_path))
            if isinstance(checkpoint, Checkpoint):
                num_parsed += 1
                assert checkpoint.read("lm_head.weight").shape == (40, 16)
            rewrite(files[name], good)
    assert 0.03 * NUM_FOLDERS < num_parsed < 0.7 * NUM_FOLDERS
