// Multiplies the gated activation by the down matrix and adds it to the residual stream:
//   out[n] = residual[n] + weight · activation[n]
//
// Tensors (in this order):
//   activation bf16[rows, ffn]       in
//   weight     [hidden, ffn]         in, bf16 row-major as in the checkpoint, or quantized (core/quantization.py)
//   residual   bf16[rows, hidden]    in
//   scale, zero_point, perm          in, of a quantized weight: [hidden, groups], as packed, i32[ffn]; the last two optional
//   out        bf16[rows, hidden]    out, may be the residual itself: each element is read and written by one thread
// Dims: rows, ffn, hidden, groups (0: bf16). Attributes: weight_format.
//
// Numerics, mapping: up to 32 rows, or 64 of a weight that takes_products() leaves, common/skinny_gemm.cuh, more
//   common/prefill.cuh (2048 rows and more of e4m3 on SM 9.0: common/tile_gemm.cu); all add the residual in f32 before the one rounding to bf16.
// Workspace: up to 32 rows none for bf16, else room for permuted or prepared x; more rows: the counters (not used), cuBLASLt's, and of
//   quantized weights those of common/prefill.cuh.
// Preconditions (the launcher checks): ffn a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden a
//   multiple of 8; a workspace aligned to 256 bytes.
// Cost: the stored bytes of the weight, 2 · hidden · ffn FLOPs per row; bound by reading, beyond some 300 rows by the tensor
//   cores.
// Reference: benchmarks/kernel_references.py::down_residual; test: tests/plugins/test_kernels_gpu.py,
//   test_prefill_gpu.py, test_quantized_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2MLP.down_proj and Qwen2DecoderLayer of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"

namespace qwen_rt {

int64_t workspace_down_residual(const int64_t* dims, int32_t) { return workspace_residual(dims); }

int32_t launch_down_residual(const QwenRtCall& call) { return launch_residual(call); }

}  // namespace qwen_rt
