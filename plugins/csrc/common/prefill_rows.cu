// Norm, rounding of activations to e4m3 and i8, integer sums, and quantized matrices in bf16. See prefill_rows.cuh.
//
// Rows: one block of 256 threads per row, which holds the row in registers between its uses: rows are read once, 16 bytes
//   per thread and turn. Squares are summed per thread in order, then by halves of the warp, then in warp order, so a row's
//   result does not depend on the others. x / rms ∘ weight is rounded once; the skinny kernel rounds x ∘ weight and applies
//   1 / rms to the f32 sum: equally exact, not the same bits.
// Matrices: one block of 256 threads per row of the matrix, 8 numbers per thread and turn; permuted columns go through shared
//   memory, so that they too are written 16 bytes at a time.
#include "prefill_rows.cuh"

#include <cuda_fp8.h>

#include "dequantize.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- helpers

constexpr int kRowThreads = 256;
constexpr int kRowVector = kRowThreads * 8;  // elements of a row that a block loads in one turn
constexpr float kMaxFp8 = 448.f, kMaxInt8 = 127.f;

// NaN if one is: a row of bytes has no other place for it than its scale.
__device__ __forceinline__ float maximum(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

// Sum or maximum over the block, for all threads. `of_warp` is used once.
template <bool kMaximum>
__device__ __forceinline__ float reduce_block(float value, float (&of_warp)[kRowThreads / 32]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, value, step);
        value = kMaximum ? maximum(value, other) : value + other;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warp[0];
#pragma unroll
    for (int w = 1; w < kRowThreads / 32; ++w) value = kMaximum ? maximum(value, of_warp[w]) : value + of_warp[w];
    return value;
}

__device__ __forceinline__ uint32_t to_fp8(float a, float b, float c, float d) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

// Of numbers within -127 and 127, to the nearest, ties to even: as the last bits of 1.5 · 2^23 + a.
__device__ __forceinline__ uint32_t to_int8(float a, float b, float c, float d) {
    constexpr float kMagic = 12582912.f;
    const uint32_t low = __byte_perm(__float_as_uint(a + kMagic), __float_as_uint(b + kMagic), 0x0040);
    const uint32_t high = __byte_perm(__float_as_uint(c + kMagic), __float_as_uint(d + kMagic), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

template <Format kFormat>
__device__ __forceinline__ uint32_t to_bytes(float a, float b, float c, float d) {
    if constexpr (kFormat == Format::kFp8) return to_fp8(a, b, c, d);
    return to_int8(a, b, c, d);
}

// ---------------------------------------------------------------- kernels

// kNorm: divided by the row's rms and multiplied by `weight`. Where kFormat is not bf16, scale_of gets the row's scale.
template <int kVectors, bool kNorm, Format kFormat>
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(const bf16* x, const bf16* weight, void* out, float* scale_of, int k, float epsilon) {
    __shared__ float of_warp[2][kRowThreads / 32];
    let_next_grid_start();
    wait_for_previous_grids();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
    uint4 v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = i * kRowVector + static_cast<int>(threadIdx.x) * 8;
        v[i] = at < k ? load_activation(x + row + at) : make_uint4(0, 0, 0, 0);
    }
    float scale = 1.f;
    if constexpr (kNorm) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) sum = add_squares(sum, v[i]);
        scale = rsqrtf(reduce_block<false>(sum, of_warp[0]) / static_cast<float>(k) + epsilon);
    }
    // Element 2 j and 2 j + 1 of vector i.
    const auto element = [&](int i, int j) {
        const uint32_t pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
        float2 f = unpack(pairs[j]);
        if constexpr (kNorm) {
            const int at = i * kRowVector + static_cast<int>(threadIdx.x) * 8;
            const float2 w = at < k ? unpack(__ldg(reinterpret_cast<const uint32_t*>(weight + at) + j)) : make_float2(0.f, 0.f);
            f = {f.x * scale * w.x, f.y * scale * w.y};
        }
        return f;
    };
    [[maybe_unused]] float inverse = 0.f;
    if constexpr (kFormat != Format::kBf16) {
        constexpr float kMost = kFormat == Format::kFp8 ? kMaxFp8 : kMaxInt8;
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 f = element(i, j);
                largest = maximum(largest, maximum(fabsf(f.x), fabsf(f.y)));
            }
        largest = reduce_block<true>(largest, of_warp[1]);
        inverse = largest > 0.f ? kMost / largest : 0.f;
        if (threadIdx.x == 0) scale_of[blockIdx.x] = largest / kMost;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = i * kRowVector + static_cast<int>(threadIdx.x) * 8;
        if (at >= k) continue;
        float2 f[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) f[j] = element(i, j);
        if constexpr (kFormat != Format::kBf16) {
            *reinterpret_cast<uint2*>(static_cast<unsigned char*>(out) + row + at) =
                make_uint2(to_bytes<kFormat>(f[0].x * inverse, f[0].y * inverse, f[1].x * inverse, f[1].y * inverse),
                           to_bytes<kFormat>(f[2].x * inverse, f[2].y * inverse, f[3].x * inverse, f[3].y * inverse));
        } else {
            *reinterpret_cast<uint4*>(static_cast<bf16*>(out) + row + at) =
                make_uint4(pack(f[0].x, f[0].y), pack(f[1].x, f[1].y), pack(f[2].x, f[2].y), pack(f[3].x, f[3].y));
        }
    }
}

