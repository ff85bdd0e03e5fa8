"""The ops at more rows than sequences on the GPU: matrices through cuBLASLt, the LM head on chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from qwen_rt.errors import QwenRtError, UnsupportedModelError
from qwen_rt.ops import COUNTER_BYTES, SKINNY_ROWS
from qwen_rt.plugins.library import NO_DEPENDENT_LAUNCH

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
from qwen_rt.benchmarks import kernel_references as references  # noqa: E402
from qwen_rt.benchmarks import kernel_step  # noqa: E402
from qwen_rt.benchmarks.kernel_step import random_bf16  # noqa: E402

from .gpu_kit import EPSILON, MODELS, NANO, check, nan_bf16, norm_weight, residual_rows  # noqa: E402

PREFILL_MODELS = ("0.5b", "1.5b", "7b", "nano")
PREFILL_ROWS = (33, 65, 100, 999, 2048)


def weights_of(widths: tuple[int, ...], k: int, is_adjacent: bool) -> tuple[torch.Tensor, ...]:
    """Matrices behind each other in memory, as a loader lays them out, or apart."""
    if is_adjacent:
        return torch.split(random_bf16(sum(widths), k, std=0.02), list(widths))
    parts = random_bf16(sum(widths) + 8 * len(widths), k, std=0.02)
    begin, found = 0, []
    for width in widths:
        found.append(parts[begin : begin + width])
        begin += width + 8
    return tuple(found)


def same_bits_every_time(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run three times, each into an output of NaN of its own."""
    first = run()
    assert all(torch.equal(run(), first) for _ in range(2)), "other bits the second time"
    return first


@pytest.mark.parametrize("is_adjacent", [True, False], ids=["adjacent", "apart"])
@pytest.mark.parametrize("rows", PREFILL_ROWS)
@pytest.mark.parametrize("model", PREFILL_MODELS)
def test_rmsnorm_qkv(call: OpCaller, model: str, rows: int, is_adjacent: bool) -> None:
    s = MODELS[model]
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    hidden, norm = residual_rows(rows, s.hidden), norm_weight(s.hidden)
    weights = weights_of((q_width, kv_width, kv_width), s.hidden, is_adjacent)
    together = torch.split(random_bf16(q_width + 2 * kv_width), [q_width, kv_width, kv_width])
    apart = tuple(bias.clone() for bias in together)
    for biases in (together, apart, (None, None, None), (apart[0], None, apart[2])):
        tensors: dict[str, torch.Tensor | None] = {"hidden": hidden, "norm_weight": norm}
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors |= {f"{name}_weight": weight, f"{name}_bias": bias}

        def run(tensors: dict[str, torch.Tensor | None] = tensors) -> torch.Tensor:
            out = nan_bf16(rows, q_width + 2 * kv_width)
            call("rmsnorm_qkv", {**tensors, "qkv": out}, epsilon=EPSILON)
            return out

        out = same_bits_every_time(run)
        check("rmsnorm_qkv", out, references.rmsnorm_qkv(hidden, norm, weights, biases, EPSILON))
    assert call.counters_are_zero()


@pytest.mark.parametrize("rows", PREFILL_ROWS)
@pytest.mark.parametrize("model", PREFILL_MODELS)
@pytest.mark.parametrize("op", ["o_proj_residual", "down_residual"])
def test_residual_matrix(call: OpCaller, op: str, model: str, rows: int) -> None:
    s = MODELS[model]
    width, name = (s.heads * s.head_dim, "attention") if op == "o_proj_residual" else (s.ffn, "activation")
    x, weight, residual = random_bf16(rows, width), random_bf16(s.hidden, width, std=0.02), random_bf16(rows, s.hidden)

    def run() -> torch.Tensor:
        out = nan_bf16(rows, s.hidden)
        call(op, {name: x, "weight": weight, "residual": residual, "out": out})
        return out

    def run_in_place() -> torch.Tensor:
        out = residual.clone()
        call(op, {name: x, "weight": weight, "residual": out, "out": out})
        return out

    reference = references.o_proj_residual(x, weight, residual)
    check(op, same_bits_every_time(run), reference, is_prefill=True)
    check(op, same_bits_every_time(run_in_place), reference, is_prefill=True)
    assert call.counters_are_zero()


@pytest.mark.parametrize("is_adjacent", [True, False], ids=["adjacent", "apart"])
@pytest.mark.parametrize("rows", PREFILL_ROWS)
@pytest.mark.parametrize("model", PREFILL_MODELS)
def test_rmsnorm_gate_up_silu(call: OpCaller, model: str, rows: int, is_adjacent: bool) -> None:
    s = MODELS[model]
    hidden, norm = residual_rows(rows, s.hidden), norm_weight(s.hidden)
    gate, up = weights_of((s.ffn, s.ffn), s.hidden, is_adjacent)

    def run() -> torch.Tensor:
        out = nan_bf16(rows, s.ffn)
        tensors = {"hidden": hidden, "norm_weight": norm, "gate_weight": gate, "up_weight": up, "activation": out}
        call("rmsnorm_gate_up_silu", tensors, epsilon=EPSILON)
        return out

    reference = references.rmsnorm_gate_up_silu(hidden, norm, gate, up, EPSILON)
    check("rmsnorm_gate_up_silu", same_bits_every_time(run), reference, is_prefill=True)
    assert call.counters_are_zero()


