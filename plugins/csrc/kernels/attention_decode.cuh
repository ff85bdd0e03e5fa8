// The parts of attention_decode.cu: its parameters, its shared memory.
#pragma once

#include "attention.cuh"
#include "attention_combine.cuh"

namespace qwen_rt {

constexpr int kTile = 16;  // tokens of a warp's tile

struct AttentionParams {
    const bf16* qkv;
    const int64_t* positions;
    const float* inv_freq;
    const int32_t* block_tables;
    bf16 *k_cache, *v_cache, *out;
    float* partial;       // [rows, kv_heads, max_pieces, group, D]
    float2* partial_max;  // [rows, kv_heads, max_pieces, group]: maximum and sum
    uint32_t* counters;   // [rows, kv_heads]
    Divisor by_block_size, by_max_pieces;
    int heads, kv_heads, group, block_size, max_blocks, max_pieces;
    float scale, rope_scaling;
};

template <int kD, int kStages>
struct AttentionShared {
    static constexpr int kTileBytes = kTile * kD * 2;
    static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // of a warp; holds its f32[16, D] sums at the end
    static constexpr int kQuery = kAttentionWarps * kRingBytes;
    static constexpr int kNewKey = kQuery + kTileBytes;
    static constexpr int kNewValue = kNewKey + kD * 2;
    static constexpr int kCosSin = kNewValue + kD * 2;
    static constexpr int kMaxSum = kCosSin + kD / 2 * 8;  // float2[warps][16]
    static constexpr int kBytes = kMaxSum + kAttentionWarps * kMaxGroup * 8;
};

}  // namespace qwen_rt
