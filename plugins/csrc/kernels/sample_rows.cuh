// Shared by the kernels of the full path of `sample`: its workspace, the settings of a row, a block's tokens and sums.
#pragma once

#include "../common/ptx.cuh"
#include "sample_full.cuh"

namespace qwen_rt::sampling {

// ---------------------------------------------------------------- workspace

constexpr int kThreads = 256;
constexpr int kWarpsOfBlock = kThreads / 32;
constexpr int kQuadsOfThread = 4;
constexpr int kSliceTokens = kThreads * kQuadsOfThread * 4;
constexpr int kMaxSlices = kMaxSampleVocab / kSliceTokens;
constexpr int kBins = 2048;
constexpr int kNumSelects = 6;
constexpr uint32_t kAllEquals = ~0u;

// What a select kernel starts from.
struct Selection {
    uint32_t key;     // the upper bits found so far, or (before round 0 of top_p) the lowest key that is left
    uint64_t wanted;  // count or mass still to be reached within the keys that share them
};

struct Slice {
    uint64_t mass;        // of the kept tokens above the last one's key
    uint32_t num_equals;  // tokens with just that key
    double exp_sum;       // of all logits before edits, relative to the largest of the row
    unsigned long long top[kNumTop];
};

struct Scratch {
    unsigned long long histograms[kNumSelects][kBins];
    Selection selections[kNumSelects + 1];
    uint32_t num_equals_kept, has_edits;
    Slice slices[kMaxSlices];
};
constexpr int64_t kScratchBytes = (sizeof(Scratch) + 255) / 256 * 256;

inline dim3 grid_of(const SampleParams& p) {
    return dim3(static_cast<unsigned>((p.num_tokens + kSliceTokens - 1) / kSliceTokens), static_cast<unsigned>(p.rows));
}
__host__ __device__ inline bool wants_logprobs(const SampleParams& p) {
    return p.logprobs != nullptr || p.top_ids != nullptr;
}

__device__ __forceinline__ Scratch& scratch_of(const SampleParams& p, int row) {
    return *reinterpret_cast<Scratch*>(p.scratch + row * kScratchBytes);
}
__device__ __forceinline__ float* edited_logits(const SampleParams& p, int row) {
    return reinterpret_cast<float*>(p.scratch + p.rows * kScratchBytes) + static_cast<int64_t>(row) * p.vocab;
}

// ---------------------------------------------------------------- helpers: a row's settings

enum Flag : uint32_t { kRawNan = 1, kEditedNan = 2 };

__device__ __forceinline__ bool is_bad(const RowCounters& c) {
    return __ldcg(&c.flags) != 0 || !can_choose(__ldcg(&c.raw_best)) || !can_choose(__ldcg(&c.best));
}
__device__ __forceinline__ bool is_random(const SampleParams& p, int row) {
    return p.temperature != nullptr && p.temperature[row] >= kGreedyTemperature;
}
__device__ __forceinline__ bool has_top_k(const SampleParams& p, int row) {
    return p.top_k != nullptr && p.top_k[row] > 0 && p.top_k[row] < p.num_tokens;
}
__device__ __forceinline__ bool has_top_p(const SampleParams& p, int row) {
    return p.top_p != nullptr && p.top_p[row] < 1.f;
}
__device__ __forceinline__ int slot_of(const SampleParams& p, int row) {
    const int slot = p.count_slots == nullptr ? -1 : p.count_slots[row];
    return slot < p.slots ? slot : -1;
}
__device__ __forceinline__ Softmax softmax_of(const SampleParams& p, int row) {
    constexpr double kLog2E = 1.4426950408889634;
    return {static_cast<double>(value_of_order(__ldcg(&p.counters[row].best))),
            kLog2E / static_cast<double>(p.temperature[row])};
}
// Tokens whose exponent is below this are too improbable.
__device__ __forceinline__ double least_exponent(const SampleParams& p, int row) {
    const float min_p = p.min_p == nullptr ? 0.f : fminf(p.min_p[row], 1.f);
    return min_p > 0.f ? log2(static_cast<double>(min_p)) : -INFINITY;
}
__device__ __forceinline__ const float* logits_of(const SampleParams& p, int row) {
    return __ldcg(&scratch_of(p, row).has_edits) ? edited_logits(p, row) : p.logits + static_cast<int64_t>(row) * p.vocab;
}

// ---------------------------------------------------------------- helpers: a slice, a block

// 16 tokens of a thread. kContiguous: neighbours, in order of id over the threads; else each load is 16 bytes of one line.
template <bool kContiguous>
struct Tokens {
    float x[4 * kQuadsOfThread];
    int first, end;  // ids from `end` on are not there

