// Matrix products of many rows (a prefill), by cuBLASLt of the process or of the loader's path.
#pragma once

#include <cstdint>

#include "../capi.h"

namespace qwen_rt {

// out[n, m] = sum_k x[n, k] · weight[m, k] + bias[m] + residual[n, m]; all bf16, rows `stride` elements apart.
struct Matmul {
    const void* x;         // [rows, k], dense
    const void* weight;    // [units, k], dense, row-major as in the checkpoint
    const void* bias;      // [units], or null
    const void* residual;  // [rows, units], or null; may be `out` itself
    void* out;             // [rows, units]
    int64_t rows, units, k;
    int64_t stride;  // of out and residual
};

constexpr int64_t kMatmulWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for SM 9.0; others use less of it

// Enqueues the product. f32 accumulators; bias and residual are added in f32 before the one rounding to bf16. Which kernel
// runs, and so the order of a sum, follows from the shape alone: the same call gives the same bits every time, another
// number of rows may not. Never synchronises; a shape that was seen before costs no search. `workspace` has
// kMatmulWorkspaceBytes and is aligned to 256 bytes.
int32_t matmul(const QwenRtCall& call, const Matmul& product, void* workspace);

}  // namespace qwen_rt
