/* The CUDA runtime and the plugin library without a GPU: device memory is malloc's, streams run at once, captures keep what
 * was enqueued and replay it. Counts what is alive, refuses any chosen allocation, and takes versions, devices and memory
 * from the environment (FAKE_DRIVER, FAKE_RUNTIME, FAKE_DEVICES, FAKE_SM, FAKE_TOTAL).
 *
 * The model behind it is simple but needs everything the real one needs: a token is written into the cache where the
 * block table says, and the logits peak at a number made of all tokens of the sequence, read back through the table. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICE, PINNED, STREAM, EVENT, GRAPH, EXEC, KINDS };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t live[KINDS], live_bytes[16], allocations, fail_at = -1, launches;
static __thread int current; /* the calling thread's device */

typedef struct Node {
    void (*run)(void*);
    void* argument;
    struct Node* next;
} Node;
typedef struct { Node *first, *last; int kind; } Graph;
typedef struct { Graph* capture; } Stream;
typedef struct { int64_t size, device; char pad[240]; } Header;

static int64_t setting(const char* name, int64_t otherwise) {
    const char* text = getenv(name);
    return text ? atoll(text) : otherwise;
}

int64_t fake_live(int kind) { return live[kind]; }
int64_t fake_allocations(void) { return allocations; }
int64_t fake_launches(void) { return launches; }
void fake_fail_at(int64_t index) { allocations = 0; fail_at = index; }

static int refused(int kind) {
    pthread_mutex_lock(&lock);
    const int no = allocations++ == fail_at;
    if (!no) ++live[kind];
    pthread_mutex_unlock(&lock);
    return no ? 2 : 0;
}

static void gone(int kind) {
    pthread_mutex_lock(&lock);
    --live[kind];
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- device, memory */

int cudaDriverGetVersion(int* v) { *v = (int)setting("FAKE_DRIVER", 13000); return 0; }
int cudaRuntimeGetVersion(int* v) { *v = (int)setting("FAKE_RUNTIME", 13000); return 0; }
int cudaGetDeviceCount(int* v) { *v = (int)setting("FAKE_DEVICES", 1); return *v ? 0 : 100; }
int cudaSetDevice(int device) {
    if (device >= setting("FAKE_DEVICES", 1)) return 101;
    current = device;
    return 0;
}
int cudaDeviceGetAttribute(int* v, int attribute, int device) {
    const int sm = (int)setting("FAKE_SM", 90);
    *v = attribute == 75 ? sm / 10 : sm % 10;
    return device == current ? 0 : 101;
}
int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *total = (size_t)setting("FAKE_TOTAL", 8ll << 30);
    *free_bytes = *total - (size_t)live_bytes[current];
    return 0;
}
static int take(void** out, size_t size, int kind) {
    if (kind == DEVICE && live_bytes[current] + (int64_t)size > setting("FAKE_TOTAL", 8ll << 30)) return 2;
    if (refused(kind)) return 2;
    Header* header = aligned_alloc(256, (sizeof(Header) + size + 255) / 256 * 256);
    header->size = (int64_t)size;
    header->device = current;
    memset(header + 1, 0xA5, size < (64 << 20) ? size : (64 << 20)); /* what nobody has written is no zero */
    if (kind == DEVICE) live_bytes[current] += (int64_t)size;
    *out = header + 1;
    return 0;
}
static int give(void* pointer, int kind) {
    if (!pointer) return 0;
    Header* header = (Header*)pointer - 1;
    if (kind == DEVICE) live_bytes[header->device] -= header->size;
    free(header);
    gone(kind);
    return 0;
}
int cudaMalloc(void** out, size_t size) { return take(out, size, DEVICE); }
int cudaFree(void* pointer) { return give(pointer, DEVICE); }
int cudaHostAlloc(void** out, size_t size, unsigned flags) { return flags == 3 ? take(out, size, PINNED) : 1; }
int cudaFreeHost(void* pointer) { return give(pointer, PINNED); }
int cudaHostGetDevicePointer(void** out, void* host, unsigned flags) { *out = host; return (int)flags; }

/* ---------------------------------------------------------------- streams, events, graphs */

