// How the skinny kernel reads weights: the bytes of a slice, and the way from bytes to the bf16 pairs of a matrix product.
//
// Every stored number is exact in bf16: e4m3 has 4 significant bits, int8 and 0..15 have 8 at most. So the products are
// those of the stored numbers with bf16 activations, and scales meet f32 sums only. No number is converted one by one: the
// pairs are cut out of whole words, wherever they lie in it, and activations are put into the same order.
//
//   fp8   e4m3's exponent and mantissa, moved into bf16's, are the number times 2^-120 (subnormals too). Activations are
//         multiplied by 2^96, which is exact, so that nothing comes near the ends of f32; the scale has the other 2^24.
//         Both NaN of e4m3 become 480: a matrix has none.
//   int8  (128 + low seven bits) - (128, or 256 if negative), both by setting bits, one subtraction, exact.
//   int4  128 + number by setting bits; 128 and the zero point are taken from the sum: (128 + zero) · sum of activations.
#pragma once

#include <cuda_fp16.h>

#include "ptx.cuh"

namespace qwen_rt {

enum class Format { kBf16 = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };  // weight_format of core/ops.py

enum class Scaling {
    kNone,    // bf16
    kRow,     // one scale a row, on the finished sum; no zero points
    kGroups,  // one for 128 columns or more, on the sum of a slice
    kFine,    // one for 16, 32 or 64 columns: weights are multiplied by it, and rounded to bf16, before the product
};

constexpr float kFp8XScale = 0x1p96f;     // of activations
constexpr float kFp8SumScale = 0x1p24f;   // of sums: 2^120 / 2^96
constexpr float kFp8Scale = 0x1p120f;     // of a moved number
constexpr uint32_t kFp8XScalePair = 0x6f806f80u;  // 2^96 twice, bf16
constexpr float kInt4Bias = 128.f;

__host__ __device__ constexpr int bits_of(Format format) { return format == Format::kBf16 ? 16 : format == Format::kInt4 ? 4 : 8; }
__host__ __device__ constexpr int64_t row_bytes_of(Format format, int64_t k) { return k * bits_of(format) / 8; }

// What a warp owns of a weight row in every chunk, and takes at once: a slice is `kParts` lines behind each other.
template <Format kFormat, int kParts>
struct SliceOf {
    static constexpr int kBits = bits_of(kFormat);
    static constexpr int kSliceBytes = kFormat == Format::kInt4 ? 64 : 128;
    static constexpr int kSliceK = kSliceBytes * 8 / kBits;  // 64 of bf16, else 128
    static constexpr int kLineBytes = kSliceBytes / kParts;
    static constexpr int kLineK = kSliceK / kParts;
    static constexpr int kXBytes = kLineK * 2;          // of an activation row
    static constexpr int kHalves = kLineBytes / 64;     // a lane of four reads 16 bytes of every half
    static constexpr int kLaneK = 128 / kBits;          // numbers in 16 bytes
    static constexpr int kXVectors = kLaneK / 8;        // 16 bytes of activations for them
    static constexpr int kSteps = kLaneK / 4;           // matrix products for them
    static constexpr int kTileBytes = 16 * kLineBytes;  // a line of the 16 rows of a tile
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
};

// ---------------------------------------------------------------- activations

// Puts activations into the order of the weights' pairs: of 8-bit formats a word has the pairs (0, 2) and (1, 3), of int4
// (0, 4), (1, 5), (2, 6) and (3, 7).
template <Format kFormat>
__device__ __forceinline__ uint4 in_order(uint4 x) {
    if constexpr (kFormat == Format::kInt4)
        return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                          __byte_perm(x.y, x.w, 0x7632));
    if constexpr (kFormat == Format::kFp8 || kFormat == Format::kInt8)
        return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x5410),
                          __byte_perm(x.z, x.w, 0x7632));
    return x;
}

// ---------------------------------------------------------------- weights

__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    __nv_bfloat162 v = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
}

// The pairs of word `word` of a lane's 16 bytes: two for 8-bit formats, four for int4, in the order of `in_order`.
template <Format kFormat>
struct Pairs {
    static constexpr int kCount = kFormat == Format::kInt4 ? 4 : kFormat == Format::kBf16 ? 1 : 2;
    uint32_t pair[kCount];

    __device__ __forceinline__ explicit Pairs(uint32_t word) {
        if constexpr (kFormat == Format::kBf16) {
            pair[0] = word;
        } else if constexpr (kFormat == Format::kFp8) {
            pair[0] = ((word << 8) & 0x80008000u) | ((word << 4) & 0x07f007f0u);
            pair[1] = (word & 0x80008000u) | ((word >> 4) & 0x07f007f0u);
        } else if constexpr (kFormat == Format::kInt8) {
            const uint32_t odd = word >> 8;
            pair[0] = subtract_pairs((word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0x43004300u);
            pair[1] = subtract_pairs((odd & 0x007f007fu) | 0x43004300u, (odd & 0x00800080u) | 0x43004300u);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) pair[i] = ((word >> (4 * i)) & 0x000f000fu) | 0x43004300u;
        }
    }

    // (number - zero) · scale of every number, in f32, rounded to bf16. `zero` includes the 128 of int4.
    __device__ __forceinline__ void scale(float factor, float zero) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float2 f = unpack(pair[i]);
            if constexpr (kFormat == Format::kFp8)
                pair[i] = pack(f.x * kFp8Scale * factor, f.y * kFp8Scale * factor);
            else
                pair[i] = pack((f.x - zero) * factor, (f.y - zero) * factor);
        }
    }
};

// Scales are f16 for int4 and f32 else.
template <Format kFormat>
__device__ __forceinline__ float scale_at(const void* scales, int64_t index) {
    if constexpr (kFormat == Format::kInt4) return __half2float(static_cast<const __half*>(scales)[index]);
    return static_cast<const float*>(scales)[index];
}

__host__ __device__ constexpr int scale_bytes_of(Format format) { return format == Format::kInt4 ? 2 : 4; }

// Bytes of a row of zero points: of int4 two share a byte.
__host__ __device__ constexpr int zero_row_bytes_of(Format format, int groups) { return format == Format::kInt4 ? (groups + 1) / 2 : groups; }

}  // namespace qwen_rt
