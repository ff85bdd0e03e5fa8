// Attention of a decode step over a quantized cache: one new token per row, split over the tokens of the row.
// Op, tensors: rope_kv_append_attention.cu. What differs from the bf16 kernel, attention_decode.cu:
//   score[t] = scale · (k_scale[t] · (q · value_k[t]) + q · R(t) k_offset)
//   out      = sum_t p[t] v_scale[t] value_v[t] / sum_t p[t] + v_offset
//
// Mapping: grid (pieces, kv_heads · parts, rows), 8 warps. One block serves up to 8 heads of one kv head (more: several parts,
//   which read the same keys) over one piece of the tokens. Each warp takes every eighth tile of 32 tokens through its own
//   ring in shared memory: bytes and scales by 16-byte async copies, chunks swizzled by row. Tokens are the rows of the matrix
//   tiles and heads their 8 columns, so that no part of a product is for nothing; probabilities are transposed in registers.
// Offset: a tile holds the tokens p0 … p0 + 31, and R(p0 + j) = R(p0) R(j): its scores are (R(-p0) q) · B[j] with B[j] = R(j)
//   k_offset, made once by every block, no memory traffic. They need nothing of a tile, so they are worked out while it is
//   still on its way, two tiles ahead. Skipped where k_offset is absent.
// Numerics: angles are exact products. q is f32, rounded to f16 (11 bits) for the product with bytes, times the power of two
//   that brings the head's largest to 2^14. For the product with B both are rounded to f16 in parts of 32 dims whose offset
//   has an rms of at most 8: there a score errs by at most 2^-11.8 · 8 of q's rms (times scale · sqrt(D)), a third of what
//   int8 rounding of keys of size one does. Elsewhere both are sums of two f16, in three products; what is left is 2^-20, the
//   error of their sines and cosines, a tile of a warp later 2^-21 more. Offsets beyond 2^21 give NaN. p · v_scale is rounded
//   to f16, times the power of two that brings the warp's largest v_scale so far to 2^14. Bytes are exact in f16. All sums
//   f32. So nothing is rounded more coarsely than by the bf16 kernel. A key is turned in f32 and rounded to bytes.
// A row's result depends on its own length only, as there: the same pieces, tiles go to warps by their number.
// Stages: 3 tiles per warp where blocks have an SM each; one where two blocks share one, or where a piece has no more.
// Overlap, workspace: as there. The table and the angles are made once the first tile is on its way: later copies wait for
//   memory anyway, and a warp that has issued all of them first does nothing meanwhile (docs/performance-gpu-quantized.md, KV9).
// Cost: 2 · kv_heads · (D + 4) · (p + 1) bytes a row, bound by reading.
// Source: split-KV after Flash-Decoding; the scheme of the cache: docs/kv-cache.md.
#include "attention_decode_8bit.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

