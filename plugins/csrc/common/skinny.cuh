// The matrices of an op, whatever their format, and the way to the skinny kernel.
#pragma once

#include "skinny_params.cuh"

namespace qwen_rt {

// Where an op's matrices stand among its tensors.
struct MatrixTensors {
    int count;
    int weight[3], scale[3], zero[3];
    int perm;
};

// What a call says of its matrices; all are alike.
struct Matrices {
    Format format;
    bool rounds_rows;  // whether a prefill on int8 may round activations to int8 too, a scale for each row
    Scaling scaling;
    const int32_t* perm;  // null: columns are in order
    int count;
    const void *weight[3], *scale[3], *zero[3];
    int64_t groups;
    int group_size;  // k where a row has one scale
};

// Most rows that go to the skinny kernels whatever their matrices. More go to cuBLASLt if those are bf16, or e4m3 with scales
// of rows: then that is faster (docs/performance-gpu-kernels.md).
constexpr int kMostSkinnyRows = 32;

// Reads and checks them: `k` columns, `groups` as in dims, `weight_format` as in attributes.
int32_t read_matrices(const QwenRtCall& call, const MatrixTensors& where, int64_t k, int64_t groups, double weight_format,
                      Matrices* found);

// Enqueues the product. p: epilogue, x, norm_weight, bias, segments, residual, out, rows, k, units, epsilon; the rest is
// worked out here. At most 64 rows, k a multiple of 64. Permuted columns need `scratch` for x and norm_weight in the
// stored order, bf16[rows + 1, k]; null refuses them.
int32_t launch_skinny(const QwenRtCall& call, const Matrices& matrices, SkinnyParams& p, void* scratch);

// Bytes of that scratch, where dims say that matrices are quantized; counters are before it.
int64_t workspace_skinny(int64_t rows, int64_t k, int64_t groups);

// The scratch of a call: null without a workspace that is large enough.
void* skinny_scratch(const QwenRtCall& call, int64_t needed);

// How the units are divided over the multiprocessors.
struct SkinnyGrid {
    int blocks, tiles;  // tiles of a block
    bool is_small;      // whether a block reads little
};

// One for each format: chooses the variant by rows, by the tiles of a block, and by what fits in shared memory.
int32_t launch_skinny_bf16(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling);
int32_t launch_skinny_fp8(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling);
int32_t launch_skinny_int8(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling);
int32_t launch_skinny_int4(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling);

// Whether a row of a decode step must have the same bits among any number of rows up to 64: QWEN_RT_BATCH_INVARIANT=1. Then one
// and two rows of 8-bit matrices go the way of more, and 33 and more rows the way of fewer, which is slower.
bool is_batch_invariant();

// Hopper's kernel for one or two rows of matrices of 8 bits with a scale for each row (skinny_8bit_few.cuh).
constexpr int kFewByteRows = 2;
inline bool is_few_bytes(const Device& device, int rows) { return device.sm == 90 && rows <= kFewByteRows && !is_batch_invariant(); }

// Hopper's kernel for more rows of matrices of 8 bits with a scale for each row (wide_gemm.cuh), up to so many rows.
constexpr int kMostWideRows = 32;
bool is_wide(const Device& device, const Matrices& matrices, const SkinnyParams& p, const void* scratch);
int32_t launch_wide(const QwenRtCall& call, const Device& device, const Matrices& matrices, const SkinnyGrid& grid, const SkinnyParams& p,
                    void* scratch);
// Bytes of its scratch.
int64_t workspace_wide(int64_t rows, int64_t k);

}  // namespace qwen_rt
