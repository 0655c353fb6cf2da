/* What the GPU says of itself: an H100 SXM, one or as many as PRETENDED_GPU_DEVICES says. */
#include "pretended.h"

#include <string.h>

enum { MOST_DEVICES = 8 };

const size_t DEVICE_BYTES = 80ull << 30;
const char DEVICE_NAME[] = "NVIDIA H100 80GB HBM3";

static __thread int current;
static bool used[MOST_DEVICES];

int device_count(void) {
    static int devices;
    if (devices == 0) {
        uint64_t asked = setting("PRETENDED_GPU_DEVICES", 1);
        devices = asked < 1 ? 1 : asked > MOST_DEVICES ? MOST_DEVICES : (int)asked;
    }
    return devices;
}

int current_device(void) { return current; }

bool device_is_used(int device) { return used[device]; }

cudaError_t use_device(int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    current = device;
    used[device] = true;
    return cudaSuccess;
}

int device_attribute(int attribute) {
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1 << 10;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;       /* kHz */
    case cudaDevAttrMemoryClockRate: return 2619000; /* kHz */
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0;
    }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    strcpy(p->name, DEVICE_NAME);
    p->uuid.bytes[15] = (char)device;
    p->pciBusID = device;
    p->major = device_attribute(cudaDevAttrComputeCapabilityMajor);
    p->minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
    p->totalGlobalMem = DEVICE_BYTES;
    p->multiProcessorCount = device_attribute(cudaDevAttrMultiProcessorCount);
    p->sharedMemPerBlock = device_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    p->regsPerBlock = device_attribute(cudaDevAttrMaxRegistersPerBlock);
    p->regsPerMultiprocessor = device_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p->warpSize = device_attribute(cudaDevAttrWarpSize);
    p->maxThreadsPerBlock = device_attribute(cudaDevAttrMaxThreadsPerBlock);
    p->maxThreadsPerMultiProcessor = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = device_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = device_attribute(cudaDevAttrMaxBlockDimX + i);
        p->maxGridSize[i] = device_attribute(cudaDevAttrMaxGridDimX + i);
    }
    p->l2CacheSize = device_attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->totalConstMem = device_attribute(cudaDevAttrTotalConstantMemory);
    p->unifiedAddressing = p->concurrentKernels = p->streamPrioritiesSupported = 1;
    p->cooperativeLaunch = p->memoryPoolsSupported = 1;
#if CUDART_VERSION < 13000
    p->clockRate = device_attribute(cudaDevAttrClockRate);
    p->memoryClockRate = device_attribute(cudaDevAttrMemoryClockRate);
#endif
    return cudaSuccess;
}
