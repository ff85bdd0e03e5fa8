// How the skinny kernel reads weights: the bytes of a slice, and how numbers and activations become a matrix product.
//
// A unit is 64 bytes of a weight row: 32 columns of bf16, 64 of fp8 and int8, 128 of int4. Quantized numbers are never
// scaled one by one; x is, by one factor for each row and unit, and the unit's sum meets its inverse, and the weights' scale:
//
//   fp8   f16 products. e4m3 to f16 is one instruction for two numbers, exact. x is multiplied by the power of two that
//         brings the unit's largest |x| to 2^14: exact but for what is 2^-38 of that and less.
//   int8  integer products, exact sums. x becomes an integer of 16 bits, the unit's largest |x| 16256 to 32385, in two
//         bytes: x = 256 high + low, two products. That errs by 2^-15 of the largest at most, less than 1/64 of a bf16
//         rounding of it.
//   int4  the same; numbers are taken as 0 to 15, and the zero point (8 unless given) comes off the sum: P - zero · sum of x,
//         in integers.
//
// x that is not finite makes the unit's factor NaN or infinite, and so the result.
#pragma once

#include <cuda_fp16.h>

#include "ptx.cuh"

namespace qwen_rt {

enum class Format { kBf16 = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };  // weight_format of core/ops.py

enum class Scaling {
    kNone,    // bf16
    kRow,     // one scale a row, on the finished sum; no zero points
    kGroups,  // one for a unit's columns or more, on the sum of a unit
    kFine,    // one for fewer: weights are multiplied by it, and rounded to bf16, before a product in bf16
};

__host__ __device__ constexpr int bits_of(Format format) {
    return format == Format::kBf16 ? 16 : format == Format::kInt4 ? 4 : 8;
}
__host__ __device__ constexpr int64_t row_bytes_of(Format format, int64_t k) { return k * bits_of(format) / 8; }

// What a warp owns of a weight row in every chunk, and takes at once: a slice is `kParts` lines behind each other.
template <Format kFormat, int kParts>
struct SliceOf {
    static constexpr int kBits = bits_of(kFormat);
    static constexpr int kSliceBytes = kFormat == Format::kInt4 ? 64 : 128;  // of int4 less, so that all warps have some
    static constexpr int kSliceK = kSliceBytes * 8 / kBits;                    // 64 of bf16, else 128
    static constexpr int kLineBytes = kSliceBytes / kParts;
    static constexpr int kXBytes = kLineBytes * 16 / kBits;  // of an activation row, for a line
    static constexpr int kUnits = kLineBytes / 64;           // a lane of four reads 16 bytes of every unit
    static constexpr int kLaneK = 128 / kBits;               // numbers in 16 bytes
    static constexpr int kXVectors = kLaneK / 8;             // 16 bytes of activations for them
    static constexpr int kTileBytes = 16 * kLineBytes;       // a line of the 16 rows of a tile
    static_assert(kLineBytes == 64 || kLineBytes == 128, "lanes copy 16 bytes and share a row by four or eight");

    // Where 16-byte chunk `chunk` of row `row` lies in shared memory, so that 8 lanes that read together hit all banks.
    static __device__ __forceinline__ int weight_chunk(int row, int chunk) {
        return kLineBytes == 128 ? chunk ^ ((row & 1) << 2) : chunk;
    }
    static __device__ __forceinline__ int x_chunk(int row, int chunk) {
        if constexpr (kFormat == Format::kInt4) return chunk ^ ((chunk >> 3) & 1) ^ ((row & 1) << 1);
        if constexpr (kFormat != Format::kBf16) return chunk ^ (row & 1);
        return kXBytes == 128 ? chunk ^ ((row & 1) << 2) : chunk;
    }
    // Bytes from row 0 of a tile (of x, from row 0 of eight) to what lane (g, t) reads of unit `unit`.
    static __device__ __forceinline__ uint32_t weight_at(int g, int t, int unit) {
        return static_cast<uint32_t>(g * kLineBytes + (weight_chunk(g, t + 4 * unit) << 4));
    }
    static __device__ __forceinline__ uint32_t x_at(int g, int t, int unit, int vector) {
        return static_cast<uint32_t>(g * kXBytes + (x_chunk(g, (t + 4 * unit) * kXVectors + vector) << 4));
    }
};

// ---------------------------------------------------------------- activations

// The larger magnitudes of two pairs, NaN if there is one.
__device__ __forceinline__ uint32_t larger_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 v = __hmax2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
}

