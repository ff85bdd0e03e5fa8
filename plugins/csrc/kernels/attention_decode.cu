// Attention of a decode step over a bf16 cache: one new token per row, split over the tokens of the row ("split-KV").
// Op, tensors, numerics: rope_kv_append_attention.cu.
//
// Mapping: grid (pieces, kv_heads, rows), 8 warps. One block serves all heads of one kv head (heads / kv_heads <= 16, the
//   rows of the matrix tile) over one piece of the tokens, or over every n-th where there are more than fit on the GPU; each
//   warp takes every eighth tile of 16 tokens through its own ring of tiles in shared memory (16-byte async copies, chunks
//   swizzled by row) with a running maximum and sum. The warps combine in shared memory; of several pieces, the block that
//   ends last combines all in order (attention_combine.cuh).
// Stages: 3 tiles per warp where blocks have an SM each (192 KB of ring for D = 128: enough bytes in flight for all of the
//   memory's bandwidth); fewer where there are more blocks than SMs, so that two blocks share one. Where no piece is longer
//   than the shortest (and a kv head has 8 heads at most), two: both tiles that a warp can have are multiplied side by side,
//   and the block fits beside one of a small matrix, so that it has its tiles when that one ends.
// A row's result depends on its own length only: pieces are cut and combined by a rule of (p, kv_heads, the GPU's SM count),
//   tiles go to warps by their number, so batch mates, stages and max_length do not change a bit.
// Overlap: earlier tokens are loaded before the wait: the step before wrote them (see embed.cu). So is all else that needs no
//   other kernel; behind the wait all of q, the new key and value are on their way at once. The next kernel is let in at once:
//   it only prefetches weights.
// Workspace: counters, then f32 sums of every piece.
// Source: split-KV after Flash-Decoding.
#include "attention_decode.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

