// The ops of core/ops.py as custom ops of ONNX Runtime, domain qwen_rt: one binding over the op table, nothing op by op.
//
// A node has the inputs of its op in table order, then, if the op has a workspace, `workspace: uint8[W]`; outputs in table
// order; attributes as numbers. Dims and output shapes follow from the shapes of the inputs anew in every call. An output
// that is its input in place must be bound to the same memory; nothing is ever copied.
//
// There is no shape inference function: ONNX Runtime's context for one reads the types of all inputs of the node, absent
// ones included, and so cannot be made for a node without an optional input. Graphs carry the shapes themselves.
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <new>
#include <utility>

#include "capi.h"
#include "ort/ort_abi.h"
#include "ort/shapes.h"

#ifndef QWEN_RT_ORT_PROVIDER
#define QWEN_RT_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace {

using namespace qwen_rt;

constexpr size_t kMessageBytes = 512;
constexpr int kUint8 = 2;        // TensorProto.UINT8
constexpr int kMaxRuntimes = 8;  // copies of ONNX Runtime in one process

struct BoundOp : OrtCustomOp {
    const OpSpec* spec;
    int cache_type;  // element type that stands for kCacheType here
};

struct Kernel {
    const OrtApi* ort;
    const OpSpec* op;
    double attributes[kMaxAttributes];
};

__attribute__((format(printf, 3, 4))) OrtStatus* fail(const OrtApi& ort, OrtErrorCode code, const char* format, ...) {
    char line[kMessageBytes + 128];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return ort.CreateStatus(code, line);
}

// The status of ONNX Runtime, with op and tensor before its message.
OrtStatus* fail_at(const OrtApi& ort, const OpSpec& op, const char* tensor, OrtStatus* cause) {
    OrtStatus* status = fail(ort, ORT_INVALID_ARGUMENT, "%s: %s: %s", op.name, tensor, ort.GetErrorMessage(cause));
    ort.ReleaseStatus(cause);
    return status;
}

const OpSpec& spec_of(const OrtCustomOp* op) { return *static_cast<const BoundOp*>(op)->spec; }

// ---- what ONNX Runtime asks about an op ----

const char* name_of(const OrtCustomOp* op) { return spec_of(op).name; }
const char* provider_of(const OrtCustomOp*) { return QWEN_RT_ORT_PROVIDER; }
size_t num_inputs(const OrtCustomOp* op) {
    return static_cast<size_t>(spec_of(op).num_inputs) + (spec_of(op).has_workspace ? 1 : 0);
}
size_t num_outputs(const OrtCustomOp* op) { return static_cast<size_t>(spec_of(op).num_outputs); }

// 0, "undefined", is any type to ONNX Runtime. An output cannot be of any type: caches have one in every binding of the op.
ONNXTensorElementDataType type_of(const OrtCustomOp* op, size_t tensor) {
    const int type = spec_of(op).tensors[tensor].element_type;
    return type == kCacheType ? static_cast<const BoundOp*>(op)->cache_type : type;
}
ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
    return index < static_cast<size_t>(spec_of(op).num_inputs) ? type_of(op, index) : kUint8;
}
ONNXTensorElementDataType output_type(const OrtCustomOp* op, size_t index) {
    return type_of(op, static_cast<size_t>(spec_of(op).num_inputs) + index);
}