@pytest.mark.parametrize(("hidden", "rows"), [(2048, 70), (4096, 70), (4160, 70), (8192, 70), (16384, 70)])
def test_norm_of_every_width(call: OpCaller, hidden: int, rows: int) -> None:
    x, norm = residual_rows(rows, hidden), norm_weight(hidden)
    weights = weights_of((128, 64, 64), hidden, True)
    out = nan_bf16(rows, 256)
    named = {f"{name}_weight": weight for name, weight in zip("qkv", weights, strict=True)}
    call("rmsnorm_qkv", {"hidden": x, "norm_weight": norm, **named, "qkv": out}, epsilon=EPSILON)
    check("rmsnorm_qkv", out, references.rmsnorm_qkv(x, norm, weights, (None, None, None), EPSILON))


@pytest.mark.parametrize(("rows", "sequences"), [(2, 1), (10, 2), (65, 3), (999, 16), (2048, 64), (64, 64)])
@pytest.mark.parametrize("model", ["0.5b", "1.5b", "7b", "nano"])
def test_the_last_projection_takes_the_chosen_rows(call: OpCaller, model: str, rows: int, sequences: int) -> None:
    s = MODELS[model]
    width = s.heads * s.head_dim
    x, weight, residual = random_bf16(rows, width), random_bf16(s.hidden, width, std=0.02), random_bf16(rows, s.hidden)
    indices = torch.randperm(rows, device="cuda")[:sequences]
    if rows == sequences:
        indices = torch.arange(rows, device="cuda")

    def project(x: torch.Tensor, residual: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        out = nan_bf16(sequences, s.hidden)
        tensors = {"attention": x, "indices": indices, "weight": weight, "residual": residual, "out": out}
        call("select_o_proj_residual", tensors)
        return out

    out = same_bits_every_time(lambda: project(x, residual, indices))
    check("o_proj_residual", out, references.o_proj_residual(x[indices], weight, residual[indices]))
    alone = project(x[indices], residual[indices], torch.full_like(indices, -1))  # one row each: indices are not read
    assert torch.equal(out, alone), "one row each differs"
    for wrong in (-1, rows, 2**40) if rows > sequences else ():
        bad = indices.clone()
        bad[-1] = wrong
        after = project(x, residual, bad)
        assert after[-1].isnan().all(), "an index beyond the rows must not pass unnoticed"
        assert torch.equal(after[:-1], out[:-1])
    assert call.counters_are_zero()


def test_embed_of_many_rows(call: OpCaller) -> None:
    table, ids = random_bf16(1000, 1536), torch.randint(1000, (70000,), device="cuda")
    out = nan_bf16(len(ids), 1536)
    call("embed", {"ids": ids, "table": table, "out": out})
    assert torch.equal(out, table[ids])


class Layer:
    """The matrix ops of a layer behind each other, all sharing one workspace: what must not overlap would show."""

    def __init__(self, call: OpCaller, rows: int) -> None:
        s = MODELS["1.5b"]
        self.call, self.s = call, s
        q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.qkv_weights = weights_of((q_width, kv_width, kv_width), s.hidden, True)
        self.gate_up = weights_of((s.ffn, s.ffn), s.hidden, True)
        self.o, self.down = random_bf16(s.hidden, q_width, std=0.02), random_bf16(s.hidden, s.ffn, std=0.02)
        self.norm, self.table = norm_weight(s.hidden), random_bf16(2000, s.hidden)
        self.head = random_bf16(s.vocab, s.hidden, std=0.02)
        self.ids = torch.randint(2000, (rows,), device="cuda")
        self.indices = torch.tensor([rows // 2, rows - 1], device="cuda")
        self.hidden, self.qkv = nan_bf16(rows, s.hidden), nan_bf16(rows, q_width + 2 * kv_width)
        self.attention, self.activation = random_bf16(rows, q_width), nan_bf16(rows, s.ffn)
        self.chosen, self.logits = nan_bf16(2, s.hidden), torch.zeros(2, s.vocab, device="cuda")

    def run(self) -> None:
        call, hidden, norm = self.call, self.hidden, {"hidden": self.hidden, "norm_weight": self.norm}
        named = {f"{name}_weight": weight for name, weight in zip("qkv", self.qkv_weights, strict=True)}
        mlp = {"gate_weight": self.gate_up[0], "up_weight": self.gate_up[1], "activation": self.activation}
        call("embed", {"ids": self.ids, "table": self.table, "out": hidden})
        for _ in range(3):
            call("rmsnorm_qkv", {**norm, **named, "qkv": self.qkv}, epsilon=EPSILON)
            call("o_proj_residual", {"attention": self.attention, "weight": self.o, "residual": hidden, "out": hidden})
            call("rmsnorm_gate_up_silu", {**norm, **mlp}, epsilon=EPSILON)
            down = {"activation": self.activation, "weight": self.down, "residual": hidden, "out": hidden}
            call("down_residual", down)
        chosen = {"attention": self.attention, "indices": self.indices, "weight": self.o, "residual": hidden}
        call("select_o_proj_residual", {**chosen, "out": self.chosen})
        head = {"hidden": self.chosen, "norm_weight": self.norm, "weight": self.head, "logits": self.logits}
        call("lm_head", head, epsilon=EPSILON)

    def results(self) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        return [t.clone() for t in (self.logits, self.hidden, self.qkv, self.activation)]


@pytest.mark.parametrize("rows", [65, 300, 1500])
def test_chain_is_the_same_every_time(call: OpCaller, rows: int) -> None:
    layer = Layer(call, rows)
    call.flags = NO_DEPENDENT_LAUNCH
    try:
        layer.run()
    finally:
        call.flags = 0
    wanted = layer.results()
    assert all(bool(t.isfinite().all()) for t in wanted)
    graph = kernel_step.capture(layer.run)
    for turn in range(12):
        for tensor in (layer.logits, layer.hidden, layer.qkv, layer.activation):
            tensor.fill_(float("nan"))
        graph.replay() if turn % 2 else layer.run()
        for got, want in zip(layer.results(), wanted, strict=True):
            assert torch.equal(got, want), f"turn {turn}"
    assert call.counters_are_zero()


def test_few_rows_want_no_workspace_and_more_say_how_much(call: OpCaller) -> None:
    s, library = NANO, call.library
    dims = {
        "rmsnorm_qkv": (s.hidden, 512, 256),
        "o_proj_residual": (512, s.hidden),
        "rmsnorm_gate_up_silu": (s.hidden, s.ffn),
        "down_residual": (s.ffn, s.hidden),
    }
    for op, rest in dims.items():
        assert library.workspace_bytes(op, (SKINNY_ROWS, *rest, 0)) == 0
        columns = rest[0]  # permuted rows and norm, or rows in two terms by blocks of 512, factors and squares
        permuted = (SKINNY_ROWS + 1) * columns * 2
        prepared = -(-columns // 512) * 4 * SKINNY_ROWS * (2 * 128 + 4) + SKINNY_ROWS * -(-columns // 256) * 4
        expected = COUNTER_BYTES + max(permuted, prepared)
        assert library.workspace_bytes(op, (SKINNY_ROWS, *rest, 1)) == expected
        assert library.workspace_bytes(op, (SKINNY_ROWS + 1, *rest, 0)) > COUNTER_BYTES
        assert library.workspace_bytes(op, (65, *rest, 4)) > library.workspace_bytes(op, (65, *rest, 0))
    select = "select_o_proj_residual"
    assert library.workspace_bytes(select, (64, 64, 512, s.hidden, 0)) == 0
    assert library.workspace_bytes(select, (65, 64, 512, s.hidden, 0)) == COUNTER_BYTES + 64 * (512 + s.hidden) * 2


def test_what_is_unsupported_is_refused(call: OpCaller) -> None:
    s = NANO
    weight = random_bf16(s.hidden, 512)
    for rows, sequences, error, match in (
        (70, 65, UnsupportedModelError, "sequences=65; expected 1 to 64"),
        (2, 3, QwenRtError, "rows=2 of sequences=3; expected at least as many"),
    ):
        indices = torch.zeros(sequences, dtype=torch.int64, device="cuda")
        tensors = {"attention": random_bf16(rows, 512), "indices": indices, "weight": weight}
        tensors |= {"residual": random_bf16(rows, s.hidden), "out": nan_bf16(sequences, s.hidden)}
        with pytest.raises(error, match=match):
            call("select_o_proj_residual", tensors)
    x, w, r = random_bf16(65, 96), random_bf16(s.hidden, 96), random_bf16(65, s.hidden)
    with pytest.raises(UnsupportedModelError, match="k=96; expected a multiple of 64"):
        call("down_residual", {"activation": x, "weight": w, "residual": r, "out": r})
    x, w, r = random_bf16(65, 64), random_bf16(66, 64), random_bf16(65, 66)
    with pytest.raises(UnsupportedModelError, match="width=66 of the output; expected a multiple of 8"):
        call("down_residual", {"activation": x, "weight": w, "residual": r, "out": r})
    x, w, r = random_bf16(65, 64), random_bf16(64, 64), random_bf16(65, 64)
    pointers = [x.data_ptr(), w.data_ptr(), r.data_ptr(), None, None, None, r.data_ptr()]
    workspace = torch.zeros(COUNTER_BYTES, dtype=torch.uint8, device="cuda")
    for pointer, size in ((None, 0), (workspace.data_ptr(), COUNTER_BYTES)):
        with pytest.raises(QwenRtError, match=f"workspace_bytes={size}; expected"):
            call.library.launch(
                "down_residual", pointers, (65, 64, 64, 0), (0.0,), workspace=pointer, workspace_bytes=size
            )
