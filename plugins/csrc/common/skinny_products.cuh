// The products of one turn of the skinny kernel: a warp's line of the weights of a group of tiles, with its part of x.
#pragma once

#include "skinny_params.cuh"

namespace qwen_rt {

// Where a warp stands.
struct Turn {
    uint32_t weights, x, norm;  // in shared memory: the line of tile 0, the line of x, norm weights
    int first_k;                // of the line
    int g, t;                   // lane: row and place
    bool is_first;              // group of tiles: squares are summed in it
};

// x of one unit and eight rows, normalized; squares go into `square_sum`.
template <class Slice, bool kNorm>
__device__ __forceinline__ void load_x(const Turn& turn, int n, int unit, float& square_sum, uint4 (&x)[Slice::kXVectors]) {
#pragma unroll
    for (int v = 0; v < Slice::kXVectors; ++v)
        x[v] = load_shared(turn.x + n * 8 * Slice::kXBytes + Slice::x_at(turn.g, turn.t, unit, v));
    if constexpr (kNorm) {
        if (turn.is_first) {
            if constexpr (Slice::kBits == 4) {  // a unit's squares as skinny_int4_few.cuh adds them, all four lanes of a row at once
                float of_unit = (add_squares(0.f, x[0]) + add_squares(0.f, x[1])) + (add_squares(0.f, x[2]) + add_squares(0.f, x[3]));
                of_unit += __shfl_xor_sync(~0u, of_unit, 1);
                square_sum += of_unit + __shfl_xor_sync(~0u, of_unit, 2);
            } else {
#pragma unroll
                for (int v = 0; v < Slice::kXVectors; ++v) square_sum = add_squares(square_sum, x[v]);
            }
        }
        const uint32_t at = turn.norm + (turn.first_k + (turn.t + 4 * unit) * Slice::kLaneK) * 2;
#pragma unroll
        for (int v = 0; v < Slice::kXVectors; ++v) x[v] = multiply_pairs(x[v], load_shared(at + v * 16));
    }
}

// The 16 bytes of rows g and g + 8 of a tile that this lane reads of a unit.
template <class Slice>
__device__ __forceinline__ void load_rows(const Turn& turn, int m, int unit, uint32_t (&low)[4], uint32_t (&high)[4]) {
    const uint32_t from = turn.weights + m * Slice::kTileBytes + Slice::weight_at(turn.g, turn.t, unit);
    const uint4 a = load_shared(from), b = load_shared(from + 8 * Slice::kLineBytes);
    low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
    high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
}

// ---------------------------------------------------------------- bf16

// kResident: the first group leaves x ∘ norm_weight where x was, each lane the 16 bytes that it alone reads.
template <class Slice, bool kNorm, bool kResident, int kNTiles, int kMTiles>
__device__ __forceinline__ void multiply_bf16(const SkinnyParams& p, const Turn& turn, float (&square_sum)[kNTiles],
                                              float (&sum)[kMTiles][kNTiles][4]) {
    // Straight-line code for as many units as registers hold x of, so that loads and products overlap.
    constexpr int kAtOnce = kNTiles <= 2 ? Slice::kUnits : 1;
#pragma unroll
    for (int first = 0; first < Slice::kUnits; first += kAtOnce) {
        uint4 x[kNTiles][kAtOnce];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const uint32_t at = turn.x + n * 8 * Slice::kXBytes + Slice::x_at(turn.g, turn.t, first + i, 0);
                x[n][i] = load_shared(at);
                if (kNorm && turn.is_first) square_sum[n] = add_squares(square_sum[n], x[n][i]);
                if (kNorm && (!kResident || turn.is_first)) {
                    x[n][i] = multiply_pairs(x[n][i], load_shared(turn.norm + (turn.first_k + (turn.t + 4 * (first + i)) * 8) * 2));
                    if constexpr (kResident) store_shared_if(n * 8 + turn.g < p.rows, at, x[n][i]);
                }
            }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                uint32_t low[4], high[4];
                load_rows<Slice>(turn, m, first + i, low, high);
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
                    mma_bf16(sum[m][n], low[0], high[0], low[1], high[1], x[n][i].x, x[n][i].y);
                    mma_bf16(sum[m][n], low[2], high[2], low[3], high[3], x[n][i].z, x[n][i].w);
                }
            }
    }
}

// ---------------------------------------------------------------- fp8, int8, int4

