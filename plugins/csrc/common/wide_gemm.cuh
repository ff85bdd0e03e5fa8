// Decode products of 8-bit weights on Hopper: y[n, m] = sum_k x[n, k] · w[m, k], up to 32 rows n, w read once. One and two
// rows have a kernel of their own (skinny_8bit_few.cuh).
//
// Idea: weights are never touched by an instruction of ours. They go from memory to shared memory as stored, e4m3 or int8,
//   and wgmma multiplies them there; x, which is small, is what gets converted, into two 8-bit terms (wide_x.cuh). A warp
//   per 8 rows does all that is left: reads x, adds up. The mma kernel (skinny_gemm.cuh) converts weights, and x again for every
//   group of tiles, which is what bounds it at many rows. What was tried: docs/performance-gpu-quantized.md, 23 to 27.
// Numerics: fp8: products of 8-bit numbers, added up by the tensor cores over 128 columns, which keeps some 14 bits of the
//   largest term; then f32. int8: exact over 128 columns, then f32. Every eighth step is added up in ascending order, then
//   the eight sums are added in order: the same for every number of rows and every variant, so a row's result is bit for bit
//   the same among 3 to 32 rows, and on any number of SMs. Norm and scales as in skinny_gemm.cuh.
// Mapping: a persistent grid of one block per SM; block b owns the units [b U / G, (b + 1) U / G), kN weight rows at a time. A
//   stage of the ring holds 512 columns of them: four steps of 128, a line in the 128-byte swizzle each. wgmma has room for
//   64 rows of operand A, and seems to take no less time for fewer rows or for fewer than 64 rows of operand B. So kSide steps
//   lie beside each other: B is kSide · kN lines; of A, 16 rows are the high and low terms of 8 rows of x in one step, in the
//   registers of one warp. Of the product only what a step's x has to do with the same step's weights is used: a warp's
//   own columns. Up to 8 rows of x, all four steps are one product; up to 16 rows two, up to 32 rows one.
//   Two warpgroups multiply every second stage; four warps do nothing but copy. They meet at barriers in shared memory, so
//   that copies never wait for a product, nor the fence between copies and wgmma for copies under way.
// Overlap: the ring of weights is filled before the wait for the grids before; the next grid is let in shortly before the
//   last copy.
// x was prepared by prepare_rows (wide.cu) and comes by one bulk copy per stage.
// Cost: the stored bytes of a unit's rows, once; x from L2 for every group of kN rows.
#pragma once

#include "skinny.cuh"
#include "wgmma.cuh"
#include "wide_x.cuh"

