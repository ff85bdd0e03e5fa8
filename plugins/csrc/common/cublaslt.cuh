// Matrix products of many rows (a prefill), by cuBLASLt of the process or of the loader's path.
#pragma once

#include <cstdint>

#include "../capi.h"

namespace qwen_rt {

// out[n, m] = sum_k x[n, k] · weight[m, k] · x_scale[n] · weight_scale[m] + bias[m] + residual[n, m]; out, bias and residual
// are bf16, rows `stride` elements apart; x and weight are bf16, or, with scales, e4m3.
struct Matmul {
    const void* x;         // [rows, k], dense
    const void* weight;    // [units, k], dense, row-major as in the checkpoint
    const void* bias;      // [units], or null
    const void* residual;  // [rows, units], or null; may be `out` itself
    void* out;             // [rows, units]
    int64_t rows, units, k;
    int64_t stride;  // of out and residual
    const float* weight_scale = nullptr;  // [units]; both or neither
    const float* x_scale = nullptr;       // [rows]
};

constexpr int64_t kMatmulWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for SM 9.0; others use less of it

// Enqueues the product. f32 accumulators; bias and residual are added in f32 before the one rounding to bf16. Which kernel
// runs, and so the order of a sum, follows from the shape alone: the same call gives the same bits every time, another
// number of rows may not. Never synchronises; a shape that was seen before costs no search. `workspace` has
// kMatmulWorkspaceBytes and is aligned to 256 bytes.
int32_t matmul(const QwenRtCall& call, const Matmul& product, void* workspace);

// Whether cuBLASLt has a kernel for the product: of e4m3 with such scales only new versions have, and for few GPUs.
bool has_matmul(const Matmul& product);

}  // namespace qwen_rt