// Sums of a unit of rows g and g + 8, columns 2t and 2t + 1, as floats; `start` is what integers begin with.
__device__ __forceinline__ void sum_unit(const UnitX<Format::kFp8>& x, const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const int (&)[4], float (&sum)[4]) {
    float part[4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        uint32_t a[2], b[2];
        pairs_of_fp8(low[word], a);
        pairs_of_fp8(high[word], b);
        mma_f16(part, a[0], b[0], a[1], b[1], x.pairs[2 * word], x.pairs[2 * word + 1], part);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = part[i] * kFp8Factor;
}
__device__ __forceinline__ void sum_unit(const UnitX<Format::kInt8>& x, const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const int (&start)[4], float (&sum)[4]) {
    const int none[4] = {};
    int of_high[4], of_low[4];
    mma_bytes<true>(of_high, low[0], high[0], low[1], high[1], x.high[0], x.high[1], none);
    mma_bytes<true>(of_low, low[0], high[0], low[1], high[1], x.low[0], x.low[1], start);
    mma_bytes<true>(of_high, low[2], high[2], low[3], high[3], x.high[2], x.high[3], of_high);
    mma_bytes<true>(of_low, low[2], high[2], low[3], high[3], x.low[2], x.low[3], of_low);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(of_high[i] * 256 + of_low[i]);
}
__device__ __forceinline__ void sum_unit(const UnitX<Format::kInt4>& x, const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const int (&start)[4], float (&sum)[4]) {
    int of_high[4] = {}, of_low[4] = {start[0], start[1], start[2], start[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t a0 = even_nibbles(low[i]), a1 = even_nibbles(high[i]), a2 = odd_nibbles(low[i]), a3 = odd_nibbles(high[i]);
        mma_bytes<false>(of_high, a0, a1, a2, a3, x.high[2 * i], x.high[2 * i + 1], of_high);
        mma_bytes<false>(of_low, a0, a1, a2, a3, x.low[2 * i], x.low[2 * i + 1], of_low);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(of_high[i] * 256 + of_low[i]);
}

template <Format kFormat, Scaling kScaling, class Slice, bool kNorm, int kNTiles, int kMTiles>
__device__ __forceinline__ void multiply_quantized(const SkinnyParams& p, const Turn& turn, const ScaleRows<kFormat, kMTiles>& rows,
                                                   float (&square_sum)[kNTiles], float (&sum)[kMTiles][kNTiles][4]) {
    constexpr bool kGrouped = kScaling == Scaling::kGroups, kHasZero = kGrouped && kFormat != Format::kFp8;
    constexpr int kTogether = kFormat == Format::kInt4 ? 1 : Slice::kUnits;  // as many as registers are enough for
#pragma unroll kTogether
    for (int unit = 0; unit < Slice::kUnits; ++unit) {
        // Of the columns 2t and 2t + 1 of every eight: the lanes that hold those rows tell.
        float factor[kNTiles][2];
        int sum_x[kNTiles][2] = {};
        const auto prepare = [&](int n) {
            uint4 x[Slice::kXVectors];
            load_x<Slice, kNorm>(turn, n, unit, square_sum[n], x);
            UnitX<kFormat> prepared(x);
            if constexpr (kHasZero) prepared.add_up();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                factor[n][i] = __shfl_sync(~0u, prepared.factor, 8 * turn.t + 4 * i);
                if constexpr (kHasZero) sum_x[n][i] = __shfl_sync(~0u, prepared.sum, 8 * turn.t + 4 * i);
            }
            return prepared;
        };
        const int group = kGrouped ? (turn.first_k + unit * 4 * Slice::kLaneK) >> p.group_shift : 0;
        const auto multiply = [&](const auto&... x) {
            const UnitX<kFormat>* xs[] = {&x...};
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                uint32_t low[4], high[4];
                load_rows<Slice>(turn, m, unit, low, high);
                float scale[2] = {1.f, 1.f};
                [[maybe_unused]] int zero[2] = {};
                if constexpr (kGrouped) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        scale[h] = rows.scale(m, h, group);
                        if constexpr (kHasZero) zero[h] = rows.zero(m, h, group);
                    }
                }
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
                    int start[4] = {};  // zero points come off here
                    float part[4];
                    if constexpr (kHasZero)
#pragma unroll
                        for (int i = 0; i < 4; ++i) start[i] = -zero[i >> 1] * sum_x[n][i & 1];
                    sum_unit(*xs[n], low, high, start, part);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float by = kGrouped ? factor[n][i & 1] * scale[i >> 1] : factor[n][i & 1];
                        sum[m][n][i] = fmaf(part[i], by, sum[m][n][i]);
                    }
                }
            }
        };
        if constexpr (kNTiles == 1) {
            multiply(prepare(0));
        } else if constexpr (kNTiles == 2) {
            const auto a = prepare(0), b = prepare(1);
            multiply(a, b);
        } else if constexpr (kNTiles == 4) {
            const auto a = prepare(0), b = prepare(1), c = prepare(2), d = prepare(3);
            multiply(a, b, c, d);
        } else {
            const auto a = prepare(0), b = prepare(1), c = prepare(2), d = prepare(3);
            const auto e = prepare(4), f = prepare(5), g = prepare(6), h = prepare(7);
            multiply(a, b, c, d, e, f, g, h);
        }
    }
}

// ---------------------------------------------------------------- fine groups

// Weights become bf16: a lane's 16 bytes are 16 or 32 numbers in order, eight of them at a time.
template <Format kFormat, class Slice, bool kNorm, int kNTiles, int kMTiles>
__device__ __forceinline__ void multiply_fine(const SkinnyParams& p, const Turn& turn, const ScaleRows<kFormat, kMTiles>& rows,
                                              float (&square_sum)[kNTiles], float (&sum)[kMTiles][kNTiles][4]) {
#pragma unroll 1
    for (int unit = 0; unit < Slice::kUnits; ++unit) {
        uint4 x[kNTiles][Slice::kXVectors];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) load_x<Slice, kNorm>(turn, n, unit, square_sum[n], x[n]);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            uint32_t low[4], high[4];
            load_rows<Slice>(turn, m, unit, low, high);
#pragma unroll
            for (int v = 0; v < Slice::kXVectors; ++v) {
                const int group = (turn.first_k + (turn.t + 4 * unit) * Slice::kLaneK + v * 8) >> p.group_shift;
                constexpr int kWords = 4 / Slice::kXVectors;
                const uint4 a = dequantize_words<kFormat>(low + v * kWords, rows.scale(m, 0, group), rows.zero(m, 0, group));
                const uint4 b = dequantize_words<kFormat>(high + v * kWords, rows.scale(m, 1, group), rows.zero(m, 1, group));
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
                    mma_bf16(sum[m][n], a.x, b.x, a.y, b.y, x[n][v].x, x[n][v].y);
                    mma_bf16(sum[m][n], a.z, b.z, a.w, b.w, x[n][v].z, x[n][v].w);
                }
            }
        }
    }
}

}  // namespace qwen_rt
