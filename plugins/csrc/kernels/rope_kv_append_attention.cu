// Turns query and key, appends key and value to the paged cache, attends over all tokens of the row:
//   q' = rope(q, p), k' = rope(k, p);  cache[p] = (k', v);  out[h] = softmax_t(scale · q'[h] · key[t]) · value[t], t <= p
//   rope: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for dims i and i + D/2, angle p · inv_freq[i], times rope_scaling
//
// Tensors (in this order):
//   qkv          bf16[rows, (heads + 2 kv_heads) D]             in: all q heads, then k, then v
//   positions    i64[rows]                                      in: of the new token; negative: the row is idle, out is 0
//   inv_freq     f32[D / 2]                                     in
//   block_tables i32[rows, max_blocks]                          in: cache block of tokens i·block_size ..; only the first
//                                                               p / block_size + 1 of a row are read
//   k_cache      bf16[num_blocks, kv_heads, block_size, D]      in and out; v_cache likewise. Tokens after p are not read
//   out          bf16[rows, heads · D]                          out; a position beyond the table gives NaN
//   present_k, present_v                                        out: the caches themselves, or NULL
// Dims: rows, q_width = heads · D, kv_heads, head_dim, num_blocks, block_size, max_blocks.
// Attributes: scale, rope_scaling, max_length (longest p + 1 that will occur; 0: what the block table can hold).
//
// Numerics: angles, rotation, scores, softmax and sums in f32; q', k' rounded to bf16 as the cache is, probabilities to
//   bf16 before the product with values (their sum is not). A row's result depends on its own length only: pieces are cut
//   and combined by a rule of (p, kv_heads, the GPU's SM count), so batch mates and max_length do not change a bit.
// Mapping: grid (pieces, kv_heads, rows), 4 warps. One block serves all heads of one kv head (heads / kv_heads <= 16, the
//   rows of the matrix tile) over one piece of the tokens; each warp takes every fourth tile of 16 tokens through its own
//   ring of kStages tiles in shared memory (16-byte async copies, chunks swizzled by row) with a running maximum and sum.
//   The warps combine in shared memory; of several pieces, the block that ends last combines all in order.
// Overlap: earlier tokens are loaded before the wait: the step before wrote them (see embed.cu). The next kernel is let in
//   at once: it only prefetches weights.
// Workspace: counters (zeroed once by the caller, left zero), and f32 sums of every piece.
// Preconditions (the launcher checks): rows <= 64, head_dim 64 or 128, heads a multiple of kv_heads, at most 16 times as
//   many, block_size a multiple of 16, workspace given.
// Cost: 4 · kv_heads · D · (p + 1) bytes and 4 · heads · D · (p + 1) FLOPs per row; bound by reading.
// Reference: benchmarks/kernel_references.py::rope_kv_append_attention; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: apply_rotary_pos_emb, eager_attention_forward of transformers' modeling_qwen2.py; split-KV after Flash-Decoding.
#include "../common/launch.cuh"
#include "../common/ops.cuh"
#include "../common/ptx.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

constexpr int kAttentionWarps = 4;
constexpr int kTile = 16;        // tokens of a warp's tile
constexpr int kStages = 3;       // tiles in flight per warp
constexpr int kMinPiece = 256;   // tokens: below, combining pieces costs more than they win
constexpr int kPieceStep = 64;   // tokens: all warps' tiles once
constexpr int kMaxGroup = 16;    // heads of one kv head
constexpr float kLog2e = 1.4426950408889634f;

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

__host__ __device__ inline int piece_of(int64_t length, int max_pieces) {
    const int64_t even = (length + max_pieces - 1) / max_pieces;
    const int64_t rounded = (even + kPieceStep - 1) / kPieceStep * kPieceStep;
    return static_cast<int>(rounded > kMinPiece ? rounded : kMinPiece);
}

// Byte offset of 16-byte chunk `chunk` of row `row`: eight rows of one chunk fall on all banks.
template <int kD>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    return static_cast<uint32_t>(row * kD * 2 + ((chunk ^ (row & 7)) << 4));
}

template <int kD>
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

