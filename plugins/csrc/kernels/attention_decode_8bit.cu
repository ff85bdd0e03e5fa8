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
//   k_offset, made once by every block, no memory traffic. Skipped where k_offset is absent.
// Numerics: angles are exact products. q is f32, rounded to f16 (11 bits) for the product with bytes, times the power of two
//   that brings the head's largest to 2^14; for the product with B both are sums of two bf16, error 2^-16. p · v_scale is
//   rounded to f16, times the power of two that brings the warp's largest v_scale so far to 2^14. Bytes are exact in f16. All
//   sums f32. So nothing is rounded more coarsely than by the bf16 kernel. A key is turned in f32 and rounded to bytes.
// A row's result depends on its own length only, as there: the same pieces, tiles go to warps by their number.
// Stages: 3 tiles per warp where blocks have an SM each, fewer where two blocks share one.
// Overlap, workspace: as there.
// Cost: 2 · kv_heads · (D + 4) · (p + 1) bytes a row, bound by reading.
// Source: split-KV after Flash-Decoding; the scheme of the cache: docs/kv-cache.md.
#include "attention_decode_8bit.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

template <KvFormat kFormat, int kD, int kStages>
__global__ void __launch_bounds__(kAttentionWarps * 32, kStages < 3 ? 2 : 1)
    attention_decode_8bit_kernel(const __grid_constant__ Attention8Params p) {
    using Shared = Attention8Shared<kD, kStages>;
    constexpr int kThreads = kAttentionWarps * 32;
    constexpr int kChunks = kD / 16;  // of a row of bytes, 16 dims each: as many as steps of a product over dims
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ bool is_last;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y / p.parts, part = blockIdx.y % p.parts;
    const int num_heads = min(kTableHeads, p.group - part * kTableHeads);
    const int first_head = kv_head * p.group + part * kTableHeads;
    int piece = blockIdx.x;
    let_next_grid_start();

    const int64_t position = p.positions[row];
    const int64_t capacity = static_cast<int64_t>(p.max_blocks) * p.block_size;
    bf16* out = p.out + (static_cast<int64_t>(row) * p.heads + first_head) * kD;
    if (position < 0 || position >= capacity) {
        wait_for_previous_grids();
        const bf16 value = __float2bfloat16(position < 0 ? 0.f : __uint_as_float(0x7fc00000u));
        if (piece == 0)
            for (int i = threadIdx.x; i < num_heads * kD; i += kThreads) out[i] = value;
        return;
    }
    const int length = static_cast<int>(position) + 1;
    const int piece_tokens = piece_of(length, p.max_pieces);
    const int num_pieces = (length + piece_tokens - 1) / piece_tokens;
    if (piece >= num_pieces) return;
    const bool owns_new = (num_pieces - 1 - piece) % static_cast<int>(gridDim.x) == 0;  // its last piece ends the row
    const bool has_offset = p.k_offset != nullptr;

    const uint64_t policy = evict_first_policy();
    const uint32_t base = smem_address(shared);
    const uint32_t ring = base + warp * Shared::kRingBytes;
    const int32_t* table = p.block_tables + static_cast<int64_t>(row) * p.max_blocks;
    int begin, end, num_tiles;  // of the piece; tiles of this warp

    // The blocks of the next tile's halves are looked up one tile ahead, so that no copy waits for its address.
    const auto first_token = [&](int index) { return begin + (index * kAttentionWarps + warp) * kByteTile; };
    const auto block_of = [&](int token) { return table[min(token, length - 1) / p.block_size]; };
    int next_block[2];
    // Earlier tokens come from the cache; the new one and what lies behind it is zero until it is put in.
    auto load_tile = [&](int index) {
        if (index < num_tiles) {
            const int first = first_token(index), num_old = min(kByteTile, length - 1 - first);
            const uint32_t keys = ring + index % kStages * Shared::kStageBytes, values = keys + Shared::kTileBytes;
            int64_t slot[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                slot[half] = (static_cast<int64_t>(next_block[half]) * p.kv_heads + kv_head) * p.block_size +
                             (first + half * 16) % p.block_size;
                if (index + 1 < num_tiles) next_block[half] = block_of(first_token(index + 1) + half * 16);
#pragma unroll
                for (int i = 0; i < 16 * kChunks / 32; ++i) {
                    const int chunk = (i * 32 + lane) % kChunks, token = (i * 32 + lane) / kChunks;
                    const uint32_t to = swizzled_bytes<kD>(half * 16 + token, chunk);
                    const int64_t from = (slot[half] + token) * kD + chunk * 16;
                    if (half * 16 + token < num_old) {
                        copy16_async(keys + to, p.k_cache + from, policy);
                        copy16_async(values + to, p.v_cache + from, policy);
                    } else {
                        store_shared(keys + to, make_uint4(0, 0, 0, 0));
                        store_shared(values + to, make_uint4(0, 0, 0, 0));
                    }
                }
            }
            if (lane < 16) {  // four scales each: of keys by the lower lanes
                const int token = (lane & 7) * 4;
                const uint32_t to = values + Shared::kTileBytes + lane / 8 * Shared::kScaleBytes + token * 4;
                const float* scales = lane < 8 ? p.k_scales : p.v_scales;
                if (token < num_old) copy16_async(to, scales + (token < 16 ? slot[0] : slot[1] - 16) + token, policy);
            }
        }
        commit_copies();
    };
    const auto start_piece = [&] {
        begin = piece * piece_tokens;
        end = min(length, begin + piece_tokens);
        num_tiles = ((end - begin + kByteTile - 1) / kByteTile - warp + kAttentionWarps - 1) / kAttentionWarps;
#pragma unroll
        for (int half = 0; half < 2; ++half) next_block[half] = num_tiles > 0 ? block_of(first_token(0) + half * 16) : 0;
#pragma unroll
        for (int i = 0; i < kStages; ++i) load_tile(i);
    };
    start_piece();

    const uint32_t offset_table = base + Shared::kTable, lacking = offset_table + Shared::kTableBytes;
    if (has_offset) make_table<kD>(offset_table, lacking, p.k_offset + kv_head * kD, p);
    float2* cos_sin = reinterpret_cast<float2*>(shared + Shared::kAngles);
    for (int i = threadIdx.x; i < kD / 2; i += kThreads) {
        const float2 angle = exact_cos_sin(position, p.inv_freq[i]);
        cos_sin[i] = {angle.x * p.rope_scaling, angle.y * p.rope_scaling};
    }
    __syncthreads();
    wait_for_previous_grids();

    // Query heads, a warp each; the new key and value, which the last warps have less to do without.
    const bf16* qkv = p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD;
    float* queries = reinterpret_cast<float*>(shared + Shared::kQuery);
    float2* factors = reinterpret_cast<float2*>(shared + Shared::kFactors);
    {
        using Part = HeadPart<kD>;
        const int d = Part::kPairs * lane;
        float* to = queries + warp * Shared::kQueryStride;
        if (warp < num_heads) {
            Part q(qkv + (first_head + warp) * kD, lane);
            q.turn(cos_sin, lane);
            const uint32_t exponent = max(15u, q.largest_bits() >> 23);
            if (lane == 0)
                factors[warp] = {__uint_as_float((268u - exponent) << 23),
                                 __uint_as_float((exponent - 14u) << 23) * p.scale * kLog2e * kByteFactor<kFormat>};
#pragma unroll
            for (int k = 0; k < Part::kPairs; ++k) to[d + k] = q.first[k], to[d + kD / 2 + k] = q.second[k];
        } else {
            if (lane == 0) factors[warp] = {0.f, 0.f};
#pragma unroll
            for (int k = 0; k < Part::kPairs; ++k) to[d + k] = to[d + kD / 2 + k] = 0.f;
        }
        if (owns_new && warp >= kAttentionWarps - 2) {
            const bool is_key = warp == kAttentionWarps - 1;
            const int64_t slot = (static_cast<int64_t>(block_of(length - 1)) * p.kv_heads + kv_head) * p.block_size +
                                 position % p.block_size;
            Part x(qkv + (p.heads + (is_key ? 0 : p.kv_heads) + kv_head) * kD, lane);
            if (is_key) x.turn(cos_sin, lane);
            unsigned char* cache = (is_key ? p.k_cache : p.v_cache) + slot * kD;
            const float scale = x.template store<kFormat>(shared + (is_key ? Shared::kNewKey : Shared::kNewValue),
                                                          part == 0 ? cache : nullptr, lane);
            if (lane == 0) {
                reinterpret_cast<float*>(shared + Shared::kNewScales)[is_key ? 0 : 1] = scale;
                if (part == 0) (is_key ? p.k_scales : p.v_scales)[slot] = scale;
            }
        }
    }
    __syncthreads();

    uint32_t query[kChunks][2];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
        const float4 q = *reinterpret_cast<const float4*>(queries + g * Shared::kQueryStride + 16 * k + 4 * t);
        const float up = factors[g].x;
        query[k][0] = pack_half(q.x * up, (kPairsNeighbours<kFormat> ? q.y : q.z) * up);
        query[k][1] = pack_half((kPairsNeighbours<kFormat> ? q.z : q.y) * up, q.w * up);
    }
    const float score_factor[2] = {factors[2 * t].y, factors[2 * t + 1].y}, offset_factor = p.scale * kLog2e;
    float2* angles = cos_sin + warp * kD / 2;  // of the first token of this warp's tile
    float2 step[kD / 64] = {};                 // of kTileStep tokens
    if (has_offset)
