// Reads memory once and keeps nothing: what bandwidth the kernels could reach. A measuring rod, not an op.
//
// Variants: 0 and up pick blocks per SM and loads in flight per thread; the caller takes the fastest.
#include <cuda_runtime.h>

#include "../capi.h"
#include "launch.cuh"

namespace qwen_rt {

template <int kLoads>
__global__ void __launch_bounds__(512) read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
    uint32_t bits = 0;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + (kLoads - 1) * step < count; i += kLoads * step) {
        uint4 v[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                         : "l"(data + i + j * step));
#pragma unroll
        for (int j = 0; j < kLoads; ++j) bits |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += step) bits |= data[i].x;
    if (bits == 0x12345678u) *sink = bits;  // never, but the compiler cannot know
}

}  // namespace qwen_rt

extern "C" int32_t qwen_rt_read_probe(const void* data, int64_t num_bytes, void* sink, int32_t variant, void* stream) {
    using namespace qwen_rt;
    Device device;
    if (current_device(&device) != cudaSuccess) return QWEN_RT_CUDA_ERROR;
    const int blocks = device.num_sms * (variant % 2 == 0 ? 2 : 4);
    const auto* from = static_cast<const uint4*>(data);
    auto* to = static_cast<uint32_t*>(sink);
    const auto where = static_cast<cudaStream_t>(stream);
    switch (variant / 2) {
        case 0: read_kernel<4><<<blocks, 512, 0, where>>>(from, num_bytes / 16, to); break;
        case 1: read_kernel<8><<<blocks, 512, 0, where>>>(from, num_bytes / 16, to); break;
        case 2: read_kernel<4><<<blocks * 8, 512, 0, where>>>(from, num_bytes / 16, to); break;
        default: return QWEN_RT_INVALID;
    }
    return cudaGetLastError() == cudaSuccess ? QWEN_RT_OK : QWEN_RT_CUDA_ERROR;
}
