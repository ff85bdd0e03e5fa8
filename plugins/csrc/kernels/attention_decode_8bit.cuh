// The parts of attention_decode_8bit.cu: its shared memory, the table of the offset, the new token, the products of a tile.
#pragma once

#include "attention_8bit.cuh"
#include "attention_combine.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- sizes

constexpr int kByteTile = 32;   // tokens of a warp's tile
constexpr int kTableHeads = 8;  // heads of a block
constexpr int kTileStep = kByteTile * kAttentionWarps;  // tokens from one tile of a warp to its next

struct Attention8Params {
    const bf16* qkv;
    const int64_t* positions;
    const float *inv_freq, *k_offset, *v_offset;
    const int32_t* block_tables;
    unsigned char *k_cache, *v_cache;
    float *k_scales, *v_scales;
    bf16* out;
    float* partial;       // [rows, kv_heads, parts, max_pieces, stride, D]
    float2* partial_max;  // [rows, kv_heads, parts, max_pieces, stride]: maximum and sum
    uint32_t* counters;   // [rows, kv_heads, parts]
    int heads, kv_heads, group, parts, stride, block_size, max_blocks, max_pieces;
    float scale, rope_scaling;
};

template <int kD, int kStages>
struct Attention8Shared {
    static constexpr int kTileBytes = kByteTile * kD;
    static constexpr int kScaleBytes = kByteTile * 4;
    static constexpr int kStageBytes = 2 * kTileBytes + 2 * kScaleBytes;  // keys, values, scales of keys, of values
    static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp; holds its f32[8, D] sums at the end
    static constexpr int kTable = kAttentionWarps * kRingBytes;  // bf16[2][32, D]: B, what it lacks
    static constexpr int kTableBytes = kByteTile * kD * 2;
    static constexpr int kQuery = kTable + 2 * kTableBytes;  // f32[8, D], rows padded so that two fill all banks
    static constexpr int kQueryStride = kD + 16;
    static constexpr int kAngles = kQuery + kTableHeads * kQueryStride * 4;  // float2[warps][D / 2]; first of the new token
    static constexpr int kNewKey = kAngles + kAttentionWarps * kD / 2 * 8;
    static constexpr int kNewValue = kNewKey + kD;
    static constexpr int kNewScales = kNewValue + kD;  // float2
    static constexpr int kFactors = kNewScales + 16;   // float2[8]: of a head's q to f16, and of its scores
    static constexpr int kMaxSum = kFactors + kTableHeads * 8;  // float2[warps][8]
    static constexpr int kBytes = kMaxSum + kAttentionWarps * kTableHeads * 8;
    static_assert(kStageBytes >= kTableHeads * kD * 4, "the sums need a tile's room");
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of rows of kD bytes: eight rows of one chunk fall on all banks.
template <int kD>
__device__ __forceinline__ uint32_t swizzled_bytes(int row, int chunk) {
    return static_cast<uint32_t>(row * kD + ((chunk ^ (kD == 128 ? row & 7 : row >> 1 & 3)) << 4));
}

// ---------------------------------------------------------------- before the tiles

// B[j] = R(j) offset for j = 0 … 31, times rope_scaling, as bf16 and what that lacks. Column k of 16 is dim 4 t + r of 16 with
// k = 2 t + r % 2 + 8 (r / 2): the order in which a lane's four bytes enter the products with keys.
template <int kD>
__device__ __forceinline__ void make_table(uint32_t table, uint32_t lacking, const float* offset, const Attention8Params& p) {
    constexpr int kRuns = kAttentionWarps * 32 / (kD / 2), kRun = kByteTile / kRuns;  // tokens of a thread, behind each other
    const int i = threadIdx.x % (kD / 2), first = threadIdx.x / (kD / 2) * kRun;
    const float frequency = p.inv_freq[i], x1 = offset[i] * p.rope_scaling, x2 = offset[i + kD / 2] * p.rope_scaling;
    const float2 step = exact_cos_sin(1, frequency);
    float2 angle = exact_cos_sin(first, frequency);
    const int r = i & 3, t = i >> 2 & 3, chunk = i / 16 * 2 + (r >> 1);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const float2 y = turned(x1, x2, angle);
        angle = turned(angle.x, angle.y, step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float value = half == 0 ? y.x : y.y;
            const bf16 high = __float2bfloat16(value), low = __float2bfloat16(value - __bfloat162float(high));
            const uint32_t at = swizzled<kD>(first + j, chunk + half * kD / 16) + (2 * t + (r & 1)) * 2;
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(table + at), "h"(__bfloat16_as_ushort(high)) : "memory");
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(lacking + at), "h"(__bfloat16_as_ushort(low)) : "memory");
        }
    }
}

// What a lane has of a head vector: dims kPairs · lane … and their partners D / 2 further, for a warp that holds all of it.
template <int kD>
struct HeadPart {
    static constexpr int kPairs = kD / 64;
    float first[kPairs], second[kPairs];

