// The parts of attention_decode_8bit.cu: its shared memory, the table of the offset, the new token, the products of a tile.
#pragma once

#include "attention_8bit.cuh"
#include "attention_combine.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- sizes

constexpr int kByteTile = 32;   // tokens of a warp's tile
constexpr int kTableHeads = 8;  // heads of a block
constexpr float kTableFactor = 64.f;       // of offsets in f16: up to 2^21
constexpr float kLargeSquares = 32.f * 8 * 8 / (kTableFactor * kTableFactor);  // of 32 dims' offset: above, f16 is not enough
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
    Divisor by_block_size, by_max_pieces;
    int heads, kv_heads, group, parts, stride, block_size, max_blocks, max_pieces;
    float scale, rope_scaling;
};

template <int kD, int kStages>
struct Attention8Shared {
    static constexpr int kTileBytes = kByteTile * kD;
    static constexpr int kScaleBytes = kByteTile * 4;
    static constexpr int kStageBytes = 2 * kTileBytes + 2 * kScaleBytes;  // keys, values, scales of keys, of values
    static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp; holds its f32[8, D] sums at the end
    static constexpr int kTable = kAttentionWarps * kRingBytes;  // f16[2][32, D]: B, what it lacks
    static constexpr int kTableBytes = kByteTile * kD * 2;
    static constexpr int kQuery = kTable + 2 * kTableBytes;  // f32[8, D]: q, rows padded so that two fill all banks
    static constexpr int kQueryStride = kD + 16;
    static constexpr int kAngles = kQuery + kTableHeads * kQueryStride * 4;  // float2[warps][D / 2]; first of the new token
    static constexpr int kNewKey = kAngles + kAttentionWarps * kD / 2 * 8;
    static constexpr int kNewValue = kNewKey + kD;
    static constexpr int kNewScales = kNewValue + kD;  // float2
    static constexpr int kFactors = kNewScales + 16;   // float[8]: of a head's scores
    static constexpr int kMaxSum = kFactors + kTableHeads * 4;  // float2[warps][8]
    static constexpr int kSizes = kMaxSum + kAttentionWarps * kTableHeads * 8;  // float[D / 32]
    static constexpr int kBytes = kSizes + 16;
    static_assert(kStageBytes >= kTableHeads * kD * 4, "the sums need a tile's room");
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of rows of kD bytes: eight rows of one chunk fall on all banks.
template <int kD>
__device__ __forceinline__ uint32_t swizzled_bytes(int row, int chunk) {
    return static_cast<uint32_t>(row * kD + ((chunk ^ (kD == 128 ? row & 7 : row >> 1 & 3)) << 4));
}

// ---------------------------------------------------------------- before the tiles

// B[j] = R(j) offset for j = 0 … 31, times rope_scaling / kTableFactor, as f16 and, of parts whose offset is large, what that
// lacks. Column k of 16 is dim 4 t + r of 16 with k = 2 t + r % 2 + 8 (r / 2): the order in which a lane's four bytes enter
// the products with keys. `sizes`: float[D / 32], the sum of squares of a part's offset.
template <int kD>
struct OffsetTable {
    static constexpr int kRuns = kAttentionWarps * 32 / (kD / 2), kRun = kByteTile / kRuns;  // tokens of a thread, behind each other
    float frequency, x1, x2;

    // What a thread needs of memory, so that it can be on its way early.
    __device__ __forceinline__ void load(const float* inv_freq, const float* offset) {
        const int i = threadIdx.x % (kD / 2);
        frequency = load_constant(inv_freq + i), x1 = load_constant(offset + i), x2 = load_constant(offset + i + kD / 2);
    }
    __device__ __forceinline__ void make(uint32_t table, uint32_t lacking, float* sizes, float rope_scaling) {
        const int i = threadIdx.x % (kD / 2), first = threadIdx.x / (kD / 2) * kRun;
        const float scaling = rope_scaling / kTableFactor;
        x1 *= scaling, x2 *= scaling;
        const float2 step = near_cos_sin(1, frequency);
        float2 angle = near_cos_sin(first, frequency);
        const int r = i & 3, t = i >> 2 & 3, chunk = i / 16 * 2 + (r >> 1);
        float size = fmaf(x1, x1, x2 * x2);
#pragma unroll
        for (int other = 1; other < 16; other *= 2) size += __shfl_xor_sync(~0u, size, other);
        if (threadIdx.x < kD / 2 && (i & 15) == 0) sizes[i / 16] = size;
        const bool is_large = !(size <= kLargeSquares);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            const float2 y = turned(x1, x2, angle);
            angle = turned(angle.x, angle.y, step);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float value = half == 0 ? y.x : y.y;
                const __half high = __float2half_rn(value);
                const uint32_t at = swizzled<kD>(first + j, chunk + half * kD / 16) + (2 * t + (r & 1)) * 2;
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(table + at), "h"(__half_as_ushort(high)) : "memory");
                if (is_large) {
                    const __half low = __float2half_rn(value - __half2float(high));
                    asm volatile("st.shared.b16 [%0], %1;" ::"r"(lacking + at), "h"(__half_as_ushort(low)) : "memory");
                }
            }
        }
    }
};