template <int kD>
__global__ void __launch_bounds__(kAttentionWarps * 32) attention_kernel(const __grid_constant__ AttentionParams p) {
    using Shared = AttentionShared<kD>;
    constexpr int kThreads = kAttentionWarps * 32;
    constexpr int kChunks = kD / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ bool is_last;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y, piece = blockIdx.x;
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
    const int begin = piece * piece_tokens, end = min(length, begin + piece_tokens);
    const bool owns_new = end == length;

    const uint64_t policy = evict_first_policy();
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * Shared::kRingBytes;
    const int32_t* table = p.block_tables + static_cast<int64_t>(row) * p.max_blocks;
    const int num_tiles_all = (end - begin + kTile - 1) / kTile;
    const int num_tiles = (num_tiles_all - warp + kAttentionWarps - 1) / kAttentionWarps;  // of this warp

    // The block of the next tile is looked up one tile ahead, so that no copy waits for its address.
    const auto first_token = [&](int index) { return begin + (index * kAttentionWarps + warp) * kTile; };
    int64_t next_block = num_tiles > 0 ? table[first_token(0) / p.block_size] : 0;
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
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load_tile(i);

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
            const int pair = threadIdx.x - 64;
            const auto* from = reinterpret_cast<const uint32_t*>(qkv + (p.heads + p.kv_heads + kv_head) * kD);
            new_value[pair] = reinterpret_cast<uint32_t*>(p.v_cache + at)[pair] = __ldcg(from + pair);
        }
    }
    __syncthreads();

    uint32_t query[kD / 16][4];
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
        load_matrices(query[k], base + Shared::kQuery + swizzled<kD>(lane & 15, 2 * k + (lane >> 4)));

    float sums[kD / 8][4];
#pragma unroll
    for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[d][i] = 0.f;
    float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};  // of rows g and g + 8, in units of log2
    const float scale = p.scale * kLog2e;

    for (int index = 0; index < num_tiles; ++index) {
        wait_copies<kStages - 2>();
        __syncwarp();
        load_tile(index + kStages - 1);
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

    // The block that ends last combines all pieces, in order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t* counter = p.counters + row * p.kv_heads + kv_head;
        is_last = atomicAdd(counter, 1) == static_cast<uint32_t>(num_pieces - 1);
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t slot0 = slot - piece;
    float2* pieces = reinterpret_cast<float2*>(shared + Shared::kRingBytes);  // [pieces][group]; warp 0's ring is not used
    for (int i = threadIdx.x; i < num_pieces * p.group; i += kThreads) pieces[i] = __ldcg(p.partial_max + slot0 * p.group + i);
    __syncthreads();
    for (int i = threadIdx.x; i < p.group * kD / 4; i += kThreads) {
        const int head = i / (kD / 4), d = i % (kD / 4) * 4;
        float highest = -INFINITY;
        for (int s = 0; s < num_pieces; ++s) highest = fmaxf(highest, pieces[s * p.group + head].x);
        float4 sum = {0.f, 0.f, 0.f, 0.f};
        float weight_sum = 0.f;
        const float* from = p.partial + (slot0 * p.group + head) * kD + d;
#pragma unroll 8
        for (int s = 0; s < num_pieces; ++s) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(from + static_cast<int64_t>(s) * p.group * kD));
            const float2 of_piece = pieces[s * p.group + head];
            const float factor = exp2f(of_piece.x - highest);
            weight_sum = fmaf(of_piece.y, factor, weight_sum);
            sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
            sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
        }
        const float f = 1.f / weight_sum;
        *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(sum.x * f, sum.y * f), pack(sum.z * f, sum.w * f)};
    }
}

// ---------------------------------------------------------------- launcher

namespace {

enum Dim { kRows, kQWidth, kKvHeads, kHeadDim, kNumBlocks, kBlockSize, kMaxBlocks };

// Pieces of a long row: with one row, every SM gets one block.
int max_pieces_of(int num_sms, int64_t kv_heads) { return kv_heads >= num_sms ? 1 : static_cast<int>(num_sms / kv_heads); }

int64_t round_up(int64_t value) { return (value + 255) / 256 * 256; }

}  // namespace

int64_t workspace_rope_kv_append_attention(const int64_t* dims, int32_t) {
    Device device;
    if (current_device(&device) != cudaSuccess) return -1;
    const int64_t pieces = dims[kRows] * max_pieces_of(device.num_sms, dims[kKvHeads]);
    return round_up(dims[kRows] * dims[kKvHeads] * 4) + round_up(pieces * dims[kQWidth] / dims[kHeadDim] * 8) +
           pieces * dims[kQWidth] * 4;
}

