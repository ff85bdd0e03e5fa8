// Chooses the next token of each row, greedily: next_ids[n] = argmax(logits[n]), the lowest id among equals
//
// Tensors (in this order):
//   logits    f32[rows, vocab] in; NaN never wins (a row of nothing else gives id 0)
//   positions i64[rows]        in and out, optional (NULL): each that is >= 0 grows by one, ready for the next step
//   next_ids  i64[rows]        out
//   next_positions             out: positions itself, or NULL
// Dims: rows, vocab. No attributes.
//
// Numerics: comparisons only, bit-exact.
// Mapping: kSlices blocks per row, 16 bytes per thread and turn; the block of a row that comes last combines the slices.
// Workspace: per row a counter (zeroed once by the caller, left zero) and kSlices pairs of value and id.
// Preconditions (the launcher checks): vocab a multiple of 4, workspace given.
// Cost: 4 · rows · vocab bytes, mostly from L2 after lm_head; bound by latency.
// Reference: benchmarks/kernel_references.py::sample; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: greedy decoding, runtime/sampler.py.
#include "../common/launch.cuh"
#include "../common/ops.cuh"
#include "../common/ptx.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

constexpr int kSlices = 32;
constexpr int kSampleThreads = 256;

// Larger value first, lower id among equals: one order on 64 bits, so that any way of combining gives the same token.
__device__ __forceinline__ unsigned long long order_of(float value, uint32_t id) {
    if (isnan(value)) return 0;
    value = value == 0.f ? 0.f : value;  // -0 equals +0
    const uint32_t bits = __float_as_uint(value);
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (static_cast<unsigned long long>(ordered) << 32) | ~id;
}

__device__ __forceinline__ unsigned long long larger(unsigned long long a, unsigned long long b) { return a > b ? a : b; }

// ---------------------------------------------------------------- kernel

__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const float* logits, int64_t* positions, int64_t* next_ids, unsigned long long* partial, uint32_t* counters,
                  int vocab) {
    __shared__ unsigned long long of_warp[kSampleThreads / 32];
    __shared__ bool is_last;
    const int row = blockIdx.y;
    wait_for_previous_grids();
    let_next_grid_start();
    const float4* from = reinterpret_cast<const float4*>(logits + static_cast<int64_t>(row) * vocab);
    const int quads = vocab / 4;
    const int begin = static_cast<int>(static_cast<int64_t>(quads) * blockIdx.x / kSlices);
    const int end = static_cast<int>(static_cast<int64_t>(quads) * (blockIdx.x + 1) / kSlices);
    unsigned long long best = 0;
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kSampleThreads) {
        const float4 v = __ldcg(from + i);
        best = larger(best, larger(larger(order_of(v.x, 4 * i), order_of(v.y, 4 * i + 1)),
                                   larger(order_of(v.z, 4 * i + 2), order_of(v.w, 4 * i + 3))));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) best = larger(best, __shfl_xor_sync(~0u, best, step));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 1; w < kSampleThreads / 32; ++w) best = larger(best, of_warp[w]);
        __stcg(partial + row * kSlices + blockIdx.x, best);
        __threadfence();
        is_last = atomicAdd(counters + row, 1) == kSlices - 1;
        __threadfence();
    }
    __syncthreads();
    if (is_last && threadIdx.x < 32) {
        best = __ldcg(partial + row * kSlices + threadIdx.x);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) best = larger(best, __shfl_xor_sync(~0u, best, step));
        if (threadIdx.x == 0) {
            next_ids[row] = best == 0 ? 0 : static_cast<int64_t>(~static_cast<uint32_t>(best));
            if (positions != nullptr && positions[row] >= 0) positions[row] += 1;
            counters[row] = 0;
        }
    }
}

// ---------------------------------------------------------------- launcher

int64_t workspace_sample(const int64_t* dims, int32_t) { return dims[0] * (256 + kSlices * 8); }

int32_t launch_sample(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 1, 4, 2, 0, 0b1110)) return status;
    if (call.tensors[2] == nullptr) return refuse(call, QWEN_RT_INVALID, "next_ids is NULL; expected a device pointer");
    if (call.tensors[3] != nullptr && call.tensors[3] != call.tensors[1])
        return refuse(call, QWEN_RT_INVALID, "next_positions is another buffer; expected positions itself");
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int64_t rows = call.dims[0], vocab = call.dims[1], needed = workspace_sample(call.dims, call.num_dims);
    if (vocab % 4 != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "vocab=%lld; expected a multiple of 4", (long long)vocab);
    if (call.workspace == nullptr || call.workspace_bytes < needed)
        return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld; expected %lld", (long long)call.workspace_bytes,
                      (long long)needed);
    auto* counters = static_cast<uint32_t*>(call.workspace);
    auto* partial = reinterpret_cast<unsigned long long*>(static_cast<char*>(call.workspace) + rows * 256);
    return launch(call, sample_kernel, device, dim3(kSlices, static_cast<unsigned>(rows)), kSampleThreads, 0,
                  static_cast<const float*>(call.tensors[0]), static_cast<int64_t*>(call.tensors[1]),
                  static_cast<int64_t*>(call.tensors[2]), partial, counters, static_cast<int>(vocab));
}

}  // namespace qwen_rt