// What a lane has of a head vector: dims kPairs · lane … and their partners D / 2 further, for a warp that holds all of it.
template <int kD>
struct HeadPart {
    static constexpr int kPairs = kD / 64;
    float first[kPairs], second[kPairs];

    __device__ __forceinline__ void load(const bf16* head, int lane) {
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
    __device__ __forceinline__ void multiply(float factor) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) first[k] *= factor, second[k] *= factor;
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

// Turns the block's heads of q, a warp each, into shared memory, times scale · log2 e and the power of two that brings the
// largest to 2^14, zeros behind them; with a `new_slot` also the new key, and rounds it and the new value to bytes for shared
// memory and, part 0, for the cache. The angles of the token stand in kAngles.
template <KvFormat kFormat, int kD, class Shared>
__device__ __forceinline__ void turn_heads(const Attention8Params& p, unsigned char* shared, int row, int kv_head, int part,
                                           int num_heads, int64_t new_slot) {
    using Part = HeadPart<kD>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, d = Part::kPairs * lane;
    const bf16* qkv = p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD;
    const float2* cos_sin = reinterpret_cast<const float2*>(shared + Shared::kAngles);
    float* factors = reinterpret_cast<float*>(shared + Shared::kFactors);
    float* to = reinterpret_cast<float*>(shared + Shared::kQuery) + warp * Shared::kQueryStride;
    const bool is_key = warp == kAttentionWarps - 1, has_new = new_slot >= 0 && warp >= kAttentionWarps - 2;
    Part q, x;  // the last warps have fewer heads, and the new token
    q.load(qkv + (kv_head * p.group + part * kTableHeads + min(warp, num_heads - 1)) * kD, lane);
    if (has_new) x.load(qkv + (p.heads + (is_key ? 0 : p.kv_heads) + kv_head) * kD, lane);
    if (warp < num_heads) {
        q.turn(cos_sin, lane);
        q.multiply(p.scale * kLog2e);
        const uint32_t exponent = max(15u, q.largest_bits() >> 23);
        q.multiply(__uint_as_float((268u - exponent) << 23));
        if (lane == 0) factors[warp] = __uint_as_float((exponent - 14u) << 23) * kTableFactor;
#pragma unroll
        for (int k = 0; k < Part::kPairs; ++k) to[d + k] = q.first[k], to[d + kD / 2 + k] = q.second[k];
    } else {
        if (lane == 0) factors[warp] = 0.f;
#pragma unroll
        for (int k = 0; k < Part::kPairs; ++k) to[d + k] = to[d + kD / 2 + k] = 0.f;
    }
    if (!has_new) return;
    if (is_key) x.turn(cos_sin, lane);
    unsigned char* cache = (is_key ? p.k_cache : p.v_cache) + new_slot * kD;
    const float scale = x.template store<kFormat>(shared + (is_key ? Shared::kNewKey : Shared::kNewValue),
                                                  part == 0 ? cache : nullptr, lane);
    if (lane == 0) {
        reinterpret_cast<float*>(shared + Shared::kNewScales)[is_key ? 0 : 1] = scale;
        if (part == 0) (is_key ? p.k_scales : p.v_scales)[new_slot] = scale;
    }
}

// ---------------------------------------------------------------- products of a tile
//
// A warp has a SM's quarter to itself but for one other, so what is independent has to stand next to each other: operands are
// loaded ahead of the products, and sums are kept apart where a product would wait for the one before.

// R(-p0) q of dims 16 c + 4 t … and their partners, as operands of the two steps of a product over dims.
template <int kD>
struct TurnedBack {
    float2 y[4];

