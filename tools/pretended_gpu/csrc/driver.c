/* The driver API, as far as Triton and torch use it. Codes of errors are the runtime's. */
#include "pretended.h"

#include <stdio.h>
#include <string.h>

/* One context for each device; a handle is the address of its number. */
static int contexts[8] = {0, 1, 2, 3, 4, 5, 6, 7};

static CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }

static CUresult result(cudaError_t error) { return (CUresult)error; }

CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *devices) { return *devices = device_count(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
    (void)device;
    snprintf(name, (size_t)room, "%s", DEVICE_NAME);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    *value = device_attribute((int)attribute);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[15] = (char)device;
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { return (void)device, *bytes = DEVICE_BYTES, CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = context_of(current_device()), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return result(context ? use_device(*(int *)context) : cudaSuccess); }
CUresult cuCtxPushCurrent(CUcontext context) { return cuCtxSetCurrent(context); }
CUresult cuCtxPopCurrent(CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = current_device(), CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { return result(device_wait("cuCtxSynchronize")); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = context_of(device), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = device_is_used(device);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) { return *name = error_name((int)error), CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = error_text((int)error), CUDA_SUCCESS; }

/* Modules and kernels. */

/* Loading code allocates device memory: CUDA takes it for unsafe in a capture. A module is as good as another. */
static CUresult load(const char *what, CUmodule *module) {
    *module = (CUmodule)contexts;
    return result(check_unsafe(what));
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return (void)path, load("cuModuleLoad", module); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return (void)image, load("cuModuleLoadData", module); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned options, CUjit_option *names, void **values) {
    (void)image, (void)options, (void)names, (void)values;
    return load("cuModuleLoadDataEx", module);
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    (void)module, (void)name;
    *function = (CUfunction)contexts;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return (void)function, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) {
    return (void)function, (void)cache, CUDA_SUCCESS;
}

static CUresult launch(const char *what, CUstream stream) {
    bool runs;
    cudaError_t error = put(what, stream, KERNEL, &runs);
    if (runs) count(COUNT_driver_launches);
    return result(error);
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
    (void)function, (void)grid_x, (void)grid_y, (void)grid_z, (void)block_x, (void)block_y, (void)block_z;
    (void)shared, (void)parameters, (void)extra;
    return launch("cuLaunchKernel", stream);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **parameters) {
    (void)function, (void)grid_x, (void)grid_y, (void)grid_z, (void)block_x, (void)block_y, (void)block_z;
    (void)shared, (void)parameters;
    return launch("cuLaunchCooperativeKernel", stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction function, void **parameters, void **extra) {
    (void)function, (void)parameters, (void)extra;
    return launch("cuLaunchKernelEx", configuration->hStream);
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *configuration) {
    return (void)function, (void)configuration, *clusters = 1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    return result(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared));
}

/* Memory. */

CUresult cuMemGetInfo(size_t *free, size_t *total) { return result(cudaMemGetInfo(free, total)); }
CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) { return result(cudaMalloc((void **)address, bytes)); }
CUresult cuMemFree(CUdeviceptr address) { return result(cudaFree((void *)address)); }
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return result(cudaMemcpyAsync((void *)to, (void *)from, bytes, cudaMemcpyDefault, stream));
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    return result(cudaMemcpy((void *)to, from, bytes, cudaMemcpyHostToDevice));
}
CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    return result(cudaMemcpy(to, (void *)from, bytes, cudaMemcpyDeviceToHost));
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    return result(cudaMemcpyAsync((void *)to, from, bytes, cudaMemcpyHostToDevice, stream));
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return result(cudaMemcpyAsync(to, (void *)from, bytes, cudaMemcpyDeviceToHost, stream));
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return result(cudaMemcpyAsync((void *)to, (void *)from, bytes, cudaMemcpyDeviceToDevice, stream));
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    return result(cudaMemsetAsync((void *)to, value, bytes, stream));
}
CUresult cuMemGetAddressRange(CUdeviceptr *begin, size_t *bytes, CUdeviceptr address) {
    struct range range = range_of((void *)address);
    if (range.place == PAGEABLE) return CUDA_ERROR_NOT_FOUND;
    if (begin) *begin = range.begin;
    if (bytes) *bytes = range.bytes;
    return CUDA_SUCCESS;
}

/* As CUDA does: of memory that nobody has allocated or registered it says that the value is invalid. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    struct range range = range_of((void *)address);
    if (range.place == PAGEABLE) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = context_of(range.device); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)value = range.place == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (range.place == DEVICE) return CUDA_ERROR_INVALID_VALUE;
        *(void **)value = (void *)address;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = range.device; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = range.begin; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = range.bytes; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)value = range.begin; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

/* Streams and events. */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return result(stream_create(stream, flags, 0)); }
CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    return result(stream_create(stream, flags, priority));
}
CUresult cuStreamDestroy(CUstream stream) { return result(stream_destroy(stream)); }
CUresult cuStreamSynchronize(CUstream stream) { return result(stream_wait("cuStreamSynchronize", stream)); }
CUresult cuStreamQuery(CUstream stream) { return result(stream_query("cuStreamQuery", stream)); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    return result(stream_wait_event(stream, event, flags));
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return result(capture_status(stream, (enum cudaStreamCaptureStatus *)status, NULL, NULL));
}
CUresult cuEventCreate(CUevent *event, unsigned flags) { return result(event_create(event, flags)); }
CUresult cuEventDestroy(CUevent event) { return result(event_destroy(event)); }
CUresult cuEventRecord(CUevent event, CUstream stream) { return result(event_record(event, stream, 0)); }
CUresult cuEventSynchronize(CUevent event) { return result(event_wait("cuEventSynchronize", event)); }
CUresult cuEventQuery(CUevent event) { return result(event_query("cuEventQuery", event)); }

/* Finding functions. */

/* A driver function by its name without a version: written here, or made by build.py; NULL for one that the header of
 * this CUDA does not declare. */
void *driver_function(const char *name) {
    static const char *const versions[] = {"_v4", "_v3", "_v2", ""};
    char full[128];
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        snprintf(full, sizeof full, "%s%s", name, versions[i]);
        void *function = own_symbol(full);
        if (function) return function;
    }
    for (const struct unwritten *each = unwritten_driver_functions; each->name; each++)
        if (strcmp(each->name, name) == 0) return each->function;
    return NULL;
}

CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *found) {
    (void)version, (void)flags;
    *function = driver_function(name);
    if (found) *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    return (void)id, *table = NULL, CUDA_ERROR_NOT_FOUND;
}
