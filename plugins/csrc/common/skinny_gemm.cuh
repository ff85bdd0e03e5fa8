// The engine of all decode matrices: y[n, m] = sum_k x[n, k] · w[m, k] for few rows n, at the speed of reading w once.
//
// Weights w are bf16[m, k] row-major as in the checkpoint, nothing is repacked.
//
// Numerics: bf16 products, f32 accumulators. Each of the 8 warps sums its 64 of every 512 k in ascending order, then the
//   8 sums are added in warp order. That order is the same for every number of rows, in every variant: a row's result is
//   bit for bit the same alone, among any batch mates, and on any number of SMs.
//   With a norm, x · norm_weight is rounded to bf16 and 1 / rms is applied to the f32 sum, so that nothing waits for it.
// Mapping: a persistent grid of one block of 8 warps per SM; block b owns the output units [b U / G, (b + 1) U / G), each
//   with all of k, so no sums cross blocks and all SMs read the same number of bytes to within one row. Every warp streams
//   its own 128-byte line of each weight row, and of x, through its own ring in shared memory (16-byte async copies; the
//   halves of odd rows' lines are swapped, which makes the 16-byte loads free of bank conflicts): warps meet only to add up.
//   mma.m16n8k16 takes weights as A and activations as B. A thread's 16 contiguous bytes stand in for the fragment's
//   scattered k: the same permutation of k on both operands leaves the product as it is.
// Overlap: weights do not depend on earlier kernels, so the rings are filled before the wait. The next kernel is let in
//   shortly before this one has issued its last copy: its blocks start as soon as an SM has room for them.
// Cost: 2 k bytes per unit (4 k per pair) from memory, once; x is read again for every group of tiles, from L2, unless it
//   is resident: then the first group leaves x ∘ norm_weight in shared memory, each lane the 16 bytes that it alone reads,
//   and the rings carry weights only.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace qwen_rt {

enum class Epilogue {
    kBias,      // bf16(y / rms + bias)
    kResidual,  // bf16(residual + y)
    kSiluGate,  // bf16(silu(y_gate / rms) · y_up / rms)
    kLogits,    // f32(y / rms)
};

struct SkinnyParams {
    const bf16* x;            // [rows, k]
    const bf16* norm_weight;  // [k], or null
    const bf16* weight[3];    // up to three matrices below each other (gate and up: beside each other)
    const bf16* bias[3];      // each may be null
    int segment_end[3];       // first unit after each matrix
    const bf16* residual;     // [rows, units]
    void* out;                // [rows, units]
    int rows, k, units;
    float epsilon;
    int tile_units;  // units of a tile: at most 16, or 8 pairs; evened out over a block's tiles
    int trigger;
};

constexpr int kWarps = 8;
constexpr int kSlice = 64;                  // k of a warp in one chunk: one 128-byte line of a weight row
constexpr int kChunk = kWarps * kSlice;     // k of one chunk
constexpr int kSkinnyThreads = kWarps * 32;
constexpr int kTileBytes = 16 * kSlice * 2;  // a warp's line of the 16 rows of a tile
constexpr int kReduceStride = 20;              // floats: 16 sums of a column, padded

// Columns (activation rows) whose sums are added up together.
__host__ __device__ constexpr int reduce_columns(int n_tiles) { return n_tiles == 1 ? 8 : 16; }
__host__ __device__ constexpr int reduce_bytes(int n_tiles) { return kWarps * reduce_columns(n_tiles) * kReduceStride * 4; }
__host__ __device__ constexpr int squares_bytes(int n_tiles) { return kWarps * n_tiles * 8 * 4; }
__host__ __device__ constexpr int norm_bytes(bool has_norm, int k) { return has_norm ? (k * 2 + 127) / 128 * 128 : 0; }
// What a warp keeps of one chunk: weights of all tiles of a group, and x (rows 0: where x is resident).
__host__ __device__ constexpr int stage_bytes(int m_tiles, int rows) { return m_tiles * kTileBytes + rows * 128; }
// A warp's slices of all of x, where it is resident.
__host__ __device__ constexpr int resident_bytes(int rows, int k) { return (k + kChunk - 1) / kChunk * rows * 128; }

struct Units {
    int first, count;
};

