// Passes over the rows of a prefill, and over quantized matrices: enqueued ahead of cuBLASLt's products.
#pragma once

#include "../capi.h"
#include "skinny.cuh"

namespace qwen_rt {

// Enqueues out[n] = x[n] / sqrt(mean(x[n]²) + epsilon) ∘ weight, in f32 with one rounding to bf16; k a multiple of 8.
int32_t normalize_rows(const QwenRtCall& call, const void* x, const void* weight, bf16* out, int64_t rows, int64_t k,
                       double epsilon);

// Enqueues the same in e4m3 with a scale for each row, max |row| / 448, in f32 until the one rounding; without `weight`
// rows are rounded as they are. A row of zeros has the scale 0.
int32_t quantize_rows(const QwenRtCall& call, const void* x, const void* weight, void* out, float* scale, int64_t rows, int64_t k,
                      double epsilon);

// Enqueues out[n] = row `first + n` of matrix `which` in bf16, columns in their original order.
int32_t dequantize_matrix(const QwenRtCall& call, const Matrices& matrices, int which, int64_t first, int64_t units, int64_t k,
                          bf16* out);

}  // namespace qwen_rt
