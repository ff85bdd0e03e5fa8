// The end of attention_decode.cu: the sums of all pieces of a row become its output.
#pragma once

#include "attention.cuh"

namespace qwen_rt {

constexpr int kAttentionWarps = 8;
constexpr int kMaxPieces = 96;   // of a row
constexpr int kFactorSlots = 4;  // pieces of a lane; 32 lanes hold kMaxPieces, padded to a multiple of kBatch

struct AttentionParams {
    const bf16* qkv;
    const int64_t* positions;
    const float* inv_freq;
    const int32_t* block_tables;
    bf16 *k_cache, *v_cache, *out;
    float* partial;       // [rows, kv_heads, max_pieces, group, D]
    float2* partial_max;  // [rows, kv_heads, max_pieces, group]: maximum and sum
    uint32_t* counters;   // [rows, kv_heads]
    int heads, kv_heads, group, block_size, max_blocks, max_pieces;
    float scale, rope_scaling;
};

// Adds up the pieces of one row and kv head in order, by the whole block.
//   out[h] = sum_s sums[s, h] · f[s, h],  f[s, h] = exp2(max[s, h] - max_s max) / total
// kBatch: pieces whose sums a thread has under way at once; it does not change a bit. `shared` is overwritten.
template <int kD, int kBatch>
__device__ __forceinline__ void combine_pieces(const AttentionParams& p, int row, int kv_head, int num_pieces,
                                               unsigned char* shared, bf16* out) {
    constexpr int kThreads = kAttentionWarps * 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Factors of the pieces by warps, one head each, while the first sums are under way.
    const int64_t slot0 = (static_cast<int64_t>(row) * p.kv_heads + kv_head) * p.max_pieces;
    const int num_padded = (num_pieces + kBatch - 1) / kBatch * kBatch;
    float* factors = reinterpret_cast<float*>(shared);  // [group][num_padded], 0 behind the pieces
    const int num_items = p.group * kD / 4;
    for (int i = threadIdx.x; i < (num_items + kThreads - 1) / kThreads * kThreads; i += kThreads) {
        const int item = min(i, num_items - 1), head = item / (kD / 4), d = item % (kD / 4) * 4;
        const float* from = p.partial + (slot0 * p.group + head) * kD + d;
        float4 sum = {0.f, 0.f, 0.f, 0.f};
        for (int first = 0; first < num_padded; first += kBatch) {
            float4 v[kBatch];
#pragma unroll
            for (int s = 0; s < kBatch; ++s)
                v[s] = __ldcg(reinterpret_cast<const float4*>(
                    from + static_cast<int64_t>(min(first + s, num_pieces - 1)) * p.group * kD));
            if (first == 0 && i == static_cast<int>(threadIdx.x)) {
                for (int h = warp; h < p.group; h += kAttentionWarps) {
                    float2 mine[kFactorSlots];
                    float highest = -INFINITY, weight_sum = 0.f;
#pragma unroll
                    for (int k = 0; k < kFactorSlots; ++k) {
                        const int s = k * 32 + lane;
                        mine[k] = s < num_pieces ? __ldcg(p.partial_max + (slot0 + s) * p.group + h) : make_float2(-INFINITY, 0.f);
                        highest = fmaxf(highest, mine[k].x);
                    }
#pragma unroll
                    for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
#pragma unroll
                    for (int k = 0; k < kFactorSlots; ++k) {
                        mine[k].x = exp2f(mine[k].x - highest);
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
        if (i < num_items) *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(sum.x, sum.y), pack(sum.z, sum.w)};
    }
}

}  // namespace qwen_rt
