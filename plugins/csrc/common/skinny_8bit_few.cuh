// Decode matrices of 8 bits with a scale for each row, for one or two rows of x: soon after the kernel before, rather than
// with few instructions (wide_gemm.cuh, for more rows).
//
// What limits small matrices is the way from the last kernel's end to this one's: a wait, x from L2, products, a sum over
// warps. So x becomes f16 (for int8: integers of two bytes) once for a block, and 16 warps in two sets multiply, each with
// its own copies under way: the way of skinny_int4_ring.cuh, without scales of groups.
// Numerics: as in skinny_format.cuh. Eight sums over every eighth unit of 64 columns are added in order, the same for one row
//   and for two. More rows go another way, so a row's bits are the same among one and two rows, and among three to 32.
// Mapping: a block has its units with all of k (skinny_gemm.cuh), and the eight warps of a set share k: warp w has the units
//   w, w + 8, ... of 64 columns, and copies its own 64 bytes of 16 rows, for kMTiles tiles, through its own ring, kStages
//   turns ahead. The sets take the block's groups of tiles in turn and never meet after x is ready.
// Overlap: the rings are filled before the wait for earlier kernels. Weights straight into registers were as fast alone, and
//   slow behind attention (docs/performance-gpu-quantized.md, I4).
// Cost: the stored bytes once. Shared memory: rings | x | its factors | squares | norm weights | of each set: rows of its
//   groups, sums of two groups, squares of its warps.
#pragma once

#include "skinny.cuh"

namespace qwen_rt {

constexpr int kFewUnit = 64;  // columns, and bytes of a weight row

struct FewBytesLayout {
    int x, factors, squares, norm, sets, sums_of_set, squares_of_set, set_bytes, all;  // offsets; those of a set are into its part
    int groups;                                                                       // of tiles that a set takes, at most
};

inline FewBytesLayout few_bytes_layout(const SkinnyParams& p, int sets, int m_tiles, int stages, int tiles) {
    const auto after = [](int offset, int bytes) { return offset + (bytes + 15) / 16 * 16; };
    const int units = p.k / kFewUnit;
    const bool has_norm = p.norm_weight != nullptr;
    FewBytesLayout at = {};
    at.groups = ((tiles + m_tiles - 1) / m_tiles + sets - 1) / sets;
    at.x = sets * kWarps * stages * m_tiles * 1024;
    at.factors = after(at.x, p.rows * p.k * 2);
    at.squares = after(at.factors, units * kFewByteRows * 4);
    at.norm = after(at.squares, has_norm ? p.rows * units * 4 : 0);
    at.sets = after(at.norm, has_norm ? p.k * 2 : 0);
    at.sums_of_set = after(0, at.groups * m_tiles * 16 * 8);
    at.squares_of_set = at.sums_of_set + 2 * m_tiles * kWarps * p.rows * kReduceStride * 4;
    at.set_bytes = after(at.squares_of_set, kWarps * kFewByteRows * 4);
    at.all = at.sets + sets * at.set_bytes;
    return at;
}

// x of all rows, from memory into shared memory as the products read it: of every row and unit 128 bytes, f16 in order, or the
// high bytes and then the low bytes of integers. A thread has eight numbers, eight threads a unit.
template <Format kFormat, int kThreads>
__device__ __forceinline__ void prepare_few_bytes(const SkinnyParams& p, const FewBytesLayout& at, unsigned char* shared, bool has_norm) {
    const int vectors = p.k / 8, all = p.rows * vectors, units = p.k / kFewUnit, lane = threadIdx.x & 31;
    const uint32_t base = smem_address(shared);
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = threadIdx.x; first - lane < all; first += kAtOnce * kThreads) {
        uint4 loaded[kAtOnce] = {};
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
            if (first + n * kThreads < all) loaded[n] = load_activation(p.x + static_cast<int64_t>(first + n * kThreads) * 8);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int i = first + n * kThreads;
            if (i - lane >= all) break;
            uint4 x = loaded[n];
            const int row = i >= vectors ? 1 : 0;
            float square = 0.f;
            if (has_norm) {
                square = add_squares(0.f, x);
#pragma unroll
                for (int step = 1; step < 8; step *= 2) square += __shfl_xor_sync(~0u, square, step);
                x = multiply_pairs(x, load_shared(base + at.norm + (i < all ? i - row * vectors : 0) * 16));
            }
            uint32_t largest = __vmaxu2(__vmaxu2(x.x & 0x7fff7fffu, x.y & 0x7fff7fffu), __vmaxu2(x.z & 0x7fff7fffu, x.w & 0x7fff7fffu));
            largest = max(largest >> 16, largest & 0xffffu);
#pragma unroll
            for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
            const uint32_t exponent = max(kLeastExponent, largest >> 7);
            if (i >= all) continue;
            const int unit = (i - row * vectors) / 8, eighth = i % 8;
            const uint32_t to = base + at.x + row * p.k * 2 + unit * 128;
            float factor;
            if constexpr (kFormat == Format::kFp8) {
                factor = half_factor(exponent);
                store_shared(to + eighth * 16, halves_of_eight(x, half_scale(exponent)));
            } else {
                uint32_t high[2], low[2];
                factor = integer_factor(exponent);
                bytes_of_eight<false>(x, integer_scale(exponent), high, low);
                store_shared_pair(to + eighth * 8, high[0], high[1]);
                store_shared_pair(to + 64 + eighth * 8, low[0], low[1]);
            }
            if (eighth == 0) {
                reinterpret_cast<float*>(shared + at.factors)[unit * kFewByteRows + row] = factor;
                if (has_norm) reinterpret_cast<float*>(shared + at.squares)[row * units + unit] = square;
            }
        }
    }
}

