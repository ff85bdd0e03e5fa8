// Attention of a decode step over a bf16 cache: one new token per row, split over the tokens of the row ("split-KV").
// Op, tensors, numerics: rope_kv_append_attention.cu.
//
// Mapping: grid (pieces, kv_heads, rows), 8 warps. One block serves all heads of one kv head (heads / kv_heads <= 16, the
//   rows of the matrix tile) over one piece of the tokens, or over every n-th where there are more than fit on the GPU; each
//   warp takes every eighth tile of 16 tokens through its own ring of tiles in shared memory (16-byte async copies, chunks
//   swizzled by row) with a running maximum and sum. The warps combine in shared memory; of several pieces, the block that
//   ends last combines all in order (attention_combine.cuh).
// Stages: 3 tiles per warp where blocks have an SM each (192 KB of ring for D = 128: enough bytes in flight for all of the
//   memory's bandwidth); fewer where there are more blocks than SMs, so that two blocks share one.
// A row's result depends on its own length only: pieces are cut and combined by a rule of (p, kv_heads, the GPU's SM count),
//   tiles go to warps by their number, so batch mates, stages and max_length do not change a bit.
// Overlap: earlier tokens are loaded before the wait: the step before wrote them (see embed.cu). The next kernel is let in
//   at once: it only prefetches weights.
// Workspace: counters, then f32 sums of every piece.
// Source: split-KV after Flash-Decoding.
#include "attention.cuh"
#include "attention_combine.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

constexpr int kTile = 16;  // tokens of a warp's tile

struct AttentionParams {
    const bf16* qkv;
    const int64_t* positions;
    const float* inv_freq;
    const int32_t* block_tables;
    bf16 *k_cache, *v_cache, *out;
    float* partial;       // [rows, kv_heads, max_pieces, group, D]
    float2* partial_max;  // [rows, kv_heads, max_pieces, group]: maximum and sum
    uint32_t* counters;   // [rows, kv_heads]
    int heads, kv_heads, group, block_size, max_blocks, max_pieces;
    float scale, rope_scaling;
};

template <int kD, int kStages>
struct AttentionShared {
    static constexpr int kTileBytes = kTile * kD * 2;
    static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // of a warp; holds its f32[16, D] sums at the end
    static constexpr int kQuery = kAttentionWarps * kRingBytes;
    static constexpr int kNewKey = kQuery + kTileBytes;
    static constexpr int kNewValue = kNewKey + kD * 2;
    static constexpr int kCosSin = kNewValue + kD * 2;
    static constexpr int kMaxSum = kCosSin + kD / 2 * 8;  // float2[warps][16]
    static constexpr int kBytes = kMaxSum + kAttentionWarps * kMaxGroup * 8;
};

// ---------------------------------------------------------------- kernel