// Row `unit` of the matrices; `is_up` tells which of a pair.
template <Epilogue kEpilogue>
__device__ __forceinline__ const bf16* weight_row(const SkinnyParams& p, int unit, bool is_up) {
    if constexpr (kEpilogue == Epilogue::kBias) {
        const int segment = (unit >= p.segment_end[0]) + (unit >= p.segment_end[1]);
        const bf16* base = segment == 0 ? p.weight[0] : segment == 1 ? p.weight[1] : p.weight[2];
        const int before = segment == 0 ? 0 : segment == 1 ? p.segment_end[0] : p.segment_end[1];
        return base + static_cast<int64_t>(unit - before) * p.k;
    } else {
        return (kEpilogue == Epilogue::kSiluGate && is_up ? p.weight[1] : p.weight[0]) + static_cast<int64_t>(unit) * p.k;
    }
}

// Bias or residual of an output element.
template <Epilogue kEpilogue>
__device__ __forceinline__ float addend_of(const SkinnyParams& p, int row, int unit) {
    if constexpr (kEpilogue == Epilogue::kResidual) {
        const auto* from = reinterpret_cast<const unsigned short*>(p.residual) + static_cast<int64_t>(row) * p.units + unit;
        return __uint_as_float(static_cast<uint32_t>(__ldcg(from)) << 16);
    } else {
        const int segment = (unit >= p.segment_end[0]) + (unit >= p.segment_end[1]);
        const bf16* base = segment == 0 ? p.bias[0] : segment == 1 ? p.bias[1] : p.bias[2];
        const int before = segment == 0 ? 0 : segment == 1 ? p.segment_end[0] : p.segment_end[1];
        return base == nullptr ? 0.f : __bfloat162float(base[unit - before]);
    }
}

__device__ __forceinline__ float add_squares(float sum, uint4 v) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(pairs[i]);
        sum = fmaf(f.x, f.x, sum);
        sum = fmaf(f.y, f.y, sum);
    }
    return sum;
}

// ---------------------------------------------------------------- kernel

// kNTiles: activation rows / 8; kMTiles: 16-row tiles of weights in a group; kStages: chunks under way; kResident: x stays.
// The inner loop is short on purpose: unrolled by stages and tiles it missed the instruction cache and ran at 3 TB/s.
template <Epilogue kEpilogue, bool kNorm, int kNTiles, int kMTiles, int kStages, bool kResident>
__global__ void __launch_bounds__(kSkinnyThreads, kNTiles <= 2 && !kResident ? 2 : 1) skinny_gemm(const __grid_constant__ SkinnyParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    static_assert(kNorm || !kResident, "what is read once need not stay");
    constexpr bool kPairs = kEpilogue == Epilogue::kSiluGate;
    constexpr int kUnitsPerTile = kPairs ? 8 : 16;
    constexpr int kColumns = reduce_columns(kNTiles);
    constexpr int kRounds = kNTiles * 8 / kColumns;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    float* squares = reinterpret_cast<float*>(shared);   // [warp][column]
    float* sums = squares + squares_bytes(kNTiles) / 4;  // [warp][column][20]
    const int bytes_of_stage = stage_bytes(kMTiles, kResident ? 0 : p.rows);
    const int bytes_of_x = kResident ? resident_bytes(p.rows, p.k) : 0;
    const uint32_t norm = smem_address(shared) + squares_bytes(kNTiles) + reduce_bytes(kNTiles);
    const uint32_t resident = norm + norm_bytes(kNorm, p.k) + warp * bytes_of_x;
    const uint32_t ring = norm + norm_bytes(kNorm, p.k) + kWarps * bytes_of_x + warp * kStages * bytes_of_stage;
    const uint32_t ring_end = ring + kStages * bytes_of_stage;
    const int num_chunks = (p.k + kChunk - 1) / kChunk;
    const int begin = static_cast<int>(static_cast<int64_t>(p.units) * blockIdx.x / gridDim.x);
    const int num_units = static_cast<int>(static_cast<int64_t>(p.units) * (blockIdx.x + 1) / gridDim.x) - begin;
    const int group_units = kMTiles * p.tile_units;
    const int num_groups = (num_units + group_units - 1) / group_units;
    const auto units_of_group = [&](int group) -> Units {
        return {begin + group * group_units, min(group_units, num_units - group * group_units)};
    };
    int until_trigger = num_groups * num_chunks - p.trigger;
    if (until_trigger <= 0 || p.trigger == 0) let_next_grid_start();

    // The loader runs kStages chunks ahead of the products. A lane copies 16 bytes of every fourth row of a tile.
    const uint64_t policy = evict_first_policy();
    const int lane_row = lane >> 3, lane_k = warp * kSlice + (lane & 7) * 8;
    const uint32_t lane_to = lane_row * 128 + (((lane & 7) ^ ((lane_row & 1) << 2)) << 4);
    const bf16* row_at[kMTiles][4];
    uint32_t has_row = 0;
    const auto find_rows = [&](int group) {
        const Units u = units_of_group(group);
        has_row = 0;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = i * 4 + lane_row, in_tile = kPairs ? row & 7 : row;  // of pairs, rows 8 to 15 are up's
                const int unit = m * p.tile_units + in_tile;
                const bool is_there = in_tile < p.tile_units && unit < u.count;
                has_row |= static_cast<uint32_t>(is_there) << (m * 4 + i);
                row_at[m][i] = weight_row<kEpilogue>(p, u.first + (is_there ? unit : 0), i >= 2) + lane_k;
            }
    };
    const auto load_weights = [&](uint32_t stage, int chunk) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (has_row >> (m * 4 + i) & 1)
                    copy16_async(stage + lane_to + m * kTileBytes + i * 512, row_at[m][i] + chunk * kChunk, policy);
    };
    const bf16* x_at = p.x + static_cast<int64_t>(lane_row) * p.k + lane_k;
    const auto x_of = [&](uint32_t stage, int chunk) -> uint32_t {
        return kResident ? resident + chunk * p.rows * 128 : stage + kMTiles * kTileBytes;
    };
    const auto load_x = [&](uint32_t stage, int chunk) {
#pragma unroll
        for (int i = 0; i < kNTiles * 2; ++i)
            if (i * 4 + lane_row < p.rows)
                copy16_async(x_of(stage, chunk) + lane_to + i * 512,
                             x_at + static_cast<int64_t>(i) * 4 * p.k + chunk * kChunk);
    };
    const int num_slices = (p.k / kSlice - warp + kWarps - 1) / kWarps;  // chunks in which this warp has k: all, or all but one
    int load_group = 0, load_chunk = 0;
    const auto advance = [&] {
        if (++load_chunk == num_chunks) {
            load_chunk = 0;
            if (++load_group < num_groups) find_rows(load_group);
        }
        if (--until_trigger == 0) let_next_grid_start();
    };
    find_rows(0);
