// How the decode kernels cut the tokens of a row into pieces, and how the sums of all pieces become its output.
#pragma once

#include "attention.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- cutting

constexpr int kAttentionWarps = 8;
constexpr int kMaxPieces = 96;   // of a row
constexpr int kFactorSlots = 4;  // pieces of a lane; 32 lanes hold kMaxPieces, padded to a multiple of kBatch
constexpr int kMinPiece = 256;   // tokens: below, combining pieces costs more than they win
constexpr int kPieceStep = 64;   // tokens

// Pieces of a long row: with one row, every SM gets one block. `units`: blocks that a piece takes.
inline int max_pieces_of(int num_sms, int64_t units) {
    return units >= num_sms ? 1 : static_cast<int>(num_sms / units < kMaxPieces ? num_sms / units : kMaxPieces);
}

// A division by `divisor` of numbers up to 2^24, as a product; divisor at most 2^16.
struct Divisor {
    uint64_t factor;  // 2^40 / divisor, rounded up
    static Divisor of(int divisor) {
        const auto wide = static_cast<uint64_t>(divisor);
        return {((uint64_t{1} << 40) + wide - 1) / wide};
    }
    __device__ __forceinline__ int divide(int number) const {
        return static_cast<int>(static_cast<uint64_t>(number) * factor >> 40);
    }
};

__device__ __forceinline__ int piece_of(int length, int max_pieces, Divisor by_max_pieces) {
    const int even = by_max_pieces.divide(length + max_pieces - 1);
    return max(kMinPiece, (even + kPieceStep - 1) & -kPieceStep);
}

// The pieces of a row, and whether this block has the last of them: it takes every n-th.
struct RowPieces {
    int count = 0;
    bool has_last = false;
    __device__ __forceinline__ void find(int length, int piece_tokens, int piece) {
        count = static_cast<int>(static_cast<uint32_t>(length + piece_tokens - 1) / static_cast<uint32_t>(piece_tokens));
        has_last = static_cast<uint32_t>(count - 1 - piece) % gridDim.x == 0;
    }
};

struct PieceGrid {
    dim3 grid;        // pieces, units, rows
    bool is_crowded;  // more blocks than SMs
    bool is_short;    // all pieces are the smallest
};

// The number of pieces grows with the length up to max_pieces, then wobbles below it. More blocks than run at once would
// mostly find no piece left: then a block takes several.
inline PieceGrid piece_grid(const Device& device, int64_t rows, int64_t units, int max_pieces, int64_t max_length) {
    const int64_t pieces = max_length >= static_cast<int64_t>(max_pieces) * kMinPiece ? max_pieces
                                                                                      : (max_length + kMinPiece - 1) / kMinPiece;
    const int64_t at_once = (2 * device.num_sms + rows * units - 1) / (rows * units);
    return {dim3(static_cast<unsigned>(pieces < at_once ? pieces : at_once), static_cast<unsigned>(units),
                 static_cast<unsigned>(rows)),
            rows * units * pieces > device.num_sms, max_length <= static_cast<int64_t>(max_pieces) * kMinPiece};
}

inline int64_t round_up(int64_t value) { return (value + 255) / 256 * 256; }

// Of a row without a token in the cache: zeros where it is idle, NaN beyond the block table. By the whole block.
__device__ __forceinline__ void write_no_token(int64_t position, bf16* out, int count) {
    wait_for_previous_grids();
    const bf16 value = __float2bfloat16(position < 0 ? 0.f : __uint_as_float(0x7fc00000u));
    for (int i = threadIdx.x; i < count; i += kAttentionWarps * 32) out[i] = value;
}

// ---------------------------------------------------------------- combining

// An addition before which this block's writes (all threads', before a barrier) are visible, and after which others' are.
__device__ __forceinline__ uint32_t add_in_order(uint32_t* counter, uint32_t value) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

