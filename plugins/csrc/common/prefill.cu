// Scratch and products of a prefill. See prefill.cuh.
//
// Overlap: cuBLASLt's kernels are launched the ordinary way, complete before the next begins and after the one before; our
//   own kernels among them wait for what is before them as always.
#include "prefill.cuh"

#include "launch.cuh"
#include "prefill_rows.cuh"

namespace qwen_rt {

namespace {

constexpr int64_t kSlabBytes = 64 << 20;  // of a matrix in bf16: a product with so much runs as fast as with all of it
constexpr int kFp8Step = 16;              // what k and the units of e4m3 products must divide by
constexpr int kFp8Sm = 89;

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t largest(const PrefillShape& shape) {
    int64_t units = 0;
    for (const int64_t count : shape.units) units = count > units ? count : units;
    return units;
}

int64_t sum(const PrefillShape& shape) { return shape.units[0] + shape.units[1] + shape.units[2]; }

// Of the rows' e4m3 numbers, which their scales follow.
int64_t fp8_bytes(const PrefillShape& shape) { return round_up(shape.rows * shape.k); }

// Whether all that belongs to a matrix lies behind what belongs to the one before it.
bool are_adjacent(const PrefillShape& shape, const Matrices& m, const PrefillOutput& output) {
    const auto follows = [](const void* next, const void* before, int64_t bytes) {
        return before == nullptr ? next == nullptr : next == static_cast<const char*>(before) + bytes;
    };
    const int64_t scale_bytes = m.groups * scale_bytes_of(m.format);
    const int64_t zero_bytes = zero_row_bytes_of(m.format, static_cast<int>(m.groups));
    bool are = true;
    for (int i = 0; i + 1 < m.count; ++i) {
        are &= follows(m.weight[i + 1], m.weight[i], shape.units[i] * row_bytes_of(m.format, shape.k));
        are &= follows(m.scale[i + 1], m.scale[i], shape.units[i] * scale_bytes);
        are &= follows(m.zero[i + 1], m.zero[i], shape.units[i] * zero_bytes);
        are &= follows(output.bias[i + 1], output.bias[i], shape.units[i] * 2);
    }
    return are;
}

}  // namespace

Scratch divide(void* workspace, const PrefillShape& shape) {
    // bf16 activations where there is a norm; else only e4m3 ones, whose scales take 4 bytes a row.
    const int64_t of_bf16 = shape.has_norm ? shape.rows * shape.k * 2 : 0;
    const int64_t of_fp8 = shape.groups == 1 ? fp8_bytes(shape) + shape.rows * 4 : 0;
    const int64_t rows = QWEN_RT_COUNTER_BYTES + kMatmulWorkspaceBytes;
    const int64_t product = rows + round_up(of_bf16 > of_fp8 ? of_bf16 : of_fp8);
    const int64_t slab = product + round_up(shape.num_product * 2);
    const int64_t fits = kSlabBytes / (shape.k * 2), most = largest(shape);
    const int64_t slab_units = shape.groups == 0 ? 0 : most < fits ? most : fits < 64 ? 64 : fits / 64 * 64;
    const int64_t bytes = slab + round_up(slab_units * shape.k * 2);
    if (workspace == nullptr) return {nullptr, nullptr, nullptr, nullptr, slab_units, bytes};
    char* base = static_cast<char*>(workspace);
    return {base + QWEN_RT_COUNTER_BYTES, base + rows, reinterpret_cast<bf16*>(base + product), reinterpret_cast<bf16*>(base + slab),
            slab_units, bytes};
}

int32_t prepare_prefill(const QwenRtCall& call, const PrefillShape& shape, Scratch* scratch) {
    if (shape.rows > kMaxPrefillRows)
        return refuse(call, QWEN_RT_UNSUPPORTED, "rows=%lld; expected at most %lld", static_cast<long long>(shape.rows),
                      static_cast<long long>(kMaxPrefillRows));
    if (shape.k % 64 != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "k=%lld; expected a multiple of 64", static_cast<long long>(shape.k));
    if (sum(shape) % 8 != 0)
        return refuse(call, QWEN_RT_UNSUPPORTED, "width=%lld of the output; expected a multiple of 8",
                      static_cast<long long>(sum(shape)));
    *scratch = divide(call.workspace, shape);
    if (call.workspace == nullptr || call.workspace_bytes < scratch->bytes)
        return refuse(call, QWEN_RT_INVALID, "workspace_bytes=%lld; expected %lld",
                      static_cast<long long>(call.workspace == nullptr ? 0 : call.workspace_bytes),
                      static_cast<long long>(scratch->bytes));
    if ((reinterpret_cast<uintptr_t>(call.workspace) & 255u) != 0)
        return refuse(call, QWEN_RT_INVALID, "workspace at %p; expected an address divisible by 256", call.workspace);
    return QWEN_RT_OK;
}

// ---------------------------------------------------------------- products

int32_t multiply_rows(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& m,
                      const PrefillOutput& output, const Scratch& scratch) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const int64_t width = sum(shape), k = shape.k;
    const bool is_one = are_adjacent(shape, m, output);
    Matmul products[3];
    int count = 0;
    for (int64_t i = 0, at = 0; i < (is_one ? 1 : m.count); at += shape.units[i++]) {
        const auto* residual = static_cast<const bf16*>(output.residual);
        products[count++] = {rows.x, m.weight[i], output.bias[i], residual == nullptr ? nullptr : residual + at,
                             static_cast<bf16*>(output.out) + at, shape.rows, is_one ? width : shape.units[i], k, width};
    }

