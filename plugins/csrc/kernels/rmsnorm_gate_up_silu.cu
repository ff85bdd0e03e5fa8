// Normalizes the hidden rows, multiplies by gate and up, and gates:
//   y[n] = hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight;  activation[n] = silu(gate · y[n]) ∘ (up · y[n])
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden] in
//   norm_weight bf16[hidden]       in
//   gate_weight bf16[ffn, hidden]  in, row-major as in the checkpoint; up_weight likewise
//   activation  bf16[rows, ffn]    out, must not overlap hidden
// Dims: rows, hidden, ffn. Attributes: epsilon.
//
// Numerics, mapping: up to 64 rows common/skinny_gemm.cuh; gate and up stay in f32 until the one rounding of their product
//   to bf16. A unit is one pair of a gate and an up row: they are rows g and g + 8 of a matrix tile, so one thread holds
//   both sums. More rows: common/prefill.cuh rounds the whole norm once, common/cublaslt.cuh gate and up (one product where
//   the matrices lie behind each other in memory, else two), a kernel here their gated product; 16 bytes per thread and
//   turn.
// Workspace: none up to 64 rows; then the counters (not used), cuBLASLt's, the normalized rows, and gate and up side by
//   side, bf16[rows, 2 ffn].
// Preconditions (the launcher checks): hidden a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden
//   <= 16384, ffn a multiple of 8, a workspace aligned to 256 bytes.
// Cost: 4 · hidden · ffn bytes, twice as many FLOPs per row; bound by reading, beyond some 300 rows by the tensor
//   cores.
// Reference: benchmarks/kernel_references.py::rmsnorm_gate_up_silu; test: tests/plugins/test_kernels_gpu.py,
//   tests/plugins/test_prefill_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2MLP of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"
#include "../common/skinny_dispatch.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

__device__ __forceinline__ uint32_t gate_pair(uint32_t gate, uint32_t up) {
    const float2 g = unpack(gate), u = unpack(up);
    return pack(g.x / (1.f + __expf(-g.x)) * u.x, g.y / (1.f + __expf(-g.y)) * u.y);
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

// ---------------------------------------------------------------- prefill

int64_t workspace_rmsnorm_gate_up_silu(const int64_t* dims, int32_t) {
    return dims[0] <= kMaxRows ? 0 : divide(nullptr, dims[0] * dims[1], dims[0] * 2 * dims[2]).bytes;
}

static int32_t prefill_gate_up(const QwenRtCall& call) {
    const int64_t rows = call.dims[0], k = call.dims[1], ffn = call.dims[2];
    Scratch scratch;
    if (const int32_t status = prepare_prefill(call, rows, k, ffn, rows * k, rows * 2 * ffn, &scratch)) return status;
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const double epsilon = call.attributes[0];
    int32_t status = normalize_rows(call, call.tensors[0], call.tensors[1], scratch.normalized, rows, k, epsilon);
    const bf16* gate = static_cast<const bf16*>(call.tensors[2]);
    const bf16* up = static_cast<const bf16*>(call.tensors[3]);
    Matmul product = {scratch.normalized, gate, nullptr, nullptr, scratch.product, rows, 2 * ffn, k, 2 * ffn};
    if (up != gate + ffn * k) {
        product.units = ffn;
        if (status == QWEN_RT_OK) status = matmul(call, product, scratch.matmul);
        product.weight = up;
        product.out = scratch.product + ffn;
    }
    if (status == QWEN_RT_OK) status = matmul(call, product, scratch.matmul);
    if (status != QWEN_RT_OK) return status;
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((ffn / 8 + kGateThreads - 1) / kGateThreads));
    return launch(call, gate_kernel, device, grid, kGateThreads, 0, static_cast<const bf16*>(scratch.product),
                  static_cast<bf16*>(call.tensors[4]), static_cast<int>(ffn));
}

// ---------------------------------------------------------------- launcher

int32_t launch_rmsnorm_gate_up_silu(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 5, 5, 3, 1)) return status;
    if (call.dims[0] > kMaxRows) return prefill_gate_up(call);
    SkinnyParams p = {};
    p.x = static_cast<const bf16*>(call.tensors[0]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[1]);
    p.weight[0] = static_cast<const bf16*>(call.tensors[2]);
    p.weight[1] = static_cast<const bf16*>(call.tensors[3]);
    p.out = call.tensors[4];
    p.rows = static_cast<int>(call.dims[0]);
    p.k = static_cast<int>(call.dims[1]);
    p.units = static_cast<int>(call.dims[2]);
    p.epsilon = static_cast<float>(call.attributes[0]);
    return launch_skinny<Epilogue::kSiluGate, true>(call, p);
}

}  // namespace qwen_rt
