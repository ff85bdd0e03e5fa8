// The full path of `sample`: see sample.cu for tensors, numerics and tests.
//
// Mapping: a fixed sequence of kernels, block (slice, row); a slice is 4096 ids, 16 to a thread. Blocks of rows that do not
//   need a kernel leave it at once. What a kernel finds is read by the next one; nothing waits inside a grid.
//     edit     edits and penalties into the workspace (rows that have any); the largest logit before and after
//     logprob  sum of exponentials and the 20 largest of every slice, before edits; if log probabilities are wanted
//     select   3 for top_k, on counts, and 3 for top_p, on masses: histograms of 11, 11 and 10 bits of the keys, from the
//              top. Every block of the next kernel finds the bin in which the sum reaches what is wanted
//     mass     what is kept of every slice, and how many tokens are equal to the last one kept
//     choose   block row: the slice, then the token, at which the cumulative mass exceeds the random number; results
// Workspace: per row the edited logits f32[vocab], 6 histograms u64[2048], and per slice what `mass` and `logprob` find.
// Cost: per filter three more sweeps over the logits, from L2: the launches take as long as the sweeps of few rows.
#include "sample_rows.cuh"

namespace qwen_rt {

namespace {

using namespace sampling;

// ---------------------------------------------------------------- kernel: the token, and all results

// The first token in order of id at which the cumulative mass exceeds the random number. To be called by the whole block.
__device__ __forceinline__ int draw(const SampleParams& p, int row, int num_slices) {
    __shared__ int chosen_slice, chosen;
    __shared__ unsigned long long target_left;
    __shared__ uint32_t equals_left;
    const Scratch& scratch = scratch_of(p, row);
    const Softmax softmax = softmax_of(p, row);
    const double least = least_exponent(p, row);
    const uint32_t last_key = __ldcg(&scratch.selections[6].key), kept = __ldcg(&scratch.num_equals_kept);
    const float last_value = value_of(last_key);
    const bool has_equals = last_key != 0 && softmax.exponent(last_value) >= least;
    const uint64_t mass_of_equal = has_equals ? softmax.mass(last_value) : 0;

    const int slice = threadIdx.x;
    uint64_t mass = 0, num_equals = 0, total;
    if (slice < num_slices) {
        mass = __ldcg(reinterpret_cast<const unsigned long long*>(&scratch.slices[slice].mass));
        num_equals = __ldcg(&scratch.slices[slice].num_equals);
    }
    const uint64_t equals_before = sum_before(num_equals, &total);
    const uint64_t room = equals_before < kept ? kept - equals_before : 0;
    mass += (num_equals < room ? num_equals : room) * mass_of_equal;
    const uint64_t before = sum_before(mass, &total);
    const auto seed = static_cast<uint64_t>(p.seeds[row]), position = static_cast<uint64_t>(__ldcg(p.num_outputs + row));
    const uint64_t target = target_of(random_bits(seed, position), total);
    if (before <= target && target < before + mass) {
        chosen_slice = slice;
        target_left = target - before;
        equals_left = static_cast<uint32_t>(room);
    }
    __syncthreads();

    const Tokens<true> tokens(logits_of(p, row), chosen_slice, p.num_tokens);
    num_equals = 0;
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) num_equals += last_key != 0 && tokens.key(i) == last_key;
    uint64_t equal = sum_before(num_equals, &total);
    uint64_t masses[4 * kQuadsOfThread];
    mass = 0;
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
        const uint32_t key = tokens.key(i);
        const bool is_equal = last_key != 0 && key == last_key;
        const bool is_kept = key > last_key ? softmax.exponent(tokens.x[i]) >= least : is_equal && equal < equals_left;
        masses[i] = !is_kept ? 0 : is_equal ? mass_of_equal : softmax.mass(tokens.x[i]);
        equal += is_equal;
        mass += masses[i];
    }
    uint64_t through = sum_before(mass, &total);
    if (through <= target_left && target_left < through + mass) {
        bool is_found = false;
#pragma unroll
        for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
            through += masses[i];
            if (!is_found && through > target_left) {
                is_found = true;
                chosen = tokens.id(i);
            }
        }
    }
    __syncthreads();
    return chosen;
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const SampleParams p, int num_slices) {
    __shared__ unsigned long long tops[kMaxSlices][kNumTop];
    const int row = blockIdx.x;
    wait_for_previous_grids();
    let_next_grid_start();
    RowCounters& counters = p.counters[row];
    const Scratch& scratch = scratch_of(p, row);
    const bool bad = is_bad(counters);
    const int64_t step = p.step == nullptr ? 0 : __ldcg(p.step);
    int token = 0;
    if (!bad) token = is_random(p, row) ? draw(p, row, num_slices) : static_cast<int>(id_of_order(__ldcg(&counters.best)));

    const int64_t at = p.ring == 0 ? 0 : step % p.ring * p.rows + row;
    double log_sum = 0;
    if (wants_logprobs(p)) {
        for (int s = 0; s < num_slices; ++s) log_sum += __ldcg(&scratch.slices[s].exp_sum);
        log_sum = static_cast<double>(value_of_order(__ldcg(&counters.raw_best))) + log(log_sum);
    }
    if (p.top_ids != nullptr) {
        for (int i = threadIdx.x; i < num_slices * kNumTop; i += kThreads)
            tops[i / kNumTop][i % kNumTop] = __ldcg(&scratch.slices[i / kNumTop].top[i % kNumTop]);
        __syncthreads();
        if (threadIdx.x < 32) {
            merge_lists(tops[0], num_slices, [&](int i, unsigned long long order) {
                if (threadIdx.x != 0) return;
                const bool is_there = order != 0 && !bad;
                p.top_ids[at * kNumTop + i] = is_there ? static_cast<int32_t>(id_of_order(order)) : -1;
                p.top_logprobs[at * kNumTop + i] =
                    is_there ? static_cast<float>(static_cast<double>(value_of_order(order)) - log_sum) : NAN;
            });
        }
    }
    __syncthreads();  // all have read what is now reset
    if (threadIdx.x != 0) return;
    if (p.logprobs != nullptr) {
        const double logit = __ldcg(p.logits + static_cast<int64_t>(row) * p.vocab + token);
        p.logprobs[at] = bad ? NAN : static_cast<float>(logit - log_sum);
    }
    p.next_ids[row] = token;
    if (p.positions != nullptr)
        if (const int64_t position = __ldcg(p.positions + row); position >= 0) p.positions[row] = position + 1;
    if (p.num_outputs != nullptr) p.num_outputs[row] = __ldcg(p.num_outputs + row) + 1;
    if (const int slot = slot_of(p, row); slot >= 0 && !bad) {
        int32_t* count = p.counts + static_cast<int64_t>(slot) * p.vocab + token;
        *count = __ldcg(count) + 1;
    }
    if (p.history != nullptr) p.history[at] = bad ? kBadRow : token;
    counters.best = 0;
    counters.raw_best = 0;
    counters.flags = 0;
    __threadfence_system();
    if (p.step != nullptr) {
        uint32_t* rows_done = &p.counters[p.rows].blocks;
        if (add_in_order(rows_done, 1) != static_cast<uint32_t>(p.rows - 1)) return;
        *rows_done = 0;
        *p.step = step + 1;
    }
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t scratch_of_full_sample(int64_t rows, int64_t vocab) { return rows * (kScratchBytes + 4 * vocab); }

int32_t launch_full_sample(const QwenRtCall& call, const Device& device, const SampleParams& p) {
    int32_t status = launch_sample_edit(call, device, p);
    if (status == QWEN_RT_OK && p.temperature != nullptr) status = launch_sample_select(call, device, p);
    if (status != QWEN_RT_OK) return status;
    return launch(call, choose_kernel, device, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, p,
                  static_cast<int>(grid_of(p).x));
}

}  // namespace qwen_rt
