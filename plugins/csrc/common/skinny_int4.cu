// Variants of the skinny kernel for int4 matrices.
#include "skinny_dispatch.cuh"
#include "skinny_int4_direct.cuh"
#include "skinny_int4_ring.cuh"

namespace qwen_rt {

namespace {

// Kernels for few rows, unless they need more shared memory than there is; they return whether one was launched.
template <bool kNorm, bool kZeros, int kSets, int kDepth, int kBlocks>
bool try_direct(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    const FewLayout at = direct_layout(p, kSets, grid.tiles);
    if (at.all > device.max_shared_bytes) return false;
    *status = launch(call, skinny_int4_direct<kNorm, kZeros, kSets, kDepth, kBlocks>, device,
                     dim3(static_cast<unsigned>(grid.blocks)), kSets * kSkinnyThreads, at.all, p, at);
    return true;
}
template <bool kNorm, bool kZeros, int kSets, int kMTiles, int kStages, int kBlocks>
bool try_ring(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    const FewLayout at = ring_layout(p, kSets, kMTiles, kStages, grid.tiles);
    if (at.all > device.max_shared_bytes) return false;
    *status = launch(call, skinny_int4_ring<kNorm, kZeros, kSets, kMTiles, kStages, kBlocks>, device,
                     dim3(static_cast<unsigned>(grid.blocks)), kSets * kSkinnyThreads, at.all, p, at);
    return true;
}

// (sets of warps, units under way, blocks of an SM); (sets of warps, tiles of a group, stages, blocks of an SM).
#define QWEN_RT_DIRECT(wanted, sets, depth, blocks)                                                              \
    if (QWEN_RT_WANTED(wanted) && try_direct<kNorm, kZeros, sets, depth, blocks>(call, device, grid, p, status)) \
    return true
#define QWEN_RT_RING(wanted, sets, m_tiles, stages, blocks)                                                             \
    if (QWEN_RT_WANTED(wanted) && try_ring<kNorm, kZeros, sets, m_tiles, stages, blocks>(call, device, grid, p, status)) \
    return true

template <bool kNorm, bool kZeros>
bool choose_few(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, int32_t* status) {
    if (p.rows > kFewRows || p.group_shift != 7) return false;
    const int tiles = grid.tiles;
    QWEN_RT_LINES
    QWEN_RT_DIRECT(tiles == 1 && p.k <= 2048, 1, 4, 2);
    QWEN_RT_DIRECT(grid.is_small && p.k <= 2048, 3, 2, 1);
    QWEN_RT_DIRECT(grid.is_small && tiles == 1, 2, 6, 1);
    QWEN_RT_RING(grid.is_small, 1, 1, 8, 2);
    QWEN_RT_RING(tiles > 4, 2, 2, 4, 1);
    QWEN_RT_RING(true, 2, 1, 8, 1);
    QWEN_RT_RING(true, 2, 1, 4, 1);
    QWEN_RT_DIRECT(true, 2, 6, 1);
    return false;
}

template <Scaling kScaling, bool kNorm>
int32_t choose(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p) {
    constexpr Format kFormat = Format::kInt4;
    const int tiles = grid.tiles;
    int32_t status = QWEN_RT_OK;
    QWEN_RT_LINES
#ifdef QWEN_RT_TUNE
    line = 32;  // behind those of few rows
#endif
    if constexpr (kScaling == Scaling::kGroups)
        if (p.zero[0] == nullptr ? choose_few<kNorm, false>(call, device, grid, p, &status)
                                 : choose_few<kNorm, true>(call, device, grid, p, &status))
            return status;
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