OrtCustomOpInputOutputCharacteristic input_kind(const OrtCustomOp* op, size_t index) {
    // Without a workspace a launcher says itself whether it can do.
    const bool is_workspace = index >= static_cast<size_t>(spec_of(op).num_inputs);
    return is_workspace || spec_of(op).tensors[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}
OrtCustomOpInputOutputCharacteristic output_kind(const OrtCustomOp* op, size_t index) {
    const OpSpec& spec = spec_of(op);
    return spec.tensors[static_cast<size_t>(spec.num_inputs) + index].optional ? INPUT_OUTPUT_OPTIONAL
                                                                               : INPUT_OUTPUT_REQUIRED;
}
OrtMemType memory_type(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }
int variadic_min(const OrtCustomOp*) { return 1; }
int variadic_homogeneity(const OrtCustomOp*) { return 1; }

// Pairs of an op, kept here for good.
template <int op, bool may>
size_t pairs(int** inputs, int** outputs) {
    struct Pairs {
        size_t count = 0;
        int inputs[kMaxTensors] = {};
        int outputs[kMaxTensors] = {};
    };
    static Pairs found = [] {
        Pairs made;
        const OpSpec& spec = kOps[op];
        for (int i = 0; i < spec.num_outputs; ++i) {
            const TensorSpec& tensor = spec.tensors[spec.num_inputs + i];
            if (tensor.alias < 0 || tensor.may_alias != may) continue;
            made.inputs[made.count] = tensor.alias;
            made.outputs[made.count++] = i;
        }
        return made;
    }();
    *inputs = found.inputs;
    *outputs = found.outputs;
    return found.count;
}
void keep_pairs(int*, int*) {}

// ---- kernels ----

// Reads an attribute, a float or an integer; false if the node has neither.
bool read_attribute(const OrtApi& ort, const OrtKernelInfo* info, const char* name, double* value) {
    float number = 0;
    OrtStatus* status = ort.KernelInfoGetAttribute_float(info, name, &number);
    if (status == nullptr) {
        *value = number;
        return true;
    }
    ort.ReleaseStatus(status);
    int64_t integer = 0;
    status = ort.KernelInfoGetAttribute_int64(info, name, &integer);
    if (status == nullptr) {
        *value = static_cast<double>(integer);
        return true;
    }
    ort.ReleaseStatus(status);
    return false;
}

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** out) {
    const OpSpec& spec = spec_of(op);
    *out = nullptr;
    Kernel kernel = {api, &spec, {}};
    for (int i = 0; i < spec.num_attributes; ++i) {
        const AttributeSpec& attribute = spec.attributes[i];
        kernel.attributes[i] = attribute.value;
        if (!read_attribute(*api, info, attribute.name, &kernel.attributes[i]) && attribute.required)
            return fail(*api, ORT_INVALID_ARGUMENT, "%s: attribute %s is missing; expected a number", spec.name,
                        attribute.name);
    }
    *out = new (std::nothrow) Kernel(kernel);
    return *out != nullptr ? nullptr : fail(*api, ORT_FAIL, "%s: no memory for a kernel", spec.name);
}

void destroy_kernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

// The address and shape of a tensor; NULL and no shape for an absent one.
OrtStatus* open_tensor(const OrtApi& ort, const OrtValue* value, void** address, Shape* shape) {
    *address = nullptr;
    if (value == nullptr) return nullptr;
    ONNXTensorElementDataType type = 0;
    OrtStatus* status = ort.GetTensorElementTypeAndShapeDataReference(value, &type, &shape->sizes, &shape->rank);
    if (status != nullptr) return status;
    shape->present = true;
    return ort.GetTensorMutableData(const_cast<OrtValue*>(value), address);
}

OrtStatus* open_inputs(const Kernel& kernel, const OrtKernelContext* context, void** tensors, Shape* shapes,
                       QwenRtCall* call) {
    const OrtApi& ort = *kernel.ort;
    const OpSpec& op = *kernel.op;
    size_t given = 0;
    if (OrtStatus* status = ort.KernelContext_GetInputCount(context, &given)) return status;
    for (int i = 0; i < op.num_inputs + (op.has_workspace ? 1 : 0); ++i) {
        const bool is_workspace = i == op.num_inputs;
        const char* name = is_workspace ? "workspace" : op.tensors[i].name;
        const OrtValue* value = nullptr;
        void* address = nullptr;
        Shape shape;
        OrtStatus* status = static_cast<size_t>(i) < given
                                ? ort.KernelContext_GetInput(context, static_cast<size_t>(i), &value)
                                : nullptr;
        if (status == nullptr) status = open_tensor(ort, value, &address, &shape);
        if (status != nullptr) return fail_at(ort, op, name, status);
        if (is_workspace) {
            call->workspace_bytes = shape.present ? 1 : 0;
            for (size_t axis = 0; axis < shape.rank; ++axis) call->workspace_bytes *= shape.sizes[axis];
            call->workspace = call->workspace_bytes > 0 ? address : nullptr;
        } else if (!shape.present && !op.tensors[i].optional) {
            return fail(ort, ORT_INVALID_ARGUMENT, "%s: %s is missing", op.name, name);
        } else {
            tensors[i] = address;
            shapes[i] = shape;
        }
    }
    return nullptr;
}

