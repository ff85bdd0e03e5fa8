// Applies the final norm and the LM head:
//   logits[n] = weight · (hidden[n] / sqrt(mean(hidden[n]²) + epsilon) ∘ norm_weight)
//
// Tensors (in this order):
//   hidden      bf16[rows, hidden]  in
//   norm_weight bf16[hidden]        in
//   weight      bf16[vocab, hidden] in, row-major as in the checkpoint (tied models: the embedding)
//   logits      f32[rows, vocab]    out
// Dims: rows, hidden, vocab. Attributes: epsilon.
//
// Numerics, mapping: common/skinny_gemm.cuh; logits are the f32 sums, never rounded to bf16.
// Preconditions (the launcher checks): rows <= 64, hidden a multiple of 64, 16-byte aligned pointers.
// Cost: 2 · hidden · vocab bytes, twice as many FLOPs per row; bound by reading.
// Reference: benchmarks/kernel_references.py::lm_head; test: tests/plugins/test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: Qwen2Model.norm and Qwen2ForCausalLM.lm_head of transformers' modeling_qwen2.py.
#include "../common/ops.cuh"
#include "../common/skinny_dispatch.cuh"

namespace qwen_rt {

int32_t launch_lm_head(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, 4, 4, 3, 1)) return status;
    SkinnyParams p = {};
    p.x = static_cast<const bf16*>(call.tensors[0]);
    p.norm_weight = static_cast<const bf16*>(call.tensors[1]);
    p.weight[0] = static_cast<const bf16*>(call.tensors[2]);
    p.out = call.tensors[3];
    p.rows = static_cast<int>(call.dims[0]);
    p.k = static_cast<int>(call.dims[1]);
    p.units = static_cast<int>(call.dims[2]);
    p.epsilon = static_cast<float>(call.attributes[0]);
    return launch_skinny<Epilogue::kLogits, true>(call, p);
}

}  // namespace qwen_rt
