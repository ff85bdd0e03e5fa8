// Matrix products of many rows (a prefill, or a large batch), by cuBLASLt of the process or of the loader's path.
#pragma once

#include <cstdint>

#include "../capi.h"

namespace qwen_rt {

enum class MatmulType {
    kBf16,  // x and weight are bf16; out, bias and residual too
    kFp8,   // x and weight are e4m3 with scales; out, bias and residual bf16
    kInt8,  // x and weight are i8, out i32; no bias, residual or scales
};

// out[n, m] = sum_k x[n, k] · weight[m, k] · x_scale[n] · weight_scale[m] + bias[m] + residual[n, m]; rows of out and residual
// are `stride` elements apart.
struct Matmul {
    const void* x;         // [rows, k], dense
    const void* weight;    // [units, k], dense, row-major as in the checkpoint
    const void* bias;      // [units], or null
    const void* residual;  // [rows, units], or null; may be `out` itself
    void* out;             // [rows, units]
    int64_t rows, units, k;
    int64_t stride;  // of out and residual
    MatmulType type = MatmulType::kBf16;
    const float* weight_scale = nullptr;  // [units] of e4m3
    const float* x_scale = nullptr;       // [rows] of e4m3
};

constexpr int64_t kMatmulWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for SM 9.0; others use less of it

// e4m3 products of a prefill over at most so many columns are summed by the matrix units alone, which keep 14 bits: faster by
// a tenth to a sixth. For terms of either sign that errs by 0.26 % at 8192 columns, a tenth of what rounding activations to
// e4m3 does (2.65 %). Where all terms have one sign, sums come out short: by 0.6 % at 3584 columns and 1.9 % at 8192, less
// than that rounding; by 5 % at 18944, too much.
constexpr int64_t kMostFastK = 8192;

// Enqueues the product. f32 accumulators; bias and residual are added in f32 before the one rounding to bf16. Which kernel
// runs, and so the order of a sum, follows from the shape alone, and up to kMaxRows rows it is the one for kMaxRows: the same
// call gives the same bits every time, and so does a row among others there; another number of rows beyond may not. Never
// synchronises; a shape that was seen before costs no search. `workspace` has kMatmulWorkspaceBytes and is aligned to 256 bytes.
int32_t matmul(const QwenRtCall& call, const Matmul& product, void* workspace);

// Whether cuBLASLt has a kernel for the product: of e4m3 with such scales only new versions have, and for few GPUs.
bool has_matmul(const Matmul& product);

}  // namespace qwen_rt
