"""The decode ops of one model on their own: inputs, several copies of the weights, and a check of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qwen_rt.benchmarks import kernel_references as references
from qwen_rt.benchmarks.kernel_shapes import ModelShape, OpCost
from qwen_rt.benchmarks.kernel_step import DecodeStep, OpCaller
from qwen_rt.benchmarks.quantized_matrices import Matrix

__all__ = ["COLD_BYTES", "OpCases"]

COLD_BYTES = 400_000_000
"""Weights that an op's replay goes through before it meets the same again: several times any L2."""


class OpCases:
    """One model's ops on their own: inputs, several copies of the weights, references.

    Args:
        call: How ops are called.
        shape: The model.
        rows: Decode rows.
        length: Tokens of every row, for attention.
        precision: Of the layers' matrices.
        kv_format: Of the KV cache.
    """

    def __init__(
        self,
        call: OpCaller,
        shape: ModelShape,
        rows: int,
        length: int,
        precision: str = "bf16",
        kv_format: str = "bf16",
    ) -> None:
        self.call, self.shape, self.rows, self.length = call, shape, rows, length
        self.precision, self.kv_format = precision, kv_format
        self.step = DecodeStep(call, shape, num_layers=1, precision=precision, kv_format=kv_format)
        self.step.prepare(rows, length - 1, max_new=1)

    def cost(self, op: str) -> OpCost:
        """Return what one call of an op needs."""
        return self.shape.op_cost(op, self.rows, self.length, self.precision, self.kv_format)

    def prepare(self, op: str) -> tuple[list[Callable[[], None]], Callable[[], str]]:
        """Return calls (one per copy of the weights), and a check of the first."""
        s, step, rows = self.shape, self.step, self.rows
        epsilon = step.epsilon
        x = step.hidden
        w, vectors = step.layers[0], step.vectors[0]
        copies = max(2, -(-COLD_BYTES // self.cost(op).read_bytes))

        def tell(out: Tensor, reference: Callable[[], Tensor]) -> Callable[[], str]:
            return lambda: references.problem_of(op, out, reference())

        def with_each(names: str, sets: list[tuple[Tensor, ...]], rest: dict[str, Tensor], **attributes: float) -> None:
            for weights in sets:
                tensors = rest | dict(zip(names.split(), weights, strict=True))
                calls.append(functools.partial(self.call, op, tensors, **attributes))

        def with_matrices(
            prefixes: Sequence[str], matrices: Sequence[Matrix], rest: Mapping[str, Tensor], **attributes: float
        ) -> None:
            """A call for each of several copies of the matrices."""
            for turn in range(copies):
                tensors: dict[str, Tensor | None] = dict(rest)
                for prefix, matrix in zip(prefixes, matrices, strict=True):
                    tensors |= (matrix if turn == 0 else matrix.clone()).tensors(prefix)
                stored = matrices[0].weight_format
                calls.append(functools.partial(self.call, op, tensors, weight_format=stored, **attributes))

        calls: list[Callable[[], None]] = []
        if op == "rmsnorm_qkv":
            rest = {f"{n}_bias": vectors[f"{n}_bias"] for n in "qkv"} | {
                "hidden": x,
                "norm_weight": vectors["norm1"],
                "qkv": step.qkv,
            }
            qkv, biases = [w[n] for n in "qkv"], [vectors[f"{n}_bias"] for n in "qkv"]
            with_matrices(("q_", "k_", "v_"), qkv, rest, epsilon=epsilon)
            check = tell(step.qkv, lambda: references.rmsnorm_qkv(x, vectors["norm1"], qkv, biases, epsilon))
        elif op in ("o_proj_residual", "down_residual"):
            name, matrix = ("attention", w["o"]) if op == "o_proj_residual" else ("activation", w["down"])
            source = step.attended if op == "o_proj_residual" else step.activation
            out = torch.empty_like(x)
            with_matrices(("",), [matrix], {name: source, "residual": x, "out": out})
            check = tell(out, lambda: references.o_proj_residual(source, matrix, x))
        elif op == "select_o_proj_residual":
            out, indices = torch.empty_like(x), torch.arange(rows, device="cuda")
            rest = {"attention": step.attended, "indices": indices, "residual": x, "out": out}
            with_matrices(("",), [w["o"]], rest)
            check = tell(out, lambda: references.o_proj_residual(step.attended, w["o"], x))
        elif op == "rmsnorm_gate_up_silu":
            rest = {"hidden": x, "norm_weight": vectors["norm2"], "activation": step.activation}
            pair = [w["gate"], w["up"]]
            with_matrices(("gate_", "up_"), pair, rest, epsilon=epsilon)
            check = tell(
                step.activation, lambda: references.rmsnorm_gate_up_silu(x, vectors["norm2"], pair[0], pair[1], epsilon)
            )
        elif op == "lm_head":
            rest = {"hidden": x, "norm_weight": step.norm, "logits": step.logits}
            with_each("weight", [(step.head,)], rest, epsilon=epsilon)
            check = tell(step.logits, lambda: references.lm_head(x, step.norm, step.head, epsilon))
        elif op == "rope_kv_append_attention":
            copies = max(1, min(64, COLD_BYTES // self.cost(op).read_bytes))
            cache = step.caches[0]
            rest = {"qkv": step.qkv, "positions": step.positions, "inv_freq": step.inv_freq}
            rest |= {"block_tables": step.tables, "out": step.attended}
            rest["query_starts"] = step.query_starts
            scale = s.head_dim**-0.5
            attributes = {"scale": scale, "max_length": step.max_length, "kv_format": cache.kv_format}
            for turn in range(copies):
                tensors = rest | (cache if turn == 0 else cache.clone()).tensors()
                calls.append(functools.partial(self.call, op, tensors, **attributes))
            inputs = (step.qkv, step.positions, step.inv_freq, step.tables)
            if self.kv_format == "bf16":
                check = tell(step.attended, lambda: references.attention(*inputs, cache.keys, cache.values, scale)[0])
            else:
                check = tell(step.attended, lambda: references.attention_8bit(*inputs, cache, scale)[0])
        elif op == "sample":
            step.logits.normal_()
            ids = torch.empty(rows, dtype=torch.int64, device="cuda")
            with_each("logits", [(step.logits,)], {"next_ids": ids})

            def check() -> str:
                return "" if torch.equal(ids, references.sample(step.logits)) else "sample: wrong tokens"
        else:
            out = torch.empty_like(x)
            with_each("table", [(step.table,)], {"ids": step.ids, "out": out})

            def check() -> str:
                return "" if torch.equal(out, step.table[step.ids]) else "embed: wrong rows"

        return calls, check
