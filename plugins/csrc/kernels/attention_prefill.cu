// Attention of a prefill: sequences of any number of new tokens, over a paged cache that may hold earlier ones.
// Op, tensors, numerics: rope_kv_append_attention.cu.
//
// Two kernels: prefill_append turns keys and puts keys and values into the cache, and leaves the turned queries in `out`;
// the attention kernel reads a tile of queries from `out` and writes its result to the same place, which no other block uses.
// On SM 9.0 with blocks of 64 tokens attention runs in attention_prefill_sm90.cu; the kernel here serves every SM from 8.0.
// The attention kernel takes f16 as well as bf16: attention_prefill_8bit.cu makes that of a quantized cache.
//
// Mapping of prefill_append: one block of 128 threads per token, 16 bytes per thread and turn.
// Mapping of attention_prefill_kernel: grid (heads, tiles of 64 queries, longest first), 4 warps of 16 queries (FlashAttention-2):
//   tiles of 64 keys and values come by 16-byte async copies into two stages; scores, running maximum and sum in registers.
// A tile of queries belongs to one sequence, so a sequence's result does not depend on its batch mates.
// Preconditions (the launcher checks): block_size a multiple of 16. Positions of a sequence follow each other.
// Cost: 4 · D FLOPs per head, query and visible key; bound by the matrix units.
// Source: FlashAttention-2 (Dao 2023), algorithm 1.
#include "attention.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

struct PrefillParams {
    const bf16* qkv;
    const int64_t* positions;
    const int32_t* query_starts;
    const float* inv_freq;
    const int32_t* block_tables;
    bf16 *k_cache, *v_cache, *out;
    const float* v_offset;  // f32[kv_heads, D], added to the output; or null
    int64_t capacity;
    int rows, sequences, heads, kv_heads, block_size, max_blocks;
    float scale, rope_scaling;
};

constexpr int kAppendThreads = 128;
constexpr int kQueryTile = 64;
constexpr int kKeyTile = 64;

// ---------------------------------------------------------------- kernels

template <int kD>
__global__ void __launch_bounds__(kAppendThreads) prefill_append_kernel(const __grid_constant__ PrefillParams p) {
    __shared__ float2 cos_sin[kD / 2];
    __shared__ int sequence;
    const int row = blockIdx.x;
    wait_for_previous_grids();
    let_next_grid_start();
    const int64_t position = p.positions[row];
    // The one sequence that this row lies in: query_starts[sequence] <= row < query_starts[sequence + 1].
    for (int b = threadIdx.x; b < p.sequences; b += kAppendThreads)
        if (p.query_starts[b] <= row && row < p.query_starts[b + 1]) sequence = b;
    for (int i = threadIdx.x; i < kD / 2; i += kAppendThreads) {
        float sine, cosine;
        sincosf(static_cast<float>(position) * p.inv_freq[i], &sine, &cosine);
        cos_sin[i] = {cosine * p.rope_scaling, sine * p.rope_scaling};
    }
    __syncthreads();
    const bool is_inside = position >= 0 && position < p.capacity;
    const int64_t block =
        is_inside ? p.block_tables[static_cast<int64_t>(sequence) * p.max_blocks + position / p.block_size] : 0;
    const int64_t cache_at = (block * p.kv_heads * p.block_size + position % p.block_size) * kD;
    const bf16* qkv = p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD;
    bf16* out = p.out + static_cast<int64_t>(row) * p.heads * kD;

    constexpr int kPairs = kD / 16;  // 16-byte pieces of half a head
    for (int i = threadIdx.x; i < (p.heads + p.kv_heads) * kPairs; i += kAppendThreads) {
        const int head = i / kPairs, piece = i % kPairs;
        const uint4 low = load_activation(qkv + head * kD + piece * 8);
        const uint4 high = load_activation(qkv + head * kD + kD / 2 + piece * 8);
        const uint32_t x1[4] = {low.x, low.y, low.z, low.w}, x2[4] = {high.x, high.y, high.z, high.w};
        uint32_t y1[4], y2[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float2 a = cos_sin[piece * 8 + 2 * k], b = cos_sin[piece * 8 + 2 * k + 1];
            const float2 f1 = unpack(x1[k]), f2 = unpack(x2[k]);
            y1[k] = pack(f1.x * a.x - f2.x * a.y, f1.y * b.x - f2.y * b.y);
            y2[k] = pack(f2.x * a.x + f1.x * a.y, f2.y * b.x + f1.y * b.y);
        }
        bf16* to = nullptr;
        if (head < p.heads) to = out + head * kD;
        else if (is_inside) to = p.k_cache + cache_at + static_cast<int64_t>(head - p.heads) * p.block_size * kD;
        if (to != nullptr) {
            *reinterpret_cast<uint4*>(to + piece * 8) = make_uint4(y1[0], y1[1], y1[2], y1[3]);
            *reinterpret_cast<uint4*>(to + kD / 2 + piece * 8) = make_uint4(y2[0], y2[1], y2[2], y2[3]);
        }
    }
    if (is_inside)
        for (int i = threadIdx.x; i < p.kv_heads * kD / 8; i += kAppendThreads) {
            const int head = i / (kD / 8), piece = i % (kD / 8);
            *reinterpret_cast<uint4*>(p.v_cache + cache_at + static_cast<int64_t>(head) * p.block_size * kD + piece * 8) =
                load_activation(qkv + (p.heads + p.kv_heads + head) * kD + piece * 8);
        }
}