    __device__ __forceinline__ Tokens(const float* logits, int slice, int num_tokens) {
        first = slice * kSliceTokens + 4 * static_cast<int>(threadIdx.x) * (kContiguous ? kQuadsOfThread : 1);
        end = num_tokens;
#pragma unroll
        for (int q = 0; q < kQuadsOfThread; ++q) {
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            if (id(4 * q) < end) v = __ldcg(reinterpret_cast<const float4*>(logits + id(4 * q)));
            x[4 * q] = v.x;
            x[4 * q + 1] = v.y;
            x[4 * q + 2] = v.z;
            x[4 * q + 3] = v.w;
        }
    }
    __device__ __forceinline__ int id(int i) const {
        return kContiguous ? first + i : first + i / 4 * 4 * kThreads + i % 4;
    }
    __device__ __forceinline__ bool is_there(int i) const { return id(i) < end; }
    __device__ __forceinline__ uint32_t key(int i) const { return is_there(i) ? key_of(x[i]) : 0; }
};

__device__ __forceinline__ unsigned long long larger(unsigned long long a, unsigned long long b) { return a > b ? a : b; }

__device__ __forceinline__ unsigned long long warp_largest(unsigned long long value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = larger(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

// Adds, and orders what this thread wrote before and reads after: half the price of two __threadfence().
__device__ __forceinline__ uint32_t add_in_order(uint32_t* counter, uint32_t value) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

// Sum of the values of all threads before this one; `total`: of all. To be called by the whole block.
__device__ __forceinline__ uint64_t sum_before(uint64_t value, uint64_t* total) {
    __shared__ unsigned long long of_warp[kWarpsOfBlock];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned long long through = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned long long other = __shfl_up_sync(~0u, through, distance);
        if (lane >= distance) through += other;
    }
    __syncthreads();  // the sums of the call before have been read
    if (lane == 31) of_warp[warp] = through;
    __syncthreads();
    unsigned long long before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarpsOfBlock; ++w) {
        if (w < warp) before += of_warp[w];
        all += of_warp[w];
    }
    *total = all;
    return before + through - value;
}

// Merges lists of kNumTop, each falling, padded with 0: lane l owns the lists l and l + 32. To be called by a whole warp;
// `give(i, order)` gets the i-th largest in every lane.
template <class Give>
__device__ __forceinline__ void merge_lists(const unsigned long long* lists, int num_lists, Give give) {
    const int lane = threadIdx.x % 32;
    int at[2] = {0, 0};
    unsigned long long head[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) head[s] = lane + 32 * s < num_lists ? lists[(lane + 32 * s) * kNumTop] : 0;
    for (int i = 0; i < kNumTop; ++i) {
        const unsigned long long winner = warp_largest(larger(head[0], head[1]));
        give(i, winner);
#pragma unroll
        for (int s = 0; s < 2; ++s)
            if (winner != 0 && head[s] == winner) head[s] = ++at[s] < kNumTop ? lists[(lane + 32 * s) * kNumTop + at[s]] : 0;
    }
}

}  // namespace qwen_rt::sampling
