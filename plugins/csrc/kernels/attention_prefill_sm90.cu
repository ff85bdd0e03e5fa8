// Attention of a prefill on SM 9.0: wgmma fed by the tensor copy engine from the paged cache.
// Op, tensors, numerics: rope_kv_append_attention.cu. The queries are turned already and stand in `out`. Queries, keys and
// values are bf16, or all f16 (kHalf: of a quantized cache, see attention_prefill_8bit.cu), and so are the probabilities.
//
// Mapping: grid (heads, tiles of 128 queries, longest first), 3 warpgroups. The first one's first thread copies: the tile of
//   queries once, then tiles of 128 keys and 128 values (two cache blocks each) into rings of two stages. The other two
//   own 64 queries each: scores in registers by wgmma from shared memory, then softmax, then probabilities (registers) times
//   values (shared memory). The products of the next tile's scores are under way while a warpgroup computes the exponentials
//   of this one's, and the two warpgroups overlap each other.
// Layout: a cache block of one kv head is 64 contiguous rows of D, so the cache is one matrix [blocks · kv_heads · 64, D] to the
//   copy engine; boxes of 64 rows x 64 columns arrive swizzled as wgmma reads them. 160 KB of shared memory for D = 128.
// Masking: only tiles that reach past the warpgroup's first query compare positions. Rows of values after the last token may
//   hold anything (NaN too): they are set to zero in shared memory before the product.
// In place: a block copies its tile of queries before it writes to the same rows; no other block reads these rows for their value.
// Preconditions (the launcher checks): block_size 64.
// Cost: 4 · D FLOPs per head, query and visible key; bound by the matrix units.
// Figures and what was tried: docs/performance-gpu-kernels.md.
// Source: FlashAttention-3 (Shah et al. 2024), section 3.
#include "../common/tensor_map.cuh"
#include "../common/wgmma.cuh"
#include "attention.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

struct PrefillSm90Params {
    CUtensorMap queries, keys, values;
    const int64_t* positions;
    const int32_t *query_starts, *block_tables;
    bf16* out;
    const float* v_offset;  // f32[kv_heads, D], added to the output; or null
    int64_t capacity;
    int sequences, heads, kv_heads, max_blocks;
    float scale;
};

constexpr int kBlockTokens = 64;
constexpr int kTileRows = 128;    // queries of a block, and keys of a tile
constexpr int kTileStages = 2;
constexpr int kWarpgroup = 128;
constexpr int kPrefillThreads = 3 * kWarpgroup;
[[maybe_unused]] constexpr int kPanelBytes = kTileRows * 128;  // 64 columns of a tile

template <int kD>
struct PrefillSm90Shared {
    static constexpr int kTileBytes = kTileRows * kD * 2;
    static constexpr int kKeys = kTileBytes, kValues = kKeys + kTileStages * kTileBytes;
    static constexpr int kBarriers = kValues + kTileStages * kTileBytes;
    static constexpr int kBytes = kBarriers + 128 + 1024;  // the tiles start at a multiple of 1024
};

enum Barrier { kQueriesFull, kKeysFull, kValuesFull = kKeysFull + kTileStages, kKeysEmpty = kValuesFull + kTileStages,
               kValuesEmpty = kKeysEmpty + kTileStages };

// ---------------------------------------------------------------- kernel