template <int kD>
struct PrefillShared {
    static constexpr int kQueryBytes = kQueryTile * kD * 2;
    static constexpr int kKeyBytes = kKeyTile * kD * 2;
    static constexpr int kBytes = kQueryBytes + 2 * 2 * kKeyBytes;
};

template <int kD, bool kHalf>
__global__ void __launch_bounds__(128) attention_prefill_kernel(const __grid_constant__ PrefillParams p) {
    using Shared = PrefillShared<kD>;
    constexpr int kChunks = kD / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    wait_for_previous_grids();
    let_next_grid_start();

    const QueryTile tile = find_query_tile<kQueryTile>(p.query_starts, p.sequences, gridDim.y - 1 - blockIdx.y);
    if (tile.num_rows == 0) return;
    bf16* out = p.out + (static_cast<int64_t>(tile.first_row) * p.heads + head) * kD;
    const int64_t stride = static_cast<int64_t>(p.heads) * kD;
    const int64_t first_position = p.positions[tile.first_row];
    if (first_position < 0 || first_position + tile.num_rows > p.capacity) {
        const bf16 value = __float2bfloat16(first_position < 0 ? 0.f : __uint_as_float(0x7fc00000u));
        for (int i = threadIdx.x; i < tile.num_rows * kD; i += 128) out[i / kD * stride + i % kD] = value;
        return;
    }
    const int32_t* table = p.block_tables + static_cast<int64_t>(tile.sequence) * p.max_blocks;
    const int num_keys = static_cast<int>(first_position) + tile.num_rows;
    const int num_tiles = (num_keys + kKeyTile - 1) / kKeyTile;
    const uint32_t base = smem_address(shared);

    auto load_tile = [&](int index) {
        if (index < num_tiles) {
            const uint32_t keys = base + Shared::kQueryBytes + (index & 1) * 2 * Shared::kKeyBytes;
#pragma unroll
            for (int i = 0; i < kKeyTile * kChunks / 128; ++i) {
                const int chunk = (i * 128 + static_cast<int>(threadIdx.x)) % kChunks;
                const int token = (i * 128 + static_cast<int>(threadIdx.x)) / kChunks, at = index * kKeyTile + token;
                const uint32_t to = keys + swizzled<kD>(token, chunk);
                if (at < num_keys) {
                    const int64_t from = ((static_cast<int64_t>(table[at / p.block_size]) * p.kv_heads + kv_head) * p.block_size +
                                          at % p.block_size) * kD + chunk * 8;
                    copy16_async(to, p.k_cache + from);
                    copy16_async(to + Shared::kKeyBytes, p.v_cache + from);
                } else {
                    store_shared(to, make_uint4(0, 0, 0, 0));
                    store_shared(to + Shared::kKeyBytes, make_uint4(0, 0, 0, 0));
                }
            }
        }
        commit_copies();
    };
    for (int i = threadIdx.x; i < kQueryTile * kChunks; i += 128) {
        const int row = i / kChunks, chunk = i % kChunks;
        if (row < tile.num_rows) copy16_async(base + swizzled<kD>(row, chunk), out + row * stride + chunk * 8);
        else store_shared(base + swizzled<kD>(row, chunk), make_uint4(0, 0, 0, 0));
    }
    load_tile(0);
    load_tile(1);

    float sums[kD / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
    const float scale = p.scale * kLog2e;
    uint32_t query[kD / 16][4];
    for (int index = 0; index < num_tiles; ++index) {
        wait_copies<1>();
        __syncthreads();
        if (index == 0)
#pragma unroll
            for (int k = 0; k < kD / 16; ++k)
                load_matrices(query[k], base + swizzled<kD>(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));
        const uint32_t keys = base + Shared::kQueryBytes + (index & 1) * 2 * Shared::kKeyBytes;
        const uint32_t values = keys + Shared::kKeyBytes;
        float score[kKeyTile / 8][4] = {};
#pragma unroll
        for (int k = 0; k < kD / 16; ++k)
#pragma unroll
            for (int n = 0; n < kKeyTile / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, keys + swizzled<kD>(n * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
                mma_16<kHalf>(score[2 * n], query[k][0], query[k][1], query[k][2], query[k][3], b[0], b[1]);
                mma_16<kHalf>(score[2 * n + 1], query[k][0], query[k][1], query[k][2], query[k][3], b[2], b[3]);
            }
        const int first = index * kKeyTile;
        const bool is_masked = first + kKeyTile - 1 > first_position + warp * 16;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int visible = static_cast<int>(first_position) + warp * 16 + g + 8 * h;
            float highest = maximum[h];
#pragma unroll
            for (int n = 0; n < kKeyTile / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n][2 * h + i];
                    if (is_masked && first + n * 8 + 2 * t + i > visible) s = -INFINITY;
                    highest = fmaxf(highest, s);
                }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));  // finite: every row sees token 0, in tile 0
            const float shrink = exp2f((maximum[h] - highest) * scale);
            maximum[h] = highest;
            total[h] *= shrink;
#pragma unroll
            for (int d = 0; d < kD / 8; ++d) sums[d][2 * h] *= shrink, sums[d][2 * h + 1] *= shrink;
            const float offset = highest * scale;
#pragma unroll
            for (int n = 0; n < kKeyTile / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n][2 * h + i];
                    s = exp2f(fmaf(s, scale, -offset));
                    total[h] += s;
                }
        }