int32_t launch_rope_kv_append_attention(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 7, 9, 7, 3, 0b1110)) return status;
    for (int i = 0; i < 2; ++i)
        if (call.tensors[7 + i] != nullptr && call.tensors[7 + i] != call.tensors[4 + i])
            return refuse(call, QWEN_RT_INVALID, "present_%c is another buffer; expected the cache itself", "kv"[i]);
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int64_t* dims = call.dims;
    const int64_t rows = dims[kRows], kv_heads = dims[kKvHeads], head_dim = dims[kHeadDim];
    const int64_t heads = dims[kQWidth] / head_dim;
    if (rows > kMaxRows) return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%lld; expected 1 to %d", (long long)rows, kMaxRows);
    if (dims[kQWidth] % head_dim != 0 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup)
        return refuse(call, QWEN_RT_UNSUPPORTED, "q_width=%lld, head_dim=%lld, kv_heads=%lld; expected heads a multiple of kv_heads, at most %d times",
                      (long long)dims[kQWidth], (long long)head_dim, (long long)kv_heads, kMaxGroup);
    if (dims[kBlockSize] % kTile != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size=%lld; expected a multiple of %d", (long long)dims[kBlockSize],
                      kTile);
    const int64_t capacity = dims[kBlockSize] * dims[kMaxBlocks];
    if (capacity > (int64_t{1} << 24))
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size * max_blocks = %lld; expected at most 2^24", (long long)capacity);
    const int64_t needed = workspace_rope_kv_append_attention(dims, call.num_dims);
    if (call.workspace == nullptr || call.workspace_bytes < needed)
        return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld; expected %lld", (long long)call.workspace_bytes,
                      (long long)needed);
    AttentionParams p = {};
    p.qkv = static_cast<const bf16*>(call.tensors[0]);
    p.positions = static_cast<const int64_t*>(call.tensors[1]);
    p.inv_freq = static_cast<const float*>(call.tensors[2]);
    p.block_tables = static_cast<const int32_t*>(call.tensors[3]);
    p.k_cache = static_cast<bf16*>(call.tensors[4]);
    p.v_cache = static_cast<bf16*>(call.tensors[5]);
    p.out = static_cast<bf16*>(call.tensors[6]);
    p.heads = static_cast<int>(heads);
    p.kv_heads = static_cast<int>(kv_heads);
    p.group = static_cast<int>(heads / kv_heads);
    p.block_size = static_cast<int>(dims[kBlockSize]);
    p.max_blocks = static_cast<int>(dims[kMaxBlocks]);
    p.max_pieces = max_pieces_of(device.num_sms, kv_heads);
    p.scale = static_cast<float>(call.attributes[0]);
    p.rope_scaling = static_cast<float>(call.attributes[1]);
    char* workspace = static_cast<char*>(call.workspace);
    p.counters = reinterpret_cast<uint32_t*>(workspace);
    workspace += round_up(rows * kv_heads * 4);
    p.partial_max = reinterpret_cast<float2*>(workspace);
    workspace += round_up(rows * p.max_pieces * heads * 8);
    p.partial = reinterpret_cast<float*>(workspace);

    int64_t longest = static_cast<int64_t>(call.attributes[2]);
    if (longest <= 0 || longest > capacity) longest = capacity;
    // The number of pieces grows with the length up to max_pieces, then wobbles below it.
    const int64_t pieces = longest >= static_cast<int64_t>(p.max_pieces) * kMinPiece
                               ? p.max_pieces
                               : (longest + kMinPiece - 1) / kMinPiece;
    const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(kv_heads), static_cast<unsigned>(rows));
    switch (head_dim) {
        case 64:
            return launch(call, attention_kernel<64>, device, grid, kAttentionWarps * 32, AttentionShared<64>::kBytes, p);
        case 128:
            return launch(call, attention_kernel<128>, device, grid, kAttentionWarps * 32, AttentionShared<128>::kBytes, p);
        default:
            return refuse(call, QWEN_RT_UNSUPPORTED, "head_dim=%lld; expected 64 or 128", (long long)head_dim);
    }
}

}  // namespace qwen_rt