namespace qwen_rt {

constexpr int kWarpgroups = 2;     // that multiply
constexpr int kMultiplyThreads = kWarpgroups * 128;
constexpr int kCopyThreads = kBlockSteps * 32;
constexpr int kWideThreads = kMultiplyThreads + kCopyThreads;
constexpr int kClasses = kWarpgroups * kBlockSteps;  // of steps that are added up on their own
constexpr int kSumRows = 8;   // whose sums are in shared memory at a time
constexpr int kTriggerStages = 2;  // the next grid is let in so many stages before the last copy

struct WideParams {
    SkinnyParams p;
    const unsigned char* prepared;  // blocks of x
    const float* squares;           // [rows, segments], if normalized
    int group_units, num_groups;    // units of a group; groups of the block that has most
};

constexpr int kHalfOfShared = 112 * 1024;  // what a block that shares its SM may take
__host__ __device__ constexpr int wide_stage_bytes(int n) { return kBlockSteps * n * 128; }
// Of shared memory: ring, x, table of rows, sums, 1 / rms, barriers.
__host__ __device__ constexpr int64_t wide_shared_bytes(int n, int stages, int rows, int num_groups) {
    return 1024 + int64_t{stages} * wide_stage_bytes(n) + int64_t{stages} * x_block_bytes(rows) +
           num_groups * n * 8 + kClasses * (rows < kSumRows ? rows : kSumRows) * n * 4 + rows * 4 + stages * 16 + 64;
}

#if QWEN_RT_HAS_WGMMA
template <Format kFormat, int kCount>
__device__ __forceinline__ float wide_value(const uint32_t (&d)[kCount], int i) {  // high and low term of one sum
    if constexpr (kFormat == Format::kFp8) return fmaf(__uint_as_float(d[i + 2]), 1.f / 16.f, __uint_as_float(d[i]));
    return static_cast<float>(static_cast<int>(d[i]) * 256 + static_cast<int>(d[i + 2]));
}
#endif

// kN: weight rows of a group, a multiple of 16; kSide: steps of a product; kHalf: leaves half of the SM to the next grid.
template <Format kFormat, int kN, int kSide, int kStages, bool kHalf>
__global__ void __launch_bounds__(kWideThreads, kHalf ? 2 : 1) wide_gemm(const __grid_constant__ WideParams wide) {
#if QWEN_RT_HAS_WGMMA
    extern __shared__ unsigned char unaligned[];
    const SkinnyParams& p = wide.p;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    constexpr int kWarpsOfStep = 4 / kSide, kRowsOfProducts = 8 * kWarpsOfStep;  // a warp for every 8 rows of x
    const int warpgroup = warp >> 2, side = (warp & 3) / kWarpsOfStep, row = 8 * (warp & 3 & (kWarpsOfStep - 1)) + g;  // of x
    const bool is_pairs = p.epilogue == Epilogue::kSiluGate, has_norm = p.norm_weight != nullptr;
    constexpr int kStageBytes = wide_stage_bytes(kN);
    const int block_bytes = x_block_bytes(p.rows), num_steps = num_steps_of(p.k), num_segments = num_segments_of(p.k);
    const int num_stages = num_blocks_of(p.k);  // of a group

    const uint32_t ring = (smem_address(unaligned) + 1023) / 1024 * 1024;
    unsigned char* const shared = unaligned + (ring - smem_address(unaligned));
    const uint32_t x_at = ring + kStages * kStageBytes;
    unsigned char* const behind_x = shared + kStages * kStageBytes + kStages * block_bytes;
    const auto row_at = reinterpret_cast<const unsigned char**>(behind_x);  // [groups][kN]; null: none
    const int sum_rows = min(p.rows, kSumRows);
    const auto sums = reinterpret_cast<float*>(row_at + wide.num_groups * kN);  // [class][row][kN]
    float* const inverse_rms = sums + kClasses * sum_rows * kN;
    const uint32_t full = (smem_address(inverse_rms + p.rows) + 7) / 8 * 8, empty = full + 8 * kStages;

    const int block = static_cast<int>(blockIdx.x);
    const int begin = block * p.block_units + min(block, p.blocks_with_more);
    const int num_units = p.block_units + (block < p.blocks_with_more ? 1 : 0);
    const int num_groups = (num_units + wide.group_units - 1) / wide.group_units, all_stages = num_groups * num_stages;
    const auto load_x = [&](int slot, int stage) {
        barrier_expect(full + 8 * slot, block_bytes);
        copy_bulk(x_at + slot * block_bytes, wide.prepared + static_cast<int64_t>(stage) * block_bytes, block_bytes, full + 8 * slot);
    };

    // ---------------------------------------------------------------- rows of the block, barriers
    const int64_t row_bytes = row_bytes_of(kFormat, p.k);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_groups * kN; i += kWideThreads) {
        const int group = i / kN, n = i % kN, in_group = is_pairs ? (n >> 4) * 8 + (n & 7) : n;
        const int unit = group * wide.group_units + in_group;
        const bool is_there = in_group < wide.group_units && unit < num_units;
        const TileRow at = row_of_unit(p, begin + unit, is_there);
        const int matrix = is_pairs ? n >> 3 & 1 : at.matrix;
        row_at[i] = is_there ? static_cast<const unsigned char*>(p.weight[matrix]) + at.row * row_bytes : nullptr;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + 8 * i, kCopyThreads + 1);
            barrier_init(empty + 8 * i, 4);  // the warps that multiply it
        }
        fence_async_proxy();
    }
    __syncthreads();

    // ---------------------------------------------------------------- copies
    if (warp >= kMultiplyThreads / 32) {
        if constexpr (kHalf) give_registers<48>();
        const uint64_t policy = evict_first_policy();
        // A warp copies its step of every stage, four rows at a time; pointers stay in registers.
        constexpr int kRowsOfCopy = 4, kCopies = kN / kRowsOfCopy;
        const int of_stage = warp - kMultiplyThreads / 32, lane_row = lane >> 3, chunk = lane & 7;
        const uint32_t even = ring + of_stage * kN * 128 + lane_row * 128 + ((chunk ^ lane_row) << 4), odd = even ^ 64;
        const unsigned char* from[kCopies];
        uint32_t is_there = 0;
        if (all_stages <= kTriggerStages) let_next_grid_start();
        int in_group = 0, first_row = 0, slot = 0, parity = 1;
#pragma unroll 1
        for (int stage = 0; stage < all_stages; ++stage) {
            if (in_group == 0) {
                is_there = 0;
#pragma unroll
                for (int i = 0; i < kCopies; ++i) {
                    from[i] = row_at[first_row + i * kRowsOfCopy + lane_row];
                    if (from[i] != nullptr) is_there |= 1u << i;
                    from[i] += of_stage * 128 + chunk * 16;
                }
            }
            if (stage == min(kStages, all_stages) - 1) {
                // Weights of all stages but one are under way; x of the same has to wait for the grid that makes it.
                wait_for_previous_grids();
                if (threadIdx.x == kMultiplyThreads)
                    for (int i = 0; i < stage; ++i) load_x(i, i % num_stages);
            }
            if (stage >= kStages) barrier_wait(empty + 8 * slot, parity);
            if (threadIdx.x == kMultiplyThreads && stage >= min(kStages, all_stages) - 1) load_x(slot, in_group);
            if (in_group * kBlockSteps + of_stage < num_steps) {
#pragma unroll
                for (int i = 0; i < kCopies; ++i)
                    if (is_there >> i & 1u) copy16_async((i & 1 ? odd : even) + slot * kStageBytes + i * 512, from[i], policy);
            }
            barrier_arrive_behind_copies(full + 8 * slot);
#pragma unroll
            for (int i = 0; i < kCopies; ++i) from[i] += kBlockSteps * 128;
            if (++in_group == num_stages) in_group = 0, first_row += kN;
            if (++slot == kStages) slot = 0, parity ^= 1;
            if (stage + 1 == all_stages - kTriggerStages) let_next_grid_start();
        }
        wait_copies<0>();
        return;
    }
    if constexpr (kHalf) take_registers<96>();

    wait_for_previous_grids();

    // ---------------------------------------------------------------- products
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int group = 0; group < num_groups; ++group) {
        const int first_unit = begin + group * wide.group_units, count = min(wide.group_units, num_units - group * wide.group_units);
        // What the sums meet at the end is fetched before it is needed.
        constexpr int kMine = kN * kRowsOfProducts / kMultiplyThreads + (kN * kRowsOfProducts % kMultiplyThreads == 0 ? 0 : 1);
        const int width = is_pairs ? kN / 2 : kN;  // units of a full group
        uint32_t addend[kMine];
        float scale[kMine], second[kMine];
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
            const int index = threadIdx.x + i * kMultiplyThreads, in_group = index % width, of_row = index / width;
            addend[i] = 0, scale[i] = second[i] = 0.f;
            if (of_row >= p.rows || in_group >= count) continue;
            const TileRow at = row_of_unit(p, first_unit + in_group, true);
            scale[i] = __ldg(static_cast<const float*>(p.scale[at.matrix]) + at.row);
            if (is_pairs) second[i] = __ldg(static_cast<const float*>(p.scale[1]) + at.row);
            if (p.epilogue == Epilogue::kBias) addend[i] = bias_at(p, at);
            if (p.epilogue == Epilogue::kResidual) addend[i] = residual_at(p, of_row, first_unit + in_group);
        }
        constexpr int kProducts = kBlockSteps / kSide;
        float sum[kProducts][kN / 8][2];
