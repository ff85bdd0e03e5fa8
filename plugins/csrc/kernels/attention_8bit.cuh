// What the attention kernels of a quantized cache share: exact angles, rounding to bytes, and bytes as pairs of f16.
//
// A head vector x is stored as value = round(x / scale), scale = max|x| / 448 (fp8, e4m3) or / 127 (int8), f32. A vector of
// zeros has scale 0; one with NaN or infinity has no finite scale, and whatever meets that scale is not finite either.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../common/skinny_format.cuh"
#include "attention.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- angles

// Cosine and sine of position · frequency, the exact product: its rounding to f32 turns a key at 30000 by up to 0.001, which
// an offset of hundreds makes large. position < 2^24.
__device__ __forceinline__ float2 exact_cos_sin(int64_t position, float frequency) {
    const float whole = static_cast<float>(position), angle = whole * frequency, rest = fmaf(whole, frequency, -angle);
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    return {fmaf(-rest, sine, cosine), fmaf(rest, cosine, sine)};
}

// (x1, x2) turned by the angle of (cosine, sine), and by its opposite.
__device__ __forceinline__ float2 turned(float x1, float x2, float2 by) {
    return {x1 * by.x - x2 * by.y, x2 * by.x + x1 * by.y};
}
__device__ __forceinline__ float2 turned_back(float x1, float x2, float2 by) {
    return {x1 * by.x + x2 * by.y, x2 * by.x - x1 * by.y};
}

// ---------------------------------------------------------------- to bytes

// Larger magnitudes have larger bits, infinity larger ones than all numbers, and NaN the largest.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <KvFormat kFormat>
__device__ __forceinline__ float scale_of(uint32_t largest_bits) {
    return __fdiv_rn(__uint_as_float(largest_bits), kFormat == KvFormat::kFp8 ? 448.f : 127.f);
}

// Two numbers as two bytes, the first in the low one.
template <KvFormat kFormat>
__device__ __forceinline__ uint32_t bytes_of(float first, float second, float scale) {
    const float divisor = scale == 0.f ? 1.f : scale;
    const float2 x = {__fdiv_rn(first, divisor), __fdiv_rn(second, divisor)};
    if constexpr (kFormat == KvFormat::kFp8) {
        return __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E4M3);
    } else {
        const auto low = static_cast<uint32_t>(max(-127, min(127, __float2int_rn(x.x))));
        const auto high = static_cast<uint32_t>(max(-127, min(127, __float2int_rn(x.y))));
        return (low & 255u) | (high & 255u) << 8;
    }
}

// ---------------------------------------------------------------- from bytes

// Values of fp8 come as this part of themselves where there is no instruction for them (skinny_format.cuh).
template <KvFormat kFormat>
constexpr float kByteFactor = kFormat == KvFormat::kFp8 ? kFp8Factor : 1.f;

// Integers from -128 to 127 out of bytes 0 and 2: with 128 added they are the low bits of 1024 + x in f16.
__device__ __forceinline__ uint32_t pair_of_int8(uint32_t word) {
    const uint32_t bits = (word & 0x00ff00ffu) ^ 0x64806480u, bias = 0x64806480u;
    const __half2 v = __hsub2(*reinterpret_cast<const __half2*>(&bits), *reinterpret_cast<const __half2*>(&bias));
    return *reinterpret_cast<const uint32_t*>(&v);
}

// Four bytes of one row as two pairs: of neighbours (0, 1), (2, 3) in fp8, (0, 2), (1, 3) in int8, whichever is cheaper.
template <KvFormat kFormat>
__device__ __forceinline__ void pairs_along(uint32_t word, uint32_t (&pair)[2]) {
    if constexpr (kFormat == KvFormat::kFp8) {
        pairs_of_fp8(word, pair);
    } else {
        pair[0] = pair_of_int8(word);
        pair[1] = pair_of_int8(word >> 8);
    }
}
template <KvFormat kFormat>
constexpr bool kPairsNeighbours = kFormat == KvFormat::kFp8;

// Two bytes each of two rows, (0, 1) and (2, 3), as two pairs down the columns: (0, 2), (1, 3).
template <KvFormat kFormat>
__device__ __forceinline__ void pairs_down(uint32_t word, uint32_t (&pair)[2]) {
    if constexpr (kFormat == KvFormat::kFp8) {
        pairs_of_fp8(__byte_perm(word, 0, 0x3120), pair);
    } else {
        pair[0] = pair_of_int8(word);
        pair[1] = pair_of_int8(word >> 8);
    }
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

}  // namespace qwen_rt
