// The first kernels of the full path of `sample`: edits and penalties, and what log probabilities need. See sample_full.cu.
#include "sample_rows.cuh"

namespace qwen_rt {

namespace {

using namespace sampling;

// ---------------------------------------------------------------- kernel: edits and penalties

__global__ void __launch_bounds__(kThreads) edit_kernel(const SampleParams p) {
    __shared__ __align__(16) float slice[kSliceTokens];
    const int row = blockIdx.y, begin = blockIdx.x * kSliceTokens;
    wait_for_previous_grids();
    let_next_grid_start();
    Scratch& scratch = scratch_of(p, row);
    if (p.top_k != nullptr || p.top_p != nullptr)
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < kNumSelects * kBins; i += gridDim.x * kThreads)
            (&scratch.histograms[0][0])[i] = 0;

    const Tokens<false> raw(p.logits + static_cast<int64_t>(row) * p.vocab, blockIdx.x, p.num_tokens);
    unsigned long long raw_best = 0;
    bool saw_nan = false;
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
        if (!raw.is_there(i)) continue;
        saw_nan |= isnan(raw.x[i]);
        raw_best = larger(raw_best, order_of(raw.x[i], raw.id(i)));
    }

    const int64_t num_outputs = p.num_outputs == nullptr ? 0 : __ldcg(p.num_outputs + row);
    const int64_t edits = static_cast<int64_t>(row) * p.max_edits;
    const auto is_edit = [&](int j) {
        return static_cast<uint32_t>(p.edit_ids[edits + j]) < static_cast<uint32_t>(p.num_tokens) &&
               num_outputs < p.edit_until[edits + j];
    };
    bool has_edit = false;
    if (p.edit_ids != nullptr)
        for (int j = threadIdx.x; j < p.max_edits; j += kThreads) has_edit |= is_edit(j);
    const int slot = slot_of(p, row);
    float repetition = 1.f, frequency = 0.f, presence = 0.f;
    if (slot >= 0 && p.penalties != nullptr) {
        repetition = p.penalties[3 * row];
        frequency = p.penalties[3 * row + 1];
        presence = p.penalties[3 * row + 2];
    }
    const bool has_penalties = repetition != 1.f || frequency != 0.f || presence != 0.f;
    const bool has_edits = __syncthreads_or(has_edit) || has_penalties;  // the same in all blocks of the row
    unsigned long long best = raw_best;
    bool edited_nan = false;
    if (has_edits) {
#pragma unroll
        for (int i = 0; i < 4 * kQuadsOfThread; i += 4)
            *reinterpret_cast<float4*>(slice + raw.id(i) - begin) =
                make_float4(raw.x[i], raw.x[i + 1], raw.x[i + 2], raw.x[i + 3]);
        __syncthreads();
        if (p.edit_ids != nullptr) {
            for (int j = threadIdx.x; j < p.max_edits; j += kThreads) {
                const int id = p.edit_ids[edits + j];
                if (id < begin || id >= begin + kSliceTokens || !is_edit(j)) continue;
                // An id may be edited more than once: the thread of its first edit does them all, in order.
                bool is_first = true;
                for (int other = 0; other < j && is_first; ++other)
                    is_first = p.edit_ids[edits + other] != id || !is_edit(other);
                if (!is_first) continue;
                float x = slice[id - begin];
                for (int other = j; other < p.max_edits; ++other)
                    if (p.edit_ids[edits + other] == id && is_edit(other)) x += p.edit_values[edits + other];
                slice[id - begin] = x;
            }
            __syncthreads();
        }
        best = 0;
        float* edited = edited_logits(p, row);
        const int32_t* counts = has_penalties ? p.counts + static_cast<int64_t>(slot) * p.vocab : nullptr;
#pragma unroll
        for (int i = 0; i < 4 * kQuadsOfThread; i += 4) {
            const int id = raw.id(i);
            if (!raw.is_there(i)) continue;
            float4 v = *reinterpret_cast<const float4*>(slice + id - begin);
            if (has_penalties) {
                const uint4 count = __ldcg(reinterpret_cast<const uint4*>(counts + id));
                v.x = penalised(v.x, count.x, repetition, frequency, presence);
                v.y = penalised(v.y, count.y, repetition, frequency, presence);
                v.z = penalised(v.z, count.z, repetition, frequency, presence);
                v.w = penalised(v.w, count.w, repetition, frequency, presence);
            }
            *reinterpret_cast<float4*>(edited + id) = v;
            const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!raw.is_there(i + k)) continue;
                edited_nan |= isnan(x[k]);
                best = larger(best, order_of(x[k], id + k));
            }
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) scratch.has_edits = has_edits;
    raw_best = warp_largest(raw_best);
    best = warp_largest(best);
    const uint32_t flags = (__any_sync(~0u, saw_nan) ? kRawNan : 0) | (__any_sync(~0u, edited_nan) ? kEditedNan : 0);
    if (threadIdx.x % 32 == 0) {
        RowCounters& mine = p.counters[row];
        atomicMax(&mine.raw_best, raw_best);
        atomicMax(&mine.best, best);
        if (flags) atomicOr(&mine.flags, flags);
    }
}

// ---------------------------------------------------------------- kernel: what log probabilities need

__global__ void __launch_bounds__(kThreads) logprob_kernel(const SampleParams p) {
    __shared__ unsigned long long tops[kWarpsOfBlock][kNumTop];
    __shared__ double sums[kWarpsOfBlock];
    const int row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wait_for_previous_grids();
    let_next_grid_start();
    const Tokens<false> raw(p.logits + static_cast<int64_t>(row) * p.vocab, blockIdx.x, p.num_tokens);
    const float largest = value_of_order(__ldcg(&p.counters[row].raw_best));
    Slice& slice = scratch_of(p, row).slices[blockIdx.x];
    double sum = 0;
    uint32_t keys[4 * kQuadsOfThread];
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
        keys[i] = raw.key(i);
        if (raw.is_there(i)) sum += static_cast<double>(expf(raw.x[i] - largest));
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) sums[warp] = sum;
    if (p.top_ids != nullptr) {
        unsigned long long last = ~0ull;
        for (int n = 0; n < kNumTop; ++n) {
            unsigned long long mine = 0;  // the largest below the last one found
#pragma unroll
            for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
                const unsigned long long order =
                    static_cast<unsigned long long>(keys[i]) << 32 | static_cast<uint32_t>(~raw.id(i));
                if (keys[i] != 0 && order < last) mine = larger(mine, order);
            }
            last = warp_largest(mine);
            if (lane == 0) tops[warp][n] = last;
        }
    }
    __syncthreads();
    if (warp != 0) return;
    if (p.top_ids != nullptr)
        merge_lists(tops[0], kWarpsOfBlock, [&](int i, unsigned long long order) {
            if (lane == 0) slice.top[i] = order;
        });
    if (lane == 0) {
        sum = sums[0];
        for (int w = 1; w < kWarpsOfBlock; ++w) sum += sums[w];
        slice.exp_sum = sum;
    }
}

}  // namespace

// ---------------------------------------------------------------- launcher

int32_t launch_sample_edit(const QwenRtCall& call, const Device& device, const SampleParams& p) {
    const int32_t status = launch(call, edit_kernel, device, grid_of(p), kThreads, 0, p);
    if (status != QWEN_RT_OK || !wants_logprobs(p)) return status;
    return launch(call, logprob_kernel, device, grid_of(p), kThreads, 0, p);
}

}  // namespace qwen_rt
