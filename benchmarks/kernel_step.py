"""One decode step of a Qwen2-shaped model with random weights on the device: buffers, op calls, captured graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.benchmarks.quantized_cache import random_cache
from qwen_rt.benchmarks.quantized_matrices import Matrix, random_matrix, scheme_of
from qwen_rt.ops import COUNTER_BYTES, find_op
from qwen_rt.plugins.library import PluginLibrary

__all__ = ["DecodeStep", "OpCaller", "capture", "random_bf16"]

_OFFSET = 3.0  # size of the offsets of quantized caches


def random_bf16(*shape: int, std: float = 1.0) -> Tensor:
    """Draw bf16 normal numbers on the device."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, std)


class OpCaller:
    """Calls ops on torch tensors; all ops share one workspace, which grows to the largest that was wanted.

    Args:
        library: The loaded plugins.
        flags: Given to every launch.
    """

    def __init__(self, library: PluginLibrary, flags: int = 0) -> None:
        self.library = library
        self.flags = flags
        self._sizes: dict[tuple[str, tuple[int, ...]], int] = {}
        self._workspaces: list[Tensor] = []  # the last is the one in use; captured graphs may hold those before

    def __call__(self, op: str, tensors: Mapping[str, Tensor | None], **attributes: float) -> None:
        """Enqueue an op on the current stream; outputs that alias an input need not be named."""
        row = find_op(op)
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        dims = row.dims_of({name: tuple(tensor.shape) for name, tensor in given.items()})
        workspace = self._workspace(op, dims) if row.has_workspace else None
        self.library.launch(
            op,
            [given[tensor.name].data_ptr() if tensor.name in given else None for tensor in row.tensors],
            dims,
            [attributes.get(name, default if default is not None else math.nan) for name, default in row.attributes],
            stream=torch.cuda.current_stream().cuda_stream,
            workspace=None if workspace is None else workspace.data_ptr(),
            workspace_bytes=0 if workspace is None else workspace.numel(),
            flags=self.flags,
        )

    def _workspace(self, op: str, dims: tuple[int, ...]) -> Tensor | None:
        if (op, dims) not in self._sizes:
            self._sizes[op, dims] = self.library.workspace_bytes(op, dims)
        size = self._sizes[op, dims]
        if size == 0:
            return None
        if not self._workspaces or self._workspaces[-1].numel() < size:
            # Scratch is filled with bytes of NaN: an op that reads what it has not written is found out.
            workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
            workspace[:COUNTER_BYTES] = 0
            self._workspaces.append(workspace)
        return self._workspaces[-1]

    def counters_are_zero(self) -> bool:
        """Tell whether every op has left the counters as it must."""
        return not any(bool(workspace[:COUNTER_BYTES].any()) for workspace in self._workspaces)


