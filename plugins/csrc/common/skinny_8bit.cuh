// Variants of the skinny kernel for matrices of one byte an element. See skinny_gemm.cuh.
#pragma once

#include "skinny_dispatch.cuh"

namespace qwen_rt {

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
    if (scaling == Scaling::kRow)
        return has_norm ? choose_of_rows<kFormat, true>(call, device, grid, p) : choose_of_rows<kFormat, false>(call, device, grid, p);
    if (scaling == kGroups)
        return has_norm ? choose_of_groups<kFormat, kGroups, true>(call, device, grid, p)
                        : choose_of_groups<kFormat, kGroups, false>(call, device, grid, p);
    return has_norm ? choose_of_groups<kFormat, kFine, true>(call, device, grid, p)
                    : choose_of_groups<kFormat, kFine, false>(call, device, grid, p);
}

}  // namespace qwen_rt
