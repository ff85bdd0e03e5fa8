// Multiplies one row of attention output per sequence by its projection and adds it to the same row of the residual stream:
//   out[b] = residual[i] + weight · attention[i], i = indices[b]
// In the last layer nothing but these rows is needed from here on: a prefill is spared one layer's MLP.
//
// Tensors (in this order):
//   attention  bf16[rows, width]         in
//   indices    i64[sequences]            in: rows; not read if rows == sequences (then i = b). An index outside 0..rows - 1
//                                        gives a row of NaN, so that it cannot pass unnoticed
//   weight     [hidden, width]           in, bf16 row-major as in the checkpoint, or quantized (core/quantization.py)
//   residual   bf16[rows, hidden]        in
//   scale, zero_point, perm              in, of a quantized weight: [hidden, groups], as packed, i32[width]; the last two
//                                        optional
//   out        bf16[sequences, hidden]   out
// Dims: rows, sequences, width, hidden, groups (0: bf16). Attributes: weight_format.
//
// Numerics, mapping: common/skinny_gemm.cuh; the residual is added in f32 before the one rounding to bf16. With more rows
//   than sequences a kernel copies the rows first, two blocks a sequence, 16 bytes per thread and turn: a row has the same
//   bits as if it were given alone.
// Workspace: none for bf16 if rows == sequences; else the counters (not used), bf16[sequences, width + hidden], and room for
//   permuted rows where the weight is quantized.
// Preconditions (the launcher checks): sequences <= 64, rows >= sequences, width a multiple of 64, hidden of 8, 16-byte
//   aligned pointers but for indices.
// Cost: the stored bytes of the weight, 2 · hidden · width FLOPs per sequence; bound by reading.
// Reference: benchmarks/kernel_references.py::o_proj_residual; test: tests/plugins/test_prefill_gpu.py,
//   test_quantized_gpu.py; bench:
//   benchmarks/bench_kernels.py (o_proj_residual: a decode step runs the same kernel).
// Source: Qwen2Attention.o_proj and Qwen2DecoderLayer of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

struct Gather {
    const bf16* from;
    bf16* to;
    int width;
};

__global__ void gather_kernel(Gather attention, Gather residual, const int64_t* indices, int64_t rows) {
    let_next_grid_start();
    wait_for_previous_grids();
    const Gather g = blockIdx.y == 0 ? attention : residual;
    const int64_t index = __ldcg(reinterpret_cast<const long long*>(indices) + blockIdx.x);
    const bool is_valid = index >= 0 && index < rows;
    const bf16* from = g.from + (is_valid ? index : 0) * g.width;
    uint4* to = reinterpret_cast<uint4*>(g.to + static_cast<int64_t>(blockIdx.x) * g.width);
    const uint4 nan = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);
    for (int i = threadIdx.x; i < g.width / 8; i += blockDim.x) to[i] = is_valid ? load_activation(from + i * 8) : nan;
}

// ---------------------------------------------------------------- launcher

namespace {

enum Tensor { kAttention, kIndices, kWeight, kResidual, kScale, kZeroPoint, kPerm, kOut, kNumTensors };
enum Dim { kRows, kSequences, kWidth, kHidden, kGroups, kNumDims };
enum Attribute { kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {1, {kWeight}, {kScale}, {kZeroPoint}, kPerm};

constexpr int kGatherThreads = 128;

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Of the chosen rows of attention and residual, behind the counters.
int64_t bytes_of_chosen(const int64_t* dims) {
    return dims[kRows] == dims[kSequences] ? 0 : round_up(dims[kSequences] * (dims[kWidth] + dims[kHidden]) * 2);
}

}  // namespace

int64_t workspace_select_o_proj_residual(const int64_t* dims, int32_t) {
    const int64_t permuted = workspace_skinny(dims[kSequences], dims[kWidth], dims[kGroups]), chosen = bytes_of_chosen(dims);
    return permuted > 0 ? permuted + chosen : chosen > 0 ? QWEN_RT_COUNTER_BYTES + chosen : 0;
}

int32_t launch_select_o_proj_residual(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kAttention, kIndices, kWeight, kResidual, kOut), kNumTensors, kNumDims,
                                             kNumAttributes, set_of(kIndices, kPerm), 1))
        return status;
    Matrices matrices;
    if (const int32_t status = read_matrices(call, kMatrices, call.dims[kWidth], call.dims[kGroups],
                                             call.attributes[kWeightFormat], &matrices))
        return status;
    const int64_t rows = call.dims[kRows], sequences = call.dims[kSequences];
    if (sequences > kMaxRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "sequences=%lld; expected 1 to %d", static_cast<long long>(sequences),
                      kMaxRows);
    if (rows < sequences)
        return refuse(call, QWEN_RT_INVALID, "rows=%lld of sequences=%lld; expected at least as many",
                      static_cast<long long>(rows), static_cast<long long>(sequences));
    SkinnyParams p = {};
    p.epilogue = Epilogue::kResidual;
    p.x = static_cast<const bf16*>(call.tensors[kAttention]);
    p.residual = static_cast<const bf16*>(call.tensors[kResidual]);
    p.out = call.tensors[kOut];
    p.rows = static_cast<int>(sequences);
    p.k = static_cast<int>(call.dims[kWidth]);
    p.units = static_cast<int>(call.dims[kHidden]);
    const int64_t needed = workspace_select_o_proj_residual(call.dims, call.num_dims);
    void* scratch = skinny_scratch(call, needed);
    if (rows > sequences) {
        if (p.k % 8 != 0 || p.units % 8 != 0)
            return refuse(call, QWEN_RT_UNSUPPORTED, "width=%d, hidden=%d; expected multiples of 8", p.k, p.units);
        if (scratch == nullptr)
            return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld at %p; expected %lld, aligned to 16",
                          static_cast<long long>(call.workspace_bytes), call.workspace, static_cast<long long>(needed));
        Device device;
        if (const cudaError_t error = current_device(&device); error != cudaSuccess)
            return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
        bf16* attention = static_cast<bf16*>(scratch);
        bf16* residual = attention + sequences * p.k;
        const Gather of_attention = {p.x, attention, p.k}, of_residual = {p.residual, residual, p.units};
        if (const int32_t status = launch(call, gather_kernel, device, dim3(static_cast<unsigned>(sequences), 2), kGatherThreads,
                                          0, of_attention, of_residual, static_cast<const int64_t*>(call.tensors[kIndices]), rows))
            return status;
        p.x = attention;
        p.residual = residual;
        scratch = static_cast<char*>(scratch) + bytes_of_chosen(call.dims);
    }
    return launch_skinny(call, matrices, p, scratch);
}

}  // namespace qwen_rt
