// What the matrix ops share for more rows than the skinny kernel takes: scratch memory, and the norm as a pass of its own.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "../capi.h"
#include "cublaslt.cuh"

namespace qwen_rt {

constexpr int64_t kMaxPrefillRows = int64_t{1} << 24;

// Parts of the workspace behind its counters, each aligned to 256 bytes.
struct Scratch {
    void* matmul;              // kMatmulWorkspaceBytes
    __nv_bfloat16* normalized;  // as many elements as were asked for
    __nv_bfloat16* product;     // likewise
    int64_t bytes;             // of the whole workspace
};

// Divides `workspace`, which may be null to ask for `bytes` only.
Scratch divide(void* workspace, int64_t num_normalized, int64_t num_product);

// Divides the workspace of the call, or refuses it. Also refuses what only a prefill cannot do: too many rows, k of which
// a row is not whole 128-byte lines, rows of the output that are not whole 16-byte vectors.
int32_t prepare_prefill(const QwenRtCall& call, int64_t rows, int64_t k, int64_t width, int64_t num_normalized,
                        int64_t num_product, Scratch* scratch);

// Enqueues out[n] = x[n] / sqrt(mean(x[n]²) + epsilon) ∘ weight, in f32 with one rounding to bf16; k a multiple of 8.
int32_t normalize_rows(const QwenRtCall& call, const void* x, const void* weight, __nv_bfloat16* out, int64_t rows, int64_t k,
                       double epsilon);

// Enqueues out = residual + weight · x for more than 64 rows: o_proj_residual and down_residual.
int32_t prefill_residual(const QwenRtCall& call);
int64_t workspace_residual(const int64_t* dims);

}  // namespace qwen_rt
