// What the matrix ops share for more rows than the skinny kernel takes: scratch memory, the norm as a pass of its own, and
// products with matrices of any format.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "../capi.h"
#include "cublaslt.cuh"
#include "skinny.cuh"

namespace qwen_rt {

constexpr int64_t kMaxPrefillRows = int64_t{1} << 24;

// The matrices of an op that multiply the same rows, beside each other in the output.
struct PrefillShape {
    int64_t rows, k;
    int64_t units[3];       // of each matrix; 0 behind the last
    int64_t num_product;    // elements of an output that is scratch
    int64_t groups;         // 0: bf16
    bool has_norm;
};

// Parts of the workspace behind its counters, each aligned to 256 bytes.
struct Scratch {
    void* matmul;    // kMatmulWorkspaceBytes
    void* rows;      // activations: normalized bf16, or e4m3 and then their scales
    bf16* product;   // as many elements as were asked for
    bf16* slab;      // rows of a matrix in bf16
    int64_t slab_units;
    int64_t bytes;   // of the whole workspace
};

// Divides `workspace`, which may be null to ask for `bytes` only.
Scratch divide(void* workspace, const PrefillShape& shape);

// Divides the workspace of the call, or refuses it. Also refuses what only a prefill cannot do: too many rows, k of which
// a row is not whole 128-byte lines, rows of the output that are not whole 16-byte vectors.
int32_t prepare_prefill(const QwenRtCall& call, const PrefillShape& shape, Scratch* scratch);

struct PrefillRows {
    const void* x;            // bf16[rows, k]
    const void* norm_weight;  // bf16[k], or null
    double epsilon;
};

struct PrefillOutput {
    const void* bias[3];   // of each matrix, or null
    const void* residual;  // bf16, as `out`, or null
    void* out;             // bf16[rows, sum of units]
};

// Enqueues out = rows · matricesᵀ + bias + residual. Matrices (and biases and scales) that lie behind each other in memory
// make one product. e4m3 with scales of rows multiplies e4m3 activations, a scale for each row, where cuBLASLt can; other
// quantized matrices become bf16, a slab of their rows at a time.
int32_t multiply_rows(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& matrices,
                      const PrefillOutput& output, const Scratch& scratch);

// o_proj_residual and down_residual, which have the same tensors: out = residual + weight · x for any number of rows.
int32_t launch_residual(const QwenRtCall& call);
int64_t workspace_residual(const int64_t* dims);

}  // namespace qwen_rt
