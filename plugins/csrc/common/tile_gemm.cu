// e4m3 products of many rows by wgmma, fed by the tensor copy engine. Tensors: tile_gemm.cuh.
//
// Numerics: the matrix units keep 14 bits of a sum of e4m3 products, so f32 registers take their sums over every 1024 columns
//   of k; in a tile's lower half the first time after 1536. Of terms of one sign a sum comes out short by 0.5 % (normal numbers
//   around a mean of their deviation), whatever k. Scales, bias, residual and silu · up are f32, rounded once to bf16. A row's
//   bits depend on which half of a tile it is in, not on the units beside a unit.
// Mapping: a tile is 128 rows by 192 units; of gate and up 96 units of each, so that one thread holds both sums of a unit.
//   Clusters of two blocks, one block an SM, take pairs of tiles below each other in turn: each copies its 128 rows of x, and
//   half of the weights to both. A block has 3 warpgroups: the first one's first thread copies, the others own 64 rows each.
//   Tiles go down 8 pairs of tiles or so before they go right: of 6144 rows and k = 8192 gate_up then reads 3.0 GB of memory
//   (4.1 with 4 pairs, 6.9 with all 24).
// Overlap: a thread has two sets of sums, those of the matrix units and those in f32. The former begin with the next tile while
//   the latter are scaled and written, in three steps between the tile's first chunks of k. The two warpgroups take sums over
//   at different chunks, so that one always multiplies.
// Shared memory: a ring of 5 chunks of 128 columns, 128 rows of x and 192 of weights, 200 KB.
// Preconditions (the caller checks, has_tile_product): SM 9.0, k a multiple of 16, units and stride of 8, 16-byte aligned pointers.
// Cost: 2 · k FLOPs an element (gated: 4); bound by the matrix units, and at 700 W by the power that they may draw.
// Reference: benchmarks/kernel_references.py, `fp8`; test: tests/plugins/test_quantized_prefill_gpu.py; figures, and what was
//   tried: docs/performance-gpu-kernels.md, P10 on.
// Source: the mapping is that of CUTLASS's warp-specialized cooperative kernels (sm90_mma_tma_gmma_ss_warpspecialized.hpp).
#include "tile_gemm.cuh"

#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

struct TileParams {
    CUtensorMap x, weight[2];
    const float *x_scale, *weight_scale[2];
    const bf16 *bias, *residual;
    bf16* out;
    int64_t stride;
    int rows, units, chunks;
    int pairs, columns, group;  // pairs of tiles below each other, tiles beside each other, pairs that go before the next column
};

constexpr int kTileCluster = 2;
constexpr int kTileRows = 128, kTileUnits = 192, kTileHalf = kTileUnits / 2;
constexpr int kTileChunk = 128;  // columns of k, and bytes
constexpr int kTileStages = 5;
constexpr int kTileWarpgroup = 128, kTileThreads = 3 * kTileWarpgroup;
constexpr int kTileXBytes = kTileRows * kTileChunk, kTileStageBytes = kTileXBytes + kTileUnits * kTileChunk;
constexpr int kTileBarriers = kTileStages * kTileStageBytes;
constexpr int kTileSharedBytes = kTileBarriers + 128 + 1024;  // the ring starts at a multiple of 1024
[[maybe_unused]] constexpr int kAddChunks = 8;  // between the times that sums are added in f32: 1024 columns
[[maybe_unused]] constexpr int kTileSteps = 3;  // in which a tile is written, between the first chunks of the next

#if QWEN_RT_HAS_WGMMA

// Of four words of each of a quad's lanes, lane t gets word t of all: 4 x 4 transposed, and back.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(~0u, t & 2 ? w[i] : w[i + 2], 2);
        (t & 2 ? w[i] : w[i + 2]) = other;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(~0u, t & 1 ? w[i] : w[i + 1], 1);
        (t & 1 ? w[i] : w[i + 1]) = other;
    }
}

struct TilePlace {
    int row, column;  // first row of a pair of tiles, and which of those beside each other it is
};