OrtStatus* open_outputs(const Kernel& kernel, OrtKernelContext* context, const Symbols& symbols, const Shape* inputs,
                        void** tensors) {
    const OrtApi& ort = *kernel.ort;
    const OpSpec& op = *kernel.op;
    size_t given = 0;
    if (OrtStatus* status = ort.KernelContext_GetOutputCount(context, &given)) return status;
    for (int i = 0; i < op.num_outputs && static_cast<size_t>(i) < given; ++i) {
        const TensorSpec& tensor = op.tensors[op.num_inputs + i];
        int64_t sizes[kMaxRank] = {};
        const Size* unknown = nullptr;
        for (int axis = 0; axis < tensor.rank; ++axis) {
            sizes[axis] = value_of(tensor.sizes[axis], symbols.values());
            if (!symbols.knows(tensor.sizes[axis])) unknown = &tensor.sizes[axis];
        }
        OrtValue* value = nullptr;
        Shape shape;
        OrtStatus* status = ort.KernelContext_GetOutput(context, static_cast<size_t>(i), sizes,
                                                        static_cast<size_t>(tensor.rank), &value);
        void*& address = tensors[op.num_inputs + i];
        if (status == nullptr) status = open_tensor(ort, value, &address, &shape);
        if (status != nullptr) return fail_at(ort, op, tensor.name, status);
        if (!shape.present) continue;
        if (unknown != nullptr)
            return fail(ort, ORT_NOT_IMPLEMENTED, "%s: no input tells %s of %s; leave that output out of the graph",
                        op.name, unknown->text, tensor.name);
        if (tensor.alias < 0 || tensor.may_alias) continue;
        const char* source = op.tensors[tensor.alias].name;
        if (!inputs[tensor.alias].present || tensors[tensor.alias] != address)
            return fail(ort, ORT_INVALID_ARGUMENT, "%s: %s is not in the memory of %s; bind %s to the memory of %s",
                        op.name, tensor.name, source, tensor.name, source);
    }
    return nullptr;
}

OrtStatus* compute(void* kernel_address, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(kernel_address);
    const OrtApi& ort = *kernel.ort;
    const OpSpec& op = *kernel.op;
    void* tensors[kMaxTensors] = {};
    Shape shapes[kMaxTensors];
    char message[kMessageBytes] = "";
    QwenRtCall call = {};
    if (OrtStatus* status = open_inputs(kernel, context, tensors, shapes, &call)) return status;
    Symbols symbols(op);
    if (!symbols.solve(shapes, message, sizeof message))
        return fail(ort, ORT_INVALID_ARGUMENT, "%s: %s", op.name, message);
    if (OrtStatus* status = open_outputs(kernel, context, symbols, shapes, tensors)) return status;
    if (OrtStatus* status = ort.KernelContext_GetGPUComputeStream(context, &call.stream)) return status;

    call.abi = QWEN_RT_ABI;
    call.num_tensors = op.num_inputs + op.num_outputs;
    call.num_dims = op.num_dims;
    call.num_attributes = op.num_attributes;
    call.tensors = tensors;
    call.dims = symbols.values();
    call.attributes = kernel.attributes;
    call.message = message;
    call.message_bytes = sizeof message;
    const int32_t status = qwen_rt_launch(op.name, &call);
    if (status == QWEN_RT_OK) return nullptr;
    if (message[0] == '\0') snprintf(message, sizeof message, "status %d", static_cast<int>(status));
    const OrtErrorCode code = status == QWEN_RT_INVALID       ? ORT_INVALID_ARGUMENT
                              : status == QWEN_RT_UNSUPPORTED ? ORT_NOT_IMPLEMENTED
                                                              : ORT_FAIL;
    return fail(ort, code, "%s: %s", op.name, message);
}

// ---- registration ----

constexpr int kCacheTypes[] = {QWEN_RT_CACHE_TYPES};
constexpr int kNumCacheTypes = sizeof(kCacheTypes) / sizeof(kCacheTypes[0]);

bool has_cache(const OpSpec& spec) {
    for (int i = 0; i < spec.num_inputs; ++i)
        if (spec.tensors[i].element_type == kCacheType) return true;
    return false;
}

