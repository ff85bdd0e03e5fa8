// What the attention kernels of a quantized cache share: exact angles, rounding to bytes, and bytes as pairs of f16.
//
// A head vector x is stored as value = round(x / scale), scale = max|x| / 448 (fp8, e4m3) or / 127 (int8), f32. A vector of
// zeros has scale 0; one with NaN or infinity has no finite scale, and whatever meets that scale is not finite either.
#pragma once

#include <cuda_fp8.h>

#include "../common/skinny_format.cuh"
#include "attention.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- angles

// Turns, within half a one, and cosine and sine of position · frequency, the exact product: its rounding to f32 turns a key at 30000 by up to 0.001, which
// an offset of hundreds makes large. The turns are a product of sums of two f32, and their whole part drops out before any
// digit is lost; no reduction of large angles is left to do. |position| < 2^24, |frequency| < 2^24.
__device__ __forceinline__ float exact_turns(int position, float frequency) {
    constexpr float kTurn = 0x1.45f306p-3f, kTurnRest = 0x1.b9391p-28f;  // 1 / 2π
    const float place = static_cast<float>(position), turn = frequency * kTurn;
    const float turn_rest = fmaf(frequency, kTurnRest, fmaf(frequency, kTurn, -turn));
    const float turns = place * turn, turns_rest = fmaf(place, turn_rest, fmaf(place, turn, -turns));
    const float part = turns - rintf(turns) + turns_rest;
    return part - rintf(part);
}
__device__ __forceinline__ float2 exact_cos_sin(int position, float frequency) {
    float sine, cosine;
    sincospif(2.f * exact_turns(position, frequency), &sine, &cosine);
    return {cosine, sine};
}
// The same within 2^-20.
__device__ __forceinline__ float2 near_cos_sin(int position, float frequency) {
    const float angle = 0x1.921fb6p2f * exact_turns(position, frequency);
    return {__cosf(angle), __sinf(angle)};
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

// Integers from -128 to 127 as f16, bytes 0 and 2, then 1 and 3: with 128 added they are the low bits of 1024 + x.
__device__ __forceinline__ void pairs_of_int8(uint32_t word, uint32_t (&pair)[2]) {
    const uint32_t shifted = word ^ 0x80808080u, bias = 0x64806480u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t bits = __byte_perm(shifted, 0x64646464u, i == 0 ? 0x4240 : 0x4341);
        const __half2 v = __hsub2(*reinterpret_cast<const __half2*>(&bits), *reinterpret_cast<const __half2*>(&bias));
        pair[i] = *reinterpret_cast<const uint32_t*>(&v);
    }
}

// Four bytes of one row as two pairs: of neighbours (0, 1), (2, 3) in fp8, (0, 2), (1, 3) in int8, whichever is cheaper.
template <KvFormat kFormat>
__device__ __forceinline__ void pairs_along(uint32_t word, uint32_t (&pair)[2]) {
    if constexpr (kFormat == KvFormat::kFp8) {
        pairs_of_fp8(word, pair);
    } else {
        pairs_of_int8(word, pair);
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
        pairs_of_int8(word, pair);
    }
}

}  // namespace qwen_rt
