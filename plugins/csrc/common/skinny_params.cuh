// What the skinny kernel is given and shares with its launchers: parameters, sizes of its shared memory, which row of which
// matrix is which row of a tile, and what the sums meet at the end.
#pragma once

#include "launch.cuh"
#include "dequantize.cuh"

namespace qwen_rt {

enum class Epilogue {
    kBias,      // bf16(y / rms + bias)
    kResidual,  // bf16(residual + y)
    kSiluGate,  // bf16(silu(y_gate / rms) · y_up / rms)
    kLogits,    // f32(y / rms)
};

struct SkinnyParams {
    Epilogue epilogue;
    const bf16* x;            // [rows, k]
    const bf16* norm_weight;  // [k], or null
    const void* weight[3];    // up to three matrices below each other (gate and up: beside each other)
    const void* scale[3];     // [rows of the matrix, groups]; f16 of int4, else f32
    const void* zero[3];      // as stored; null if there are none
    const bf16* bias[3];      // each may be null
    int first_unit[3];        // of each matrix; of matrices that there are not, what no unit comes to
    const bf16* residual;     // [rows, units]
    void* out;                // [rows, units]
    int rows, k, units;
    float epsilon, inverse_k;
    int block_units, blocks_with_more;  // units of a block; so many first blocks have one more
    int groups;          // scales of a row
    int group_shift;     // k >> it is the group; 31 where a row has one
    int tile_units;      // units of a tile: at most 16, or 8 pairs; evened out over a block's tiles
    int trigger;
    int table_groups;    // groups of tiles whose rows are known: as far as the loader may be ahead
    int scale_buffers;   // 2 where scales of the next group of tiles come while those of this one are used
    bool has_fresh_norm;  // norm_weight was written by the kernel before this one
    bool is_permuted;     // x was
};

constexpr int kWarps = 8;
constexpr int kSkinnyThreads = kWarps * 32;
constexpr int kReduceStride = 20;            // floats: 16 sums of a column, padded

// Columns (activation rows) whose sums are added up together.
__host__ __device__ constexpr int reduce_columns(int n_tiles) { return n_tiles == 1 ? 8 : 16; }
// Of up to 8 rows all tiles of a group are added up between two barriers, columns of rows only; of more, one after another.
__host__ __device__ constexpr int reduce_floats(int n_tiles, int rows) {
    return kWarps * (n_tiles == 1 ? rows : reduce_columns(n_tiles)) * kReduceStride;
}
__host__ __device__ constexpr int reduce_bytes(int n_tiles, int m_tiles, int rows) {
    return reduce_floats(n_tiles, rows) * 4 * (n_tiles == 1 ? m_tiles : 1);
}
__host__ __device__ constexpr int squares_bytes(int n_tiles) { return kWarps * n_tiles * 8 * 4; }
// Norm weights, up to the end of the last slice of any format.
__host__ __device__ constexpr int norm_bytes(bool has_norm, int k) { return has_norm ? (k * 2 + 255) / 256 * 256 : 0; }
// Of the rows of some groups of tiles: where they lie, and where their scales do within 16 bytes.
__host__ __device__ constexpr int table_bytes(int groups, int m_tiles, bool has_scales) {
    return groups * m_tiles * 16 * (has_scales ? 12 : 8);
}
// What a warp keeps of one turn: weights of all tiles of a group, and x (rows 0: where x is resident).
template <class Slice>
__host__ __device__ constexpr int stage_bytes(int m_tiles, int rows) {
    return m_tiles * Slice::kTileBytes + rows * Slice::kXBytes;
}
// Turns in which the warps have a row.
template <class Slice>
__host__ __device__ constexpr int turns_of(int64_t row_bytes, int parts) {
    return static_cast<int>((row_bytes + kWarps * Slice::kSliceBytes - 1) / (kWarps * Slice::kSliceBytes)) * parts;
}
// A warp's slices of all of x, where it is resident.
template <class Slice>
__host__ __device__ constexpr int resident_bytes(int rows, int k) {
    constexpr int kChunkK = kWarps * Slice::kSliceK;
    return (k + kChunkK - 1) / kChunkK * rows * Slice::kSliceK * 2;
}

struct Units {
    int first, count;
};

// ---------------------------------------------------------------- rows

struct TileRow {
    int matrix, row;  // the last one where there is none
    bool is_there;
};

// Row `unit` of the matrices that lie below each other.
__device__ __forceinline__ TileRow row_of_unit(const SkinnyParams& p, int unit, bool is_there) {
    const int matrix = (unit >= p.first_unit[1]) + (unit >= p.first_unit[2]);
    return {matrix, unit - p.first_unit[matrix], is_there};
}

// Row `row` of tile `m` of a group. Of pairs, rows 0 to 7 are gate's and 8 to 15 up's.
__device__ __forceinline__ TileRow tile_row(const SkinnyParams& p, Units u, int m, int row) {
    const bool is_pairs = p.epilogue == Epilogue::kSiluGate;
    const int in_tile = is_pairs ? row & 7 : row, unit = m * p.tile_units + in_tile;
    const bool is_there = in_tile < p.tile_units && unit < u.count;
    TileRow found = row_of_unit(p, u.first + min(unit, u.count - 1), is_there);
    if (is_pairs) found.matrix = row >> 3;
    return found;
}

__device__ __forceinline__ int rows_of(const SkinnyParams& p, int matrix) {
    if (p.epilogue == Epilogue::kSiluGate) return p.units;
    return min(matrix == 2 ? p.units : p.first_unit[matrix + 1], p.units) - p.first_unit[matrix];
}

// ---------------------------------------------------------------- scales in shared memory

// A row of scales keeps its place within 16 bytes, so that it can be copied 16 bytes at a time; an odd number of those
// from row to row spreads rows over the banks.
__host__ __device__ constexpr int padded_row(int bytes) { return ((bytes + 30) / 16 | 1) * 16; }

struct ScaleRow {
    int bytes, zero_bytes;  // of a row in memory
};

__host__ __device__ inline ScaleRow scale_row_of(Format format, const SkinnyParams& p) {
    return {p.groups * scale_bytes_of(format), p.zero[0] == nullptr ? 0 : zero_row_bytes_of(format, p.groups)};
}

__host__ __device__ inline int scale_buffer_bytes(ScaleRow row, int m_tiles) {
    return m_tiles * 16 * (padded_row(row.bytes) + (row.zero_bytes == 0 ? 0 : padded_row(row.zero_bytes)));
}

// Starts copying one row by the lanes of a block: item `item` of its 16-byte pieces.
__device__ __forceinline__ void copy_piece(uint32_t to, const char* matrix, int64_t row, int bytes, int num_rows, int item) {
    const char* from = matrix + row * bytes;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
    if (item * 16 >= shift + bytes) return;
    from += item * 16 - shift;
    const int64_t left = matrix + static_cast<int64_t>(num_rows) * bytes - from;  // to the end of the tensor
    copy16_or_zero_async(to + item * 16, from, left < 16 ? static_cast<int>(left) : 16);
}

// Starts copying the scales and zero points of a group of tiles, a row by each warp.
__device__ __forceinline__ void copy_scales(const SkinnyParams& p, ScaleRow size, Units u, int m_tiles, uint32_t to) {
    const int stride = padded_row(size.bytes), pieces = stride / 16, zero_stride = padded_row(size.zero_bytes);
    const int all = pieces + (size.zero_bytes == 0 ? 0 : zero_stride / 16);
    const uint32_t zeros = to + m_tiles * 16 * stride;
#pragma unroll 1
    for (int row = threadIdx.x >> 5; row < m_tiles * 16; row += kWarps) {
        const TileRow from = tile_row(p, u, row >> 4, row & 15);
        if (!from.is_there) continue;
        const int count = rows_of(p, from.matrix);
#pragma unroll 1
        for (int item = threadIdx.x & 31; item < all; item += 32) {
            const bool is_zero = item >= pieces;
            copy_piece(is_zero ? zeros + row * zero_stride : to + row * stride,
                       static_cast<const char*>(is_zero ? p.zero[from.matrix] : p.scale[from.matrix]), from.row,
                       is_zero ? size.zero_bytes : size.bytes, count, is_zero ? item - pieces : item);
        }
    }
}

// Bytes from a multiple of 16 to a row of scales, and above them to one of zero points.
__device__ __forceinline__ uint32_t scale_shifts(const SkinnyParams& p, ScaleRow size, TileRow row) {
    const auto shift = [&](const void* matrix, int bytes) {
        return (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(matrix)) + static_cast<uint32_t>(row.row) * bytes) & 15u;
    };
    return shift(p.scale[row.matrix], size.bytes) | shift(p.zero[row.matrix], size.zero_bytes) << 16;
}