// A unit of rows g and g + 8 of a tile, 16 bytes of each in a lane. Columns of the products: fp8: row r; int8: 2 r and 2 r + 1 the
// high and the low bytes of row r. `sum`: fp8: rows g and g + 8 of columns 2t and 2t + 1; int8: of row t.
__device__ __forceinline__ void multiply_few_bytes(uint4 a, uint4 b, uint4 x, uint4 more, float2 factor, float (&sum)[4]) {
    float part[4] = {};
    const auto add = [&](uint32_t low, uint32_t high, uint32_t x0, uint32_t x1) {
        uint32_t of_low[2], of_high[2];
        pairs_of_fp8(low, of_low), pairs_of_fp8(high, of_high);
        mma_f16(part, of_low[0], of_high[0], of_low[1], of_high[1], x0, x1, part);
    };
    add(a.x, b.x, x.x, x.y), add(a.y, b.y, x.z, x.w), add(a.z, b.z, more.x, more.y), add(a.w, b.w, more.z, more.w);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(part[i] * kFp8Factor, i & 1 ? factor.y : factor.x, sum[i]);
}
__device__ __forceinline__ void multiply_few_bytes(uint4 a, uint4 b, uint4 x, float factor, float (&sum)[4]) {
    int part[4] = {};
    mma_bytes<true>(part, a.x, b.x, a.y, b.y, x.x, x.y, part);
    mma_bytes<true>(part, a.z, b.z, a.w, b.w, x.z, x.w, part);
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = fmaf(static_cast<float>(part[2 * h] * 256 + part[2 * h + 1]), factor, sum[h]);
}

// kMTiles: tiles of a group; kStages: lines under way; kBlocks: of an SM.
template <Format kFormat, int kSets, int kMTiles, int kStages, int kBlocks>
__global__ void __launch_bounds__(kSets* kSkinnyThreads, kBlocks)
    skinny_8bit_few(const __grid_constant__ SkinnyParams p, const __grid_constant__ FewBytesLayout at) {
    constexpr int kThreads = kSets * kSkinnyThreads, kTileRows = kMTiles * 16, kTileBytes = 16 * kFewUnit, kStageBytes = kMTiles * kTileBytes;
    constexpr bool kFloat = kFormat == Format::kFp8;
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int set = static_cast<int>(threadIdx.x) / kSkinnyThreads, in_set = threadIdx.x & (kSkinnyThreads - 1), warp = in_set >> 5;
    const bool has_norm = p.norm_weight != nullptr, is_pairs = p.epilogue == Epilogue::kSiluGate;
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + (threadIdx.x >> 5) * kStages * kStageBytes, ring_end = ring + kStages * kStageBytes;
    unsigned char* const part_of_set = shared + at.sets + set * at.set_bytes;
    const auto rows = reinterpret_cast<const unsigned char**>(part_of_set);
    const auto sums = reinterpret_cast<float*>(part_of_set + at.sums_of_set);        // [2][tile][warp][row][20]
    const auto squares = reinterpret_cast<float*>(part_of_set + at.squares_of_set);  // [warp][row]

    const int block = static_cast<int>(blockIdx.x);
    const int begin = block * p.block_units + min(block, p.blocks_with_more);
    const int num_units = p.block_units + (block < p.blocks_with_more ? 1 : 0);
    const int group_units = kMTiles * p.tile_units;
    const int num_groups = (num_units + group_units - 1) / group_units, my_groups = max(0, (num_groups - set + kSets - 1) / kSets);
    const auto units_of_group = [&](int group) -> Units {
        return {begin + group * group_units, min(group_units, num_units - group * group_units)};
    };
    const int k_units = p.k / kFewUnit, turns = max(1, (k_units - warp + kWarps - 1) / kWarps);
    int lines_left = my_groups * turns;  // to be loaded
    if (lines_left <= p.trigger) let_next_grid_start();

    if (has_norm) {
        if (p.has_fresh_norm) wait_for_previous_grids();
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k / 8; i += kThreads) store_shared(base + at.norm + i * 16, load_activation(p.norm_weight + i * 8));
    }
