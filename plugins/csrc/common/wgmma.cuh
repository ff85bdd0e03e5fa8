// What Hopper's warpgroup kernels use, one function each: barriers in shared memory, the tensor copy engine, wgmma.
// Empty before SM 9.0a.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QWEN_RT_HAS_WGMMA 1
#else
#define QWEN_RT_HAS_WGMMA 0
#endif

namespace qwen_rt {

#if QWEN_RT_HAS_WGMMA

// ---------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni out;\n"
        "bra.uni again;\n"
        "out:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Makes ordinary writes to shared memory visible to the copy engine and wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------- tensor copies

// Copies the box of `map` at (column, row) to shared memory and counts its bytes on the barrier.
__device__ __forceinline__ void copy_box(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// ---------------------------------------------------------------- wgmma

// Descriptor of a tile in shared memory whose 128-byte rows are swizzled over 8 rows. `leading`: bytes between 64-column
// panels (only for operands that are transposed); 8-row groups follow each other at 1024 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int leading = 16) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define QWEN_RT_R8(i) "%" #i "0,%" #i "1,%" #i "2,%" #i "3,%" #i "4,%" #i "5,%" #i "6,%" #i "7,%" #i "8,%" #i "9,"
#define QWEN_RT_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QWEN_RT_F16(i) QWEN_RT_F4(i), QWEN_RT_F4(i + 4), QWEN_RT_F4(i + 8), QWEN_RT_F4(i + 12)
#define QWEN_RT_D64                                                                                                   \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," QWEN_RT_R8(1) QWEN_RT_R8(2) QWEN_RT_R8(3) QWEN_RT_R8(4) QWEN_RT_R8(5) "%60,%61,%62,%63}"
#define QWEN_RT_D32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," QWEN_RT_R8(1) QWEN_RT_R8(2) "%30,%31}"

#define QWEN_RT_F32(i) QWEN_RT_F16(i), QWEN_RT_F16(i + 16)
#define QWEN_RT_SCORES(type)                                                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QWEN_RT_D64                      \
                 ", %64, %65, p, 1, 1, 0, 0;\n}\n"                                                                 \
                 : QWEN_RT_F32(0), QWEN_RT_F32(32)                                                                 \
                 : "l"(a), "l"(b), "r"(accumulate))
#define QWEN_RT_VALUES_64(type)                                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QWEN_RT_D64                      \
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"                                                         \
                 : QWEN_RT_F32(0), QWEN_RT_F32(32)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define QWEN_RT_VALUES_32(type)                                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " QWEN_RT_D32                       \
                 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"                                                         \
                 : QWEN_RT_F32(0)                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Operands are bf16, or f16 where kHalf.
// d[64, 128] (+)= a[64, 16] · b[128, 16]ᵀ, both from shared memory with k contiguous.
template <bool kHalf>
__device__ __forceinline__ void wgmma_m64n128(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (kHalf)
        QWEN_RT_SCORES("f16");
    else
        QWEN_RT_SCORES("bf16");
}

// d[64, N] += a[64, 16] · b[16, N]: a in registers, b from shared memory with n contiguous. N = 128 or 64.
template <bool kHalf>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (kHalf)
        QWEN_RT_VALUES_64("f16");
    else
        QWEN_RT_VALUES_64("bf16");
}

template <bool kHalf>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (kHalf)
        QWEN_RT_VALUES_32("f16");
    else
        QWEN_RT_VALUES_32("bf16");
}

#undef QWEN_RT_SCORES
#undef QWEN_RT_VALUES_64
#undef QWEN_RT_VALUES_32
#undef QWEN_RT_F32
#undef QWEN_RT_F16
#undef QWEN_RT_R8
#undef QWEN_RT_F4
#undef QWEN_RT_F16
#undef QWEN_RT_D64
#undef QWEN_RT_D32

template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#endif

}  // namespace qwen_rt