__device__ __forceinline__ TilePlace place_of(const TileParams& p, int index) {
    const int all = p.group * p.columns, first = index / all * p.group, within = index % all;
    const int pairs = min(p.group, p.pairs - first);
    return {(first + within % pairs) * kTileRows * kTileCluster, within / pairs};
}

// Scales and writes a thread's sums: of blocks of 8 units j, rows `row` and row + 8 (h) and units 8 j + 2 t and the next (i), at
// 4 j + 2 h + i. Four lanes of a row exchange words so that each reads and writes 16 bytes. A part is 32 units.
template <bool kGated>
struct TileWriter {
    static constexpr int kParts = (kGated ? kTileHalf : kTileUnits) / 32, kPartsOfStep = kParts / kTileSteps;
    const TileParams& p;
    int row, first, t;  // first: unit
    float x_scale[2];
    uint4 residual[kGated ? 1 : kPartsOfStep][2];

    // `column`: which of the tiles beside each other.
    __device__ __forceinline__ TileWriter(const TileParams& params, int of_row, int column, int lane_of_quad)
        : p(params), row(of_row), first(column * (kGated ? kTileHalf : kTileUnits)), t(lane_of_quad) {
#pragma unroll
        for (int h = 0; h < 2; ++h) x_scale[h] = __ldcg(p.x_scale + min(row + 8 * h, p.rows - 1));
    }
    __device__ __forceinline__ bool is_inside(int part, int h) const {
        return first + 32 * part + 8 * t < p.units && row + 8 * h < p.rows;
    }
    __device__ __forceinline__ int64_t at(int part, int h) const { return (row + 8 * h) * p.stride + first + 32 * part + 8 * t; }
    // Asks for what a step adds.
    __device__ __forceinline__ void load(int step) {
        if constexpr (!kGated) {
            if (p.residual == nullptr) return;
#pragma unroll
            for (int i = 0; i < kPartsOfStep; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int part = step * kPartsOfStep + i;
                    residual[i][h] = make_uint4(0, 0, 0, 0);
                    if (is_inside(part, h)) residual[i][h] = __ldcg(reinterpret_cast<const uint4*>(p.residual + at(part, h)));
                }
        }
    }
    __device__ __forceinline__ void write(const float (&sums)[kTileUnits / 2], int step) const {
#pragma unroll
        for (int i = 0; i < kPartsOfStep; ++i) {
            const int part = step * kPartsOfStep + i;
            uint32_t words[2][4], added[2][4] = {};
            if (!kGated && p.residual != nullptr) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4 r = residual[kGated ? 0 : i][h];
                    added[h][0] = r.x, added[h][1] = r.y, added[h][2] = r.z, added[h][3] = r.w;
                    transpose_quad(added[h], t);
                }
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const int unit = min(first + 32 * part + 8 * b + 2 * t, p.units - 2), from = (4 * part + b) * 4;
                const float2 w = __ldg(reinterpret_cast<const float2*>(p.weight_scale[0] + unit));
                if constexpr (kGated) {
                    const float2 u = __ldg(reinterpret_cast<const float2*>(p.weight_scale[1] + unit));
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float* gate = sums + from + 2 * h;
                        const float* up = gate + kTileUnits / 4;
                        words[h][b] = pack(gated(gate[0] * (x_scale[h] * w.x), up[0] * (x_scale[h] * u.x)),
                                           gated(gate[1] * (x_scale[h] * w.y), up[1] * (x_scale[h] * u.y)));
                    }
                } else {
                    const float2 bias =
                        p.bias == nullptr ? make_float2(0.f, 0.f) : unpack(__ldg(reinterpret_cast<const uint32_t*>(p.bias + unit)));
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float* sum = sums + from + 2 * h;
                        const float2 r = unpack(added[h][b]);
                        words[h][b] = pack(fmaf(sum[0], x_scale[h] * w.x, bias.x) + r.x, fmaf(sum[1], x_scale[h] * w.y, bias.y) + r.y);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                transpose_quad(words[h], t);
                if (is_inside(part, h))
                    __stcs(reinterpret_cast<uint4*>(p.out + at(part, h)), make_uint4(words[h][0], words[h][1], words[h][2], words[h][3]));
            }
        }
    }
};

