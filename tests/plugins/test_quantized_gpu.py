"""The matrix ops on quantized weights, on the GPU: all formats, real and awkward shapes, batch mates, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qwen_rt.errors import QwenRtError, UnsupportedModelError
from qwen_rt.quantization import Scheme

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
from qwen_rt.benchmarks import kernel_references as references  # noqa: E402
from qwen_rt.benchmarks.kernel_step import random_bf16  # noqa: E402
from qwen_rt.benchmarks.quantized_matrices import Matrix, random_matrix  # noqa: E402

from .gpu_kit import EPSILON, MODELS, NANO, alike, check, nan_bf16, norm_weight, takes_products  # noqa: E402
from .quantized_kit import (  # noqa: E402
    FEW_MODELS,
    MAIN,
    ROWS,
    SCHEMES,
    cases,
    fits,
    hidden_rows,
    is_fine,
    pair_of,
    qkv_of,
    run_head,
    run_pair,
    run_qkv,
    run_residual,
)


@pytest.mark.parametrize(("model", "scheme"), [*cases(FEW_MODELS, SCHEMES), *cases(("72b",), MAIN)])
def test_rmsnorm_qkv(call: OpCaller, model: str, scheme: Scheme) -> None:
    s = MODELS[model]
    if not fits(scheme, s.hidden):
        pytest.skip("such groups do not divide the columns")
    norm, matrices = norm_weight(s.hidden), qkv_of(model, scheme)
    biases = [random_bf16(m.shape[0]) for m in matrices]
    for rows in ROWS:
        hidden = hidden_rows(rows, s.hidden)
        out, fp8 = run_qkv(call, hidden, norm, matrices, biases), takes_products(rows, scheme)
        reference = references.rmsnorm_qkv(hidden, norm, matrices, biases, EPSILON, fp8=fp8)
        check("rmsnorm_qkv", out, reference, is_fine=is_fine(scheme), is_fp8=fp8)


@pytest.mark.parametrize(("model", "scheme"), [*cases(FEW_MODELS, SCHEMES), *cases(("72b", "padded-72b"), MAIN)])
@pytest.mark.parametrize("op", ["o_proj_residual", "down_residual"])
def test_residual_matrix(call: OpCaller, op: str, model: str, scheme: Scheme) -> None:
    s = MODELS[model]
    width = s.heads * s.head_dim if op == "o_proj_residual" else s.ffn
    if not fits(scheme, width):
        pytest.skip("such groups do not divide the columns")
    matrix = random_matrix(scheme, s.hidden, width)
    for rows in ROWS:
        x, residual = random_bf16(rows, width), random_bf16(rows, s.hidden)
        out, fp8 = run_residual(call, op, x, matrix, residual), takes_products(rows, scheme)
        reference = references.o_proj_residual(x, matrix, residual, fp8=fp8)
        check(op, out, reference, is_fine=is_fine(scheme), is_fp8=fp8)
        in_place = run_residual(call, op, x, matrix, residual, residual)
        if fp8:
            check(op, in_place, reference, is_fp8=True)
        else:
            assert torch.equal(in_place, out), "in place differs"


@pytest.mark.parametrize(("model", "scheme"), [*cases(FEW_MODELS, SCHEMES), *cases(("72b",), MAIN)])
def test_rmsnorm_gate_up_silu(call: OpCaller, model: str, scheme: Scheme) -> None:
    s = MODELS[model]
    if not fits(scheme, s.hidden):
        pytest.skip("such groups do not divide the columns")
    norm, matrices = norm_weight(s.hidden), pair_of(model, scheme)
    for rows in ROWS:
        hidden = hidden_rows(rows, s.hidden)
        out, fp8 = run_pair(call, hidden, norm, matrices), takes_products(rows, scheme)
        reference = references.rmsnorm_gate_up_silu(hidden, norm, *matrices, EPSILON, fp8=fp8)
        # More outputs, of so many formats, than the seven sigma of `TOLERANCES` are for: a product's tail is long.
        check("rmsnorm_gate_up_silu", out, reference, is_fine=True, is_fp8=fp8)


@pytest.mark.parametrize(("model", "scheme"), cases(("nano", "0.5b", "7b"), MAIN))
def test_lm_head(call: OpCaller, model: str, scheme: Scheme) -> None:
    s = MODELS[model]
    norm, matrix = norm_weight(s.hidden), random_matrix(scheme, s.vocab, s.hidden)
    for rows in ROWS:
        hidden = hidden_rows(rows, s.hidden)
        check("lm_head", run_head(call, hidden, norm, matrix), references.lm_head(hidden, norm, matrix, EPSILON))


@pytest.mark.parametrize(("rows", "hidden"), [(5, 768), (3, 768), (3, 2304)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_widths_that_are_no_multiple_of_a_tile(call: OpCaller, scheme: Scheme, rows: int, hidden: int) -> None:
    """Some blocks have a unit or none, tiles are cut off, and q, k and v meet within a tile."""
    widths = (131, 13, 13)
    x, norm = hidden_rows(rows, hidden), norm_weight(hidden)
    q = random_matrix(scheme, widths[0], hidden)
    matrices = [q, *(random_matrix(scheme, width, hidden, perm=q.perm) for width in widths[1:])]
    out = run_qkv(call, x, norm, matrices, [None, random_bf16(13), None])
    check(
        "rmsnorm_qkv",
        run_qkv(call, x, norm, matrices, [None, None, None]),
        references.rmsnorm_qkv(x, norm, matrices, [None, None, None], EPSILON),
        is_fine=is_fine(scheme),
    )
    assert out.isfinite().all()
    for units in (1, 7, 133, 2113):
        matrix, residual = random_matrix(scheme, units, hidden), random_bf16(rows, units)
        y = random_bf16(rows, hidden)
        check(
            "down_residual",
            run_residual(call, "down_residual", y, matrix, residual),
            references.o_proj_residual(y, matrix, residual),
            is_fine=is_fine(scheme),
        )


def test_every_fp8_number_is_exact(call: OpCaller) -> None:
    """One column of all numbers but NaN, and x that is 1 there and 0 elsewhere: subnormals too."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = codes[(codes & 127) != 127]
    bits = torch.zeros(len(codes), 128, dtype=torch.uint8, device="cuda")
    bits[:, 77] = codes
    matrix = Matrix("fp8", (len(codes), 128), bits.view(torch.float8_e4m3fn), torch.ones(len(codes), 1, device="cuda"))
    x = torch.zeros(1, 128, dtype=torch.bfloat16, device="cuda")
    x[0, 77] = 1
    out = run_residual(
        call, "down_residual", x, matrix, torch.zeros(1, len(codes), dtype=torch.bfloat16, device="cuda")
    )
    assert torch.equal(out[0].float(), matrix.weight[:, 77].float())


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
@pytest.mark.parametrize("scheme", MAIN, ids=str)
def test_activations_of_any_size(call: OpCaller, scheme: Scheme, size: float) -> None:
    s = MODELS["1.5b"]
    matrix = random_matrix(scheme, s.hidden, s.ffn)
    x = random_bf16(3, s.ffn) * size
    x[1, 7] = 8000 * size
    residual = torch.zeros(3, s.hidden, dtype=torch.bfloat16, device="cuda")
    reference = references.o_proj_residual(x, matrix, residual)
    out = run_residual(call, "down_residual", x, matrix, residual)
    for row in range(3):
        check("down_residual", out[row], reference[row])


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("scheme", MAIN, ids=str)
def test_what_is_not_finite_stays_in_its_row(call: OpCaller, scheme: Scheme, number: float) -> None:
    s = MODELS["1.5b"]
    matrices = pair_of("1.5b", scheme)
    x, norm = hidden_rows(9, s.hidden), norm_weight(s.hidden)
    for rows in (3, 9):
        good = run_pair(call, x[:rows], norm, matrices)
        spoilt = x[:rows].clone()
        spoilt[1, 77] = number
        out = run_pair(call, spoilt, norm, matrices)
        assert out[1].isnan().all()
        out[1] = good[1]
        assert torch.equal(out, good)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("model", ["nano", "1.5b", "7b"])