template <int kD, int kStages>
__global__ void __launch_bounds__(kAttentionWarps * 32, kStages < 3 ? 2 : 1)
    attention_decode_kernel(const __grid_constant__ AttentionParams p) {
    using Shared = AttentionShared<kD, kStages>;
    constexpr int kThreads = kAttentionWarps * 32;
    constexpr int kChunks = kD / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ bool is_last;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y;
    int piece = blockIdx.x;
    let_next_grid_start();

    const int64_t position = p.positions[row];
    const int64_t capacity = static_cast<int64_t>(p.max_blocks) * p.block_size;
    bf16* out = p.out + (static_cast<int64_t>(row) * p.heads + kv_head * p.group) * kD;
    if (position < 0 || position >= capacity) {
        wait_for_previous_grids();
        const bf16 value = __float2bfloat16(position < 0 ? 0.f : __uint_as_float(0x7fc00000u));
        if (piece == 0)
            for (int i = threadIdx.x; i < p.group * kD; i += kThreads) out[i] = value;
        return;
    }
    const int length = static_cast<int>(position) + 1;
    const int piece_tokens = piece_of(length, p.max_pieces);
    const int num_pieces = (length + piece_tokens - 1) / piece_tokens;
    if (piece >= num_pieces) return;
    const bool owns_new = (num_pieces - 1 - piece) % static_cast<int>(gridDim.x) == 0;  // its last piece ends the row

    const uint64_t policy = evict_first_policy();
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * Shared::kRingBytes;
    const int32_t* table = p.block_tables + static_cast<int64_t>(row) * p.max_blocks;
    int begin, end, num_tiles;  // of the piece; tiles of this warp

    // The block of the next tile is looked up one tile ahead, so that no copy waits for its address.
    const auto first_token = [&](int index) { return begin + (index * kAttentionWarps + warp) * kTile; };
    int64_t next_block;
    // Earlier tokens come from the cache; the new one and what lies behind it is zero until it is put in.
    auto load_tile = [&](int index) {
        if (index < num_tiles) {
            const int first = first_token(index);
            const int64_t at = ((next_block * p.kv_heads + kv_head) * p.block_size + first % p.block_size) * kD;
            if (index + 1 < num_tiles) next_block = table[first_token(index + 1) / p.block_size];
            const uint32_t keys = ring + index % kStages * 2 * Shared::kTileBytes, values = keys + Shared::kTileBytes;
            const int num_old = min(kTile, static_cast<int>(position) - first);
#pragma unroll
            for (int i = 0; i < kTile * kChunks / 32; ++i) {
                const int chunk = (i * 32 + lane) % kChunks, token = (i * 32 + lane) / kChunks;
                const uint32_t to = swizzled<kD>(token, chunk);
                const int64_t from = at + token * kD + chunk * 8;
                if (token < num_old) {
                    copy16_async(keys + to, p.k_cache + from, policy);
                    copy16_async(values + to, p.v_cache + from, policy);
                } else {
                    store_shared(keys + to, make_uint4(0, 0, 0, 0));
                    store_shared(values + to, make_uint4(0, 0, 0, 0));
                }
            }
        }
        commit_copies();
    };
    const auto start_piece = [&] {
        begin = piece * piece_tokens;
        end = min(length, begin + piece_tokens);
        num_tiles = ((end - begin + kTile - 1) / kTile - warp + kAttentionWarps - 1) / kAttentionWarps;
        next_block = num_tiles > 0 ? table[first_token(0) / p.block_size] : 0;
#pragma unroll
        for (int i = 0; i < kStages; ++i) load_tile(i);
    };
    start_piece();

    float2* cos_sin = reinterpret_cast<float2*>(shared + Shared::kCosSin);
    for (int i = threadIdx.x; i < kD / 2; i += kThreads) {
        float sine, cosine;
        sincosf(static_cast<float>(position) * p.inv_freq[i], &sine, &cosine);
        cos_sin[i] = {cosine * p.rope_scaling, sine * p.rope_scaling};
    }
    __syncthreads();
    wait_for_previous_grids();

    // Query heads into a swizzled bf16[16, D] tile, zero below the group.
    const bf16* qkv = p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD;
    auto turn = [&](const bf16* head, int i, uint32_t& first, uint32_t& second) {
        const uint32_t low = __ldcg(reinterpret_cast<const uint32_t*>(head) + i);
        const uint32_t high = __ldcg(reinterpret_cast<const uint32_t*>(head) + kD / 4 + i);
        const float2 x1 = unpack(low), x2 = unpack(high), a = cos_sin[2 * i], b = cos_sin[2 * i + 1];
        first = pack(x1.x * a.x - x2.x * a.y, x1.y * b.x - x2.y * b.y);
        second = pack(x2.x * a.x + x1.x * a.y, x2.y * b.x + x1.y * b.y);
    };
#pragma unroll 4
    for (int i = threadIdx.x; i < kMaxGroup * kD / 4; i += kThreads) {
        const int head = i / (kD / 4), pair = i % (kD / 4);  // elements 2 pair, 2 pair + 1 and their partners
        uint32_t first = 0, second = 0;
        if (head < p.group) turn(qkv + (kv_head * p.group + head) * kD, pair, first, second);
        unsigned char* q = shared + Shared::kQuery;
        *reinterpret_cast<uint32_t*>(q + swizzled<kD>(head, pair / 4) + pair % 4 * 4) = first;
        *reinterpret_cast<uint32_t*>(q + swizzled<kD>(head, pair / 4 + kChunks / 2) + pair % 4 * 4) = second;
    }
    if (owns_new) {
        const int64_t at = ((static_cast<int64_t>(table[position / p.block_size]) * p.kv_heads + kv_head) * p.block_size +
                            position % p.block_size) * kD;
        uint32_t* new_key = reinterpret_cast<uint32_t*>(shared + Shared::kNewKey);
        uint32_t* new_value = reinterpret_cast<uint32_t*>(shared + Shared::kNewValue);
        if (threadIdx.x < kD / 4) {
            const int pair = threadIdx.x;
            uint32_t first, second;
            turn(qkv + (p.heads + kv_head) * kD, pair, first, second);
            uint32_t* to = reinterpret_cast<uint32_t*>(p.k_cache + at);
            new_key[pair] = to[pair] = first;
            new_key[pair + kD / 4] = to[pair + kD / 4] = second;
        } else if (threadIdx.x >= 64 && threadIdx.x < 64 + kD / 2) {
            const int pair = static_cast<int>(threadIdx.x) - 64;
            const auto* from = reinterpret_cast<const uint32_t*>(qkv + (p.heads + p.kv_heads + kv_head) * kD);
            new_value[pair] = reinterpret_cast<uint32_t*>(p.v_cache + at)[pair] = __ldcg(from + pair);
        }
    }
    __syncthreads();

    uint32_t query[kD / 16][4];
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
        load_matrices(query[k], base + Shared::kQuery + swizzled<kD>(lane & 15, 2 * k + (lane >> 4)));

    const float scale = p.scale * kLog2e;
    int num_done = 0;
    while (true) {
        float sums[kD / 8][4];
#pragma unroll
        for (int d = 0; d < kD / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[d][i] = 0.f;
        float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};  // of rows g and g + 8, in units of log2

        for (int index = 0; index < num_tiles; ++index) {
            wait_copies<kStages - 1>();
            __syncwarp();
            const int first = first_token(index);
            const uint32_t keys = ring + index % kStages * 2 * Shared::kTileBytes, values = keys + Shared::kTileBytes;
            if (position - first < kTile) {  // the last tile: put the new token in
                const int token = static_cast<int>(position) - first;
                if (lane < kChunks) {
                    store_shared(keys + swizzled<kD>(token, lane), load_shared(base + Shared::kNewKey + lane * 16));
                    store_shared(values + swizzled<kD>(token, lane), load_shared(base + Shared::kNewValue + lane * 16));
                }
                __syncwarp();
            }
            float score[2][4] = {};
#pragma unroll
            for (int k = 0; k < kD / 16; ++k) {
                uint32_t b[4];
                load_matrices(b, keys + swizzled<kD>((lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
                mma_bf16(score[0], query[k][0], query[k][1], query[k][2], query[k][3], b[0], b[1]);
                mma_bf16(score[1], query[k][0], query[k][1], query[k][2], query[k][3], b[2], b[3]);
            }
            float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = first + n * 8 + 2 * t + (i & 1);
                    score[n][i] = token < end ? score[n][i] * scale : -INFINITY;
                    highest[i >> 1] = fmaxf(highest[i >> 1], score[n][i]);
                }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 1));
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 2));
                const float shrink = exp2f(maximum[h] - highest[h]);  // a tile has one visible token at least: finite
                maximum[h] = highest[h];
                total[h] *= shrink;
#pragma unroll
                for (int d = 0; d < kD / 8; ++d) sums[d][2 * h] *= shrink, sums[d][2 * h + 1] *= shrink;
            }
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[n][i] = exp2f(score[n][i] - maximum[i >> 1]);
                    total[i >> 1] += score[n][i];
                }
            const uint32_t a0 = pack(score[0][0], score[0][1]), a1 = pack(score[0][2], score[0][3]);
            const uint32_t a2 = pack(score[1][0], score[1][1]), a3 = pack(score[1][2], score[1][3]);
