// A prefill over a quantized cache: new tokens go into the cache as bytes, and attention sees what comes back out of it.
// Op, tensors: rope_kv_append_attention.cu.
//
// Three kernels. prefill_append_8bit turns q and k, leaves q as f16 in `out`, and puts keys and values as bytes, with their
// scales, into the cache. dequantize_cache reads all that the sequences hold by now, chunks before this one and this one too,
//   key[t] = k_scale[t] · value_k[t] + R(t) k_offset,   value[t] = v_scale[t] · value_v[t]
// and writes it as f16 into blocks of 64 tokens in the workspace, those of a sequence behind each other. Then the attention
// kernels of a bf16 cache run on these blocks, in f16 (attention_prefill_sm90.cu, attention_prefill.cu), and add v_offset.
//
// Numerics: angles are exact products, k is turned in f32 and rounded once, to bytes. f16 has three bits more than bf16: what
//   rounding a key with an offset of hundreds adds to its score is an eighth of what a bf16 cache would. q, keys and values
//   beyond 65504 become infinite, and the output NaN.
// Mapping of prefill_append_8bit: one block of 128 threads per token; the D / 16 neighbouring lanes of a head find its largest
//   element and share its 16-byte pieces.
// Mapping of dequantize_cache: grid (blocks of 64 tokens, kv_heads, sequences), 2 D threads: D / 32 lanes a token, each with 16
//   dims and their partners, so that an angle is worked out once.
// Workspace: i32[sequences, blocks] table, then f16 keys and values [sequences · blocks, kv_heads, 64, D].
// Cost: 6 · kv_heads · D bytes for each cached token, on top of attention's FLOPs: 0.1 to 0.3 % of a layer's time (7B).
#include "../common/dequantize.cuh"
#include "attention_8bit.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

constexpr int kScratchTokens = 64;  // of a block in the workspace, as attention_prefill_sm90.cu wants it
constexpr int kAppendThreads8 = 128;

struct Prefill8Params {
    const bf16* qkv;
    const int64_t* positions;
    const int32_t *query_starts, *block_tables;
    const float *inv_freq, *k_offset;
    unsigned char *k_cache, *v_cache;
    float *k_scales, *v_scales;
    uint32_t* out;  // pairs of f16
    int32_t* scratch_tables;
    uint4 *scratch_keys, *scratch_values;
    int64_t capacity;
    int sequences, heads, kv_heads, block_size, max_blocks, scratch_blocks;  // of a sequence
    float rope_scaling;
};

__device__ __forceinline__ uint4 packed_eight(const float* x) {
    return make_uint4(pack_half(x[0], x[1]), pack_half(x[2], x[3]), pack_half(x[4], x[5]), pack_half(x[6], x[7]));
}

// ---------------------------------------------------------------- kernels