#pragma unroll
        for (int i = 0; i < kProducts; ++i)
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) sum[i][j][0] = sum[i][j][1] = 0.f;

#pragma unroll 1
        for (int stage = 0; stage < num_stages; ++stage) {
            if ((stage & 1) == warpgroup) {
                barrier_wait(full + 8 * slot, parity);
                fence_async_proxy();
                const uint32_t x_block = x_at + slot * block_bytes;
                const uint64_t b = tile_descriptor(ring + slot * kStageBytes);
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    // What shared memory holds of steps behind the last one is old, and left out of the sums.
                    const int step = product * kSide + side, term = x_term_bytes(p.rows);
                    const bool is_there = row < p.rows && stage * kBlockSteps + step < num_steps;
                    uint4 high[2] = {}, low[2] = {};
                    float factor = 0.f;
                    if (is_there) {
                        const uint32_t at = x_block + x_offset(p.rows, step, row) + t * 16;
                        high[0] = load_shared(at), low[0] = load_shared(at + term);
                        high[1] = load_shared(at + 2 * term), low[1] = load_shared(at + 3 * term);
                        factor = load_shared_float(x_block + factor_offset(p.rows, step, row));
                    }
                    constexpr bool kFloat = kFormat == Format::kFp8;
                    uint32_t d[kSide * kN / 2];
                    const uint64_t from = b + product * (kSide * kN * 128 / 16);
                    wgmma_fence();
                    wgmma_bytes<kFloat, false>(d, high[0].x, low[0].x, high[0].y, low[0].y, from);
                    wgmma_bytes<kFloat, true>(d, high[0].z, low[0].z, high[0].w, low[0].w, from + 2);
                    wgmma_bytes<kFloat, true>(d, high[1].x, low[1].x, high[1].y, low[1].y, from + 4);
                    wgmma_bytes<kFloat, true>(d, high[1].z, low[1].z, high[1].w, low[1].w, from + 6);
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin(d);
                    if (product == kProducts - 1 && lane == 0) barrier_arrive(empty + 8 * slot);
#pragma unroll
                    for (int mine = 0; mine < kSide; ++mine)
                        if (mine == side && is_there)
#pragma unroll
                            for (int j = 0; j < kN / 8; ++j)
#pragma unroll
                                for (int i = 0; i < 2; ++i)
                                    sum[product][j][i] = fmaf(wide_value<kFormat>(d, 4 * (mine * (kN / 8) + j) + i), factor, sum[product][j][i]);
                }
            }
            if (++slot == kStages) slot = 0, parity ^= 1;
        }

        // ------------------------------------------------------------ the end of the group
        if (has_norm && group == 0) {
            for (int r = warp; r < p.rows; r += kMultiplyThreads / 32) {
                float mean = 0.f;
                for (int i = lane; i < num_segments; i += 32)
                    mean += __ldcg(wide.squares + r * num_segments + i);
#pragma unroll
                for (int i = 16; i > 0; i /= 2) mean += __shfl_xor_sync(~0u, mean, i);
                if (lane == 0) inverse_rms[r] = rsqrtf(mean * p.inverse_k + p.epsilon);
            }
        }
        // Sums of 16 rows at a time.
