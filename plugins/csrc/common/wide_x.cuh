// Activations as the wide kernel (wide_gemm.cuh) multiplies them: two terms of 8 bits for each number, in the order in which
// the lanes of a warpgroup hold operand A.
//
// A step is 128 columns, what a 128-byte line of a weight row holds. Of every row and step:
//   fp8   x is multiplied by the power of two that brings the step's largest |x| to 128 .. 256, and becomes
//         high + low / 16, both e4m3. Exact for bf16 numbers of at least 2^-14 of the largest (four bits of eight each);
//         smaller ones err by 2^-22 of the largest at most.
//   int8  x becomes an integer of 16 bits, 256 high + low, the largest |x| 16256 to 32512. Errs by 2^-15 of the largest.
// A sum over the step's columns meets the inverse of that factor. x that is not finite makes the factor NaN.
//
// Layout: blocks of four steps, [steps 4][rows / 8][half 2][term 2][row 8][t 4] of 16 bytes, then [steps 4][rows] factors.
//   Lane (g, t) of a warp finds the 16 bytes of row g that two wgmmas of 32 columns take: columns 4t and 16 + 4t of each.
//   Fewer than 8 rows make rows of that number instead of 8; more are rounded up to a multiple of 8.
#pragma once

#include <cuda_fp8.h>

#include "skinny_params.cuh"

namespace qwen_rt {

constexpr int kStepK = 128;        // columns of a step
constexpr int kBlockSteps = 4;     // steps of a block, and of a stage of the wide kernel
constexpr int kSegmentK = 256;     // columns that a warp prepares at a time

__host__ __device__ constexpr int padded_rows(int rows) { return rows < 8 ? rows : (rows + 7) / 8 * 8; }
__host__ __device__ constexpr int x_block_bytes(int rows) { return kBlockSteps * padded_rows(rows) * (kStepK * 2 + 4); }
__host__ __device__ constexpr int num_steps_of(int k) { return (k + kStepK - 1) / kStepK; }
__host__ __device__ constexpr int num_blocks_of(int k) { return (num_steps_of(k) + kBlockSteps - 1) / kBlockSteps; }
__host__ __device__ constexpr int num_segments_of(int k) { return (k + kSegmentK - 1) / kSegmentK; }

// Bytes from a block to the terms of row `row` in its step `step`: term 0 of half 0, t = 0; the other term, the other half.
__device__ __forceinline__ int x_offset(int rows, int step, int row) {
    const int padded = padded_rows(rows), of_eight = padded < 8 ? padded : 8;
    return step * padded * 256 + (row >> 3) * of_eight * 256 + (row & 7) * 64;
}
__device__ __forceinline__ int x_term_bytes(int rows) { return (rows < 8 ? rows : 8) * 64; }
__device__ __forceinline__ int factor_offset(int rows, int step, int row) {
    return (kBlockSteps * 256 + step * 4) * padded_rows(rows) + row * 4;
}

// The two terms of a pair of numbers, 16 bits each.
template <Format kFormat>
__device__ __forceinline__ void split_pair(float2 v, uint32_t& high, uint32_t& low) {
    if constexpr (kFormat == Format::kFp8) {
        high = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
        const float2 back = __half22float2(static_cast<__half2>(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(high), __NV_E4M3)));
        low = __nv_cvt_float2_to_fp8x2({(v.x - back.x) * 16.f, (v.y - back.y) * 16.f}, __NV_SATFINITE, __NV_E4M3);
    } else {
        const int a = __float2int_rn(v.x), b = __float2int_rn(v.y);
        const int a_high = (a + 128) >> 8, b_high = (b + 128) >> 8;
        high = (a_high & 0xff) | (b_high & 0xff) << 8;
        low = (a & 0xff) | (b & 0xff) << 8;
    }
}

// Prepares the 8 numbers `x` of row `row` from column `segment` · 256 + 8 · lane on, with all lanes of a warp; those behind
// the last column give zeros. `store(bytes, word)` writes into the blocks.
template <Format kFormat, class Store>
__device__ __forceinline__ void prepare_segment(uint4 x, int rows, int row, int segment, int k, const Store& store) {
    const int lane = threadIdx.x & 31;
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger_pairs(largest, words[i] & 0x7fff7fffu);
#pragma unroll
    for (int i = 1; i < 16; i *= 2) largest = larger_pairs(largest, __shfl_xor_sync(~0u, largest, i));
    const uint32_t exponent = max(15u, max(largest >> 7 & 0xffu, largest >> 23 & 0xffu));
    constexpr bool kFloat = kFormat == Format::kFp8;
    constexpr float kRoom = 127.f / 128.f;  // so that a high byte is at most 127
    const float scale = kFloat ? __uint_as_float((261u - exponent) << 23) : __uint_as_float((268u - exponent) << 23) * kRoom;
    float factor = kFloat ? __uint_as_float((exponent - 7u) << 23) : __uint_as_float((exponent - 14u) << 23) * (1.f / kRoom);
    if (exponent == kNotFinite) factor = __uint_as_float(kNan);
    const int j = lane & 15, step = segment * 2 + (lane >> 4), block = step / kBlockSteps, in_block = step % kBlockSteps;
    if (step * kStepK >= k) return;
    const int at = block * x_block_bytes(rows), term = x_term_bytes(rows);
    const int to = at + x_offset(rows, in_block, row) + (j >> 3) * 2 * term + (j & 1) * 32 + ((j >> 2 & 1) * 2 + (j >> 1 & 1)) * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t high[2], low[2];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const float2 v = unpack(words[2 * i + pair]);
            split_pair<kFormat>({v.x * scale, v.y * scale}, high[pair], low[pair]);
        }
        store(to + i * 16, high[0] | high[1] << 16);
        store(to + i * 16 + term, low[0] | low[1] << 16);
    }
    if (j == 0) store(at + factor_offset(rows, in_block, row), __float_as_uint(factor));
}

// Sum of the squares of the 8 numbers of every lane.
__device__ __forceinline__ float segment_squares(uint4 x) {
    float sum = add_squares(0.f, x);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return sum;
}

}  // namespace qwen_rt
