// What every launcher shares: refusing with a message, facts of the device, launching with programmatic dependence.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "../capi.h"

namespace qwen_rt {

constexpr int kMaxRows = 64;

__attribute__((format(printf, 3, 4))) inline int32_t refuse(const QwenRtCall& call, int32_t status, const char* format, ...) {
    if (call.message != nullptr && call.message_bytes > 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(call.message, static_cast<size_t>(call.message_bytes), format, arguments);
        va_end(arguments);
    }
    return status;
}

struct Device {
    int index;
    int num_sms;
    int max_shared_bytes;  // of one block, after opting in
    int sm;                // compute capability, 90 for 9.0
};

inline cudaError_t current_device(Device* device) {
    static std::atomic<int> known[64][3];
    cudaError_t error = cudaGetDevice(&device->index);
    if (error != cudaSuccess) return error;
    const int slot = device->index & 63;
    if (known[slot][1].load() == 0) {
        int sms = 0, bytes = 0, major = 0, minor = 0;
        error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device->index);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device->index);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->index);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device->index);
        if (error != cudaSuccess) return error;
        known[slot][0] = sms;
        known[slot][2] = major * 10 + minor;
        known[slot][1] = bytes;
    }
    device->num_sms = known[slot][0];
    device->max_shared_bytes = known[slot][1];
    device->sm = known[slot][2];
    return cudaSuccess;
}

// Launches `kernel` so that it may start before the grids before it are complete; the kernel itself waits for them. Clusters
// of `cluster` blocks, where that is more than one, need SM 9.0.
template <class... Parameters, class... Arguments>
int32_t launch_clusters(const QwenRtCall& call, void (*kernel)(Parameters...), const Device& device, dim3 grid, int threads,
                        int shared_bytes, int cluster, Arguments&&... arguments) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess)
            return refuse(call, QWEN_RT_CUDA_ERROR, "shared_bytes=%d of at most %d: %s", shared_bytes,
                          device.max_shared_bytes, cudaGetErrorString(error));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(call.stream);
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (!(call.flags & QWEN_RT_NO_DEPENDENT_LAUNCH)) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) return refuse(call, QWEN_RT_CUDA_ERROR, "launch: %s", cudaGetErrorString(error));
    return QWEN_RT_OK;
}

template <class... Parameters, class... Arguments>
int32_t launch(const QwenRtCall& call, void (*kernel)(Parameters...), const Device& device, dim3 grid, int threads,
               int shared_bytes, Arguments&&... arguments) {
    return launch_clusters(call, kernel, device, grid, threads, shared_bytes, 1, arguments...);
}

// A pointer that the kernels read 16 bytes at a time.
inline bool is_aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15u) == 0; }

// A set of tensors, by number.
template <class... Numbers>
constexpr unsigned set_of(Numbers... numbers) {
    return (0u | ... | (1u << numbers));
}

// `required`: the tensors that must be there. `small`: those read element by element, for which their own alignment will do.
// `num_optional_dims`: so many dims at the end may be 0, where only absent optional tensors would tell them.
inline int32_t check_tensors(const QwenRtCall& call, unsigned required, int num_all, int num_dims, int num_attributes,
                             unsigned small = 0, int num_optional_dims = 0) {
    if (call.num_tensors != num_all || call.num_dims != num_dims || call.num_attributes != num_attributes)
        return refuse(call, QWEN_RT_INVALID, "num_tensors=%d num_dims=%d num_attributes=%d; expected %d, %d, %d",
                      call.num_tensors, call.num_dims, call.num_attributes, num_all, num_dims, num_attributes);
    for (int i = 0; i < num_all; ++i) {
        if ((required >> i & 1u) && call.tensors[i] == nullptr)
            return refuse(call, QWEN_RT_INVALID, "tensor %d is NULL; expected a device pointer", i);
        if (!(small >> i & 1u) && !is_aligned(call.tensors[i]))
            return refuse(call, QWEN_RT_INVALID, "tensor %d at %p; expected an address divisible by 16", i,
                          call.tensors[i]);
    }
    for (int i = 0; i < num_dims; ++i) {
        const int64_t least = i < num_dims - num_optional_dims ? 1 : 0;
        if (call.dims[i] < least || call.dims[i] > INT32_MAX)
            return refuse(call, QWEN_RT_INVALID, "dim %d is %lld; expected %lld to 2^31 - 1", i,
                          static_cast<long long>(call.dims[i]), static_cast<long long>(least));
    }
    return QWEN_RT_OK;
}

}  // namespace qwen_rt