void fake_enqueue(Stream* stream, void (*run)(void*), const void* argument, size_t size) {
    if (!stream->capture) {
        run((void*)argument);
        return;
    }
    Node* node = calloc(1, sizeof(Node));
    node->run = run;
    node->argument = malloc(size);
    memcpy(node->argument, argument, size);
    if (stream->capture->last) stream->capture->last->next = node;
    else stream->capture->first = node;
    stream->capture->last = node;
}
int cudaStreamCreateWithFlags(void** out, unsigned flags) {
    if (flags != 1 || refused(STREAM)) return 2;
    *out = calloc(1, sizeof(Stream));
    return 0;
}
int cudaStreamDestroy(void* stream) { free(stream); gone(STREAM); return 0; }
int cudaStreamSynchronize(Stream* stream) { return stream->capture ? 900 : 0; }
int cudaStreamQuery(void* stream) { return stream ? 0 : 600; }
int cudaEventCreateWithFlags(void** out, unsigned flags) {
    if (refused(EVENT)) return 2;
    *out = calloc(1, 8);
    return flags ? 0 : 0;
}
int cudaEventDestroy(void* event) { free(event); gone(EVENT); return 0; }
int cudaEventRecord(int64_t* event, Stream* stream) { ++*event; return stream->capture ? 900 : 0; }
int cudaEventQuery(int64_t* event) { return *event ? 0 : 600; }
int cudaEventSynchronize(int64_t* event) { return *event < 0; }
int cudaEventElapsedTime(float* ms, int64_t* start, int64_t* stop) {
    *ms = 1.5f;
    return *start && *stop ? 0 : 600;
}
int cudaStreamBeginCapture(Stream* stream, int mode) {
    if (stream->capture || mode != 2) return 901;
    if (refused(GRAPH)) return 2;
    stream->capture = calloc(1, sizeof(Graph));
    stream->capture->kind = GRAPH;
    return 0;
}
int cudaStreamEndCapture(Stream* stream, Graph** out) { *out = stream->capture; stream->capture = NULL; return 0; }
static int drop(Graph* graph, int kind) {
    if (graph->kind != kind) return 1;
    for (Node *node = graph->first, *next; node; node = next) {
        next = node->next;
        free(node->argument);
        free(node);
    }
    free(graph);
    gone(kind);
    return 0;
}
int cudaGraphInstantiate(Graph** out, Graph* graph, unsigned long long flags) {
    if (flags || refused(EXEC)) return 2;
    *out = calloc(1, sizeof(Graph));
    **out = *graph;
    (*out)->kind = EXEC;
    graph->first = graph->last = NULL; /* moved */
    return 0;
}
int cudaGraphLaunch(Graph* exec, Stream* stream) {
    if (exec->kind != EXEC || stream->capture) return 1;
    ++launches;
    for (Node* node = exec->first; node; node = node->next) node->run(node->argument);
    return 0;
}
int cudaGraphExecDestroy(Graph* exec) { return drop(exec, EXEC); }
int cudaGraphDestroy(Graph* graph) { return drop(graph, GRAPH); }

typedef struct { void *to, *from; size_t size; int value; } Move;
static void move(void* argument) {
    Move* m = argument;
    if (m->from) memcpy(m->to, m->from, m->size);
    else memset(m->to, m->value, m->size);
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, Stream* stream) {
    Move m = {to, (void*)from, size, 0};
    fake_enqueue(stream, move, &m, sizeof(m));
    return kind == 4 ? 0 : 1;
}
int cudaMemsetAsync(void* to, int value, size_t size, Stream* stream) {
    Move m = {to, NULL, size, value};
    fake_enqueue(stream, move, &m, sizeof(m));
    return 0;
}
const char* cudaGetErrorName(int status) {
    return status == 2 ? "cudaErrorMemoryAllocation" : status == 100 ? "cudaErrorNoDevice" : "cudaErrorFake";
}
const char* cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "a fake error"; }
int cudaGetLastError(void) { return 0; }

/* ---------------------------------------------------------------- plugin library */

const char* qwen_rt_build_info(void) { return FAKE_BUILD_INFO; }
int64_t qwen_rt_workspace_bytes(const char* op, const int64_t* dims, int32_t num_dims) {
    return op && num_dims > 1 ? 65536 + 128 * dims[0] : -1;
}
/* Numbers that count up from the seed, in as many bytes as the element type (of ONNX) has. */
int32_t qwen_rt_fill_random(void* out, int64_t count, int32_t type, float size, uint64_t seed, void* stream) {
    const int bytes = type == 1 ? 4 : type == 10 || type == 16 ? 2 : 1;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t number = (uint32_t)(seed + (uint64_t)i);
        memcpy((char*)out + i * bytes, &number, bytes);
    }
    return stream && size > 0 ? 0 : 1;
}
int32_t qwen_rt_read_probe(void) { return 1; }

typedef struct {
    int32_t abi, num_tensors, num_dims, num_attributes;
    void* const* tensors;
    const int64_t* dims;
    const double* attributes;
    void* workspace;
    int64_t workspace_bytes;
    void* stream;
    int64_t flags;
    char* message;
    int64_t message_bytes;
} Call;
typedef struct { char* t[24]; int64_t d[5], num_tokens; } Sample;

