// Decode matrices of 8 bits with a scale for each row, for one or two rows of x: soon after the kernel before, rather than
// with few instructions (wide_gemm.cuh, for more rows).
//
// What limits small matrices is the way from the last kernel's end to this one's: a wait, x from L2, products, a sum over
// warps. So x becomes f16 (for int8: integers of two bytes) once for a set of warps, each warp the units that it multiplies,
// without a barrier; and what does not depend on the kernel before is fetched before the wait.
// Numerics: as in skinny_format.cuh. A unit's product is two sums of 32 columns. Sums over every n-th unit of 64 columns, n the
//   warps of a set, 8 or 16 by the matrix's shape, are added in order; the same for one row and for two. More rows go another
//   way, so a row's bits are the same among one and two rows, and among three to 32.
// Mapping: a block has its units with all of k (skinny_gemm.cuh), and the n warps of a set share k: warp w has the units
//   w, w + n, ... of 64 columns, and copies its own 64 bytes of 16 rows, for kMTiles tiles, through its own ring, kStages
//   turns ahead. The sets take the block's groups of tiles in turn and never meet once they know where their rows lie.
// Overlap: the rings are filled before the wait for earlier kernels. Which blocks share an SM is set by room and registers
//   (skinny_8bit.cuh). Weights straight into registers were as fast alone, and slow behind attention
//   (docs/performance-gpu-quantized.md, I4).
// Cost: the stored bytes once. Shared memory: rings | norm weights | of each set: rows of its groups, x, its factors, sums of
//   two groups, squares of its warps.
#pragma once

#include "skinny.cuh"

namespace qwen_rt {

constexpr int kFewUnit = 64;  // columns, and bytes of a weight row

struct FewBytesLayout {
    int norm, x, factors, sets, sums_of_set, squares_of_set, set_bytes, all;  // offsets; those of a set are into its part
};

inline FewBytesLayout few_bytes_layout(const SkinnyParams& p, int sets, int set_warps, int m_tiles, int stages, int tiles) {
    const auto after = [](int offset, int bytes) { return offset + (bytes + 15) / 16 * 16; };
    const int groups = ((tiles + m_tiles - 1) / m_tiles + sets - 1) / sets;  // of tiles that a set takes, at most
    const int table = after(0, groups * m_tiles * 16 * 8);
    FewBytesLayout at = {};
    at.norm = sets * set_warps * stages * m_tiles * 1024;
    at.sets = after(at.norm, p.norm_weight != nullptr ? p.k * 2 : 0);
    at.x = table;
    at.factors = at.x + p.rows * p.k * 2;
    at.sums_of_set = after(at.factors, p.k / kFewUnit * kFewByteRows * 4);
    at.squares_of_set = at.sums_of_set + 2 * m_tiles * set_warps * p.rows * kReduceStride * 4;
    at.set_bytes = after(at.squares_of_set, set_warps * kFewByteRows * 4);
    at.all = at.sets + sets * at.set_bytes;
    return at;
}

// A row's units of a warp, from memory into shared memory as the products read them: of every unit 128 bytes, f16 in order, or
// the high bytes and then the low bytes of integers. A lane has eight numbers, eight lanes a unit. `norm`: where the lane's
// norm weights of unit 0 are, or 0. kAtOnce: loads under way in a lane. Returns the lane's sum of squares.
template <Format kFormat, int kSetWarps, int kAtOnce>
__device__ __forceinline__ float prepare_few_bytes(const SkinnyParams& p, int row, int warp, uint32_t x_of_set,
                                                   uint32_t factors_of_set, uint32_t norm) {
    const int k_units = p.k / kFewUnit, lane = threadIdx.x & 31, eighth = lane & 7, behind = (lane >> 3) * kSetWarps;
    const bf16* const x_of_row = p.x + static_cast<int64_t>(row) * p.k + eighth * 8;
    float square = 0.f;
#pragma unroll 1
    for (int first = warp + behind; first - behind < k_units; first += 4 * kAtOnce * kSetWarps) {
        uint4 loaded[kAtOnce] = {};
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
            if (first + n * 4 * kSetWarps < k_units)
                loaded[n] = load_activation(x_of_row + (first + n * 4 * kSetWarps) * kFewUnit);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int unit = first + n * 4 * kSetWarps;
            if (unit - behind >= k_units) break;
            uint4 x = loaded[n];
            if (norm != 0) {
                square = add_squares(square, x);
                if (unit < k_units) x = multiply_pairs(x, load_shared(norm + unit * (kFewUnit * 2)));
            }
            uint32_t largest = __vmaxu2(__vmaxu2(x.x & 0x7fff7fffu, x.y & 0x7fff7fffu), __vmaxu2(x.z & 0x7fff7fffu, x.w & 0x7fff7fffu));
            largest = max(largest >> 16, largest & 0xffffu);
#pragma unroll
            for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
            const uint32_t exponent = max(kLeastExponent, largest >> 7);
            if (unit >= k_units) continue;
            const uint32_t to = x_of_set + row * p.k * 2 + unit * 128;
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
            if (eighth == 0) store_shared_word(factors_of_set + (unit * kFewByteRows + row) * 4, __float_as_uint(factor));
        }
    }
    return square;
}

