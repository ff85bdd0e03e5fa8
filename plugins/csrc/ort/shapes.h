// Works the symbolic dims of an op out from the shapes of its inputs, by the rule of PluginOp.dims_of in core/ops.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "op_table.h"

namespace qwen_rt {

// A shape that is lent; absent tensors have none.
struct Shape {
    bool present = false;
    size_t rank = 0;
    const int64_t* sizes = nullptr;
};

class Symbols {
public:
    explicit Symbols(const OpSpec& op) : op_(op) {}

    // Finds the symbols from the shapes of the inputs; false, and a line in `message`, if they contradict each other.
    bool solve(const Shape* inputs, char* message, size_t message_bytes) {
        for (int i = 0; i < op_.num_inputs; ++i) {
            const TensorSpec& tensor = op_.tensors[i];
            if (inputs[i].present && inputs[i].rank != static_cast<size_t>(tensor.rank))
                return refuse_rank(tensor, inputs[i], message, message_bytes);
        }
        // Sizes that are one symbol tell it whatever the others say; sums then tell what is left.
        for (const bool sums : {false, true})
            for (int i = 0; i < op_.num_inputs; ++i)
                for (int axis = 0; inputs[i].present && axis < op_.tensors[i].rank; ++axis) {
                    const Size& size = op_.tensors[i].sizes[axis];
                    if (is_symbol(size) != sums) learn(size, inputs[i].sizes[axis]);
                }
        for (int i = 0; i < op_.num_inputs; ++i)
            for (int axis = 0; inputs[i].present && axis < op_.tensors[i].rank; ++axis) {
                const Size& size = op_.tensors[i].sizes[axis];
                const int64_t found = inputs[i].sizes[axis];
                if (!knows(size) || value_of(size, values_) == found) continue;
                snprintf(message, message_bytes, "%s has %s = %lld; expected %lld", op_.tensors[i].name, size.text,
                         static_cast<long long>(found), static_cast<long long>(value_of(size, values_)));
                return false;
            }
        for (int i = 0; i < op_.num_symbols; ++i)
            if (values_[i] < 0) {
                snprintf(message, message_bytes, "the shapes give %s = %lld; expected 0 or more", op_.symbols[i],
                         static_cast<long long>(values_[i]));
                return false;
            }
        return true;
    }

    // Whether the inputs told all that the size is made of.
    bool knows(const Size& size) const {
        for (int i = 0; i < size.num_terms; ++i)
            for (int j = 0; j < size.terms[i].num_symbols; ++j)
                if (!known_[size.terms[i].symbols[j]]) return false;
        return true;
    }

    // One value per symbol, 0 where only absent tensors would tell; the dims are the first of them.
    const int64_t* values() const { return values_; }

private:
    static bool is_plain(const Term& term) { return term.factor == 1 && term.num_symbols == 1; }
    static bool is_symbol(const Size& size) { return size.constant == 0 && size.num_terms == 1 && is_plain(size.terms[0]); }

    void learn(const Size& size, int64_t value) {
        int unknown = -1;
        for (int i = 0; i < size.num_terms; ++i) {
            const Term& term = size.terms[i];
            for (int j = 0; j < term.num_symbols; ++j) {
                if (known_[term.symbols[j]]) continue;
                if (!is_plain(term) || unknown >= 0) return;
                unknown = term.symbols[j];
            }
        }
        if (unknown < 0) return;
        values_[unknown] = value - value_of(size, values_);  // it is still 0 itself
        known_[unknown] = true;
    }

    bool refuse_rank(const TensorSpec& tensor, const Shape& shape, char* message, size_t message_bytes) const {
        int used = snprintf(message, message_bytes, "%s has %zu axes; expected [", tensor.name, shape.rank);
        for (int axis = 0; axis < tensor.rank && used >= 0 && static_cast<size_t>(used) < message_bytes; ++axis)
            used += snprintf(message + used, message_bytes - static_cast<size_t>(used), "%s%s", tensor.sizes[axis].text,
                             axis + 1 < tensor.rank ? ", " : "]");
        return false;
    }

    const OpSpec& op_;
    int64_t values_[kMaxSymbols] = {};
    bool known_[kMaxSymbols] = {};
};

}  // namespace qwen_rt