    __device__ __forceinline__ TurnedBack(const float* head, const float2* angles, int c) {
        const float4 x1 = *reinterpret_cast<const float4*>(head + 16 * c);
        const float4 x2 = *reinterpret_cast<const float4*>(head + 16 * c + kD / 2);
        const float4 a = *reinterpret_cast<const float4*>(angles + 16 * c);
        const float4 b = *reinterpret_cast<const float4*>(angles + 16 * c + 2);
        y[0] = turned_back(x1.x, x2.x, {a.x, a.y}), y[1] = turned_back(x1.y, x2.y, {a.z, a.w});
        y[2] = turned_back(x1.z, x2.z, {b.x, b.y}), y[3] = turned_back(x1.w, x2.w, {b.z, b.w});
    }
    __device__ __forceinline__ uint32_t high(int half, int pair) const {
        return half == 0 ? pack_half(y[2 * pair].x, y[2 * pair + 1].x) : pack_half(y[2 * pair].y, y[2 * pair + 1].y);
    }
    __device__ __forceinline__ uint32_t rest(int half, int pair, uint32_t high) const {
        const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&high));
        return half == 0 ? pack_half(y[2 * pair].x - rounded.x, y[2 * pair + 1].x - rounded.y)
                         : pack_half(y[2 * pair].y - rounded.x, y[2 * pair + 1].y - rounded.y);
    }
};

// R(-p0) q · B: score[m] of tokens 16 m + g, + 8 (upper two) and heads 2 t, 2 t + 1. `head`: this lane's q, dims 4 t …;
// `angles`: those of p0; `table`, `lacking`: B. `large`: bit c where part c needs all three products. Reads no tile.
template <int kD>
__device__ __forceinline__ void offset_scores(float (&score)[2][4], const float* head, const float2* angles, uint32_t table,
                                              uint32_t lacking, uint32_t large, int lane) {
    constexpr int kParts = kD / 32;
    float odd[2][4] = {};
    const auto at = [&](int m, int k) { return swizzled<kD>(m * 16 + (lane & 15), 2 * k + (lane >> 4)); };
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
        const TurnedBack<kD> q(head, angles, c);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                uint32_t b[4];
                load_matrices(b, table + at(m, c + half * kParts));
                float(&sum)[4] = half == 0 ? score[m] : odd[m];
                mma_f16(sum, b[0], b[1], b[2], b[3], q.high(half, 0), q.high(half, 1), sum);
            }
    }
    // B with what q lacks, and what B lacks with q.
    if (large != 0)
#pragma unroll 1
        for (int c = 0; c < kParts; ++c) {
            if (!(large >> c & 1u)) continue;
            const TurnedBack<kD> q(head, angles, c);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t high[2] = {q.high(half, 0), q.high(half, 1)};
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    uint32_t b[4], l[4];
                    load_matrices(b, table + at(m, c + half * kParts));
                    load_matrices(l, lacking + at(m, c + half * kParts));
                    float(&sum)[4] = half == 0 ? score[m] : odd[m];
                    mma_f16(sum, b[0], b[1], b[2], b[3], q.rest(half, 0, high[0]), q.rest(half, 1, high[1]), sum);
                    mma_f16(sum, l[0], l[1], l[2], l[3], high[0], high[1], sum);
                }
            }
        }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][i] += odd[m][i];
}

// The new token's bytes at `from` in shared memory into its place of a tile, by a warp.
template <int kD>
__device__ __forceinline__ void put_token(uint32_t tile, int token, uint32_t from, int lane) {
    if (lane < kD / 16) store_shared(tile + swizzled_bytes<kD>(token, lane), load_shared(from + lane * 16));
}

// Zeros behind the new token: bytes of NaN are NaN times weights of zero as well.
template <int kD>
__device__ __forceinline__ void clear_behind(uint32_t tile, int token, int lane) {
#pragma unroll 1
    for (int i = (token + 1) * (kD / 16) + lane; i < kByteTile * (kD / 16); i += 32)
        store_shared(tile + swizzled_bytes<kD>(i / (kD / 16), i % (kD / 16)), uint4{});
}

// The bytes of a tile as words: [c / 2][m], of rows 16 m + g and + 8 (odd ones), chunks c (lower two) and c + 1.
template <int kD, bool kTransposed>
__device__ __forceinline__ void load_words(uint32_t (&words)[kD / 32][2][4], uint32_t tile, int lane) {
#pragma unroll
    for (int c = 0; c < kD / 32; ++c)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const uint32_t at = tile + swizzled_bytes<kD>(m * 16 + (lane & 15), 2 * c + (lane >> 4));
            if constexpr (kTransposed)
                load_matrices_transposed(words[c][m], at);
            else
                load_matrices(words[c][m], at);
        }
}

