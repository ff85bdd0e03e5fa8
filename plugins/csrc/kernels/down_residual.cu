// Multiplies the gated MLP activations by the down projection and adds them to the residual stream:
//   out[n] = residual[n] + weight · activation[n]
//
// Tensors (in this order):
//   activation bf16[rows, ffn]     in
//   weight     bf16[hidden, ffn]   in, row-major as in the checkpoint
//   residual   bf16[rows, hidden]    in
//   out        bf16[rows, hidden]    out, may be the residual itself: each element is read and written by one thread
// Dims: rows, ffn, hidden. No attributes.
//
// Numerics, mapping: up to 64 rows common/skinny_gemm.cuh, more common/cublaslt.cuh; both add the residual in f32 before
//   the one rounding to bf16.
// Workspace: none up to 64 rows; then the counters (not used) and cuBLASLt's.
// Preconditions (the launcher checks): ffn a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden a
//   multiple of 8, a workspace aligned to 256 bytes.
// Cost: 2 · hidden · ffn bytes, twice as many FLOPs per row; bound by reading, beyond some 300 rows by the tensor cores.
// Reference: benchmarks/kernel_references.py::down_residual; test: tests/plugins/test_kernels_gpu.py,
//   tests/plugins/test_prefill_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2MLP.down_proj and Qwen2DecoderLayer of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"
#include "../common/skinny_dispatch.cuh"

namespace qwen_rt {

int64_t workspace_down_residual(const int64_t* dims, int32_t) { return workspace_residual(dims); }

int32_t launch_down_residual(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 4, 4, 3, 0)) return status;
    if (call.dims[0] > kMaxRows) return prefill_residual(call);
    SkinnyParams p = {};
    p.x = static_cast<const bf16*>(call.tensors[0]);
    p.weight[0] = static_cast<const bf16*>(call.tensors[1]);
    p.residual = static_cast<const bf16*>(call.tensors[2]);
    p.out = call.tensors[3];
    p.rows = static_cast<int>(call.dims[0]);
    p.k = static_cast<int>(call.dims[1]);
    p.units = static_cast<int>(call.dims[2]);
    return launch_skinny<Epilogue::kResidual, false>(call, p);
}

}  // namespace qwen_rt
