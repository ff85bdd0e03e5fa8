"""The lowering to plugin ops computes what the portable graph computes, on ragged batches over a paged cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError
from qwen_rt.export.passes.compute_dtype import set_compute_dtype
from qwen_rt.export.passes.lower_cuda import lower_cuda
from qwen_rt.export.portable import attach_weights, checkpoint_locations, portable_graph
from qwen_rt.export.source import open_source
from qwen_rt.export.stamp import stamp_layers
from qwen_rt.export.trace import trace_single_layer
from qwen_rt.runtime.llm import LLM
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import (
    LOWERED_BF16_CACHE_RELATIVE,
    LOWERED_BF16_MIN_COSINE,
    LOWERED_BF16_RELATIVE,
    LOWERED_RELATIVE,
)

from ..cases import Zoo
from ..checkpoints import random_ids
from ..compare import assert_close
from .paged import Chunk, DenseModel, PagedModel

CAPACITY = 80
SHAPES = ["heads-0.5b", "heads-72b", "yarn", "yarn-mscale", "linear-rope"]  # all stored as bfloat16
NANO_SHARDS = Path(str(Checkpoint.open("nano").path))


@dataclasses.dataclass
class Source:
    """A model whose portable graph can be made anew as often as a test changes one."""

    spec: ModelSpec
    weights: Path
    portable: Callable[[], ir.Model]


def zoo_source(zoo: Zoo, name: str) -> Source:
    case = zoo.case(name)
    checkpoint = Checkpoint.open(case.checkpoint)

    def portable() -> ir.Model:
        exported = open_source(case.portable).load_graph()
        return portable_graph(checkpoint, "float32", checkpoint_locations(checkpoint), exported)

    return Source(checkpoint.spec, case.checkpoint, portable)


@pytest.fixture
def nano_source(nano_portable: Path) -> Source:
    def portable() -> ir.Model:
        model = open_source(nano_portable).load_graph()
        assert model is not None
        return model

    return Source(Checkpoint.open("nano").spec, NANO_SHARDS, portable)


def calls_of(vocab_size: int, num_steps: int) -> list[list[Chunk]]:
    """Two prefill calls of several sequences, one of them in two chunks across a block's end, then decode steps."""
    lengths = {0: 23, 1: 71, 2: 1, 3: 40}
    ids = {i: np.random.default_rng(i).integers(0, vocab_size, n + num_steps) for i, n in lengths.items()}
    calls = [
        [(0, ids[0][:23]), (1, ids[1][:50]), (2, ids[2][:1])],
        [(1, ids[1][50:71]), (3, ids[3][:40])],
    ]
    for step in range(num_steps):
        calls.append([(i, ids[i][lengths[i] + step : lengths[i] + step + 1]) for i in (2, 0, 3, 1)])
    return calls


def assert_equal_models(source: Source, num_steps: int = 3) -> None:
    """Logits of every call and all caches: in float64 over NaN, and with the kernels' rounding over large numbers."""
    spec, calls = source.spec, calls_of(source.spec.vocab_size, num_steps)
    dense = DenseModel(source.portable(), source.weights, spec, CAPACITY)
    expected = [dense.call(chunks) for chunks in calls]
    lowered = lower_cuda(source.portable(), spec, CAPACITY)
    for bf16, poison in ((False, np.nan), (True, 1e4)):
        paged = PagedModel(lowered, source.weights, spec, CAPACITY, bf16, poison)
        bounds = {"relative": LOWERED_RELATIVE}
        if bf16:
            bounds = {"relative": LOWERED_BF16_RELATIVE, "cosine": LOWERED_BF16_MIN_COSINE}
        for number, (chunks, logits) in enumerate(zip(calls, expected, strict=True)):
            assert_close(paged.call(chunks), logits, **bounds, what=f"logits of call {number}, bf16={bf16}")
        if bf16:
            bounds["relative"] = LOWERED_BF16_CACHE_RELATIVE
        for sequence in dense.lengths:
            found = paged.cached(sequence)
            for name, rows in dense.cached(sequence).items():
                assert_close(found[name], rows, **bounds, what=f"{name} of sequence {sequence}, bf16={bf16}")
        for name, slots in paged.untouched().items():
            wanted = np.full_like(slots, poison)
            np.testing.assert_array_equal(slots, wanted, err_msg=f"{name} was written where no token belongs")


@pytest.mark.parametrize("name", SHAPES)
def test_the_lowered_graph_equals_the_portable_one(name: str, zoo: Zoo) -> None:
    assert_equal_models(zoo_source(zoo, name))


def test_nano_equals_its_portable_graph(nano_source: Source) -> None:
    assert_equal_models(nano_source, num_steps=1)