// What the pieces of one row and unit left.
struct PieceSums {
    const float* sums;    // [count, stride, D]
    const float2* maxima; // [count, stride]: maximum and sum of the weights
    int count, stride;    // stride: heads that a piece has room for
};

// Adds the pieces up in order, by the whole block; `offset` (or null) is added to every head.
//   out[h] = sum_s sums[s, h] · f[s, h] + offset,  f[s, h] = exp2(max[s, h] - max_s max) / total
// kBatch: pieces whose sums a thread has under way at once; it does not change a bit. `shared` is overwritten.
template <int kD, int kBatch>
__device__ __forceinline__ void combine_pieces(const PieceSums& pieces, int num_heads, const float* offset, unsigned char* shared,
                                               bf16* out) {
    constexpr int kThreads = kAttentionWarps * 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Factors of the pieces by warps, one head each, while the first sums are under way.
    const int num_pieces = pieces.count, num_padded = (num_pieces + kBatch - 1) / kBatch * kBatch;
    float* factors = reinterpret_cast<float*>(shared);  // [num_heads][num_padded], 0 behind the pieces
    const int num_items = num_heads * kD / 4;
    for (int i = threadIdx.x; i < (num_items + kThreads - 1) / kThreads * kThreads; i += kThreads) {
        const int item = min(i, num_items - 1), head = item / (kD / 4), d = item % (kD / 4) * 4;
        const float* from = pieces.sums + static_cast<int64_t>(head) * kD + d;
        float4 sum = {0.f, 0.f, 0.f, 0.f}, added = {0.f, 0.f, 0.f, 0.f};
        if (offset != nullptr) added = *reinterpret_cast<const float4*>(offset + d);
        for (int first = 0; first < num_padded; first += kBatch) {
            float4 v[kBatch];
#pragma unroll
            for (int s = 0; s < kBatch; ++s)
                v[s] = first + s < num_pieces ? __ldcg(reinterpret_cast<const float4*>(
                                                    from + static_cast<int64_t>(first + s) * pieces.stride * kD))
                                              : make_float4(0.f, 0.f, 0.f, 0.f);
            if (first == 0 && i == static_cast<int>(threadIdx.x)) {
                for (int h = warp; h < num_heads; h += kAttentionWarps) {
                    float2 mine[kFactorSlots];
                    float highest = -INFINITY, weight_sum = 0.f;
#pragma unroll
                    for (int k = 0; k < kFactorSlots; ++k) {
                        const int s = k * 32 + lane;
                        mine[k] = s < num_pieces ? __ldcg(pieces.maxima + static_cast<int64_t>(s) * pieces.stride + h)
                                                 : make_float2(-INFINITY, 0.f);
                        highest = fmaxf(highest, mine[k].x);
                    }
#pragma unroll
                    for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
#pragma unroll
                    for (int k = 0; k < kFactorSlots; ++k) {
                        mine[k].x = power_of_two(mine[k].x - highest);
                        weight_sum = fmaf(mine[k].y, mine[k].x, weight_sum);
                    }
#pragma unroll
                    for (int step = 16; step > 0; step /= 2) weight_sum += __shfl_xor_sync(~0u, weight_sum, step);
#pragma unroll
                    for (int k = 0; k < kFactorSlots; ++k)
                        if (k * 32 + lane < num_padded) factors[h * num_padded + k * 32 + lane] = mine[k].x / weight_sum;
                }
                __syncthreads();
            }
#pragma unroll
            for (int s = 0; s < kBatch; ++s) {
                const float factor = factors[head * num_padded + first + s];
                sum.x = fmaf(v[s].x, factor, sum.x), sum.y = fmaf(v[s].y, factor, sum.y);
                sum.z = fmaf(v[s].z, factor, sum.z), sum.w = fmaf(v[s].w, factor, sum.w);
            }
        }
        sum.x += added.x, sum.y += added.y, sum.z += added.z, sum.w += added.w;
        if (i < num_items) *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(sum.x, sum.y), pack(sum.z, sum.w)};
    }
}

}  // namespace qwen_rt
