// The engine of all decode matrices: y[n, m] = sum_k x[n, k] · w[m, k] for few rows n, at the speed of reading w once.
//
// Weights w are [m, k] row-major as stored, bf16 or quantized; nothing is repacked. Formats: skinny_format.cuh. int4 of up to
// 4 rows with groups of 128 has kernels of its own, skinny_int4_few.cuh, with the same bits.
//
// Numerics: exact products of stored numbers with 16-bit x (skinny_format.cuh), f32 accumulators. Each of the 8 warps sums
//   its slice (128 bytes of a row, 64 of int4) of every chunk of eight in ascending order, then the 8 sums are added in warp
//   order. That order is the same for every number of rows, in every variant: a row's result is bit for bit the same alone,
//   among any batch mates, and on any number of SMs.
//   With a norm, x · norm_weight is rounded to bf16 and 1 / rms is applied to the f32 sum, so that nothing waits for it.
//   Scales of rows multiply the finished f32 sum, scales of groups that of a unit (64 bytes of a row); those of fewer columns
//   multiply the weights, which are rounded to bf16.
// Mapping: a persistent grid of one block of 8 warps per SM; block b owns the output units [b U / G, (b + 1) U / G), each
//   with all of k, so no sums cross blocks and all SMs read the same number of bytes to within one row. Every warp streams
//   its own line of each weight row, and of x, through its own ring in shared memory (16-byte async copies; the halves of odd
//   rows' lines are swapped, which makes the 16-byte loads free of bank conflicts): warps meet only to add up.
//   mma.m16n8k16 takes weights as A and activations as B. A thread's 16 contiguous bytes stand in for the fragment's
//   scattered k: the same permutation of k on both operands leaves the product as it is.
// Overlap: weights do not depend on earlier kernels, so the rings are filled before the wait. The next kernel is let in
//   shortly before this one has issued its last copy: its blocks start as soon as an SM has room for them.
// Cost: the stored bytes of a unit's rows from memory, once; x is read again for every group of tiles, from L2, unless it
//   is resident: then the first group leaves x ∘ norm_weight in shared memory, each lane the 16 bytes that it alone reads,
//   and the rings carry weights only.
#pragma once

#include "skinny_products.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

// Whether a block leaves half of the SM to the next kernel's: of shared memory, and so of registers.
template <Format kFormat, Scaling kScaling, int kParts>
constexpr bool leaves_half(int n_tiles, int m_tiles, int stages, bool is_resident) {
    constexpr int kHalfBytes = 112 * 1024;
    return (n_tiles == 1 || (n_tiles == 2 && m_tiles == 1)) && !is_resident && kScaling != Scaling::kFine &&
           kWarps * stages * stage_bytes<SliceOf<kFormat, kParts>>(m_tiles, 1) <= kHalfBytes;
}

