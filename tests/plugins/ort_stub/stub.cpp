// Stands in for the kernels: writes down what the binding passes and fills the outputs on the host with what can be checked.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "capi.h"
#include "ort/op_table.h"

namespace {

using namespace qwen_rt;

std::mutex mutex;
std::string log_text;
std::string failing_op, failure;
int32_t failing_status = QWEN_RT_OK;

int64_t bytes_of(int element_type) {
    switch (element_type) {
        case 1: return 4;
        case 6: return 4;
        case 7: return 8;
        case 16: return 2;
        default: return 1;
    }
}

// Bytes of a tensor; -1 if a symbol that is no dim has a part in its shape.
int64_t bytes_of(const OpSpec& op, const TensorSpec& tensor, const int64_t* dims) {
    int64_t bytes = bytes_of(tensor.element_type);
    for (int axis = 0; axis < tensor.rank; ++axis) {
        for (int i = 0; i < tensor.sizes[axis].num_terms; ++i)
            for (int j = 0; j < tensor.sizes[axis].terms[i].num_symbols; ++j)
                if (tensor.sizes[axis].terms[i].symbols[j] >= op.num_dims) return -1;
        bytes *= value_of(tensor.sizes[axis], dims);
    }
    return bytes;
}

template <class T>
void append(const char* name, const T* values, int count, const char* format) {
    char text[64];
    log_text += std::string(", \"") + name + "\": [";
    for (int i = 0; i < count; ++i) {
        snprintf(text, sizeof text, format, values[i]);
        log_text += (i > 0 ? ", " : "") + std::string(text);
    }
    log_text += "]";
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char* stub_log() { return log_text.c_str(); }

__attribute__((visibility("default"))) void stub_clear() {
    const std::lock_guard<std::mutex> guard(mutex);
    log_text.clear();
    failing_op.clear();
}

__attribute__((visibility("default"))) void stub_fail(const char* op, int32_t status, const char* message) {
    const std::lock_guard<std::mutex> guard(mutex);
    failing_op = op;
    failing_status = status;
    failure = message;
}

// Every output becomes full of one byte: the sum of all bytes of the inputs plus its number; in place, all bytes grow by 1.
int32_t qwen_rt_launch(const char* name, const QwenRtCall* call) {
    const std::lock_guard<std::mutex> guard(mutex);
    const OpSpec* op = nullptr;
    for (const OpSpec& spec : kOps)
        if (std::strcmp(spec.name, name) == 0) op = &spec;
    if (op == nullptr || call->num_tensors != op->num_inputs + op->num_outputs || call->num_dims != op->num_dims)
        return QWEN_RT_INVALID;
    if (failing_op == name) {
        snprintf(call->message, static_cast<size_t>(call->message_bytes), "%s", failure.c_str());
        return failing_status;
    }
    char text[256];
    snprintf(text, sizeof text, "{\"op\": \"%s\", \"abi\": %d, \"flags\": %lld, \"stream\": %llu", name, call->abi,
             static_cast<long long>(call->flags), static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(call->stream)));
    log_text += text;
    const uintptr_t workspace[] = {reinterpret_cast<uintptr_t>(call->workspace), static_cast<uintptr_t>(call->workspace_bytes)};
    append("workspace", workspace, 2, "%lu");
    append("dims", call->dims, call->num_dims, "%ld");
    append("attributes", call->attributes, call->num_attributes, "%.17g");
    append("tensors", reinterpret_cast<const uintptr_t*>(call->tensors), call->num_tensors, "%lu");
    log_text += "}\n";

    uint8_t sum = 0;
    for (int i = 0; i < op->num_inputs; ++i) {
        const uint8_t* data = static_cast<const uint8_t*>(call->tensors[i]);
        const int64_t bytes = data == nullptr ? 0 : bytes_of(*op, op->tensors[i], call->dims);
        for (int64_t j = 0; j < bytes; ++j) sum = static_cast<uint8_t>(sum + data[j]);
    }
    for (int i = 0; i < op->num_outputs; ++i) {
        const TensorSpec& tensor = op->tensors[op->num_inputs + i];
        uint8_t* data = static_cast<uint8_t*>(call->tensors[op->num_inputs + i]);
        const int64_t bytes = data == nullptr ? 0 : bytes_of(*op, tensor, call->dims);
        const bool in_place = tensor.alias >= 0 && call->tensors[tensor.alias] == data;
        for (int64_t j = 0; j < bytes; ++j) data[j] = static_cast<uint8_t>(in_place ? data[j] + 1 : sum + i);
    }
    return QWEN_RT_OK;
}

}  // extern "C"