// score[m] of tokens 16 m + g, + 8 (upper two) and heads 2 t, 2 t + 1: q · value of the key's bytes.
template <KvFormat kFormat, int kD>
__device__ __forceinline__ void byte_scores(float (&score)[2][4], const uint32_t (&words)[kD / 32][2][4],
                                            const uint32_t (&query)[kD / 16][2]) {
    float odd[2][4] = {};
#pragma unroll
    for (int c = 0; c < kD / 32; ++c)
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                uint32_t upper[2], lower[2];
                pairs_along<kFormat>(words[c][m][2 * k], upper);
                pairs_along<kFormat>(words[c][m][2 * k + 1], lower);
                float(&sum)[4] = k == 0 ? score[m] : odd[m];
                mma_f16(sum, upper[0], lower[0], upper[1], lower[1], query[2 * c + k][0], query[2 * c + k][1], sum);
            }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][i] += odd[m][i];
}

// sums[c] of value dims 16 c + 2 g, + 1 (upper two) and heads 2 t, 2 t + 1: += weights · values.
template <KvFormat kFormat, int kD>
__device__ __forceinline__ void add_values(float (&sums)[kD / 16][4], const uint32_t (&words)[kD / 32][2][4],
                                           const uint32_t (&weights)[2][2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int c = 0; c < kD / 16; ++c) {
            uint32_t left[2], right[2];
            pairs_down<kFormat>(words[c / 2][m][c % 2 * 2], left);
            pairs_down<kFormat>(words[c / 2][m][c % 2 * 2 + 1], right);
            mma_f16(sums[c], left[0], left[1], right[0], right[1], weights[m][0], weights[m][1], sums[c]);
        }
}

// ---------------------------------------------------------------- the end of a piece

// The warps' sums become one, by the whole block: the output if it `is_only` piece of the row, else what pieces are combined
// from, at `slot`. `exponent`: that of the warp's largest value scale.
template <KvFormat kFormat, int kD, class Shared>
__device__ __forceinline__ void merge_warps(const Attention8Params& p, unsigned char* shared, const float (&sums)[kD / 16][4],
                                            const float (&maximum)[2], float (&total)[2], uint32_t exponent, int num_heads,
                                            int kv_head, bool is_only, int64_t slot, bf16* out) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    float2* max_sum = reinterpret_cast<float2*>(shared + Shared::kMaxSum);
    float* mine = reinterpret_cast<float*>(shared + warp * Shared::kRingBytes);
    const float unit = __uint_as_float((exponent - 14u) << 23) * kByteFactor<kFormat>;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2) total[h] += __shfl_xor_sync(~0u, total[h], other);
        if (g == 0) max_sum[warp * kTableHeads + 2 * t + h] = {maximum[h], total[h]};
#pragma unroll
        for (int c = 0; c < kD / 16; ++c)
            *reinterpret_cast<float2*>(mine + (2 * t + h) * kD + 16 * c + 2 * g) = {sums[c][h] * unit, sums[c][2 + h] * unit};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_heads * kD / 4; i += kAttentionWarps * 32) {
        const int head = i / (kD / 4), d = i % (kD / 4) * 4;
        float highest = -INFINITY;
        float4 added = {0.f, 0.f, 0.f, 0.f};
        if (is_only && p.v_offset != nullptr) added = *reinterpret_cast<const float4*>(p.v_offset + kv_head * kD + d);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, max_sum[w * kTableHeads + head].x);
        float4 sum = {0.f, 0.f, 0.f, 0.f};
        float weight_sum = 0.f;
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) {
            const float2 of_warp = max_sum[w * kTableHeads + head];
            const float factor = power_of_two(of_warp.x - highest);
            const float4 v = *reinterpret_cast<const float4*>(shared + w * Shared::kRingBytes + (head * kD + d) * 4);
            weight_sum = fmaf(of_warp.y, factor, weight_sum);
            sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
            sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
        }
        if (is_only) {
            const float f = 1.f / weight_sum;
            *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(fmaf(sum.x, f, added.x), fmaf(sum.y, f, added.y)),
                                                              pack(fmaf(sum.z, f, added.z), fmaf(sum.w, f, added.w))};
        } else {
            __stcg(reinterpret_cast<float4*>(p.partial + (slot + head) * kD + d), sum);
            if (d == 0) __stcg(p.partial_max + slot + head, make_float2(highest, weight_sum));
        }
    }
}

}  // namespace qwen_rt
