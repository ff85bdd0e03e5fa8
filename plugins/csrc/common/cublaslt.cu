// Calls cuBLASLt without linking to it: the one that the process holds already (PyTorch's, ONNX Runtime's), else the
// loader's. So the plugin library loads, and decodes, where there is none.
//
// Source of the declarations: cublasLt.h, cublas_api.h of CUDA 12.0 to 13.0 (docs.nvidia.com/cuda/cublas, "Using the
// cuBLASLt API"); NVIDIA keeps these values and layouts from 11.4 on. CUDA_R_* are the runtime's own, library_types.h.
#include "cublaslt.cuh"

#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "launch.cuh"

namespace qwen_rt {

// ---------------------------------------------------------------- declarations

namespace {

using Handle = void*;      // cublasLtHandle_t
using Description = void*;  // cublasLtMatmulDesc_t
using Layout = void*;       // cublasLtMatrixLayout_t
using Preference = void*;   // cublasLtMatmulPreference_t

struct Algorithm {  // cublasLtMatmulAlgo_t
    uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    Algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float num_waves;
    int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t");

constexpr int kSuccess = 0, kNotSupported = 15;             // cublasStatus_t
constexpr int kCompute32F = 68, kCompute32I = 72;            // CUBLAS_COMPUTE_*
constexpr int32_t kTransposed = 1;                          // CUBLAS_OP_T
constexpr int kTransA = 3, kEpilogue = 7, kBiasPointer = 8;  // CUBLASLT_MATMUL_DESC_*
constexpr int kScaleA = 17, kScaleB = 18, kFastSum = 25;     // CUBLASLT_MATMUL_DESC_{A,B}_SCALE_POINTER, _FAST_ACCUM
constexpr int kScaleModeA = 31, kScaleModeB = 32;            // CUBLASLT_MATMUL_DESC_{A,B}_SCALE_MODE
constexpr int32_t kOuterVector = 3;                          // CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
constexpr uint32_t kEpilogueBias = 4;                       // CUBLASLT_EPILOGUE_BIAS
constexpr int kMaxWorkspaceBytes = 1, kReductionMask = 3;   // CUBLASLT_MATMUL_PREF_*
constexpr int kMinAlignment[4] = {5, 6, 7, 8};              // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{A,B,C,D}_BYTES
constexpr uint32_t kReduceInF32 = 2;                        // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE

struct Library {
    int (*create)(Handle*);
    const char* (*status_name)(int);
    int (*create_description)(Description*, int compute, cudaDataType_t scale);
    int (*set_description)(Description, int attribute, const void*, size_t);
    int (*destroy_description)(Description);
    int (*create_layout)(Layout*, cudaDataType_t, uint64_t rows, uint64_t columns, int64_t stride);
    int (*destroy_layout)(Layout);
    int (*create_preference)(Preference*);
    int (*set_preference)(Preference, int attribute, const void*, size_t);
    int (*destroy_preference)(Preference);
    int (*find)(Handle, Description, Layout, Layout, Layout, Layout, Preference, int wanted, Heuristic*, int* found);
    int (*matmul)(Handle, Description, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                  const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t, cudaStream_t);
};

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};

void* open_library() {
    for (const char* name : kNames)
        if (void* found = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return found;
    for (const char* name : kNames)
        if (void* found = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return found;
    return nullptr;
}

template <class Function>
bool find_symbol(void* library, const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library, name));
    return *function != nullptr;
}

bool load(Library* library) {
    void* opened = open_library();  // stays open: plans hold its objects until the process ends
    return opened != nullptr && find_symbol(opened, "cublasLtCreate", &library->create) &&
           find_symbol(opened, "cublasLtGetStatusName", &library->status_name) &&
           find_symbol(opened, "cublasLtMatmulDescCreate", &library->create_description) &&
           find_symbol(opened, "cublasLtMatmulDescSetAttribute", &library->set_description) &&
           find_symbol(opened, "cublasLtMatmulDescDestroy", &library->destroy_description) &&
           find_symbol(opened, "cublasLtMatrixLayoutCreate", &library->create_layout) &&
           find_symbol(opened, "cublasLtMatrixLayoutDestroy", &library->destroy_layout) &&
           find_symbol(opened, "cublasLtMatmulPreferenceCreate", &library->create_preference) &&
           find_symbol(opened, "cublasLtMatmulPreferenceSetAttribute", &library->set_preference) &&
           find_symbol(opened, "cublasLtMatmulPreferenceDestroy", &library->destroy_preference) &&
           find_symbol(opened, "cublasLtMatmulAlgoGetHeuristic", &library->find) &&
           find_symbol(opened, "cublasLtMatmul", &library->matmul);
}

// ---------------------------------------------------------------- plans

// cuBLASLt's matrices are column-major: out, [rows, units] in rows, is its D[units, rows] = Aᵀ · B with A = weight
// [k, units] and B = x [k, rows].
struct Plan {
    const Library* library;
    Description description = nullptr;
    Layout weight = nullptr, x = nullptr, out = nullptr;
    Algorithm algorithm = {};

