/* Device and pinned memory, and copies. "Device" memory is ordinary memory that nothing is written to but by copies:
 * pages that are never touched take up nothing. */
#define _GNU_SOURCE
#include "pretended.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct range *ranges; /* by address; they do not overlap */
static size_t used, room;

/* The index of the first range that begins after the address. */
static size_t index_after(uintptr_t address) {
    size_t low = 0, high = used;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].begin <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void insert(struct range range) {
    if (used == room) {
        room = room ? 2 * room : 256;
        ranges = realloc(ranges, room * sizeof *ranges);
        if (ranges == NULL) abort();
    }
    size_t at = index_after(range.begin);
    memmove(ranges + at + 1, ranges + at, (used - at) * sizeof *ranges);
    ranges[at] = range;
    used++;
}

/* Takes out the range that begins at the address and lies in `place`; false where there is none. */
static bool take(uintptr_t begin, enum place place, bool ours, struct range *taken) {
    size_t after = index_after(begin);
    if (after == 0) return false;
    struct range found = ranges[after - 1];
    if (found.begin != begin || found.place != place || found.ours != ours) return false;
    memmove(ranges + after - 1, ranges + after, (used - after) * sizeof *ranges);
    used--;
    *taken = found;
    return true;
}

struct range range_of(const void *address) {
    struct range found = {.place = PAGEABLE, .device = -1};
    pthread_mutex_lock(&lock);
    size_t after = index_after((uintptr_t)address);
    if (after > 0 && (uintptr_t)address < ranges[after - 1].begin + ranges[after - 1].bytes) found = ranges[after - 1];
    pthread_mutex_unlock(&lock);
    return found;
}

static cudaError_t map(void **address, size_t bytes, enum place place) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *address = NULL;
    if (bytes == 0) return cudaSuccess;
    void *begin = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (begin == MAP_FAILED) return cudaErrorMemoryAllocation;
    struct range range = {(uintptr_t)begin, bytes, place, current_device(), true};
    pthread_mutex_lock(&lock);
    insert(range);
    pthread_mutex_unlock(&lock);
    *address = begin;
    return cudaSuccess;
}

static bool unmap(void *address, enum place place, size_t *bytes) {
    struct range range;
    pthread_mutex_lock(&lock);
    bool found = take((uintptr_t)address, place, true, &range);
    pthread_mutex_unlock(&lock);
    if (!found) return false;
    munmap((void *)range.begin, range.bytes);
    *bytes = range.bytes;
    return true;
}

/* Bytes of a device's allocations. */
static size_t taken_of(int device) {
    size_t bytes = 0;
    for (size_t i = 0; i < used; i++)
        if (ranges[i].place == DEVICE && ranges[i].device == device) bytes += ranges[i].bytes;
    return bytes;
}

size_t device_bytes_free(int device) {
    pthread_mutex_lock(&lock);
    size_t taken = taken_of(device);
    pthread_mutex_unlock(&lock);
    return DEVICE_BYTES - taken;
}

cudaError_t device_alloc(void **address, size_t bytes) {
    if (bytes > device_bytes_free(current_device())) return cudaErrorMemoryAllocation;
    cudaError_t error = map(address, bytes, DEVICE);
    if (error != cudaSuccess) return error;
    use_device(current_device());
    count(COUNT_device_mallocs);
    count_by(COUNT_device_bytes, bytes);
    note_device_peak();
    return cudaSuccess;
}

cudaError_t device_free(void *address) {
    size_t bytes;
    if (address == NULL) return cudaSuccess;
    if (!unmap(address, DEVICE, &bytes)) return cudaErrorInvalidValue;
    count(COUNT_device_frees);
    uncount_by(COUNT_device_bytes, bytes);
    return cudaSuccess;
}

cudaError_t host_alloc(void **address, size_t bytes) {
    cudaError_t error = map(address, bytes, PINNED);
    if (error != cudaSuccess) return error;
    count(COUNT_host_allocs);
    count_by(COUNT_host_bytes, bytes);
    return cudaSuccess;
}

cudaError_t host_free(void *address) {
    size_t bytes;
    if (address == NULL) return cudaSuccess;
    if (!unmap(address, PINNED, &bytes)) return cudaErrorInvalidValue;
    count(COUNT_host_frees);
    uncount_by(COUNT_host_bytes, bytes);
    return cudaSuccess;
}

