/* The runtime API, as far as torch uses it. What is left is made by build.py: it returns success, and says so once. */
#include "pretended.h"

#include <stdio.h>
#include <string.h>

/* Errors. */

static const struct {
    int code;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

enum { ERRORS = sizeof errors / sizeof *errors };

const char *error_name(int error) {
    for (int i = 0; i < ERRORS; i++)
        if (errors[i].code == error) return errors[i].name;
    return "cudaErrorUnknown";
}

const char *error_text(int error) {
    for (int i = 0; i < ERRORS; i++)
        if (errors[i].code == error) return errors[i].text;
    return "unknown error";
}

static __thread cudaError_t last_error;

/* Remembers an error for cudaGetLastError. */
static cudaError_t done(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

const char *cudaGetErrorName(cudaError_t error) { return error_name(error); }
const char *cudaGetErrorString(cudaError_t error) { return error_text(error); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

/* Devices. */

cudaError_t cudaGetDeviceCount(int *devices) { return *devices = device_count(), cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current_device(), cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return done(use_device(device)); }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return done(device_wait("cudaDeviceSynchronize")); }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return (void)peer, (void)flags, cudaSuccess; }
EXPORTED cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORTED cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= device_count()) return done(cudaErrorInvalidDevice);
    *value = device_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int room, int device) {
    snprintf(text, (size_t)room, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = device_bytes_free(current_device());
    *total = DEVICE_BYTES;
    return cudaSuccess;
}

/* Memory. */

/* Makes `call` where the capture that may be going on allows an unsafe call. */
#define IF_SAFE(call)                                                                                                 \
    do {                                                                                                              \
        cudaError_t refused = check_unsafe(__func__);                                                                 \
        return done(refused != cudaSuccess ? refused : (call));                                                       \
    } while (0)

cudaError_t cudaMalloc(void **address, size_t bytes) { IF_SAFE(device_alloc(address, bytes)); }
cudaError_t cudaFree(void *address) { IF_SAFE(device_free(address)); }
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    IF_SAFE(host_alloc(address, bytes));
}
cudaError_t cudaMallocHost(void **address, size_t bytes) { IF_SAFE(host_alloc(address, bytes)); }
cudaError_t cudaFreeHost(void *address) { IF_SAFE(host_free(address)); }
cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    (void)flags;
    IF_SAFE(host_register(address, bytes));
}
cudaError_t cudaHostUnregister(void *address) { IF_SAFE(host_unregister(address)); }

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    (void)flags;
    *device = host;
    return done(range_of(host).place == PINNED ? cudaSuccess : cudaErrorInvalidValue);
}

/* In a capture an allocation becomes a node; the memory is there at once. */
cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
    bool runs;
    cudaError_t error = put("cudaMallocAsync", stream, OTHER, &runs);
    return done(error != cudaSuccess ? error : device_alloc(address, bytes));
}

/* Memory freed in a capture stays, as the graph works on it. */
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
    bool runs;
    cudaError_t error = put("cudaFreeAsync", stream, OTHER, &runs);
    return done(error != cudaSuccess || !runs ? error : device_free(address));
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    struct range range = range_of(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->device = range.device;
    attributes->type = cudaMemoryTypeUnregistered;
    if (range.place == PAGEABLE) {
        attributes->device = -2; /* cudaInvalidDeviceId: what CUDA says of memory that it does not know */
        attributes->hostPointer = (void *)address;
        return cudaSuccess;
    }
    attributes->devicePointer = (void *)address;
    attributes->type = range.place == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    if (range.place == PINNED) attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

static struct transfer copy_of(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return (struct transfer){
        .kind = COPY, .direction = direction_of(to, from, kind), .to = to, .from = from, .bytes = bytes, .rows = 1};
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    struct transfer copy = copy_of(to, from, bytes, kind);
    return done(put_transfer("cudaMemcpyAsync", stream, &copy));
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = check_synchronous("cudaMemcpy");
    if (error != cudaSuccess) return done(error);
    struct transfer copy = copy_of(to, from, bytes, kind);
    count_transfer(&copy, true);
    carry_out(&copy);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t pitch_to, const void *from, size_t pitch_from, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    struct transfer copy = copy_of(to, from, width, kind);
    copy.rows = height;
    copy.pitch_to = pitch_to;
    copy.pitch_from = pitch_from;
    return done(put_transfer("cudaMemcpy2DAsync", stream, &copy));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    (void)to_device, (void)from_device;
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    struct transfer memset_ = {.kind = MEMSET, .to = to, .value = value, .bytes = bytes, .rows = 1};
    return done(put_transfer("cudaMemsetAsync", stream, &memset_));
}

/* Put on the legacy stream, and not waited for. */
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    cudaError_t error = check_synchronous("cudaMemset");
    return error != cudaSuccess ? done(error) : cudaMemsetAsync(to, value, bytes, cudaStreamLegacy);
}

