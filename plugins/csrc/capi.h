/* The C ABI of libqwen_rt_plugins.so: one entry per op of core/ops.py, all of one signature.
 *
 * A binding needs the op table and this header, nothing op by op: it fills `tensors` with the inputs and then the outputs
 * in table order (NULL for an optional one that is absent; an output that aliases an input is the same pointer), `dims`
 * with the values of the row's symbolic dimensions in table order, `attributes` with its numbers in table order.
 *
 * Launchers allocate nothing, never synchronise, and only enqueue on `stream`; they may be captured in a CUDA graph. They
 * return QWEN_RT_OK, or another status and one line in `message`.
 */
#ifndef QWEN_RT_CAPI_H
#define QWEN_RT_CAPI_H

#include <stdint.h>

#define QWEN_RT_ABI 2
#define QWEN_RT_COUNTER_BYTES 65536 /* start of every workspace: zeroed once by the caller, left zero by every op */

#ifdef __cplusplus
extern "C" {
#endif

enum {
    QWEN_RT_OK = 0,
    QWEN_RT_INVALID = 1,     /* a pointer missing or unaligned, a count that cannot be */
    QWEN_RT_UNSUPPORTED = 2, /* a shape or a device that no kernel is made for */
    QWEN_RT_CUDA_ERROR = 3   /* the driver refused the launch */
};

enum { QWEN_RT_NO_DEPENDENT_LAUNCH = 1 /* start only when all work before on the stream is complete */ };

typedef struct QwenRtCall {
    int32_t abi; /* QWEN_RT_ABI */
    int32_t num_tensors;
    int32_t num_dims;
    int32_t num_attributes;
    void* const* tensors;
    const int64_t* dims;
    const double* attributes;
    void* workspace; /* at least qwen_rt_workspace_bytes() of device memory, QWEN_RT_COUNTER_BYTES of zeros first; NULL if 0.
                        Ops that run one after another on a stream may share it */
    int64_t workspace_bytes;
    void* stream; /* cudaStream_t */
    int64_t flags;
    char* message; /* receives one line when the status is not QWEN_RT_OK; may be NULL */
    int64_t message_bytes;
} QwenRtCall;

/* Enqueue the op named `op`. */
int32_t qwen_rt_launch(const char* op, const QwenRtCall* call);

/* Device bytes that the op wants for these dims on the current device, counters included (0: none); -1 if there is no such op. */
int64_t qwen_rt_workspace_bytes(const char* op, const int64_t* dims, int32_t num_dims);

/* "abi=2 sources=<sha256> sms=90 nvcc=13.0 ops=embed:1,...": what the library was built from. */
const char* qwen_rt_build_info(void);

/* Enqueue a kernel that reads `num_bytes` once, to measure read bandwidth; `sink` is 4 bytes of device memory. */
int32_t qwen_rt_read_probe(const void* data, int64_t num_bytes, void* sink, int32_t variant, void* stream);

#ifdef __cplusplus
}
#endif

#endif