    bool is_fp8 = m.format == Format::kFp8 && m.scaling == Scaling::kRow && m.perm == nullptr && device.sm >= kFp8Sm && k % kFp8Step == 0;
    auto* fp8_scale = reinterpret_cast<float*>(static_cast<char*>(scratch.rows) + fp8_bytes(shape));
    for (int i = 0; i < count && is_fp8; ++i) {
        Matmul product = products[i];
        product.x = scratch.rows;
        product.weight_scale = static_cast<const float*>(m.scale[i]);
        product.x_scale = fp8_scale;
        is_fp8 = product.units % kFp8Step == 0 && has_matmul(product);
    }
    int32_t status = QWEN_RT_OK;
    if (is_fp8)
        status = quantize_rows(call, rows.x, rows.norm_weight, scratch.rows, fp8_scale, shape.rows, k, rows.epsilon);
    else if (rows.norm_weight != nullptr)
        status = normalize_rows(call, rows.x, rows.norm_weight, static_cast<bf16*>(scratch.rows), shape.rows, k, rows.epsilon);
    for (int i = 0; i < count && status == QWEN_RT_OK; ++i) {
        Matmul product = products[i];
        if (is_fp8 || rows.norm_weight != nullptr) product.x = scratch.rows;
        if (is_fp8) {
            product.weight_scale = static_cast<const float*>(m.scale[i]);
            product.x_scale = fp8_scale;
        }
        if (is_fp8 || m.format == Format::kBf16) {
            status = matmul(call, product, scratch.matmul);
            continue;
        }
        for (int64_t first = 0; first < products[i].units && status == QWEN_RT_OK; first += scratch.slab_units) {
            const int64_t left = products[i].units - first;
            product.units = left < scratch.slab_units ? left : scratch.slab_units;
            product.weight = scratch.slab;
            const auto shifted = [&](const void* from) { return from == nullptr ? nullptr : static_cast<const bf16*>(from) + first; };
            product.bias = shifted(products[i].bias);
            product.residual = shifted(products[i].residual);
            product.out = static_cast<bf16*>(products[i].out) + first;
            status = dequantize_matrix(call, m, i, first, product.units, k, scratch.slab);
            if (status == QWEN_RT_OK) status = matmul(call, product, scratch.matmul);
        }
    }
    return status;
}

// ---------------------------------------------------------------- o_proj_residual, down_residual

namespace {

enum Tensor { kX, kWeight, kResidual, kScale, kZeroPoint, kPerm, kOut, kNumTensors };
enum Dim { kRows, kWidth, kUnits, kGroups, kNumDims };
enum Attribute { kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {1, {kWeight}, {kScale}, {kZeroPoint}, kPerm};

PrefillShape shape_of(const int64_t* dims) {
    return {dims[kRows], dims[kWidth], {dims[kUnits], 0, 0}, 0, dims[kGroups], false};
}

}  // namespace

int64_t workspace_residual(const int64_t* dims) {
    return dims[kRows] <= kMaxRows ? workspace_skinny(dims[kRows], dims[kWidth], dims[kGroups]) : divide(nullptr, shape_of(dims)).bytes;
}

int32_t launch_residual(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kX, kWeight, kResidual, kOut), kNumTensors, kNumDims, kNumAttributes,
                                             set_of(kPerm), 1))
        return status;
    Matrices matrices;
    if (const int32_t status = read_matrices(call, kMatrices, call.dims[kWidth], call.dims[kGroups],
                                             call.attributes[kWeightFormat], &matrices))
        return status;
    if (call.dims[kRows] > kMaxRows) {
        const PrefillShape shape = shape_of(call.dims);
        Scratch scratch;
        if (const int32_t status = prepare_prefill(call, shape, &scratch)) return status;
        return multiply_rows(call, shape, {call.tensors[kX], nullptr, 0}, matrices,
                             {{nullptr, nullptr, nullptr}, call.tensors[kResidual], call.tensors[kOut]}, scratch);
    }
    SkinnyParams p = {};
    p.epilogue = Epilogue::kResidual;
    p.x = static_cast<const bf16*>(call.tensors[kX]);
    p.residual = static_cast<const bf16*>(call.tensors[kResidual]);
    p.out = call.tensors[kOut];
    p.rows = static_cast<int>(call.dims[kRows]);
    p.k = static_cast<int>(call.dims[kWidth]);
    p.units = static_cast<int>(call.dims[kUnits]);
    return launch_skinny(call, matrices, p, skinny_scratch(call, workspace_residual(call.dims)));
}

}  // namespace qwen_rt
