// The filters of the full path of `sample`: top_k and top_p, and the mass that they and min_p leave. See sample_full.cu.
#include "sample_rows.cuh"

namespace qwen_rt {

namespace {

using namespace sampling;

// ---------------------------------------------------------------- helpers

struct Bin {
    uint32_t index;
    uint64_t wanted;  // what is left to be reached within it
};

// The bin in which the sum from the top bin down reaches what `wanted_of` makes of the sum of all (1 to that sum).
template <class WantedOf>
__device__ __forceinline__ Bin find_bin(const unsigned long long* histogram, WantedOf wanted_of) {
    __shared__ Bin found;
    constexpr int kBinsOfThread = kBins / kThreads;
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsOfThread;  // this thread's highest
    unsigned long long bins[kBinsOfThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; i += 2) {
        const ulonglong2 pair = __ldcg(reinterpret_cast<const ulonglong2*>(histogram + top - i - 1));
        bins[i] = pair.y;
        bins[i + 1] = pair.x;
        sum += pair.x + pair.y;
    }
    uint64_t total;
    uint64_t above = sum_before(sum, &total);
    const uint64_t wanted = wanted_of(total);
    if (above < wanted && wanted <= above + sum) {
        for (int i = 0; i < kBinsOfThread; ++i) {
            if (wanted <= above + bins[i]) {
                found = {static_cast<uint32_t>(top - i), wanted - above};
                break;
            }
            above += bins[i];
        }
    }
    __syncthreads();
    return found;
}

// ---------------------------------------------------------------- kernels: top_k and top_p

// Where the bits of a round lie in a key.
__host__ __device__ constexpr int shift_of(int round) { return round == 0 ? 21 : round == 1 ? 10 : 0; }
__host__ __device__ constexpr uint32_t bins_of(int round) { return round == 2 ? 1024 : 2048; }

// What the selection before found out, carried on: the start of kernel `index` of the six, or (6) of what comes after.
// `index` 3 starts top_p with the key of the k-th token.
__device__ __forceinline__ Selection continue_selection(const SampleParams& p, int row, int index) {
    const Scratch& scratch = scratch_of(p, row);
    const Selection before = {__ldcg(&scratch.selections[index - 1].key),
                              __ldcg(reinterpret_cast<const unsigned long long*>(&scratch.selections[index - 1].wanted))};
    const bool is_first_of_top_p = index - 1 == 3;
    const Bin bin = find_bin(scratch.histograms[index - 1], [&](uint64_t total) {
        return is_first_of_top_p ? wanted_mass(p.top_p[row], total) : before.wanted;
    });
    const uint32_t upper = is_first_of_top_p ? 0 : before.key;
    return {upper | bin.index << shift_of((index - 1) % 3), bin.wanted};
}

// kIndex: 0 to 2 for top_k, 3 to 5 for top_p.
template <int kIndex>
__global__ void __launch_bounds__(kThreads) select_kernel(const SampleParams p) {
    constexpr bool kMass = kIndex >= 3;
    constexpr int kRound = kIndex % 3, kShift = shift_of(kRound);
    // A mass has up to 46 bits; 4096 of its thirds of 15 and 16 bits sum to less than 2^32, for which shared memory has
    // atomic additions.
    constexpr int kParts = kMass ? 3 : 1;
    __shared__ uint32_t bins[kParts][kBins];
    const int row = blockIdx.y;
    wait_for_previous_grids();
    let_next_grid_start();
    if (!is_random(p, row) || is_bad(p.counters[row]) || !(kMass ? has_top_p(p, row) : has_top_k(p, row))) return;
    Scratch& scratch = scratch_of(p, row);
    const Tokens<false> tokens(logits_of(p, row), blockIdx.x, p.num_tokens);
    for (int i = threadIdx.x; i < kParts * kBins; i += kThreads) bins[i / kBins][i % kBins] = 0;

    Selection start = {0, 0};
    if (kRound != 0 || (kMass && has_top_k(p, row)))
        start = continue_selection(p, row, kIndex);
    else if (!kMass)
        start.wanted = static_cast<uint64_t>(p.top_k[row]);
    if (blockIdx.x == 0 && threadIdx.x == 0) scratch.selections[kIndex] = start;
    __syncthreads();

    // Round 0 of top_p: keys from that of the k-th token on; later: keys that share the bits found so far.
    const uint32_t least = kRound != 0 || start.key == 0 ? 1 : start.key;  // 0 is no token
    Softmax softmax = {};
    if constexpr (kMass) softmax = softmax_of(p, row);
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
        const uint32_t key = tokens.key(i);
        if (key < least) continue;
        if constexpr (kRound != 0) {
            constexpr int kFound = shift_of(kRound - 1);
            if (key >> kFound != start.key >> kFound) continue;
        }
        const uint32_t bin = key >> kShift & (bins_of(kRound) - 1);
        if constexpr (kMass) {
            const uint64_t mass = softmax.mass(tokens.x[i]);
            const uint32_t parts[3] = {static_cast<uint32_t>(mass & 0x7fff), static_cast<uint32_t>(mass >> 15 & 0x7fff),
                                       static_cast<uint32_t>(mass >> 30)};
#pragma unroll
            for (int part = 0; part < 3; ++part)
                if (parts[part] != 0) atomicAdd(&bins[part][bin], parts[part]);
        } else {
            atomicAdd(&bins[0][bin], 1u);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < static_cast<int>(bins_of(kRound)); i += kThreads) {
        unsigned long long sum = bins[0][i];
        if constexpr (kMass)
            sum += (static_cast<unsigned long long>(bins[1][i]) << 15) + (static_cast<unsigned long long>(bins[2][i]) << 30);
        if (sum != 0) atomicAdd(&scratch.histograms[kIndex][i], sum);
    }
}

// ---------------------------------------------------------------- kernel: the mass that is left

__global__ void __launch_bounds__(kThreads) mass_kernel(const SampleParams p) {
    const int row = blockIdx.y;
    wait_for_previous_grids();
    let_next_grid_start();
    if (!is_random(p, row) || is_bad(p.counters[row])) return;
    Scratch& scratch = scratch_of(p, row);
    const Tokens<false> tokens(logits_of(p, row), blockIdx.x, p.num_tokens);
    const Softmax softmax = softmax_of(p, row);
    const double least = least_exponent(p, row);

    uint32_t last_key = 0, num_equals_kept = kAllEquals;
    if (has_top_p(p, row)) {
        const Selection found = continue_selection(p, row, 6);
        const uint64_t each = softmax.mass(value_of(found.key));
        last_key = found.key;
        // `each` is not 0: found.wanted, at least 1, is within the sum of tokens of this mass.
        num_equals_kept = static_cast<uint32_t>((found.wanted + each - 1) / each);
    } else if (has_top_k(p, row)) {
        last_key = continue_selection(p, row, 3).key;
    }
    uint64_t mass = 0;
    uint32_t num_equals = 0;
#pragma unroll
    for (int i = 0; i < 4 * kQuadsOfThread; ++i) {
        const uint32_t key = tokens.key(i);
        if (key != 0 && key == last_key) ++num_equals;
        if (key > last_key && softmax.exponent(tokens.x[i]) >= least) mass += softmax.mass(tokens.x[i]);
    }
    uint64_t all_mass, all_equals;
    sum_before(mass, &all_mass);
    sum_before(num_equals, &all_equals);
    if (threadIdx.x != 0) return;
    scratch.slices[blockIdx.x].mass = all_mass;
    scratch.slices[blockIdx.x].num_equals = static_cast<uint32_t>(all_equals);
    if (blockIdx.x == 0) {
        scratch.selections[6].key = last_key;
        scratch.num_equals_kept = num_equals_kept;
    }
}

}  // namespace

// ---------------------------------------------------------------- launcher

int32_t launch_sample_select(const QwenRtCall& call, const Device& device, const SampleParams& p) {
    int32_t status = QWEN_RT_OK;
    const auto next = [&](bool is_needed, void (*kernel)(SampleParams)) {
        if (is_needed && status == QWEN_RT_OK) status = launch(call, kernel, device, grid_of(p), kThreads, 0, p);
    };
    next(p.top_k != nullptr, select_kernel<0>);
    next(p.top_k != nullptr, select_kernel<1>);
    next(p.top_k != nullptr, select_kernel<2>);
    next(p.top_p != nullptr, select_kernel<3>);
    next(p.top_p != nullptr, select_kernel<4>);
    next(p.top_p != nullptr, select_kernel<5>);
    next(true, mass_kernel);
    return status;
}

}  // namespace qwen_rt
