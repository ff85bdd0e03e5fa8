// Looks up token embeddings: out[n] = table[ids[n]]
//
// Tensors (in this order):
//   ids   i64[rows]            in; an id outside 0..vocab - 1 gives a row of NaN, so that it cannot pass unnoticed
//   table [vocab, hidden]      in, bf16, or fp8 or int8 (core/quantization.py)
//   scale f32[vocab, groups]   in, of a quantized table
//   out   bf16[rows, hidden]   out
// Dims: rows, vocab, hidden, groups (0: bf16). Attributes: weight_format.
//
// Numerics: a copy of bf16, bit-exact; of others number · scale in f32, rounded to bf16 once.
// Mapping: one block per row, 16 bytes of out per thread and turn.
// Overlap: the first kernel of a step. It lets the next kernel start only after its own wait: so every kernel behind it may
//   read, before waiting, what the step before wrote (positions, block tables, the KV cache's earlier tokens).
// Preconditions (the launcher checks): hidden a multiple of 8, 16-byte aligned table and out, groups of at least 8 columns
//   that divide hidden. Any number of rows.
// Cost: the stored bytes of the rows, and 2 · rows · hidden; bound by latency.
// Reference: benchmarks/kernel_references.py::embed; test: tests/plugins/test_kernels_gpu.py, test_quantized_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: Qwen2Model.embed_tokens of transformers' modeling_qwen2.py.
#include "../common/dequantize.cuh"
#include "../common/launch.cuh"
#include "../common/ops.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

template <Format kFormat>
__global__ void embed_kernel(const int64_t* ids, const unsigned char* table, const float* scale, bf16* out, int64_t vocab, int hidden,
                             int groups) {
    wait_for_previous_grids();
    let_next_grid_start();
    const int64_t id = __ldcg(reinterpret_cast<const long long*>(ids) + blockIdx.x);
    const bool is_valid = id >= 0 && id < vocab;
    const unsigned char* from = table + (is_valid ? id : 0) * row_bytes_of(kFormat, hidden);
    uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(blockIdx.x) * hidden);
    const uint4 nan = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);
    for (int i = threadIdx.x; i < hidden / 8; i += blockDim.x) {
        if constexpr (kFormat == Format::kBf16) {
            to[i] = is_valid ? __ldg(reinterpret_cast<const uint4*>(from) + i) : nan;
        } else {
            const float factor = __ldg(scale + (is_valid ? id : 0) * groups + i * 8 / (hidden / groups));
            to[i] = is_valid ? dequantize_eight<kFormat>(from, i, factor, 0) : nan;
        }
    }
}

// ---------------------------------------------------------------- launcher

namespace {

enum Tensor { kIds, kTable, kScale, kOut, kNumTensors };
enum Dim { kRows, kVocab, kHidden, kGroups, kNumDims };
enum Attribute { kWeightFormat, kNumAttributes };

constexpr int kEmbedThreads = 256;

}  // namespace

int32_t launch_embed(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kIds, kTable, kOut), kNumTensors, kNumDims, kNumAttributes,
                                             set_of(kIds, kScale), 1))
        return status;
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int hidden = static_cast<int>(call.dims[kHidden]), groups = static_cast<int>(call.dims[kGroups]);
    if (hidden % 8 != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "hidden=%d; expected a multiple of 8", hidden);
    const double format = call.attributes[kWeightFormat];
    if (!(format == 0 || format == 1 || format == 2))
        return refuse(call, QWEN_RT_UNSUPPORTED, "weight_format=%g of an embedding; expected 0 (bf16), 1 (fp8) or 2 (int8)", format);
    if ((format != 0) != (call.tensors[kScale] != nullptr) || (format != 0) != (groups > 0))
        return refuse(call, QWEN_RT_INVALID, "weight_format=%g with groups=%d; expected scales of a quantized table only", format,
                      groups);
    if (groups > 0 && (hidden % groups != 0 || hidden / groups % 8 != 0))
        return refuse(call, QWEN_RT_UNSUPPORTED, "groups=%d of hidden=%d; expected groups of a multiple of 8", groups, hidden);
    const auto kernel = format == 0   ? embed_kernel<Format::kBf16>
                        : format == 1 ? embed_kernel<Format::kFp8>
                                      : embed_kernel<Format::kInt8>;
    return launch(call, kernel, device, dim3(static_cast<unsigned>(call.dims[kRows])), kEmbedThreads, 0,
                  static_cast<const int64_t*>(call.tensors[kIds]), static_cast<const unsigned char*>(call.tensors[kTable]),
                  static_cast<const float*>(call.tensors[kScale]), static_cast<bf16*>(call.tensors[kOut]), call.dims[kVocab], hidden,
                  groups);
}

}  // namespace qwen_rt
