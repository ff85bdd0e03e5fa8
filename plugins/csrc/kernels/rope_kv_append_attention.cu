// Turns query and key, appends key and value to the paged cache, attends over all tokens of the row's sequence up to it:
//   q' = R(p) q;  cache[p] = (R(p) k, v);  key[t] = cache_k[t] + R(t) k_offset,  value[t] = cache_v[t] + v_offset
//   out[h] = softmax_t(scale · q'[h] · key[t]) · value[t], t <= p
//   R(p): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for dims i and i + D/2, angle p · inv_freq[i], times rope_scaling
// A quantized cache holds bytes, and cache[t] is scale[t] · value[t] with a scale for each token and kv head.
//
// Tensors (in this order):
//   qkv          bf16[rows, (heads + 2 kv_heads) D]             in: all q heads, then k, then v
//   positions    i64[rows]                                      in: of the new tokens; negative: the row is idle, out is 0.
//                                                               In a prefill those of a sequence follow each other
//   query_starts i32[sequences + 1]                             in: first row of every sequence, then rows; not read if
//                                                               rows == sequences
//   inv_freq     f32[D / 2]                                     in
//   block_tables i32[sequences, max_blocks]                     in: cache block of tokens i·block_size ..; only the first
//                                                               p / block_size + 1 of a sequence are read
//   k_cache      bf16, e4m3 or i8 [num_blocks, kv_heads, block_size, D]   in and out; v_cache likewise. Tokens after p may
//                                                               hold anything
//   k_scales     f32[scale_blocks, kv_heads, block_size]        in and out, of a quantized cache; v_scales likewise
//   k_offset     f32[kv_heads, D]                               in, of a quantized cache, or NULL: zeros; v_offset likewise
//   out          bf16[rows, heads · D]                          out; a position beyond the table gives NaN
//   present_k, present_v                                        out: the caches themselves, or NULL
//   present_k_scales, present_v_scales                          out: the scales themselves, or NULL
// Dims: rows, q_width = heads · D, kv_heads, head_dim, num_blocks, block_size, sequences, max_blocks, scale_blocks (num_blocks
//   of a quantized cache, else 0).
// Attributes: scale, rope_scaling, max_length (longest p + 1 that will occur; 0: what the block table can hold), kv_format
//   (0: bf16, 1: fp8, 2: int8).
//
// Mapping: rows == sequences, a decode step: attention_decode.cu, split over the tokens of a row; of a quantized cache
//   attention_decode_8bit.cu. More rows, a prefill: attention_prefill.cu writes the cache and turns q, then attends with
//   mma.sync; on SM 9.0 attention_prefill_sm90.cu attends with wgmma. With a quantized cache attention_prefill_8bit.cu writes
//   the cache, makes f16 of what it holds, and lets the same kernels attend. This file checks and dispatches.
// Numerics: angles, rotation, scores, softmax and sums in f32; q', k' rounded to bf16 as the cache is, probabilities to
//   bf16 before the product with values (their sum is not). With a quantized cache: the heads of its two files.
// Preconditions (checked here): at most 64 sequences, head_dim 64 or 128, heads a multiple of kv_heads, at most 16 times as
//   many, block_size a multiple of 16, workspace given, scales and offsets only with kv_format 1 or 2, and then all scales;
//   num_blocks · kv_heads · block_size at most 2^32.
// Cost: decode 4 · kv_heads · D · (p + 1) bytes a row, quantized 2 · kv_heads · (D + 4) · (p + 1), bound by reading; prefill
//   4 · heads · D FLOPs per row and visible token, bound by the matrix units.
// Reference: benchmarks/kernel_references.py::rope_kv_append_attention; test: tests/plugins/test_kernels_gpu.py,
//   test_attention_prefill_gpu.py and test_attention_8bit_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: apply_rotary_pos_emb, eager_attention_forward of transformers' modeling_qwen2.py; docs/kv-cache.md.
#include "attention.cuh"

#include "../common/ops.cuh"

