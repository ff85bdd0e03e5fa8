// int4 matrices of few rows of x and few bytes (skinny_int4_few.cuh): weights and scales go from memory straight into
// registers, `kDepth` units ahead, without rings and barriers.
//
// Cost: the stored bytes once, 32 to 96 KB of them under way on an SM; 60 instructions of a warp for 2048 weights, of which
//   16 split bytes. Not for large matrices: alone it is as fast as the ring, but between attention's kernels a 7B gate_up takes
//   42 instead of 26 µs. Probably because what is under way takes room in L1, and large shared memory leaves little of it.
#pragma once

#include "skinny_int4_few.cuh"

namespace qwen_rt {

inline FewLayout direct_layout(const SkinnyParams& p, int sets, int tiles) {
    FewLayout at = {};
    lay_out_few(p, 0, tiles * 16, sets, 1, 0, &at);
    return at;
}

// kDepth: units that a warp has under way; kBlocks: of an SM.
template <bool kNorm, bool kZeros, int kSets, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kSets* kSkinnyThreads, kBlocks)
    skinny_int4_direct(const __grid_constant__ SkinnyParams p, const __grid_constant__ FewLayout at) {
    constexpr int kThreads = kSets * kSkinnyThreads, kTurnBytes = kWarps * 64;
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int set = static_cast<int>(threadIdx.x) / kSkinnyThreads, in_set = threadIdx.x & (kSkinnyThreads - 1), warp = in_set >> 5;
    const uint32_t base = smem_address(shared);
    const auto rows = reinterpret_cast<FewRow*>(shared + at.rows);
    const auto sums = reinterpret_cast<float*>(shared + at.sets + set * at.set_bytes + at.sums_of_set);        // [2][warp][row][20]
    const auto squares = reinterpret_cast<float*>(shared + at.sets + set * at.set_bytes + at.squares_of_set);  // [warp][row]

    const int block = static_cast<int>(blockIdx.x);
    const int begin = block * p.block_units + min(block, p.blocks_with_more);
    const int num_units = p.block_units + (block < p.blocks_with_more ? 1 : 0);
    const int num_tiles = (num_units + p.tile_units - 1) / p.tile_units;
    const int k_units = p.k / 128, turns = (k_units - warp + kWarps - 1) / kWarps;

    if constexpr (kNorm) store_norm<kThreads>(p, base + at.norm);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_tiles * 16; i += kThreads)
        find_few_row<kZeros>(p, {begin, num_units}, i >> 4, i & 15, rows[i]);
    __syncthreads();

    // The loader is kDepth units ahead of the products. A lane has 16 bytes of rows g and g + 8 of a tile.
    const uint64_t policy = evict_first_policy();
    uint4 weights[kDepth][2] = {};
    unsigned short scales[kDepth][2] = {};
    [[maybe_unused]] unsigned char zeros[kDepth][2] = {};
    const unsigned char *weight_at[2], *scale_at[2];
    [[maybe_unused]] const unsigned char* zero_at[2];
    int load_tile = set, load_left = 0;  // units of the tile
    const auto aim = [&] {
        load_left = load_tile < num_tiles ? turns : 0;
        if (load_tile >= num_tiles) return let_next_grid_start();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const FewRow& row = rows[load_tile * 16 + h * 8 + g];
            weight_at[h] = row.weight + warp * 64 + t * 16, scale_at[h] = row.scale + warp * 2;
            if constexpr (kZeros) zero_at[h] = row.zero + (warp >> 1);
        }
    };
    const auto load = [&](int i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) load_once_if(i < load_left, weights[i][h], weight_at[h] + i * kTurnBytes, policy);
        if (i >= load_left) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            scales[i][h] = __ldg(reinterpret_cast<const unsigned short*>(scale_at[h] + i * kWarps * 2));
            if constexpr (kZeros) zeros[i][h] = __ldg(zero_at[h] + i * kWarps / 2);
        }
    };
    const auto advance = [&] {
        load_left -= kDepth;
        if (load_left > 0) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                weight_at[h] += kDepth * kTurnBytes, scale_at[h] += kDepth * kWarps * 2;
                if constexpr (kZeros) zero_at[h] += kDepth * kWarps / 2;
            }
        } else if (load_tile < num_tiles) {
            load_tile += kSets;
            aim();
        }
    };
    aim();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) load(i);
    advance();
    wait_for_previous_grids();
    prepare_few_x<kNorm, kZeros, kThreads>(p, at, shared);
    __syncthreads();

    const int x_row = min(g >> 1, p.rows - 1), my_row = min(t, p.rows - 1);
    const uint32_t x_at = base + at.x + x_row * p.k * 2 + (g & 1) * 64 + t * 16 + warp * 256;
    const uint32_t units_at = base + at.units + (my_row * k_units + warp) * 8;
    int parity = 0;
#pragma unroll 1
    for (int tile = set; tile < num_tiles; tile += kSets) {
        const int first = tile * p.tile_units;
        // What the sums meet at the end is fetched before it is needed; every time another warp has it.
        Output<Format::kInt4, false> mine;
        mine.find(p, {begin + first, min(p.tile_units, num_units - first)}, 1, (in_set - tile * 32) & (kSkinnyThreads - 1));
        float sum[2] = {};
        uint32_t x_now = x_at, units_now = units_at;
#pragma unroll 1
        for (int left = turns;;) {
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                if (i < left) {
                    const uint32_t from = x_now + i * kWarps * 256;
                    const uint4 even = load_shared(from), odd = load_shared(from + 128);
                    const float2 of_unit = load_shared_pair(units_now + i * kWarps * 8);
                    int off[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        off[h] = __float_as_int(of_unit.y);
                        if constexpr (kZeros) off[h] *= zeros[i][h] >> (warp & 1) * 4 & 15;
                    }
                    multiply_few(weights[i][0], weights[i][1], even, odd, of_unit.x, off, scales[i], sum);
                }
                load(i);
            }
            advance();
            left -= kDepth;
            if (left <= 0) break;
            x_now += kDepth * kWarps * 256, units_now += kDepth * kWarps * 8;
        }

        // A warp's sums go beside the others', which are added up while all go on: the next ones have another place.
        float* const buffer = sums + parity * (kWarps * kReduceStride) * p.rows;
        parity ^= 1;
        if (t < p.rows)
#pragma unroll
            for (int h = 0; h < 2; ++h) buffer[(warp * p.rows + t) * kReduceStride + g + 8 * h] = sum[h];
        if (kNorm && tile == set) add_few_squares(p, reinterpret_cast<const float*>(shared + at.squares), warp, squares);
        sync_set<kSets, kSkinnyThreads>(set);
        if (mine.is_there) store_few<kNorm>(p, mine, buffer, squares);
    }
}

}  // namespace qwen_rt