// Where a thread finds the scales of its rows g and g + 8 of every tile.
template <Format kFormat, int kMTiles>
struct ScaleRows {
    const unsigned char* scales[kMTiles][2];
    const unsigned char* zeros[kMTiles][2];
    bool is_symmetric;

    // `shifts`: of the group's rows.
    __device__ __forceinline__ void find(ScaleRow size, int g, const unsigned char* buffer, const uint32_t* shifts) {
        const int stride = padded_row(size.bytes), zero_stride = padded_row(size.zero_bytes);
        is_symmetric = size.zero_bytes == 0;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int place = m * 16 + g + 8 * h;
                scales[m][h] = buffer + place * stride + (shifts[place] & 15u);
                zeros[m][h] = buffer + kMTiles * 16 * stride + place * zero_stride + (shifts[place] >> 16);
            }
    }

    __device__ __forceinline__ float scale(int m, int h, int group) const { return scale_at<kFormat>(scales[m][h], group); }

    __device__ __forceinline__ int zero(int m, int h, int group) const {
        return is_symmetric ? zero_at<kFormat>(nullptr, 0) : zero_at<kFormat>(zeros[m][h], group);
    }
};

// ---------------------------------------------------------------- the end of a sum

// Bits of bf16 numbers: what is fetched early is not touched before it is needed, or the thread would wait for it there.
__device__ __forceinline__ uint32_t residual_at(const SkinnyParams& p, int row, int unit) {
    return __ldcg(reinterpret_cast<const unsigned short*>(p.residual) + static_cast<int64_t>(row) * p.units + unit);
}
__device__ __forceinline__ uint32_t bias_at(const SkinnyParams& p, TileRow at) {
    const auto* bias = reinterpret_cast<const unsigned short*>(p.bias[at.matrix]);
    return bias == nullptr ? 0 : __ldg(bias + at.row);
}
__device__ __forceinline__ float number_of(uint32_t bits) { return __uint_as_float(bits << 16); }

