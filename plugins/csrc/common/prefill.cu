// Scratch, norm and residual product of a prefill. See prefill.cuh.
//
// Norm: one block of 256 threads per row, which holds the row in registers between its two uses: rows are read once, 16
//   bytes per thread and turn. Squares are summed per thread in order, then by halves of the warp, then in warp order, so a
//   row's result does not depend on the others. x / rms ∘ weight is rounded once; the skinny kernel rounds x ∘ weight and
//   applies 1 / rms to the f32 sum: equally exact, not the same bits.
// Overlap: cuBLASLt's kernels are launched the ordinary way, complete before the next begins and after the one before; our
//   own kernels among them wait for what is before them as always.
#include "prefill.cuh"

#include "launch.cuh"
#include "ptx.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

namespace {

constexpr int kNormThreads = 256;
constexpr int kNormVector = kNormThreads * 8;  // elements of a row that a block loads in one turn

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Scratch divide(void* workspace, int64_t num_normalized, int64_t num_product) {
    const int64_t matmul = QWEN_RT_COUNTER_BYTES, normalized = matmul + kMatmulWorkspaceBytes;
    const int64_t product = normalized + round_up(num_normalized * 2), bytes = product + round_up(num_product * 2);
    if (workspace == nullptr) return {nullptr, nullptr, nullptr, bytes};
    char* base = static_cast<char*>(workspace);
    return {base + matmul, reinterpret_cast<bf16*>(base + normalized), reinterpret_cast<bf16*>(base + product), bytes};
}

int32_t prepare_prefill(const QwenRtCall& call, int64_t rows, int64_t k, int64_t width, int64_t num_normalized,
                        int64_t num_product, Scratch* scratch) {
    if (rows > kMaxPrefillRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%lld; expected at most %lld", static_cast<long long>(rows),
                      static_cast<long long>(kMaxPrefillRows));
    if (k % 64 != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "k=%lld; expected a multiple of 64", static_cast<long long>(k));
    if (width % 8 != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "width=%lld of the output; expected a multiple of 8",
                      static_cast<long long>(width));
    *scratch = divide(call.workspace, num_normalized, num_product);
    if (call.workspace == nullptr || call.workspace_bytes < scratch->bytes)
        return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld; expected %lld",
                      static_cast<long long>(call.workspace == nullptr ? 0 : call.workspace_bytes),
                      static_cast<long long>(scratch->bytes));
    if ((reinterpret_cast<uintptr_t>(call.workspace) & 255u) != 0)
        return refuse(call, QWEN_RT_INVALID, "workspace at %p; expected an address divisible by 256", call.workspace);
    return QWEN_RT_OK;
}

// ---------------------------------------------------------------- kernel

template <int kVectors>
__global__ void __launch_bounds__(kNormThreads)
    normalize_kernel(const bf16* x, const bf16* weight, bf16* out, int k, float epsilon) {
    __shared__ float of_warp[kNormThreads / 32];
    let_next_grid_start();
    wait_for_previous_grids();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
    uint4 v[kVectors];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = i * kNormVector + static_cast<int>(threadIdx.x) * 8;
        v[i] = at < k ? load_activation(x + row + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = unpack(pairs[j]);
            sum = fmaf(f.x, f.x, sum);
            sum = fmaf(f.y, f.y, sum);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < kNormThreads / 32; ++w) sum += of_warp[w];
    const float scale = rsqrtf(sum / static_cast<float>(k) + epsilon);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = i * kNormVector + static_cast<int>(threadIdx.x) * 8;
        if (at >= k) continue;
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(weight + at));
        const uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w}, weights[4] = {w.x, w.y, w.z, w.w};
        uint32_t scaled[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = unpack(pairs[j]), g = unpack(weights[j]);
            scaled[j] = pack(f.x * scale * g.x, f.y * scale * g.y);
        }
        *reinterpret_cast<uint4*>(out + row + at) = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
    }
}

// ---------------------------------------------------------------- launcher

int32_t normalize_rows(const QwenRtCall& call, const void* x, const void* weight, bf16* out, int64_t rows, int64_t k,
                       double epsilon) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    // A thread holds 1, 2, 4 or 8 vectors of the row: 2048, 4096, 8192 or 16384 elements a block.
    const auto kernel = k <= kNormVector       ? normalize_kernel<1>
                        : k <= 2 * kNormVector ? normalize_kernel<2>
                        : k <= 4 * kNormVector ? normalize_kernel<4>
                                               : normalize_kernel<8>;
    if (k > 8 * kNormVector)
        return refuse(call, QWEN_RT_UNSUPPORTED, "hidden=%lld; expected at most %d", static_cast<long long>(k),
                      8 * kNormVector);
    return launch(call, kernel, device, dim3(static_cast<unsigned>(rows)), kNormThreads, 0, static_cast<const bf16*>(x),
                  static_cast<const bf16*>(weight), out, static_cast<int>(k), static_cast<float>(epsilon));
}

int64_t workspace_residual(const int64_t* dims) {
    return dims[0] <= kMaxRows ? 0 : divide(nullptr, 0, 0).bytes;
}

int32_t prefill_residual(const QwenRtCall& call) {
    const int64_t rows = call.dims[0], k = call.dims[1], hidden = call.dims[2];
    Scratch scratch;
    if (const int32_t status = prepare_prefill(call, rows, k, hidden, 0, 0, &scratch)) return status;
    return matmul(call,
                  {call.tensors[0], call.tensors[1], nullptr, call.tensors[2], call.tensors[3], rows, hidden, k, hidden},
                  scratch.matmul);
}

}  // namespace qwen_rt
