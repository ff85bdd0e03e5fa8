// Variants of the skinny kernel for int8 matrices.
#include "skinny_8bit.cuh"

namespace qwen_rt {

int32_t launch_skinny_int8(const QwenRtCall& call, const Device& device, const SkinnyGrids& grids, const SkinnyParams& p, Scaling scaling) {
    return choose_8bit<Format::kInt8>(call, device, grids, p, scaling);
}

}  // namespace qwen_rt