#pragma unroll
        for (int k = 0; k < kD / 64; ++k) step[k] = exact_cos_sin(kTileStep, p.inv_freq[k * 32 + lane]);

    int num_done = 0;
    while (true) {
        float sums[kChunks][4];  // of value dims 16 c + 2 g, + 1 (upper two) and heads 2 t, 2 t + 1
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[c][i] = 0.f;
        float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};  // of heads 2 t, 2 t + 1, in units of log2
        uint32_t exponent = 15;  // of the largest value scale so far; sums are times 2^(141 - exponent)
        float2 angle[kD / 64] = {};
        if (has_offset && num_tiles > 0)
#pragma unroll
            for (int k = 0; k < kD / 64; ++k) angle[k] = exact_cos_sin(first_token(0), p.inv_freq[k * 32 + lane]);

        for (int index = 0; index < num_tiles; ++index) {
            wait_copies<kStages - 1>();
            __syncwarp();
            const int first = first_token(index);
            const uint32_t keys = ring + index % kStages * Shared::kStageBytes, values = keys + Shared::kTileBytes;
            float* key_scales = reinterpret_cast<float*>(shared + (values - base) + Shared::kTileBytes);
            float* value_scales = key_scales + kByteTile;
            if (has_offset)
#pragma unroll
                for (int k = 0; k < kD / 64; ++k) {
                    angles[k * 32 + lane] = angle[k];
                    angle[k] = turned(angle[k].x, angle[k].y, step[k]);
                }
            if (length - 1 - first < kByteTile) {  // the last tile: put the new token in
                const int token = length - 1 - first;
                if (lane < kChunks) {
                    store_shared(keys + swizzled_bytes<kD>(token, lane), load_shared(base + Shared::kNewKey + lane * 16));
                    store_shared(values + swizzled_bytes<kD>(token, lane), load_shared(base + Shared::kNewValue + lane * 16));
                }
                if (lane == 0) {
                    const float2 scales = *reinterpret_cast<const float2*>(shared + Shared::kNewScales);
                    key_scales[token] = scales.x, value_scales[token] = scales.y;
                }
            }
            __syncwarp();

            float score[2][4] = {};  // of tokens 16 m + g, + 8 (upper two) and heads 2 t, 2 t + 1
            byte_scores<kFormat, kD>(score, keys, query, lane);
            float offset_score[2][2][4] = {};
            if (has_offset)
                offset_scores<kD>(offset_score, queries + g * Shared::kQueryStride + 4 * t, angles + 4 * t, offset_table, lacking, lane);

            // Value scales, a token a lane, in units of the warp's largest so far.
            const uint32_t scale_bits = first + lane < end ? magnitude_bits(value_scales[lane]) : 0;
            const uint32_t larger = max(exponent, __reduce_max_sync(~0u, scale_bits) >> 23);
            const float unit = __uint_as_float((127u - min(127u, larger - exponent)) << 23);
            const float value_scale = __uint_as_float(scale_bits) * __uint_as_float((268u - larger) << 23);
            exponent = larger;

            float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = m * 16 + g + (i >> 1) * 8;
                    const float of_bytes = score[m][i] * score_factor[i & 1];
                    const float of_offset = (offset_score[m][0][i] + offset_score[m][1][i]) * offset_factor;
                    score[m][i] = first + token < end ? fmaf(of_bytes, key_scales[token], of_offset) : -INFINITY;
                    highest[i & 1] = fmaxf(highest[i & 1], score[m][i]);
                }
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], lanes));
                shrink[h] = exp2f(maximum[h] - highest[h]);  // a tile has one visible token at least: finite
                maximum[h] = highest[h];
                total[h] *= shrink[h];
                shrink[h] *= unit;
            }
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[c][i] *= shrink[i & 1];
            uint32_t weights[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    const float scaled = __shfl_sync(~0u, value_scale, m * 16 + g + upper * 8);
                    float w[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        w[h] = exp2f(score[m][2 * upper + h] - maximum[h]);
                        total[h] += w[h];
                        w[h] *= scaled;
                    }
                    weights[m][upper] = transpose_matrix(pack_half(w[0], w[1]));
                }
            add_values<kFormat, kD>(sums, values, weights, lane);
            __syncwarp();
            load_tile(index + kStages);
        }
        wait_copies<0>();
        __syncwarp();

        // The warps' sums become one.
        float2* max_sum = reinterpret_cast<float2*>(shared + Shared::kMaxSum);
        float* mine = reinterpret_cast<float*>(shared + warp * Shared::kRingBytes);
        const float unit = __uint_as_float((exponent - 14u) << 23) * kByteFactor<kFormat>;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) total[h] += __shfl_xor_sync(~0u, total[h], lanes);
            if (g == 0) max_sum[warp * kTableHeads + 2 * t + h] = {maximum[h], total[h]};
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
                *reinterpret_cast<float2*>(mine + (2 * t + h) * kD + 16 * c + 2 * g) = {sums[c][h] * unit, sums[c][2 + h] * unit};
        }
        __syncthreads();
        const int64_t slot = ((static_cast<int64_t>(row) * gridDim.y + blockIdx.y) * p.max_pieces + piece) * p.stride;
        for (int i = threadIdx.x; i < num_heads * kD / 4; i += kThreads) {
            const int head = i / (kD / 4), d = i % (kD / 4) * 4;
            float most = -INFINITY;
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, max_sum[w * kTableHeads + head].x);
            float4 sum = {0.f, 0.f, 0.f, 0.f};
            float weight_sum = 0.f;
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) {
                const float2 of_warp = max_sum[w * kTableHeads + head];
                const float factor = exp2f(of_warp.x - most);
                const float4 v = *reinterpret_cast<const float4*>(shared + w * Shared::kRingBytes + (head * kD + d) * 4);
                weight_sum = fmaf(of_warp.y, factor, weight_sum);
                sum.x = fmaf(v.x, factor, sum.x), sum.y = fmaf(v.y, factor, sum.y);
                sum.z = fmaf(v.z, factor, sum.z), sum.w = fmaf(v.w, factor, sum.w);
            }
            if (num_pieces == 1) {
                const float f = 1.f / weight_sum;
                float4 o = {0.f, 0.f, 0.f, 0.f};
                if (p.v_offset != nullptr) {
                    const float* from = p.v_offset + kv_head * kD + d;
                    o = {from[0], from[1], from[2], from[3]};
                }
                *reinterpret_cast<uint2*>(out + head * kD + d) = {pack(fmaf(sum.x, f, o.x), fmaf(sum.y, f, o.y)),
                                                                  pack(fmaf(sum.z, f, o.z), fmaf(sum.w, f, o.w))};
            } else {
                __stcg(reinterpret_cast<float4*>(p.partial + (slot + head) * kD + d), sum);
                if (d == 0) __stcg(p.partial_max + slot + head, make_float2(most, weight_sum));
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
    const int64_t unit_index = static_cast<int64_t>(row) * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) {
        uint32_t* counter = p.counters + unit_index;
        is_last = add_in_order(counter, num_done) == static_cast<uint32_t>(num_pieces - num_done);
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t slot0 = unit_index * p.max_pieces * p.stride;
    const PieceSums pieces = {p.partial + slot0 * kD, p.partial_max + slot0, num_pieces, p.stride};
    combine_pieces<kD, kStages == 3 ? 33 : 11>(pieces, num_heads, p.v_offset == nullptr ? nullptr : p.v_offset + kv_head * kD,
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

template <KvFormat kFormat, int kD, int kStages>
int32_t launch_variant(const QwenRtCall& call, const Device& device, dim3 grid, const Attention8Params& p) {
    return launch(call, attention_decode_8bit_kernel<kFormat, kD, kStages>, device, grid, kAttentionWarps * 32,
                  Attention8Shared<kD, kStages>::kBytes, p);
}

template <KvFormat kFormat>
int32_t launch_format(const QwenRtCall& call, const Device& device, const AttentionArguments& a, const Attention8Params& p) {
    const PieceGrid pieces = piece_grid(device, a.rows, static_cast<int64_t>(a.kv_heads) * p.parts, p.max_pieces, a.max_length);
    const bool is_crowded = pieces.is_crowded || Attention8Shared<128, 3>::kBytes > device.max_shared_bytes;
    if (a.head_dim == 64)
        return is_crowded ? launch_variant<kFormat, 64, 2>(call, device, pieces.grid, p)
                          : launch_variant<kFormat, 64, 3>(call, device, pieces.grid, p);
    return is_crowded ? launch_variant<kFormat, 128, 1>(call, device, pieces.grid, p)
                      : launch_variant<kFormat, 128, 3>(call, device, pieces.grid, p);
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
    p.block_size = a.block_size;
    p.max_blocks = a.max_blocks;
    p.max_pieces = max_pieces_of(device.num_sms, static_cast<int64_t>(a.kv_heads) * units.parts);
    p.scale = a.scale;
    p.rope_scaling = a.rope_scaling;
    p.counters = static_cast<uint32_t*>(a.counters);
    p.partial_max = static_cast<float2*>(a.scratch);
    p.partial = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + round_up(num_units * p.max_pieces * p.stride * 8));
    return a.kv_format == KvFormat::kFp8 ? launch_format<KvFormat::kFp8>(call, device, a, p)
                                         : launch_format<KvFormat::kInt8>(call, device, a, p);
}

}  // namespace qwen_rt