template <KvFormat kFormat, int kD, int kStages, int kBlocks>
__global__ void __launch_bounds__(kAttentionWarps * 32, kBlocks)
    attention_decode_8bit_kernel(const __grid_constant__ Attention8Params p) {
    using Shared = Attention8Shared<kD, kStages>;
    constexpr int kAhead = kStages < 3 ? 1 : 2;  // tiles whose offset scores are worked out before their bytes are there
    constexpr int kChunks = kD / 16;  // of a row of bytes, 16 dims each: as many as steps of a product over dims
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ bool is_last;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y / p.parts, part = blockIdx.y % p.parts;
    const int num_heads = min(kTableHeads, p.group - part * kTableHeads);
    const int first_head = kv_head * p.group + part * kTableHeads;
    int piece = blockIdx.x;
    let_next_grid_start();

    // All that a block needs of memory besides the cache is on its way before the first copies.
    const int64_t position = load_constant(p.positions + row);
    const bool has_offset = p.k_offset != nullptr;
    OffsetTable<kD> offsets;
    offsets.load(p.inv_freq, has_offset ? p.k_offset + kv_head * kD : p.inv_freq);
    float frequency[kD / 64];
#pragma unroll
    for (int k = 0; k < kD / 64; ++k) frequency[k] = load_constant(p.inv_freq + k * 32 + lane);
    const int64_t capacity = static_cast<int64_t>(p.max_blocks) * p.block_size;
    bf16* out = p.out + (static_cast<int64_t>(row) * p.heads + first_head) * kD;
    if (position < 0 || position >= capacity) return write_no_token(position, out, piece == 0 ? num_heads * kD : 0);
    const int last = static_cast<int>(position), length = last + 1, piece_tokens = piece_of(length, p.max_pieces, p.by_max_pieces);
    if (piece * piece_tokens >= length) return;
    const uint64_t policy = evict_first_policy();
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * Shared::kRingBytes;
    const int32_t* table = p.block_tables + static_cast<int64_t>(row) * p.max_blocks;
    int begin, end, num_tiles;  // of the piece; tiles of this warp

    // The places of 16 tiles' halves are looked up at once, by a lane each: no copy waits for its address. A half behind the
    // last token has that of the last one's.
    const auto first_token = [&](int index) { return begin + (index * kAttentionWarps + warp) * kByteTile; };
    const auto slot_of = [&](int token) {
        const int block = p.by_block_size.divide(token);
        return (static_cast<uint32_t>(table[block]) * p.kv_heads + kv_head) * p.block_size + token - block * p.block_size;
    };
    uint32_t slots = 0;
    const auto find_slots = [&](int index) { slots = slot_of(min(first_token(index + (lane >> 1)) + (lane & 1) * 16, last) & ~15); };
    // Copies keys or values: bytes, and scales by four a lane. Of the new token and what lies behind it, up to the end of 16,
    // comes what the cache holds there: nobody uses it.
    const uint32_t place = swizzled_bytes<kD>(lane / kChunks, lane % kChunks);
    const auto load = [&](int index, uint32_t bytes, uint32_t scales, const unsigned char* cache, const float* cache_scales) {
        uint32_t slot[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            slot[half] = __shfl_sync(~0u, slots, index % 16 * 2 + half);
            const unsigned char* from = cache + static_cast<int64_t>(slot[half]) * kD + lane * 16;
#pragma unroll
            for (int i = 0; i < kChunks / 2; ++i)  // 32 / kChunks rows
                copy16_async(bytes + half * 16 * kD + i * 512 + (place ^ (kD == 128 ? i % 2 * 64 : 0)), from + i * 512, policy);
        }
        if (lane < kByteTile / 4) copy16_async(scales + lane * 16, cache_scales + ((lane < 4 ? slot[0] : slot[1]) + (lane & 3) * 4), policy);
    };
    const auto load_keys = [&](int index, int stage) {
        const uint32_t to = ring + stage * Shared::kStageBytes;
        if (index < num_tiles) {
            if (index % 16 == 0 && index > 0) find_slots(index);
            load(index, to, to + 2 * Shared::kTileBytes, p.k_cache, p.k_scales);
        }
        commit_copies();
    };
    const auto load_values = [&](int index, int stage) {
        const uint32_t to = ring + stage * Shared::kStageBytes + Shared::kTileBytes;
        if (index < num_tiles) load(index, to, to + Shared::kTileBytes + Shared::kScaleBytes, p.v_cache, p.v_scales);
        commit_copies();
    };

    const float* queries = reinterpret_cast<const float*>(shared + Shared::kQuery);
    float2* cos_sin = reinterpret_cast<float2*>(shared + Shared::kAngles);
    float2* angles = cos_sin + warp * kD / 2;  // of the first token of a tile of this warp
    const uint32_t offset_table = base + Shared::kTable, lacking = offset_table + Shared::kTableBytes;
    uint32_t query[kChunks][2];
    float score_factor[2];
    uint32_t large = 0;  // bit c: the offset of dims 16 c … 16 c + 15 and their partners is
    float2 angle[kD / 64] = {}, step[kD / 64] = {};  // of the next tile's first token; of kTileStep tokens
    float ahead[kAhead][2][4];                       // offset scores of the next tiles, zeros without an offset
    const auto next_offset_scores = [&] {
#pragma unroll
        for (int a = 0; a + 1 < kAhead; ++a)
#pragma unroll
            for (int i = 0; i < 8; ++i) ahead[a][i >> 2][i & 3] = ahead[a + 1][i >> 2][i & 3];
        float(&score)[2][4] = ahead[kAhead - 1];
#pragma unroll
        for (int i = 0; i < 8; ++i) score[i >> 2][i & 3] = 0.f;
        if (!has_offset) return;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kD / 64; ++k) {
            angles[k * 32 + lane] = angle[k];
            angle[k] = turned(angle[k].x, angle[k].y, step[k]);
        }
        __syncwarp();
        offset_scores<kD>(score, queries + g * Shared::kQueryStride + 4 * t, angles + 4 * t, offset_table, lacking, large, lane);
    };

    float* sizes = reinterpret_cast<float*>(shared + Shared::kSizes);
    RowPieces pieces;
    int64_t new_slot = -1;
    int num_done = 0;
    while (true) {
        begin = piece * piece_tokens;
        end = min(length, begin + piece_tokens);
        num_tiles = ((end - begin + kByteTile - 1) / kByteTile - warp + kAttentionWarps - 1) / kAttentionWarps;
        find_slots(0);
        // With the first tile on its way there is time for what needs no other kernel: later copies wait for memory.
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) {
            load_keys(i, i), load_values(i, i);
            if (i > 0) continue;
            if (has_offset)
#pragma unroll
                for (int k = 0; k < kD / 64; ++k) {
                    angle[k] = near_cos_sin(first_token(0), frequency[k]);
                    step[k] = near_cos_sin(kTileStep, frequency[k]);
                }
            if (num_done > 0) continue;
            if (has_offset) offsets.make(offset_table, lacking, sizes, p.rope_scaling);
            if (threadIdx.x < kD / 2) {
                const float2 turn = exact_cos_sin(last, offsets.frequency);
                cos_sin[threadIdx.x] = {turn.x * p.rope_scaling, turn.y * p.rope_scaling};
            }
            pieces.find(length, piece_tokens, piece);
            if (pieces.has_last) new_slot = slot_of(last);
        }
        if (num_done == 0) {
            __syncthreads();
            wait_for_previous_grids();
            turn_heads<kFormat, kD, Shared>(p, shared, row, kv_head, part, num_heads, new_slot);
            if (has_offset)
#pragma unroll
                for (int c = 0; c < kD / 32; ++c) large |= sizes[c] <= kLargeSquares ? 0u : 1u << c;
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kChunks; ++k) {
                const float4 q = *reinterpret_cast<const float4*>(queries + g * Shared::kQueryStride + 16 * k + 4 * t);
                query[k][0] = pack_half(q.x, kPairsNeighbours<kFormat> ? q.y : q.z);
                query[k][1] = pack_half(kPairsNeighbours<kFormat> ? q.z : q.y, q.w);
            }
            const float* factors = reinterpret_cast<const float*>(shared + Shared::kFactors);
            score_factor[0] = factors[2 * t], score_factor[1] = factors[2 * t + 1];
        }