// kNTiles: activation rows / 8; kMTiles: 16-row tiles of weights in a group; kStages: lines under way; kResident: x stays;
// kParts: lines of a slice.
// The inner loop is short on purpose: unrolled by stages it missed the instruction cache and ran at 3 TB/s.
template <Format kFormat, Scaling kScaling, bool kNorm, int kNTiles, int kMTiles, int kStages, bool kResident, int kParts>
__global__ void __launch_bounds__(kSkinnyThreads, leaves_half<kFormat, kScaling, kParts>(kNTiles, kMTiles, kStages, kResident) ? 2 : 1)
    skinny_gemm(const __grid_constant__ SkinnyParams p) {
    using Slice = SliceOf<kFormat, kParts>;
    constexpr bool kFine = kScaling == Scaling::kFine, kHasScales = kFine || kScaling == Scaling::kGroups;
    static_assert((kNorm && kFormat == Format::kBf16) || !kResident, "what is read once need not stay");
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int kColumns = reduce_columns(kNTiles);
    constexpr int kRounds = kNTiles * 8 / kColumns;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const bool is_pairs = p.epilogue == Epilogue::kSiluGate;
    // Rings, resident x, norm weights, scales, squares [warp][column], table of rows, sums [tile][warp][column][20].
    const int bytes_of_stage = stage_bytes<Slice>(kMTiles, kResident ? 0 : p.rows);
    const int bytes_of_x = kResident ? resident_bytes<Slice>(p.rows, p.k) : 0;
    [[maybe_unused]] const ScaleRow scale_row = scale_row_of(kFormat, p);
    const int bytes_of_scales = kHasScales ? scale_buffer_bytes(scale_row, kMTiles) : 0;
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * kStages * bytes_of_stage, ring_end = ring + kStages * bytes_of_stage;
    const uint32_t resident = base + kWarps * kStages * bytes_of_stage + warp * bytes_of_x;
    const uint32_t norm = base + kWarps * (kStages * bytes_of_stage + bytes_of_x);
    const uint32_t scales = norm + norm_bytes(kNorm, p.k);
    float* squares = reinterpret_cast<float*>(shared + (scales - base) + p.scale_buffers * bytes_of_scales);
    const auto row_at = reinterpret_cast<const unsigned char**>(squares + squares_bytes(kNTiles) / 4);  // [slot][row]
    [[maybe_unused]] const auto shifts = reinterpret_cast<uint32_t*>(row_at + p.table_groups * kMTiles * 16);  // the same
    float* sums = squares + (squares_bytes(kNTiles) + table_bytes(p.table_groups, kMTiles, kHasScales)) / 4;
    const int block = static_cast<int>(blockIdx.x);
    const int begin = block * p.block_units + min(block, p.blocks_with_more);
    const int num_units = p.block_units + (block < p.blocks_with_more ? 1 : 0);
    const int group_units = kMTiles * p.tile_units;
    const int num_groups = (num_units + group_units - 1) / group_units;
    const auto units_of_group = [&](int group) -> Units {
        return {begin + group * group_units, min(group_units, num_units - group * group_units)};
    };

    // A warp's lines: all warps take the same number of turns, the last warps may have nothing in the last of them.
    const int row_bytes = static_cast<int>(row_bytes_of(kFormat, p.k));
    const int num_slices = (row_bytes + Slice::kSliceBytes - 1) / Slice::kSliceBytes;
    const int num_turns = turns_of<Slice>(row_bytes, kParts);
    const int my_slices = (num_slices - warp + kWarps - 1) / kWarps;
    const bool is_cut = kParts == 2 && my_slices > 0 && ((my_slices - 1) * kWarps + warp) * Slice::kSliceBytes + Slice::kLineBytes >= row_bytes;
    const int my_turns = my_slices * kParts - (is_cut ? 1 : 0);
    const auto bytes_before = [](int turn) {
        return kParts == 1 ? turn * kWarps * Slice::kSliceBytes
                           : (turn >> 1) * kWarps * Slice::kSliceBytes + (turn & 1) * Slice::kLineBytes;
    };
    int until_trigger = num_groups * num_turns - p.trigger;
    if (until_trigger <= 0 || p.trigger == 0) let_next_grid_start();

    // The loader runs kStages lines ahead of the products. A lane copies 16 bytes of every fourth (eighth) row of a tile.
    constexpr int kLanesOfRow = Slice::kLineBytes / 16, kRowsOfCopy = 32 / kLanesOfRow, kCopies = 16 / kRowsOfCopy;
    const uint64_t policy = evict_first_policy();
    const int lane_row = lane / kLanesOfRow, lane_chunk = lane % kLanesOfRow;
    const int lane_at = warp * Slice::kSliceBytes + lane_chunk * 16;  // bytes into a chunk's row
    const uint32_t lane_to = lane_row * Slice::kLineBytes + (Slice::weight_chunk(lane_row, lane_chunk) << 4);
    const auto describe_row = [&](int group, int row, int slot) {
        const TileRow at = tile_row(p, units_of_group(group), row >> 4, row & 15);
        row_at[slot] = static_cast<const unsigned char*>(p.weight[at.matrix]) + static_cast<int64_t>(at.row) * row_bytes;
        if constexpr (kHasScales) shifts[slot] = scale_shifts(p, scale_row, at);
    };
    int load_group = 0, load_turn = 0, load_slot = 0, load_count = min(group_units, num_units);  // units of the group that is loaded
    const auto load_weights = [&](uint32_t stage, int turn) {
        const int offset = bytes_before(turn) + lane_at;
        // Of quantized formats a row may end within the line. Rows that a tile lacks are copies of its last one.
        if (kFormat != Format::kBf16 && offset >= row_bytes) return;
        const unsigned char* const* from = row_at + load_slot * kMTiles * 16 + lane_row;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
            if (m == 0 || m * p.tile_units < load_count)
#pragma unroll
                for (int i = 0; i < kCopies; ++i)
                    copy16_async(stage + lane_to + m * Slice::kTileBytes + i * 512, from[m * 16 + i * kRowsOfCopy] + offset, policy);
    };
    constexpr int kLanesOfX = Slice::kXBytes / 16, kXOfCopy = 32 / kLanesOfX;
    const int x_row = lane / kLanesOfX, x_chunk = lane % kLanesOfX;
    const bf16* x_at = p.x + static_cast<int64_t>(x_row) * p.k + warp * Slice::kSliceK + x_chunk * 8;
    const auto x_of = [&](uint32_t stage, int turn) -> uint32_t {
        return kResident ? resident + turn * p.rows * Slice::kXBytes : stage + kMTiles * Slice::kTileBytes;
    };
    const auto load_x = [&](uint32_t stage, int turn) {
        const int offset = bytes_before(turn) * 8 / Slice::kBits;
        const int size = kFormat == Format::kBf16 || offset + warp * Slice::kSliceK + x_chunk * 8 < p.k ? 16 : 0;
#pragma unroll
        for (int i = 0; i < kNTiles * 8 / kXOfCopy; ++i) {
            const int row = i * kXOfCopy + x_row;
            if (row < p.rows)
                copy16_or_zero_async(x_of(stage, turn) + row * Slice::kXBytes + (Slice::x_chunk(row, x_chunk) << 4),
                                     x_at + (size == 0 ? 0 : static_cast<int64_t>(i) * kXOfCopy * p.k + offset), size);
        }
    };
    const auto advance = [&] {
        if (++load_turn == num_turns) {
            load_turn = 0;
            load_count = min(group_units, num_units - ++load_group * group_units);
            if (++load_slot == p.table_groups) load_slot = 0;
        }
        if (--until_trigger == 0) let_next_grid_start();
    };
    const auto scales_of = [&](int group) { return scales + (p.scale_buffers > 1 && (group & 1) ? bytes_of_scales : 0); };
    const auto load_scales = [&](int group) {
        if constexpr (kHasScales)
            if (group < num_groups) copy_scales(p, scale_row, units_of_group(group), kMTiles, scales_of(group));
    };
    // What is small comes first: behind the rings it would wait for all of them.
    if constexpr (kNorm) {
        if (p.has_fresh_norm) wait_for_previous_grids();
        for (int i = threadIdx.x; i < norm_bytes(kNorm, p.k) / 16; i += kSkinnyThreads)
            copy16_or_zero_async(norm + i * 16, p.norm_weight + (i < p.k / 8 ? i * 8 : 0), i < p.k / 8 ? 16 : 0);
    }
    load_scales(0);
#pragma unroll 1
    for (int i = threadIdx.x; i < min(p.table_groups, num_groups) * kMTiles * 16; i += kSkinnyThreads)
        describe_row(i / (kMTiles * 16), i % (kMTiles * 16), i);
    __syncthreads();
#pragma unroll 1
    for (uint32_t stage = ring; stage < ring_end; stage += bytes_of_stage) {
        if (load_group < num_groups) {
            if (load_turn < my_turns) load_weights(stage, load_turn);
            advance();
        }
        commit_copies();
    }
    // x of the first stages. Of few rows it goes through registers, so that it need not wait for weights that are not here yet.
    if (kNTiles == 1 && !kResident && p.rows <= kXOfCopy) {
        const bf16* from[kStages];  // null: zeros
        int turn = 0;
#pragma unroll
        for (int s = 0; s < kStages; ++s) {
            const int at = bytes_before(turn) * 8 / Slice::kBits;
            from[s] = x_row < p.rows && at + warp * Slice::kSliceK + x_chunk * 8 < p.k ? x_at + at : nullptr;
            if (++turn == num_turns) turn = 0;
        }
        wait_for_previous_grids();
        uint4 first[kStages];
#pragma unroll
        for (int s = 0; s < kStages; ++s) first[s] = from[s] == nullptr ? make_uint4(0, 0, 0, 0) : load_activation(from[s]);
#pragma unroll
        for (int s = 0; s < kStages; ++s)
            store_shared_if(x_row < p.rows, x_of(ring + s * bytes_of_stage, s) + x_row * Slice::kXBytes + (Slice::x_chunk(x_row, x_chunk) << 4),
                            first[s]);
        wait_copies<kStages - 1>();
    } else {
        wait_for_previous_grids();
        int turn = 0;
#pragma unroll 1
        for (uint32_t stage = ring; stage < ring_end; stage += bytes_of_stage) {
            if (turn < my_turns) load_x(stage, turn);
            if (++turn == num_turns) {
                if constexpr (kResident) break;
                turn = 0;
            }
        }
        commit_copies();
        wait_copies<0>();
    }
    if constexpr (kNorm || kHasScales) __syncthreads();

    // Of more than 8 rows: the output of this thread in every tile and round.
    const int units_of_tile = is_pairs ? 8 : 16;
    [[maybe_unused]] const int my_unit = threadIdx.x & (units_of_tile - 1), my_column = static_cast<int>(threadIdx.x) / units_of_tile;
    [[maybe_unused]] const bool i_store = my_column < kColumns && my_unit < p.tile_units;
    // Of up to 8 rows: those of all tiles of a group are spread over the threads.
    constexpr int kMine = (kMTiles + 1) / 2;
    [[maybe_unused]] const int num_outputs = p.rows * kMTiles * units_of_tile;
    float square_sum[kNTiles];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) square_sum[n] = 0.f;
    uint32_t stage = ring;
    int slot = 0;  // of the group, in the table

    for (int group = 0; group < num_groups; ++group) {
        const Units u = units_of_group(group);
        if constexpr (kHasScales) {
            const bool is_double = p.scale_buffers > 1;
            if (is_double || group > 0) load_scales(is_double ? group + 1 : group);
            if (!is_double && group > 0) {
                commit_copies();
                wait_copies<0>();
                __syncthreads();
            }
        }
        // What the sums meet at the end is fetched before it is needed.
        constexpr bool kRowScales = kScaling == Scaling::kRow;
        [[maybe_unused]] Output<kFormat, kRowScales> mine[kMine];
        [[maybe_unused]] Addends<kFormat, kMTiles, kRounds, kRowScales> addends;
        if constexpr (kNTiles == 1) {
#pragma unroll
            for (int i = 0; i < kMine; ++i)
                if (i == 0 || i * kSkinnyThreads < num_outputs) mine[i].find(p, u, kMTiles, threadIdx.x + i * kSkinnyThreads);
        } else {
            addends.fetch(p, u, i_store, my_unit, my_column, kColumns);
        }
        [[maybe_unused]] ScaleRows<kFormat, kMTiles> scale_rows;
        if constexpr (kHasScales)
            scale_rows.find(scale_row, g, shared + (scales_of(group) - base), shifts + slot * kMTiles * 16);

        float sum[kMTiles][kNTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int n = 0; n < kNTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;

#pragma unroll 1
        for (int turn = 0; turn < num_turns; ++turn) {
            wait_copies<kStages - 1>();
            __syncwarp();
            if (turn < my_turns) {
                const Turn now = {stage, x_of(stage, turn), norm, bytes_before(turn) * 8 / Slice::kBits + warp * Slice::kSliceK, g, t,
                                  group == 0};
                if constexpr (kFormat == Format::kBf16)
                    multiply_bf16<Slice, kNorm, kResident>(p, now, square_sum, sum);
                else if constexpr (kFine)
                    multiply_fine<kFormat, Slice, kNorm>(p, now, scale_rows, square_sum, sum);
                else
                    multiply_quantized<kFormat, kScaling, Slice, kNorm>(p, now, scale_rows, square_sum, sum);
            }
            __syncwarp();
            if (load_group < num_groups) {
                if (load_turn < my_turns) {
                    load_weights(stage, load_turn);
                    if (!kResident || load_group == 0) load_x(stage, load_turn);
                }
                advance();
            }
            commit_copies();
            stage += bytes_of_stage;
            if (stage == ring_end) stage = ring;
        }
        // The next group's scales came with the stage of this group's first turn.
        if constexpr (kHasScales) {
            if (num_turns < kStages) wait_copies<0>();
            else wait_copies<kStages - 1>();
        }

        if constexpr (kNorm) {
            if (group == 0) {
#pragma unroll
                for (int n = 0; n < kNTiles; ++n) {
                    if constexpr (kFormat != Format::kInt4) {
                        square_sum[n] += __shfl_xor_sync(~0u, square_sum[n], 1);
                        square_sum[n] += __shfl_xor_sync(~0u, square_sum[n], 2);
                    }
                    if (t == 0) squares[warp * kNTiles * 8 + n * 8 + g] = square_sum[n];
                }
            }
        }

        // A tile's sums go to shared memory, one warp's beside the others', and are added up by the threads that own an output.
        const int columns = kNTiles == 1 ? p.rows : kColumns;  // in shared memory
        const auto leave_sums = [&](float* buffer, int m, int r) {
#pragma unroll
            for (int i = 0; i < kColumns / 8; ++i) {
                const int n = r * (kColumns / 8) + i;
                float* at = buffer + (warp * columns + i * 8 + 2 * t) * kReduceStride + g;
                if (kNTiles > 1 || 2 * t < columns) at[0] = sum[m][n][0], at[8] = sum[m][n][2];
                if (kNTiles > 1 || 2 * t + 1 < columns) at[kReduceStride] = sum[m][n][1], at[kReduceStride + 8] = sum[m][n][3];
            }
        };
        const auto add_up = [&](const float* buffer, int column, int in_tile, int row, int unit, float scale, float other, uint32_t addend) {
            float value = 0.f, second = 0.f, mean = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float* from = buffer + (w * columns + column) * kReduceStride + in_tile;
                value += from[0];
                if constexpr (kNorm) {
                    if (is_pairs) second += from[8];
                    mean += squares[w * kNTiles * 8 + row];
                }
            }
            const float inverse_rms = kNorm ? rsqrtf(mean * p.inverse_k + p.epsilon) : 1.f;
            if constexpr (kRowScales) value *= scale, second *= other;
            store_output<kNorm>(p, row, unit, value * inverse_rms, second * inverse_rms, addend);
        };
        // Rows of a group to come take the place of this one's, which all warps have loaded.
        const auto describe_next = [&] {
            if (threadIdx.x < kMTiles * 16 && group + p.table_groups < num_groups)
                describe_row(group + p.table_groups, threadIdx.x, slot * kMTiles * 16 + threadIdx.x);
            if (++slot == p.table_groups) slot = 0;
        };
        if constexpr (kNTiles == 1) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) leave_sums(sums + m * reduce_floats(1, p.rows), m, 0);
            __syncthreads();
            describe_next();
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
                const auto& my = mine[i];
                if (i > 0 && i * kSkinnyThreads >= num_outputs) break;
                if (my.is_there)
                    add_up(sums + my.tile * reduce_floats(1, p.rows), my.row, my.in_tile, my.row, my.unit, my.scale, my.second, my.addend);
            }
            __syncthreads();
        } else {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
                if (m * p.tile_units >= u.count) continue;
#pragma unroll
                for (int r = 0; r < kRounds; ++r) {
                    leave_sums(sums, m, r);
                    __syncthreads();
                    if (m == 0 && r == 0) describe_next();
                    const int row = r * kColumns + my_column, unit = m * p.tile_units + my_unit;
                    const int of_tile = kRowScales ? m : 0;
                    if (i_store && unit < u.count && row < p.rows)
                        add_up(sums, my_column, my_unit, row, u.first + unit, addends.scale[of_tile], addends.second[of_tile], addends.addend[m][r]);
                    __syncthreads();
                }
            }
        }
    }
}

}  // namespace qwen_rt