/* A variable of the device lives where the host has its shadow, which is as large. */
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return *address = (void *)symbol, cudaSuccess; }

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaMemcpy((char *)symbol + offset, from, bytes, kind);
}

/* Streams and events. */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return stream_create(stream, cudaStreamDefault, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return stream_create(stream, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return stream_create(stream, flags, priority);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return done(stream_destroy(stream)); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return stream_priority(stream, priority); }
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) { return stream_flags(stream, flags); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return done(stream_wait("cudaStreamSynchronize", stream)); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return done(stream_query("cudaStreamQuery", stream)); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return done(stream_wait_event(stream, event, flags));
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return event_create(event, cudaEventDefault); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return event_create(event, flags); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return done(event_destroy(event)); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return done(event_record(event, stream, cudaEventRecordDefault));
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return done(event_record(event, stream, flags));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return done(event_wait("cudaEventSynchronize", event)); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return done(event_query("cudaEventQuery", event)); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    return done(event_elapsed(milliseconds, begin, end));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *argument) {
    struct transfer host_call = {.kind = HOST_CALL, .call = call, .argument = argument};
    return done(put_transfer("cudaLaunchHostFunc", stream, &host_call));
}

/* Prohibited in a capture, as CUDA has it. */
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *argument, unsigned flags) {
    (void)flags;
    enum cudaStreamCaptureStatus status;
    cudaError_t error = capture_status(stream, &status, NULL, NULL);
    if (error == cudaSuccess && status != cudaStreamCaptureStatusNone) error = stream_wait(__func__, stream);
    if (error == cudaSuccess) call(stream, cudaSuccess, argument);
    return done(error);
}

/* Captures and graphs. */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return done(capture_begin(stream, mode));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { return done(capture_end(stream, graph)); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return done(capture_status(stream, status, NULL, NULL));
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    return exchange_capture_mode(mode);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *number)
#else
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies, size_t *number)
#endif
{
#if CUDART_VERSION >= 13000
    if (edges) *edges = NULL;
#endif
    if (dependencies) *dependencies = NULL;
    if (number) *number = 0;
    return done(capture_status(stream, status, id, graph));
}

/* How many nodes; what they are is not told. */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *number) {
    if (nodes != NULL) return done(cudaErrorNotSupported);
    *number = graph_size(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return done(graph_destroy(graph)); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    return done(graph_instantiate(executable, graph));
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return done(graph_exec_destroy(executable)); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    return done(graph_launch(executable, stream));
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) {
    (void)graph, (void)path, (void)flags;
    return done(cudaErrorNotSupported);
}

/* Kernels. */

/* What the compiler's stubs of kernels call; no header for C declares them. */
typedef struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} launch_configuration;

static __thread launch_configuration pushed;

EXPORTED void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    (void)binary;
    check_symbols();
    return handle;
}
EXPORTED void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
EXPORTED void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
EXPORTED void __cudaRegisterFunction(void **handle) { (void)handle; }
EXPORTED void __cudaRegisterVar(void **handle) { (void)handle; }
EXPORTED char __cudaInitModule(void **handle) { return (void)handle, 1; }

EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed = (launch_configuration){grid, block, shared, stream};
    return 0;
}

EXPORTED cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(cudaStream_t *)stream = pushed.stream;
    return cudaSuccess;
}

static cudaError_t launch(cudaStream_t stream) {
    bool runs;
    cudaError_t error = put("cudaLaunchKernel", stream, KERNEL, &runs);
    if (runs) count(COUNT_runtime_launches);
    return done(error);
}

EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    (void)kernel, (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(stream);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    (void)function, (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    (void)function, (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    (void)function, (void)arguments;
    return launch(configuration->stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return (void)function, (void)attribute, (void)value, cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    (void)function, (void)shared, (void)flags;
    *blocks = threads > 1024 ? 1 : 2048 / (threads > 0 ? threads : 1);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

/* Driver functions. */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    (void)version, (void)flags;
    *function = driver_function(name);
    if (*function == NULL)
        say("torch asked for the driver function %s, which its CUDA's header does not declare", name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, result);
}
#endif
