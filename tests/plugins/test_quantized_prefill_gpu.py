"""The matrix ops on quantized weights, on the GPU: more rows than a decode step has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qwen_rt.ops import INT8_ROWS
from qwen_rt.quantization import Scheme

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
from qwen_rt.benchmarks import kernel_references as references  # noqa: E402
from qwen_rt.benchmarks.kernel_step import random_bf16  # noqa: E402
from qwen_rt.benchmarks.quantized_matrices import random_matrix  # noqa: E402

from .gpu_kit import EPSILON, MODELS, check, nan_bf16, norm_weight, takes_products  # noqa: E402
from .quantized_kit import (  # noqa: E402
    MAIN,
    SCHEMES,
    cases,
    fits,
    hidden_rows,
    pair_of,
    qkv_of,
    run_pair,
    run_qkv,
    run_residual,
)

MOST_SHORT = 2**-6
"""Of a sum of e4m3 products of one sign: f32 takes it over from the matrix units every 1024 columns or so, whose 14
bits lose 2^-8 by then; rounding to bf16 2^-9, and activations that fall to either side of a tie as much."""


@pytest.mark.parametrize("rows", [65, 999])
@pytest.mark.parametrize(("model", "scheme"), cases(("nano", "1.5b", "7b"), SCHEMES))
def test_prefill(call: OpCaller, model: str, scheme: Scheme, rows: int) -> None:
    s = MODELS[model]
    if not fits(scheme, s.hidden, s.ffn):
        pytest.skip("such groups do not divide the columns")
    sm = torch.cuda.get_device_capability()
    fp8 = scheme == Scheme("fp8") and sm == (9, 0)
    fine = {"is_prefill": True, "is_fine": not fp8, "is_fp8": fp8}
    x, norm = hidden_rows(rows, s.hidden), norm_weight(s.hidden)
    qkv = qkv_of(model, scheme)
    biases = [random_bf16(m.shape[0]) for m in qkv]
    out = run_qkv(call, x, norm, qkv, biases)
    check("rmsnorm_qkv", out, references.rmsnorm_qkv(x, norm, qkv, biases, EPSILON, fp8=fp8), **fine)
    assert torch.equal(run_qkv(call, x, norm, qkv, biases), out), "other bits the second time"
    pair = pair_of(model, scheme)
    reference = references.rmsnorm_gate_up_silu(x, norm, *pair, EPSILON, fp8=fp8)
    check("rmsnorm_gate_up_silu", run_pair(call, x, norm, pair), reference, **fine)
    down, y = random_matrix(scheme, s.hidden, s.ffn), random_bf16(rows, s.ffn)
    reference = references.o_proj_residual(y, down, x, fp8=fp8)
    residual = x.clone()
    run_residual(call, "down_residual", y, down, residual, residual)
    for part in torch.tensor_split(torch.arange(rows), 8):
        check("down_residual", residual[part], reference[part], **fine)
    assert call.counters_are_zero()


@pytest.mark.parametrize("rows", [2048, 2500])
@pytest.mark.parametrize("model", ["nano", "1.5b", "7b"])
def test_fp8_prefill_of_more_rows(call: OpCaller, model: str, rows: int) -> None:
    s, scheme = MODELS[model], Scheme("fp8")
    fp8 = torch.cuda.get_device_capability() == (9, 0)
    kind = {"is_prefill": True, "is_fine": not fp8, "is_fp8": fp8}
    # An activation at a tie of e4m3 may be rounded the other way than in the reference, which moves its whole row: in
    # one of many draws, one of 22 million numbers is then beyond the tolerance.
    torch.manual_seed(0)
    x, norm, pair = hidden_rows(rows, s.hidden), norm_weight(s.hidden), pair_of(model, scheme)
    out = run_pair(call, x, norm, pair)
    check("rmsnorm_gate_up_silu", out, references.rmsnorm_gate_up_silu(x, norm, *pair, EPSILON, fp8=fp8), **kind)
    assert torch.equal(run_pair(call, x, norm, pair), out), "other bits the second time"
    down, y = random_matrix(scheme, s.hidden, s.ffn), random_bf16(rows, s.ffn)
    reference = references.o_proj_residual(y, down, x, fp8=fp8)
    residual = x.clone()
    run_residual(call, "down_residual", y, down, residual, residual)
    for part in torch.tensor_split(torch.arange(rows), 8):
        check("down_residual", residual[part], reference[part], **kind)
    assert call.counters_are_zero()


def test_fp8_products_are_the_same_wherever_matrices_lie(call: OpCaller) -> None:
    rows, k, widths = 2100, 8320, [384, 128, 128]  # so many columns that they are summed in f32
    x, norm, bias = hidden_rows(rows, k), norm_weight(k), random_bf16(sum(widths))
    together = random_matrix(Scheme("fp8"), sum(widths), k).split(widths)
    apart = [replace(m, weight=m.weight.clone(), scale=m.scale.clone()) for m in together if m.scale is not None]
    out = run_qkv(call, x, norm, together, list(bias.split(widths)))
    fp8 = torch.cuda.get_device_capability() == (9, 0)
    reference = references.rmsnorm_qkv(x, norm, together, bias.split(widths), EPSILON, fp8=fp8)
    check("rmsnorm_qkv", out, reference, is_prefill=True, is_fine=not fp8, is_fp8=fp8)
    assert torch.equal(run_qkv(call, x, norm, apart, [part.clone() for part in bias.split(widths)]), out)


@pytest.mark.parametrize("width", [8960, 18944, 29568])
def test_fp8_sums_of_one_sign_are_not_short(call: OpCaller, width: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the matrix units of SM 9.0 keep 14 bits of a sum of e4m3 products")
    rows, units = 2100, 520
    x, matrix = random_bf16(rows, width).abs(), random_matrix(Scheme("fp8"), units, width)
    matrix = replace(matrix, weight=matrix.weight.float().abs().to(torch.float8_e4m3fn))
    zeros = torch.zeros(rows, units, dtype=torch.bfloat16, device="cuda")
    out = run_residual(call, "down_residual", x, matrix, zeros).double()
    reference = references.o_proj_residual(x, matrix, zeros, fp8=True)
    assert float(((out - reference) / reference).abs().max()) < MOST_SHORT


@pytest.mark.parametrize(("rows", "sequences"), [(10, 2), (999, 16), (64, 64)])
@pytest.mark.parametrize("scheme", [*MAIN, Scheme("int4", 128, permuted=True)], ids=str)
def test_the_last_projection_takes_the_chosen_rows(call: OpCaller, scheme: Scheme, rows: int, sequences: int) -> None:
    s = MODELS["1.5b"]
    width = s.heads * s.head_dim
    x, matrix, residual = random_bf16(rows, width), random_matrix(scheme, s.hidden, width), random_bf16(rows, s.hidden)
    indices = torch.randperm(rows, device="cuda")[:sequences] if rows > sequences else torch.arange(rows, device="cuda")
    out = nan_bf16(sequences, s.hidden)
    tensors = {"attention": x, "indices": indices, "residual": residual, "out": out} | matrix.tensors()
    call("select_o_proj_residual", tensors, weight_format=matrix.weight_format)
    alone = run_residual(call, "o_proj_residual", x[indices], matrix, residual[indices])
    check("o_proj_residual", out, references.o_proj_residual(x[indices], matrix, residual[indices]))
    assert torch.equal(out, alone) or takes_products(sequences, scheme)


@pytest.mark.parametrize("rows", [65, 999, 3000])
@pytest.mark.parametrize("model", ["nano", "1.5b", "7b"])
def test_prefill_that_rounds_activations_to_int8(call: OpCaller, model: str, rows: int) -> None:
    s = MODELS[model]
    x, norm, scheme = hidden_rows(rows, s.hidden), norm_weight(s.hidden), Scheme("int8")
    qkv, pair, down = qkv_of(model, scheme), pair_of(model, scheme), random_matrix(scheme, s.hidden, s.ffn)
    biases, y = [random_bf16(m.shape[0]) for m in qkv], random_bf16(rows, s.ffn)

    out = run_qkv(call, x, norm, qkv, biases, INT8_ROWS)
    check("rmsnorm_qkv", out, references.rmsnorm_qkv(x, norm, qkv, biases, EPSILON, int8=True), is_fp8=True)
    reference = references.rmsnorm_gate_up_silu(x, norm, *pair, EPSILON, int8=True)
    check("rmsnorm_gate_up_silu", run_pair(call, x, norm, pair, INT8_ROWS), reference, is_fp8=True)
    added = run_residual(call, "down_residual", y, down, x, weight_format=INT8_ROWS)
    reference = references.o_proj_residual(y, down, x, int8=True)
    for part in torch.tensor_split(torch.arange(rows), 8):
        check("down_residual", added[part], reference[part], is_fp8=True)
    x[3, 4] = float("nan")
    spoilt = run_qkv(call, x, norm, qkv, biases, INT8_ROWS)
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[4:], out[4:])