static void sample(void* argument) {
    Sample* s = argument;
    const int64_t rows = s->d[0], vocab = s->d[1], edits = s->d[3], ring = s->d[4];
    const float *logits = (float*)s->t[0], *temperature = (float*)s->t[2];
    int64_t *positions = (int64_t*)s->t[1], *seeds = (int64_t*)s->t[6], *outputs = (int64_t*)s->t[7];
    const int32_t *slots = (int32_t*)s->t[9], *until = (int32_t*)s->t[13], *ids = (int32_t*)s->t[11];
    int32_t* counts = (int32_t*)s->t[10];
    int64_t *step = (int64_t*)s->t[14], slot = *step % ring;
    for (int64_t r = 0; r < rows; ++r) {
        float* x = malloc(4 * (size_t)vocab);
        memcpy(x, logits + r * vocab, 4 * (size_t)vocab);
        for (int64_t e = 0; e < edits; ++e)
            if (ids[r * edits + e] >= 0 && outputs[r] < until[r * edits + e])
                x[ids[r * edits + e]] += ((float*)s->t[12])[r * edits + e];
        int32_t* count = counts && slots[r] >= 0 ? counts + slots[r] * vocab : NULL;
        for (int64_t v = 0; count && v < vocab; ++v) /* frequency alone: the second of the three numbers */
            x[v] -= ((float*)s->t[8])[3 * r + 1] * (float)(count[v] & 0x7fffffff);
        int64_t best = 0;
        for (int64_t v = 1; v < s->num_tokens; ++v)
            if (x[v] > x[best]) best = v;
        if (temperature && temperature[r] >= 1e-5f)
            best = (int64_t)(((uint64_t)seeds[r] + (uint64_t)outputs[r]) % (uint64_t)s->num_tokens);
        const int bad = isnan(x[0]);
        ((int64_t*)s->t[15])[r] = best;
        if (s->t[16] && positions[r] >= 0) ++positions[r];
        if (s->t[17]) ++outputs[r];
        if (count) ++count[best];
        ((int64_t*)s->t[20])[slot * rows + r] = bad ? -2 : best;
        if (s->t[21]) {
            ((float*)s->t[21])[slot * rows + r] = logits[r * vocab + best];
            for (int k = 0; k < 20; ++k) {
                ((int32_t*)s->t[22])[(slot * rows + r) * 20 + k] = k < 18 ? (int32_t)(best + k) : -1;
                ((float*)s->t[23])[(slot * rows + r) * 20 + k] = -(float)k;
            }
        }
        free(x);
    }
    if (s->t[18] && !counts) abort();
    ++*step;
}
int32_t qwen_rt_launch(const char* op, const Call* call) {
    if (strcmp(op, "sample") || call->num_tensors != 24 || call->num_dims != 5 || call->num_attributes != 1) return 1;
    if (!call->workspace || call->workspace_bytes < 65536 || *(int64_t*)call->workspace) return 1; /* counters are zero */
    Sample s;
    memcpy(s.t, call->tensors, sizeof(s.t));
    memcpy(s.d, call->dims, sizeof(s.d));
    s.num_tokens = (int64_t)call->attributes[0];
    fake_enqueue(call->stream, sample, &s, sizeof(s));
    return 0;
}

/* ---------------------------------------------------------------- the model */

typedef struct {
    int64_t *ids, *positions;
    int32_t *query_starts, *tables;
    int64_t* indices;
    char *keys, *workspace;
    float* logits;
    int64_t tokens, rows, max_blocks, vocab, kv_heads, head_dim, num_blocks, item_bytes;
} Model;

static void model(void* argument) {
    Model* m = argument;
    const int64_t token_bytes = m->head_dim * m->item_bytes, block_bytes = m->kv_heads * 64 * token_bytes;
    for (int64_t b = 0; b < m->rows; ++b) {
        const int64_t begin = m->tokens == m->rows ? b : m->query_starts[b];
        const int64_t end = m->tokens == m->rows ? b + 1 : m->query_starts[b + 1];
        for (int64_t r = begin; r < end; ++r) {
            const int64_t p = m->positions[r];
            if (p < 0) continue;
            const int32_t block = m->tables[b * m->max_blocks + p / 64];
            if (block < 0 || block >= m->num_blocks) abort();
            *(int32_t*)(m->keys + block * block_bytes + p % 64 * token_bytes) = (int32_t)m->ids[r];
        }
        const int64_t last = m->tokens == m->rows ? m->positions[b] : m->positions[m->indices[b]];
        uint64_t sum = 0;
        for (int64_t p = 0; p <= last; ++p)
            sum += (uint64_t)(p + 1) * (uint64_t)*(int32_t*)(m->keys +
                   m->tables[b * m->max_blocks + p / 64] * block_bytes + p % 64 * token_bytes);
        const int64_t peak = (int64_t)((sum * 2654435761u >> 7) % (uint64_t)m->vocab);
        for (int64_t v = 0; v < m->vocab; ++v) m->logits[b * m->vocab + v] = v == peak ? 1 : v == peak + 1 ? 0.5f : 0;
        if (last >= 0 && *(int32_t*)(m->keys + m->tables[b * m->max_blocks] * block_bytes) == 13)
            m->logits[b * m->vocab] = NAN; /* a prompt that starts with token 13 breaks its row */
    }
    if (*(int64_t*)m->workspace) abort(); /* counters must be zero */
}
void fake_model(Stream* stream, const Model* m) { fake_enqueue(stream, model, m, sizeof(*m)); }