def test_a_model_without_biases(zoo: Zoo) -> None:
    checkpoint = Checkpoint.open(zoo.case("linear-rope").checkpoint)
    spec = dataclasses.replace(checkpoint.spec, qkv_bias=False)
    traced = trace_single_layer(spec, "float32")

    def portable() -> ir.Model:
        model = stamp_layers(traced.clone(), spec.num_layers)
        attach_weights(model, checkpoint_locations(checkpoint))
        return set_compute_dtype(model, "float32")

    source = Source(spec, zoo.case("linear-rope").checkpoint, portable)
    lowered = lower_cuda(portable(), spec, CAPACITY)
    qkv = next(node for node in lowered.graph if node.op_type == "rmsnorm_qkv")
    assert [value is None for value in qkv.inputs] == [False] * 5 + [True] * (len(qkv.inputs) - 6) + [False]
    assert_equal_models(source, num_steps=1)
    with pytest.raises(GraphError, match=r"is made by ai\.onnx\.MatMul; expected Add"):
        lower_cuda(portable(), checkpoint.spec, CAPACITY)


def greedy(model: DenseModel | PagedModel, prompts: list[list[int]], num_tokens: int) -> NDArray[np.int64]:
    """Tokens of the largest logits, all prompts fed in one call: int64[B, num_tokens]."""
    logits = model.call([(row, np.array(ids)) for row, ids in enumerate(prompts)])
    chosen = [logits.argmax(-1)]
    while len(chosen) < num_tokens:
        logits = model.call([(row, chosen[-1][row : row + 1]) for row in range(len(prompts))])
        chosen.append(logits.argmax(-1))
    return np.stack(chosen, axis=1)


@pytest.mark.parametrize("bf16", [False, True])
def test_nano_solves_problems_by_the_same_tokens(bf16: bool, nano: LLM, nano_source: Source) -> None:
    problems = {"What is 8 + 7?": 15, "What is 9 * 8?": 72, "Compute 7 * 6.": 42}
    prompts = [nano.encode_chat([{"role": "user", "content": question}]) for question in problems]
    assert len({len(prompt) for prompt in prompts}) > 1, "the batch should be ragged"
    num_tokens, capacity = 24, 64
    dense = DenseModel(nano_source.portable(), nano_source.weights, nano_source.spec, capacity)
    expected = greedy(dense, prompts, num_tokens)
    lowered = lower_cuda(nano_source.portable(), nano_source.spec, capacity)
    paged = PagedModel(lowered, nano_source.weights, nano_source.spec, capacity, bf16)
    found = greedy(paged, prompts, num_tokens)
    eos = nano_source.spec.eos_token_ids[0]
    for row, answer in enumerate(problems.values()):
        assert eos in expected[row], "the answer was not ended: ask for more tokens"
        end = int(np.argmax(expected[row] == eos)) + 1  # behind it a model may say anything
        np.testing.assert_array_equal(found[row, :end], expected[row, :end])
        assert f"\\boxed{{{answer}}}" in nano.tokenizer.decode(found[row, :end])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_portable_graph_does_not_matter(dtype: str, nano_source: Source) -> None:
    checkpoint = Checkpoint.open("nano")
    traced = portable_graph(checkpoint, dtype, checkpoint_locations(checkpoint))
    found, from_disk = (
        ir.serde.serialize_model(lower_cuda(model, nano_source.spec, 64)).SerializeToString(deterministic=True)
        for model in (traced, nano_source.portable())
    )
    assert found == from_disk


def test_the_portable_graph_is_left_as_it_was(nano_source: Source) -> None:
    model = nano_source.portable()
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    lower_cuda(model, nano_source.spec, 64)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_weights_of_another_dtype_are_refused(zoo: Zoo) -> None:
    source = zoo_source(zoo, "odd")
    with pytest.raises(GraphError, match=r"embed_tokens\.weight is stored as FLOAT; expected BFLOAT16; build with"):
        lower_cuda(source.portable(), source.spec, 64)


def test_ids_over_the_whole_vocabulary_are_looked_up(zoo: Zoo) -> None:
    """The last rows of the embedding, padding of the tokenizer's vocabulary, are rows like any other."""
    source = zoo_source(zoo, "yarn")
    ids = random_ids(zoo.case("yarn").shape, 9)
    assert source.spec.vocab_size - 1 in ids
    dense = DenseModel(source.portable(), source.weights, source.spec, CAPACITY)
    paged = PagedModel(lower_cuda(source.portable(), source.spec, 16), source.weights, source.spec, CAPACITY)
    assert_close(paged.call([(0, ids)]), dense.call([(0, ids)]), relative=LOWERED_RELATIVE)