#pragma unroll
        for (int n = 0; n < kKeyTile / 16; ++n) {
            const float(&s0)[4] = score[2 * n], (&s1)[4] = score[2 * n + 1];
            const uint32_t a0 = pack_16<kHalf>(s0[0], s0[1]), a1 = pack_16<kHalf>(s0[2], s0[3]);
            const uint32_t a2 = pack_16<kHalf>(s1[0], s1[1]), a3 = pack_16<kHalf>(s1[2], s1[3]);
#pragma unroll
            for (int d = 0; d < kD / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(b, values + swizzled<kD>(n * 16 + (lane & 15), 2 * d + (lane >> 4)));
                mma_16<kHalf>(sums[2 * d], a0, a1, a2, a3, b[0], b[1]);
                mma_16<kHalf>(sums[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
        __syncthreads();
        load_tile(index + 2);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        const int row = warp * 16 + g + 8 * h;
        if (row >= tile.num_rows) continue;
        const float f = 1.f / total[h];
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
            const float2 o = offset_pair(p.v_offset, kv_head * kD + d * 8 + 2 * t);
            *reinterpret_cast<uint32_t*>(out + row * stride + d * 8 + 2 * t) =
                pack(fmaf(sums[d][2 * h], f, o.x), fmaf(sums[d][2 * h + 1], f, o.y));
        }
    }
}

// ---------------------------------------------------------------- launcher

namespace {

PrefillParams params_of(const AttentionArguments& a) {
    PrefillParams p = {};
    p.qkv = a.qkv;
    p.positions = a.positions;
    p.query_starts = a.query_starts;
    p.inv_freq = a.inv_freq;
    p.block_tables = a.block_tables;
    p.k_cache = static_cast<bf16*>(a.k_cache);
    p.v_cache = static_cast<bf16*>(a.v_cache);
    p.out = a.out;
    p.v_offset = a.v_offset;
    p.capacity = a.capacity;
    p.rows = static_cast<int>(a.rows);
    p.sequences = static_cast<int>(a.sequences);
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.block_size = a.block_size;
    p.max_blocks = a.max_blocks;
    p.scale = a.scale;
    p.rope_scaling = a.rope_scaling;
    return p;
}

template <int kD, bool kHalf>
int32_t launch_general(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.rows / kQueryTile + a.sequences));
    return launch(call, attention_prefill_kernel<kD, kHalf>, device, grid, 128, PrefillShared<kD>::kBytes, params_of(a));
}

}  // namespace

int32_t launch_attention_over_cache(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    if (a.block_size == kKeyTile && device.sm == 90) return launch_attention_prefill_sm90(call, device, a);
    if (a.kv_format == KvFormat::kBf16)
        return a.head_dim == 64 ? launch_general<64, false>(call, device, a) : launch_general<128, false>(call, device, a);
    return a.head_dim == 64 ? launch_general<64, true>(call, device, a) : launch_general<128, true>(call, device, a);
}

int32_t launch_attention_prefill(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    const dim3 grid(static_cast<unsigned>(a.rows));
    const int32_t status =
        a.head_dim == 64 ? launch(call, prefill_append_kernel<64>, device, grid, kAppendThreads, 0, params_of(a))
                         : launch(call, prefill_append_kernel<128>, device, grid, kAppendThreads, 0, params_of(a));
    return status != QWEN_RT_OK ? status : launch_attention_over_cache(call, device, a);
}

}  // namespace qwen_rt
