// Decode matrices of int4 for 1 to 4 rows, with scales of 128 columns: what their two kernels share. The same numbers as
// skinny_gemm.cuh, sooner: skinny_int4_ring.cuh for large matrices, skinny_int4_direct.cuh for small ones.
//
// What limits it: half a byte of a weight leaves an SM little time, so instructions and waits inside the SM decide. Hence
//   (a) x becomes integers once for a block, not once for every warp and group of tiles;
//   (b) the high and the low bytes of x are different columns of one product, 8 of them for 4 rows: four products for the
//       16 rows and 128 columns of a tile's unit, and two sums for a lane to scale;
//   (c) odd numbers stay in the upper half of their bytes, 16 times as large, in sums of their own;
//   (d) many warps, each with its own copies or loads under way, instead of many tiles a warp.
// Numerics: as in skinny_format.cuh, bit for bit: sums of integers are exact, floats are added in the same order.
// Mapping: as in skinny_gemm.cuh, a block has its units with all of k, and eight warps share k: warp w has the units w, w + 8,
//   ... of 128 columns. `kSets` such sets of eight take the block's tiles in turn, and never meet after x is ready: what else
//   they keep in shared memory is a set's own.
// Overlap: the first weights are under way before the wait for earlier kernels.
#pragma once

#include "skinny_params.cuh"

namespace qwen_rt {

constexpr int kFewRows = 4;

// A row of a tile: where its numbers, its scales and its zero points lie.
struct FewRow {
    const unsigned char *weight, *scale, *zero;
};

// Offsets into shared memory: rings | x as integers | their factors and sums | squares | norm weights | rows of all tiles |
// parts of the sets. Those of a set are into its part.
struct FewLayout {
    int x, units, squares, norm, rows, sets, scales_of_set, sums_of_set, squares_of_set, set_bytes, all;
    int slots, scale_stride, zero_stride, scale_bytes;  // with rings: groups of tiles that a set knows, and bytes of their scales
};

inline int after(int offset, int bytes) { return offset + (bytes + 15) / 16 * 16; }

// `rows`: of tiles, beside the sets; `scale_bytes`: of a set's rows and scales.
inline void lay_out_few(const SkinnyParams& p, int ring_bytes, int rows, int sets, int m_tiles, int scale_bytes,
                        FewLayout* layout) {
    FewLayout& at = *layout;
    const int units = p.rows * p.k / 128;
    at.x = ring_bytes;
    at.units = at.x + units * 256;
    at.squares = after(at.units, units * 8);
    at.norm = after(at.squares, p.norm_weight == nullptr ? 0 : units * 4);
    at.rows = after(at.norm, p.norm_weight == nullptr ? 0 : p.k * 2);
    at.sets = after(at.rows, rows * static_cast<int>(sizeof(FewRow)));
    at.sums_of_set = after(0, scale_bytes);
    at.squares_of_set = at.sums_of_set + 2 * m_tiles * kWarps * p.rows * kReduceStride * 4;
    at.set_bytes = after(at.squares_of_set, kWarps * kFewRows * 4);
    at.all = at.sets + sets * at.set_bytes;
}

// Where row `row` of tile `tile` of units `u` lies.
template <bool kZeros>
__device__ __forceinline__ void find_few_row(const SkinnyParams& p, Units u, int tile, int row, FewRow& to) {
    const TileRow from = tile_row(p, u, tile, row);
    const int64_t number = from.row;
    to.weight = static_cast<const unsigned char*>(p.weight[from.matrix]) + number * (p.k / 2);
    to.scale = static_cast<const unsigned char*>(p.scale[from.matrix]) + number * p.groups * 2;
    if constexpr (kZeros) to.zero = static_cast<const unsigned char*>(p.zero[from.matrix]) + number * ((p.groups + 1) / 2);
}

template <int kThreads>
__device__ __forceinline__ void store_norm(const SkinnyParams& p, uint32_t norm) {
    if (p.has_fresh_norm) wait_for_previous_grids();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.k / 8; i += kThreads) store_shared(norm + i * 16, load_activation(p.norm_weight + i * 8));
}

// x of all rows, from memory into shared memory, as the products read it. Of a unit and row 256 bytes: even numbers, then
// odd ones; of each the high bytes, then the low ones; of those 16 bytes for each lane t. A thread has eight numbers.
template <bool kNorm, bool kZeros, int kThreads>
__device__ __forceinline__ void prepare_few_x(const SkinnyParams& p, const FewLayout& at, unsigned char* shared) {
    const int vectors = p.k / 8, all = p.rows * vectors, lane = threadIdx.x & 31;
    const uint32_t base = smem_address(shared), x_at = base + at.x;
    constexpr int kAtOnce = 1280 / kThreads + 1;
#pragma unroll 1
    for (int first = threadIdx.x; first < all; first += kAtOnce * kThreads) {
        uint4 x[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i * kThreads < all) x[i] = load_activation(p.x + static_cast<int64_t>(first + i * kThreads) * 8);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) store_shared_if(first + i * kThreads < all, x_at + (first + i * kThreads) * 16, x[i]);
    }
    // A thread reads what it has stored. 16 lanes have a unit; of the last warp, half may have none.
