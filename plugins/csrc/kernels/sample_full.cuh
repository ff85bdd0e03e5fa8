// Shared by the greedy and the full path of `sample`: what a call is made of, and its arithmetic. The functions marked
// for the host too are plain integer and float64 arithmetic, so that they can be run and checked without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/launch.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- the call

constexpr int kNumTop = 20;
constexpr int64_t kBadRow = -2;            // in history: nothing can be chosen from these logits
constexpr float kGreedyTemperature = 1e-5f;

// Of a row, in the counters of the workspace: zero before and after every call.
struct alignas(64) RowCounters {
    unsigned long long best;      // order_of() the chosen logits' largest
    unsigned long long raw_best;  // of the logits before edits
    uint32_t blocks;              // those that are done; times kNanBlock: those that saw a NaN
    uint32_t flags;
};
constexpr uint32_t kNanBlock = 1u << 16;
static_assert((kMaxRows + 1) * sizeof(RowCounters) <= QWEN_RT_COUNTER_BYTES);

struct SampleParams {
    const float* logits;         // [rows, vocab]
    int64_t* positions;          // [rows], or null; so are all below, in the shapes of core/ops.py
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seeds;
    int64_t* num_outputs;
    const float* penalties;      // [rows, 3]: repetition, frequency, presence
    const int32_t* count_slots;
    int32_t* counts;             // [slots, vocab]
    const int32_t* edit_ids;     // [rows, max_edits]
    const float* edit_values;
    const int32_t* edit_until;
    int64_t* step;
    int64_t* next_ids;           // never null
    int64_t* history;            // [ring, rows]
    float* logprobs;
    int32_t* top_ids;            // [ring, rows, 20]
    float* top_logprobs;
    RowCounters* counters;       // [rows + 1]; the last counts rows
    char* scratch;
    int rows, vocab, num_tokens, slots, max_edits, ring;
};

int64_t scratch_of_full_sample(int64_t rows, int64_t vocab);
int32_t launch_sample_edit(const QwenRtCall& call, const Device& device, const SampleParams& p);
int32_t launch_sample_select(const QwenRtCall& call, const Device& device, const SampleParams& p);
int32_t launch_full_sample(const QwenRtCall& call, const Device& device, const SampleParams& p);

// ---------------------------------------------------------------- arithmetic

