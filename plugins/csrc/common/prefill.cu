// Scratch and products of many rows. See prefill.cuh.
//
// Products: cublaslt.cu, or where that is faster tile_gemm.cu.
// Overlap: cuBLASLt's kernels are launched the ordinary way, complete before the next begins and after the one before; our
//   own kernels among them wait for what is before them as always.
#include "prefill.cuh"

#include "launch.cuh"
#include "prefill_rows.cuh"
#include "tile_gemm.cuh"

namespace qwen_rt {

namespace {

constexpr int64_t kSlabBytes = 72 << 20;  // of a matrix in bf16: a product with so much runs as fast as with all of it
constexpr int kSlabUnits = 128;           // what slabs divide by, whole tiles
constexpr int64_t kProductBytes = 320 << 20;  // of integer sums
constexpr int kSlabStep = 256;            // rows that slabs divide by, whole tiles
constexpr int kByteStep = 16;             // what k and the units of products of bytes must divide by
constexpr int kFp8Sm = 89, kInt8Sm = 80;

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t largest(const PrefillShape& shape) {
    int64_t units = 0;
    for (const int64_t count : shape.units) units = count > units ? count : units;
    return units;
}

// Of `all`, so many at a time that none is left over: `fits` at most, in whole steps.
int64_t even_slab(int64_t all, int64_t fits, int64_t step) {
    const int64_t most = fits < step ? step : fits / step * step;
    const int64_t slabs = (all + most - 1) / most, even = ((all + slabs - 1) / slabs + step - 1) / step * step;
    return even < all ? even : all;
}

int64_t sum(const PrefillShape& shape) { return shape.units[0] + shape.units[1] + shape.units[2]; }

// Of the rows' numbers of one byte, which their scales follow.
int64_t row_bytes(const PrefillShape& shape) { return round_up(shape.rows * shape.k); }

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

// Most rows whose product fits in integers.
int64_t most_slab_rows(const PrefillShape& shape) {
    const int64_t fits = kProductBytes / (sum(shape) * 4) / kSlabStep * kSlabStep;
    return fits < kSlabStep ? kSlabStep : fits;
}

}  // namespace

int64_t slab_rows(const PrefillShape& shape) { return even_slab(shape.rows, most_slab_rows(shape), kSlabStep); }

Scratch divide(void* workspace, const PrefillShape& shape) {
    // bf16 activations where there is a norm; else only e4m3 ones, whose scales take 4 bytes a row.
    const int64_t of_bf16 = shape.has_norm ? shape.rows * shape.k * 2 : 0;
    const int64_t of_bytes = shape.groups == 1 ? row_bytes(shape) + shape.rows * 4 : 0;
    const int64_t rows = QWEN_RT_COUNTER_BYTES + kMatmulWorkspaceBytes;
    const int64_t product = rows + round_up(of_bf16 > of_bytes ? of_bf16 : of_bytes);
    const int64_t most_rows = most_slab_rows(shape), integer_rows = shape.rows < most_rows ? shape.rows : most_rows;
    const int64_t of_integers = shape.groups == 1 ? integer_rows * sum(shape) * 4 : 0;
    const int64_t of_product = shape.is_scratch ? shape.rows * sum(shape) * 2 : 0;
    const int64_t slab = product + round_up(of_integers > of_product ? of_integers : of_product);
    const int64_t slab_units = shape.groups == 0 ? 0 : even_slab(largest(shape), kSlabBytes / (shape.k * 2), kSlabUnits);
    const int64_t bytes = slab + round_up(slab_units * shape.k * 2);
    if (workspace == nullptr) return {nullptr, nullptr, nullptr, nullptr, slab_units, bytes};
    char* base = static_cast<char*>(workspace);
    return {base + QWEN_RT_COUNTER_BYTES, base + rows, base + product, reinterpret_cast<bf16*>(base + slab), slab_units, bytes};
}

int64_t workspace_of(const PrefillShape& shape) {
    const int64_t of_skinny = shape.rows > kMaxRows ? 0 : workspace_skinny(shape.rows, shape.k, shape.groups);
    const int64_t of_others = shape.rows <= kMostSkinnyRows ? 0 : divide(nullptr, shape).bytes;
    return of_skinny > of_others ? of_skinny : of_others;
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

namespace {

struct Products {
    Way way;
    bool is_tiles;      // by multiply_tiles() rather than cuBLASLt
    int count;          // 1: all matrices in one
    Matmul product[3];  // for all rows; x and weight of kThroughBf16 are bf16
};

// x_scale of one-byte rows, and where they lie.
float* scales_of(const PrefillShape& shape, const Scratch& scratch) {
    return reinterpret_cast<float*>(static_cast<char*>(scratch.rows) + row_bytes(shape));
}

Way direct_way(const Device& device, const Matrices& m) {
    if (m.format == Format::kBf16) return Way::kBf16;
    const bool is_plain = m.scaling == Scaling::kRow && m.perm == nullptr;
    if (m.format == Format::kFp8 && is_plain && device.sm >= kFp8Sm) return Way::kFp8;
    if (m.format == Format::kInt8 && is_plain && m.rounds_rows && device.sm >= kInt8Sm) return Way::kInt8;
    return Way::kThroughBf16;
}

Way way_on(const Device& device, const PrefillShape& shape, const Matrices& m) {
    const Way way = direct_way(device, m);
    bool can = shape.k % kByteStep == 0;
    for (const int64_t units : shape.units) can &= units % kByteStep == 0;
    return can || way == Way::kBf16 ? way : Way::kThroughBf16;
}

TileProduct tiles_of(const Matmul& p) {
    return {p.x, p.x_scale, {p.weight, nullptr}, {p.weight_scale, nullptr}, static_cast<const bf16*>(p.bias),
            static_cast<const bf16*>(p.residual), static_cast<bf16*>(p.out), p.rows, p.units, p.k, p.stride};
}

// Whether a product goes to tiles where it can: where cuBLASLt's way to sums of many columns is slow, and gate and up, which
// need no pass behind them then. At 1000 rows tiles cost or save 2 % of a layer, at 300 they cost a tenth.
constexpr int64_t kLeastTileRows = 2048;
bool wants_tiles(const PrefillShape& shape, Way way, bool is_gated) {
    return way == Way::kFp8 && shape.rows >= kLeastTileRows && (is_gated || shape.k > kMostFastK);
}

Products arrange(const Device& device, const PrefillShape& shape, const PrefillRows& rows, const Matrices& m,
                 const PrefillOutput& output, const Scratch& scratch) {
    const int64_t width = sum(shape), k = shape.k;
    Products all = {};
    all.way = way_on(device, shape, m);
    all.count = are_adjacent(shape, m, output) ? 1 : m.count;
    int64_t at = 0;
    bool can = true;
    all.is_tiles = wants_tiles(shape, all.way, false);
    for (int i = 0; i < all.count; at += shape.units[i++]) {
        const auto* residual = static_cast<const bf16*>(output.residual);
        Matmul& product = all.product[i];
        product = {rows.x, m.weight[i], output.bias[i], residual == nullptr ? nullptr : residual + at,
                   static_cast<bf16*>(output.out) + at, shape.rows, all.count == 1 ? width : shape.units[i], k, width};
        if (rows.norm_weight != nullptr || all.way == Way::kFp8 || all.way == Way::kInt8) product.x = scratch.rows;
        if (all.way == Way::kFp8) {
            product.type = MatmulType::kFp8;
            product.weight_scale = static_cast<const float*>(m.scale[i]);
            product.x_scale = scales_of(shape, scratch);
        } else if (all.way == Way::kInt8) {
            product.type = MatmulType::kInt8;
            product.bias = product.residual = nullptr;
            product.out = static_cast<int32_t*>(scratch.product) + at;
        }
        all.is_tiles = all.is_tiles && has_tile_product(device, tiles_of(product));
    }
    if (!all.is_tiles && (all.way == Way::kFp8 || all.way == Way::kInt8))
        for (int i = 0; i < all.count; ++i) can &= has_matmul(all.product[i]);
    if (can) return all;
    Matrices plain = m;  // no such kernel: through bf16, as if scales were of groups
    plain.scaling = Scaling::kGroups;
    return arrange(device, shape, rows, plain, output, scratch);
}

int32_t multiply_through_bf16(const QwenRtCall& call, const Matrices& m, int which, const Matmul& whole,
                              const Scratch& scratch) {
    int32_t status = QWEN_RT_OK;
    for (int64_t first = 0; first < whole.units && status == QWEN_RT_OK; first += scratch.slab_units) {
        const int64_t left = whole.units - first;
        const auto shifted = [&](const void* from) {
            return from == nullptr ? nullptr : static_cast<const bf16*>(from) + first;
        };
        Matmul product = whole;
        product.units = left < scratch.slab_units ? left : scratch.slab_units;
        product.weight = scratch.slab;
        product.bias = shifted(whole.bias);
        product.residual = shifted(whole.residual);
        product.out = static_cast<bf16*>(whole.out) + first;
        status = dequantize_matrix(call, m, which, first, product.units, whole.k, scratch.slab);
        if (status == QWEN_RT_OK) status = matmul(call, product, scratch.matmul);
    }
    return status;
}

// Of no more rows than scratch.product has.
int32_t multiply_slab(const QwenRtCall& call, const Device& device, const PrefillShape& shape, const PrefillRows& rows,
                      const Matrices& m, const PrefillOutput& output, const Scratch& scratch, const Products& all) {
    int32_t status = QWEN_RT_OK;
    if (all.way == Way::kFp8 || all.way == Way::kInt8)
        status = quantize_rows(call, m.format, rows.x, rows.norm_weight, scratch.rows, scales_of(shape, scratch), shape.rows,
                               shape.k, rows.epsilon);
    else if (rows.norm_weight != nullptr)
        status = normalize_rows(call, rows.x, rows.norm_weight, static_cast<bf16*>(scratch.rows), shape.rows, shape.k,
                                rows.epsilon);
    for (int i = 0; i < all.count && status == QWEN_RT_OK; ++i)
        status = all.way == Way::kThroughBf16 ? multiply_through_bf16(call, m, i, all.product[i], scratch)
                 : all.is_tiles               ? multiply_tiles(call, device, tiles_of(all.product[i]))
                                              : matmul(call, all.product[i], scratch.matmul);
    int64_t at = 0;
    const int unfinished = all.way == Way::kInt8 && !shape.is_scratch ? all.count : 0;
    for (int i = 0; i < unfinished && status == QWEN_RT_OK; at += shape.units[i++]) {
        const Matmul& product = all.product[i];
        const auto* residual = static_cast<const bf16*>(output.residual);
        const IntegerSums sums = {static_cast<const int32_t*>(product.out), scales_of(shape, scratch),
                                  static_cast<const float*>(m.scale[i]), product.stride};
        status = finish_integers(call, sums, output.bias[i], residual == nullptr ? nullptr : residual + at,
                                 static_cast<bf16*>(output.out) + at, shape.rows, product.units);
    }
    return status;
}

}  // namespace

Way way_of(const PrefillShape& shape, const Matrices& m) {
    Device device;
    return current_device(&device) == cudaSuccess ? way_on(device, shape, m) : Way::kThroughBf16;
}

int32_t multiply_rows(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& m,
                      const PrefillOutput& output, const Scratch& scratch, Way* way, const float** x_scale) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    const auto shifted = [](const void* from, int64_t elements) {
        return from == nullptr ? nullptr : static_cast<const bf16*>(from) + elements;
    };
    const Products whole = arrange(device, shape, rows, m, output, scratch);
    const int64_t most = whole.way == Way::kInt8 ? slab_rows(shape) : shape.rows;
    int32_t status = QWEN_RT_OK;
    for (int64_t first = 0; first < shape.rows && status == QWEN_RT_OK; first += most) {
        PrefillShape part = shape;
        part.rows = shape.rows - first < most ? shape.rows - first : most;
        PrefillRows from = rows;
        from.x = shifted(rows.x, first * shape.k);
        PrefillOutput to = output;
        to.residual = shifted(output.residual, first * sum(shape));
        to.out = const_cast<bf16*>(shifted(output.out, first * sum(shape)));
        const Products products = most == shape.rows ? whole : arrange(device, part, from, m, to, scratch);
        status = multiply_slab(call, device, part, from, m, to, scratch, products);
        if (way != nullptr) *way = products.way;
        if (x_scale != nullptr) *x_scale = scales_of(part, scratch);
    }
    return status;
}

bool multiplies_gated(const Device& device, const PrefillShape& shape, const Matrices& m) {
    return wants_tiles(shape, way_on(device, shape, m), true) &&
           has_tile_product(device, {nullptr, nullptr, {}, {}, nullptr, nullptr, nullptr, shape.rows, shape.units[0], shape.k,
                                     shape.units[0]});
}

int32_t multiply_gated(const QwenRtCall& call, const Device& device, const PrefillShape& shape, const PrefillRows& rows,
                       const Matrices& m, void* out, const Scratch& scratch) {
    float* x_scale = scales_of(shape, scratch);
    if (const int32_t status = quantize_rows(call, m.format, rows.x, rows.norm_weight, scratch.rows, x_scale, shape.rows, shape.k,
                                             rows.epsilon))
        return status;
    return multiply_tiles(call, device,
                          {scratch.rows, x_scale, {m.weight[0], m.weight[1]},
                           {static_cast<const float*>(m.scale[0]), static_cast<const float*>(m.scale[1])}, nullptr, nullptr,
                           static_cast<bf16*>(out), shape.rows, shape.units[0], shape.k, shape.units[0]});
}

bool takes_products(const QwenRtCall& call, const PrefillShape& shape, const PrefillRows& rows, const Matrices& m,
                    const PrefillOutput& output) {
    if (shape.rows > kMaxRows) return true;
    Device device;
    if (shape.rows <= kMostSkinnyRows || is_batch_invariant() || current_device(&device) != cudaSuccess) return false;
    const Way way = way_on(device, shape, m);
    bool is_whole = shape.k % 64 == 0;
    for (const int64_t units : shape.units) is_whole &= units % 8 == 0;
    if ((way != Way::kBf16 && way != Way::kFp8) || !is_whole) return false;
    const Scratch scratch = divide(call.workspace, shape);
    if (call.workspace == nullptr || call.workspace_bytes < scratch.bytes) return true;  // to be refused
    PrefillOutput to = output;
    if (shape.is_scratch) to.out = scratch.product;
    const Products all = arrange(device, shape, rows, m, to, scratch);
    bool has_all = all.way == way;
    for (int i = 0; i < all.count; ++i) has_all = has_all && has_matmul(all.product[i]);
    return has_all;
}

// ---------------------------------------------------------------- o_proj_residual, down_residual

namespace {

enum Tensor { kX, kWeight, kResidual, kScale, kZeroPoint, kPerm, kOut, kNumTensors };
enum Dim { kRows, kWidth, kUnits, kGroups, kNumDims };
enum Attribute { kWeightFormat, kNumAttributes };
constexpr MatrixTensors kMatrices = {1, {kWeight}, {kScale}, {kZeroPoint}, kPerm};

PrefillShape shape_of(const int64_t* dims) {
    return {dims[kRows], dims[kWidth], {dims[kUnits], 0, 0}, false, dims[kGroups], false};
}

}  // namespace

int64_t workspace_residual(const int64_t* dims) {
    return workspace_of(shape_of(dims));
}

int32_t launch_residual(const QwenRtCall& call) {
    if (const int32_t status = check_tensors(call, set_of(kX, kWeight, kResidual, kOut), kNumTensors, kNumDims, kNumAttributes,
                                             set_of(kPerm), 1))
        return status;
    Matrices matrices;
    if (const int32_t status = read_matrices(call, kMatrices, call.dims[kWidth], call.dims[kGroups],
                                             call.attributes[kWeightFormat], &matrices))
        return status;
    const PrefillShape shape = shape_of(call.dims);
    const PrefillRows rows = {call.tensors[kX], nullptr, 0};
    const PrefillOutput output = {{nullptr, nullptr, nullptr}, call.tensors[kResidual], call.tensors[kOut]};
    if (takes_products(call, shape, rows, matrices, output)) {
        Scratch scratch;
        if (const int32_t status = prepare_prefill(call, shape, &scratch)) return status;
        return multiply_rows(call, shape, rows, matrices, output, scratch);
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
