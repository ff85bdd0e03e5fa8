// Quantized numbers one after another, in order: for tables and for whole matrices, not for the skinny kernel.
#pragma once

#include "skinny_format.cuh"

namespace qwen_rt {

// An e4m3 number, NaN aside: its exponent and mantissa are f32's, times 2^-120.
__device__ __forceinline__ float number_of_fp8(uint32_t bits) {
    return __uint_as_float((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * kFp8Scale;
}

// Numbers 8 index to 8 index + 7 of a row of f8, i8 or packed u4: (number - zero) · factor in f32, rounded to bf16.
template <Format kFormat>
__device__ __forceinline__ uint4 dequantize_eight(const unsigned char* row, int index, float factor, float zero) {
    float f[8];
    if constexpr (kFormat == Format::kInt4) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(row) + index);
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = static_cast<float>(bits >> 4 * i & 15);
    } else {
        const uint2 bits = __ldg(reinterpret_cast<const uint2*>(row) + index);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t byte = (i < 4 ? bits.x : bits.y) >> 8 * (i & 3) & 255;
            f[i] = kFormat == Format::kFp8 ? number_of_fp8(byte) : static_cast<float>(static_cast<signed char>(byte));
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = (f[i] - zero) * factor;
    return make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
}

// The zero point of a group: packed row of u4, or row of i8; null: what stands for zero anyway.
template <Format kFormat>
__device__ __forceinline__ float zero_at(const unsigned char* row, int group) {
    if constexpr (kFormat == Format::kInt4) return row == nullptr ? 8.f : static_cast<float>(row[group >> 1] >> (group & 1) * 4 & 15);
    return row == nullptr ? 0.f : static_cast<float>(static_cast<signed char>(row[group]));
}

}  // namespace qwen_rt
