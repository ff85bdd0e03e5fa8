// Launching the wide kernel: the pass that prepares x of many rows, and which variant is taken. See wide_gemm.cuh.
#include "skinny.cuh"
#include "wide_gemm.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- x

// Prepares rows [rows, k] for all blocks of the wide kernel (wide_x.cuh): a warp for every 256 columns of a row, so that
// small products, whose blocks all read all of x, do not convert it 132 times. `squares` [rows, segments]: of x alone.
template <Format kFormat>
__global__ void __launch_bounds__(256) prepare_rows(const bf16* x, const bf16* norm_weight, unsigned char* prepared, float* squares,
                                                    int rows, int k) {
    const int num_segments = num_segments_of(k), index = static_cast<int>(blockIdx.x * 8 + (threadIdx.x >> 5)), lane = threadIdx.x & 31;
    const int row = index / num_segments, segment = index % num_segments, at = segment * kSegmentK + lane * 8;
    let_next_grid_start();
    const bool is_there = row < rows && at < k;
    uint4 norm = make_uint4(0, 0, 0, 0), numbers = norm;
    if (norm_weight != nullptr && is_there) norm = __ldg(reinterpret_cast<const uint4*>(norm_weight + at));
    wait_for_previous_grids();
    if (row >= rows) return;
    if (is_there) numbers = load_activation(x + static_cast<int64_t>(row) * k + at);
    if (norm_weight != nullptr) {
        const float sum = segment_squares(numbers);
        if (lane == 0) squares[index] = sum;
        numbers = multiply_pairs(numbers, norm);
    }
    prepare_segment<kFormat>(numbers, rows, row, segment, k,
                             [&](int bytes, uint32_t word) { *reinterpret_cast<uint32_t*>(prepared + bytes) = word; });
}

// ---------------------------------------------------------------- launcher

namespace {

constexpr int64_t kSmallWideBytes = 224 * 1024;  // as in skinny.cu

int64_t prepared_bytes(int rows, int k) { return int64_t{num_blocks_of(k)} * x_block_bytes(rows); }

template <Format kFormat, int kN, int kSide, int kStages, bool kHalf>
bool try_wide(const QwenRtCall& call, const Device& device, int blocks, const WideParams& wide, int32_t* status) {
    const SkinnyParams& p = wide.p;
    const int64_t bytes = wide_shared_bytes(kN, kStages, p.rows, wide.num_groups);
    if (bytes > (kHalf ? kHalfOfShared : device.max_shared_bytes)) return false;
    *status = launch(call, wide_gemm<kFormat, kN, kSide, kStages, kHalf>, device, dim3(static_cast<unsigned>(blocks)), kWideThreads,
                     static_cast<int>(bytes), wide);
    return true;
}

template <Format kFormat, int kSide>
int32_t choose_wide(const QwenRtCall& call, const Device& device, int blocks, int n, bool is_small, const WideParams& wide) {
    int32_t status = QWEN_RT_OK;
#define QWEN_RT_WIDE(wanted, n, stages, is_half) \
    if ((wanted) && try_wide<kFormat, n, kSide, stages, is_half>(call, device, blocks, wide, &status)) return status
    QWEN_RT_WIDE(n <= 16 && is_small, 16, 8, true);
    QWEN_RT_WIDE(n <= 16, 16, 8, false);
    QWEN_RT_WIDE(n <= 32, 32, 9, false);
    QWEN_RT_WIDE(n <= 32, 32, 5, false);
    QWEN_RT_WIDE(n <= 48, 48, 7, false);
    QWEN_RT_WIDE(n <= 48, 48, 4, false);
    if constexpr (kSide < 4) {
        QWEN_RT_WIDE(true, 64, 6, false);
        QWEN_RT_WIDE(true, 64, 5, false);
        QWEN_RT_WIDE(true, 64, 4, false);
        QWEN_RT_WIDE(true, 64, 3, false);
    }
#undef QWEN_RT_WIDE
    return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%d, k=%d need more shared memory than the %d bytes of this GPU's blocks",
                  wide.p.rows, wide.p.k, device.max_shared_bytes);
}

template <Format kFormat>
int32_t launch_format(const QwenRtCall& call, const Device& device, int blocks, int n, bool is_small, WideParams& wide, void* scratch) {
    const SkinnyParams& p = wide.p;
    auto* prepared = static_cast<unsigned char*>(scratch);
    auto* squares = reinterpret_cast<float*>(prepared + prepared_bytes(p.rows, p.k));
    const int warps = p.rows * num_segments_of(p.k);
    if (const int32_t status = launch(call, prepare_rows<kFormat>, device, dim3(static_cast<unsigned>((warps + 7) / 8)), 256, 0, p.x,
                                      p.norm_weight, prepared, squares, p.rows, p.k))
        return status;
    wide.prepared = prepared, wide.squares = squares;
    if (p.rows <= 8) return choose_wide<kFormat, 4>(call, device, blocks, n, is_small, wide);
    if (p.rows <= 16) return choose_wide<kFormat, 2>(call, device, blocks, n, is_small, wide);
    return choose_wide<kFormat, 1>(call, device, blocks, n, is_small, wide);
}

}  // namespace

int64_t workspace_wide(int64_t rows, int64_t k) {
    const int some = static_cast<int>(rows < kMostWideRows ? rows : kMostWideRows), columns = static_cast<int>(k);
    return prepared_bytes(some, columns) + int64_t{some} * num_segments_of(columns) * 4;
}

bool is_wide(const Device& device, const Matrices& matrices, const SkinnyParams& p, const void* scratch) {
    const bool is_byte = matrices.format == Format::kFp8 || matrices.format == Format::kInt8;
    return device.sm == 90 && is_byte && matrices.scaling == Scaling::kRow && matrices.perm == nullptr && p.k % kStepK == 0 &&
           p.rows <= kMostWideRows &&
           !is_few_bytes(device, p.rows) && scratch != nullptr;
}

int32_t launch_wide(const QwenRtCall& call, const Device& device, const Matrices& matrices, const SkinnyGrid& grid, const SkinnyParams& p,
                    void* scratch) {
    WideParams wide = {};
    wide.p = p;
    const bool is_pairs = p.epilogue == Epilogue::kSiluGate;
    const int units = p.block_units + (p.blocks_with_more > 0 ? 1 : 0), most = (p.rows <= 8 ? 48 : 64) / (is_pairs ? 2 : 1);
    wide.num_groups = (units + most - 1) / most;
    wide.group_units = (units + wide.num_groups - 1) / wide.num_groups;
    const int n = is_pairs ? (wide.group_units + 7) / 8 * 16 : wide.group_units;
    const bool is_small = units * (is_pairs ? 2 : 1) * int64_t{p.k} <= kSmallWideBytes;
    return matrices.format == Format::kFp8 ? launch_format<Format::kFp8>(call, device, grid.blocks, n, is_small, wide, scratch)
                                           : launch_format<Format::kInt8>(call, device, grid.blocks, n, is_small, wide, scratch);
}

}  // namespace qwen_rt
