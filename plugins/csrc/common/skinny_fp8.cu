// Variants of the skinny kernel for fp8 matrices.
#include "skinny_8bit.cuh"

namespace qwen_rt {

int32_t launch_skinny_fp8(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling) {
    return choose_8bit<Format::kFp8>(call, device, grid, p, scaling);
}

}  // namespace qwen_rt