#pragma unroll
            for (int d = 0; d < kD / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(b, values + swizzled<kD>(lane & 15, 2 * d + (lane >> 4)));
                mma_bf16(sums[2 * d], a0, a1, a2, a3, b[0], b[1]);
                mma_bf16(sums[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
            __syncwarp();
            load_tile(index + kStages);
        }
        wait_copies<0>();
        __syncwarp();

        // The warps' sums become one.
        float2* max_sum = reinterpret_cast<float2*>(shared + Shared::kMaxSum);
        float* mine = reinterpret_cast<float*>(shared + warp * Shared::kRingBytes);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            total[h] += __shfl_xor_sync(~0u, total[h], 1);
            total[h] += __shfl_xor_sync(~0u, total[h], 2);
            if (t == 0) max_sum[warp * kMaxGroup + g + 8 * h] = {maximum[h], total[h]};
#pragma unroll
            for (int d = 0; d < kD / 8; ++d)
                if (g + 8 * h < p.group)
                    *reinterpret_cast<float2*>(mine + (g + 8 * h) * kD + d * 8 + 2 * t) = {sums[d][2 * h], sums[d][2 * h + 1]};
        }
        __syncthreads();
        const int64_t slot = (static_cast<int64_t>(row) * p.kv_heads + kv_head) * p.max_pieces + piece;
        for (int i = threadIdx.x; i < p.group * kD / 4; i += kThreads) {
            const int head = i / (kD / 4), d = i % (kD / 4) * 4;
            float highest = -INFINITY;
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, max_sum[w * kMaxGroup + head].x);
            float4 sum = {0.f, 0.f, 0.f, 0.f};
            float weight_sum = 0.f;
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) {
                const float2 of_warp = max_sum[w * kMaxGroup + head];
                const float factor = exp2f(of_warp.x - highest);
                const float4 v = *reinterpret_cast<const float4*>(shared + w * Shared::kRingBytes + (head * kD + d) * 4);
                weight_sum = fmaf(of_warp.y, factor, weight_sum);
                sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
                sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
            }
            if (num_pieces == 1) {
                const float f = 1.f / weight_sum;
                *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(sum.x * f, sum.y * f), pack(sum.z * f, sum.w * f)};
            } else {
                __stcg(reinterpret_cast<float4*>(p.partial + (slot * p.group + head) * kD + d), sum);
                if (d == 0) __stcg(p.partial_max + slot * p.group + head, make_float2(highest, weight_sum));
            }
        }
        if (num_pieces == 1) return;
        ++num_done;
        piece += static_cast<int>(gridDim.x);
        __syncthreads();
        if (piece >= num_pieces) break;
        start_piece();
    }

    // The block that ends last combines all pieces, in order.
    if (threadIdx.x == 0) {
        uint32_t* counter = p.counters + row * p.kv_heads + kv_head;
        is_last = add_in_order(counter, num_done) == static_cast<uint32_t>(num_pieces - num_done);
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t slot0 = (static_cast<int64_t>(row) * p.kv_heads + kv_head) * p.max_pieces * p.group;
    const PieceSums pieces = {p.partial + slot0 * kD, p.partial_max + slot0, num_pieces, p.group};
    combine_pieces<kD, kStages == 3 ? 33 : 11>(pieces, p.group, nullptr, shared, out);
}