// A unit of rows g and g + 8 of a tile, 16 bytes of each in a lane. Columns of the products: fp8: row r; int8: 2 r and 2 r + 1 the
// high and the low bytes of row r. `sum`: fp8: rows g and g + 8 of columns 2t and 2t + 1; int8: of row t.
__device__ __forceinline__ void multiply_few_bytes(uint4 a, uint4 b, uint4 x, uint4 more, float2 factor, float (&sum)[4]) {
    float part[2][4] = {};  // of two products behind each other, and of two beside them
    const auto add = [&](float (&to)[4], uint32_t low, uint32_t high, uint32_t x0, uint32_t x1) {
        uint32_t of_low[2], of_high[2];
        pairs_of_fp8(low, of_low), pairs_of_fp8(high, of_high);
        mma_f16(to, of_low[0], of_high[0], of_low[1], of_high[1], x0, x1, to);
    };
    add(part[0], a.x, b.x, x.x, x.y), add(part[1], a.z, b.z, more.x, more.y);
    add(part[0], a.y, b.y, x.z, x.w), add(part[1], a.w, b.w, more.z, more.w);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf((part[0][i] + part[1][i]) * kFp8Factor, i & 1 ? factor.y : factor.x, sum[i]);
}
__device__ __forceinline__ void multiply_few_bytes(uint4 a, uint4 b, uint4 x, float factor, float (&sum)[4]) {
    int part[4] = {};
    mma_bytes<true>(part, a.x, b.x, a.y, b.y, x.x, x.y, part);
    mma_bytes<true>(part, a.z, b.z, a.w, b.w, x.z, x.w, part);
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = fmaf(static_cast<float>(part[2 * h] * 256 + part[2 * h + 1]), factor, sum[h]);
}

// kMTiles: tiles of a group; kStages: lines under way; kWhole: they are all that a warp has, of one group; kRegisters: most of a
// thread, which says what fits beside a block.
template <Format kFormat, int kSets, int kSetWarps, int kMTiles, int kStages, bool kWhole, int kRegisters>
__global__ void __maxnreg__(kRegisters) skinny_8bit_few(const __grid_constant__ SkinnyParams p, const __grid_constant__ FewBytesLayout at) {
    constexpr int kSetThreads = kSetWarps * 32, kTileRows = kMTiles * 16, kTileBytes = 16 * kFewUnit, kStageBytes = kMTiles * kTileBytes;
    constexpr int kXAtOnce = kWhole ? (kStages + 3) / 4 : 3;
    constexpr bool kFloat = kFormat == Format::kFp8;
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int set = kSets == 1 ? 0 : static_cast<int>(threadIdx.x) / kSetThreads;
    const int in_set = static_cast<int>(threadIdx.x) - set * kSetThreads, warp = in_set >> 5;
    const bool has_norm = p.norm_weight != nullptr, is_pairs = p.epilogue == Epilogue::kSiluGate;
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + (threadIdx.x >> 5) * kStages * kStageBytes, ring_end = ring + kStages * kStageBytes;
    unsigned char* const part_of_set = shared + at.sets + set * at.set_bytes;
    const uint32_t set_base = base + at.sets + set * at.set_bytes;
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
    const int k_units = p.k / kFewUnit, turns = max(1, (k_units - warp + kSetWarps - 1) / kSetWarps);
    int lines_left = my_groups * turns;  // to be loaded
    if (lines_left <= p.trigger) let_next_grid_start();

    // First comes what is small: norm weights, where the lane that copies them reads them (sets copy the same bytes), and what
    // the first sums meet.
    uint32_t norm = 0;
    if (has_norm) {
        norm = base + at.norm + (lane & 7) * 16;
#pragma unroll 1
        for (int unit = warp + (lane >> 3) * kSetWarps; unit < k_units; unit += 4 * kSetWarps)
            copy16_async(norm + unit * (kFewUnit * 2), p.norm_weight + unit * kFewUnit + (lane & 7) * 8);
    }
    commit_copies();
    // Another warp has the outputs of every group.
    const auto place = [&](int group) { return kSets * kMTiles == 1 ? in_set : (in_set - group * 32) & (kSetThreads - 1); };
    Output<kFormat, true> mine;
    mine.find_constants(p, units_of_group(set), kMTiles, place(set));
#pragma unroll 1
    for (int i = in_set; i < my_groups * kTileRows; i += kSetThreads) {
        const TileRow from = tile_row(p, units_of_group(set + i / kTileRows * kSets), i % kTileRows >> 4, i & 15);
        const auto* matrix = static_cast<const unsigned char*>(p.weight[from.matrix]);
        rows[i] = from.is_there ? matrix + static_cast<int64_t>(from.row) * p.k : nullptr;
    }
    __syncthreads();

    // The loader runs kStages lines ahead of the products. A lane copies 16 bytes of rows g and g + 8 of a tile, if they are there.
    const uint64_t policy = evict_first_policy();
    int load_turn = turns, load_offset = warp * kFewUnit + t * 16;  // turns of the group that are left
    uint32_t load_rows = smem_address(rows) + g * 8;
    const auto copy_row = [&](uint32_t to, uint32_t row) {
        const unsigned char* from = load_shared_pointer(row);
        if (from != nullptr) copy16_async(to, from + load_offset, policy);
    };
    const auto load_stage = [&](uint32_t stage) {
        if (lines_left > 0) {
            if (load_offset < p.k) {
                const uint32_t to = stage + lane * 16;
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    copy_row(to + m * kTileBytes, load_rows + m * 128);
                    copy_row(to + m * kTileBytes + kTileBytes / 2, load_rows + m * 128 + 64);
                }
            }
            load_offset += kSetWarps * kFewUnit;
            if (!kWhole && --load_turn == 0) load_turn = turns, load_offset = warp * kFewUnit + t * 16, load_rows += kTileRows * 8;
            if (--lines_left == p.trigger) let_next_grid_start();
        }
        commit_copies();
    };