cudaError_t host_register(void *address, size_t bytes) {
    if (address == NULL || bytes == 0) return cudaErrorInvalidValue;
    uintptr_t begin = (uintptr_t)address;
    pthread_mutex_lock(&lock);
    size_t after = index_after(begin + bytes - 1);
    bool overlaps = after > 0 && ranges[after - 1].begin + ranges[after - 1].bytes > begin;
    if (!overlaps) insert((struct range){begin, bytes, PINNED, current_device(), false});
    pthread_mutex_unlock(&lock);
    if (overlaps) return cudaErrorHostMemoryAlreadyRegistered;
    count(COUNT_host_registers);
    count_by(COUNT_host_bytes, bytes);
    return cudaSuccess;
}

cudaError_t host_unregister(void *address) {
    struct range range;
    pthread_mutex_lock(&lock);
    bool found = take((uintptr_t)address, PINNED, false, &range);
    pthread_mutex_unlock(&lock);
    if (!found) return cudaErrorHostMemoryNotRegistered;
    uncount_by(COUNT_host_bytes, range.bytes);
    return cudaSuccess;
}

/* Copies. */

enum cudaMemcpyKind direction_of(void *to, const void *from, enum cudaMemcpyKind said) {
    if (said != cudaMemcpyDefault) return said;
    bool to_device = range_of(to).place == DEVICE, from_device = range_of(from).place == DEVICE;
    if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
    return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

bool is_pageable(const struct transfer *copy) {
    if (copy->kind != COPY) return false;
    switch (copy->direction) {
    case cudaMemcpyHostToDevice: return range_of(copy->from).place == PAGEABLE;
    case cudaMemcpyDeviceToHost: return range_of(copy->to).place == PAGEABLE;
    case cudaMemcpyHostToHost: return range_of(copy->to).place == PAGEABLE || range_of(copy->from).place == PAGEABLE;
    default: return false;
    }
}

/* Counters of copies come in pairs: how many, and their bytes. */
static void count_copy(enum counter which, size_t bytes) {
    count(which);
    count_by(which + 1, bytes);
}

void count_transfer(const struct transfer *transfer, bool synchronous) {
    size_t bytes = transfer->bytes * transfer->rows;
    if (transfer->kind == HOST_CALL) return;
    if (transfer->kind == MEMSET) {
        count_copy(COUNT_memsets, bytes);
        return;
    }
    bool pageable = is_pageable(transfer);
    switch (transfer->direction) {
    case cudaMemcpyHostToDevice:
        count_copy(synchronous ? COUNT_h2d_synchronous : pageable ? COUNT_h2d_pageable : COUNT_h2d_pinned, bytes);
        break;
    case cudaMemcpyDeviceToHost:
        count_copy(synchronous ? COUNT_d2h_synchronous : pageable ? COUNT_d2h_pageable : COUNT_d2h_pinned, bytes);
        break;
    case cudaMemcpyHostToHost: count_copy(COUNT_h2h, bytes); break;
    default: count_copy(COUNT_d2d, bytes);
    }
}

/* The largest transfer whose values are written: those with the host by default up to 4 MiB, those within the device
 * not at all, as they would take time that a GPU's host does not spend. */
static size_t limit_of(const struct transfer *transfer) {
    static size_t with_host, within_device;
    static bool known;
    if (!known) {
        with_host = setting("PRETENDED_GPU_HOST_COPY_LIMIT", 4 << 20);
        within_device = setting("PRETENDED_GPU_DEVICE_COPY_LIMIT", 0);
        known = true;
    }
    bool device_alone = transfer->kind == MEMSET || transfer->direction == cudaMemcpyDeviceToDevice;
    return device_alone ? within_device : with_host;
}

void carry_out(const struct transfer *transfer) {
    if (transfer->kind == HOST_CALL) {
        transfer->call(transfer->argument);
        return;
    }
    if (transfer->bytes * transfer->rows > limit_of(transfer)) {
        count(COUNT_values_left_out);
        return;
    }
    for (size_t row = 0; row < transfer->rows; row++) {
        char *to = (char *)transfer->to + row * transfer->pitch_to;
        if (transfer->kind == MEMSET) memset(to, transfer->value, transfer->bytes);
        else memmove(to, (const char *)transfer->from + row * transfer->pitch_from, transfer->bytes);
    }
}