    __device__ __forceinline__ HeadPart(const bf16* head, int lane) {
        if constexpr (kPairs == 2) {
            const float2 low = unpack(__ldcg(reinterpret_cast<const uint32_t*>(head) + lane));
            const float2 high = unpack(__ldcg(reinterpret_cast<const uint32_t*>(head) + kD / 4 + lane));
            first[0] = low.x, first[kPairs - 1] = low.y, second[0] = high.x, second[kPairs - 1] = high.y;
        } else {
            const auto* bits = reinterpret_cast<const unsigned short*>(head);
            first[0] = __bfloat162float(__ushort_as_bfloat16(__ldcg(bits + lane)));
            second[0] = __bfloat162float(__ushort_as_bfloat16(__ldcg(bits + kD / 2 + lane)));
        }
    }
    __device__ __forceinline__ void turn(const float2* cos_sin, int lane) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            const float2 y = turned(first[k], second[k], cos_sin[kPairs * lane + k]);
            first[k] = y.x, second[k] = y.y;
        }
    }
    __device__ __forceinline__ uint32_t largest_bits() const {
        uint32_t bits = 0;
#pragma unroll
        for (int k = 0; k < kPairs; ++k) bits = max(bits, max(magnitude_bits(first[k]), magnitude_bits(second[k])));
        return __reduce_max_sync(~0u, bits);
    }
    // Rounds it to bytes, to two places; returns the scale.
    template <KvFormat kFormat>
    __device__ __forceinline__ float store(unsigned char* here, unsigned char* there, int lane) const {
        const float scale = scale_of<kFormat>(largest_bits());
        const uint32_t low = bytes_of<kFormat>(first[0], kPairs == 2 ? first[kPairs - 1] : second[0], scale);
        const uint32_t high = kPairs == 2 ? bytes_of<kFormat>(second[0], second[kPairs - 1], scale) : 0;
#pragma unroll
        for (int copy = 0; copy < 2; ++copy) {
            unsigned char* to = copy == 0 ? here : there;
            if (to == nullptr) continue;
            if constexpr (kPairs == 2) {
                reinterpret_cast<unsigned short*>(to)[lane] = static_cast<unsigned short>(low);
                reinterpret_cast<unsigned short*>(to)[kD / 4 + lane] = static_cast<unsigned short>(high);
            } else {
                to[lane] = static_cast<unsigned char>(low), to[kD / 2 + lane] = static_cast<unsigned char>(low >> 8);
            }
        }
        return scale;
    }
};

// ---------------------------------------------------------------- products of a tile

// score[m] of tokens 16 m + g, + 8 (upper two) and heads 2 t, 2 t + 1: q · value of the key's bytes.
template <KvFormat kFormat, int kD>
__device__ __forceinline__ void byte_scores(float (&score)[2][4], uint32_t keys, const uint32_t (&query)[kD / 16][2], int lane) {
#pragma unroll
    for (int c = 0; c < kD / 16; c += 2)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t words[4], upper[2], lower[2];
            load_matrices(words, keys + swizzled_bytes<kD>(m * 16 + (lane & 15), c + (lane >> 4)));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                pairs_along<kFormat>(words[2 * k], upper);
                pairs_along<kFormat>(words[2 * k + 1], lower);
                mma_f16(score[m], upper[0], lower[0], upper[1], lower[1], query[c + k][0], query[c + k][1], score[m]);
            }
        }
}

// The same of R(-p0) q · B: score[m][0] of large with large terms, [1] of large with small ones. `head`: this lane's q, dims
// 4 t …; `angles`: those of p0; `table`, `lacking`: B.
template <int kD>
__device__ __forceinline__ void offset_scores(float (&score)[2][2][4], const float* head, const float2* angles, uint32_t table,
                                              uint32_t lacking, int lane) {
    constexpr int kSteps = kD / 16;
#pragma unroll
    for (int c = 0; c < kSteps / 2; ++c) {
        const float4 x1 = *reinterpret_cast<const float4*>(head + 16 * c);
        const float4 x2 = *reinterpret_cast<const float4*>(head + 16 * c + kD / 2);
        const float4 a = *reinterpret_cast<const float4*>(angles + 16 * c);
        const float4 b = *reinterpret_cast<const float4*>(angles + 16 * c + 2);
        const float2 y[4] = {turned_back(x1.x, x2.x, {a.x, a.y}), turned_back(x1.y, x2.y, {a.z, a.w}),
                             turned_back(x1.z, x2.z, {b.x, b.y}), turned_back(x1.w, x2.w, {b.z, b.w})};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t large[2], small[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float low = half == 0 ? y[2 * k].x : y[2 * k].y, high = half == 0 ? y[2 * k + 1].x : y[2 * k + 1].y;
                large[k] = pack(low, high);
                const float2 rounded = unpack(large[k]);
                small[k] = pack(low - rounded.x, high - rounded.y);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const uint32_t at = swizzled<kD>(m * 16 + (lane & 15), 2 * (c + half * kSteps / 2) + (lane >> 4));
                uint32_t b_large[4], b_small[4];
                load_matrices(b_large, table + at);
                load_matrices(b_small, lacking + at);
                mma_bf16(score[m][0], b_large[0], b_large[1], b_large[2], b_large[3], large[0], large[1]);
                mma_bf16(score[m][1], b_large[0], b_large[1], b_large[2], b_large[3], small[0], small[1]);
                mma_bf16(score[m][1], b_small[0], b_small[1], b_small[2], b_small[3], large[0], large[1]);
            }
        }
    }
}

// sums[c] of value dims 16 c + 2 g, + 1 (upper two) and heads 2 t, 2 t + 1: += weights · values.
template <KvFormat kFormat, int kD>
__device__ __forceinline__ void add_values(float (&sums)[kD / 16][4], uint32_t values, const uint32_t (&weights)[2][2], int lane) {
#pragma unroll
    for (int c = 0; c < kD / 16; c += 2)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t words[4], left[2], right[2];
            load_matrices_transposed(words, values + swizzled_bytes<kD>(m * 16 + (lane & 15), c + (lane >> 4)));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                pairs_down<kFormat>(words[2 * k], left);
                pairs_down<kFormat>(words[2 * k + 1], right);
                mma_f16(sums[c + k], left[0], left[1], right[0], right[1], weights[m][0], weights[m][1], sums[c + k]);
            }
        }
}

}  // namespace qwen_rt
