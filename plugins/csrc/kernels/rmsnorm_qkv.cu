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
// Numerics, mapping: up to 64 rows common/skinny_gemm.cuh: one rounding of hidden ∘ norm_weight to bf16, one of the result.
//   More rows: common/prefill.cuh rounds the whole norm once, then common/cublaslt.cuh adds the bias in f32 and rounds the
//   result; one product where the matrices (and the biases, if any) lie behind each other in memory, else three.
// Workspace: none up to 64 rows; then the counters (not used), cuBLASLt's, and the normalized rows.
// Preconditions (the launcher checks): hidden a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden
//   <= 16384, a row of qkv a multiple of 8, a workspace aligned to 256 bytes.
// Cost: 2 · hidden · (q_width + 2 kv_width) bytes, twice as many FLOPs per row; bound by reading, beyond some 300 rows
//   by the tensor cores.
// Reference: benchmarks/kernel_references.py::rmsnorm_qkv; test: tests/plugins/test_kernels_gpu.py,
//   tests/plugins/test_prefill_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2Attention.{q,k,v}_proj of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"
#include "../common/skinny_dispatch.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- prefill

int64_t workspace_rmsnorm_qkv(const int64_t* dims, int32_t) {
    return dims[0] <= kMaxRows ? 0 : divide(nullptr, dims[0] * dims[1], 0).bytes;
}

static int32_t prefill_qkv(const QwenRtCall& call) {
    const int64_t rows = call.dims[0], k = call.dims[1], q_width = call.dims[2], kv_width = call.dims[3];
    const int64_t width = q_width + 2 * kv_width;
    Scratch scratch;
    if (const int32_t status = prepare_prefill(call, rows, k, width, rows * k, 0, &scratch)) return status;
    const double epsilon = call.attributes[0];
    if (const int32_t status = normalize_rows(call, call.tensors[0], call.tensors[1], scratch.normalized, rows, k, epsilon))
        return status;
    const auto tensor = [&](int i) { return static_cast<const bf16*>(call.tensors[i]); };
    bf16* out = static_cast<bf16*>(call.tensors[8]);
    const int64_t widths[3] = {q_width, kv_width, kv_width};
    bool is_one = true;
    for (int i = 0; i < 2; ++i) {
        is_one &= tensor(3 + i) == tensor(2 + i) + widths[i] * k;
        is_one &= tensor(5 + i) == nullptr ? tensor(6 + i) == nullptr : tensor(6 + i) == tensor(5 + i) + widths[i];
    }
    if (is_one)
        return matmul(call, {scratch.normalized, tensor(2), tensor(5), nullptr, out, rows, width, k, width}, scratch.matmul);
    for (int i = 0; i < 3; out += widths[i++])
        if (const int32_t status = matmul(
                call, {scratch.normalized, tensor(2 + i), tensor(5 + i), nullptr, out, rows, widths[i], k, width},
                scratch.matmul))
            return status;
    return QWEN_RT_OK;
}

// ---------------------------------------------------------------- launcher

int32_t launch_rmsnorm_qkv(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 5, 9, 4, 1)) return status;
    if (call.tensors[8] == nullptr) return refuse(call, QWEN_RT_INVALID, "qkv is NULL; expected a device pointer");
    if (call.dims[0] > kMaxRows) return prefill_qkv(call);
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