template <KvFormat kFormat, int kD>
__global__ void __launch_bounds__(kAppendThreads8) prefill_append_8bit_kernel(const __grid_constant__ Prefill8Params p) {
    __shared__ float2 cos_sin[kD / 2];
    __shared__ int sequence;
    const int row = blockIdx.x;
    wait_for_previous_grids();
    let_next_grid_start();
    const int64_t position = p.positions[row];
    // The one sequence that this row lies in: query_starts[sequence] <= row < query_starts[sequence + 1].
    for (int b = threadIdx.x; b < p.sequences; b += kAppendThreads8)
        if (p.query_starts[b] <= row && row < p.query_starts[b + 1]) sequence = b;
    for (int i = threadIdx.x; i < kD / 2; i += kAppendThreads8) {
        const float2 angle = exact_cos_sin(static_cast<int>(position), p.inv_freq[i]);
        cos_sin[i] = {angle.x * p.rope_scaling, angle.y * p.rope_scaling};
    }
    __syncthreads();
    const bool is_inside = position >= 0 && position < p.capacity;
    const int64_t block =
        is_inside ? p.block_tables[static_cast<int64_t>(sequence) * p.max_blocks + position / p.block_size] : 0;
    const bf16* qkv = p.qkv + static_cast<int64_t>(row) * (p.heads + 2 * p.kv_heads) * kD;
    uint32_t* out = p.out + static_cast<int64_t>(row) * p.heads * kD / 2;

    constexpr int kLanes = kD / 16;  // of a head: each has 8 dims and their partners
    const int num_items = (p.heads + 2 * p.kv_heads) * kLanes;
    for (int first = 0; first < num_items; first += kAppendThreads8) {  // whole warps, because lanes of a head meet
        const int i = min(first + static_cast<int>(threadIdx.x), num_items - 1), head = i / kLanes, piece = i % kLanes;
        const bool is_there = first + static_cast<int>(threadIdx.x) < num_items;
        const uint4 low = load_activation(qkv + head * kD + piece * 8);
        const uint4 high = load_activation(qkv + head * kD + kD / 2 + piece * 8);
        const uint32_t x1[4] = {low.x, low.y, low.z, low.w}, x2[4] = {high.x, high.y, high.z, high.w};
        float y1[8], y2[8];
        uint32_t largest = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float2 a = unpack(x1[k / 2]), b = unpack(x2[k / 2]);
            y1[k] = k % 2 == 0 ? a.x : a.y, y2[k] = k % 2 == 0 ? b.x : b.y;
            if (head < p.heads + p.kv_heads) {
                const float2 y = turned(y1[k], y2[k], cos_sin[piece * 8 + k]);
                y1[k] = y.x, y2[k] = y.y;
            }
            largest = max(largest, max(magnitude_bits(y1[k]), magnitude_bits(y2[k])));
        }
#pragma unroll
        for (int other = 1; other < kLanes; other *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, other));
        if (!is_there) continue;
        if (head < p.heads) {
            uint32_t* to = out + head * kD / 2 + piece * 4;
            *reinterpret_cast<uint4*>(to) = packed_eight(y1);
            *reinterpret_cast<uint4*>(to + kD / 4) = packed_eight(y2);
        } else if (is_inside) {
            const bool is_key = head < p.heads + p.kv_heads;
            const int kv_head = head - p.heads - (is_key ? 0 : p.kv_heads);
            const int64_t slot = (block * p.kv_heads + kv_head) * p.block_size + position % p.block_size;
            const float scale = scale_of<kFormat>(largest);
            unsigned char* to = (is_key ? p.k_cache : p.v_cache) + slot * kD + piece * 8;
            const auto word = [&](const float* y) {
                return bytes_of<kFormat>(y[0], y[1], scale) | bytes_of<kFormat>(y[2], y[3], scale) << 16;
            };
            *reinterpret_cast<uint2*>(to) = make_uint2(word(y1), word(y1 + 4));
            *reinterpret_cast<uint2*>(to + kD / 2) = make_uint2(word(y2), word(y2 + 4));
            if (piece == 0) (is_key ? p.k_scales : p.v_scales)[slot] = scale;
        }
    }
}

// Sixteen bytes as numbers.
template <KvFormat kFormat>
__device__ __forceinline__ void numbers_of(uint4 bytes, float (&number)[16]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const uint32_t byte = words[i / 4] >> 8 * (i & 3) & 255;
        number[i] = kFormat == KvFormat::kFp8 ? number_of_fp8(byte) : static_cast<float>(static_cast<signed char>(byte));
    }
}

template <KvFormat kFormat, int kD>
__global__ void __launch_bounds__(kScratchTokens* kD / 32) dequantize_cache_kernel(const __grid_constant__ Prefill8Params p) {
    constexpr int kLanes = kD / 32;
    wait_for_previous_grids();
    let_next_grid_start();
    const int block = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
    const int last_row = p.query_starts[sequence + 1] - 1;
    if (last_row < p.query_starts[sequence]) return;
    if (p.positions[p.query_starts[sequence]] >= p.capacity) return;  // no row of it attends
    const int64_t length = min(p.positions[last_row] + 1, p.capacity);
    const int scratch_block = sequence * p.scratch_blocks + block;
    const int token = threadIdx.x / kLanes, piece = threadIdx.x % kLanes;
    const int64_t position = static_cast<int64_t>(block) * kScratchTokens + token;
    if (static_cast<int64_t>(block) * kScratchTokens >= length) return;
    if (threadIdx.x == 0 && kv_head == 0) p.scratch_tables[scratch_block] = scratch_block;
    if (position >= length) return;

    const int64_t cached = p.block_tables[static_cast<int64_t>(sequence) * p.max_blocks + position / p.block_size];
    const int64_t slot = (cached * p.kv_heads + kv_head) * p.block_size + position % p.block_size;
    const int64_t from = slot * kD + piece * 16;
    // In units of 16 bytes: eight f16.
    const int64_t scratch_row = (static_cast<int64_t>(scratch_block) * p.kv_heads + kv_head) * kScratchTokens + token;
    const int64_t to = scratch_row * kD / 8 + piece * 2;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const unsigned char* cache = which == 0 ? p.k_cache : p.v_cache;
        const float scale = __ldcg((which == 0 ? p.k_scales : p.v_scales) + slot);
        float x1[16], x2[16];
        numbers_of<kFormat>(load_activation(cache + from), x1);
        numbers_of<kFormat>(load_activation(cache + from + kD / 2), x2);
#pragma unroll
        for (int i = 0; i < 16; ++i) x1[i] *= scale, x2[i] *= scale;
        if (which == 0 && p.k_offset != nullptr) {
            const float* offset = p.k_offset + kv_head * kD + piece * 16;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float2 angle = exact_cos_sin(static_cast<int>(position), p.inv_freq[piece * 16 + i]);
                const float2 o = turned(offset[i] * p.rope_scaling, offset[kD / 2 + i] * p.rope_scaling, angle);
                x1[i] += o.x, x2[i] += o.y;
            }
        }
        uint4* scratch = (which == 0 ? p.scratch_keys : p.scratch_values) + to;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float(&x)[16] = half == 0 ? x1 : x2;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                scratch[half * kD / 16 + i] = packed_eight(x + 8 * i);
        }
    }
}

