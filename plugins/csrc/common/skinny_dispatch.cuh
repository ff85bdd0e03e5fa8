// What the tables of variants share (skinny_bf16.cu and its siblings): trying one, and saying that none fits.
#pragma once

#include "skinny.cuh"
#include "skinny_gemm.cuh"

namespace qwen_rt {

// Launches the variant unless it needs more shared memory than there is; returns whether it did.
template <Format kFormat, Scaling kScaling, bool kNorm, int kNTiles, int kMTiles, int kStages, bool kResident, int kParts>
bool try_variant(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, SkinnyParams p, int32_t* status) {
    using Slice = SliceOf<kFormat, kParts>;
    constexpr bool kHasScales = kScaling == Scaling::kGroups || kScaling == Scaling::kFine;
    const int turns = turns_of<Slice>(row_bytes_of(kFormat, p.k), kParts);
    p.table_groups = 1 + (turns - 1 + kStages) / turns;
    int64_t bytes = squares_bytes(kNTiles) + table_bytes(p.table_groups, kMTiles, kHasScales) +
                    reduce_bytes(kNTiles, kMTiles, p.rows) + norm_bytes(kNorm, p.k) +
                    int64_t{kWarps} * ((kResident ? resident_bytes<Slice>(p.rows, p.k) : 0) +
                                       kStages * stage_bytes<Slice>(kMTiles, kResident ? 0 : p.rows));
    if constexpr (kHasScales) {
        const int64_t buffer = scale_buffer_bytes(scale_row_of(kFormat, p), kMTiles);
        p.scale_buffers = grid.tiles > kMTiles && bytes + 2 * buffer <= device.max_shared_bytes ? 2 : 1;
        bytes += p.scale_buffers * buffer;
    }
    // Columns without a row read what lies behind the rows', and nobody uses it: of the last ring, what lies behind the rings.
    const int64_t behind = (kNTiles * 8 - p.rows) * Slice::kXBytes;
    const int64_t rings = int64_t{kWarps} * kStages * stage_bytes<Slice>(kMTiles, kResident ? 0 : p.rows);
    if (bytes < rings + behind) bytes = rings + behind;
    if (bytes > device.max_shared_bytes) return false;
    *status = launch(call, skinny_gemm<kFormat, kScaling, kNorm, kNTiles, kMTiles, kStages, kResident, kParts>, device,
                     dim3(static_cast<unsigned>(grid.blocks)), kSkinnyThreads, static_cast<int>(bytes), p);
    return true;
}

inline int32_t refuse_variants(const QwenRtCall& call, const Device& device, const SkinnyParams& p) {
    return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%d, k=%d need more shared memory than the %d bytes of this GPU's blocks",
                  p.rows, p.k, device.max_shared_bytes);
}

// A line of a table: (activation rows / 8, tiles of a group, stages, lines of a slice), if `wanted`. All variants give a row
// the same bits. Figures behind the choices: docs/performance-gpu-kernels.md.
#ifdef QWEN_RT_TUNE  // a build for timing variants: the upper bits of the flags number the line, 0 as ever
#define QWEN_RT_WANTED(wanted) (call.flags >> 8 ? ++line == call.flags >> 8 : (wanted))
#define QWEN_RT_LINES [[maybe_unused]] int line = 0;
#else
#define QWEN_RT_WANTED(wanted) (wanted)
#define QWEN_RT_LINES
#endif
#define QWEN_RT_TRY(wanted, n_tiles, m_tiles, stages, parts)                                                                  \
    if (QWEN_RT_WANTED(wanted) &&                                                                                             \
        try_variant<kFormat, kScaling, kNorm, n_tiles, m_tiles, stages, false, parts>(call, device, grid, p, &status))        \
    return status
// The same with x resident, where a block has several groups of tiles.
#define QWEN_RT_TRY_RESIDENT(wanted, n_tiles, m_tiles, stages, parts)                                                         \
    if constexpr (kNorm)                                                                                                      \
        if (QWEN_RT_WANTED((wanted) && grid.tiles > m_tiles) &&                                                          \
            try_variant<kFormat, kScaling, kNorm, n_tiles, m_tiles, stages, true, parts>(call, device, grid, p, &status))        \
    return status

}  // namespace qwen_rt
