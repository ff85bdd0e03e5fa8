// The launchers of all ops, and how much workspace each wants: what the C entry points look up.
#pragma once

#include "../capi.h"

namespace qwen_rt {

int32_t launch_embed(const QwenRtCall& call);
int32_t launch_rmsnorm_qkv(const QwenRtCall& call);
int32_t launch_rope_kv_append_attention(const QwenRtCall& call);
int32_t launch_o_proj_residual(const QwenRtCall& call);
int32_t launch_select_o_proj_residual(const QwenRtCall& call);
int32_t launch_rmsnorm_gate_up_silu(const QwenRtCall& call);
int32_t launch_down_residual(const QwenRtCall& call);
int32_t launch_lm_head(const QwenRtCall& call);
int32_t launch_sample(const QwenRtCall& call);

int64_t workspace_rmsnorm_qkv(const int64_t* dims, int32_t num_dims);
int64_t workspace_rope_kv_append_attention(const int64_t* dims, int32_t num_dims);
int64_t workspace_o_proj_residual(const int64_t* dims, int32_t num_dims);
int64_t workspace_select_o_proj_residual(const int64_t* dims, int32_t num_dims);
int64_t workspace_rmsnorm_gate_up_silu(const int64_t* dims, int32_t num_dims);
int64_t workspace_down_residual(const int64_t* dims, int32_t num_dims);
int64_t workspace_sample(const int64_t* dims, int32_t num_dims);

}  // namespace qwen_rt