// ---------------------------------------------------------------- launcher

namespace {

int64_t scratch_blocks_of(int64_t capacity) { return (capacity + kScratchTokens - 1) / kScratchTokens; }
int64_t table_bytes_of(int64_t blocks) { return (blocks * 4 + 255) / 256 * 256; }

template <KvFormat kFormat, int kD>
int32_t launch_kernels(const QwenRtCall& call, const Device& device, const AttentionArguments& a, const Prefill8Params& p) {
    if (const int32_t status = launch(call, prefill_append_8bit_kernel<kFormat, kD>, device, dim3(static_cast<unsigned>(a.rows)),
                                      kAppendThreads8, 0, p))
        return status;
    const dim3 grid(static_cast<unsigned>(p.scratch_blocks), static_cast<unsigned>(p.kv_heads),
                    static_cast<unsigned>(p.sequences));
    return launch(call, dequantize_cache_kernel<kFormat, kD>, device, grid, kScratchTokens * kD / 32, 0, p);
}

}  // namespace

int64_t scratch_attention_prefill_8bit(int64_t sequences, int64_t capacity, int64_t kv_heads, int64_t head_dim) {
    const int64_t blocks = sequences * scratch_blocks_of(capacity);
    return table_bytes_of(blocks) + blocks * kScratchTokens * kv_heads * head_dim * 4;
}

int32_t launch_attention_prefill_8bit(const QwenRtCall& call, const Device& device, const AttentionArguments& a) {
    const int64_t blocks = a.sequences * scratch_blocks_of(a.capacity);
    if (blocks * a.kv_heads * kScratchTokens > INT32_MAX)
        return refuse(call, QWEN_RT_UNSUPPORTED, "sequences * block_size * max_blocks * kv_heads = %lld; expected less than 2^31",
                      (long long)(blocks * a.kv_heads * kScratchTokens));
    Prefill8Params p = {};
    p.qkv = a.qkv;
    p.positions = a.positions;
    p.query_starts = a.query_starts;
    p.block_tables = a.block_tables;
    p.inv_freq = a.inv_freq;
    p.k_offset = a.k_offset;
    p.k_cache = static_cast<unsigned char*>(a.k_cache);
    p.v_cache = static_cast<unsigned char*>(a.v_cache);
    p.k_scales = a.k_scales;
    p.v_scales = a.v_scales;
    p.out = reinterpret_cast<uint32_t*>(a.out);
    p.scratch_tables = static_cast<int32_t*>(a.scratch);
    p.scratch_keys = reinterpret_cast<uint4*>(static_cast<char*>(a.scratch) + table_bytes_of(blocks));
    p.scratch_values = p.scratch_keys + blocks * kScratchTokens * a.kv_heads * a.head_dim / 8;
    p.capacity = a.capacity;
    p.sequences = static_cast<int>(a.sequences);
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.block_size = a.block_size;
    p.max_blocks = a.max_blocks;
    p.scratch_blocks = static_cast<int>(scratch_blocks_of(a.capacity));
    p.rope_scaling = a.rope_scaling;
    const bool is_fp8 = a.kv_format == KvFormat::kFp8;
    auto* kernels = is_fp8 ? launch_kernels<KvFormat::kFp8, 128> : launch_kernels<KvFormat::kInt8, 128>;
    if (a.head_dim == 64) kernels = is_fp8 ? launch_kernels<KvFormat::kFp8, 64> : launch_kernels<KvFormat::kInt8, 64>;
    const int32_t status = kernels(call, device, a, p);
    if (status != QWEN_RT_OK) return status;
    AttentionArguments over = a;
    over.k_cache = p.scratch_keys;
    over.v_cache = p.scratch_values;
    over.block_tables = p.scratch_tables;
    over.block_size = kScratchTokens;
    over.max_blocks = p.scratch_blocks;
    over.num_blocks = blocks;
    return launch_attention_over_cache(call, device, over);
}

}  // namespace qwen_rt
