// Applies the final norm and the LM head:
//   logits[n] = weight · (hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight)
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden]  in
//   norm_weight bf16[hidden]        in
//   weight      [vocab, hidden]     in, bf16 row-major as in the checkpoint (tied models: the embedding), or quantized
//                                   (core/quantization.py)
//   scale, zero_point               in, of a quantized weight: [vocab, groups], as packed; the second optional
//   perm        i32[hidden]         must be absent: the op has no workspace for reordered rows
//   logits      f32[rows, vocab]    out
// Dims: rows, hidden, vocab, groups (0: bf16). Attributes: epsilon, weight_format.
//
// Numerics, mapping: common/skinny_gemm.cuh; logits are the f32 sums, never rounded to bf16.
// Preconditions (the launcher checks): rows <= 64, hidden a multiple of 64, 16-byte aligned pointers.
// Cost: the stored bytes of the weight, 2 · hidden · vocab FLOPs per row; bound by reading.
// Reference: benchmarks/kernel_references.py::lm_head; test: tests/plugins/test_kernels_gpu.py, test_quantized_gpu.py;
//   bench: benchmarks/bench_kernels.py.
// Source: Qwen2Model.norm and Qwen2ForCausalLM.lm_head of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny.cuh"

namespace qwen_rt {

namespace {

enum Tensor { kHidden, kNormWeight, kWeight, kScale, kZeroPoint, kPerm, kLogits, kNumTensors };
enum Dim { kRows, kHiddenDim, kVocab, kGroups, kNumDims };
enum Attribute { kEpsilon, kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {1, {kWeight}, {kScale}, {kZeroPoint}, kPerm};

}  // namespace

int32_t launch_lm_head(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kHidden, kNormWeight, kWeight, kLogits), kNumTensors, kNumDims,
                                             kNumAttributes, set_of(kPerm), 1))
        return status;
    Matrices matrices;
    if (const int32_t status = read_matrices(call, kMatrices, call.dims[kHiddenDim], call.dims[kGroups],
                                             call.attributes[kWeightFormat], &matrices))
        return status;
    if (matrices.perm != nullptr)
        return refuse(call, QWEN_RT_UNSUPPORTED, "perm of an LM head; expected its columns in order");
    SkinnyParams p = {};
    p.epilogue = Epilogue::kLogits;
    p.x = static_cast<const bf16*>(call.tensors[kHidden]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[kNormWeight]);
    p.out = call.tensors[kLogits];
    p.rows = static_cast<int>(call.dims[kRows]);
    p.k = static_cast<int>(call.dims[kHiddenDim]);
    p.units = static_cast<int>(call.dims[kVocab]);
    p.epsilon = static_cast<float>(call.attributes[kEpsilon]);
    return launch_skinny(call, matrices, p, nullptr);
}

}  // namespace qwen_rt