#pragma unroll 1
        for (int a = 0; a < min(kAhead, num_tiles); ++a) next_offset_scores();  // while the first bytes are on their way
        if (kAhead > 1 && num_tiles == 1)
#pragma unroll
            for (int i = 0; i < 8; ++i) ahead[0][i >> 2][i & 3] = ahead[kAhead - 1][i >> 2][i & 3];

        float sums[kChunks][4];  // of value dims 16 c + 2 g, + 1 (upper two) and heads 2 t, 2 t + 1
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[c][i] = 0.f;
        float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};  // of heads 2 t, 2 t + 1, in units of log2
        uint32_t exponent = 15;  // of the largest value scale so far; sums are times 2^(141 - exponent)

        int stage = 0;
#pragma unroll 1
        for (int index = 0; index < num_tiles; ++index) {
            const int first = first_token(index);
            float score[2][4] = {}, offset_score[2][4];  // of tokens 16 m + g, + 8 (upper two) and heads 2 t, 2 t + 1
#pragma unroll
            for (int i = 0; i < 8; ++i) offset_score[i >> 2][i & 3] = ahead[0][i >> 2][i & 3];
            if (index + kAhead < num_tiles) next_offset_scores();
            else if (kAhead > 1)
#pragma unroll
                for (int i = 0; i < 8; ++i) ahead[0][i >> 2][i & 3] = ahead[kAhead - 1][i >> 2][i & 3];
            const uint32_t keys = ring + stage * Shared::kStageBytes, values = keys + Shared::kTileBytes;
            float* key_scales = reinterpret_cast<float*>(shared + (values - base) + Shared::kTileBytes);
            float* value_scales = key_scales + kByteTile;
            const int new_token = last - first;  // its place in the tile, if that is the last one

            wait_copies<2 * kStages - 1>();
            __syncwarp();
            if (new_token < kByteTile) {
                put_token<kD>(keys, new_token, base + Shared::kNewKey, lane);
                if (lane == 0) key_scales[new_token] = *reinterpret_cast<const float*>(shared + Shared::kNewScales);
                __syncwarp();
            }
            uint32_t words[kD / 32][2][4];
            load_words<kD, false>(words, keys, lane);
            float key_scale[4];  // of tokens g, g + 8, g + 16, g + 24
#pragma unroll
            for (int i = 0; i < 4; ++i) key_scale[i] = key_scales[i * 8 + g] * (kByteFactor<kFormat> / kTableFactor);
            __syncwarp();
            load_keys(index + kStages, stage);
            byte_scores<kFormat, kD>(score, words, query);

            wait_copies<2 * kStages - 1>();
            __syncwarp();
            if (new_token < kByteTile) {
                put_token<kD>(values, new_token, base + Shared::kNewValue, lane);
                if (lane == 0) value_scales[new_token] = *reinterpret_cast<const float*>(shared + Shared::kNewScales + 4);
                if constexpr (kFormat == KvFormat::kFp8) clear_behind<kD>(values, new_token, lane);
                __syncwarp();
            }
            load_words<kD, true>(words, values, lane);
            const uint32_t scale_bits = first + lane < end ? magnitude_bits(value_scales[lane]) : 0;  // a token a lane
            __syncwarp();
            load_values(index + kStages, stage);
            stage = stage + 1 == kStages ? 0 : stage + 1;

            // Value scales in units of the warp's largest so far.
            const uint32_t larger = max(exponent, __reduce_max_sync(~0u, scale_bits) >> 23);
            const float unit = __uint_as_float((127u - min(127u, larger - exponent)) << 23);
            const float value_scale = __uint_as_float(scale_bits) * __uint_as_float((268u - larger) << 23);
            exponent = larger;

#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    score[m][i] = fmaf(score[m][i], key_scale[2 * m + (i >> 1)], offset_score[m][i]) * score_factor[i & 1];
            if (first + kByteTile > end)
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (first + 16 * m + (i >> 1) * 8 + g >= end) score[m][i] = -INFINITY;
            float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
            for (int h = 0; h < 2; ++h)
                highest[h] = fmaxf(fmaxf(highest[h], fmaxf(score[0][h], score[0][2 + h])), fmaxf(score[1][h], score[1][2 + h]));
#pragma unroll
            for (int other = 4; other < 32; other *= 2)
#pragma unroll
                for (int h = 0; h < 2; ++h) highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], other));
            // A tile has one visible token at least, so the maximum is finite from now on.
            if (__any_sync(~0u, highest[0] > maximum[0] || highest[1] > maximum[1] || unit != 1.f)) {
                float shrink[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    shrink[h] = power_of_two(maximum[h] - highest[h]);
                    maximum[h] = highest[h];
                    total[h] *= shrink[h];
                    shrink[h] *= unit;
                }
#pragma unroll
                for (int c = 0; c < kChunks; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[c][i] *= shrink[i & 1];
            }
            uint32_t weights[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    const float scaled = __shfl_sync(~0u, value_scale, m * 16 + g + upper * 8);
                    float w[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        w[h] = power_of_two(score[m][2 * upper + h] - maximum[h]);
                        total[h] += w[h];
                        w[h] *= scaled;
                    }
                    weights[m][upper] = transpose_matrix(pack_half(w[0], w[1]));
                }
            add_values<kFormat, kD>(sums, words, weights);
        }
        wait_copies<0>();
        __syncwarp();

        const int64_t slot = ((static_cast<int64_t>(row) * gridDim.y + blockIdx.y) * p.max_pieces + piece) * p.stride;
        merge_warps<kFormat, kD, Shared>(p, shared, sums, maximum, total, exponent, num_heads, kv_head, pieces.count == 1, slot,
                                         out);
        if (pieces.count == 1) return;
        ++num_done;
        piece += static_cast<int>(gridDim.x);
        __syncthreads();
        if (piece >= pieces.count) break;
    }

    // The block that ends last combines all pieces, in order.
    const int64_t unit_index = static_cast<int64_t>(row) * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) {
        uint32_t* counter = p.counters + unit_index;
        is_last = add_in_order(counter, num_done) == static_cast<uint32_t>(pieces.count - num_done);
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t slot0 = unit_index * p.max_pieces * p.stride;
    const PieceSums sums_of_pieces = {p.partial + slot0 * kD, p.partial_max + slot0, pieces.count, p.stride};
    combine_pieces<kD, kBlocks == 1 ? 17 : 11>(sums_of_pieces, num_heads, p.v_offset == nullptr ? nullptr : p.v_offset + kv_head * kD,
                                               shared, out);
}

