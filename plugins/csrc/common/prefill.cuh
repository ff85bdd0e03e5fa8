// What the matrix ops share for more rows than the skinny kernel takes, or is fast for: scratch memory, the norm as a pass of
// its own, and products with matrices of any format.
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
    int64_t units[3];  // of each matrix; 0 behind the last
    bool is_scratch;   // whether their product is scratch, and not an output
    int64_t groups;    // 0: bf16
    bool has_norm;
};

// Rows of a slab: so many go through a product at once where it is scratch in integers.
int64_t slab_rows(const PrefillShape& shape);

// Parts of the workspace behind its counters, each aligned to 256 bytes.
struct Scratch {
    void* matmul;    // kMatmulWorkspaceBytes
    void* rows;      // activations: normalized bf16, or of one byte and then their scales
    void* product;   // bf16 of all rows, or i32 sums of slab_rows()
    bf16* slab;      // rows of a matrix in bf16
    int64_t slab_units;
    int64_t bytes;   // of the whole workspace
};

// Divides `workspace`, which may be null to ask for `bytes` only.
Scratch divide(void* workspace, const PrefillShape& shape);

// Bytes of an op's workspace, whichever path its rows take.
int64_t workspace_of(const PrefillShape& shape);

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

// How rows are multiplied by matrices: as they are, or both of one byte, or by matrices made bf16.
enum class Way { kBf16, kFp8, kInt8, kThroughBf16 };

// How a call with more rows than kMaxRows multiplies.
Way way_of(const PrefillShape& shape, const Matrices& matrices);

// Whether the rows of a call go to cuBLASLt (or tiles, see multiply_rows) rather than to the skinny kernels: more than kMaxRows always; more than
// kMostSkinnyRows if matrices are multiplied as they are, in bf16 or e4m3, and cuBLASLt has the kernels.
bool takes_products(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& matrices,
                    const PrefillOutput& output);

// Enqueues out = rows · matricesᵀ + bias + residual. Matrices (and biases and scales) that lie behind each other in memory
// make one product. e4m3 and i8 with scales of rows multiply activations of the same kind, with a scale for each row, where
// cuBLASLt can; other quantized matrices become bf16, a slab of their rows at a time.
//
// Where the product is scratch, output.out is scratch.product. It holds bf16, or, where *way becomes kInt8, sums that are still
// to be scaled, i32[rows, sum of units], for slab_rows() rows at most; scales of rows are at *x_scale.
int32_t multiply_rows(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& matrices,
                      const PrefillOutput& output, const Scratch& scratch, Way* way = nullptr, const float** x_scale = nullptr);

// Whether multiply_gated() takes the matrices gate and up and so many rows.
bool multiplies_gated(const Device& device, const PrefillShape& shape, const Matrices& matrices);

// Enqueues out = silu(gate · rows) ∘ (up · rows), bf16[rows, ffn], without writing either product.
int32_t multiply_gated(const QwenRtCall& call, const Device& device, const PrefillShape& shape, const PrefillRows& rows,
                       const Matrices& matrices, void* out, const Scratch& scratch);

// o_proj_residual and down_residual, which have the same tensors: out = residual + weight · x for any number of rows.
int32_t launch_residual(const QwenRtCall& call);
int64_t workspace_residual(const int64_t* dims);

}  // namespace qwen_rt
