"""Made-up records of kernels, as CUPTI would give them."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_rt.benchmarks.profile.cupti import Activity
from qwen_rt.benchmarks.profile.kernels import ops_of_step


def skinny(norm: bool) -> str:
    return (
        f"_ZN7qwen_rt11skinny_gemmILNS_6FormatE0ELNS_7ScalingE0ELb{int(norm)}ELi1ELi2ELi5ELb0ELi1EEEvNS_12SkinnyParamsE"
    )


EMBED = "_ZN7qwen_rt12embed_kernelEPKl"
ATTENTION = "_ZN7qwen_rt23attention_decode_kernelILi128ELi3EEEvNS_15AttentionParamsE"
APPEND = "_ZN7qwen_rt21prefill_append_kernelILi128EEEvNS_13PrefillParamsE"
OVER_CACHE = "_ZN7qwen_rt29attention_prefill_sm90_kernelILi128ELb0EEEvNS_17PrefillSm90ParamsE"
NORM = "_ZN7qwen_rt12_GLOBAL__N_110row_kernelILi2ELb1ELb0EEEvPKtS2_Pv"
ROUND = "_ZN7qwen_rt12_GLOBAL__N_110row_kernelILi2ELb0ELb1EEEvPKtS2_Pv"
SLAB = "_ZN7qwen_rt17dequantize_kernelILNS_6FormatE3EEEvPKh"
REORDER = "_ZN7qwen_rt14reorder_kernelEPKtS1_PKiPtii"
GATHER = "_ZN7qwen_rt13gather_kernelENS_6GatherES0_PKll"
GATE = "_ZN7qwen_rt11gate_kernelEPKtPti"
LIBRARY = "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT"
GREEDY = "_ZN7qwen_rt13greedy_kernelENS_12SampleParamsE"

DECODE = {
    "embed": [EMBED],
    "rmsnorm_qkv": [skinny(True)],
    "rope_kv_append_attention": [ATTENTION],
    "o_proj_residual": [skinny(False)],
    "select_o_proj_residual": [skinny(False)],
    "rmsnorm_gate_up_silu": [skinny(True)],
    "down_residual": [skinny(False)],
    "lm_head": [skinny(True)],
    "sample": [GREEDY],
}
"""Op → its kernels in a decode step of bf16."""

FEW = "_ZN7qwen_rt15skinny_8bit_fewILNS_6FormatE1ELi2ELi1ELi4ELi2EEEvNS_12SkinnyParamsENS_14FewBytesLayoutE"
WIDE = "_ZN7qwen_rt9wide_gemmILNS_6FormatE1ELi48ELi4ELi7ELb0EEEvNS_10WideParamsE"
PREPARE = "_ZN7qwen_rt12prepare_rowsILNS_6FormatE1EEEvPK13__nv_bfloat16S4_PhPfii"
FINISH = "_ZN7qwen_rt22finish_integers_kernelENS_11IntegerSumsEPK13__nv_bfloat16"
GATE_INTEGERS = "_ZN7qwen_rt20gate_integers_kernelENS_11IntegerSumsES0_P13__nv_bfloat16i"


def int4(kind: str, has_norm: bool) -> str:
    """A kernel of int4 matrices and few rows."""
    return f"_ZN7qwen_rt{12 + len(kind)}skinny_int4_{kind}ILb{int(has_norm)}ELb0ELi2ELi4ELi1EEEvNS_12SkinnyParamsE"


_MATRICES = ("rmsnorm_qkv", "o_proj_residual", "select_o_proj_residual", "rmsnorm_gate_up_silu", "down_residual")
FP8_ROW = DECODE | {"rmsnorm_qkv": [FEW], "o_proj_residual": [FEW], "select_o_proj_residual": [FEW]}
FP8_ROWS = DECODE | {key: [PREPARE, WIDE] for key in _MATRICES}
INT8_ROWS = DECODE | {key: [PREPARE, WIDE, PREPARE, WIDE] for key in _MATRICES}
INT4_ROW = DECODE | {op: [int4("direct" if "o_proj" in op else "ring", "rmsnorm" in op)] for op in _MATRICES}
PREFILL = DECODE | {
    "rmsnorm_qkv": [NORM, LIBRARY],
    "rope_kv_append_attention": [APPEND, OVER_CACHE],
    "o_proj_residual": [LIBRARY],
    "select_o_proj_residual": [GATHER, skinny(False)],
    "rmsnorm_gate_up_silu": [NORM, LIBRARY, GATE],
    "down_residual": [LIBRARY],
}
INT8_PREFILL = PREFILL | {
    "rmsnorm_qkv": [NORM, LIBRARY, FINISH],
    "o_proj_residual": [ROUND, LIBRARY, FINISH, LIBRARY, FINISH],
    "rmsnorm_gate_up_silu": [NORM, LIBRARY, LIBRARY, GATE_INTEGERS, LIBRARY, LIBRARY, GATE_INTEGERS],
    "down_residual": [ROUND, LIBRARY, FINISH],
}
"""The same in a prefill."""


def step(
    start_us: float,
    num_layers: int,
    kernels: dict[str, list[str]] = DECODE,
    *,
    each_us: float = 10.0,
    apart_us: float = 1.0,
    samples: bool = True,
    launch: int = 1,
) -> list[Activity]:
    """One pass of the model: kernels of `each_us`, `apart_us` between them (below 0: they overlap by so much)."""
    found, at = [], start_us
    for op in ops_of_step(num_layers, samples=samples):
        for name in kernels[op]:
            found.append(Activity(name, round(1e3 * at), round(1e3 * (at + each_us)), 7, launch, len(found) + 1))
            at += each_us + apart_us
    return found


def steps(count: int, num_layers: int, *, between_us: float = 5.0, **how: float) -> list[Activity]:
    """`count` decode steps, each `between_us` behind the one before."""
    found: list[Activity] = []
    for number in range(count):
        start_us = 100.0 if not found else 1e-3 * found[-1].end_ns + between_us
        found += step(start_us, num_layers, launch=number + 1, **how)  # type: ignore[arg-type]
    return found


def without(activities: Sequence[Activity], *indices: int) -> list[Activity]:
    """Leave some records out."""
    return [activity for index, activity in enumerate(activities) if index not in indices]
