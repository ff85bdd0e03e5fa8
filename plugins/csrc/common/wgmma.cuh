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

// Arrives once all copy16_async of this thread so far are complete; counts as one of the barrier's arrivals.
__device__ __forceinline__ void barrier_arrive_behind_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The same barrier of block `block` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster meet.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier of the first kThreads threads of a block.
template <int kThreads>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
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

// The same to every block of the cluster of which `blocks` has a bit: to the same place in each, counted on its barrier there.
__device__ __forceinline__ void copy_box_to_blocks(uint32_t destination, const CUtensorMap* map, int column, int row,
                                                   uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// Copies `bytes` contiguous ones, a multiple of 16, and counts them on the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t destination, const void* source, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
                 "l"(source), "r"(bytes), "r"(barrier)
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
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
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

// ---------------------------------------------------------------- wgmma of bytes

// d[64, N] (+)= a[64, 32] · b[N, 32]ᵀ, N = 2 kCount: e4m3 with f32 sums (their bits), or int8 with int32 sums. A lane holds of
// a rows g and g + 8 of its warp's 16: 4 columns from 4t on (a0, a1) and from 16 + 4t on (a2, a3). b lies in shared memory, k
// contiguous. Without kAdd d is overwritten.
template <bool kFloat, bool kAdd, int kCount>
__device__ __forceinline__ void wgmma_bytes(uint32_t (&d)[kCount], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
    static_assert(kCount == 8 || kCount == 16 || kCount == 24 || kCount == 32 || kCount == 48 || kCount == 64 || kCount == 96,
                  "16, 32, 48, 64, 96, 128 or 192 rows of b");
#define QWEN_RT_OUT8(i) \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define QWEN_RT_OUT32(i) QWEN_RT_OUT8(i), QWEN_RT_OUT8(i + 8), QWEN_RT_OUT8(i + 16), QWEN_RT_OUT8(i + 24)
#define QWEN_RT_TEN(i) "%" #i "0,%" #i "1,%" #i "2,%" #i "3,%" #i "4,%" #i "5,%" #i "6,%" #i "7,%" #i "8,%" #i "9,"
#define QWEN_RT_FIRST "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define QWEN_RT_BYTES(n, registers, a, b_at, add_at, types, scales, ...)                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k32." types " {" registers \
                 "}, {" a "}, " b_at ", p" scales ";\n}\n"                                                                           \
                 : __VA_ARGS__                                                                                                       \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(kAdd ? 1 : 0))
#define QWEN_RT_BYTES_EITHER(n, registers, a, b_at, add_at, ...)                              \
    if constexpr (kFloat)                                                                     \
        QWEN_RT_BYTES(n, registers, a, b_at, add_at, "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__); \
    else                                                                                      \
        QWEN_RT_BYTES(n, registers, a, b_at, add_at, "s32.s8.s8", "", __VA_ARGS__)
    if constexpr (kCount == 8)
        QWEN_RT_BYTES_EITHER("16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", QWEN_RT_OUT8(0));
    else if constexpr (kCount == 16)
        QWEN_RT_BYTES_EITHER("32", QWEN_RT_FIRST "%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21", QWEN_RT_OUT8(0), QWEN_RT_OUT8(8));
    else if constexpr (kCount == 24)
        QWEN_RT_BYTES_EITHER("48", QWEN_RT_FIRST QWEN_RT_TEN(1) "%20,%21,%22,%23", "%24,%25,%26,%27", "%28", "%29", QWEN_RT_OUT8(0),
                             QWEN_RT_OUT8(8), QWEN_RT_OUT8(16));
    else if constexpr (kCount == 32)
        QWEN_RT_BYTES_EITHER("64", QWEN_RT_FIRST QWEN_RT_TEN(1) QWEN_RT_TEN(2) "%30,%31", "%32,%33,%34,%35", "%36", "%37", QWEN_RT_OUT32(0));
    else if constexpr (kCount == 48)
        QWEN_RT_BYTES_EITHER("96", QWEN_RT_FIRST QWEN_RT_TEN(1) QWEN_RT_TEN(2) QWEN_RT_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47",
                             "%48,%49,%50,%51", "%52", "%53", QWEN_RT_OUT32(0), QWEN_RT_OUT8(32), QWEN_RT_OUT8(40));
    else if constexpr (kCount == 64)
        QWEN_RT_BYTES_EITHER("128", QWEN_RT_FIRST QWEN_RT_TEN(1) QWEN_RT_TEN(2) QWEN_RT_TEN(3) QWEN_RT_TEN(4) QWEN_RT_TEN(5) "%60,%61,%62,%63",
                             "%64,%65,%66,%67", "%68", "%69", QWEN_RT_OUT32(0), QWEN_RT_OUT32(32));
    else
        QWEN_RT_BYTES_EITHER("192", QWEN_RT_FIRST QWEN_RT_TEN(1) QWEN_RT_TEN(2) QWEN_RT_TEN(3) QWEN_RT_TEN(4) QWEN_RT_TEN(5) QWEN_RT_TEN(6)
                             QWEN_RT_TEN(7) QWEN_RT_TEN(8) "%90,%91,%92,%93,%94,%95", "%96,%97,%98,%99", "%100", "%101", QWEN_RT_OUT32(0),
                             QWEN_RT_OUT32(32), QWEN_RT_OUT32(64));
#undef QWEN_RT_FIRST
#undef QWEN_RT_TEN
#undef QWEN_RT_OUT32
#undef QWEN_RT_BYTES_EITHER
#undef QWEN_RT_BYTES
#undef QWEN_RT_OUT8
}

// d[64, 192] (+)= a[64, 32] · b[192, 32]ᵀ of e4m3, both in shared memory with k contiguous.
__device__ __forceinline__ void wgmma_fp8_n192(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
#define QWEN_RT_F8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QWEN_RT_F32(i) QWEN_RT_F8(i), QWEN_RT_F8(i + 8), QWEN_RT_F8(i + 16), QWEN_RT_F8(i + 24)
#define QWEN_RT_TEN(i) ",%" #i "0,%" #i "1,%" #i "2,%" #i "3,%" #i "4,%" #i "5,%" #i "6,%" #i "7,%" #i "8,%" #i "9"
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9" QWEN_RT_TEN(1) QWEN_RT_TEN(2)
                     QWEN_RT_TEN(3) QWEN_RT_TEN(4) QWEN_RT_TEN(5) QWEN_RT_TEN(6) QWEN_RT_TEN(7) QWEN_RT_TEN(8)
                 ",%90,%91,%92,%93,%94,%95}, %96, %97, p, 1, 1;\n}\n"
                 : QWEN_RT_F32(0), QWEN_RT_F32(32), QWEN_RT_F32(64)
                 : "l"(a), "l"(b), "r"(accumulate));
#undef QWEN_RT_TEN
#undef QWEN_RT_F32
#undef QWEN_RT_F8
}

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