constexpr uint32_t kNotFinite = 255;  // exponent of infinity and NaN
constexpr uint32_t kNan = 0x7fffffffu;
constexpr uint32_t kLeastExponent = 15;

// A row's activations of one unit as this lane takes part in their product: 16 or 32 numbers, and the unit's factor.
template <Format kFormat>
struct UnitX;

// The exponent (as f32 has it) of the largest |x| of the unit, over the four lanes of a row; 15 at least.
template <int kVectors>
__device__ __forceinline__ uint32_t largest_exponent(const uint4 (&x)[kVectors]) {
    uint32_t largest = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const uint32_t a = larger_pairs(x[v].x & 0x7fff7fffu, x[v].y & 0x7fff7fffu);
        const uint32_t b = larger_pairs(x[v].z & 0x7fff7fffu, x[v].w & 0x7fff7fffu);
        largest = larger_pairs(largest, larger_pairs(a, b));
    }
    largest = larger_pairs(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = larger_pairs(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint32_t low = largest >> 7 & 0xffu, high = largest >> 23 & 0xffu;
    return max(kLeastExponent, max(low, high));
}

// x of a unit as f16, by the unit's largest exponent: what x is multiplied by (as bf16, exact), and what sums are.
__device__ __forceinline__ uint32_t half_scale(uint32_t exponent) { return (268u - exponent) << 7; }  // 2^(14 + 127 - exponent)
__device__ __forceinline__ float half_factor(uint32_t exponent) {
    return exponent == kNotFinite ? __uint_as_float(kNan) : __uint_as_float((exponent - 14u) << 23);
}
__device__ __forceinline__ uint4 halves_of_eight(uint4 x, uint32_t scale) {
    const uint4 scaled = multiply_pairs(x, scale | scale << 16);
    const uint32_t words[4] = {scaled.x, scaled.y, scaled.z, scaled.w};
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(words[i]);
        const __half2 h = __floats2half2_rn(f.x, f.y);
        halves[i] = *reinterpret_cast<const uint32_t*>(&h);
    }
    return make_uint4(halves[0], halves[1], halves[2], halves[3]);
}

template <>
struct UnitX<Format::kFp8> {
    uint32_t pairs[8];  // f16, in order
    float factor;       // what sums are multiplied by

    __device__ __forceinline__ explicit UnitX(const uint4 (&x)[2]) {
        const uint32_t exponent = largest_exponent(x);
        factor = half_factor(exponent);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const uint4 halves = halves_of_eight(x[v], half_scale(exponent));
            pairs[v * 4] = halves.x, pairs[v * 4 + 1] = halves.y, pairs[v * 4 + 2] = halves.z, pairs[v * 4 + 3] = halves.w;
        }
    }
};

// x of a unit as integers, by the unit's largest exponent: what x is multiplied by, and what sums are.
constexpr float kIntegerRoom = 127.f / 128.f;  // so that rounding up of a high byte stays in a byte
__device__ __forceinline__ float integer_scale(uint32_t exponent) { return __uint_as_float((268u - exponent) << 23) * kIntegerRoom; }
__device__ __forceinline__ float integer_factor(uint32_t exponent) {
    return exponent == kNotFinite ? __uint_as_float(kNan) : __uint_as_float((exponent - 14u) << 23) * (1.f / kIntegerRoom);
}

