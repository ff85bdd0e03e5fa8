// Variants of the skinny kernel for bf16 matrices. See skinny_gemm.cuh.
#include "skinny_dispatch.cuh"

namespace qwen_rt {

namespace {

template <bool kNorm>
int32_t choose(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p) {
    constexpr Format kFormat = Format::kBf16;
    constexpr Scaling kScaling = Scaling::kNone;
    const bool is_many = p.epilogue == Epilogue::kSiluGate || p.epilogue == Epilogue::kLogits;
    const int tiles = grid.tiles;
    int32_t status = QWEN_RT_OK;
    QWEN_RT_LINES
    if (p.rows <= 8) {
        QWEN_RT_TRY(tiles > 1 && grid.is_small, 1, 2, 3, 1);
        QWEN_RT_TRY(tiles == 2, 1, 2, 5, 1);
        QWEN_RT_TRY(tiles > 1 && tiles <= (is_many ? 12 : 3), 1, 3, 4, 1);
        QWEN_RT_TRY(!is_many && tiles > 3, 1, 1, 10, 1);
        QWEN_RT_TRY(tiles > 1, 1, 2, 5, 1);
        QWEN_RT_TRY(p.k <= 1536, 1, 1, 3, 1);  // all of k in three stages: more only take room from the next grid's block
        QWEN_RT_TRY(true, 1, 1, kNorm ? 5 : 6, 1);
        QWEN_RT_TRY(true, 1, 1, 3, 1);
    } else if (p.rows <= 16) {
        QWEN_RT_TRY_RESIDENT(tiles > 3, 2, 3, 3, 1);
        QWEN_RT_TRY_RESIDENT(tiles > 3, 2, 2, 3, 1);
        QWEN_RT_TRY(tiles == 2, 2, 2, 4, 1);
        QWEN_RT_TRY(tiles > 1, 2, 3, 3, 1);
        QWEN_RT_TRY(true, 2, 1, 3, 1);
        QWEN_RT_TRY(true, 2, 1, 2, 1);
    } else if (p.rows <= 32) {
        QWEN_RT_TRY_RESIDENT(true, 4, 3, 2, 1);
        QWEN_RT_TRY(true, 4, 3, 2, 1);
        QWEN_RT_TRY(true, 4, 1, 1, 1);
    } else {
        QWEN_RT_TRY(tiles == 3, 8, 3, 3, 2);
        QWEN_RT_TRY_RESIDENT(true, 8, 2, 2, 1);
        QWEN_RT_TRY(true, 8, 2, 2, 1);
        QWEN_RT_TRY(true, 8, 1, 1, 1);
    }
    return refuse_variants(call, device, p);
}

}  // namespace

int32_t launch_skinny_bf16(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling) {
    return p.norm_weight != nullptr ? choose<true>(call, device, grid, p) : choose<false>(call, device, grid, p);
}

}  // namespace qwen_rt
