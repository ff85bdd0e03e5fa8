// The op table of core/ops.py as constants. op_table.inc is written by plugins/build.py before the library is compiled.
#pragma once

#include <cstdint>

namespace qwen_rt {

constexpr int kMaxTensors = 32;
constexpr int kMaxSymbols = 12;
constexpr int kMaxAttributes = 4;
constexpr int kMaxRank = 4;
constexpr int kCacheType = -1;  // in the place of an element type: one of QWEN_RT_CACHE_TYPES, the same for a whole node

// factor * product of symbols, which are numbers into OpSpec::symbols.
struct Term {
    int64_t factor;
    int num_symbols;
    int symbols[2];
};

// constant + sum of terms.
struct Size {
    const char* text;
    int64_t constant;
    int num_terms;
    Term terms[2];
};

struct TensorSpec {
    const char* name;
    int element_type;  // TensorProto.DataType; 0: several; or kCacheType
    bool optional;
    int alias;       // of an output: number of the input whose memory it shares; -1 for none
    bool may_alias;  // whether that is allowed rather than required
    int rank;
    Size sizes[kMaxRank];
};

struct AttributeSpec {
    const char* name;
    bool required;
    double value;  // unless given
};

struct OpSpec {
    const char* name;
    int num_dims;  // the first of the symbols are the dims, in the order that a launcher takes them
    int num_symbols;
    const char* symbols[kMaxSymbols];
    int num_inputs;
    int num_outputs;
    TensorSpec tensors[kMaxTensors];  // inputs, then outputs
    int num_attributes;
    AttributeSpec attributes[kMaxAttributes];
    bool has_workspace;
};

#include "op_table.inc"

constexpr int kNumOps = sizeof(kOps) / sizeof(kOps[0]);

inline int64_t value_of(const Term& term, const int64_t* symbols) {
    int64_t value = term.factor;
    for (int i = 0; i < term.num_symbols; ++i) value *= symbols[term.symbols[i]];
    return value;
}

inline int64_t value_of(const Size& size, const int64_t* symbols) {
    int64_t value = size.constant;
    for (int i = 0; i < size.num_terms; ++i) value += value_of(size.terms[i], symbols);
    return value;
}

}  // namespace qwen_rt
