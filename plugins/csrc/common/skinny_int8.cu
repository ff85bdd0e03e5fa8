// Variants of the skinny kernel for int8 matrices.
#include "skinny_8bit.cuh"

namespace qwen_rt {

int32_t launch_skinny_int8(const QwenRtCall& call, const Device& device, const SkinnyGrid& grid, const SkinnyParams& p, Scaling scaling) {
    return choose_8bit<Format::kInt8>(call, device, grid, p, scaling);
}

}  // namespace qwen_rt