template <class To, class From>
__host__ __device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// A float's place in the order of floats: larger floats have larger keys, -0 that of +0; NaN has 0, below -inf.
__host__ __device__ __forceinline__ uint32_t key_of(float value) {
    if (value != value) return 0;
    const uint32_t bits = bits_as<uint32_t>(value == 0.f ? 0.f : value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__host__ __device__ __forceinline__ float value_of(uint32_t key) {
    return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Larger value first, lower id among equals: one order on 64 bits, so that any way of combining gives the same token.
__host__ __device__ __forceinline__ unsigned long long order_of(float value, uint32_t id) {
    const uint32_t key = key_of(value);
    return key == 0 ? 0 : static_cast<unsigned long long>(key) << 32 | static_cast<uint32_t>(~id);
}

__host__ __device__ __forceinline__ float value_of_order(unsigned long long order) {
    return value_of(static_cast<uint32_t>(order >> 32));
}
__host__ __device__ __forceinline__ uint32_t id_of_order(unsigned long long order) {
    return ~static_cast<uint32_t>(order);
}
// Whether a row with this largest logit has a token to choose: it is a number, and neither infinity.
__host__ __device__ __forceinline__ bool can_choose(unsigned long long best) {
    const float value = value_of_order(best);
    return best != 0 && value - value == 0.f;
}

__host__ __device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// 53 random bits: the upper ones of the first word that numpy's Philox(key=seed, counter=position) gives. numpy raises
// the 256-bit counter before it draws. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
__host__ __device__ __forceinline__ uint64_t random_bits(uint64_t seed, uint64_t position) {
    uint64_t c0 = position + 1, c1 = c0 == 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t high0 = multiply_high(0xD2E7470EE14C6C93u, c0), low0 = 0xD2E7470EE14C6C93u * c0;
        const uint64_t high1 = multiply_high(0xCA5A826395121157u, c2), low1 = 0xCA5A826395121157u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    return c0 >> 11;
}

// floor(bits / 2^53 · total): below total, so that some token's cumulative mass exceeds it.
__host__ __device__ __forceinline__ uint64_t target_of(uint64_t bits, uint64_t total) {
    return multiply_high(bits, total) << 11 | bits * total >> 53;
}

// Sums and products that round just so in every kernel: the compiler may not fuse them as it likes.
__host__ __device__ __forceinline__ double multiply_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return __fma_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}
__host__ __device__ __forceinline__ double multiply(double a, double b) {
#ifdef __CUDA_ARCH__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

constexpr int kMassBits = 45;
constexpr uint64_t kOneMass = uint64_t{1} << kMassBits;
constexpr int kMaxSampleVocab = 1 << 18;  // as many masses of one each still sum to less than 2^64

// The unnormalised probability exp((x - best) / temperature), and what filters need of it, of one row.
struct Softmax {
    double best, scale;  // scale: log2(e) / temperature

    // (x - best) / temperature / ln 2
    __host__ __device__ __forceinline__ double exponent(float x) const {
        return multiply(static_cast<double>(x) - best, scale);
    }

    // round(2^45 · exp(...)) for x <= best. Integers add up to the same sum in every order. What rounding takes from
    // each of n tokens, up to 2^-46 of the most probable one's mass, comes to less than 2^-46 · n of the whole.
    __host__ __device__ __forceinline__ uint64_t mass(float x) const {
        const double t = exponent(x);
        if (!(t > -(kMassBits + 1))) return 0;
        constexpr double kRound = 6755399441055744.0;  // 1.5 · 2^52: the sum's last bits are the nearest integer
        const double shifted = t + kRound;
        const double f = t - (shifted - kRound);  // within ±0.5
        // 2^f: terms (ln 2)^i / i!, the first that is left out is below 2e-14.
        double p = 4.4455382718708115e-10;
        p = multiply_add(p, f, 7.0549116208011233e-09);
        p = multiply_add(p, f, 1.0178086009239700e-07);
        p = multiply_add(p, f, 1.3215486790144309e-06);
        p = multiply_add(p, f, 1.5252733804059841e-05);
        p = multiply_add(p, f, 1.5403530393381610e-04);
        p = multiply_add(p, f, 1.3333558146428443e-03);
        p = multiply_add(p, f, 9.6181291076284772e-03);
        p = multiply_add(p, f, 5.5504108664821580e-02);
        p = multiply_add(p, f, 2.4022650695910071e-01);
        p = multiply_add(p, f, 6.9314718055994531e-01);
        p = multiply_add(p, f, 1.0);
        const int n = static_cast<int>(static_cast<uint32_t>(bits_as<uint64_t>(shifted)));
        const double scaled = p * bits_as<double>(static_cast<uint64_t>(1023 + kMassBits + n) << 52);
        constexpr double kInteger = 4503599627370496.0;  // 2^52: the sum's mantissa is the integer
        return bits_as<uint64_t>(scaled + kInteger) - bits_as<uint64_t>(kInteger);
    }
};

// The least integer that is not below top_p · total, 1 to total.
__host__ __device__ __forceinline__ uint64_t wanted_mass(float top_p, uint64_t total) {
    const double wanted = static_cast<double>(top_p) * static_cast<double>(total);
    if (!(wanted > 1)) return 1;
    const uint64_t whole = static_cast<uint64_t>(wanted), above = whole + (static_cast<double>(whole) < wanted);
    return above < total ? above : total;
}

// One logit after repetition, frequency and presence penalty; every step rounds to f32. `count`: bit 31 says that the
// token is in the prompt, the others how often it is in the output.
__host__ __device__ __forceinline__ float penalised(float x, uint32_t count, float repetition, float frequency,
                                                    float presence) {
    if (count == 0) return x;
    const uint32_t in_output = count & 0x7fffffffu;
#ifdef __CUDA_ARCH__
    x = x > 0.f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
    x = __fsub_rn(x, __fmul_rn(frequency, static_cast<float>(in_output)));
    return in_output == 0 ? x : __fsub_rn(x, presence);
#else
    x = x > 0.f ? x / repetition : x * repetition;
    const float frequent = frequency * static_cast<float>(in_output);
    x = x - frequent;
    return in_output == 0 ? x : x - presence;
#endif
}

}  // namespace qwen_rt
