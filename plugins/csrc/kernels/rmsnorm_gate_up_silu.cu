// Normalizes the hidden rows, multiplies by gate and up, and gates:
//   y[n] = hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight;  activation[n] = silu(gate · y[n]) ∘ (up · y[n])
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden] in
//   norm_weight bf16[hidden]       in
//   gate_weight [ffn, hidden]      in, bf16 row-major as in the checkpoint, or quantized (core/quantization.py); up_weight
//                                  likewise
//   gate_scale, up_scale           in, of quantized matrices: [ffn, groups]
//   gate_zero_point, up_zero_point in, optional, as packed
//   perm        i32[hidden]        in, optional: the column order of both
//   activation  bf16[rows, ffn]    out, must not overlap hidden
// Dims: rows, hidden, ffn, groups (0: bf16). Attributes: epsilon, weight_format.
//
// Numerics, mapping: up to 32 rows, or 64 of matrices that takes_products() leaves, common/skinny_gemm.cuh; gate and up stay
//   in f32 until the one rounding of their product to bf16. A unit is one pair of a gate and an up row: they are rows g and
//   g + 8 of a matrix tile, so one thread holds both sums. More rows: common/prefill.cuh rounds the whole norm once (to bf16,
//   or to e4m3 or i8 with a scale for each row), common/cublaslt.cuh gate and up (one product where the matrices lie behind
//   each other in memory, else two), a kernel here their gated product; 16 bytes per thread and turn. Products of i8 are
//   integers, not rounded, a slab of rows at a time. On SM 9.0 2048 rows and more of e4m3 with a scale for each row of the
//   matrix go to common/tile_gemm.cu, which rounds only the gated product.
// Workspace: up to 32 rows none for bf16, else room for permuted rows; more rows: the counters (not used), cuBLASLt's, the
//   normalized rows, gate and up side by side, bf16[rows, 2 ffn] (tiles do not use it), and of quantized matrices a slab in bf16.
// Preconditions (the launcher checks): hidden a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden
//   <= 32768, ffn a multiple of 8, a workspace aligned to 256 bytes.
// Cost: the stored bytes of the matrices, 4 · hidden · ffn FLOPs per row; bound by reading, beyond some 300 rows by the
//   tensor cores.
// Reference: benchmarks/kernel_references.py::rmsnorm_gate_up_silu; test: tests/plugins/test_kernels_gpu.py,
//   test_prefill_gpu.py, test_quantized_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2MLP of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"
#include "../common/prefill_rows.cuh"
#include "../common/tile_gemm.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

__device__ __forceinline__ uint32_t gate_pair(uint32_t gate, uint32_t up) {
    const float2 g = unpack(gate), u = unpack(up);
    return pack(gated(g.x, u.x), gated(g.y, u.y));
}

// One block per 2048 elements of a row.
constexpr int kGateThreads = 256;

__global__ void __launch_bounds__(kGateThreads) gate_kernel(const bf16* gate_up, bf16* activation, int ffn) {
    let_next_grid_start();
    wait_for_previous_grids();
    const int at = (static_cast<int>(blockIdx.y) * kGateThreads + static_cast<int>(threadIdx.x)) * 8;
    if (at >= ffn) return;
    const int64_t row = blockIdx.x;
    const bf16* from = gate_up + row * 2 * ffn + at;
    const uint4 g = load_activation(from), u = load_activation(from + ffn);
    *reinterpret_cast<uint4*>(activation + row * ffn + at) =
        make_uint4(gate_pair(g.x, u.x), gate_pair(g.y, u.y), gate_pair(g.z, u.z), gate_pair(g.w, u.w));
}

// The same of integer sums: four units per thread.
__global__ void __launch_bounds__(kGateThreads) gate_integers_kernel(IntegerSums gate, IntegerSums up, bf16* activation, int ffn) {
    let_next_grid_start();
    wait_for_previous_grids();
    const int at = (static_cast<int>(blockIdx.y) * kGateThreads + static_cast<int>(threadIdx.x)) * 4;
    if (at >= ffn) return;
    const int64_t row = blockIdx.x;
    const float4 g = scale_sums(gate, row, at), u = scale_sums(up, row, at);
    *reinterpret_cast<uint2*>(activation + row * ffn + at) =
        make_uint2(pack(gated(g.x, u.x), gated(g.y, u.y)), pack(gated(g.z, u.z), gated(g.w, u.w)));
}

// ---------------------------------------------------------------- launcher

