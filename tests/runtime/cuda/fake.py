"""A GPU made of C and malloc for the session to stand on, a small model, and the model's answers by arithmetic."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qwen_rt import tensors
from qwen_rt.ops import OPS
from qwen_rt.plugins.build import ABI
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.runtime.cuda.cudart import Cudart
from qwen_rt.runtime.cuda.model import Platform
from qwen_rt.runtime.cuda.weights import ITEM_BYTES
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.safetensors_header import read_header
from qwen_rt.spec import ModelSpec

from ...core.configs import config_with

SOURCE = Path(__file__).with_name("fake_cuda.c")
KINDS = ("device", "pinned", "stream", "event", "graph", "exec")
BROKEN = 13
"""A prompt that starts with this token makes the fake model's logits NaN."""


def compile_fake(folder: Path) -> Path:
    """Compile the fake library; skip without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    ops = ",".join(f"{op.name}:{op.version}" for op in OPS)
    info = f'-DFAKE_BUILD_INFO="abi={ABI} sources=fake sms=90 nvcc=0.0 ops={ops}"'
    target = folder / "libfake.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", info, str(SOURCE), "-o", str(target), "-lm"]
    done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class FakeGpu:
    """The compiled library, and what the tests ask of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.cuda = Cudart(self.library)
        self.library.fake_live.restype = self.library.fake_allocations.restype = ctypes.c_int64
        self.library.fake_launches.restype = ctypes.c_int64
        self.library.fake_fail_at.argtypes = (ctypes.c_int64,)
        self.library.fake_enqueue.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_size_t,)
        self.library.fake_model.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.graphs: list[FakeGraph] = []

    def live(self) -> dict[str, int]:
        """What is allocated now, of each kind that is."""
        counts = {name: self.library.fake_live(kind) for kind, name in enumerate(KINDS)}
        return {name: count for name, count in counts.items() if count}

    def plugins(self, sm: int = 90) -> PluginLibrary:
        return PluginLibrary(self.path, check_sources=False)

    def open_graph(self, graph: bytes, library: Path, device: int, stream: int) -> FakeGraph:
        assert library == self.path
        self.graphs.append(FakeGraph(self, graph, stream))
        return self.graphs[-1]

    def platform(self) -> Platform:
        return Platform(self.cuda, self.plugins, self.open_graph)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "query_starts", "tables", "indices")),
        *((name, ctypes.c_void_p) for name in ("keys", "workspace", "logits")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "max_blocks", "vocab", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "item_bytes")),
    ]


class FakeGraph:
    """In the place of ONNX Runtime: checks that all is bound as the graph declares it, then runs `fake_model`."""

    def __init__(self, gpu: FakeGpu, graph: bytes, stream: int) -> None:
        self.gpu, self.stream, self.is_open = gpu, stream, True
        model = onnx.ModelProto.FromString(graph)
        assert not any(item.data_location == TensorProto.EXTERNAL for item in model.graph.initializer)
        self.declared = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
        self.bound: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.runs: list[tuple[int, int]] = []

    def bind_input(self, name: str, element_type: int, shape: Sequence[int], address: int) -> None:
        assert address, name
        declared = self.declared[name]
        assert declared.elem_type == element_type, name
        fixed = [dim.dim_value for dim in declared.shape.dim]
        assert len(fixed) == len(shape), name
        assert all(want in (0, found) for want, found in zip(fixed, shape, strict=True)), (name, shape)
        self.bound[name] = element_type, tuple(shape), address

    bind_output = bind_input

    def run(self) -> None:
        assert self.is_open
        assert self.bound.keys() == self.declared.keys()

        def at(name: str) -> int:
            return self.bound[name][2]

        for name in self.declared:
            if name.startswith("present."):
                assert at(name) == at(name.replace("present.", "past_key_values."))
        pools = sorted((at(name), self.nbytes(name)) for name in self.bound if name.startswith("past_"))
        assert all(start + nbytes <= stop for (start, nbytes), (stop, _) in pairwise(pools))
        (num_tokens,), (num_rows, max_blocks) = self.bound[tensors.INPUT_IDS][1], self.bound[tensors.BLOCK_TABLES][1]
        num_blocks, kv_heads, _, head_dim = self.bound[tensors.past_key(0)][1]
        self.runs.append((num_tokens, num_rows))
        call = _Call(
            at(tensors.INPUT_IDS), at(tensors.POSITIONS), at(tensors.QUERY_STARTS), at(tensors.BLOCK_TABLES),
            at(tensors.LOGITS_INDICES), at(tensors.past_key(0)), at(tensors.WORKSPACE), at(tensors.LOGITS),
            num_tokens, num_rows, max_blocks, self.bound[tensors.LOGITS][1][1], kv_heads, head_dim, num_blocks,
            ITEM_BYTES[self.bound[tensors.past_key(0)][0]],
        )  # fmt: skip
        self.gpu.library.fake_model(self.stream, ctypes.addressof(call))

    def nbytes(self, name: str) -> int:
        """Bytes of what is bound."""
        element_type, shape, _ = self.bound[name]
        return ITEM_BYTES[element_type] * int(np.prod(shape))

    def close(self) -> None:
        self.is_open = False