// Four units of a row per thread.
__global__ void __launch_bounds__(kRowThreads)
    finish_integers_kernel(IntegerSums from, const bf16* bias, const bf16* residual, bf16* out, int units) {
    let_next_grid_start();
    wait_for_previous_grids();
    const int unit = (static_cast<int>(blockIdx.y) * kRowThreads + static_cast<int>(threadIdx.x)) * 4;
    if (unit >= units) return;
    const int64_t row = blockIdx.x, at = row * from.stride + unit;
    float4 f = scale_sums(from, row, unit);
    const auto add = [&](uint2 pairs) {
        const float2 low = unpack(pairs.x), high = unpack(pairs.y);
        f = {f.x + low.x, f.y + low.y, f.z + high.x, f.w + high.y};
    };
    if (bias != nullptr) add(__ldg(reinterpret_cast<const uint2*>(bias + unit)));
    if (residual != nullptr) add(__ldcg(reinterpret_cast<const uint2*>(residual + at)));
    *reinterpret_cast<uint2*>(out + at) = make_uint2(pack(f.x, f.y), pack(f.z, f.w));
}

// Row `first + blockIdx.x` of a matrix. `perm` null: columns are in order.
template <Format kFormat>
__global__ void __launch_bounds__(kRowThreads)
    dequantize_kernel(const unsigned char* matrix, const void* scales, const unsigned char* zeros, const int32_t* perm, bf16* out,
                      int64_t first, int k, int groups) {
    extern __shared__ __align__(16) unsigned char shared[];
    bf16* in_order = reinterpret_cast<bf16*>(shared);
    let_next_grid_start();
    wait_for_previous_grids();  // the product before this one has read the slab
    const int64_t row = first + blockIdx.x;
    const unsigned char* from = matrix + row * row_bytes_of(kFormat, k);
    const unsigned char* zero_row = zeros == nullptr ? nullptr : zeros + row * zero_row_bytes_of(kFormat, groups);
    const int group_size = k / groups;
    uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(blockIdx.x) * k);
    for (int i = threadIdx.x; i < k / 8; i += kRowThreads) {
        const int group = i * 8 / group_size;
        const uint4 v = dequantize_eight<kFormat>(from, i, scale_at<kFormat>(scales, row * groups + group),
                                                  zero_at<kFormat>(zero_row, group));
        if (perm == nullptr) {
            to[i] = v;
            continue;
        }
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int32_t at = __ldg(perm + i * 8 + j);
            if (at >= 0 && at < k)
                in_order[at] = __ushort_as_bfloat16(static_cast<unsigned short>(pairs[j / 2] >> (j & 1) * 16));
        }
    }
    if (perm == nullptr) return;
    __syncthreads();
    for (int i = threadIdx.x; i < k / 8; i += kRowThreads) to[i] = reinterpret_cast<const uint4*>(shared)[i];
}