namespace {

enum Tensor {
    kHidden, kNormWeight, kGateWeight, kUpWeight, kGateScale, kUpScale, kGateZeroPoint, kUpZeroPoint, kPerm, kActivation,
    kNumTensors
};
enum Dim { kRows, kHiddenDim, kFfn, kGroups, kNumDims };
enum Attribute { kEpsilon, kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {
    2, {kGateWeight, kUpWeight}, {kGateScale, kUpScale}, {kGateZeroPoint, kUpZeroPoint}, kPerm};

PrefillShape shape_of(const int64_t* dims) {
    return {dims[kRows], dims[kHiddenDim], {dims[kFfn], dims[kFfn], 0}, true, dims[kGroups], true};
}

int32_t prefill_gate_up(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& matrices,
                        const Scratch& scratch) {
    const int64_t ffn = call.dims[kFfn];
    const int64_t most = way_of(shape, matrices) == Way::kInt8 ? slab_rows(shape) : shape.rows;
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    if (multiplies_gated(device, shape, matrices))
        return multiply_gated(call, device, shape, rows, matrices, call.tensors[kActivation], scratch);
    for (int64_t first = 0; first < shape.rows; first += most) {
        PrefillShape part = shape;
        part.rows = shape.rows - first < most ? shape.rows - first : most;
        PrefillRows from = rows;
        from.x = static_cast<const bf16*>(rows.x) + first * shape.k;
        Way way;
        const float* x_scale = nullptr;
        if (const int32_t status = multiply_rows(call, part, from, matrices, {{nullptr, nullptr, nullptr}, nullptr, scratch.product},
                                                 scratch, &way, &x_scale))
            return status;
        const int64_t threads = ffn / (way == Way::kInt8 ? 4 : 8);
        const dim3 grid(static_cast<unsigned>(part.rows), static_cast<unsigned>((threads + kGateThreads - 1) / kGateThreads));
        bf16* activation = static_cast<bf16*>(call.tensors[kActivation]) + first * ffn;
        const auto sums_of = [&](int which) {
            return IntegerSums{static_cast<const int32_t*>(scratch.product) + which * ffn, x_scale,
                               static_cast<const float*>(matrices.scale[which]), 2 * ffn};
        };
        const int32_t status =
            way == Way::kInt8
                ? launch(call, gate_integers_kernel, device, grid, kGateThreads, 0, sums_of(0), sums_of(1), activation,
                         static_cast<int>(ffn))
                : launch(call, gate_kernel, device, grid, kGateThreads, 0, static_cast<const bf16*>(scratch.product), activation,
                         static_cast<int>(ffn));
        if (status != QWEN_RT_OK) return status;
    }
    return QWEN_RT_OK;
}

}  // namespace

int64_t workspace_rmsnorm_gate_up_silu(const int64_t* dims, int32_t) { return workspace_of(shape_of(dims)); }

int32_t launch_rmsnorm_gate_up_silu(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kHidden, kNormWeight, kGateWeight, kUpWeight, kActivation), kNumTensors,
                                             kNumDims, kNumAttributes, set_of(kPerm), 1))
        return status;
    const int64_t* dims = call.dims;
    Matrices matrices;
    if (const int32_t status =
            read_matrices(call, kMatrices, dims[kHiddenDim], dims[kGroups], call.attributes[kWeightFormat], &matrices))
        return status;
    const PrefillShape shape = shape_of(dims);
    const PrefillRows rows = {call.tensors[kHidden], call.tensors[kNormWeight], call.attributes[kEpsilon]};
    if (takes_products(call, shape, rows, matrices, {})) {
        if (dims[kFfn] % 8 != 0)
            return refuse(call, QWEN_RT_UNSUPPORTED, "width=%lld of the output; expected a multiple of 8",
                          static_cast<long long>(dims[kFfn]));
        Scratch scratch;
        if (const int32_t status = prepare_prefill(call, shape, &scratch)) return status;
        return prefill_gate_up(call, shape, rows, matrices, scratch);
    }
    SkinnyParams p = {};
    p.epilogue = Epilogue::kSiluGate;
    p.x = static_cast<const bf16*>(call.tensors[kHidden]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[kNormWeight]);
    p.out = call.tensors[kActivation];
    p.rows = static_cast<int>(dims[kRows]);
    p.k = static_cast<int>(dims[kHiddenDim]);
    p.units = static_cast<int>(dims[kFfn]);
    p.epsilon = static_cast<float>(call.attributes[kEpsilon]);
    return launch_skinny(call, matrices, p, skinny_scratch(call, workspace_rmsnorm_gate_up_silu(dims, call.num_dims)));
}

}  // namespace qwen_rt
