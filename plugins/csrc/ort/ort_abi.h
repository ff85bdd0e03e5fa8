/* The part of ONNX Runtime's C ABI that the binding uses, written down from its public documentation.
 *
 * The wheels of ONNX Runtime carry no headers. They need none here: OrtApi is a table of function pointers that is only
 * ever appended to, so an entry is known by its position for good, and a custom op is a table that we fill. Names are those
 * of ONNX Runtime; what is not used is padding. Functions that return OrtStatus* return NULL when all is well.
 *
 * Positions: members of OrtApi counted in the order of onnxruntime_c_api.h (onnxruntime.ai/docs/api/c/struct_ort_api.html;
 * docs.rs/ort-sys lists the same). The count agrees with the positions that ONNX Runtime itself nails down for the last
 * entry of a version: 101 ReleaseCustomOpDomain (1), 203 SynchronizeBoundOutputs (10), 254 GetBuildInfoString (15),
 * 284 SetEpDynamicOptions (20), 389 CreateExternalInitializerInfo (23). tests/plugins/test_ort_binding.py calls every one of
 * them through a session of the installed ONNX Runtime. */
#ifndef QWEN_RT_ORT_ABI_H
#define QWEN_RT_ORT_ABI_H

#include <cstddef>
#include <cstdint>

/* The version that brought the newest entry used, GetTensorElementTypeAndShapeDataReference: ONNX Runtime 1.24. */
#define QWEN_RT_ORT_API_VERSION 24

extern "C" {

struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtValue;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };

enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };

enum OrtMemType { OrtMemTypeDefault = 0 };

/* TensorProto.DataType; the op table has the numbers. */
typedef int ONNXTensorElementDataType;

struct OrtApi {
    OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);
    void* unused_1;
    const char* (*GetErrorMessage)(const OrtStatus* status);
    void* unused_3[23];
    OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** out);
    OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const struct OrtCustomOp* op); /* keeps the pointer */
    OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);    /* keeps the pointer */
    void* unused_29[22];
    OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
    void* unused_52[33];
    OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);
    OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* out);
    void* unused_87;
    OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* out);
    OrtStatus* (*KernelContext_GetOutputCount)(const OrtKernelContext* context, size_t* out);
    OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** out);
    OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank,
                                          OrtValue** out);
    void* unused_92;
    void (*ReleaseStatus)(OrtStatus* status);
    void* unused_94[7];
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);
    void* unused_102[91];
    OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** out);
    void* unused_194[220];
    /* Lends the shape instead of copying it into an object of its own. */
    OrtStatus* (*GetTensorElementTypeAndShapeDataReference)(const OrtValue* value, ONNXTensorElementDataType* type,
                                                            const int64_t** sizes, size_t* rank);
};

#define QWEN_RT_AT(entry, position) \
    static_assert(offsetof(OrtApi, entry) == (position) * sizeof(void*), #entry " is at another position")
QWEN_RT_AT(GetErrorMessage, 2);
QWEN_RT_AT(CreateCustomOpDomain, 26);
QWEN_RT_AT(AddCustomOpDomain, 28);
QWEN_RT_AT(GetTensorMutableData, 51);
QWEN_RT_AT(KernelInfoGetAttribute_float, 85);
QWEN_RT_AT(KernelContext_GetInputCount, 88);
QWEN_RT_AT(KernelContext_GetOutput, 91);
QWEN_RT_AT(ReleaseStatus, 93);
QWEN_RT_AT(ReleaseCustomOpDomain, 101);
QWEN_RT_AT(KernelContext_GetGPUComputeStream, 193);
QWEN_RT_AT(GetTensorElementTypeAndShapeDataReference, 414);
#undef QWEN_RT_AT

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version); /* NULL and a line on stderr for a version that it does not have */
    const char* (*GetVersionString)();         /* "1.31.1" */
};

/* What ONNX Runtime asks of a custom op. It keeps a pointer to it as long as a session uses the op. */
struct OrtCustomOp {
    uint32_t version; /* of the API that this table is of: says how far ONNX Runtime may read */
    void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info); /* not with the V2 form */
    const char* (*GetName)(const OrtCustomOp* op);
    const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
    ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp* op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp* op);
    ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp* op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
    void (*KernelCompute)(void* kernel, OrtKernelContext* context); /* not with the V2 form */
    void (*KernelDestroy)(void* kernel);
    OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
    OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
    OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
    int (*GetStartVersion)(const OrtCustomOp* op);
    int (*GetEndVersion)(const OrtCustomOp* op);
    /* Pairs (input, output) that may share memory, and that do. They get no `op`, so every op needs functions of its own. */
    size_t (*GetMayInplace)(int** inputs, int** outputs);
    void (*ReleaseMayInplace)(int* inputs, int* outputs);
    size_t (*GetAliasMap)(int** inputs, int** outputs);
    void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

#endif