def test_rows_do_not_depend_on_batch_mates(call: OpCaller, model: str, scheme: Scheme) -> None:
    s = MODELS[model]
    if not fits(scheme, s.hidden, s.ffn):
        pytest.skip("such groups do not divide the columns")
    x, norm = hidden_rows(64, s.hidden), norm_weight(s.hidden)
    qkv, pair, down = qkv_of(model, scheme), pair_of(model, scheme), random_matrix(scheme, s.hidden, s.ffn)

    def layer(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        activation = run_pair(call, rows, norm, pair)
        return run_qkv(call, rows, norm, qkv, [None] * 3), run_residual(call, "down_residual", activation, down, rows)

    for most, fewer in alike(scheme):
        some = x[-most:].contiguous()
        together = layer(some)
        for rows in fewer:
            for part in (slice(0, rows), slice(most - rows, most)):
                for got, want in zip(layer(some[part].contiguous()), together, strict=True):
                    assert torch.equal(got, want[part]), f"rows {part}"


_INVARIANT = """
import torch
from qwen_rt.benchmarks.kernel_step import OpCaller, random_bf16
from qwen_rt.benchmarks.quantized_matrices import random_matrix
from qwen_rt.plugins.library import load
from qwen_rt.quantization import Scheme

torch.manual_seed(1)
call = OpCaller(load())
x, residual, matrix = random_bf16(3, 1536), random_bf16(3, 1536), random_matrix(Scheme("fp8"), 1536, 1536)


def run(rows):
    out = torch.empty(rows, 1536, dtype=torch.bfloat16, device="cuda")
    tensors = {"attention": x[:rows].contiguous(), "residual": residual[:rows].contiguous(), "out": out}
    call("o_proj_residual", tensors | matrix.tensors(), weight_format=matrix.weight_format)
    return out


print(torch.equal(run(1), run(3)[:1]))
"""


def test_one_row_has_the_bits_of_more_where_that_is_asked_for() -> None:
    """In a process of its own, because the library reads the variable once."""
    child = subprocess.run(
        [sys.executable, "-c", _INVARIANT],
        env=os.environ | {"QWEN_RT_BATCH_INVARIANT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert child.stdout.split() == ["True"]


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int8"), Scheme("fp8", 128)], ids=str)
def test_embed(call: OpCaller, scheme: Scheme) -> None:
    table, ids = random_matrix(scheme, 1000, 896), torch.randint(1000, (9,), device="cuda")
    out = nan_bf16(9, 896)
    tensors = {"ids": ids, "table": table.weight, "scale": table.scale, "out": out}
    call("embed", tensors, weight_format=table.weight_format)
    assert torch.equal(out, references.embed(ids, table))
    ids[0] = 1000
    call("embed", tensors, weight_format=table.weight_format)
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


# ---- refusals ----


def refused(call: Callable[[], Any], match: str, kind: type[Exception] = QwenRtError) -> None:
    with pytest.raises(kind, match=match):
        call()


def test_what_is_not_whole_or_not_supported_is_refused(call: OpCaller) -> None:
    s = NANO
    x, residual = random_bf16(2, 512), random_bf16(2, s.hidden)
    good = random_matrix(Scheme("int8", 128, symmetric=False), s.hidden, 512)

    def down(**changes: Any) -> Callable[[], Any]:
        tensors = {"activation": x, "residual": residual, "out": nan_bf16(2, s.hidden)} | good.tensors()
        weight_format = changes.pop("weight_format", good.weight_format)
        return lambda: call("down_residual", tensors | changes, weight_format=weight_format)

    refused(down(weight_format=5), "weight_format=5; expected 0 .bf16., 1 .fp8., 2 .int8., 3 .int4. or 4")
    refused(down(weight_format=0.5), "weight_format=0.5")
    refused(down(weight_format=0), "scales, zero points or a column order of bf16 matrices; expected none")
    refused(down(weight_format=1), "1 of 1 matrices have zero points; expected none of fp8")
    refused(down(scale=None, zero_point=None), "0 of 1 quantized matrices have scales; expected all")
    odd = torch.ones(s.hidden, 64, device="cuda")
    refused(down(scale=odd, zero_point=None), "groups=64 of 512 columns", UnsupportedModelError)
    pair = [random_matrix(Scheme("int8"), s.ffn, s.hidden) for _ in range(2)]
    half = Matrix(pair[1].format, pair[1].shape, pair[1].weight)
    hidden, norm = random_bf16(2, s.hidden), norm_weight(s.hidden)
    refused(lambda: run_pair(call, hidden, norm, [pair[0], half]), "1 of 2 quantized")
    head = random_matrix(Scheme("int8", permuted=True), 64, s.hidden)
    refused(lambda: run_head(call, hidden, norm, head), "perm of an LM head")
    table = random_matrix(Scheme("int8"), 100, s.hidden)
    tensors = {
        "ids": torch.zeros(1, dtype=torch.int64, device="cuda"),
        "table": table.weight,
        "out": nan_bf16(1, s.hidden),
    }
    refused(lambda: call("embed", tensors, weight_format=2), "weight_format=2 with groups=0")
    refused(lambda: call("embed", tensors | {"scale": table.scale}, weight_format=3), "weight_format=3 of an embedding")
    permuted = random_matrix(Scheme("int8", permuted=True), s.hidden, 512)
    parts = (x, permuted.weight, residual, permuted.scale, None, permuted.perm, nan_bf16(2, s.hidden))
    pointers = [None if part is None else part.data_ptr() for part in parts]
    refused(
        lambda: call.library.launch("down_residual", pointers, (2, 512, s.hidden, 1), (2.0,)),
        "no workspace for permuted columns",
    )
