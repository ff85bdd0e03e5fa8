// Quantized numbers one after another, in order: for tables, for whole matrices, and for groups of few columns.
#pragma once

#include "skinny_format.cuh"

namespace qwen_rt {

// An e4m3 number, NaN aside: its exponent and mantissa are f32's, times 2^-120.
__device__ __forceinline__ float number_of_fp8(uint32_t bits) {
    return __uint_as_float((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * 0x1p120f;
}

// Eight numbers in a word of u4, or in two words of f8 or i8: (number - zero) · factor in f32, rounded to bf16.
template <Format kFormat>
__device__ __forceinline__ uint4 dequantize_words(const uint32_t* words, float factor, int zero) {
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (kFormat == Format::kInt4) {
            f[i] = static_cast<float>(static_cast<int>(words[0] >> 4 * i & 15) - zero);
        } else {
            const uint32_t byte = words[i / 4] >> 8 * (i & 3) & 255;
            f[i] = kFormat == Format::kFp8 ? number_of_fp8(byte)
                                           : static_cast<float>(static_cast<int>(static_cast<signed char>(byte)) - zero);
        }
        f[i] *= factor;
    }
    return make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
}

// The same of numbers 8 index to 8 index + 7 of a row in memory.
template <Format kFormat>
__device__ __forceinline__ uint4 dequantize_eight(const unsigned char* row, int index, float factor, int zero) {
    uint32_t words[2];
    if constexpr (kFormat == Format::kInt4) {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(row) + index);
    } else {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(row) + index);
        words[0] = both.x, words[1] = both.y;
    }
    return dequantize_words<kFormat>(words, factor, zero);
}

// The zero point of a group: packed row of u4, or row of i8; null: what stands for zero anyway.
template <Format kFormat>
__device__ __forceinline__ int zero_at(const unsigned char* row, int group) {
    if constexpr (kFormat == Format::kInt4) return row == nullptr ? 8 : row[group >> 1] >> (group & 1) * 4 & 15;
    return row == nullptr ? 0 : static_cast<signed char>(row[group]);
}

}  // namespace qwen_rt
