// Turns query and key, appends key and value to the paged cache, attends over all tokens of the row's sequence up to it:
//   q' = rope(q, p), k' = rope(k, p);  cache[p] = (k', v);  out[h] = softmax_t(scale · q'[h] · key[t]) · value[t], t <= p
//   rope: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for dims i and i + D/2, angle p · inv_freq[i], times rope_scaling
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
//   k_cache      bf16[num_blocks, kv_heads, block_size, D]      in and out; v_cache likewise. Tokens after p are not read
//   k_scales, v_scales, k_offset, v_offset                      of a quantized cache: must be absent
//   out          bf16[rows, heads · D]                          out; a position beyond the table gives NaN
//   present_k, present_v                                        out: the caches themselves, or NULL
//   present_k_scales, present_v_scales                          must be absent
// Dims: rows, q_width = heads · D, kv_heads, head_dim, num_blocks, block_size, sequences, max_blocks.
// Attributes: scale, rope_scaling, max_length (longest p + 1 that will occur; 0: what the block table can hold), kv_format
//   (0: bf16).
//
// Mapping: rows == sequences, a decode step: attention_decode.cu, split over the tokens of a row. More rows, a prefill:
//   attention_prefill.cu writes the cache and turns q, then attends with mma.sync; on SM 9.0 attention_prefill_sm90.cu attends
//   with wgmma. This file checks and dispatches.
// Numerics: angles, rotation, scores, softmax and sums in f32; q', k' rounded to bf16 as the cache is, probabilities to
//   bf16 before the product with values (their sum is not).
// Preconditions (checked here): at most 64 sequences, head_dim 64 or 128, heads a multiple of kv_heads, at most 16 times as
//   many, block_size a multiple of 16, workspace given.
// Cost: decode 4 · kv_heads · D · (p + 1) bytes a row, bound by reading; prefill 4 · heads · D FLOPs per row and visible token,
//   bound by the matrix units.
// Reference: benchmarks/kernel_references.py::rope_kv_append_attention; test: tests/plugins/test_kernels_gpu.py and
//   test_attention_prefill_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: apply_rotary_pos_emb, eager_attention_forward of transformers' modeling_qwen2.py.
#include "attention.cuh"

#include "../common/ops.cuh"

namespace qwen_rt {

namespace {

enum Tensor {
    kQkv, kPositions, kQueryStarts, kInvFreq, kBlockTables, kKCache, kVCache, kKScales, kVScales, kKOffset, kVOffset, kOut,
    kPresentK, kPresentV, kPresentKScales, kPresentVScales, kNumTensors
};
enum Dim { kRows, kQWidth, kKvHeads, kHeadDim, kNumBlocks, kBlockSize, kSequences, kMaxBlocks, kNumDims };
enum Attribute { kScale, kRopeScaling, kMaxLength, kKvFormat, kNumAttributes };

constexpr int kBlockStep = 16;  // what a block's size must divide by

}  // namespace

int64_t workspace_rope_kv_append_attention(const int64_t* dims, int32_t) {
    Device device;
    if (current_device(&device) != cudaSuccess || dims[kHeadDim] < 1) return -1;
    if (dims[kRows] != dims[kSequences]) return 0;
    return QWEN_RT_COUNTER_BYTES + scratch_attention_decode(device, dims[kRows], dims[kQWidth] / dims[kHeadDim],
                                                            dims[kKvHeads], dims[kHeadDim]);
}

int32_t launch_rope_kv_append_attention(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(
            call, set_of(kQkv, kPositions, kQueryStarts, kInvFreq, kBlockTables, kKCache, kVCache, kOut), kNumTensors, kNumDims,
            kNumAttributes, set_of(kPositions, kQueryStarts, kInvFreq, kBlockTables)))
        return status;
    if (call.attributes[kKvFormat] != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "kv_format=%g; expected 0 (bf16)", call.attributes[kKvFormat]);
    for (int i = 0; i < 2; ++i)
        if (call.tensors[kPresentK + i] != nullptr && call.tensors[kPresentK + i] != call.tensors[kKCache + i])
            return refuse(call, QWEN_RT_INVALID, "present_%c is another buffer; expected the cache itself", "kv"[i]);
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
    if (dims[kQWidth] % head_dim != 0 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup)
        return refuse(call, QWEN_RT_UNSUPPORTED, "q_width=%lld, head_dim=%lld, kv_heads=%lld; expected heads a multiple of kv_heads, at most %d times",
                      (long long)dims[kQWidth], (long long)head_dim, (long long)kv_heads, kMaxGroup);
    if (dims[kBlockSize] % kBlockStep != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size=%lld; expected a multiple of %d", (long long)dims[kBlockSize],
                      kBlockStep);
    const int64_t capacity = dims[kBlockSize] * dims[kMaxBlocks];
    if (capacity > (int64_t{1} << 24))
        return refuse(call, QWEN_RT_UNSUPPORTED, "block_size * max_blocks = %lld; expected at most 2^24", (long long)capacity);
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
    a.k_cache = static_cast<bf16*>(call.tensors[kKCache]);
    a.v_cache = static_cast<bf16*>(call.tensors[kVCache]);
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
    const int64_t longest = static_cast<int64_t>(call.attributes[kMaxLength]);
    a.max_length = longest <= 0 || longest > capacity ? capacity : longest;
    return rows == sequences ? launch_attention_decode(call, device, a) : launch_attention_prefill(call, device, a);
}

}  // namespace qwen_rt
