// int4 matrices of few rows of x and many bytes (skinny_int4_few.cuh): every warp copies its own 64 bytes of 16 rows, for
// `kMTiles` tiles, through its own ring in shared memory, `kStages` turns ahead. With the first line of a group of tiles come the
// group's scales, for all warps of the set; those meet once a group, and add up while they go on.
//
// Cost: the stored bytes once, up to 128 KB of them under way on an SM; 90 to 115 instructions of a warp for 2048 weights.
#pragma once

#include "skinny_int4_few.cuh"

namespace qwen_rt {

inline FewLayout ring_layout(const SkinnyParams& p, int sets, int m_tiles, int stages, int tiles) {
    FewLayout at = {};
    // A warp may be `stages` lines ahead, and a row is described one group after its place is free, known one later.
    const int turns = p.k / 128 / kWarps, fewest = turns < 1 ? 1 : turns;
    const int groups = ((tiles + m_tiles - 1) / m_tiles + sets - 1) / sets;
    at.slots = 2 + (fewest - 1 + stages) / fewest;
    if (at.slots > groups) at.slots = groups;
    const ScaleRow row = scale_row_of(Format::kInt4, p);
    at.scale_stride = padded_row(row.bytes), at.zero_stride = row.zero_bytes == 0 ? 0 : padded_row(row.zero_bytes);
    at.scale_bytes = m_tiles * 16 * (at.scale_stride + at.zero_stride);
    at.scales_of_set = at.slots * m_tiles * 16 * static_cast<int>(sizeof(FewRow));
    lay_out_few(p, sets * kWarps * stages * m_tiles * 1024, 0, sets, m_tiles, at.scales_of_set + at.slots * at.scale_bytes, &at);
    return at;
}

// kMTiles: tiles of a group; kStages: lines under way; kBlocks: of an SM.
template <bool kNorm, bool kZeros, int kSets, int kMTiles, int kStages, int kBlocks>
__global__ void __launch_bounds__(kSets* kSkinnyThreads, kBlocks)
    skinny_int4_ring(const __grid_constant__ SkinnyParams p, const __grid_constant__ FewLayout at) {
    constexpr int kThreads = kSets * kSkinnyThreads, kTileRows = kMTiles * 16;
    constexpr int kLineBytes = 64, kTileBytes = 16 * kLineBytes, kStageBytes = kMTiles * kTileBytes, kRowBytes = sizeof(FewRow);
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int set = static_cast<int>(threadIdx.x) / kSkinnyThreads, in_set = threadIdx.x & (kSkinnyThreads - 1), warp = in_set >> 5;
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + (threadIdx.x >> 5) * kStages * kStageBytes, ring_end = ring + kStages * kStageBytes;
    unsigned char* const mine_of_set = shared + at.sets + set * at.set_bytes;
    const auto table = reinterpret_cast<FewRow*>(mine_of_set);
    const uint32_t scales = base + at.sets + set * at.set_bytes + at.scales_of_set;
    const auto sums = reinterpret_cast<float*>(mine_of_set + at.sums_of_set);
    const auto squares = reinterpret_cast<float*>(mine_of_set + at.squares_of_set);  // [warp][row]

    const int block = static_cast<int>(blockIdx.x);
    const int begin = block * p.block_units + min(block, p.blocks_with_more);
    const int num_units = p.block_units + (block < p.blocks_with_more ? 1 : 0);
    const int group_units = kMTiles * p.tile_units;
    const int num_groups = (num_units + group_units - 1) / group_units;
    const auto units_of_group = [&](int group) -> Units {
        return {begin + group * group_units, min(group_units, num_units - group * group_units)};
    };
    const int row_bytes = p.k / 2, first_byte = warp * kLineBytes;
    const int turns = max(1, (row_bytes - first_byte + kWarps * kLineBytes - 1) / (kWarps * kLineBytes));
    int lines_left = max(0, (num_groups - set + kSets - 1) / kSets * turns);  // to be loaded
    if (lines_left <= p.trigger) let_next_grid_start();

    if constexpr (kNorm) store_norm<kThreads>(p, base + at.norm);
    const auto describe = [&](int group, int slot, int row) {
        find_few_row<kZeros>(p, units_of_group(group), row >> 4, row & 15, table[slot * kTileRows + row]);
    };
#pragma unroll 1
    for (int i = in_set; i < at.slots * kTileRows; i += kSkinnyThreads) {
        const int slot = i / kTileRows, group = set + slot * kSets;
        if (group < num_groups) describe(group, slot, i % kTileRows);
    }
    __syncthreads();

    // The loader runs kStages lines ahead of the products. With the first line of a group come the group's scales.
    const uint64_t policy = evict_first_policy();
    const int lane_from = first_byte + (lane & 3) * 16;  // a lane copies 16 bytes of rows g and g + 8 of a tile
    const uint32_t rows_at = smem_address(table), rows_end = rows_at + at.slots * kTileRows * kRowBytes;
    uint32_t load_rows = rows_at;
    int load_turn = turns, load_slot = 0, load_offset = lane_from;  // turns of the group that are left
    int load_tiles = (num_units - set * group_units + p.tile_units - 1) / p.tile_units;  // from the group to the end of the block
    const auto load_piece = [&](const unsigned char* from, int bytes, uint32_t to) {  // of a row by eight lanes
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
#pragma unroll 1
        for (int at_byte = (lane & 7) * 16; at_byte < shift + bytes; at_byte += 128)
            copy16_or_zero_async(to + at_byte, from - shift + at_byte, min(16, shift + bytes - at_byte));
    };
    const auto load_stage = [&](uint32_t stage) {
        if (lines_left > 0) {
            if (load_turn == turns) {
                const FewRow* rows = table + load_slot * kTileRows;
                const uint32_t to = scales + load_slot * at.scale_bytes;
                const int row = warp * 4 + (lane >> 3);
#pragma unroll
                for (int i = 0; i < (kTileRows + 31) / 32; ++i)
                    if (i * 32 + row < kTileRows) {
                        load_piece(rows[i * 32 + row].scale, p.groups * 2, to + (i * 32 + row) * at.scale_stride);
                        if constexpr (kZeros)
                            load_piece(rows[i * 32 + row].zero, (p.groups + 1) / 2,
                                       to + kTileRows * at.scale_stride + (i * 32 + row) * at.zero_stride);
                    }
            }
            if (load_offset < row_bytes) {
                const uint32_t from = load_rows + g * kRowBytes, to = stage + lane * 16;
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
                    if (m < load_tiles) {
                        const unsigned char* first = load_shared_pointer(from + m * 16 * kRowBytes) + load_offset;
                        const unsigned char* second = load_shared_pointer(from + (m * 16 + 8) * kRowBytes) + load_offset;
                        copy16_async(to + m * kTileBytes, first, policy);
                        copy16_async(to + m * kTileBytes + 8 * kLineBytes, second, policy);
                    }
            }
            load_offset += kWarps * kLineBytes;
            if (--load_turn == 0) {
                load_turn = turns, load_offset = lane_from, load_tiles -= kSets * kMTiles;
                load_rows += kTileRows * kRowBytes, ++load_slot;
                if (load_rows == rows_end) load_rows = rows_at, load_slot = 0;
            }
            if (--lines_left == p.trigger) let_next_grid_start();
        }
        commit_copies();
    };
#pragma unroll 1
    for (uint32_t stage = ring; stage < ring_end; stage += kStageBytes) load_stage(stage);
    wait_for_previous_grids();
    prepare_few_x<kNorm, kZeros, kThreads>(p, at, shared);
    wait_copies<kStages - 1>();
    __syncthreads();

    const int x_row = min(g >> 1, p.rows - 1), my_row = min(t, p.rows - 1), k_units = p.k / 128;
    const uint32_t x_at = base + at.x + x_row * p.k * 2 + (g & 1) * 64 + t * 16 + warp * 256;
    const uint32_t units_at = base + at.units + (my_row * k_units + warp) * 8;
    uint32_t stage = ring;
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int group = set; group < num_groups; group += kSets) {
        const Units u = units_of_group(group);
        // What the sums meet at the end is fetched before it is needed; another warp has it every time.
        Output<Format::kInt4, false> mine;
        mine.find(p, u, kMTiles, (in_set - group * 32) & (kSkinnyThreads - 1));
        const unsigned char* scale_at[kMTiles][2];
        [[maybe_unused]] const unsigned char* zero_at[kMTiles][2];
        float sum[kMTiles][2];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = m * 16 + h * 8 + g;
                const FewRow& from = table[slot * kTileRows + row];
                const unsigned char* of_slot = shared + (scales - base) + slot * at.scale_bytes;
                scale_at[m][h] = of_slot + row * at.scale_stride + (reinterpret_cast<uintptr_t>(from.scale) & 15) + warp * 2;
                if constexpr (kZeros)
                    zero_at[m][h] = of_slot + kTileRows * at.scale_stride + row * at.zero_stride +
                                    (reinterpret_cast<uintptr_t>(from.zero) & 15) + (warp >> 1);
                sum[m][h] = 0.f;
            }
        uint32_t x_now = x_at, units_now = units_at;
        int unit = warp;
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn, unit += kWarps, x_now += kWarps * 256, units_now += kWarps * 8) {
            wait_copies<kStages - 1>();
            __syncwarp();
            if (unit < k_units) {
                const uint4 even = load_shared(x_now), odd = load_shared(x_now + 128);
                const float2 of_unit = load_shared_pair(units_now);
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    const uint32_t from = stage + m * kTileBytes + lane * 16;
                    const uint4 a = load_shared(from), b = load_shared(from + 8 * kLineBytes);
                    int off[2];
                    unsigned short scale[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        scale[h] = reinterpret_cast<const unsigned short*>(scale_at[m][h])[turn * kWarps];
                        off[h] = __float_as_int(of_unit.y);
                        if constexpr (kZeros) off[h] *= zero_at[m][h][turn * (kWarps / 2)] >> (warp & 1) * 4 & 15;
                    }
                    multiply_few(a, b, even, odd, of_unit.x, off, scale, sum[m]);
                }
            }
            __syncwarp();
            load_stage(stage);
            stage += kStageBytes;
            if (stage == ring_end) stage = ring;
        }

        // A warp's sums go beside the others', which add them up while all go on: the next ones have another place.
        float* const buffer = sums + parity * (kMTiles * kWarps * kReduceStride) * p.rows;
        parity ^= 1;
        if (t < p.rows)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) buffer[((m * kWarps + warp) * p.rows + t) * kReduceStride + g + 8 * h] = sum[m][h];
        if (kNorm && group == set) add_few_squares(p, reinterpret_cast<const float*>(shared + at.squares), warp, squares);
        wait_copies<kStages - 1>();  // what comes next has this warp's part of its scales
        sync_set<kSets, kSkinnyThreads>(set);
        if (const int next = group + at.slots * kSets; in_set < kTileRows && next < num_groups) describe(next, slot, in_set);
        if (++slot == at.slots) slot = 0;
        if (mine.is_there) store_few<kNorm>(p, mine, buffer, squares);
    }
}

}  // namespace qwen_rt