#pragma unroll 1
        for (int first_row = 0; first_row < p.rows; first_row += kSumRows) {
            if (group > 0 || first_row > 0) meet<kMultiplyThreads>();  // those before have been read
            if (row < p.rows && row - first_row >= 0 && row - first_row < kSumRows) {
#pragma unroll
                for (int i = 0; i < kProducts; ++i) {
                    float* to = sums + ((warpgroup * kBlockSteps + i * kSide + side) * sum_rows + row - first_row) * kN + 2 * t;
#pragma unroll
                    for (int j = 0; j < kN / 8; ++j) *reinterpret_cast<float2*>(to + 8 * j) = {sum[i][j][0], sum[i][j][1]};
                }
            }
            meet<kMultiplyThreads>();
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
                const int index = threadIdx.x + i * kMultiplyThreads, in_group = index % width, of_row = index / width;
                if (of_row >= p.rows || of_row / kSumRows != first_row / kSumRows || in_group >= count) continue;
                const float* from = sums + of_row % kSumRows * kN + (is_pairs ? (in_group >> 3) * 16 + (in_group & 7) : in_group);
                float value = 0.f, other = 0.f;
#pragma unroll
                for (int w = 0; w < kClasses; ++w) {
                    value += from[w * sum_rows * kN];
                    if (is_pairs) other += from[w * sum_rows * kN + 8];
                }
                const float rms = has_norm ? inverse_rms[of_row] : 1.f;
                store_output<true>(p, of_row, first_unit + in_group, value * scale[i] * rms, other * second[i] * rms, addend[i]);
            }
        }
    }
#endif
}

}  // namespace qwen_rt
