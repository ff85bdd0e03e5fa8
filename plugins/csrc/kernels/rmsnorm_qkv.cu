// Normalizes the hidden rows and multiplies by the three attention matrices:
//   qkv[n] = concat(q_weight, k_weight, v_weight) · (hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight) + bias
//
// Tensors (in this order):
//   hidden       bf16[rows, hidden]               in
//   norm_weight  bf16[hidden]                     in
//   q_weight     [q_width, hidden]                in, bf16 row-major as in the checkpoint, or quantized
//                                                 (core/quantization.py); k_weight, v_weight [kv_width, hidden], likewise
//   q_bias       bf16[q_width]                    in, optional (NULL); k_bias, v_bias bf16[kv_width], likewise
//   q_scale, k_scale, v_scale                     in, of quantized matrices: [width, groups]
//   q_zero_point, k_zero_point, v_zero_point      in, optional, as packed
//   perm         i32[hidden]                      in, optional: the column order of all three
//   qkv          bf16[rows, q_width + 2 kv_width] out, must not overlap hidden
// Dims: rows, hidden, q_width, kv_width, groups (0: bf16). Attributes: epsilon, weight_format.
//
// Numerics, mapping: up to 32 rows, or 64 of matrices that takes_products() leaves, common/skinny_gemm.cuh: one rounding of
//   hidden ∘ norm_weight to bf16, one of the result. More rows: common/prefill.cuh rounds the whole norm once (to bf16, or to
//   e4m3 or i8 with a scale for each row), then common/cublaslt.cuh adds the bias in f32 and rounds the result; one product
//   where the matrices (and all that belongs to them) lie behind each other in memory, else three.
// Workspace: up to 32 rows none for bf16, else room for permuted rows; more rows: the counters (not used), cuBLASLt's, the
//   normalized rows, and of quantized matrices a slab in bf16.
// Preconditions (the launcher checks): hidden a multiple of 64, 16-byte aligned pointers; above 64 rows cuBLASLt, hidden
//   <= 32768, a row of qkv a multiple of 8, a workspace aligned to 256 bytes.
// Cost: the stored bytes of the matrices, 2 · hidden · (q_width + 2 kv_width) FLOPs per row; bound by reading, beyond some
//   300 rows by the tensor cores.
// Reference: benchmarks/kernel_references.py::rmsnorm_qkv; test: tests/plugins/test_kernels_gpu.py, test_prefill_gpu.py,
//   test_quantized_gpu.py; bench: benchmarks/bench_kernels.py.
// Source: Qwen2RMSNorm and Qwen2Attention.{q,k,v}_proj of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/prefill.cuh"

namespace qwen_rt {

namespace {

enum Tensor {
    kHidden, kNormWeight, kQWeight, kKWeight, kVWeight, kQBias, kKBias, kVBias, kQScale, kKScale, kVScale, kQZeroPoint,
    kKZeroPoint, kVZeroPoint, kPerm, kQkv, kNumTensors
};
enum Dim { kRows, kHiddenDim, kQWidth, kKvWidth, kGroups, kNumDims };
enum Attribute { kEpsilon, kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {
    3, {kQWeight, kKWeight, kVWeight}, {kQScale, kKScale, kVScale}, {kQZeroPoint, kKZeroPoint, kVZeroPoint}, kPerm};

PrefillShape shape_of(const int64_t* dims) {
    return {dims[kRows], dims[kHiddenDim], {dims[kQWidth], dims[kKvWidth], dims[kKvWidth]}, false, dims[kGroups], true};
}

}  // namespace

int64_t workspace_rmsnorm_qkv(const int64_t* dims, int32_t) {
    return workspace_of(shape_of(dims));
}

int32_t launch_rmsnorm_qkv(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kHidden, kNormWeight, kQWeight, kKWeight, kVWeight, kQkv), kNumTensors,
                                             kNumDims, kNumAttributes, set_of(kPerm), 1))
        return status;
    const int64_t* dims = call.dims;
    Matrices matrices;
    if (const int32_t status =
            read_matrices(call, kMatrices, dims[kHiddenDim], dims[kGroups], call.attributes[kWeightFormat], &matrices))
        return status;
    void* const* t = call.tensors;
    const PrefillShape shape = shape_of(dims);
    const PrefillRows rows = {t[kHidden], t[kNormWeight], call.attributes[kEpsilon]};
    const PrefillOutput output = {{t[kQBias], t[kKBias], t[kVBias]}, nullptr, t[kQkv]};
    if (takes_products(call, shape, rows, matrices, output)) {
        Scratch scratch;
        if (const int32_t status = prepare_prefill(call, shape, &scratch)) return status;
        return multiply_rows(call, shape, rows, matrices, output, scratch);
    }
    SkinnyParams p = {};
    p.epilogue = Epilogue::kBias;
    p.x = static_cast<const bf16*>(t[kHidden]);
    p.norm_weight = static_cast<const bf16*>(t[kNormWeight]);
    for (int i = 0; i < 3; ++i) p.bias[i] = static_cast<const bf16*>(t[kQBias + i]);
    p.out = t[kQkv];
    p.rows = static_cast<int>(dims[kRows]);
    p.k = static_cast<int>(dims[kHiddenDim]);
    p.first_unit[1] = static_cast<int>(dims[kQWidth]);
    p.first_unit[2] = static_cast<int>(dims[kQWidth] + dims[kKvWidth]);
    p.units = static_cast<int>(dims[kQWidth] + 2 * dims[kKvWidth]);
    p.epsilon = static_cast<float>(call.attributes[kEpsilon]);
    return launch_skinny(call, matrices, p, skinny_scratch(call, workspace_rmsnorm_qkv(dims, call.num_dims)));
}

}  // namespace qwen_rt