template <int op>
constexpr BoundOp bind_op(int cache_type) {
    BoundOp bound = {};
    bound.version = QWEN_RT_ORT_API_VERSION;
    bound.GetName = name_of;
    bound.GetExecutionProviderType = provider_of;
    bound.GetInputType = input_type;
    bound.GetInputTypeCount = num_inputs;
    bound.GetOutputType = output_type;
    bound.GetOutputTypeCount = num_outputs;
    bound.KernelDestroy = destroy_kernel;
    bound.GetInputCharacteristic = input_kind;
    bound.GetOutputCharacteristic = output_kind;
    bound.GetInputMemoryType = memory_type;
    bound.GetVariadicInputMinArity = bound.GetVariadicOutputMinArity = variadic_min;
    bound.GetVariadicInputHomogeneity = bound.GetVariadicOutputHomogeneity = variadic_homogeneity;
    bound.CreateKernelV2 = create_kernel;
    bound.KernelComputeV2 = compute;
    bound.GetMayInplace = pairs<op, true>;
    bound.GetAliasMap = pairs<op, false>;
    bound.ReleaseMayInplace = bound.ReleaseAliasMap = keep_pairs;
    bound.spec = &kOps[op];
    bound.cache_type = cache_type;
    return bound;
}

// All ops for each type of cache, one type after another.
template <int... numbers>
const BoundOp* bind_ops(std::integer_sequence<int, numbers...>) {
    static constexpr BoundOp bound[] = {bind_op<numbers % kNumOps>(kCacheTypes[numbers / kNumOps])...};
    return bound;
}

// One domain for every copy of ONNX Runtime, made at its first registration; session options only borrow it.
class Domains {
public:
    ~Domains() {
        for (int i = 0; i < count_; ++i) made_[i].ort->ReleaseCustomOpDomain(made_[i].domain);
    }

    OrtStatus* get(const OrtApi& ort, OrtCustomOpDomain** out) {
        const std::lock_guard<std::mutex> guard(mutex_);
        for (int i = 0; i < count_; ++i)
            if (made_[i].ort == &ort) {
                *out = made_[i].domain;
                return nullptr;
            }
        if (count_ == kMaxRuntimes)
            return fail(ort, ORT_FAIL, "%s: more than %d copies of ONNX Runtime", QWEN_RT_DOMAIN, kMaxRuntimes);
        OrtCustomOpDomain* domain = nullptr;
        if (OrtStatus* status = ort.CreateCustomOpDomain(QWEN_RT_DOMAIN, &domain)) return status;
        const BoundOp* ops = bind_ops(std::make_integer_sequence<int, kNumOps * kNumCacheTypes>());
        for (int i = 0; i < kNumOps * kNumCacheTypes; ++i) {
            if (i >= kNumOps && !has_cache(*ops[i].spec)) continue;
            if (OrtStatus* status = ort.CustomOpDomain_Add(domain, &ops[i])) {
                ort.ReleaseCustomOpDomain(domain);
                return status;
            }
        }
        made_[count_++] = {&ort, domain};
        *out = domain;
        return nullptr;
    }

private:
    struct Made {
        const OrtApi* ort;
        OrtCustomOpDomain* domain;
    };
    std::mutex mutex_;
    int count_ = 0;
    Made made_[kMaxRuntimes] = {};
};

Domains domains;

}  // namespace

// The entry point that ONNX Runtime looks for in a library of custom ops.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                              const OrtApiBase* base) {
    const char* version = base->GetVersionString();
    int major = 0, minor = 0;
    const bool is_known = version != nullptr && sscanf(version, "%d.%d", &major, &minor) == 2;
    const bool is_new = is_known && (major > 1 || (major == 1 && minor >= QWEN_RT_ORT_API_VERSION));
    const OrtApi* ort = is_new ? base->GetApi(QWEN_RT_ORT_API_VERSION) : nullptr;
    if (ort == nullptr) {
        ort = base->GetApi(1);  // has CreateStatus; without it there is no way to say anything
        return ort == nullptr ? nullptr
                              : fail(*ort, ORT_NOT_IMPLEMENTED,
                                     "%s: ONNX Runtime %s cannot run these ops; expected 1.%d or newer; install "
                                     "onnxruntime-gpu anew",
                                     QWEN_RT_DOMAIN, version != nullptr ? version : "?", QWEN_RT_ORT_API_VERSION);
    }
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = domains.get(*ort, &domain)) return status;
    return ort->AddCustomOpDomain(options, domain);
}
