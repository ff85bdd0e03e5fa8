// Which variant of skinny_gemm.cuh runs: by rows, by the tiles of a block, and by what fits in shared memory.
#pragma once

#include "skinny_gemm.cuh"

namespace qwen_rt {

// The next kernel is let in so many chunks before the last copy of this one: 0 (at once) to 12 differ by 2 % at most.
constexpr int kTriggerChunks = 3;
// A block that reads no more than this leaves half of the SM to the next kernel's block; a larger one takes all, because
// two blocks of one kernel on an SM, which the hardware places where it finds room, end late.
constexpr int64_t kSmallBlockBytes = 224 * 1024;

// Launches the variant unless it needs more shared memory than there is; returns whether it did.
template <Epilogue kEpilogue, bool kNorm, int kNTiles, int kMTiles, int kStages, bool kResident>
bool try_variant(const QwenRtCall& call, const Device& device, int grid, const SkinnyParams& p, int32_t* status) {
    const int64_t x_bytes = kResident ? int64_t{p.rows} * ((p.k + kChunk - 1) / kChunk) * 128 : 0;  // of a warp
    const int64_t bytes = squares_bytes(kNTiles) + reduce_bytes(kNTiles) + norm_bytes(kNorm, p.k) +
                          kWarps * (x_bytes + kStages * stage_bytes(kMTiles, kResident ? 0 : p.rows));
    if (bytes > device.max_shared_bytes) return false;
    *status = launch(call, skinny_gemm<kEpilogue, kNorm, kNTiles, kMTiles, kStages, kResident>, device, dim3(grid),
                     kSkinnyThreads, static_cast<int>(bytes), p);
    return true;
}

// (rows, tiles of a block) -> (tiles of a group, stages). All variants give a row the same bits. Figures behind the
// choices: docs/performance-gpu-kernels.md.
template <Epilogue kEpilogue, bool kNorm>
int32_t launch_skinny(const QwenRtCall& call, SkinnyParams& p) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    if (p.rows > kMaxRows) return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%d; expected 1 to %d", p.rows, kMaxRows);
    if (p.k % kSlice != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "k=%d; expected a multiple of %d", p.k, kSlice);

    constexpr int kUnitsPerTile = kEpilogue == Epilogue::kSiluGate ? 8 : 16;
    constexpr bool kMany = kEpilogue == Epilogue::kSiluGate || kEpilogue == Epilogue::kLogits;
    const int grid = p.units < device.num_sms ? p.units : device.num_sms;
    const int units_per_block = (p.units + grid - 1) / grid;
    const int tiles = (units_per_block + kUnitsPerTile - 1) / kUnitsPerTile;
    const bool is_small = static_cast<int64_t>(units_per_block) * (kUnitsPerTile == 8 ? 4 : 2) * p.k <= kSmallBlockBytes;
    p.tile_units = (units_per_block + tiles - 1) / tiles;
    p.trigger = kTriggerChunks;

    int32_t status = QWEN_RT_OK;
#define QWEN_RT_TRY(n_tiles, m_tiles, stages) \
    if (try_variant<kEpilogue, kNorm, n_tiles, m_tiles, stages, false>(call, device, grid, p, &status)) return status
// The same with x resident, if that saves reading it again.
#define QWEN_RT_TRY_RESIDENT(n_tiles, m_tiles, stages)                                                                   \
    if constexpr (kNorm)                                                                                                 \
        if (tiles > m_tiles &&                                                                                           \
            try_variant<kEpilogue, kNorm, n_tiles, m_tiles, stages, true>(call, device, grid, p, &status))               \
    return status
    if (p.rows <= 8) {
        if (tiles > 1) {
            if (is_small) QWEN_RT_TRY(1, 2, 3);
            if (tiles <= (kMany ? 12 : 3)) QWEN_RT_TRY(1, 3, 4);
            if (!kMany && tiles > 3) QWEN_RT_TRY(1, 1, 10);
            QWEN_RT_TRY(1, 2, 5);
        }
        QWEN_RT_TRY(1, 1, kNorm ? 5 : 6);
        QWEN_RT_TRY(1, 1, 3);
    } else if (p.rows <= 16) {
        if (tiles > 3) QWEN_RT_TRY_RESIDENT(2, 3, 3);
        if (tiles > 3) QWEN_RT_TRY_RESIDENT(2, 2, 3);
        if (tiles > 1) QWEN_RT_TRY(2, 3, 3);
        QWEN_RT_TRY(2, 1, 3);
        QWEN_RT_TRY(2, 1, 2);
    } else if (p.rows <= 32) {
        QWEN_RT_TRY_RESIDENT(4, 3, 2);
        QWEN_RT_TRY(4, 3, 2);
        QWEN_RT_TRY(4, 1, 1);
    } else {
        QWEN_RT_TRY_RESIDENT(8, 2, 2);
        QWEN_RT_TRY(8, 2, 2);
        QWEN_RT_TRY(8, 1, 1);
    }
#undef QWEN_RT_TRY
#undef QWEN_RT_TRY_RESIDENT
    return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%d, k=%d need more shared memory than the %d bytes of this GPU's blocks",
                  p.rows, p.k, device.max_shared_bytes);
}

}  // namespace qwen_rt