#pragma unroll 1
    for (uint32_t stage = ring; stage < ring_end; stage += kStageBytes) load_stage(stage);
    wait_copies<kStages>();
    wait_for_previous_grids();
#pragma unroll 1
    for (int row = 0; row < p.rows; ++row) {
        float square = prepare_few_bytes<kFormat, kSetWarps, kXAtOnce>(p, row, warp, set_base + at.x, set_base + at.factors, norm);
        if (has_norm) {
#pragma unroll
            for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
            if (lane == 0) squares[warp * p.rows + row] = square;
        }
    }
    if constexpr (kWhole) wait_copies<0>();
    __syncwarp();

    // Columns without a row repeat the last one.
    const int x_row = min(kFloat ? g : g >> 1, p.rows - 1);
    const uint32_t x_at = set_base + at.x + x_row * p.k * 2 + warp * 128 + (kFloat ? t * 32 : (g & 1) * 64 + t * 16);
    const uint32_t factors_at = set_base + at.factors + warp * kFewByteRows * 4;
    const auto multiply = [&](uint32_t stage, uint32_t x_now, uint32_t factors_now, float (&sum)[kMTiles][4]) {
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
    };
    uint32_t stage = ring;
    int parity = 0;
#pragma unroll 1
    for (int group = set; group < num_groups; group += kSets) {
        if (!kWhole && group != set) mine.find_constants(p, units_of_group(group), kMTiles, place(group));
        mine.fetch_residual(p);
        float sum[kMTiles][4] = {};
        if constexpr (kWhole) {
#pragma unroll
            for (int turn = 0; turn < kStages; ++turn)
                if (warp + turn * kSetWarps < k_units)
                    multiply(ring + turn * kStageBytes, x_at + turn * kSetWarps * 128,
                             factors_at + turn * kSetWarps * kFewByteRows * 4, sum);
        } else {
            uint32_t x_now = x_at, factors_now = factors_at;
            int unit = warp;
#pragma unroll 1
            for (int turn = 0; turn < turns; ++turn) {
                wait_copies<kStages - 1>();
                __syncwarp();
                if (unit < k_units) multiply(stage, x_now, factors_now, sum);
                unit += kSetWarps, x_now += kSetWarps * 128, factors_now += kSetWarps * kFewByteRows * 4;
                __syncwarp();
                load_stage(stage);
                stage += kStageBytes;
                if (stage == ring_end) stage = ring;
            }
        }

        // A warp's sums go beside the others', which add them up while all go on: the next ones have another place.
        float* const buffer = sums + parity * (kMTiles * kSetWarps * kReduceStride) * p.rows;
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
                            buffer[((m * kSetWarps + warp) * p.rows + t * kColumns + c) * kReduceStride + g + 8 * h] = sum[m][h * kColumns + c];
        sync_set<kSets, kSetThreads>(set);
        if (!mine.is_there) continue;
        float value = 0.f, second = 0.f, mean = 0.f;
#pragma unroll
        for (int w = 0; w < kSetWarps; ++w) {
            const float* part = buffer + ((mine.tile * kSetWarps + w) * p.rows + mine.row) * kReduceStride + mine.in_tile;
            value += part[0];
            if (is_pairs) second += part[8];
            if (has_norm) mean += squares[w * p.rows + mine.row];
        }
        const float inverse_rms = has_norm ? rsqrtf(mean * p.inverse_k + p.epsilon) : 1.f;
        store_output<true>(p, mine.row, mine.unit, value * mine.scale * inverse_rms, second * mine.second * inverse_rms, mine.addend);
    }
}

}  // namespace qwen_rt
