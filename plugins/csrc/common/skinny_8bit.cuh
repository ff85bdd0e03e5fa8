// Variants of the skinny kernel for matrices of one byte an element. See skinny_gemm.cuh.
#pragma once

#include "skinny_8bit_few.cuh"
#include "skinny_dispatch.cuh"

namespace qwen_rt {

template <Format kFormat, int kSets, int kMTiles, int kStages, int kBlocks>
bool try_few_bytes(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    const FewBytesLayout at = few_bytes_layout(p, kSets, kMTiles, kStages, grid.tiles);
    constexpr int kHalf = 112 * 1024;
    if (at.all > (kBlocks == 2 ? kHalf : device.max_shared_bytes)) return false;
    *status = launch(call, skinny_8bit_few<kFormat, kSets, kMTiles, kStages, kBlocks>, device, dim3(static_cast<unsigned>(grid.blocks)),
                     kSets * kSkinnyThreads, at.all, p, at);
    return true;
}

// One or two rows of a block that reads little. Returns whether a kernel was launched: large ones are as fast in the shared
// kernel, or faster (7B gate_up 46 µs, here 49).
template <Format kFormat>
bool choose_few_bytes(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    const int tiles = grid.tiles;
    QWEN_RT_LINES
#define QWEN_RT_FEW(wanted, sets, m_tiles, stages, blocks)                                                             \
    if (QWEN_RT_WANTED(wanted) && try_few_bytes<kFormat, sets, m_tiles, stages, blocks>(call, device, grid, p, status)) \
    return true
    if (!grid.is_small) return false;
    QWEN_RT_FEW(tiles == 1, 1, 1, 8, 2);
    QWEN_RT_FEW(tiles == 2, 2, 1, 4, 2);
    QWEN_RT_FEW(tiles > 4, 2, 2, 5, 1);  // with 3 stages, which leave room for the next grid's block, 7 % slower
    QWEN_RT_FEW(true, 2, 1, 6, 1);
    QWEN_RT_FEW(true, 1, 1, 4, 1);
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