#pragma unroll 1
    for (uint32_t stage = ring; stage < ring_end; stage += bytes_of_stage) {
        if (load_group < num_groups) {
            if (load_chunk < num_slices) load_weights(stage, load_chunk);
            advance();
        }
    }
    if constexpr (kNorm) {
        for (int i = threadIdx.x; i < p.k / 8; i += kSkinnyThreads)
            store_shared(norm + i * 16, __ldg(reinterpret_cast<const uint4*>(p.norm_weight) + i));
        __syncthreads();
    }
    wait_for_previous_grids();
    {
        int chunk = 0;
        for (uint32_t stage = ring; stage < ring_end; stage += bytes_of_stage) {
            if (chunk < num_slices) load_x(stage, chunk);
            if (++chunk == num_chunks) {
                if constexpr (kResident) break;
                chunk = 0;
            }
        }
        commit_copies();
    }

    // The output element of this thread in every reduction round.
    const int my_unit = threadIdx.x % kUnitsPerTile, my_column = threadIdx.x / kUnitsPerTile;
    const bool i_store = my_column < kColumns && my_unit < p.tile_units;
    const uint32_t read_at = g * 128 + ((t ^ ((g & 1) << 2)) << 4);  // the other half of the line: ^ 64
    float square_sum[kNTiles];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) square_sum[n] = 0.f;
    uint32_t stage = ring;
    wait_copies<0>();  // the first stages: weights are there long since, mostly; x is needed now

    for (int group = 0; group < num_groups; ++group) {
        const Units u = units_of_group(group);
        // Bias and residual are fetched before they are needed.
        float addend[kMTiles][kRounds];
        if constexpr (kEpilogue == Epilogue::kBias || kEpilogue == Epilogue::kResidual) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                const int unit_in_group = m * p.tile_units + my_unit;
#pragma unroll
                for (int r = 0; r < kRounds; ++r) {
                    const int row = r * kColumns + my_column, unit = u.first + unit_in_group;
                    addend[m][r] = 0.f;
                    if (i_store && unit_in_group < u.count && row < p.rows) addend[m][r] = addend_of<kEpilogue>(p, row, unit);
                }
            }
        }

        float sum[kMTiles][kNTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int n = 0; n < kNTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;

#pragma unroll 1
        for (int chunk = 0; chunk < num_chunks; ++chunk) {
            wait_copies<kStages - 1>();
            __syncwarp();
            if (chunk < num_slices) {
                uint4 x[kNTiles][2];
#pragma unroll
                for (int n = 0; n < kNTiles; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        x[n][half] = n * 8 + g < p.rows
                                         ? load_shared(x_of(stage, chunk) + n * 1024 + (read_at ^ (half * 64)))
                                         : make_uint4(0, 0, 0, 0);
                if (kNorm && (!kResident || group == 0)) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint4 scale = load_shared(norm + (chunk * kChunk + warp * kSlice + t * 8 + half * 32) * 2);
#pragma unroll
                        for (int n = 0; n < kNTiles; ++n) {
                            uint4& v = x[n][half];
                            if (group == 0) square_sum[n] = add_squares(square_sum[n], v);
                            v = make_uint4(multiply_pairs(v.x, scale.x), multiply_pairs(v.y, scale.y),
                                           multiply_pairs(v.z, scale.z), multiply_pairs(v.w, scale.w));
                            if (kResident && n * 8 + g < p.rows)
                                store_shared(x_of(stage, chunk) + n * 1024 + (read_at ^ (half * 64)), v);
                        }
                    }
                }
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                    if (m > 0 && m * p.tile_units >= u.count) continue;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t from = stage + m * kTileBytes + (read_at ^ (half * 64));
                        const uint4 low = load_shared(from), high = load_shared(from + 8 * 128);
#pragma unroll
                        for (int n = 0; n < kNTiles; ++n) {
                            const uint4 b = x[n][half];
                            mma_bf16(sum[m][n], low.x, high.x, low.y, high.y, b.x, b.y);
                            mma_bf16(sum[m][n], low.z, high.z, low.w, high.w, b.z, b.w);
                        }
                    }
                }
            }
            __syncwarp();
            if (load_group < num_groups) {
                if (load_chunk < num_slices) {
                    load_weights(stage, load_chunk);
                    if (!kResident || load_group == 0) load_x(stage, load_chunk);
                }
                advance();
            }
            commit_copies();
            stage += bytes_of_stage;
            if (stage == ring_end) stage = ring;
        }

        if constexpr (kNorm) {
            if (group == 0) {
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
                    square_sum[n] += __shfl_xor_sync(~0u, square_sum[n], 1);
                    square_sum[n] += __shfl_xor_sync(~0u, square_sum[n], 2);
                    if (t == 0) squares[warp * kNTiles * 8 + n * 8 + g] = square_sum[n];
                }
            }
        }