namespace qwen_rt {

namespace {

enum Tensor {
    kQkv, kPositions, kQueryStarts, kInvFreq, kBlockTables, kKCache, kVCache, kKScales, kVScales, kKOffset, kVOffset, kOut,
    kPresentK, kPresentV, kPresentKScales, kPresentVScales, kNumTensors
};
enum Dim { kRows, kQWidth, kKvHeads, kHeadDim, kNumBlocks, kBlockSize, kSequences, kMaxBlocks, kScaleBlocks, kNumDims };
enum Attribute { kScale, kRopeScaling, kMaxLength, kKvFormat, kNumAttributes };

constexpr int kBlockStep = 16;  // what a block's size must divide by
constexpr int64_t kMostRows = int64_t{1} << 20;

// Whether the tensors and dims are those of a cache of the format that the attribute says.
int32_t check_format(const QwenRtCall& call) {
    const double format = call.attributes[kKvFormat];
    if (format != 0 && format != 1 && format != 2)
        return refuse(call, QWEN_RT_UNSUPPORTED, "kv_format=%g; expected 0 (bf16), 1 (fp8) or 2 (int8)", format);
    const bool is_quantized = format != 0;
    for (const int tensor : {kKScales, kVScales})
        if ((call.tensors[tensor] != nullptr) != is_quantized)
            return refuse(call, QWEN_RT_INVALID, "kv_format=%g and %s scales; expected scales with kv_format 1 or 2, and then both",
                          format, is_quantized ? "no" : "given");
    if (!is_quantized && (call.tensors[kKOffset] != nullptr || call.tensors[kVOffset] != nullptr))
        return refuse(call, QWEN_RT_INVALID, "kv_format=0 and an offset; expected none, or a quantized cache");
    if (call.dims[kScaleBlocks] != (is_quantized ? call.dims[kNumBlocks] : 0))
        return refuse(call, QWEN_RT_INVALID, "scale_blocks=%lld; expected %lld", (long long)call.dims[kScaleBlocks],
                      (long long)(is_quantized ? call.dims[kNumBlocks] : 0));
    const struct {
        int present, given;
        const char* name;
    } pairs[] = {{kPresentK, kKCache, "present_k"}, {kPresentV, kVCache, "present_v"}, {kPresentKScales, kKScales, "present_k_scales"},
                 {kPresentVScales, kVScales, "present_v_scales"}};
    for (const auto& pair : pairs)
        if (call.tensors[pair.present] != nullptr && call.tensors[pair.present] != call.tensors[pair.given])
            return refuse(call, QWEN_RT_INVALID, "%s is another buffer; expected the cache itself", pair.name);
    return QWEN_RT_OK;
}

}  // namespace

int64_t workspace_rope_kv_append_attention(const int64_t* dims, int32_t) {
    Device device;
    if (current_device(&device) != cudaSuccess || dims[kHeadDim] < 1 || dims[kKvHeads] < 1) return -1;
    const int64_t heads = dims[kQWidth] / dims[kHeadDim], kv_heads = dims[kKvHeads], head_dim = dims[kHeadDim];
    if (heads < kv_heads) return -1;
    const bool is_quantized = dims[kScaleBlocks] > 0;
    if (dims[kRows] != dims[kSequences])
        return is_quantized ? QWEN_RT_COUNTER_BYTES + scratch_attention_prefill_8bit(
                                                          dims[kSequences], dims[kBlockSize] * dims[kMaxBlocks], kv_heads, head_dim)
                            : 0;
    return QWEN_RT_COUNTER_BYTES + (is_quantized ? scratch_attention_decode_8bit(device, dims[kRows], heads, kv_heads, head_dim)
                                                 : scratch_attention_decode(device, dims[kRows], heads, kv_heads, head_dim));
}

int32_t launch_rope_kv_append_attention(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(
            call, set_of(kQkv, kPositions, kQueryStarts, kInvFreq, kBlockTables, kKCache, kVCache, kOut), kNumTensors, kNumDims,
            kNumAttributes, set_of(kPositions, kQueryStarts, kInvFreq, kBlockTables), 1))
        return status;
    if (const int32_t status = check_format(call)) return status;
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int64_t* dims = call.dims;
    const int64_t rows = dims[kRows], sequences = dims[kSequences], kv_heads = dims[kKvHeads], head_dim = dims[kHeadDim];
    if (head_dim != 64 && head_dim != 128)
        return refuse(call, QWEN_RT_UNSUPPORTED, "head_dim=%lld; expected 64 or 128", (long long)head_dim);
    const int64_t heads = dims[kQWidth] / head_dim;
    if (sequences > kMaxRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "sequences=%lld; expected 1 to %d", (long long)sequences, kMaxRows);
    if (rows < sequences)
        return refuse(call, QWEN_RT_INVALID, "rows=%lld for %lld sequences; expected one each or more", (long long)rows,
                      (long long)sequences);
    if (rows > kMostRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%lld; expected at most 2^20 in one call", (long long)rows);
    if (dims[kQWidth] % head_dim != 0 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup)
        return refuse(call, QWEN_RT_UNSUPPORTED, "q_width=%lld, head_dim=%lld, kv_heads=%lld; expected heads a multiple of kv_heads, at most %d times",
                      (long long)dims[kQWidth], (long long)head_dim, (long long)kv_heads, kMaxGroup);
    if (dims[kBlockSize] % kBlockStep != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size=%lld; expected a multiple of %d", (long long)dims[kBlockSize],
                      kBlockStep);
    const int64_t capacity = dims[kBlockSize] * dims[kMaxBlocks];
    if (capacity > (int64_t{1} << 24))
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size * max_blocks = %lld; expected at most 2^24", (long long)capacity);
    if (dims[kNumBlocks] * kv_heads * dims[kBlockSize] > (int64_t{1} << 32))
        return refuse(call, QWEN_RT_UNSUPPORTED, "num_blocks * kv_heads * block_size = %lld; expected at most 2^32",
                      (long long)(dims[kNumBlocks] * kv_heads * dims[kBlockSize]));
    const int64_t needed = workspace_rope_kv_append_attention(dims, call.num_dims);
    if (needed > 0 && (call.workspace == nullptr || call.workspace_bytes < needed))
        return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld; expected %lld", (long long)call.workspace_bytes,
                      (long long)needed);
    AttentionArguments a = {};
    a.qkv = static_cast<const bf16*>(call.tensors[kQkv]);
    a.positions = static_cast<const int64_t*>(call.tensors[kPositions]);
    a.query_starts = static_cast<const int32_t*>(call.tensors[kQueryStarts]);
    a.inv_freq = static_cast<const float*>(call.tensors[kInvFreq]);
    a.block_tables = static_cast<const int32_t*>(call.tensors[kBlockTables]);
    a.k_cache = call.tensors[kKCache];
    a.v_cache = call.tensors[kVCache];
    a.k_scales = static_cast<float*>(call.tensors[kKScales]);
    a.v_scales = static_cast<float*>(call.tensors[kVScales]);
    a.k_offset = static_cast<const float*>(call.tensors[kKOffset]);
    a.v_offset = static_cast<const float*>(call.tensors[kVOffset]);
    a.out = static_cast<bf16*>(call.tensors[kOut]);
    a.counters = call.workspace;
    a.scratch = static_cast<char*>(call.workspace) + QWEN_RT_COUNTER_BYTES;
    a.rows = rows;
    a.sequences = sequences;
    a.num_blocks = dims[kNumBlocks];
    a.heads = static_cast<int>(heads);
    a.kv_heads = static_cast<int>(kv_heads);
    a.head_dim = static_cast<int>(head_dim);
    a.block_size = static_cast<int>(dims[kBlockSize]);
    a.max_blocks = static_cast<int>(dims[kMaxBlocks]);
    a.scale = static_cast<float>(call.attributes[kScale]);
    a.rope_scaling = static_cast<float>(call.attributes[kRopeScaling]);
    a.capacity = capacity;
    a.kv_format = static_cast<KvFormat>(static_cast<int>(call.attributes[kKvFormat]));
    const int64_t longest = static_cast<int64_t>(call.attributes[kMaxLength]);
    a.max_length = longest <= 0 || longest > capacity ? capacity : longest;
    const bool is_decode = rows == sequences;
    if (a.kv_format == KvFormat::kBf16)
        return is_decode ? launch_attention_decode(call, device, a) : launch_attention_prefill(call, device, a);
    return is_decode ? launch_attention_decode_8bit(call, device, a) : launch_attention_prefill_8bit(call, device, a);
}

}  // namespace qwen_rt
