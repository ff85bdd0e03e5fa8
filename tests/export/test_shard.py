"""Ranks of a tensor-parallel model, run side by side, compute what the whole model computes."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qwen_rt import tensors
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import UsageError
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.passes.shard import Shard
from qwen_rt.export.portable import checkpoint_locations
from qwen_rt.export.source import open_source
from qwen_rt.export.tensor_parallel import parameter_parts
from qwen_rt.quantization import Scheme
from qwen_rt.spec import ModelSpec
from qwen_rt.tolerances import CHUNKING_RELATIVE_FP32

from ..cases import Case
from ..checkpoints import Shape
from ..compare import assert_close
from .graphs import Feeds
from .paged import proto_of, shared_name
from .quantize.kit import Quantized, all_matrices, write_quantized
from .ragged import RaggedModel, Run
from .test_lower_tensorrt import on_ort

CAPACITY, NUM_ROWS = 24, 3
MODELS = {
    "shared": Shape("8 heads on 2: repeated at 4 and 8", 64, 8, 2, 64, 96, head_dim=16, num_layers=2, dtype="float32"),
    "apart": Shape("8 heads on 8, tied, a prime vocabulary", 48, 8, 8, 128, 97, head_dim=8, tied=True),
    "tied": Shape("8 heads on 4, tied", 64, 8, 4, 128, 80, head_dim=16, tied=True),
}


class Ring:
    """Where the ranks of one call meet."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.barrier = num_ranks, threading.Barrier(num_ranks, timeout=60)
        self.parts: list[NDArray[Any]] = [np.empty(0)] * num_ranks
        self.calls: Counter[str] = Counter()

    def meet(self, rank: int, part: NDArray[Any]) -> list[NDArray[Any]]:
        """Hand in a part, wait for those of all ranks."""
        self.parts[rank] = part
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def operator(self, rank: int) -> type[OpRun]:
        """TensorRT's collective as one rank sees it."""
        ring = self

        class DistCollective(OpRun):
            op_domain = ""

            def _run(self, x: NDArray[Any], **attributes: Any) -> tuple[NDArray[Any]]:
                operation = attributes["collective_operation"]
                assert (attributes["nb_rank"], attributes["root"]) == (ring.num_ranks, -1)
                if rank == 0:
                    ring.calls[operation] += 1
                parts = ring.meet(rank, x)
                if operation == "all_gather":
                    assert attributes["reduce_op"] == "none"
                    return (np.concatenate(parts),)
                assert (operation, attributes["reduce_op"]) == ("all_reduce", "sum")
                return (np.sum(parts, axis=0, dtype=x.dtype),)

        return DistCollective


