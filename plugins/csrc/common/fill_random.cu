// Fills device memory with random numbers, so that benchmarks need no checkpoint: by element type
//   bf16            size · z_i, z normal
//   f8 (e4m3), i8   the same, rounded, at most 448 or 127 in magnitude
//   u8              all 256 values alike
//   f32, f16        size · (0.7 to 1.3), uniformly: scales
//
//   z_2n, z_2n+1 = r cos a, r sin a   with r = sqrt(-2 ln u), a = 2 pi v, and u, v the two halves of hash(seed, n)
//
// Tensors: out [count], aligned to two elements.
// Numerics: f32, rounded once. u is never 0, so that |z| < 5.9. A number depends on size, seed and i only: any grid gives
//   the same.
// Mapping: a thread makes pairs, grid-stride; one store of both, whole warps behind each other.
// Preconditions (checked): count >= 0, out given and aligned, size finite, element type one of those above.
// Cost: the bytes of out written, about 30 instructions a pair.
// Reference and test: tests/runtime/cuda/test_session_gpu.py (mean, deviation, repeat, odd count). No bench: it runs once.
// Source: Box-Muller; the hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
//   number generators") over a Weyl sequence.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../capi.h"

// Enqueue the filling on `stream`. `element_type`: TensorProto.DataType. Returns QWEN_RT_OK, QWEN_RT_INVALID or
// QWEN_RT_CUDA_ERROR.
extern "C" int32_t qwen_rt_fill_random(void* out, int64_t count, int32_t element_type, float size, uint64_t seed, void* stream);

namespace {

constexpr int kFillThreads = 256;
constexpr int64_t kMostFillBlocks = 4096;  // enough for every GPU; the rest by stride

__host__ __device__ inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Two normal numbers from random bits.
__device__ float2 normal_pair(uint64_t bits) {
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(bits & 0xffffffu) * 0x1p-23f;  // in half turns
    const float radius = sqrtf(-2.f * logf(u));
    float sine, cosine;
    sincospif(v, &sine, &cosine);
    return {radius * cosine, radius * sine};
}

// Two uniform numbers from 0.7 to 1.3.
__device__ float2 scale_pair(uint64_t bits) {
    return {0.7f + 0.6f * 0x1p-24f * static_cast<float>(bits >> 40), 0.7f + 0.6f * 0x1p-24f * static_cast<float>(bits & 0xffffffu)};
}

// One type each: from bits to an element pair.
struct ToBf16 {
    using Element = __nv_bfloat16;
    static __device__ void make(uint64_t bits, float size, Element (&out)[2]) {
        const float2 z = normal_pair(bits);
        out[0] = __float2bfloat16(size * z.x), out[1] = __float2bfloat16(size * z.y);
    }
};
struct ToFp8 {
    using Element = uint8_t;
    static __device__ void make(uint64_t bits, float size, Element (&out)[2]) {
        const float2 z = normal_pair(bits);
        out[0] = __nv_cvt_float_to_fp8(size * z.x, __NV_SATFINITE, __NV_E4M3);
        out[1] = __nv_cvt_float_to_fp8(size * z.y, __NV_SATFINITE, __NV_E4M3);
    }
};
struct ToInt8 {
    using Element = int8_t;
    static __device__ void make(uint64_t bits, float size, Element (&out)[2]) {
        const float2 z = normal_pair(bits);
        out[0] = static_cast<int8_t>(fminf(fmaxf(rintf(size * z.x), -127.f), 127.f));
        out[1] = static_cast<int8_t>(fminf(fmaxf(rintf(size * z.y), -127.f), 127.f));
    }
};
struct ToUint8 {
    using Element = uint8_t;
    static __device__ void make(uint64_t bits, float, Element (&out)[2]) {
        out[0] = static_cast<uint8_t>(bits >> 56), out[1] = static_cast<uint8_t>(bits >> 24);
    }
};
struct ToFloat {
    using Element = float;
    static __device__ void make(uint64_t bits, float size, Element (&out)[2]) {
        const float2 f = scale_pair(bits);
        out[0] = size * f.x, out[1] = size * f.y;
    }
};
struct ToHalf {
    using Element = __half;
    static __device__ void make(uint64_t bits, float size, Element (&out)[2]) {
        const float2 f = scale_pair(bits);
        out[0] = __float2half(size * f.x), out[1] = __float2half(size * f.y);
    }
};

template <class To>
__global__ void __launch_bounds__(kFillThreads) fill_random_kernel(typename To::Element* out, int64_t count, float size, uint64_t key) {
    using Element = typename To::Element;
    struct alignas(2 * sizeof(Element)) Both {
        Element of[2];
    };
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kFillThreads;
    for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x; 2 * pair < count; pair += stride) {
        Both both;
        To::make(mixed(key + static_cast<uint64_t>(pair) * 0x9e3779b97f4a7c15ull), size, both.of);
        if (2 * pair + 1 < count)
            reinterpret_cast<Both*>(out)[pair] = both;
        else
            out[2 * pair] = both.of[0];
    }
}

template <class To>
int32_t fill(void* out, int64_t count, float size, uint64_t seed, void* stream) {
    using Element = typename To::Element;
    if (out == nullptr || reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Element)) != 0) return QWEN_RT_INVALID;
    const int64_t blocks = ((count + 1) / 2 + kFillThreads - 1) / kFillThreads;
    fill_random_kernel<To><<<static_cast<unsigned>(blocks < kMostFillBlocks ? blocks : kMostFillBlocks), kFillThreads, 0,
                             static_cast<cudaStream_t>(stream)>>>(static_cast<Element*>(out), count, size, mixed(seed + 1));
    return cudaGetLastError() == cudaSuccess ? QWEN_RT_OK : QWEN_RT_CUDA_ERROR;
}

}  // namespace

int32_t qwen_rt_fill_random(void* out, int64_t count, int32_t element_type, float size, uint64_t seed, void* stream) {
    if (count < 0 || !std::isfinite(size)) return QWEN_RT_INVALID;
    if (count == 0) return QWEN_RT_OK;
    switch (element_type) {
        case 1: return fill<ToFloat>(out, count, size, seed, stream);
        case 2: return fill<ToUint8>(out, count, size, seed, stream);
        case 3: return fill<ToInt8>(out, count, size, seed, stream);
        case 10: return fill<ToHalf>(out, count, size, seed, stream);
        case 16: return fill<ToBf16>(out, count, size, seed, stream);
        case 17: return fill<ToFp8>(out, count, size, seed, stream);
        default: return QWEN_RT_INVALID;
    }
}
