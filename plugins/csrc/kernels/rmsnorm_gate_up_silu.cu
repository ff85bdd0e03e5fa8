// Normalizes the hidden rows, multiplies by gate and up, and gates:
//   y[n] = hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight;  activation[n] = silu(gate · y[n]) ∘ (up · y[n])
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden] in
//   norm_weight bf16[hidden]       in
//   gate_weight bf16[ffn, hidden]  in, row-major as in the checkpoint; up_weight likewise
//   activation  bf16[rows, ffn]    out, must not overlap hidden
// Dims: rows, hidden, ffn. Attributes: epsilon.
//
// Numerics, mapping: common/skinny_gemm.cuh; gate and up stay in f32 until the one rounding of their product to bf16.
//   A unit is one pair of a gate and an up row: they are rows g and g + 8 of a matrix tile, so one thread holds both sums.
// Preconditions (the launcher checks): rows <= 64, hidden a multiple of 64, 16-byte aligned pointers.
// Cost: 4 · hidden · ffn bytes, twice as many FLOPs per row; bound by reading.
// Reference: benchmarks/kernel_references.py::rmsnorm_gate_up_silu; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2MLP of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny_gemm.cuh"

namespace qwen_rt {

int32_t launch_rmsnorm_gate_up_silu(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 5, 5, 3, 1)) return status;
    SkinnyParams p = {};
    p.x = static_cast<const bf16*>(call.tensors[0]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[1]);
    p.weight[0] = static_cast<const bf16*>(call.tensors[2]);
    p.weight[1] = static_cast<const bf16*>(call.tensors[3]);
    p.out = call.tensors[4];
    p.rows = static_cast<int>(call.dims[0]);
    p.k = static_cast<int>(call.dims[1]);
    p.units = static_cast<int>(call.dims[2]);
    p.epsilon = static_cast<float>(call.attributes[0]);
    return launch_skinny<Epilogue::kSiluGate, true>(call, p);
}

}  // namespace qwen_rt
