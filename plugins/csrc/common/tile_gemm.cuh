// e4m3 products of the many rows of a prefill on SM 9.0, and of gate and up with silu(gate) · up at the end.
#pragma once

#include <cstdint>

#include "../capi.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace qwen_rt {

// silu(gate) · up
__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// out[n, m] = sum_k x[n, k] · weight[m, k] · x_scale[n] · weight_scale[m] + bias[m] + residual[n, m]; or with two matrices
// out[n, m] = silu(gate[n, m]) · up[n, m] of two such sums, without bias and residual.
struct TileProduct {
    const void* x;                 // e4m3[rows, k], dense
    const float* x_scale;          // [rows]
    const void* weight[2];         // e4m3[units, k], dense; the second null, or up where the first is gate
    const float* weight_scale[2];  // [units]
    const bf16* bias;              // [units], or null
    const bf16* residual;          // [rows, units], or null; may be `out` itself
    bf16* out;                     // [rows, units]
    int64_t rows, units, k;
    int64_t stride;  // elements from a row of out to the next, and of residual
};

// Whether the device has the kernel, and it takes such a product: k a multiple of 16, units and stride of 8.
bool has_tile_product(const Device& device, const TileProduct& product);

// Enqueues the product. The same call gives the same bits every time.
int32_t multiply_tiles(const QwenRtCall& call, const Device& device, const TileProduct& product);

}  // namespace qwen_rt
