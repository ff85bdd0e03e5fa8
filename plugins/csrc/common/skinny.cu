// From the matrices of an op to the skinny kernel of their format. See skinny.cuh.
//
// Permuted columns: the stored column k of a matrix belongs to x[perm[k]]. A kernel of one block a row first brings x, and
// the norm's weights, into the stored order: out[r, k] = x[r, perm[k]], two bytes per thread and turn. The sum of squares
// does not change by that but for the order of its terms.
#include <cstdlib>

#include "skinny.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

__global__ void __launch_bounds__(kSkinnyThreads)
    reorder_kernel(const unsigned short* x, const unsigned short* norm_weight, const int32_t* perm, unsigned short* out, int rows, int k) {
    let_next_grid_start();
    wait_for_previous_grids();
    const bool is_norm = static_cast<int>(blockIdx.x) == rows;
    const unsigned short* from = is_norm ? norm_weight : x + static_cast<int64_t>(blockIdx.x) * k;
    unsigned short* to = out + static_cast<int64_t>(blockIdx.x) * k;
    for (int i = threadIdx.x; i < k; i += kSkinnyThreads) {
        const int32_t at = __ldg(perm + i);
        to[i] = at >= 0 && at < k ? __ldcg(from + at) : 0x7fc0;  // NaN: no permutation must not pass unnoticed
    }
}

// ---------------------------------------------------------------- launcher

namespace {

// The next kernel is let in so many chunks before the last copy of this one: 0 (at once) to 12 differ by 2 % at most.
constexpr int kTriggerChunks = 3;
// A block that reads no more than this leaves half of the SM to the next kernel's block; a larger one takes all, because
// two blocks of one kernel on an SM, which the hardware places where it finds room, end late.
constexpr int64_t kSmallBlockBytes = 224 * 1024;
constexpr int kInt8Rows = 4;  // INT8_ROWS of core/ops.py
constexpr int kSmallestGroup = 16, kLargestGroup = 256;
constexpr int kStep = 64;           // what k must divide by
constexpr int kMostGroupedRows = 32;  // rows of one launch where x takes too much room: more go in two

int log2_of(int value) {
    int log = 0;
    while (value >> log > 1) ++log;
    return log;
}

}  // namespace

int32_t read_matrices(const QwenRtCall& call, const MatrixTensors& where, int64_t k, int64_t groups, double weight_format,
                      Matrices* found) {
    if (!(weight_format >= 0 && weight_format <= kInt8Rows && weight_format == static_cast<int>(weight_format)))
        return refuse(call, QWEN_RT_INVALID,
                      "weight_format=%g; expected 0 (bf16), 1 (fp8), 2 (int8), 3 (int4) or 4 (int8, activations too)", weight_format);
    Matrices& m = *found;
    m = {};
    m.rounds_rows = weight_format == kInt8Rows;
    m.format = m.rounds_rows ? Format::kInt8 : static_cast<Format>(static_cast<int>(weight_format));
    m.count = where.count;
    m.groups = groups;
    m.perm = where.perm < 0 ? nullptr : static_cast<const int32_t*>(call.tensors[where.perm]);
    int num_scales = 0, num_zeros = 0;
    for (int i = 0; i < where.count; ++i) {
        m.weight[i] = call.tensors[where.weight[i]];
        m.scale[i] = call.tensors[where.scale[i]];
        m.zero[i] = where.zero[i] < 0 ? nullptr : call.tensors[where.zero[i]];
        num_scales += m.scale[i] != nullptr;
        num_zeros += m.zero[i] != nullptr;
    }
    if (m.format == Format::kBf16) {
        if (num_scales + num_zeros > 0 || m.perm != nullptr)
            return refuse(call, QWEN_RT_INVALID, "scales, zero points or a column order of bf16 matrices; expected none");
        return QWEN_RT_OK;
    }
    if (num_scales != where.count || groups < 1)
        return refuse(call, QWEN_RT_INVALID, "%d of %d quantized matrices have scales; expected all", num_scales, where.count);
    if (num_zeros != 0 && (num_zeros != where.count || m.format == Format::kFp8))
        return refuse(call, QWEN_RT_INVALID, "%d of %d matrices have zero points; expected %s", num_zeros, where.count,
                      m.format == Format::kFp8 ? "none of fp8" : "all or none");
    const int64_t size = k / groups;
    const bool is_known = size >= kSmallestGroup && size <= kLargestGroup && (size & (size - 1)) == 0;
    if (k % groups != 0 || (groups > 1 && !is_known))
        return refuse(call, QWEN_RT_UNSUPPORTED, "groups=%lld of %lld columns; expected 1, or groups of 16, 32, 64, 128 or 256",
                      static_cast<long long>(groups), static_cast<long long>(k));
    m.group_size = static_cast<int>(size);
    const bool is_plain = groups == 1 && num_zeros == 0 && m.format != Format::kInt4;
    const int64_t unit = m.format == Format::kInt4 ? 128 : 64;
    m.scaling = is_plain ? Scaling::kRow : groups == 1 || size >= unit ? Scaling::kGroups : Scaling::kFine;
    return QWEN_RT_OK;
}

