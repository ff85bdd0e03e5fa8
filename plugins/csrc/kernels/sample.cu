// Chooses the next token of each row: next_ids[n] = argmax(logits[n]), or drawn from softmax(logits[n] / temperature[n])
//
// Tensors (in the order and the shapes of core/ops.py; NULL: absent):
//   logits        in; only ids below num_tokens are looked at
//   positions     in and out: each that is >= 0 grows by one, ready for the next step
//   temperature   below 1e-5: greedy. Absent: all rows are
//   top_k, top_p, min_p   off for a row: 0, 1, 0 (top_k also at num_tokens and above)
//   seeds, num_outputs    the random number is that of numpy's Philox(key=seed, counter=num_outputs). seeds: 64 bits
//                 without sign. num_outputs in and out: grows by one
//   penalties     repetition, frequency, presence: off at 1, 0, 0
//   count_slots, counts   row of counts of a row, or -1. counts in and out: bit 31: the token is in the prompt; the others:
//                 how often it is in the output; that of the chosen token grows by one. No two rows may share a slot
//   edit_ids, edit_values, edit_until   logits[id] += value while num_outputs < until, in order; ids -1 are unused
//   step          in and out: grows by one; this call's results are at step % ring of what follows
//   next_ids      out
//   history       out: the chosen id, or -2 if there is none: a logit is NaN or +inf, before or after edits, or none is
//                 above -inf. next_ids then holds some id of the vocabulary, and counts are as before
//   logprobs      out: log_softmax of logits, before edits, at the chosen id; NaN where history is -2
//   top_ids, top_logprobs   out: those of the 20 largest logits before edits, larger first, lower id first among equals;
//                 -1 and NaN where history is -2 or there are no 20 tokens
//   next_*        what they alias, or NULL. history and what follows may lie in mapped host memory
// Dims: rows, vocab, slots, max_edits, ring (0: no tensor has it). Attribute: num_tokens (0: vocab).
//
// Numerics: greedy, counts and penalties bit for bit as runtime/sampler.py. Probabilities are integers in units of 2^-45 of
//   the largest, so that sums do not depend on order, blocks or batch mates: every run gives the same token, which is that of
//   runtime/sampler.py unless the random number or a filter's bound is within 2^-46 · vocab of a step of the cumulative
//   probability. logprobs: f32 exp, f64 sum in a fixed order.
// Mapping: greedy: one kernel, every thread with all its 16-byte loads in flight at once; a block's thread 0 raises the row's
//   maximum in memory and counts the block, and that of the last one writes the results. Full: sample_full.cu.
// Workspace: RowCounters in the counters; scratch for the full path.
// Preconditions (the launcher checks): rows at most 64, vocab a multiple of 4 and at most 2^18, workspace given,
//   tensors that belong together given together.
// Cost: greedy: 4 · rows · vocab bytes, mostly from L2 after lm_head; bound by latency: one load, one reduction in the
//   block, two atomic operations and a load behind each other.
// Reference: plugins/reference_sample.py; tests: tests/plugins/test_sample_gpu.py, test_kernels_gpu.py; bench:
//   benchmarks/bench_kernels.py.
// Source: runtime/sampler.py.
#include "../common/ops.cuh"
#include "sample_rows.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- kernel

using namespace sampling;

constexpr int kGreedyThreads = 256;