template <int kD, int kStages, int kBlocks, bool kIsShort>
__global__ void __launch_bounds__(kAttentionWarps * 32, kBlocks)
    attention_decode_kernel(const __grid_constant__ AttentionParams p) {
    using Shared = AttentionShared<kD, kStages>;
    constexpr int kThreads = kAttentionWarps * 32;
    constexpr int kChunks = kD / 8;
    // Tiles under way in the matrix units, and halves of the 16 heads that there may be: neither changes a bit.
    constexpr int kTogether = kIsShort ? 2 : 1, kHalves = kIsShort ? 1 : 2;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ bool is_last;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y;
    int piece = blockIdx.x;
    let_next_grid_start();

    const int64_t position = load_constant(p.positions + row);
    const float frequency = load_constant(p.inv_freq + threadIdx.x % (kD / 2));
    const int64_t capacity = static_cast<int64_t>(p.max_blocks) * p.block_size;
    bf16* out = p.out + (static_cast<int64_t>(row) * p.heads + kv_head * p.group) * kD;
    if (position < 0 || position >= capacity) return write_no_token(position, out, piece == 0 ? p.group * kD : 0);
    const int last = static_cast<int>(position), length = last + 1;
    const int piece_tokens = piece_of(length, p.max_pieces, p.by_max_pieces);
    if (piece * piece_tokens >= length) return;

    const uint64_t policy = evict_first_policy();
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * Shared::kRingBytes;
    const int32_t* table = p.block_tables + static_cast<int64_t>(row) * p.max_blocks;
    int begin, end, num_tiles;  // of the piece; tiles of this warp

    // The places of 32 tiles are looked up at once, by a lane each: no copy waits for its address.
    const auto first_token = [&](int index) { return begin + (index * kAttentionWarps + warp) * kTile; };
    const auto slot_of = [&](int token) {
        const int block = p.by_block_size.divide(token);
        return (static_cast<uint32_t>(table[block]) * p.kv_heads + kv_head) * p.block_size + token - block * p.block_size;
    };
    uint32_t slots = 0;
    const auto find_slots = [&](int index) { slots = slot_of(min(first_token(index + lane), last & -kTile)); };
    // Of the new token and what lies behind it in its tile comes what the cache holds there: nobody uses it.
    const uint32_t place = swizzled<kD>(lane / kChunks, lane % kChunks);
    const auto load_tile = [&](int index, int stage) {
        if (index < num_tiles) {
            if (index % 32 == 0 && index > 0) find_slots(index);
            const int64_t from = static_cast<int64_t>(__shfl_sync(~0u, slots, index % 32)) * kD + lane * 8;
            const uint32_t keys = ring + stage * 2 * Shared::kTileBytes, values = keys + Shared::kTileBytes;
#pragma unroll
            for (int i = 0; i < kTile * kChunks / 32; ++i) {  // 32 / kChunks rows: 2, or 4
                const uint32_t to = i * 512 + (place ^ i * (32 / kChunks) % 8 * 16);
                copy16_async(keys + to, p.k_cache + from + i * 256, policy);
                copy16_async(values + to, p.v_cache + from + i * 256, policy);
            }
        }
        commit_copies();
    };
    const auto start_piece = [&] {
        begin = piece * piece_tokens;
        end = min(length, begin + piece_tokens);
        num_tiles = ((end - begin + kTile - 1) / kTile - warp + kAttentionWarps - 1) / kAttentionWarps;
        find_slots(0);
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) load_tile(i, i);
    };
    start_piece();

    // What needs no other kernel: angles, zeros for heads that there are not, the new token's place.
    float2* cos_sin = reinterpret_cast<float2*>(shared + Shared::kCosSin);
    if (threadIdx.x < kD / 2) {
        float sine, cosine;
        sincosf(static_cast<float>(last) * frequency, &sine, &cosine);
        cos_sin[threadIdx.x] = {cosine * p.rope_scaling, sine * p.rope_scaling};
    }
    for (int i = p.group * kD / 8 + threadIdx.x; i < kMaxGroup * kD / 8; i += kThreads)
        store_shared(base + Shared::kQuery + i * 16, uint4{});
    RowPieces pieces;
    pieces.find(length, piece_tokens, piece);
    const int64_t new_at = pieces.has_last ? static_cast<int64_t>(slot_of(last)) * kD : 0;
    __syncthreads();
    wait_for_previous_grids();

    // Query heads into a swizzled bf16[16, D] tile; then the new key and value. A thread has dims 2 pair, 2 pair + 1 of a head
    // and their partners, and all that it has is on its way at once.
    constexpr int kPairs = kD / 4, kRounds = ((kMaxGroup + 2) * kPairs + kThreads - 1) / kThreads;
    const auto* qkv = reinterpret_cast<const uint32_t*>(p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD);
    const int num_items = (p.group + (pieces.has_last ? 2 : 0)) * kPairs, pair = threadIdx.x % kPairs;
    uint32_t low[kRounds], high[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int item = r * kThreads + threadIdx.x, head = item / kPairs;
        if (item >= num_items) break;
        const int from = head < p.group ? kv_head * p.group + head : p.heads + (head - p.group) * p.kv_heads + kv_head;
        low[r] = __ldcg(qkv + from * (kD / 2) + pair);
        high[r] = __ldcg(qkv + from * (kD / 2) + kPairs + pair);
    }
    const float2 a = cos_sin[2 * pair], b = cos_sin[2 * pair + 1];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int item = r * kThreads + threadIdx.x, head = item / kPairs;
        if (item >= num_items) break;
        uint32_t first = low[r], second = high[r];
        if (head <= p.group) {
            const float2 x1 = unpack(first), x2 = unpack(second);
            first = pack(x1.x * a.x - x2.x * a.y, x1.y * b.x - x2.y * b.y);
            second = pack(x2.x * a.x + x1.x * a.y, x2.y * b.x + x1.y * b.y);
        }
        if (head < p.group) {
            const uint32_t q = base + Shared::kQuery + pair % 4 * 4;
            store_shared_word(q + swizzled<kD>(head, pair / 4), first);
            store_shared_word(q + swizzled<kD>(head, pair / 4 + kChunks / 2), second);
        } else {
            const bool is_key = head == p.group;
            const uint32_t here = base + (is_key ? Shared::kNewKey : Shared::kNewValue) + pair * 4;
            auto* there = reinterpret_cast<uint32_t*>((is_key ? p.k_cache : p.v_cache) + new_at) + pair;
            store_shared_word(here, first), store_shared_word(here + kPairs * 4, second);
            there[0] = first, there[kPairs] = second;
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

        int stage = 0;
#pragma unroll 1
        for (int index = 0; index < num_tiles; index += kTogether) {
            wait_copies<kStages - kTogether>();
            __syncwarp();
            uint32_t keys[kTogether], values[kTogether];
            float score[kTogether][2][4], tile_highest[kTogether][2];
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                keys[u] = ring + (stage + u) * 2 * Shared::kTileBytes;
                values[u] = (index + u < num_tiles ? keys[u] : keys[0]) + Shared::kTileBytes;  // of no tile: for weights of zero
                const int token = last - first_token(index + u);
                if (token >= kTile || index + u >= num_tiles) continue;
                // The last tile: put the new token in, and zeros behind it, as weights of zero take no NaN.
#pragma unroll 1
                for (int i = (token + 1) * kChunks + lane; i < kTile * kChunks; i += 32)
                    store_shared(values[u] + swizzled<kD>(i / kChunks, i % kChunks), uint4{});
                if (lane < kChunks) {
                    store_shared(keys[u] + swizzled<kD>(token, lane), load_shared(base + Shared::kNewKey + lane * 16));
                    store_shared(values[u] + swizzled<kD>(token, lane), load_shared(base + Shared::kNewValue + lane * 16));
                }
                __syncwarp();
            }
#pragma unroll
            for (int u = 0; u < kTogether; ++u)
#pragma unroll
                for (int i = 0; i < 8; ++i) score[u][i >> 2][i & 3] = 0.f;
#pragma unroll
            for (int k = 0; k < kD / 16; ++k)
#pragma unroll
                for (int u = 0; u < kTogether; ++u) {
                    uint32_t b[4];
                    load_matrices(b, keys[u] + swizzled<kD>((lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
#pragma unroll
                    for (int n = 0; n < 2; ++n)
                        mma_bf16(score[u][n], query[k][0], kHalves == 1 ? 0 : query[k][1], query[k][2], kHalves == 1 ? 0 : query[k][3],
                                 b[2 * n], b[2 * n + 1]);
                }
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                const int left = end - first_token(index + u);  // of a tile that is not there: none
                tile_highest[u][0] = tile_highest[u][1] = -INFINITY;
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int i = 0; i < 2 * kHalves; ++i) {
                        score[u][n][i] = n * 8 + 2 * t + (i & 1) < left ? score[u][n][i] * scale : -INFINITY;
                        tile_highest[u][i >> 1] = fmaxf(tile_highest[u][i >> 1], score[u][n][i]);
                    }
            }
#pragma unroll
            for (int other = 1; other < 4; other *= 2)
#pragma unroll
                for (int u = 0; u < kTogether; ++u)
#pragma unroll
                    for (int h = 0; h < kHalves; ++h)
                        tile_highest[u][h] = fmaxf(tile_highest[u][h], __shfl_xor_sync(~0u, tile_highest[u][h], other));
            float shrink[kTogether][2];
            uint32_t weights[kTogether][4];
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
#pragma unroll
                for (int h = 0; h < kHalves; ++h) {
                    const float highest = fmaxf(maximum[h], tile_highest[u][h]);  // finite: a tile has one visible token at least
                    shrink[u][h] = power_of_two(maximum[h] - highest);
                    maximum[h] = highest;
                    total[h] *= shrink[u][h];
                }
                float(&w)[2][4] = score[u];
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int i = 0; i < 2 * kHalves; ++i) {
                        w[n][i] = power_of_two(w[n][i] - maximum[i >> 1]);
                        total[i >> 1] += w[n][i];
                    }
#pragma unroll
                for (int i = 0; i < 4; ++i) weights[u][i] = i % 2 < kHalves ? pack(w[i >> 1][i % 2 * 2], w[i >> 1][i % 2 * 2 + 1]) : 0;
            }
