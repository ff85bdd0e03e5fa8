// Looks up token embeddings: out[n] = table[ids[n]]
//
// Tensors (in this order):
//   ids   i64[rows]            in; an id outside 0..vocab - 1 gives a row of NaN, so that it cannot pass unnoticed
//   table bf16[vocab, hidden]  in
//   out   bf16[rows, hidden]   out
// Dims: rows, vocab, hidden. No attributes.
//
// Numerics: a copy, bit-exact.
// Mapping: one block per row, 16 bytes per thread and turn.
// Overlap: the first kernel of a step. It lets the next kernel start only after its own wait: so every kernel behind it may
//   read, before waiting, what the step before wrote (positions, block tables, the KV cache's earlier tokens).
// Preconditions (the launcher checks): hidden a multiple of 8, 16-byte aligned table and out. Any number of
//   rows.
// Cost: 4 · rows · hidden bytes; bound by latency.
// Reference: benchmarks/kernel_references.py::embed; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: Qwen2Model.embed_tokens of transformers' modeling_qwen2.py.
#include "../common/launch.cuh"
#include "../common/ops.cuh"
#include "../common/ptx.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

__global__ void embed_kernel(const int64_t* ids, const bf16* table, bf16* out, int64_t vocab, int hidden) {
    wait_for_previous_grids();
    let_next_grid_start();
    const int64_t id = __ldcg(reinterpret_cast<const long long*>(ids) + blockIdx.x);
    const bool is_valid = id >= 0 && id < vocab;
    const uint4* from = reinterpret_cast<const uint4*>(table + (is_valid ? id : 0) * hidden);
    uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(blockIdx.x) * hidden);
    const uint4 nan = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);
    for (int i = threadIdx.x; i < hidden / 8; i += blockDim.x) to[i] = is_valid ? __ldg(from + i) : nan;
}

// ---------------------------------------------------------------- launcher

int32_t launch_embed(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 3, 3, 3, 0, 0b1)) return status;
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int hidden = static_cast<int>(call.dims[2]);
    if (hidden % 8 != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "hidden=%d; expected a multiple of 8", hidden);
    return launch(call, embed_kernel, device, dim3(static_cast<unsigned>(call.dims[0])), 256, 0,
                  static_cast<const int64_t*>(call.tensors[0]), static_cast<const bf16*>(call.tensors[1]),
                  static_cast<bf16*>(call.tensors[2]), call.dims[1], hidden);
}

}  // namespace qwen_rt