// ---------------------------------------------------------------- launcher

namespace {

template <int kD, int kStages>
int32_t launch_variant(const QwenRtCall& call, const Device& device, dim3 grid, const AttentionParams& p) {
    return launch(call, attention_decode_kernel<kD, kStages>, device, grid, kAttentionWarps * 32,
                  AttentionShared<kD, kStages>::kBytes, p);
}

}  // namespace

int64_t scratch_attention_decode(const Device& device, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t pieces = rows * max_pieces_of(device.num_sms, kv_heads);
    return round_up(pieces * heads * 8) + pieces * heads * head_dim * 4;
}

int32_t launch_attention_decode(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    AttentionParams p = {};
    p.qkv = a.qkv;
    p.positions = a.positions;
    p.inv_freq = a.inv_freq;
    p.block_tables = a.block_tables;
    p.k_cache = static_cast<bf16*>(a.k_cache);
    p.v_cache = static_cast<bf16*>(a.v_cache);
    p.out = a.out;
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.group = a.heads / a.kv_heads;
    p.block_size = a.block_size;
    p.max_blocks = a.max_blocks;
    p.max_pieces = max_pieces_of(device.num_sms, a.kv_heads);
    p.scale = a.scale;
    p.rope_scaling = a.rope_scaling;
    p.counters = static_cast<uint32_t*>(a.counters);
    if (a.rows * a.kv_heads * 4 > QWEN_RT_COUNTER_BYTES)
        return refuse(call, QWEN_RT_UNSUPPORTED, "rows * kv_heads = %lld; expected at most %d",
                      (long long)(a.rows * a.kv_heads), QWEN_RT_COUNTER_BYTES / 4);
    p.partial_max = static_cast<float2*>(a.scratch);
    p.partial = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + round_up(a.rows * p.max_pieces * a.heads * 8));
    const PieceGrid pieces = piece_grid(device, a.rows, a.kv_heads, p.max_pieces, a.max_length);
    const bool is_crowded = pieces.is_crowded || AttentionShared<128, 3>::kBytes > device.max_shared_bytes;
    if (a.head_dim == 64)
        return is_crowded ? launch_variant<64, 2>(call, device, pieces.grid, p) : launch_variant<64, 3>(call, device, pieces.grid, p);
    return is_crowded ? launch_variant<128, 1>(call, device, pieces.grid, p) : launch_variant<128, 3>(call, device, pieces.grid, p);
}

}  // namespace qwen_rt
