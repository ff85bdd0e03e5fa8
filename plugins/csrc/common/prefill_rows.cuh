// Passes over the rows of a prefill, and over quantized matrices: enqueued ahead of cuBLASLt's products.
#pragma once

#include "../capi.h"
#include "skinny.cuh"

namespace qwen_rt {

// Enqueues out[n] = x[n] / sqrt(mean(x[n]²) + epsilon) ∘ weight, in f32 with one rounding to bf16; k a multiple of 8.
int32_t normalize_rows(const QwenRtCall& call, const void* x, const void* weight, bf16* out, int64_t rows, int64_t k,
                       double epsilon);

// Enqueues the same in e4m3 or i8 (`format`) with a scale for each row, max |row| / 448 or / 127, in f32 until the one
// rounding; without `weight` rows are rounded as they are. A row of zeros has the scale 0.
int32_t quantize_rows(const QwenRtCall& call, Format format, const void* x, const void* weight, void* out, float* scale,
                      int64_t rows, int64_t k, double epsilon);

// Integer sums of a product, and what makes numbers of them: sum[n, m] · x_scale[n] · weight_scale[m].
struct IntegerSums {
    const int32_t* sums;        // [rows, units], rows `stride` elements apart
    const float* x_scale;       // [rows]
    const float* weight_scale;  // [units]
    int64_t stride;
};

// The numbers of four units from `unit` on, of row `row`.
__device__ __forceinline__ float4 scale_sums(const IntegerSums& from, int64_t row, int unit) {
    const int4 s = __ldcg(reinterpret_cast<const int4*>(from.sums + row * from.stride + unit));
    const float4 w = __ldg(reinterpret_cast<const float4*>(from.weight_scale + unit));
    const float x = __ldcg(from.x_scale + row);
    return {static_cast<float>(s.x) * (x * w.x), static_cast<float>(s.y) * (x * w.y), static_cast<float>(s.z) * (x * w.z),
            static_cast<float>(s.w) * (x * w.w)};
}

// Enqueues out[n, m] = number[n, m] + bias[m] + residual[n, m] in f32, rounded once; bias and residual may be null, rows of
// out and residual are sums.stride elements apart. units and stride are multiples of 4.
int32_t finish_integers(const QwenRtCall& call, const IntegerSums& sums, const void* bias, const void* residual, void* out,
                        int64_t rows, int64_t units);

// Enqueues out[n] = row `first + n` of matrix `which` in bf16, columns in their original order.
int32_t dequantize_matrix(const QwenRtCall& call, const Matrices& matrices, int which, int64_t first, int64_t units, int64_t k,
                          bf16* out);

}  // namespace qwen_rt