#endif

// ---------------------------------------------------------------- kernel

template <bool kGated>
__global__ void __launch_bounds__(kTileThreads, 1) tile_gemm_kernel(const __grid_constant__ TileParams p) {
#if QWEN_RT_HAS_WGMMA
    extern __shared__ unsigned char unaligned[];
    const uint32_t base = (smem_address(unaligned) + 1023) / 1024 * 1024;
    const auto full = [&](int stage) { return base + kTileBarriers + stage * 8; };
    const auto empty = [&](int stage) { return base + kTileBarriers + (kTileStages + stage) * 8; };
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kTileWarpgroup, 0), thread = threadIdx.x % kTileWarpgroup;
    const int rank = static_cast<int>(cluster_rank());
    if (threadIdx.x == 0) {
        for (int s = 0; s < kTileStages; ++s) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 2 * kTileCluster);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    let_next_grid_start();
    wait_for_previous_grids();
    const int first_tile = blockIdx.x / kTileCluster, num_tiles = p.pairs * p.columns, step = gridDim.x / kTileCluster;

    if (group == 0) {
        give_registers<24>();
        if (thread == 0) {
            int stage = 0, parity = 1;
            for (int tile = first_tile; tile < num_tiles; tile += step) {
                const TilePlace place = place_of(p, tile);
                const int row = place.row + rank * kTileRows;
                const int unit = kGated ? place.column * kTileHalf : place.column * kTileUnits + rank * kTileHalf;
                for (int chunk = 0; chunk < p.chunks; ++chunk) {
                    const uint32_t to = base + stage * kTileStageBytes;
                    barrier_wait(empty(stage), parity);
                    barrier_expect(full(stage), kTileStageBytes);
                    copy_box(to, &p.x, chunk * kTileChunk, row, full(stage));
                    copy_box_to_blocks(to + kTileXBytes + rank * kTileHalf * kTileChunk, &p.weight[kGated ? rank : 0],
                                       chunk * kTileChunk, unit, full(stage), (1 << kTileCluster) - 1);
                    if (++stage == kTileStages) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<240>();
        const int mine = group - 1;
        const int warp = thread / 32, lane = thread % 32, t = lane % 4;
        const int my_row = rank * kTileRows + mine * 64 + warp * 16 + lane / 4;  // of the pair of tiles, the upper of two
        float products[kTileUnits / 2], sums[kTileUnits / 2];
#pragma unroll
        for (int i = 0; i < kTileUnits / 2; ++i) products[i] = 0.f, sums[i] = 0.f;
        int stage = 0, parity = 0, held = 0, num_held = 0;  // the next to be read; the oldest that is not released
        const auto start = [&](bool is_first) {
            barrier_wait(full(stage), parity);
            const uint64_t x = tile_descriptor(base + stage * kTileStageBytes + mine * 64 * kTileChunk);
            const uint64_t w = tile_descriptor(base + stage * kTileStageBytes + kTileXBytes);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) wgmma_fp8_n192(products, x + 2 * k, w + 2 * k, k > 0 || !is_first);
            wgmma_commit();
            ++num_held;
            if (++stage == kTileStages) stage = 0, parity ^= 1;
        };
        const auto release_but = [&](int kept) {
#pragma unroll 1
            for (; num_held > kept; --num_held) {
                if (thread < kTileCluster) barrier_arrive_at(empty(held), thread);
                if (++held == kTileStages) held = 0;
            }
        };
        TilePlace before = {0, 0};
        for (int tile = first_tile;; tile += step) {
            const bool is_tile = tile < num_tiles, is_written = tile != first_tile;
            int chunk = 0;
            TileWriter<kGated> writer(p, before.row + my_row, before.column, t);
            if (is_written) writer.load(0);
            if (is_tile) start(true), chunk = 1;
#pragma unroll
            for (int i = 0; i < kTileSteps; ++i) {
                if (is_tile && chunk < p.chunks) start(false), ++chunk;
                if (is_written) {
                    writer.write(sums, i);
                    if (i + 1 < kTileSteps) writer.load(i + 1);
                }
                wgmma_wait<1>();
                release_but(1);
            }
            if (!is_tile) {
                wgmma_wait<0>();
                break;
            }
            before = place_of(p, tile);
#pragma unroll
            for (int i = 0; i < kTileUnits / 2; ++i) sums[i] = 0.f;
            int end = min(mine == 0 ? kAddChunks : kAddChunks / 2 * 3, p.chunks);
            for (bool is_first = false;; is_first = true) {
                for (; chunk < end; ++chunk) {
                    start(is_first);
                    is_first = false;
                    wgmma_wait<1>();
                    release_but(1);
                }
                wgmma_wait<0>();
                pin(products);
                release_but(0);
#pragma unroll
                for (int i = 0; i < kTileUnits / 2; ++i) sums[i] += products[i];
                if (chunk == p.chunks) break;
                end = min(chunk + kAddChunks, p.chunks);
            }
        }
    }
    cluster_sync();  // the other block may still copy into this one's memory, and arrive at its barriers
#endif
}

// ---------------------------------------------------------------- launcher

namespace {

constexpr int kTileSm = 90;
constexpr int64_t kMostRowsOfTiles = int64_t{1} << 30;
constexpr int kPairsOfGroup = 8;  // 2048 rows

}  // namespace

bool has_tile_product(const Device& device, const TileProduct& p) {
    return device.sm == kTileSm && device.max_shared_bytes >= kTileSharedBytes && p.rows < kMostRowsOfTiles && p.k % 16 == 0 &&
           p.units % 8 == 0 && p.stride % 8 == 0;
}

int32_t multiply_tiles(const QwenRtCall& call, const Device& device, const TileProduct& product) {
    const bool is_gated = product.weight[1] != nullptr;
    TileParams p = {};
    bool is_made = encode_boxes(&p.x, product.x, product.rows, product.k, 1, kTileRows);
    for (int i = 0; i < (is_gated ? 2 : 1); ++i)
        is_made = is_made && encode_boxes(&p.weight[i], product.weight[i], product.units, product.k, 1, kTileHalf);
    if (!is_made) return refuse(call, QWEN_RT_CUDA_ERROR, "cuTensorMapEncodeTiled failed; expected a driver for CUDA 12 or newer");
    p.x_scale = product.x_scale;
    for (int i = 0; i < 2; ++i) p.weight_scale[i] = product.weight_scale[i];
    p.bias = product.bias, p.residual = product.residual, p.out = product.out, p.stride = product.stride;
    p.rows = static_cast<int>(product.rows), p.units = static_cast<int>(product.units);
    p.chunks = static_cast<int>((product.k + kTileChunk - 1) / kTileChunk);
    const int pair_rows = kTileRows * kTileCluster, tile_units = is_gated ? kTileHalf : kTileUnits;
    p.pairs = (p.rows + pair_rows - 1) / pair_rows, p.columns = (p.units + tile_units - 1) / tile_units;
    const int groups = (p.pairs + kPairsOfGroup - 1) / kPairsOfGroup;
    p.group = (p.pairs + groups - 1) / groups;
    const int64_t tiles = static_cast<int64_t>(p.pairs) * p.columns, most = device.num_sms / kTileCluster;
    const dim3 grid(static_cast<unsigned>((tiles < most ? tiles : most) * kTileCluster));
    return launch_clusters(call, is_gated ? tile_gemm_kernel<true> : tile_gemm_kernel<false>, device, grid,
                           kTileThreads, kTileSharedBytes, kTileCluster, p);
}

}  // namespace qwen_rt