class Ranks:
    """The graphs of all ranks on onnx's evaluator; each has its heads of the cache."""

    def __init__(self, graphs: list[ir.Model], folder: Path, spec: ModelSpec) -> None:
        self.spec, self.ring = spec, Ring(len(graphs))
        self.evaluators = []
        for rank, graph in enumerate(graphs):
            proto = proto_of(graph)
            load_external_data_for_model(proto, str(folder))
            self.evaluators.append(ReferenceEvaluator(proto, new_ops=[self.ring.operator(rank)]))

    def heads(self, rank: int) -> slice:
        """The key/value heads of a rank."""
        num, ranks = self.spec.num_kv_heads, len(self.evaluators)
        first = rank * num // ranks
        return slice(first, first + max(1, num // ranks))

    def __call__(self, feeds: Feeds) -> Feeds:
        pairs = shared_name(self.spec)
        pasts = {past for past, _ in pairs}

        def run(rank: int) -> Feeds:
            heads = self.heads(rank)
            own = {name: array[:, heads] if name in pasts else array for name, array in feeds.items()}
            evaluator = self.evaluators[rank]
            return dict(zip(evaluator.output_names, evaluator.run(None, own), strict=True))

        with ThreadPoolExecutor(len(self.evaluators)) as pool:
            found = list(pool.map(run, range(len(self.evaluators))))
        outputs: Feeds = {tensors.LOGITS: found[0][tensors.LOGITS]}
        for other in found[1:]:
            np.testing.assert_array_equal(other[tensors.LOGITS], outputs[tensors.LOGITS])
        for past, present in pairs:
            outputs[present] = feeds[past].copy()
            for rank, own in enumerate(found):
                outputs[present][:, self.heads(rank)] = own[present]
        return outputs


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("shard")
    return {name: Case(shape, folder / name) for name, shape in MODELS.items()}


def lower(case: Case, shard: Shard, quantized: Quantized | None = None, dtype: str = "float32") -> ir.Model:
    checkpoint = Checkpoint.open(case.checkpoint)
    exported = open_source(case.portable).load_graph()
    locations = checkpoint_locations(checkpoint) if quantized is None else quantized.locations
    places = None if quantized is None else quantized.places
    return lowered_graph(checkpoint, "tensorrt", CAPACITY, locations, exported, places, dtype=dtype, shard=shard)


def outputs_of(run: Run, spec: ModelSpec) -> list[NDArray[np.float32]]:
    """Logits of a ragged prefill, a chunk beside a first token, and decode steps; then the caches."""
    ids = np.random.default_rng(5).integers(0, spec.vocab_size, (NUM_ROWS, CAPACITY))
    model = RaggedModel(run, spec, NUM_ROWS, CAPACITY)
    calls = [[(0, ids[0, :7]), (1, ids[1, :4])], [(1, ids[1, 4:7]), (2, ids[2, :1])]]
    calls += [[(row, ids[row, at : at + 1]) for row, at in step.items()] for step in ({0: 7, 1: 7, 2: 1}, {2: 2, 0: 8})]
    found = [model.call(chunks) for chunks in calls]
    return found + [rows for row in range(NUM_ROWS) for rows in model.cached(row).values()]


def assert_same(case: Case, num_ranks: int, folder: Path, quantized: Quantized | None = None) -> Ranks:
    spec = Checkpoint.open(case.checkpoint).spec
    ranks = Ranks([lower(case, Shard(rank, num_ranks), quantized) for rank in range(num_ranks)], folder, spec)
    expected = outputs_of(on_ort(lower(case, Shard(), quantized), folder), spec)
    for number, (found, wanted) in enumerate(zip(outputs_of(ranks, spec), expected, strict=True)):
        assert_close(found, wanted, relative=CHUNKING_RELATIVE_FP32, what=f"output {number} of {num_ranks} ranks")
    return ranks


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_side_by_side_are_the_model(name: str, num_ranks: int, cases: dict[str, Case]) -> None:
    case = cases[name]
    ranks = assert_same(case, num_ranks, case.checkpoint)
    calls, spec = 4, ranks.spec
    wanted = Counter({"all_reduce": calls * 2 * spec.num_layers})
    if spec.vocab_size % num_ranks == 0:
        wanted["all_gather"] = calls
    assert ranks.ring.calls == wanted


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("fp8"), Scheme("int4", 16), Scheme("int4")], ids=str)
def test_quantized_matrices(scheme: Scheme, num_ranks: int, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["tied"]
    schemes = dict.fromkeys(all_matrices(Checkpoint.open(case.checkpoint).spec), scheme)
    quantized = write_quantized(case.checkpoint, schemes, tmp_path / "weights")
    assert_same(case, num_ranks, quantized.folder, quantized)


@pytest.mark.parametrize("name", ["tied", "shared"])
def test_quantized_head_and_embedding(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """A head of its own, and where the model is tied and only the embedding is quantized, a part of that."""
    others = {"model.embed_tokens.weight": Scheme("int8")}
    if name == "shared":
        others["lm_head.weight"] = Scheme("int4", 32)
    quantized = write_quantized(cases[name].checkpoint, others, tmp_path / "weights")
    assert_same(cases[name], 2, quantized.folder, quantized)


@pytest.mark.parametrize("name", ["shared", "tied"])
def test_rows_are_references_and_columns_are_made_when_asked_for(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    checkpoint = Checkpoint.open(case.checkpoint)
    spec = checkpoint.spec
    parts = parameter_parts(spec, 4, spec.intermediate_size)
    for rank in range(4):
        initializers = lower(case, Shard(rank, 4), dtype=spec.dtype).graph.initializers
        for parameter, part in parts.items():
            tensor, whole = initializers[parameter].const_value, checkpoint.read(part.name)
            assert tensor is not None
            start, stop = part.rows(rank)
            if part.num_columns:
                assert parameter.endswith(("o_proj.weight", "down_proj.weight"))
                whole = whole[:, rank * part.num_columns :][:, : part.num_columns]
            is_made = part.num_columns > 0 or part.name != parameter  # or a tied head
            assert isinstance(tensor, ir.LazyTensor if is_made else ir.ExternalTensor)
            assert tensor.tobytes() == whole[start:stop].tobytes()


def _soft(file: Path, blob: Path) -> None:
    """As in Hugging Face's cache."""
    file.rename(blob)
    file.symlink_to(blob)


def _hard(file: Path, blob: Path) -> None:
    """As in a folder of `qwen-rt export --layout`."""
    os.link(file, blob)


@pytest.mark.parametrize("link", [_soft, _hard])
def test_shards_that_are_links(link: Callable[[Path, Path], None], cases: dict[str, Case], tmp_path: Path) -> None:
    """What is made from the bytes does not depend on how the file came into its folder."""
    case = cases["tied"]
    schemes = dict.fromkeys(all_matrices(Checkpoint.open(case.checkpoint).spec), Scheme("int4", 16))
    del schemes["model.layers.0.mlp.down_proj.weight"]
    quantized = write_quantized(case.checkpoint, schemes, tmp_path / "weights")
    shard = Shard(1, 2)

    def made() -> dict[str, bytes]:
        graph = lower(case, shard, quantized).graph
        data = {name: value.const_value for name, value in graph.initializers.items()}
        return {name: tensor.tobytes() for name, tensor in data.items() if isinstance(tensor, ir.LazyTensor)}

    plain = made()
    assert "model.layers.0.mlp.down_proj.weight" in plain
    assert len(plain) > len(schemes)
    (tmp_path / "blobs").mkdir()
    for file in quantized.folder.glob("*.safetensors"):
        link(file, tmp_path / "blobs" / file.name)
    assert made() == plain


def test_every_row_and_column_is_held(cases: dict[str, Case]) -> None:
    """By one rank, or for key/value heads fewer than ranks by several; whole parameters by all."""
    spec = Checkpoint.open(cases["shared"].checkpoint).spec
    for num_ranks in (1, 2, 4, 8):
        for name, part in parameter_parts(spec, num_ranks, spec.intermediate_size).items():
            shape = spec.parameters()[name]
            held = np.zeros(shape, np.int64)
            for rank in range(num_ranks):
                start, stop = part.rows(rank)
                if part.num_columns:
                    held[start:stop, rank * part.num_columns : (rank + 1) * part.num_columns] += 1
                else:
                    held[start:stop] += 1
            split = re.search(r"_proj|lm_head", name)
            shared = max(1, num_ranks // spec.num_kv_heads) if re.search(r"[kv]_proj", name) else 1
            assert (held == (shared if split else num_ranks)).all(), name


def test_narrow_ranks_sum_in_their_dtype(cases: dict[str, Case]) -> None:
    model = lower(cases["tied"], Shard(1, 4), dtype="bfloat16")
    found = [node for node in model.graph if node.op_type == "DistCollective"]
    assert {node.outputs[0].dtype for node in found} == {ir.DataType.BFLOAT16}
    names = [str(node.name) for node in found]
    assert names[:2] == ["/model/layers.0/self_attn/o_proj/AllReduce", "/model/layers.0/mlp/down_proj/AllReduce"]
    assert names[-1] == "/lm_head/AllGather"


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard(0, 3), "tp=3; expected one of 1, 2, 4, 8"),
        (Shard(2, 2), "rank=2; expected 0 to 1"),
        (Shard(-1, 2), "rank=-1; expected 0 to 1"),
    ],
)
def test_ranks_that_are_none(shard: Shard, message: str, cases: dict[str, Case]) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        lower(cases["tied"], shard)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("int4", 32), "int4 g32, 16 columns for each rank; expected a multiple of 32 columns for each rank"),
        (Scheme("int8", permuted=True), "int8 permuted, 16 columns for each rank; expected columns in order"),
    ],
    ids=["group", "permuted"],
)
def test_columns_that_cannot_be_split(scheme: Scheme, message: str, cases: dict[str, Case], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    quantized = write_quantized(cases["tied"].checkpoint, {name: scheme}, tmp_path / "weights")
    with pytest.raises(UsageError, match=re.escape(f"{name} is stored as {message}")):
        lower(cases["tied"], Shard(0, 8), quantized)
