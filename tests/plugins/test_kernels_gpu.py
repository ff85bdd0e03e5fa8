"""Every kernel against its float64 reference on the GPU: real and awkward shapes, poison, repeats, batch mates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qwen_rt.benchmarks.kernel_shapes import ModelShape
from qwen_rt.errors import QwenRtError, UnsupportedModelError
from qwen_rt.ops import WEIGHT_FORMATS
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

from .gpu_kit import (  # noqa: E402
    ALIKE,
    ALIKE_WITH_PRODUCTS,
    EPSILON,
    MODELS,
    NANO,
    check,
    nan_bf16,
    norm_weight,
    residual_rows,
    takes_products,
)

ROWS = (1, 3, 7, 16, 19, 32, 64)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_rmsnorm_qkv(call: OpCaller, model: str, rows: int) -> None:
    s = MODELS[model]
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    hidden, norm = residual_rows(rows, s.hidden), norm_weight(s.hidden)
    weights = tuple(random_bf16(width, s.hidden, std=0.02) for width in (q_width, kv_width, kv_width))
    for biases in (tuple(random_bf16(w.shape[0]) for w in weights), (None, None, None)):
        out = nan_bf16(rows, q_width + 2 * kv_width)
        tensors: dict[str, torch.Tensor | None] = {"hidden": hidden, "norm_weight": norm, "qkv": out}
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors |= {f"{name}_weight": weight, f"{name}_bias": bias}
        call("rmsnorm_qkv", tensors, epsilon=EPSILON)
        reference = references.rmsnorm_qkv(hidden, norm, weights, biases, EPSILON)
        check("rmsnorm_qkv", out, reference, is_prefill=takes_products(rows, None))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", ["o_proj_residual", "down_residual"])
def test_residual_matrix(call: OpCaller, op: str, model: str, rows: int) -> None:
    s = MODELS[model]
    width, name = (s.heads * s.head_dim, "attention") if op == "o_proj_residual" else (s.ffn, "activation")
    x, weight, residual = random_bf16(rows, width), random_bf16(s.hidden, width, std=0.02), random_bf16(rows, s.hidden)
    reference = references.o_proj_residual(x, weight, residual)
    out = nan_bf16(rows, s.hidden)
    call(op, {name: x, "weight": weight, "residual": residual, "out": out})
    check(op, out, reference, is_prefill=takes_products(rows, None))
    call(op, {name: x, "weight": weight, "residual": residual, "out": residual})
    if takes_products(rows, None):
        check(op, residual, reference, is_prefill=True)
    else:
        assert torch.equal(out, residual), "in place differs"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_rmsnorm_gate_up_silu(call: OpCaller, model: str, rows: int) -> None:
    s = MODELS[model]
    hidden, norm = residual_rows(rows, s.hidden), norm_weight(s.hidden)
    gate, up = random_bf16(s.ffn, s.hidden, std=0.02), random_bf16(s.ffn, s.hidden, std=0.02)
    out = nan_bf16(rows, s.ffn)
    tensors = {"hidden": hidden, "norm_weight": norm, "gate_weight": gate, "up_weight": up, "activation": out}
    call("rmsnorm_gate_up_silu", tensors, epsilon=EPSILON)
    reference = references.rmsnorm_gate_up_silu(hidden, norm, gate, up, EPSILON)
    check("rmsnorm_gate_up_silu", out, reference, is_prefill=takes_products(rows, None))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_lm_head(call: OpCaller, model: str, rows: int) -> None:
    s = MODELS[model]
    hidden, norm, weight = (
        residual_rows(rows, s.hidden),
        norm_weight(s.hidden),
        random_bf16(s.vocab, s.hidden, std=0.02),
    )
    out = torch.full((rows, s.vocab), float("nan"), device="cuda")
    call("lm_head", {"hidden": hidden, "norm_weight": norm, "weight": weight, "logits": out}, epsilon=EPSILON)
    check("lm_head", out, references.lm_head(hidden, norm, weight, EPSILON))


@pytest.mark.parametrize("rows", ROWS)
def test_embed(call: OpCaller, rows: int) -> None:
    table = random_bf16(1000, 896)
    ids = torch.randint(1000, (rows,), device="cuda")
    out = nan_bf16(rows, 896)
    call("embed", {"ids": ids, "table": table, "out": out})
    assert torch.equal(out, references.embed(ids, table))
    ids[0] = 1000
    call("embed", {"ids": ids, "table": table, "out": out})
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("vocab", [4, 1152, 151936, 152064])
@pytest.mark.parametrize("rows", ROWS)
def test_sample(call: OpCaller, rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab, device="cuda") - 3
    logits[-1] = -float("inf")  # all equal: id 0
    logits[0, vocab // 2 :] = 9.0  # equals far apart: the lowest id
    positions = torch.arange(rows, device="cuda") - 1
    out = torch.full((rows,), -7, dtype=torch.int64, device="cuda")
    call("sample", {"logits": logits, "positions": positions, "next_ids": out})
    assert torch.equal(out, references.sample(logits))
    assert torch.equal(positions, torch.tensor([-1, *range(1, rows)], device="cuda"))
    logits[0, 0] = float("nan")
    call("sample", {"logits": logits, "next_ids": out})
    assert out[0] == vocab // 2, "NaN won"


class Paged:
    """A paged cache whose unused tokens and blocks are NaN, and the inputs of one attention call."""

    def __init__(self, s: ModelShape, lengths: list[int], block_size: int, spare_blocks: int = 3) -> None:
        rows = len(lengths)
        blocks_per_row = max(1, -(-max(lengths) // block_size)) + 1
        num_blocks = rows * blocks_per_row + spare_blocks
        cache = (num_blocks, s.kv_heads, block_size, s.head_dim)
        self.k_cache, self.v_cache = nan_bf16(*cache), nan_bf16(*cache)
        order = torch.randperm(num_blocks, device="cuda").int()
        self.tables = order[: rows * blocks_per_row].view(rows, blocks_per_row).contiguous()
        for row, length in enumerate(lengths):
            for index in range(-(-(length - 1) // block_size) if length > 1 else 0):
                block = int(self.tables[row, index])
                used = min(block_size, length - 1 - index * block_size)
                self.k_cache[block, :, :used] = random_bf16(s.kv_heads, used, s.head_dim)
                self.v_cache[block, :, :used] = random_bf16(s.kv_heads, used, s.head_dim)
            self.tables[row, -(-length // block_size) :] = 2**30  # never to be read
        self.qkv = random_bf16(rows, (s.heads + 2 * s.kv_heads) * s.head_dim)
        self.positions = torch.tensor(lengths, device="cuda") - 1
        exponents = torch.arange(0, s.head_dim, 2, dtype=torch.float64, device="cuda") / s.head_dim
        self.inv_freq = (1e6**-exponents).float()
        self.s, self.block_size = s, block_size
        self.out = nan_bf16(rows, s.heads * s.head_dim)

    def run(self, call: OpCaller, rows: slice = slice(None), **attributes: float) -> torch.Tensor:
        out = nan_bf16(*self.out[rows].shape)
        tensors: dict[str, Any] = {
            "qkv": self.qkv[rows].contiguous(),
            "positions": self.positions[rows].contiguous(),
            "query_starts": torch.arange(len(out) + 1, dtype=torch.int32, device="cuda"),
            "inv_freq": self.inv_freq,
            "block_tables": self.tables[rows].contiguous(),
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "out": out,
        }
        call("rope_kv_append_attention", tensors, scale=self.s.head_dim**-0.5, **attributes)
        return out

    def reference(self, rope_scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return references.attention(
            self.qkv,
            self.positions,
            self.inv_freq,
            self.tables,
            self.k_cache,
            self.v_cache,
            self.s.head_dim**-0.5,
            rope_scaling,
        )


RAGGED = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 513, 1000, 2047, 2048, 4097, 0, 5000]


@pytest.mark.parametrize("block_size", [16, 64, 48])
@pytest.mark.parametrize("model", ["0.5b", "1.5b", "7b", "72b", "nano"])
def test_attention_ragged(call: OpCaller, model: str, block_size: int) -> None:
    case = Paged(MODELS[model], RAGGED, block_size)
    before = case.k_cache.clone(), case.v_cache.clone()
    reference, new_keys, new_values = case.reference(rope_scaling=1.2)
    out = case.run(call, rope_scaling=1.2)
    for row, length in enumerate(RAGGED):
        if length == 0:
            assert not out[row].any(), "an idle row is not zero"
        else:
            check("rope_kv_append_attention", out[row], reference[row])
    for row, length in enumerate(RAGGED):
        if length:
            block, token = int(case.tables[row, (length - 1) // block_size]), (length - 1) % block_size
            check("rope_kv_append_attention", case.k_cache[block, :, token], new_keys[row])
            assert torch.equal(case.v_cache[block, :, token], new_values[row])
            case.k_cache[block, :, token] = before[0][block, :, token]
            case.v_cache[block, :, token] = before[1][block, :, token]
    for after, old in zip((case.k_cache, case.v_cache), before, strict=True):
        assert torch.equal(after.view(torch.int16), old.view(torch.int16)), "another token was written"


@pytest.mark.parametrize("rows", ROWS)
def test_attention_rows(call: OpCaller, rows: int) -> None:
    case = Paged(MODELS["7b"], [100 + 37 * i for i in range(rows)], 64)
    check("rope_kv_append_attention", case.run(call), case.reference()[0])


@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_attention_of_128k_tokens(call: OpCaller, model: str) -> None:
    case = Paged(MODELS[model], [131072, 131071], 64)
    check("rope_kv_append_attention", case.run(call), case.reference()[0])


def test_attention_fills_the_cache_and_no_more(call: OpCaller) -> None:
    case = Paged(MODELS["1.5b"], [128, 1], 64)
    case.tables = case.tables[:, :2].contiguous()  # the first row's last token is the cache's last
    out = case.run(call)
    check("rope_kv_append_attention", out[0], case.reference()[0][0])
    case.positions[0] += 1
    out = case.run(call)
    assert out[0].isnan().all(), "a position beyond the cache must not pass unnoticed"
    assert out[1].isfinite().all()


@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_attention_does_not_depend_on_batch_mates_or_bucket(call: OpCaller, model: str) -> None:
    lengths = [700, 33, 6000, 256, 4000, 129]
    case = Paged(MODELS[model], lengths, 64)
    together = case.run(call)
    for row in range(len(lengths)):
        alone = case.run(call, slice(row, row + 1), max_length=lengths[row])
        assert torch.equal(alone[0], together[row])


def test_matrices_do_not_depend_on_batch_mates(call: OpCaller) -> None:
    s = MODELS["1.5b"]
    x, norm, gate, up = (
        residual_rows(64, s.hidden),
        norm_weight(s.hidden),
        *(random_bf16(s.ffn, s.hidden, std=0.02) for _ in range(2)),
    )
    down = random_bf16(s.hidden, s.ffn, std=0.02)

    def mlp(rows: torch.Tensor) -> torch.Tensor:
        activation = nan_bf16(rows.shape[0], s.ffn)
        out = nan_bf16(*rows.shape)
        tensors = {"hidden": rows, "norm_weight": norm, "gate_weight": gate, "up_weight": up, "activation": activation}
        call("rmsnorm_gate_up_silu", tensors, epsilon=EPSILON)
        call("down_residual", {"activation": activation, "weight": down, "residual": rows, "out": out})
        return out

    for most, fewer in ALIKE_WITH_PRODUCTS:
        some = x[-most:].contiguous()
        all_rows = mlp(some)
        for rows in fewer:
            assert torch.equal(mlp(some[:rows].contiguous()), all_rows[:rows]), f"{rows} rows"
            assert torch.equal(mlp(some[-rows:].contiguous()), all_rows[-rows:]), f"the last {rows} rows"


@pytest.mark.parametrize("model", ["0.5b", "1.5b", "7b", "nano"])
def test_norm_matrices_do_not_depend_on_batch_mates(call: OpCaller, model: str) -> None:
    """All variants, with and without x resident, give a row the same bits."""
    s = MODELS[model]
    x, norm = residual_rows(64, s.hidden), norm_weight(s.hidden)
    weights = {f"{name}_weight": random_bf16(s.kv_heads * s.head_dim, s.hidden, std=0.02) for name in "kv"}
    weights["q_weight"] = random_bf16(s.heads * s.head_dim, s.hidden, std=0.02)
    head = random_bf16(s.vocab, s.hidden, std=0.02)

    def run_qkv(rows: torch.Tensor) -> torch.Tensor:
        qkv = nan_bf16(rows.shape[0], (s.heads + 2 * s.kv_heads) * s.head_dim)
        call("rmsnorm_qkv", {"hidden": rows, "norm_weight": norm, **weights, "qkv": qkv}, epsilon=EPSILON)
        return qkv

    def run_head(rows: torch.Tensor) -> torch.Tensor:
        logits = torch.full((rows.shape[0], s.vocab), float("nan"), device="cuda")
        tensors = {"hidden": rows, "norm_weight": norm, "weight": head, "logits": logits}
        call("lm_head", tensors, epsilon=EPSILON)
        return logits

    for run, alike in ((run_qkv, ALIKE_WITH_PRODUCTS), (run_head, ALIKE)):
        for most, fewer in alike:
            together = run(x[-most:].contiguous())
            for rows in fewer:
                assert torch.equal(run(x[-rows:].contiguous()), together[-rows:]), f"{rows} rows"


@pytest.mark.parametrize("precision", WEIGHT_FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_chain_is_the_same_every_time(call: OpCaller, rows: int, precision: str) -> None:
    """All ops in one graph, overlapping: 20 replays and a run without overlap give the same bits."""
    step = kernel_step.DecodeStep(call, MODELS["1.5b"], num_layers=6, precision=precision)
    step.prepare(rows, prompt=500)
    first_ids = step.ids.clone()

    def results() -> list[torch.Tensor]:
        return [t.clone() for t in (step.logits, step.hidden, step.ids, step.positions)]

    graph = kernel_step.capture(step.run)
    wanted: list[torch.Tensor] = []
    for turn in range(21):
        step.reset()
        step.ids.copy_(first_ids)
        step.logits.fill_(float("nan"))
        if turn == 0:
            call.flags = NO_DEPENDENT_LAUNCH
            try:
                for _ in range(3):
                    step.run()
                    torch.cuda.synchronize()
            finally:
                call.flags = 0
            wanted = results()
            continue
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(results(), wanted, strict=True):
            assert torch.equal(got, want), f"turn {turn}"


def test_what_is_unsupported_is_refused(call: OpCaller) -> None:
    s = NANO
    x, w, r = random_bf16(1, 96), random_bf16(s.hidden, 96), random_bf16(1, s.hidden)
    with pytest.raises(UnsupportedModelError, match=r"k=96; expected a multiple of 64"):
        call("down_residual", {"activation": x, "weight": w, "residual": r, "out": r})
    x, w = random_bf16(1, 65)[:, 1:], random_bf16(64, 64)
    with pytest.raises(QwenRtError, match="tensor 0"):
        call("down_residual", {"activation": x, "weight": w, "residual": x, "out": x})
    case = Paged(ModelShape(256, 1, 2, 1, 96, 512, 64), [5], 64)
    with pytest.raises(UnsupportedModelError, match="head_dim=96; expected 64 or 128"):
        case.run(call)
    case = Paged(NANO, [5], 8)
    with pytest.raises(UnsupportedModelError, match="block_size=8; expected a multiple of 16"):
        case.run(call)