// ---------------------------------------------------------------- launcher

namespace {

struct Units {
    int parts, stride;  // of a kv head; heads that a part has room for
    explicit Units(int64_t group)
        : parts(static_cast<int>((group + kTableHeads - 1) / kTableHeads)),
          stride(static_cast<int>(group < kTableHeads ? group : kTableHeads)) {}
};

template <KvFormat kFormat, int kD, int kStages, int kBlocks>
int32_t launch_variant(const QwenRtCall& call, const Device& device, dim3 grid, const Attention8Params& p) {
    return launch(call, attention_decode_8bit_kernel<kFormat, kD, kStages, kBlocks>, device, grid, kAttentionWarps * 32,
                  Attention8Shared<kD, kStages>::kBytes, p);
}

template <KvFormat kFormat>
int32_t launch_format(const QwenRtCall& call, const Device& device, const AttentionArguments& a, const Attention8Params& p) {
    const PieceGrid pieces = piece_grid(device, a.rows, static_cast<int64_t>(a.kv_heads) * p.parts, p.max_pieces, a.max_length);
    const bool is_crowded = pieces.is_crowded || Attention8Shared<128, 3>::kBytes > device.max_shared_bytes;
    if (a.head_dim == 64)
        return is_crowded ? launch_variant<kFormat, 64, 2, 2>(call, device, pieces.grid, p)
                          : launch_variant<kFormat, 64, 3, 1>(call, device, pieces.grid, p);
    if (is_crowded) return launch_variant<kFormat, 128, 1, 2>(call, device, pieces.grid, p);
    return pieces.is_short ? launch_variant<kFormat, 128, 1, 1>(call, device, pieces.grid, p)
                           : launch_variant<kFormat, 128, 3, 1>(call, device, pieces.grid, p);
}

}  // namespace