def capture(body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Run `body` once to warm up, then capture it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


class DecodeStep:
    """A model's weights and buffers for `rows` rows that have `prompt` tokens each.

    Args:
        caller: How ops are called.
        shape: The model.
        num_layers: Fewer than the model has, for a check; None for all.
        precision: Of the layers' matrices: `bf16`, `fp8`, `int8` or `int4`, in its default scheme. Embedding and LM
            head are bf16.
        kv_format: Of the KV cache: `bf16`, `fp8` or `int8`, the last two with offsets.
    """

    block_size = 64
    epsilon = 1e-6

    def __init__(
        self,
        caller: OpCaller,
        shape: ModelShape,
        num_layers: int | None = None,
        precision: str = "bf16",
        kv_format: str = "bf16",
    ) -> None:
        self.call, self.shape, self.precision, self.kv_format = caller, shape, precision, kv_format
        self.num_layers = shape.layers if num_layers is None else num_layers
        s, q_width, kv_width = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        scheme, std = scheme_of(precision), 0.02
        # As a loader lays them out: matrices of one op behind each other.
        together: list[tuple[dict[str, int], int]] = [
            ({"q": q_width, "k": kv_width, "v": kv_width}, s.hidden),
            ({"o": s.hidden}, q_width),
            ({"gate": s.ffn, "up": s.ffn}, s.hidden),
            ({"down": s.hidden}, s.ffn),
        ]
        self.layers = [
            {
                name: part
                for units, columns in together
                for name, part in zip(
                    units,
                    random_matrix(scheme, sum(units.values()), columns, std=std).split(list(units.values())),
                    strict=True,
                )
            }
            for _ in range(self.num_layers)
        ]
        self.vectors = [
            {
                "norm1": 1 + random_bf16(s.hidden, std=0.1),
                "norm2": 1 + random_bf16(s.hidden, std=0.1),
                "q_bias": bias[0],
                "k_bias": bias[1],
                "v_bias": bias[2],
            }
            for bias in (
                torch.split(random_bf16(q_width + 2 * kv_width), [q_width, kv_width, kv_width])
                for _ in range(self.num_layers)
            )
        ]
        self.norm = 1 + random_bf16(s.hidden, std=0.1)
        self.table = random_bf16(s.vocab, s.hidden, std=std)
        self.head = self.table if s.tied else random_bf16(s.vocab, s.hidden, std=std)
        half = torch.arange(0, s.head_dim, 2, dtype=torch.float64, device="cuda") / s.head_dim
        self.inv_freq = (1e6**-half).float()

    def prepare(self, rows: int, prompt: int, max_new: int = 256) -> None:
        """Allocate activations and a filled KV cache; all layers share one, so that long prompts fit."""
        s = self.shape
        self.rows, self.prompt, self.max_length = rows, prompt, prompt + max_new
        blocks_per_row = -(-self.max_length // self.block_size)
        # One cache for every layer while that fits easily; else layers take turns on fewer, still far beyond L2.
        bytes_per_layer = s.with_layers(1).kv_bytes(rows * blocks_per_row * self.block_size, self.kv_format)
        num_caches = max(1, min(self.num_layers, (12 << 30) // bytes_per_layer))
        cache = (rows * blocks_per_row, s.kv_heads, self.block_size, s.head_dim)
        self.caches = [random_cache(self.kv_format, *cache, offset=_OFFSET) for _ in range(num_caches)]
        tables = torch.randperm(rows * blocks_per_row, device="cuda").int()
        self.tables = tables.view(rows, blocks_per_row).contiguous()
        self.ids = torch.randint(s.vocab, (rows,), device="cuda")
        self.positions = torch.full((rows,), prompt, dtype=torch.int64, device="cuda")
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        self.hidden = random_bf16(rows, s.hidden)
        self.qkv = random_bf16(rows, (s.heads + 2 * s.kv_heads) * s.head_dim)
        self.attended = random_bf16(rows, s.heads * s.head_dim)
        self.activation = random_bf16(rows, s.ffn)
        self.logits = torch.zeros(rows, s.vocab, dtype=torch.float32, device="cuda")

    def reset(self) -> None:
        """Go back to the end of the prompt."""
        self.positions.fill_(self.prompt)

    def run(self, without: Collection[str] = ()) -> None:
        """Enqueue the step; ops in `without` are left out (their outputs keep what they hold)."""

        def call(op: str, tensors: Mapping[str, Tensor | None], **attributes: float) -> None:
            if op not in without:
                self.call(op, tensors, **attributes)

        hidden = self.hidden
        call("embed", {"ids": self.ids, "table": self.table, "out": hidden})
        for index, w in enumerate(self.layers):
            cache = self.caches[index % len(self.caches)]
            vectors, stored = self.vectors[index], {"weight_format": w["q"].weight_format}
            call("rmsnorm_qkv", self.qkv_tensors(w, vectors), epsilon=self.epsilon, **stored)
            call(
                "rope_kv_append_attention",
                {
                    "qkv": self.qkv,
                    "positions": self.positions,
                    "query_starts": self.query_starts,
                    "inv_freq": self.inv_freq,
                    "block_tables": self.tables,
                    "out": self.attended,
                    **cache.tensors(),
                },
                scale=self.shape.head_dim**-0.5,
                max_length=self.max_length,
                kv_format=cache.kv_format,
            )
            residual = {"residual": hidden, "out": hidden}
            call("o_proj_residual", {"attention": self.attended, **w["o"].tensors(), **residual}, **stored)
            mlp: dict[str, Tensor | None] = {
                "hidden": hidden,
                "norm_weight": vectors["norm2"],
                "activation": self.activation,
            }
            mlp |= w["gate"].tensors("gate_") | w["up"].tensors("up_")
            call("rmsnorm_gate_up_silu", mlp, epsilon=self.epsilon, **stored)
            call("down_residual", {"activation": self.activation, **w["down"].tensors(), **residual}, **stored)
        head = {"norm_weight": self.norm, "weight": self.head, "logits": self.logits}
        call("lm_head", {"hidden": hidden, **head}, epsilon=self.epsilon)
        call("sample", {"logits": self.logits, "positions": self.positions, "next_ids": self.ids})

    def qkv_tensors(self, w: Mapping[str, Matrix], vectors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The tensors of `rmsnorm_qkv` for one layer."""
        named: dict[str, Tensor | None] = {"hidden": self.hidden, "norm_weight": vectors["norm1"], "qkv": self.qkv}
        for name in "qkv":
            named |= w[name].tensors(f"{name}_") | {f"{name}_bias": vectors[f"{name}_bias"]}
        return named

    def time(self, num_steps: int = 24, repeats: int = 5, without: Sequence[str] = ()) -> list[float]:
        """Return microseconds per step of graph replays back to back, one figure per repeat.

        Every step reads far more weights than L2 holds, so nothing needs to be flushed.
        """
        graph = capture(lambda: self.run(without))
        samples = []
        for _ in range(repeats + 1):
            self.reset()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(num_steps):
                graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / num_steps)
        del graph
        return samples[1:]  # the first warms up