# ---------------------------------------------------------------- the model


def small_spec(**changes: Any) -> ModelSpec:
    sizes = {
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 100,
        "vocab_size": 320,
        "max_window_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 20,
    }
    return ModelSpec.from_config(config_with(**{**sizes, **changes}))


def write_shards(spec: ModelSpec, folder: Path, count: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Write random bf16 weights as real safetensors files; return their bits by name."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    weights = {name: rng.integers(0, 2**16, shape, np.uint16) for name, shape in spec.parameters().items()}
    names = sorted(weights)
    for shard in range(count):
        part = {name: weights[name] for name in names[shard::count]}
        save_file(part, folder / f"model-{shard}.safetensors")  # as uint16: the loader never looks at the dtype
    return weights


CACHE_TYPES = {"bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}


def make_graph(
    spec: ModelSpec, folder: Path | None = None, data_type: int = TensorProto.BFLOAT16, kv_format: str = "bf16"
) -> bytes:
    """Return a graph with the inputs, outputs and weights of target `cuda`; its one node is never run."""
    cache = ["blocks", spec.num_kv_heads, 64, spec.head_dim]
    i64, i32, kind = TensorProto.INT64, TensorProto.INT32, CACHE_TYPES[kv_format]
    inputs = [
        (tensors.INPUT_IDS, i64, ["R"]),
        (tensors.POSITIONS, i64, ["R"]),
        (tensors.QUERY_STARTS, i32, ["B1"]),
        (tensors.BLOCK_TABLES, i32, ["B", "max_blocks"]),
        (tensors.LOGITS_INDICES, i64, ["B"]),
        (tensors.WORKSPACE, TensorProto.UINT8, ["W"]),
    ]
    outputs = [(tensors.LOGITS, TensorProto.FLOAT, ["B", spec.vocab_size])]
    for i in range(spec.num_layers):
        inputs += [(name(i), kind, cache) for name in (tensors.past_key, tensors.past_value)]
        outputs += [(name(i), kind, cache) for name in (tensors.present_key, tensors.present_value)]
        if kv_format != "bf16":
            f32, scales = TensorProto.FLOAT, cache[:-1]
            inputs += [(name(i), f32, scales) for name in (tensors.past_key_scale, tensors.past_value_scale)]
            outputs += [(name(i), f32, scales) for name in (tensors.present_key_scale, tensors.present_value_scale)]
    places = {}
    if folder is not None:
        for file in sorted(folder.glob("*.safetensors")):
            places |= {name: (file.name, ref.offset) for name, ref in read_header(file).tensors.items()}
    weights = []
    for name, shape in spec.parameters().items():
        weight = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        location, offset = places.get(name, ("none", 0))
        for key, value in (("location", location), ("offset", offset), ("length", 2 * int(np.prod(shape)))):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    weights.append(helper.make_tensor("inv_freq", TensorProto.FLOAT, [2], [1.0, 0.5]))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["inv_freq"], ["unused"])],
        "model",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString()


def next_token(tokens: Sequence[int], vocab: int, num_tokens: int | None = None) -> int:
    """What the fake model's logits peak at after these tokens: the largest logit below `num_tokens`."""
    total = sum((place + 1) * token for place, token in enumerate(tokens)) % 2**64
    peak = ((total * 2654435761 % 2**64) >> 7) % vocab
    return peak if peak < (vocab if num_tokens is None else num_tokens) else 0


def continuation(prompt: Sequence[int], count: int, vocab: int, num_tokens: int | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab, num_tokens))
    return tokens[len(prompt) :]


def request(prompt: Sequence[int], blocks: Sequence[int], seed: int = 0, **params: Any) -> RowState:
    return RowState(tuple(prompt), SamplingParams(**{"temperature": 0.0, **params}), seed, tuple(blocks))
