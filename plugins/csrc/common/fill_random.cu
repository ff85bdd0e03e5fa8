// Fills device memory with normal numbers: out[i] = bf16(std · z_i), so that benchmarks need no checkpoint.
//
//   z_2n, z_2n+1 = r cos a, r sin a   with r = sqrt(-2 ln u), a = 2 pi v, and u, v the two halves of hash(seed, n)
//
// Tensors: out bf16[count], 4-byte aligned.
// Numerics: f32, rounded to bf16 once. u is never 0, so that |z| < 5.9. A number depends on std, seed and i only: any grid
//   gives the same.
// Mapping: a thread makes pairs, grid-stride; 4 bytes a store, whole warps behind each other.
// Preconditions (checked): count >= 0, out given and aligned, std finite.
// Cost: 2 · count bytes written, about 30 instructions a pair.
// Reference and test: tests/runtime/cuda/test_session_gpu.py (mean, deviation, repeat, odd count). No bench: it runs once.
// Source: Box-Muller; the hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
//   number generators") over a Weyl sequence.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../capi.h"

// Enqueue the filling on `stream`. Returns QWEN_RT_OK, QWEN_RT_INVALID or QWEN_RT_CUDA_ERROR.
extern "C" int32_t qwen_rt_fill_random(void* bf16, int64_t count, float std, uint64_t seed, void* stream);

namespace {

constexpr int kFillThreads = 256;
constexpr int64_t kMostFillBlocks = 4096;  // enough for every GPU; the rest by stride

__host__ __device__ inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

__global__ void __launch_bounds__(kFillThreads)
    fill_random_kernel(__nv_bfloat16* out, int64_t count, float std, uint64_t key) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kFillThreads;
    for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x; 2 * pair < count; pair += stride) {
        const uint64_t bits = mixed(key + static_cast<uint64_t>(pair) * 0x9e3779b97f4a7c15ull);
        const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
        const float v = static_cast<float>(bits & 0xffffffu) * 0x1p-23f;  // in half turns
        const float radius = std * sqrtf(-2.f * logf(u));
        float sine, cosine;
        sincospif(v, &sine, &cosine);
        if (2 * pair + 1 < count)
            reinterpret_cast<__nv_bfloat162*>(out)[pair] = __floats2bfloat162_rn(radius * cosine, radius * sine);
        else
            out[2 * pair] = __float2bfloat16(radius * cosine);
    }
}

}  // namespace

int32_t qwen_rt_fill_random(void* bf16, int64_t count, float std, uint64_t seed, void* stream) {
    if (count < 0 || !std::isfinite(std)) return QWEN_RT_INVALID;
    if (count == 0) return QWEN_RT_OK;
    if (bf16 == nullptr || (reinterpret_cast<uintptr_t>(bf16) & 3u) != 0) return QWEN_RT_INVALID;
    const int64_t blocks = ((count + 1) / 2 + kFillThreads - 1) / kFillThreads;
    fill_random_kernel<<<static_cast<unsigned>(blocks < kMostFillBlocks ? blocks : kMostFillBlocks), kFillThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(static_cast<__nv_bfloat16*>(bf16), count, std, mixed(seed + 1));
    return cudaGetLastError() == cudaSuccess ? QWEN_RT_OK : QWEN_RT_CUDA_ERROR;
}