#pragma unroll
            for (int u = 0; u < kTogether; ++u)
#pragma unroll
                for (int d = 0; d < kD / 16; ++d) {
                    uint32_t b[4];
                    load_matrices_transposed(b, values[u] + swizzled<kD>(lane & 15, 2 * d + (lane >> 4)));
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        float(&sum)[4] = sums[2 * d + n];
#pragma unroll
                        for (int i = 0; i < 2 * kHalves; ++i) sum[i] *= shrink[u][i >> 1];
                        mma_bf16(sum, weights[u][0], weights[u][1], weights[u][2], weights[u][3], b[2 * n], b[2 * n + 1]);
                    }
                }
            __syncwarp();
#pragma unroll
            for (int u = 0; u < kTogether; ++u) load_tile(index + kStages + u, stage + u);
            stage = stage + kTogether == kStages ? 0 : stage + kTogether;
        }
        wait_copies<0>();
        __syncwarp();

        // The warps' sums become one.
        float2* max_sum = reinterpret_cast<float2*>(shared + Shared::kMaxSum);
        float* mine = reinterpret_cast<float*>(shared + warp * Shared::kRingBytes);
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
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
                const float factor = power_of_two(of_warp.x - highest);
                const float4 v = *reinterpret_cast<const float4*>(shared + w * Shared::kRingBytes + (head * kD + d) * 4);
                weight_sum = fmaf(of_warp.y, factor, weight_sum);
                sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
                sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
            }
            if (pieces.count == 1) {
                const float f = 1.f / weight_sum;
                *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(sum.x * f, sum.y * f), pack(sum.z * f, sum.w * f)};
            } else {
                __stcg(reinterpret_cast<float4*>(p.partial + (slot * p.group + head) * kD + d), sum);
                if (d == 0) __stcg(p.partial_max + slot * p.group + head, make_float2(highest, weight_sum));
            }
        }
        if (pieces.count == 1) return;
        ++num_done;
        piece += static_cast<int>(gridDim.x);
        __syncthreads();
        if (piece >= pieces.count) break;
        start_piece();
    }

    // The block that ends last combines all pieces, in order.
    if (threadIdx.x == 0) {
        uint32_t* counter = p.counters + row * p.kv_heads + kv_head;
        is_last = add_in_order(counter, num_done) == static_cast<uint32_t>(pieces.count - num_done);
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t slot0 = (static_cast<int64_t>(row) * p.kv_heads + kv_head) * p.max_pieces * p.group;
    const PieceSums sums_of_pieces = {p.partial + slot0 * kD, p.partial_max + slot0, pieces.count, p.group};
    combine_pieces<kD, kBlocks == 1 ? 17 : 11>(sums_of_pieces, p.group, nullptr, shared, out);
}

// ---------------------------------------------------------------- launcher

namespace {

template <int kD, int kStages, int kBlocks, bool kIsShort = false>
int32_t launch_variant(const QwenRtCall& call, const Device& device, dim3 grid, const AttentionParams& p) {
    return launch(call, attention_decode_kernel<kD, kStages, kBlocks, kIsShort>, device, grid, kAttentionWarps * 32,
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
    p.by_block_size = Divisor::of(a.block_size);
    p.by_max_pieces = Divisor::of(p.max_pieces);
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
    const bool is_short = pieces.is_short && p.group <= kMaxGroup / 2;
    if (a.head_dim == 64) {
        if (is_crowded) return launch_variant<64, 2, 2>(call, device, pieces.grid, p);
        return is_short ? launch_variant<64, 2, 1, true>(call, device, pieces.grid, p) : launch_variant<64, 3, 1>(call, device, pieces.grid, p);
    }
    if (is_crowded) return launch_variant<128, 1, 2>(call, device, pieces.grid, p);
    return is_short ? launch_variant<128, 2, 1, true>(call, device, pieces.grid, p) : launch_variant<128, 3, 1>(call, device, pieces.grid, p);
}

}  // namespace qwen_rt