#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            if (m * p.tile_units >= u.count) continue;
#pragma unroll
            for (int r = 0; r < kRounds; ++r) {
                float* mine = sums + warp * kColumns * kReduceStride;
#pragma unroll
                for (int i = 0; i < kColumns / 8; ++i) {
                    const int n = r * (kColumns / 8) + i;
                    float* at = mine + (i * 8 + 2 * t) * kReduceStride + g;
                    at[0] = sum[m][n][0];
                    at[kReduceStride] = sum[m][n][1];
                    at[8] = sum[m][n][2];
                    at[kReduceStride + 8] = sum[m][n][3];
                }
                __syncthreads();
                const int row = r * kColumns + my_column, unit = u.first + m * p.tile_units + my_unit;
                if (i_store && m * p.tile_units + my_unit < u.count && row < p.rows) {
                    float value = 0.f, second = 0.f, mean = 0.f;
#pragma unroll
                    for (int w = 0; w < kWarps; ++w) {
                        const float* from = sums + (w * kColumns + my_column) * kReduceStride + my_unit;
                        value += from[0];
                        if constexpr (kPairs) second += from[8];
                        if constexpr (kNorm) mean += squares[w * kNTiles * 8 + row];
                    }
                    const float scale = kNorm ? rsqrtf(mean / static_cast<float>(p.k) + p.epsilon) : 1.f;
                    const int64_t at = static_cast<int64_t>(row) * p.units + unit;
                    if constexpr (kEpilogue == Epilogue::kLogits) {
                        static_cast<float*>(p.out)[at] = value * scale;
                    } else if constexpr (kPairs) {
                        const float gate = value * scale;
                        static_cast<bf16*>(p.out)[at] =
                            __float2bfloat16(gate / (1.f + __expf(-gate)) * (second * scale));
                    } else {
                        static_cast<bf16*>(p.out)[at] = __float2bfloat16(fmaf(value, scale, addend[m][r]));
                    }
                }
                __syncthreads();
            }
        }
    }
}

}  // namespace qwen_rt