#pragma unroll 1
    for (int i = in_set; i < my_groups * kTileRows; i += kSkinnyThreads) {
        const TileRow from = tile_row(p, units_of_group(set + i / kTileRows * kSets), i % kTileRows >> 4, i & 15);
        rows[i] = static_cast<const unsigned char*>(p.weight[from.matrix]) + static_cast<int64_t>(from.row) * p.k;
    }
    __syncthreads();

    // The loader runs kStages lines ahead of the products. A lane copies 16 bytes of rows g and g + 8 of a tile.
    const uint64_t policy = evict_first_policy();
    int load_turn = turns, load_offset = warp * kFewUnit + t * 16;  // turns of the group that are left
    int load_tiles = (num_units - set * group_units + p.tile_units - 1) / p.tile_units;  // from the group to the end of the block
    uint32_t load_rows = smem_address(rows) + g * 8;
    const auto load_stage = [&](uint32_t stage) {
        if (lines_left > 0) {
            if (load_offset < p.k) {
                const uint32_t to = stage + lane * 16;
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
                    if (m < load_tiles) {
                        const unsigned char* first = load_shared_pointer(load_rows + m * 128) + load_offset;
                        const unsigned char* second = load_shared_pointer(load_rows + m * 128 + 64) + load_offset;
                        copy16_async(to + m * kTileBytes, first, policy);
                        copy16_async(to + m * kTileBytes + kTileBytes / 2, second, policy);
                    }
            }
            load_offset += kWarps * kFewUnit;
            if (--load_turn == 0)
                load_turn = turns, load_offset = warp * kFewUnit + t * 16, load_tiles -= kSets * kMTiles, load_rows += kTileRows * 8;
            if (--lines_left == p.trigger) let_next_grid_start();
        }
        commit_copies();
    };
#pragma unroll 1
    for (uint32_t stage = ring; stage < ring_end; stage += kStageBytes) load_stage(stage);
    wait_for_previous_grids();
    prepare_few_bytes<kFormat, kThreads>(p, at, shared, has_norm);
    __syncthreads();

    // Columns without a row repeat the last one.
    const int x_row = min(kFloat ? g : g >> 1, p.rows - 1);
    const uint32_t x_at = base + at.x + x_row * p.k * 2 + warp * 128 + (kFloat ? t * 32 : (g & 1) * 64 + t * 16);
    const uint32_t factors_at = base + at.factors + warp * kFewByteRows * 4;
    uint32_t stage = ring;
    int parity = 0;
#pragma unroll 1
    for (int group = set; group < num_groups; group += kSets) {
        // What the sums meet at the end is fetched before it is needed; another warp has it every time.
        Output<kFormat, true> mine;
        mine.find(p, units_of_group(group), kMTiles, (in_set - group * 32) & (kSkinnyThreads - 1));
        float sum[kMTiles][4] = {};
        uint32_t x_now = x_at, factors_now = factors_at;
        int unit = warp;
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn, unit += kWarps, x_now += kWarps * 128, factors_now += kWarps * kFewByteRows * 4) {
            wait_copies<kStages - 1>();
            __syncwarp();
            if (unit < k_units) {
                const uint4 x = load_shared(x_now);
                [[maybe_unused]] uint4 more;
                if constexpr (kFloat) more = load_shared(x_now + 16);
                const float2 factor = load_shared_pair(factors_now);
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    const uint32_t from = stage + m * kTileBytes + lane * 16;
                    const uint4 a = load_shared(from), b = load_shared(from + kTileBytes / 2);
                    if constexpr (kFloat)
                        multiply_few_bytes(a, b, x, more, factor, sum[m]);
                    else
                        multiply_few_bytes(a, b, x, t == 0 ? factor.x : factor.y, sum[m]);
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
        constexpr int kColumns = kFloat ? 2 : 1;  // of a lane
        if (t * kColumns < p.rows)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        if (t * kColumns + c < p.rows)
                            buffer[((m * kWarps + warp) * p.rows + t * kColumns + c) * kReduceStride + g + 8 * h] = sum[m][h * kColumns + c];
        if (has_norm && group == set && lane < p.rows) {
            float square = 0.f;
            const float* of_units = reinterpret_cast<const float*>(shared + at.squares) + lane * k_units;
#pragma unroll 1
            for (int i = warp; i < k_units; i += kWarps) square += of_units[i];
            squares[warp * p.rows + lane] = square;
        }
        sync_set<kSets, kSkinnyThreads>(set);
        if (!mine.is_there) continue;
        float value = 0.f, second = 0.f, mean = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float* part = buffer + ((mine.tile * kWarps + w) * p.rows + mine.row) * kReduceStride + mine.in_tile;
            value += part[0];
            if (is_pairs) second += part[8];
            if (has_norm) mean += squares[w * p.rows + mine.row];
        }
        const float inverse_rms = has_norm ? rsqrtf(mean * p.inverse_k + p.epsilon) : 1.f;
        store_output<true>(p, mine.row, mine.unit, value * mine.scale * inverse_rms, second * mine.second * inverse_rms, mine.addend);
    }
}

}  // namespace qwen_rt