int64_t scratch_attention_decode_8bit(const Device& device, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const Units units(heads / kv_heads);
    const int64_t slots = rows * kv_heads * units.parts * max_pieces_of(device.num_sms, kv_heads * units.parts) * units.stride;
    return round_up(slots * 8) + slots * head_dim * 4;
}

int32_t launch_attention_decode_8bit(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    const Units units(a.heads / a.kv_heads);
    const int64_t num_units = a.rows * a.kv_heads * units.parts;
    if (num_units * 4 > QWEN_RT_COUNTER_BYTES)
        return refuse(call, QWEN_RT_UNSUPPORTED, "rows * kv_heads * ceil(group / %d) = %lld; expected at most %d", kTableHeads,
                      (long long)num_units, QWEN_RT_COUNTER_BYTES / 4);
    Attention8Params p = {};
    p.qkv = a.qkv;
    p.positions = a.positions;
    p.inv_freq = a.inv_freq;
    p.k_offset = a.k_offset;
    p.v_offset = a.v_offset;
    p.block_tables = a.block_tables;
    p.k_cache = static_cast<unsigned char*>(a.k_cache);
    p.v_cache = static_cast<unsigned char*>(a.v_cache);
    p.k_scales = a.k_scales;
    p.v_scales = a.v_scales;
    p.out = a.out;
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.group = a.heads / a.kv_heads;
    p.parts = units.parts;
    p.stride = units.stride;
    p.by_block_size = Divisor::of(a.block_size);
    p.block_size = a.block_size;
    p.max_blocks = a.max_blocks;
    p.max_pieces = max_pieces_of(device.num_sms, static_cast<int64_t>(a.kv_heads) * units.parts);
    p.by_max_pieces = Divisor::of(p.max_pieces);
    p.scale = a.scale;
    p.rope_scaling = a.rope_scaling;
    p.counters = static_cast<uint32_t*>(a.counters);
    p.partial_max = static_cast<float2*>(a.scratch);
    p.partial = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + round_up(num_units * p.max_pieces * p.stride * 8));
    return a.kv_format == KvFormat::kFp8 ? launch_format<KvFormat::kFp8>(call, device, a, p)
                                         : launch_format<KvFormat::kInt8>(call, device, a, p);
}

}  // namespace qwen_rt