#pragma unroll 1
    for (int i = threadIdx.x; i - lane < all; i += kThreads) {
        uint4 x = load_shared(x_at + i * 16);
        float square = 0.f;
        if constexpr (kNorm) {
            square = add_squares(0.f, x);
            const int row = (i >= vectors) + (i >= 2 * vectors) + (i >= 3 * vectors);
            x = multiply_pairs(x, load_shared(base + at.norm + (i - row * vectors) * 16));
        }
        uint32_t largest = __vmaxu2(__vmaxu2(x.x & 0x7fff7fffu, x.y & 0x7fff7fffu), __vmaxu2(x.z & 0x7fff7fffu, x.w & 0x7fff7fffu));
        largest = max(largest >> 16, largest & 0xffffu);
#pragma unroll
        for (int step = 1; step < 16; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
        const uint32_t exponent = max(kLeastExponent, largest >> 7);
        uint32_t high[2], low[2];  // of even numbers, of odd ones
        bytes_of_eight<true>(x, integer_scale(exponent), high, low);
        int sum = byte_sum(high[0], byte_sum(high[1], 0)) * 256 + byte_sum(low[0], byte_sum(low[1], 0));
#pragma unroll
        for (int step = 1; step < 16; step *= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
            if constexpr (kNorm) square += __shfl_xor_sync(~0u, square, step);
        }
        if (i >= all) continue;
        auto* to = reinterpret_cast<uint32_t*>(shared + at.x + (i >> 4) * 256) + (i & 15);
        to[0] = high[0], to[16] = low[0], to[32] = high[1], to[48] = low[1];
        if ((i & 15) == 0) {
            // What comes off for zero points, 8 where there are none.
            const float off = __int_as_float(kZeros ? -sum : -8 * sum);
            reinterpret_cast<float2*>(shared + at.units)[i >> 4] = {integer_factor(exponent), off};
            if constexpr (kNorm) reinterpret_cast<float*>(shared + at.squares)[i >> 4] = square;
        }
    }
}

// A unit of rows g and g + 8 of a tile, 16 bytes of each in a lane. Columns 2r and 2r + 1 of the products are the high and the
// low bytes of row r, so lane t gets the sums of row t. `off` is what comes off for zero points.
__device__ __forceinline__ void multiply_few(uint4 a, uint4 b, uint4 even, uint4 odd, float factor, const int (&off)[2],
                                             const unsigned short (&scale)[2], float (&sum)[2]) {
    int of_even[4] = {}, of_odd[4] = {};
    constexpr uint32_t kEven = 0x0f0f0f0fu, kOdd = 0xf0f0f0f0u;
    mma_bytes<false>(of_even, a.x & kEven, b.x & kEven, a.y & kEven, b.y & kEven, even.x, even.y, of_even);
    mma_bytes<false>(of_odd, a.x & kOdd, b.x & kOdd, a.y & kOdd, b.y & kOdd, odd.x, odd.y, of_odd);
    mma_bytes<false>(of_even, a.z & kEven, b.z & kEven, a.w & kEven, b.w & kEven, even.z, even.w, of_even);
    mma_bytes<false>(of_odd, a.z & kOdd, b.z & kOdd, a.w & kOdd, b.w & kOdd, odd.z, odd.w, of_odd);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int high = of_even[2 * h] + (of_odd[2 * h] >> 4), low = of_even[2 * h + 1] + (of_odd[2 * h + 1] >> 4);
        const float by = factor * __half2float(__ushort_as_half(scale[h]));
        sum[h] = fmaf(static_cast<float>(high * 256 + low + off[h]), by, sum[h]);
    }
}

// The squares of a warp's units, into squares[warp][row].
__device__ __forceinline__ void add_few_squares(const SkinnyParams& p, const float* of_units, int warp, float* squares) {
    const int lane = threadIdx.x & 31, k_units = p.k / 128;
    if (lane >= p.rows) return;
    float square = 0.f;
#pragma unroll 1
    for (int unit = warp; unit < k_units; unit += kWarps) square += of_units[lane * k_units + unit];
    squares[warp * p.rows + lane] = square;
}

// One output: the warps' sums are in buffer[tile][warp][row][20].
template <bool kNorm>
__device__ __forceinline__ void store_few(const SkinnyParams& p, const Output<Format::kInt4, false>& mine, const float* buffer,
                                          const float* squares) {
    float value = 0.f, second = 0.f, mean = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float* part = buffer + ((mine.tile * kWarps + w) * p.rows + mine.row) * kReduceStride + mine.in_tile;
        value += part[0];
        if constexpr (kNorm) {
            if (p.epilogue == Epilogue::kSiluGate) second += part[8];
            mean += squares[w * p.rows + mine.row];
        }
    }
    const float inverse_rms = kNorm ? rsqrtf(mean * p.inverse_k + p.epsilon) : 1.f;
    store_output<kNorm>(p, mine.row, mine.unit, value * inverse_rms, second * inverse_rms, mine.addend);
}

}  // namespace qwen_rt
