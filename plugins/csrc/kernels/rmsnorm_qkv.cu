// Normalizes the hidden rows and multiplies by the three attention matrices:
//   qkv[n] = concat(q_weight, k_weight, v_weight) · (hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight) + bias
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden]              in
//   norm_weight bf16[hidden]                    in
//   q_weight    bf16[q_width, hidden]           in, row-major as in the checkpoint; k_weight, v_weight bf16[kv_width, hidden]
//   q_bias      bf16[q_width]                   in, optional (NULL); k_bias, v_bias bf16[kv_width], likewise
//   qkv         bf16[rows, q_width + 2 kv_width] out, must not overlap hidden
// Dims: rows, hidden, q_width, kv_width. Attributes: epsilon.
//
// Numerics, mapping: common/skinny_gemm.cuh; one rounding of hidden ∘ norm_weight to bf16, one of the result.
// Preconditions (the launcher checks): rows <= 64, hidden a multiple of 64, 16-byte aligned pointers.
// Cost: 2 · hidden · (q_width + 2 kv_width) bytes, twice as many FLOPs per row; bound by reading.
// Reference: benchmarks/kernel_references.py::rmsnorm_qkv; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2Attention.{q,k,v}_proj of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny_gemm.cuh"

namespace qwen_rt {

int32_t launch_rmsnorm_qkv(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 5, 9, 4, 1)) return status;
    if (call.tensors[8] == nullptr) return refuse(call, QWEN_RT_INVALID, "qkv is NULL; expected a device pointer");
    SkinnyParams p = {};
    const auto tensor = [&](int i) { return static_cast<const bf16*>(call.tensors[i]); };
    const int q_width = static_cast<int>(call.dims[2]), kv_width = static_cast<int>(call.dims[3]);
    p.x = tensor(0);
    p.norm_weight = tensor(1);
    for (int i = 0; i < 3; ++i) p.weight[i] = tensor(2 + i), p.bias[i] = tensor(5 + i);
    p.out = call.tensors[8];
    p.rows = static_cast<int>(call.dims[0]);
    p.k = static_cast<int>(call.dims[1]);
    p.segment_end[0] = q_width;
    p.segment_end[1] = q_width + kv_width;
    p.segment_end[2] = p.units = q_width + 2 * kv_width;
    p.epsilon = static_cast<float>(call.attributes[0]);
    return launch_skinny<Epilogue::kBias, true>(call, p);
}

}  // namespace qwen_rt
