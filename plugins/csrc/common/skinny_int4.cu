// Variants of the skinny kernel for int4 matrices.
#include "skinny_dispatch.cuh"

namespace qwen_rt {

namespace {

template <Scaling kScaling, bool kNorm>
int32_t choose(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p) {
    constexpr Format kFormat = Format::kInt4;
    const int tiles = grid.tiles;
    int32_t status = QWEN_RT_OK;
    QWEN_RT_LINES
    if constexpr (kScaling == Scaling::kFine) {
        if (p.rows <= 8) {
            QWEN_RT_TRY(tiles > 1, 1, 2, 4, 1);
            QWEN_RT_TRY(true, 1, 1, 2, 1);
        } else if (p.rows <= 16) {
            QWEN_RT_TRY(true, 2, 1, 4, 1);
            QWEN_RT_TRY(true, 2, 1, 2, 1);
        } else {
            QWEN_RT_TRY(true, 4, 1, 2, 1);
            QWEN_RT_TRY(true, 4, 1, 1, 1);
        }
    } else if (p.rows <= 8) {
        QWEN_RT_TRY(tiles > 4, 1, 6, 3, 1);
        QWEN_RT_TRY(tiles == 3, 1, 3, 4, 1);
        QWEN_RT_TRY(tiles > 1, 1, 2, 4, 1);
        QWEN_RT_TRY(true, 1, 1, 4, 1);
    } else if (p.rows <= 16) {
        QWEN_RT_TRY(tiles > 2, 2, 3, 3, 1);
        QWEN_RT_TRY(tiles > 1, 2, 2, 4, 1);
        QWEN_RT_TRY(true, 2, 1, 2, 1);
    } else {
        QWEN_RT_TRY(tiles > 1, 4, 2, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 1, 1);
    }
    return refuse_variants(call, device, p);
}

}  // namespace

int32_t launch_skinny_int4(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling) {
    const bool has_norm = p.norm_weight != nullptr;
    if (scaling == Scaling::kFine)
        return has_norm ? choose<Scaling::kFine, true>(call, device, grid, p) : choose<Scaling::kFine, false>(call, device, grid, p);
    return has_norm ? choose<Scaling::kGroups, true>(call, device, grid, p) : choose<Scaling::kGroups, false>(call, device, grid, p);
}

}  // namespace qwen_rt