bool is_batch_invariant() {
    static const bool is_set = [] {
        const char* value = std::getenv("QWEN_RT_BATCH_INVARIANT");
        return value != nullptr && value[0] == '1';
    }();
    return is_set;
}

int64_t workspace_skinny(int64_t rows, int64_t k, int64_t groups) {
    if (groups == 0) return 0;
    const int64_t permuted = (rows + 1) * k * 2, wide = workspace_wide(rows, k);
    return QWEN_RT_COUNTER_BYTES + (permuted > wide ? permuted : wide);
}

void* skinny_scratch(const QwenRtCall& call, int64_t needed) {
    if (needed == 0 || call.workspace == nullptr || call.workspace_bytes < needed || !is_aligned(call.workspace)) return nullptr;
    return static_cast<char*>(call.workspace) + QWEN_RT_COUNTER_BYTES;
}

int32_t launch_skinny(const QwenRtCall& call, const Matrices& matrices, SkinnyParams& p, void* scratch) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    if (p.rows > kMaxRows) return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%d; expected 1 to %d", p.rows, kMaxRows);
    if (p.k % kStep != 0) return refuse(call, QWEN_RT_UNSUPPORTED, "k=%d; expected a multiple of %d", p.k, kStep);
    if (matrices.perm != nullptr) {
        if (scratch == nullptr)
            return refuse(call, QWEN_RT_INVALID, "no workspace for permuted columns; expected %lld bytes, aligned to 16",
                          static_cast<long long>(workspace_skinny(p.rows, p.k, matrices.groups)));
        auto* reordered = static_cast<unsigned short*>(scratch);
        const int num_rows = p.rows + (p.norm_weight != nullptr ? 1 : 0);
        if (const int32_t status = launch(call, reorder_kernel, device, dim3(static_cast<unsigned>(num_rows)), kSkinnyThreads, 0,
                                          reinterpret_cast<const unsigned short*>(p.x),
                                          reinterpret_cast<const unsigned short*>(p.norm_weight), matrices.perm, reordered, p.rows, p.k))
            return status;
        p.x = static_cast<const bf16*>(scratch);
        p.is_permuted = true, p.has_fresh_norm = p.norm_weight != nullptr;
        if (p.has_fresh_norm) p.norm_weight = p.x + static_cast<int64_t>(p.rows) * p.k;
    }
    for (int i = 0; i < matrices.count; ++i)
        p.weight[i] = matrices.weight[i], p.scale[i] = matrices.scale[i], p.zero[i] = matrices.zero[i];
    p.groups = static_cast<int>(matrices.groups);
    p.group_shift = matrices.groups == 1 ? 31 : log2_of(matrices.group_size);

    const int units_of_tile = p.epilogue == Epilogue::kSiluGate ? 8 : 16;
    SkinnyGrid grid;
    grid.blocks = p.units < device.num_sms ? p.units : device.num_sms;
    const int units_of_block = (p.units + grid.blocks - 1) / grid.blocks;
    grid.tiles = (units_of_block + units_of_tile - 1) / units_of_tile;
    const int64_t unit_bytes = (units_of_tile == 8 ? 2 : 1) * row_bytes_of(matrices.format, p.k);
    grid.is_small = units_of_block * unit_bytes <= kSmallBlockBytes;
    p.block_units = p.units / grid.blocks, p.blocks_with_more = p.units % grid.blocks;
    p.inverse_k = 1.f / static_cast<float>(p.k);
    if (p.epilogue != Epilogue::kBias) p.first_unit[1] = p.first_unit[2] = p.units;
    p.tile_units = (units_of_block + grid.tiles - 1) / grid.tiles;
    p.trigger = kTriggerChunks;

    constexpr decltype(&launch_skinny_bf16) kLaunch[] = {launch_skinny_bf16, launch_skinny_fp8, launch_skinny_int8, launch_skinny_int4};
    const auto launch_format = kLaunch[static_cast<int>(matrices.format)];
    const bool is_whole = matrices.scaling == Scaling::kNone || matrices.scaling == Scaling::kRow;
#ifdef QWEN_RT_TUNE
    const bool may_be_wide = call.flags >> 8 == 0;
#else
    constexpr bool may_be_wide = true;
#endif
    SkinnyParams least = p;
    least.rows = p.rows < kMostWideRows ? p.rows : kMostWideRows;
    const bool wide = may_be_wide && is_wide(device, matrices, least, scratch);
    const int all = p.rows, most = wide ? kMostWideRows : is_whole ? kMaxRows : kMostGroupedRows;
    for (int first = 0; first < all; first += most) {
        SkinnyParams part = p;
        part.rows = all - first < most ? all - first : most;
        part.x += static_cast<int64_t>(first) * p.k;
        if (p.residual != nullptr) part.residual += static_cast<int64_t>(first) * p.units;
        part.out = static_cast<char*>(p.out) + static_cast<int64_t>(first) * p.units * (p.epilogue == Epilogue::kLogits ? 4 : 2);
        const int32_t status = wide ? launch_wide(call, device, matrices, grid, part, scratch)
                                    : launch_format(call, device, grid, part, matrices.scaling);
        if (status) return status;
    }
    return QWEN_RT_OK;
}

}  // namespace qwen_rt