template <int kD, bool kHalf>
__global__ void __launch_bounds__(kPrefillThreads, 1) attention_prefill_sm90_kernel(const __grid_constant__ PrefillSm90Params p) {
#if QWEN_RT_HAS_WGMMA
    using Shared = PrefillSm90Shared<kD>;
    constexpr int kPanels = kD / 64;
    extern __shared__ unsigned char unaligned[];
    const uint32_t base = (smem_address(unaligned) + 1023) / 1024 * 1024;
    const auto barrier = [&](int which) { return base + Shared::kBarriers + which * 8; };
    const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
    if (threadIdx.x == 0) {
        barrier_init(barrier(kQueriesFull), 1);
        for (int s = 0; s < kTileStages; ++s) {
            barrier_init(barrier(kKeysFull + s), 1);
            barrier_init(barrier(kValuesFull + s), 1);
            barrier_init(barrier(kKeysEmpty + s), 2);
            barrier_init(barrier(kValuesEmpty + s), 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_previous_grids();
    let_next_grid_start();

    const int head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    const QueryTile tile = find_query_tile<kTileRows>(p.query_starts, p.sequences, gridDim.y - 1 - blockIdx.y);
    if (tile.num_rows == 0) return;
    const int64_t first_position = p.positions[tile.first_row];
    const int64_t stride = static_cast<int64_t>(p.heads) * kD;
    bf16* out = p.out + tile.first_row * stride + head * kD;
    if (first_position < 0 || first_position + tile.num_rows > p.capacity) {
        const bf16 value = __float2bfloat16(first_position < 0 ? 0.f : __uint_as_float(0x7fc00000u));
        for (int i = threadIdx.x; i < tile.num_rows * kD; i += kPrefillThreads) out[i / kD * stride + i % kD] = value;
        return;
    }
    const int num_keys = static_cast<int>(first_position) + tile.num_rows;
    const int num_tiles = (num_keys + kTileRows - 1) / kTileRows;

    if (group == 0) {
        give_registers<40>();
        if (thread != 0) return;
        const int32_t* table = p.block_tables + static_cast<int64_t>(tile.sequence) * p.max_blocks;
        barrier_expect(barrier(kQueriesFull), Shared::kTileBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            copy_box(base + panel * kPanelBytes, &p.queries, head * kD + panel * 64, tile.first_row, barrier(kQueriesFull));
        for (int index = 0; index < num_tiles; ++index) {
            const int stage = index % kTileStages, parity = index / kTileStages & 1;
            const int num_blocks = min(2, (num_keys - index * kTileRows + kBlockTokens - 1) / kBlockTokens);
            int row[2];
            for (int b = 0; b < num_blocks; ++b) row[b] = (table[index * 2 + b] * p.kv_heads + kv_head) * kBlockTokens;
            const auto copy = [&](uint32_t to, const CUtensorMap* map, uint32_t full) {
                barrier_expect(full, num_blocks * kBlockTokens * kD * 2);
                for (int b = 0; b < num_blocks; ++b)
#pragma unroll
                    for (int panel = 0; panel < kPanels; ++panel)
                        copy_box(to + panel * kPanelBytes + b * kBlockTokens * 128, map, panel * 64, row[b], full);
            };
            barrier_wait(barrier(kKeysEmpty + stage), parity ^ 1);
            copy(base + Shared::kKeys + stage * Shared::kTileBytes, &p.keys, barrier(kKeysFull + stage));
            barrier_wait(barrier(kValuesEmpty + stage), parity ^ 1);
            copy(base + Shared::kValues + stage * Shared::kTileBytes, &p.values, barrier(kValuesFull + stage));
        }
        return;
    }

    take_registers<232>();
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int first_row = (group - 1) * 64;  // of the warpgroup's queries in the tile
    const int my_position = static_cast<int>(first_position) + first_row + warp * 16 + g;  // of the upper of two rows
    const float scale = p.scale * kLog2e;

    float score[64], sums[kD / 2];
    uint32_t probability[kTileRows / 16][4];
    float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, shrink[2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) sums[i] = 0.f;

    const auto start_scores = [&](int stage) {
        wgmma_fence();
        pin(score);
#pragma unroll
        for (int k = 0; k < kD / 16; ++k) {
            const uint32_t at = k / 4 * kPanelBytes + k % 4 * 32;
            wgmma_m64n128<kHalf>(score, tile_descriptor(base + first_row * 128 + at),
                          tile_descriptor(base + Shared::kKeys + stage * Shared::kTileBytes + at), k > 0);
        }
        wgmma_commit();
    };
    const auto start_values = [&](int stage) {
        wgmma_fence();
        pin(sums);
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k)
            wgmma_registers<kHalf>(
                sums, probability[k],
                tile_descriptor(base + Shared::kValues + stage * Shared::kTileBytes + k * 16 * 128, kPanelBytes));
        wgmma_commit();
    };
    // Scores become exponentials in place; `shrink` is what earlier sums have to be multiplied by.
    const auto softmax = [&](int index) {
        const int first = index * kTileRows;
        const bool is_masked = first + kTileRows - 1 > static_cast<int>(first_position) + first_row + warp * 16;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (is_masked) {
                const int visible = my_position + 8 * h - first - 2 * t;
#pragma unroll
                for (int n = 0; n < 16; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (n * 8 + i > visible) score[n * 4 + 2 * h + i] = -INFINITY;
            }
            float highest = maximum[h];
#pragma unroll
            for (int n = 0; n < 16; ++n) highest = fmaxf(highest, fmaxf(score[n * 4 + 2 * h], score[n * 4 + 2 * h + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));  // finite: every row sees token 0, in tile 0
            shrink[h] = exp2f((maximum[h] - highest) * scale);
            maximum[h] = highest;
            const float offset = highest * scale;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 16; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n * 4 + 2 * h + i];
                    s = exp2f(fmaf(s, scale, -offset));
                    sum += s;
                }
            total[h] = fmaf(total[h], shrink[h], sum);
        }
    };
    const auto round_probabilities = [&] {
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                probability[k][i] =
                    pack_16<kHalf>(score[(2 * k + i / 2) * 4 + i % 2 * 2], score[(2 * k + i / 2) * 4 + i % 2 * 2 + 1]);
    };
    const auto shrink_sums = [&] {
#pragma unroll
        for (int d = 0; d < kD / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[d * 4 + i] *= shrink[i / 2];
    };
    const auto release = [&](int which) {
        if (thread == 0) barrier_arrive(barrier(which));
    };
    // The rows of the last tile that lie after the last token.
    const auto clear_values = [&](int stage, int index) {
        const int used = num_keys - index * kTileRows;
        if (used >= kTileRows) return;
        const uint32_t values = base + Shared::kValues + stage * Shared::kTileBytes;
        for (int i = thread; i < (kTileRows - used) * kD / 8; i += kWarpgroup) {
            const int row = used + i / (kD / 8), chunk = i % (kD / 8);
            store_shared(values + chunk / 8 * kPanelBytes + row * 128 + chunk % 8 * 16, make_uint4(0, 0, 0, 0));
        }
        fence_async_proxy();
        asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
    };

    barrier_wait(barrier(kQueriesFull), 0);
    barrier_wait(barrier(kKeysFull), 0);
    start_scores(0);
    wgmma_wait<0>();
    pin(score);
    release(kKeysEmpty);
    softmax(0);
    round_probabilities();
    for (int index = 1; index < num_tiles; ++index) {
        const int stage = index % kTileStages, before = (index - 1) % kTileStages;
        barrier_wait(barrier(kKeysFull + stage), index / kTileStages & 1);
        start_scores(stage);
        barrier_wait(barrier(kValuesFull + before), (index - 1) / kTileStages & 1);
        start_values(before);
        wgmma_wait<1>();
        pin(score);
        release(kKeysEmpty + stage);
        softmax(index);
        wgmma_wait<0>();
        pin(sums);
        release(kValuesEmpty + before);
        shrink_sums();
        round_probabilities();
    }
    {
        const int index = num_tiles - 1, stage = index % kTileStages;
        barrier_wait(barrier(kValuesFull + stage), index / kTileStages & 1);
        clear_values(stage, index);
        start_values(stage);
        wgmma_wait<0>();
        pin(sums);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        const int row = first_row + warp * 16 + g + 8 * h;
        if (row >= tile.num_rows) continue;
        const float f = 1.f / total[h];
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
            const float2 o = offset_pair(p.v_offset, kv_head * kD + d * 8 + 2 * t);
            *reinterpret_cast<uint32_t*>(out + row * stride + d * 8 + 2 * t) =
                pack(fmaf(sums[d * 4 + 2 * h], f, o.x), fmaf(sums[d * 4 + 2 * h + 1], f, o.y));
        }
    }
#endif
}

// ---------------------------------------------------------------- launcher

namespace {

template <int kD, bool kHalf>
int32_t launch_sm90(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    PrefillSm90Params p = {};
    const int64_t cache_rows = a.num_blocks * a.kv_heads * kBlockTokens;
    if (!encode_boxes(&p.queries, a.out, a.rows, static_cast<int64_t>(a.heads) * kD, 2, kTileRows) ||
        !encode_boxes(&p.keys, a.k_cache, cache_rows, kD, 2, kBlockTokens) ||
        !encode_boxes(&p.values, a.v_cache, cache_rows, kD, 2, kBlockTokens))
        return refuse(call, QWEN_RT_CUDA_ERROR, "cuTensorMapEncodeTiled failed; expected a driver for CUDA 12 or newer");
    p.positions = a.positions;
    p.query_starts = a.query_starts;
    p.block_tables = a.block_tables;
    p.out = a.out;
    p.v_offset = a.v_offset;
    p.capacity = a.capacity;
    p.sequences = static_cast<int>(a.sequences);
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.max_blocks = a.max_blocks;
    p.scale = a.scale;
    const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.rows / kTileRows + a.sequences));
    return launch(call, attention_prefill_sm90_kernel<kD, kHalf>, device, grid, kPrefillThreads, PrefillSm90Shared<kD>::kBytes, p);
}

}  // namespace

int32_t launch_attention_prefill_sm90(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    if (a.num_blocks * a.kv_heads * kBlockTokens > INT32_MAX)
        return refuse(call, QWEN_RT_UNSUPPORTED, "num_blocks=%lld; expected fewer than 2^31 cache rows", (long long)a.num_blocks);
    if (a.kv_format == KvFormat::kBf16)
        return a.head_dim == 64 ? launch_sm90<64, false>(call, device, a) : launch_sm90<128, false>(call, device, a);
    return a.head_dim == 64 ? launch_sm90<64, true>(call, device, a) : launch_sm90<128, true>(call, device, a);
}

}  // namespace qwen_rt