// One output, and what its sum meets: bias or residual, and the scale of its row, or of two.
template <Format kFormat, bool kRowScales>
struct Output {
    int tile, in_tile, row, unit;
    bool is_there;
    uint32_t addend;
    float scale, second;

    // Number `index` of a group of `m_tiles` tiles: units of a tile, tiles, rows.
    __device__ __forceinline__ void find(const SkinnyParams& p, Units u, int m_tiles, int index) {
        find_constants(p, u, m_tiles, index);
        fetch_residual(p);
    }

    // The same but for the residual, which the kernel before may write.
    __device__ __forceinline__ void find_constants(const SkinnyParams& p, Units u, int m_tiles, int index) {
        const int log = p.epilogue == Epilogue::kSiluGate ? 3 : 4, rest = index >> log;
        in_tile = index & ((1 << log) - 1);
        tile = rest % m_tiles, row = rest / m_tiles;
        const int unit_in_group = tile * p.tile_units + in_tile;
        is_there = in_tile < p.tile_units && unit_in_group < u.count && row < p.rows;
        unit = u.first + unit_in_group;
        addend = 0, scale = second = 1.f;
        if (!is_there) return;
        const TileRow at = row_of_unit(p, unit, true);
        if constexpr (kRowScales) {
            scale = scale_at<kFormat>(p.scale[at.matrix], at.row);
            if (p.epilogue == Epilogue::kSiluGate) second = scale_at<kFormat>(p.scale[1], at.row);
        }
        if (p.epilogue == Epilogue::kBias) addend = bias_at(p, at);
    }

    __device__ __forceinline__ void fetch_residual(const SkinnyParams& p) {
        if (is_there && p.epilogue == Epilogue::kResidual) addend = residual_at(p, row, unit);
    }
};

// The same of one output in every tile and round.
template <Format kFormat, int kMTiles, int kRounds, bool kRowScales>
struct Addends {
    uint32_t addend[kMTiles][kRounds];
    float scale[kRowScales ? kMTiles : 1], second[kRowScales ? kMTiles : 1];

    __device__ __forceinline__ void fetch(const SkinnyParams& p, Units u, bool i_store, int my_unit, int my_column, int columns) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
            const int unit_in_group = m * p.tile_units + my_unit;
            const bool is_mine = i_store && unit_in_group < u.count;
            const int unit = u.first + (is_mine ? unit_in_group : 0);
            const TileRow at = row_of_unit(p, unit, is_mine);
            if constexpr (kRowScales) {
                scale[m] = second[m] = 0.f;
                if (is_mine) scale[m] = scale_at<kFormat>(p.scale[at.matrix], at.row);
                if (is_mine && p.epilogue == Epilogue::kSiluGate) second[m] = scale_at<kFormat>(p.scale[1], at.row);
            }
            const uint32_t bias = is_mine && p.epilogue == Epilogue::kBias ? bias_at(p, at) : 0;
#pragma unroll
            for (int r = 0; r < kRounds; ++r) {
                const int row = r * columns + my_column;
                addend[m][r] = bias;
                if (p.epilogue == Epilogue::kResidual && is_mine && row < p.rows) addend[m][r] = residual_at(p, row, unit);
            }
        }
    }
};

// Writes an element: `value` and, of pairs, `second` are finished sums.
template <bool kNorm>
__device__ __forceinline__ void store_output(const SkinnyParams& p, int row, int unit, float value, float second, uint32_t addend) {
    const int64_t at = static_cast<int64_t>(row) * p.units + unit;
    if (kNorm && p.epilogue == Epilogue::kLogits)
        static_cast<float*>(p.out)[at] = value;
    else if (kNorm && p.epilogue == Epilogue::kSiluGate)
        static_cast<bf16*>(p.out)[at] = __float2bfloat16(__fdividef(value, 1.f + __expf(-value)) * second);
    else
        static_cast<bf16*>(p.out)[at] = __float2bfloat16(value + number_of(addend));
}

__device__ __forceinline__ float add_squares(float sum, uint4 v) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(pairs[i]);
        sum = fmaf(f.x, f.x, sum);
        sum = fmaf(f.y, f.y, sum);
    }
    return sum;
}

}  // namespace qwen_rt