// Block (slice, row). kQuads: 16-byte loads of a thread.
template <int kQuads>
__global__ void __launch_bounds__(kGreedyThreads) greedy_kernel(const SampleParams p) {
    __shared__ unsigned long long of_warp[kGreedyThreads / 32];
    const int row = blockIdx.y;
    const float4* from = reinterpret_cast<const float4*>(p.logits + static_cast<int64_t>(row) * p.vocab);
    const int first = static_cast<int>(blockIdx.x * kGreedyThreads * kQuads + threadIdx.x);
    wait_for_previous_grids();
    let_next_grid_start();
    float4 v[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
        if (4 * (first + i * kGreedyThreads) < p.num_tokens) v[i] = __ldcg(from + first + i * kGreedyThreads);
    // Read here by all blocks, so that the last one need not wait for them at its end.
    int64_t step = 0, position = -1, num_outputs = 0;
    if (threadIdx.x == 0) {
        if (p.step != nullptr) step = __ldcg(p.step);
        if (p.positions != nullptr) position = __ldcg(p.positions + row);
        if (p.num_outputs != nullptr) num_outputs = __ldcg(p.num_outputs + row);
    }
    unsigned long long best = 0;
    bool saw_nan = false;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const int id = 4 * (first + i * kGreedyThreads);
        const float x[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (id + j >= p.num_tokens) continue;
            saw_nan |= isnan(x[j]);
            best = larger(best, order_of(x[j], id + j));
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) best = larger(best, __shfl_xor_sync(~0u, best, distance));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
    saw_nan = __syncthreads_or(saw_nan);
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int w = 1; w < kGreedyThreads / 32; ++w) best = larger(best, of_warp[w]);

    RowCounters& mine = p.counters[row];
    atomicMax(&mine.best, best);
    const uint32_t before = add_in_order(&mine.blocks, 1 + (saw_nan ? kNanBlock : 0));
    if (before % kNanBlock != gridDim.x - 1) return;
    best = __ldcg(&mine.best);
    mine.best = 0;
    mine.blocks = 0;
    p.next_ids[row] = best == 0 ? 0 : id_of_order(best);
    if (position >= 0) p.positions[row] = position + 1;
    if (p.num_outputs != nullptr) p.num_outputs[row] = num_outputs + 1;
    if (p.history != nullptr) {
        const bool is_bad = saw_nan || before >= kNanBlock || !can_choose(best);
        p.history[step % p.ring * p.rows + row] = is_bad ? kBadRow : id_of_order(best);
        __threadfence_system();
    }
    if (p.step != nullptr) {
        uint32_t* rows_done = &p.counters[p.rows].blocks;
        if (p.rows > 1 && add_in_order(rows_done, 1) != static_cast<uint32_t>(p.rows - 1)) return;
        *rows_done = 0;
        *p.step = step + 1;
    }
}

// ---------------------------------------------------------------- launcher

namespace {

// Places in core/ops.py.
enum Tensor {
    kLogits, kPositions, kTemperature, kTopK, kTopP, kMinP, kSeeds, kNumOutputs, kPenalties, kCountSlots, kCounts, kEditIds,
    kEditValues, kEditUntil, kStep, kNextIds, kNextPositions, kNextNumOutputs, kNextCounts, kNextStep, kHistory, kLogprobs,
    kTopIds, kTopLogprobs, kNumTensors
};
constexpr const char* kNames[kNumTensors] = {
    "logits", "positions", "temperature", "top_k", "top_p", "min_p", "seeds", "num_outputs", "penalties", "count_slots",
    "counts", "edit_ids", "edit_values", "edit_until", "step", "next_ids", "next_positions", "next_num_outputs",
    "next_counts", "next_step", "history", "logprobs", "top_ids", "top_logprobs"};

struct Pair {
    Tensor tensor, other;
};
constexpr Pair kAliases[] = {{kNextPositions, kPositions}, {kNextNumOutputs, kNumOutputs}, {kNextCounts, kCounts},
                             {kNextStep, kStep}};
// The first is of no use without the second.
constexpr Pair kNeeds[] = {
    {kTemperature, kSeeds}, {kTemperature, kNumOutputs}, {kTopK, kTemperature}, {kTopP, kTemperature}, {kMinP, kTemperature},
    {kPenalties, kCounts}, {kCounts, kCountSlots}, {kCountSlots, kCounts}, {kEditIds, kEditValues}, {kEditIds, kEditUntil},
    {kEditIds, kNumOutputs}, {kHistory, kStep}, {kLogprobs, kStep}, {kTopIds, kStep}, {kTopIds, kTopLogprobs},
    {kTopLogprobs, kTopIds}};

int32_t check_sample(const QwenRtCall& call) {
    constexpr unsigned kWide = 1u << kLogits | 1u << kCounts;  // read 16 bytes at a time
    if (const int32_t status = check_tensors(call, set_of(kLogits), kNumTensors, 5, 1, ~kWide, 3)) return status;
    if (call.tensors[kNextIds] == nullptr)
        return refuse(call, QWEN_RT_INVALID, "next_ids is NULL; expected a device pointer");
    for (const Pair& pair : kAliases)
        if (call.tensors[pair.tensor] != nullptr && call.tensors[pair.tensor] != call.tensors[pair.other])
            return refuse(call, QWEN_RT_INVALID, "%s is another buffer; expected %s itself", kNames[pair.tensor],
                          kNames[pair.other]);
    for (const Pair& pair : kNeeds)
        if (call.tensors[pair.tensor] != nullptr && call.tensors[pair.other] == nullptr)
            return refuse(call, QWEN_RT_INVALID, "%s is NULL; expected a device pointer beside %s", kNames[pair.other],
                          kNames[pair.tensor]);
    constexpr struct {
        Tensor tensor;
        int dim;
        const char* name;
    } kSized[] = {{kCounts, 2, "slots"}, {kEditIds, 3, "max_edits"}, {kHistory, 4, "ring"}, {kLogprobs, 4, "ring"},
                  {kTopIds, 4, "ring"}};
    for (const auto& sized : kSized)
        if (call.tensors[sized.tensor] != nullptr && call.dims[sized.dim] < 1)
            return refuse(call, QWEN_RT_INVALID, "%s=0; expected 1 or more beside %s", sized.name, kNames[sized.tensor]);
    const long long rows = call.dims[0], vocab = call.dims[1];
    if (rows > kMaxRows) return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%lld; expected 1 to %d", rows, kMaxRows);
    if (vocab % 4 != 0 || vocab > kMaxSampleVocab)
        return refuse(call, QWEN_RT_UNSUPPORTED, "vocab=%lld; expected a multiple of 4, at most %d", vocab, kMaxSampleVocab);
    if (!(call.attributes[0] >= 0 && call.attributes[0] <= static_cast<double>(vocab)))
        return refuse(call, QWEN_RT_INVALID, "num_tokens=%g; expected 0 to vocab=%lld", call.attributes[0], vocab);
    return QWEN_RT_OK;
}

}  // namespace

