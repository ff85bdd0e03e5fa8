// Variants of the skinny kernel for matrices of one byte an element. See skinny_gemm.cuh.
#pragma once

#include "skinny_8bit_few.cuh"
#include "skinny_dispatch.cuh"

namespace qwen_rt {

constexpr int kWholeStages = 3;  // of matrices whose lines are all under way at once

// Room for which no more than `blocks` of a kernel share an SM, a multiple of 1024: an SM has 1024 bytes more than its largest
// block, and every block takes 1024 of its own.
inline int bytes_for_most(const Device& device, int blocks) {
    return ((device.max_shared_bytes + 1024) / (blocks + 1) / 1024) * 1024;
}

// kMost: blocks of the kernel on an SM at most; 0: as many as fit. What is chosen does not depend on the rows.
template <Format kFormat, int kSets, int kSetWarps, int kMTiles, int kStages, bool kWhole, int kRegisters, int kMost>
bool try_few_bytes(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    SkinnyParams all_rows = p;
    all_rows.rows = kFewByteRows;
    if (few_bytes_layout(all_rows, kSets, kSetWarps, kMTiles, kStages, grid.tiles).all > device.max_shared_bytes) return false;
    const FewBytesLayout at = few_bytes_layout(p, kSets, kSetWarps, kMTiles, kStages, grid.tiles);
    const int least = kMost > 0 ? bytes_for_most(device, kMost) : 0;
    *status = launch(call, skinny_8bit_few<kFormat, kSets, kSetWarps, kMTiles, kStages, kWhole, kRegisters>, device,
                     dim3(static_cast<unsigned>(grid.blocks)), kSets * kSetWarps * 32, at.all > least ? at.all : least, p, at);
    return true;
}

// One or two rows of a block that reads little. Returns whether a kernel was launched: large ones are as fast in the shared
// kernel, or faster (7B gate_up 46 µs, here 49).
//
// Left alone, the hardware puts two blocks of a small grid on each of half the SMs. What is to run when decides how many may
// share one. o_proj waits for attention, which takes few SMs, and beside it gate_up fills its rings: so o_proj's blocks are
// small and take no more SMs than they must, and gate_up's leave room for one of them. Two of gate_up would have the room,
// not the registers: more than 64 for each of 512 threads. Figures: docs/performance-gpu-quantized.md, 30 to 37.
template <Format kFormat>
bool choose_few_bytes(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    const int tiles = grid.tiles;
    QWEN_RT_LINES
// (sets, warps of a set, tiles of a group, stages, whole, registers of a thread, blocks of an SM at most)
#define QWEN_RT_FEW(wanted, ...) \
    if (QWEN_RT_WANTED(wanted) && try_few_bytes<kFormat, __VA_ARGS__>(call, device, grid, p, status)) return true
    if (!grid.is_small) return false;
    if (tiles == 1 && p.k <= kWholeStages * kWarps * kFewUnit) {
        // As many blocks as the largest needs, the others for what runs beside them.
        SkinnyGrid least = grid;
        const int most = p.block_units + (p.blocks_with_more > 0 ? 1 : 0);
        least.blocks = (p.units + most - 1) / most;
        SkinnyParams q = p;
        q.block_units = p.units / least.blocks, q.blocks_with_more = p.units % least.blocks;
        constexpr int kStages = kWholeStages;
        return p.norm_weight != nullptr ? try_few_bytes<kFormat, 1, 8, 1, kStages, true, 72, 1>(call, device, least, q, status)
                                        : try_few_bytes<kFormat, 1, 8, 1, kStages, true, 72, 2>(call, device, least, q, status);
    }
    QWEN_RT_FEW(tiles == 1 && p.k > 4096, 1, 16, 1, 4, false, 72, 0);
    QWEN_RT_FEW(tiles == 1, 1, 8, 1, 8, false, 80, 0);
    QWEN_RT_FEW(tiles == 2, 2, 8, 1, 4, false, 64, 0);
    QWEN_RT_FEW(tiles > 4, 2, 8, 2, 3, false, 80, 0);
    QWEN_RT_FEW(true, 2, 8, 1, 6, false, 80, 0);
    QWEN_RT_FEW(true, 1, 8, 1, 4, false, 80, 0);
#undef QWEN_RT_FEW
    return false;
}

// A scale for each row.
template <Format kFormat, bool kNorm>
int32_t choose_of_rows(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p) {
    constexpr Scaling kScaling = Scaling::kRow;
    const int tiles = grid.tiles;
    int32_t status = QWEN_RT_OK;
    QWEN_RT_LINES
    if (p.rows <= 8) {
        QWEN_RT_TRY(tiles == 2 && grid.is_small, 1, 2, 3, 1);
        QWEN_RT_TRY(tiles == 3, 1, 3, 2, 1);
        QWEN_RT_TRY(tiles > 4, 1, 5, 2, 1);
        QWEN_RT_TRY(tiles > 3, 1, 4, 3, 1);
        QWEN_RT_TRY(tiles > 1, 1, 2, 5, 1);
        QWEN_RT_TRY(tiles > 1, 1, 2, 4, 1);
        QWEN_RT_TRY(true, 1, 1, 3, 1);
    } else if (p.rows <= 16) {
        QWEN_RT_TRY(tiles == 5, 2, 5, 3, 2);
        QWEN_RT_TRY(tiles > 2, 2, 4, 2, 1);
        QWEN_RT_TRY(tiles > 2, 2, 3, 2, 1);
        QWEN_RT_TRY(tiles > 1, 2, 2, 2, 1);
        QWEN_RT_TRY(true, 2, 1, 2, 1);
    } else if (p.rows <= 32) {
        QWEN_RT_TRY(tiles > 2, 4, 3, 3, 2);
        QWEN_RT_TRY(tiles > 1, 4, 2, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 1, 2);
    } else {
        QWEN_RT_TRY(tiles > 2, 8, 3, 2, 2);
        QWEN_RT_TRY(tiles > 1, 8, 2, 2, 2);
        QWEN_RT_TRY(true, 8, 1, 2, 2);
        QWEN_RT_TRY(true, 8, 1, 1, 2);
    }
    return refuse_variants(call, device, p);
}

// A scale for each group of columns.
template <Format kFormat, Scaling kScaling, bool kNorm>
int32_t choose_of_groups(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p) {
    const int tiles = grid.tiles;
    int32_t status = QWEN_RT_OK;
    QWEN_RT_LINES
    if (p.rows <= 8) {
        QWEN_RT_TRY(tiles > 1, 1, 2, 4, 1);
        QWEN_RT_TRY(true, 1, 1, 4, 1);
        QWEN_RT_TRY(true, 1, 1, 2, 1);
    } else if (p.rows <= 16) {
        QWEN_RT_TRY(tiles > 1, 2, 2, 2, 1);
        QWEN_RT_TRY(true, 2, 1, 2, 1);
        QWEN_RT_TRY(true, 2, 1, 1, 1);
    } else {
        QWEN_RT_TRY(true, 4, 1, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 1, 1);
    }
    return refuse_variants(call, device, p);
}

template <Format kFormat>
int32_t choose_8bit(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling) {
    constexpr Scaling kGroups = Scaling::kGroups, kFine = Scaling::kFine;
    const bool has_norm = p.norm_weight != nullptr;
    int32_t status = QWEN_RT_OK;
    if (scaling == Scaling::kRow && is_few_bytes(device, p.rows) && !p.is_permuted && choose_few_bytes<kFormat>(call, device, grid, p, &status)) return status;
    if (scaling == Scaling::kRow)
        return has_norm ? choose_of_rows<kFormat, true>(call, device, grid, p) : choose_of_rows<kFormat, false>(call, device, grid, p);
    if (scaling == kGroups)
        return has_norm ? choose_of_groups<kFormat, kGroups, true>(call, device, grid, p)
                        : choose_of_groups<kFormat, kGroups, false>(call, device, grid, p);
    return has_norm ? choose_of_groups<kFormat, kFine, true>(call, device, grid, p)
                    : choose_of_groups<kFormat, kFine, false>(call, device, grid, p);
}

}  // namespace qwen_rt
