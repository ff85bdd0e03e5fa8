// Applies the final norm and the LM head to the last row of each sequence:
//   logits[b] = weight · (x / sqrt(mean(x²) + epsilon) ∘ norm_weight), x = hidden[indices[b]]
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden]     in
//   indices     i64[sequences]         in: rows of hidden; not read if rows == sequences (then x = hidden[b]). An index
//                                      outside 0..rows - 1 gives logits of NaN, so that it cannot pass unnoticed
//   norm_weight bf16[hidden]           in
//   weight      bf16[vocab, hidden]    in, row-major as in the checkpoint (tied models: the embedding)
//   logits      f32[sequences, vocab]  out
// Dims: rows, sequences, hidden, vocab. Attributes: epsilon.
//
// Numerics, mapping: common/skinny_gemm.cuh; logits are the f32 sums, never rounded to bf16. With more rows than sequences a
//   kernel copies the rows first, one block each, 16 bytes per thread and turn: a sequence's logits have the same bits as
//   if its row were given alone.
// Workspace: none if rows == sequences; else the counters (not used) and bf16[sequences, hidden].
// Preconditions (the launcher checks): sequences <= 64, rows >= sequences, hidden a multiple of 64, 16-byte aligned pointers
//   but for indices.
// Cost: 2 · hidden · vocab bytes, twice as many FLOPs per sequence; bound by reading.
// Reference: benchmarks/kernel_references.py::lm_head; test: tests/plugins/test_kernels_gpu.py,
//   tests/plugins/test_prefill_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2Model.norm and Qwen2ForCausalLM.lm_head of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny_dispatch.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

__global__ void gather_kernel(const bf16* hidden, const int64_t* indices, bf16* out, int64_t rows, int width) {
    let_next_grid_start();
    wait_for_previous_grids();
    const int64_t index = __ldcg(reinterpret_cast<const long long*>(indices) + blockIdx.x);
    const bool is_valid = index >= 0 && index < rows;
    const bf16* from = hidden + (is_valid ? index : 0) * width;
    uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(blockIdx.x) * width);
    const uint4 nan = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) to[i] = is_valid ? load_activation(from + i * 8) : nan;
}

// ---------------------------------------------------------------- launcher

namespace {

enum Dim { kRows, kSequences, kHidden, kVocab };

}  // namespace

int64_t workspace_lm_head(const int64_t* dims, int32_t) {
    return dims[kRows] == dims[kSequences] ? 0 : QWEN_RT_COUNTER_BYTES + dims[kSequences] * dims[kHidden] * 2;
}

int32_t launch_lm_head(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 5, 5, 4, 1, 0b10)) return status;
    const int64_t rows = call.dims[kRows], sequences = call.dims[kSequences];
    if (sequences > kMaxRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "sequences=%lld; expected 1 to %d", static_cast<long long>(sequences),
                      kMaxRows);
    if (rows < sequences)
        return refuse(call, QWEN_RT_INVALID, "rows=%lld of sequences=%lld; expected at least as many",
                      static_cast<long long>(rows), static_cast<long long>(sequences));
    SkinnyParams p = {};
    p.x = static_cast<const bf16*>(call.tensors[0]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[2]);
    p.weight[0] = static_cast<const bf16*>(call.tensors[3]);
    p.out = call.tensors[4];
    p.rows = static_cast<int>(sequences);
    p.k = static_cast<int>(call.dims[kHidden]);
    p.units = static_cast<int>(call.dims[kVocab]);
    p.epsilon = static_cast<float>(call.attributes[0]);
    if (rows > sequences) {
        if (p.k % kSlice != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "k=%d; expected a multiple of %d", p.k, kSlice);
        const int64_t needed = workspace_lm_head(call.dims, call.num_dims);
        if (call.workspace == nullptr || call.workspace_bytes < needed || !is_aligned(call.workspace))
            return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld at %p; expected %lld, aligned to 16",
                          static_cast<long long>(call.workspace_bytes), call.workspace, static_cast<long long>(needed));
        Device device;
        if (const cudaError_t error = current_device(&device); error != cudaSuccess)
            return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
        bf16* gathered = reinterpret_cast<bf16*>(static_cast<char*>(call.workspace) + QWEN_RT_COUNTER_BYTES);
        if (const int32_t status = launch(call, gather_kernel, device, dim3(static_cast<unsigned>(sequences)), 128, 0, p.x,
                                          static_cast<const int64_t*>(call.tensors[1]), gathered, rows, p.k))
            return status;
        p.x = gathered;
    }
    return launch_skinny<Epilogue::kLogits, true>(call, p);
}

}  // namespace qwen_rt