int64_t workspace_sample(const int64_t* dims, int32_t) {
    return QWEN_RT_COUNTER_BYTES + scratch_of_full_sample(dims[0], dims[1]);
}

int32_t launch_sample(const QwenRtCall& call) {
    if (const int32_t status = check_sample(call)) return status;
    void* const* t = call.tensors;
    const bool is_greedy = t[kTemperature] == nullptr && t[kPenalties] == nullptr && t[kCounts] == nullptr &&
                           t[kEditIds] == nullptr && t[kLogprobs] == nullptr && t[kTopIds] == nullptr;
    const int64_t needed = is_greedy ? QWEN_RT_COUNTER_BYTES : workspace_sample(call.dims, call.num_dims);
    if (call.workspace == nullptr || call.workspace_bytes < needed || !is_aligned(call.workspace))
        return refuse(call, QWEN_RT_INVALID, "workspace of %lld bytes at %p; expected %lld at an address divisible by 16",
                      static_cast<long long>(call.workspace_bytes), call.workspace, static_cast<long long>(needed));
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));

    SampleParams p;
    p.logits = static_cast<const float*>(t[kLogits]);
    p.positions = static_cast<int64_t*>(t[kPositions]);
    p.temperature = static_cast<const float*>(t[kTemperature]);
    p.top_k = static_cast<const int32_t*>(t[kTopK]);
    p.top_p = static_cast<const float*>(t[kTopP]);
    p.min_p = static_cast<const float*>(t[kMinP]);
    p.seeds = static_cast<const int64_t*>(t[kSeeds]);
    p.num_outputs = static_cast<int64_t*>(t[kNumOutputs]);
    p.penalties = static_cast<const float*>(t[kPenalties]);
    p.count_slots = static_cast<const int32_t*>(t[kCountSlots]);
    p.counts = static_cast<int32_t*>(t[kCounts]);
    p.edit_ids = static_cast<const int32_t*>(t[kEditIds]);
    p.edit_values = static_cast<const float*>(t[kEditValues]);
    p.edit_until = static_cast<const int32_t*>(t[kEditUntil]);
    p.step = static_cast<int64_t*>(t[kStep]);
    p.next_ids = static_cast<int64_t*>(t[kNextIds]);
    p.history = static_cast<int64_t*>(t[kHistory]);
    p.logprobs = static_cast<float*>(t[kLogprobs]);
    p.top_ids = static_cast<int32_t*>(t[kTopIds]);
    p.top_logprobs = static_cast<float*>(t[kTopLogprobs]);
    p.counters = static_cast<RowCounters*>(call.workspace);
    p.scratch = static_cast<char*>(call.workspace) + QWEN_RT_COUNTER_BYTES;
    p.rows = static_cast<int>(call.dims[0]);
    p.vocab = static_cast<int>(call.dims[1]);
    p.num_tokens = call.attributes[0] > 0 ? static_cast<int>(call.attributes[0]) : p.vocab;
    p.slots = static_cast<int>(call.dims[2]);
    p.max_edits = static_cast<int>(call.dims[3]);
    p.ring = static_cast<int>(call.dims[4]);
    if (!is_greedy) return launch_full_sample(call, device, p);

    // Few rows: many blocks of two loads a thread, all SMs at work. Many rows: fewer blocks, and fewer atomic operations.
    const int quads = p.rows <= 4 ? 2 : p.rows <= 16 ? 4 : 8;
    const int tokens = 4 * kGreedyThreads * quads;
    const dim3 grid(static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens), static_cast<unsigned>(p.rows));
    auto* kernel = quads == 2 ? greedy_kernel<2> : quads == 4 ? greedy_kernel<4> : greedy_kernel<8>;
    return launch(call, kernel, device, grid, kGreedyThreads, 0, p);
}

}  // namespace qwen_rt