    explicit Plan(const Library* from) : library(from) {}
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan() {
        if (description != nullptr) library->destroy_description(description);
        for (const Layout layout : {weight, x, out})
            if (layout != nullptr) library->destroy_layout(layout);
    }
};

// Pointers count only where they are aligned less than to 16 bytes, so that the choice does not hang on where memory lies.
uint32_t alignment_of(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer) | 16;
    return static_cast<uint32_t>(address & (~address + 1));
}

using Key = std::array<int64_t, 9>;

bool is_fp8(const Matmul& p) { return p.type == MatmulType::kFp8; }

Key key_of(int device, const Matmul& p) {
    const int64_t alignments = alignment_of(p.weight) | alignment_of(p.x) << 8 | alignment_of(p.residual) << 16 |
                               int64_t{alignment_of(p.out)} << 24;
    const bool in_place = p.residual == p.out;
    return {device, p.rows, p.units, p.k, p.stride, p.bias != nullptr, (p.residual != nullptr) + in_place, alignments,
            static_cast<int64_t>(p.type)};
}

int set_pointer(const Plan& plan, int attribute, const void* pointer) {
    return plan.library->set_description(plan.description, attribute, &pointer, sizeof pointer);
}

// What a plan's description carries of one call.
int set_pointers(const Plan& plan, const Matmul& p) {
    int status = p.bias == nullptr ? kSuccess : set_pointer(plan, kBiasPointer, p.bias);
    if (!is_fp8(p)) return status;
    if (status == kSuccess) status = set_pointer(plan, kScaleA, p.weight_scale);
    return status == kSuccess ? set_pointer(plan, kScaleB, p.x_scale) : status;
}

int make_plan(Handle handle, const Matmul& p, Plan* plan) {
    const Library& library = *plan->library;
    const bool is_int8 = p.type == MatmulType::kInt8;
    int status = library.create_description(&plan->description, is_int8 ? kCompute32I : kCompute32F,
                                            is_int8 ? CUDA_R_32I : CUDA_R_32F);
    if (status == kSuccess)
        status = library.set_description(plan->description, kTransA, &kTransposed, sizeof kTransposed);
    if (status == kSuccess && p.bias != nullptr) {
        status = library.set_description(plan->description, kEpilogue, &kEpilogueBias, sizeof kEpilogueBias);
    }
    if (is_fp8(p)) {
        const int8_t is_fast = p.rows > kMaxRows && p.k <= kMostFastK;
        if (status == kSuccess)
            status = library.set_description(plan->description, kScaleModeA, &kOuterVector, sizeof kOuterVector);
        if (status == kSuccess)
            status = library.set_description(plan->description, kScaleModeB, &kOuterVector, sizeof kOuterVector);
        if (status == kSuccess) status = library.set_description(plan->description, kFastSum, &is_fast, sizeof is_fast);
    }
    if (status == kSuccess) status = set_pointers(*plan, p);
    const cudaDataType_t type = is_int8 ? CUDA_R_8I : is_fp8(p) ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    const cudaDataType_t out_type = is_int8 ? CUDA_R_32I : CUDA_R_16BF;
    const auto make_layouts = [&](int64_t rows) {
        if (status == kSuccess) status = library.create_layout(&plan->x, type, p.k, rows, p.k);
        if (status == kSuccess) status = library.create_layout(&plan->out, out_type, p.units, rows, p.stride);
    };
    if (status == kSuccess) status = library.create_layout(&plan->weight, type, p.k, p.units, p.k);
    const int64_t searched_rows = p.rows < kMaxRows ? kMaxRows : p.rows;
    make_layouts(searched_rows);
    if (status != kSuccess) return status;

    Preference preference = nullptr;
    status = library.create_preference(&preference);
    if (status != kSuccess) return status;
    const uint64_t workspace_bytes = kMatmulWorkspaceBytes;
    status = library.set_preference(preference, kMaxWorkspaceBytes, &workspace_bytes, sizeof workspace_bytes);
    if (status == kSuccess)
        status = library.set_preference(preference, kReductionMask, &kReduceInF32, sizeof kReduceInF32);
    const void* pointers[4] = {p.weight, p.x, p.residual != nullptr ? p.residual : p.out, p.out};
    for (int i = 0; i < 4 && status == kSuccess; ++i) {
        const uint32_t alignment = alignment_of(pointers[i]);
        status = library.set_preference(preference, kMinAlignment[i], &alignment, sizeof alignment);
    }
    Heuristic best = {};
    int num_found = 0;
    if (status == kSuccess)
        status = library.find(handle, plan->description, plan->weight, plan->x, plan->out, plan->out, preference, 1, &best,
                              &num_found);
    library.destroy_preference(preference);
    if (status == kSuccess) status = num_found < 1 ? kNotSupported : best.status;
    plan->algorithm = best.algorithm;
    if (status == kSuccess && searched_rows != p.rows) {
        library.destroy_layout(plan->x), library.destroy_layout(plan->out);
        plan->x = plan->out = nullptr;
        make_layouts(p.rows);
    }
    return status;
}

// Prefills of ever other lengths would fill memory; 4096 plans are those of several hundred lengths of a model.
constexpr size_t kMaxPlans = 4096;
constexpr int kMaxDevices = 64;
constexpr int kNoLibrary = -1;  // beside cublasStatus_t

struct State {
    std::mutex mutex;  // held while a product is enqueued: a plan's description carries the bias of this call
    bool is_loaded = false;
    Library library = {};
    Handle handles[kMaxDevices] = {};
    std::map<Key, std::unique_ptr<Plan>> plans;  // null: there is no kernel
};

State& state() {
    static State* const only = new State;  // never destroyed: cuBLASLt may be gone before static destructors run
    return *only;
}

// Finds the plan of a product, or makes it; the mutex is held. No plan: null, and `status` says why.
const Plan* find_plan(State& s, const Matmul& p, int device, int* status) {
    if (!s.is_loaded) s.is_loaded = load(&s.library);
    if (!s.is_loaded) return *status = kNoLibrary, nullptr;
    Handle& handle = s.handles[device];
    if (handle == nullptr)
        if ((*status = s.library.create(&handle)) != kSuccess) return handle = nullptr, nullptr;
    const Key key = key_of(device, p);
    auto found = s.plans.find(key);
    if (found == s.plans.end()) {
        auto plan = std::make_unique<Plan>(&s.library);
        *status = make_plan(handle, p, plan.get());
        if (*status != kSuccess) {
            if (p.type == MatmulType::kBf16) return nullptr;
            plan = nullptr;  // remembered: the next call need not search again
        }
        if (s.plans.size() >= kMaxPlans) s.plans.clear();
        found = s.plans.emplace(key, std::move(plan)).first;
    }
    *status = found->second == nullptr ? kNotSupported : kSuccess;
    return found->second.get();
}

int32_t run(const QwenRtCall& call, const Matmul& p, void* workspace, int device) {
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    int status = kSuccess;
    const Plan* found = find_plan(s, p, device, &status);
    if (status == kNoLibrary)
        return refuse(call, QWEN_RT_UNSUPPORTED,
                      "rows=%lld without %s; expected cuBLASLt for more than %d rows; install nvidia-cublas or the CUDA toolkit, "
                      "and put its lib folder on the loader's path",
                      static_cast<long long>(p.rows), kNames[0], kMaxRows);
    if (found == nullptr)
        return refuse(call, status == kNotSupported ? QWEN_RT_UNSUPPORTED : QWEN_RT_CUDA_ERROR,
                      "rows=%lld, units=%lld, k=%lld: cuBLASLt finds no kernel: %s", static_cast<long long>(p.rows),
                      static_cast<long long>(p.units), static_cast<long long>(p.k), s.library.status_name(status));
    const Plan& plan = *found;
    status = set_pointers(plan, p);
    const float alpha = 1.f, beta = p.residual != nullptr ? 1.f : 0.f;
    const int32_t whole_alpha = 1, whole_beta = 0;
    const bool is_int8 = p.type == MatmulType::kInt8;
    const void* factors[2] = {is_int8 ? static_cast<const void*>(&whole_alpha) : &alpha,
                              is_int8 ? static_cast<const void*>(&whole_beta) : &beta};
    if (status == kSuccess)
        status = s.library.matmul(s.handles[device], plan.description, factors[0], p.weight, plan.weight, p.x, plan.x, factors[1],
                                  p.residual != nullptr ? p.residual : p.out, plan.out, p.out, plan.out, &plan.algorithm,
                                  workspace, kMatmulWorkspaceBytes, static_cast<cudaStream_t>(call.stream));
    if (status != kSuccess) return refuse(call, QWEN_RT_CUDA_ERROR, "cublasLtMatmul: %s", s.library.status_name(status));
    return QWEN_RT_OK;
}

}  // namespace

// ---------------------------------------------------------------- launcher

int32_t matmul(const QwenRtCall& call, const Matmul& product, void* workspace) {
    Device device;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess)
        return refuse(call, QWEN_RT_CUDA_ERROR, "no device: %s", cudaGetErrorString(error));
    if (device.index >= kMaxDevices)
        return refuse(call, QWEN_RT_UNSUPPORTED, "device %d; expected 0 to %d", device.index, kMaxDevices - 1);
    try {
        return run(call, product, workspace, device.index);
    } catch (const std::bad_alloc&) {
        return refuse(call, QWEN_RT_CUDA_ERROR, "out of host memory for a plan of cuBLASLt");
    }
}

bool has_matmul(const Matmul& product) {
    Device device;
    if (current_device(&device) != cudaSuccess || device.index >= kMaxDevices) return false;
    try {
        State& s = state();
        const std::lock_guard<std::mutex> lock(s.mutex);
        int status = kSuccess;
        return find_plan(s, product, device.index, &status) != nullptr;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

}  // namespace qwen_rt
