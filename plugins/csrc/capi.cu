// The C entry points: one table over the ops, nothing op by op. See capi.h.
#include "capi.h"

#include <cstring>

#include "common/launch.cuh"
#include "common/ops.cuh"

#ifndef QWEN_RT_BUILD_INFO
#define QWEN_RT_BUILD_INFO "abi=2 sources=unknown"
#endif

namespace {

using namespace qwen_rt;

int64_t no_workspace(const int64_t*, int32_t) { return 0; }

struct Entry {
    const char* name;
    int version;
    int num_dims;
    int32_t (*launch)(const QwenRtCall&);
    int64_t (*workspace_bytes)(const int64_t*, int32_t);
};

// In the order of core/ops.py.
constexpr Entry kEntries[] = {
    {"embed", 2, 4, launch_embed, no_workspace},
    {"rmsnorm_qkv", 3, 5, launch_rmsnorm_qkv, workspace_rmsnorm_qkv},
    {"rope_kv_append_attention", 4, 9, launch_rope_kv_append_attention, workspace_rope_kv_append_attention},
    {"o_proj_residual", 3, 4, launch_o_proj_residual, workspace_o_proj_residual},
    {"select_o_proj_residual", 2, 5, launch_select_o_proj_residual, workspace_select_o_proj_residual},
    {"rmsnorm_gate_up_silu", 3, 4, launch_rmsnorm_gate_up_silu, workspace_rmsnorm_gate_up_silu},
    {"down_residual", 3, 4, launch_down_residual, workspace_down_residual},
    {"lm_head", 4, 4, launch_lm_head, no_workspace},
    {"sample", 2, 5, launch_sample, workspace_sample},
};

const Entry* find(const char* op) {
    for (const Entry& entry : kEntries)
        if (op != nullptr && std::strcmp(entry.name, op) == 0) return &entry;
    return nullptr;
}

}  // namespace

extern "C" int32_t qwen_rt_launch(const char* op, const QwenRtCall* call) {
    if (call == nullptr) return QWEN_RT_INVALID;
    if (call->abi != QWEN_RT_ABI)
        return refuse(*call, QWEN_RT_INVALID, "abi=%d; expected %d", call->abi, QWEN_RT_ABI);
    const Entry* entry = find(op);
    if (entry == nullptr) return refuse(*call, QWEN_RT_INVALID, "op %s; expected one of the op table", op ? op : "NULL");
    return entry->launch(*call);
}

extern "C" int64_t qwen_rt_workspace_bytes(const char* op, const int64_t* dims, int32_t num_dims) {
    const Entry* entry = find(op);
    return entry == nullptr || dims == nullptr || num_dims != entry->num_dims ? -1 : entry->workspace_bytes(dims, num_dims);
}

extern "C" const char* qwen_rt_build_info(void) { return QWEN_RT_BUILD_INFO; }