// Eight integers in two bytes each, four to a word: in order, or the even ones and the odd ones.
template <bool kAlternate>
__device__ __forceinline__ void bytes_of_eight(uint4 x, float scale, uint32_t* high, uint32_t* low) {
    constexpr float kMagic = 12582912.f + 128.f;  // 1.5 · 2^23: the low bits of the sum are the integer, plus 128
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    uint32_t integers[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(words[i]);
        integers[2 * i] = __float_as_uint(fmaf(f.x, scale, kMagic));
        integers[2 * i + 1] = __float_as_uint(fmaf(f.y, scale, kMagic));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t* from = integers + (kAlternate ? i : 4 * i);
        constexpr int kStep = kAlternate ? 2 : 1;
        // Low and high bytes of two integers each.
        const uint32_t first = __byte_perm(from[0], from[kStep], 0x5140), second = __byte_perm(from[2 * kStep], from[3 * kStep], 0x5140);
        low[i] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
        high[i] = __byte_perm(first, second, 0x7632);
    }
}

// `sum` and the four signed bytes of a word.
__device__ __forceinline__ int byte_sum(uint32_t word, int sum) { return __dp4a(static_cast<int>(word), 0x01010101, sum); }

// Integers in two bytes, four to a word. kFormat int8: in order; int4: a word has the even or the odd ones of eight.
template <Format kFormat>
struct UnitBytes {
    static constexpr int kWords = SliceOf<kFormat, 1>::kLaneK / 4;
    uint32_t high[kWords], low[kWords];
    float factor;
    int sum;  // of the row's integers in the unit

    __device__ __forceinline__ explicit UnitBytes(const uint4 (&x)[kWords / 2]) {
        const uint32_t exponent = largest_exponent(x);
        factor = integer_factor(exponent);
        sum = 0;
#pragma unroll
        for (int v = 0; v < kWords / 2; ++v)
            bytes_of_eight<kFormat == Format::kInt4>(x[v], integer_scale(exponent), high + 2 * v, low + 2 * v);
    }

    // Works `sum` out, over the four lanes of the row.
    __device__ __forceinline__ void add_up() {
        int of_high = 0, of_low = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            of_high = byte_sum(high[i], of_high);
            of_low = byte_sum(low[i], of_low);
        }
        sum = of_high * 256 + of_low;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
    }
};
template <>
struct UnitX<Format::kInt8> : UnitBytes<Format::kInt8> {
    using UnitBytes::UnitBytes;
};
template <>
struct UnitX<Format::kInt4> : UnitBytes<Format::kInt4> {
    using UnitBytes::UnitBytes;
};

// ---------------------------------------------------------------- weights

// Two pairs of f16 from a word of four e4m3 numbers. Before SM 8.9, times 2^-8: exponent and mantissa moved into f16's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr float kFp8Factor = 256.f;
__device__ __forceinline__ void pairs_of_fp8(uint32_t word, uint32_t (&pair)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t spread = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
        pair[i] = (spread & 0x80008000u) | ((spread >> 1) & 0x3f803f80u);
    }
}
#else
constexpr float kFp8Factor = 1.f;
__device__ __forceinline__ void pairs_of_fp8(uint32_t word, uint32_t (&pair)[2]) {
    asm volatile("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}\n"
                 : "=r"(pair[0]), "=r"(pair[1])
                 : "r"(word));
}
#endif

// A word of eight u4: those with even numbers, and those with odd ones, as bytes.
__device__ __forceinline__ uint32_t even_nibbles(uint32_t word) { return word & 0x0f0f0f0fu; }
__device__ __forceinline__ uint32_t odd_nibbles(uint32_t word) { return word >> 4 & 0x0f0f0f0fu; }

// Scales are f16 for int4 and f32 else.
template <Format kFormat>
__device__ __forceinline__ float scale_at(const void* scales, int64_t index) {
    if constexpr (kFormat == Format::kInt4) return __half2float(static_cast<const __half*>(scales)[index]);
    return static_cast<const float*>(scales)[index];
}

__host__ __device__ constexpr int scale_bytes_of(Format format) { return format == Format::kInt4 ? 2 : 4; }

// Bytes of a row of zero points: of int4 two share a byte.
__host__ __device__ constexpr int zero_row_bytes_of(Format format, int groups) {
    return format == Format::kInt4 ? (groups + 1) / 2 : groups;
}

}  // namespace qwen_rt