// ---------------------------------------------------------------- launcher

namespace {

template <bool kNorm, Format kFormat>
int32_t launch_rows(const QwenRtCall& call, const void* x, const void* weight, void* out, float* scale, int64_t rows, int64_t k,
                    double epsilon) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    // A thread holds 1, 2, 4, 10 or 16 vectors of the row: 2048 to 32768 elements a block.
    const auto kernel = k <= kRowVector        ? row_kernel<1, kNorm, kFormat>
                        : k <= 2 * kRowVector  ? row_kernel<2, kNorm, kFormat>
                        : k <= 4 * kRowVector  ? row_kernel<4, kNorm, kFormat>
                        : k <= 10 * kRowVector ? row_kernel<10, kNorm, kFormat>
                                               : row_kernel<16, kNorm, kFormat>;
    if (k > 16 * kRowVector)
        return refuse(call, QWEN_RT_UNSUPPORTED, "k=%lld; expected at most %d", static_cast<long long>(k), 16 * kRowVector);
    return launch(call, kernel, device, dim3(static_cast<unsigned>(rows)), kRowThreads, 0, static_cast<const bf16*>(x),
                  static_cast<const bf16*>(weight), out, scale, static_cast<int>(k), static_cast<float>(epsilon));
}

}  // namespace

int32_t normalize_rows(const QwenRtCall& call, const void* x, const void* weight, bf16* out, int64_t rows, int64_t k,
                       double epsilon) {
    return launch_rows<true, Format::kBf16>(call, x, weight, out, nullptr, rows, k, epsilon);
}

int32_t quantize_rows(const QwenRtCall& call, Format format, const void* x, const void* weight, void* out, float* scale,
                      int64_t rows, int64_t k, double epsilon) {
    const auto of_fp8 = weight != nullptr ? launch_rows<true, Format::kFp8> : launch_rows<false, Format::kFp8>;
    const auto of_int8 = weight != nullptr ? launch_rows<true, Format::kInt8> : launch_rows<false, Format::kInt8>;
    return (format == Format::kFp8 ? of_fp8 : of_int8)(call, x, weight, out, scale, rows, k, epsilon);
}

int32_t finish_integers(const QwenRtCall& call, const IntegerSums& sums, const void* bias, const void* residual, void* out,
                        int64_t rows, int64_t units) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((units / 4 + kRowThreads - 1) / kRowThreads));
    return launch(call, finish_integers_kernel, device, grid, kRowThreads, 0, sums, static_cast<const bf16*>(bias),
                  static_cast<const bf16*>(residual), static_cast<bf16*>(out), static_cast<int>(units));
}

int32_t dequantize_matrix(const QwenRtCall& call, const Matrices& matrices, int which, int64_t first, int64_t units, int64_t k,
                          bf16* out) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const auto kernel = matrices.format == Format::kFp8    ? dequantize_kernel<Format::kFp8>
                        : matrices.format == Format::kInt8 ? dequantize_kernel<Format::kInt8>
                                                           : dequantize_kernel<Format::kInt4>;
    const int shared_bytes = matrices.perm == nullptr ? 0 : static_cast<int>(k) * 2;
    if (shared_bytes > device.max_shared_bytes)
        return refuse(call, QWEN_RT_UNSUPPORTED, "k=%lld permuted columns; expected at most %d", static_cast<long long>(k),
                      device.max_shared_bytes / 2);
    return launch(call, kernel, device, dim3(static_cast<unsigned>(units)), kRowThreads, shared_bytes,
                  static_cast<const unsigned char*>(matrices.weight[which]), matrices.scale[which],
                  static_cast<const unsigned char*>(matrices.zero[which]), matrices.perm, out, first, static_cast<int>(k),
                  static_cast<int>(matrices.groups));
}

}  // namespace qwen_rt
