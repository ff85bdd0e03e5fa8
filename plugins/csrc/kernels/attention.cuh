// What the attention kernels share: the op's arguments, and the kernels' launchers. See rope_kv_append_attention.cu.
#pragma once

#include <cuda_fp16.h>

#include "../common/launch.cuh"
#include "../common/ptx.cuh"

namespace qwen_rt {

constexpr int kMaxGroup = 16;  // heads of one kv head, at most
constexpr float kLog2e = 1.4426950408889634f;

enum class KvFormat { kBf16 = 0, kFp8 = 1, kInt8 = 2 };  // kv_format of core/ops.py

struct AttentionArguments {
    const bf16* qkv;
    const int64_t* positions;
    const int32_t* query_starts;
    const float* inv_freq;
    const int32_t* block_tables;
    void *k_cache, *v_cache;  // bf16, or bytes with scales
    float *k_scales, *v_scales;
    const float *k_offset, *v_offset;  // or null
    bf16* out;
    void* counters;  // QWEN_RT_COUNTER_BYTES of zeros, left zero
    void* scratch;
    int64_t rows, sequences, num_blocks, max_length, capacity;  // capacity: positions that a block table can hold
    int heads, kv_heads, head_dim, block_size, max_blocks;
    float scale, rope_scaling;
    KvFormat kv_format;
};

// What no kernel of a step writes while another runs, in the order of the program: the compiler moves it behind no branch.
__device__ __forceinline__ float load_constant(const float* pointer) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(pointer));
    return v;
}
__device__ __forceinline__ int64_t load_constant(const int64_t* pointer) {
    int64_t v;
    asm volatile("ld.global.nc.s64 %0, [%1];" : "=l"(v) : "l"(pointer));
    return v;
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of rows of kD: eight rows of one chunk fall on all banks.
template <int kD>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    return static_cast<uint32_t>(row * kD * 2 + ((chunk ^ (row & 7)) << 4));
}

// 2^x; below 2^-126 it is 0.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Products and pairs of bf16, or of f16 where kHalf.
template <bool kHalf>
__device__ __forceinline__ void mma_16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (kHalf)
        mma_f16(d, a0, a1, a2, a3, b0, b1, d);
    else
        mma_bf16(d, a0, a1, a2, a3, b0, b1);
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

template <bool kHalf>
__device__ __forceinline__ uint32_t pack_16(float low, float high) {
    return kHalf ? pack_half(low, high) : pack(low, high);
}

// Two neighbours of an offset; zeros where there is none.
__device__ __forceinline__ float2 offset_pair(const float* offset, int at) {
    return offset == nullptr ? make_float2(0.f, 0.f) : *reinterpret_cast<const float2*>(offset + at);
}

struct QueryTile {
    int sequence, first_row, num_rows;  // num_rows 0: there is no such tile
};

// Tile number `index` of all sequences' tiles of kRows query rows. Called by all threads of a block, which get the same.
template <int kRows>
__device__ __forceinline__ QueryTile find_query_tile(const int32_t* query_starts, int sequences, int index) {
    for (int b = 0; b < sequences; ++b) {
        const int first = query_starts[b], count = query_starts[b + 1] - first, tiles = (count + kRows - 1) / kRows;
        if (index < tiles) return {b, first + index * kRows, min(kRows, count - index * kRows)};
        index -= tiles;
    }
    return {0, 0, 0};
}

// Every sequence has one row.
int64_t scratch_attention_decode(const Device& device, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim);
int32_t launch_attention_decode(const QwenRtCall& call, const Device& device, const AttentionArguments& a);

int64_t scratch_attention_decode_8bit(const Device& device, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim);
int32_t launch_attention_decode_8bit(const QwenRtCall& call, const Device& device, const AttentionArguments& a);

// Sequences of any number of rows: rope and cache write, then attention.
int32_t launch_attention_prefill(const QwenRtCall& call, const Device& device, const AttentionArguments& a);

int64_t scratch_attention_prefill_8bit(int64_t sequences, int64_t capacity, int64_t kv_heads, int64_t head_dim);
int32_t launch_attention_prefill_8bit(const QwenRtCall& call, const Device& device, const AttentionArguments& a);

// The attention of a prefill alone: turned queries stand in `out`, keys and values in the caches; all of them bf16, or f16
// where the format says that they come from bytes. On SM 9.0 by wgmma.
int32_t launch_attention_over_cache(const QwenRtCall& call, const Device& device, const AttentionArguments& a);
int32_t launch_attention_prefill_sm90(const QwenRtCall& call, const Device& device, const AttentionArguments& a);

}  // namespace qwen_rt
