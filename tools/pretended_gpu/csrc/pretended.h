/* A pretended GPU: what the files of this folder share.
 *
 * counters.c  what is counted, and how Python reads it        runtime.c   the runtime API (libcudart)
 * memory.c    device and pinned memory, and copies            driver.c    the driver API (libcuda), as far as Triton
 * capture.c   streams, events, captures and graphs                        and torch use it
 * device.c    what the GPU says of itself                     products.c  cuBLAS and cuBLASLt
 * symbols.c   the check that torch finds all that it needs    nccl.c      collectives that do nothing
 */
#ifndef PRETENDED_H
#define PRETENDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* All is hidden but what CUDA's headers declare, and what is marked EXPORTED. */
#pragma GCC visibility push(default)
#include <cuda.h>
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#define EXPORTED __attribute__((visibility("default")))

/* counters.c */

/* `captured_*` are counted while a stream is captured, `replayed_*` when a graph of them is launched; the plain names
 * count what runs at once. */
#define COUNTERS(X)                                                                                                   \
    X(runtime_launches) X(driver_launches) X(products)                                                                \
    X(h2d_pinned) X(h2d_pinned_bytes) X(h2d_pageable) X(h2d_pageable_bytes) X(h2d_synchronous)                        \
    X(h2d_synchronous_bytes)                                                                                          \
    X(d2h_pinned) X(d2h_pinned_bytes) X(d2h_pageable) X(d2h_pageable_bytes) X(d2h_synchronous)                        \
    X(d2h_synchronous_bytes)                                                                                          \
    X(d2d) X(d2d_bytes) X(h2h) X(h2h_bytes) X(memsets) X(memset_bytes) X(values_left_out)                             \
    X(stream_waits) X(event_waits) X(device_waits) X(stream_queries) X(event_queries)                                 \
    X(event_records) X(stream_wait_events)                                                                            \
    X(device_mallocs) X(device_frees) X(device_bytes) X(device_bytes_peak)                                            \
    X(host_allocs) X(host_frees) X(host_registers) X(host_bytes)                                                      \
    X(graph_captures) X(graph_instantiations) X(graph_launches)                                                       \
    X(captured_kernels) X(captured_products) X(captured_copies) X(captured_memsets) X(captured_others)                \
    X(replayed_kernels) X(replayed_products) X(replayed_copies) X(replayed_memsets) X(replayed_others)                \
    X(refusals) X(work_beside_capture) X(collectives) X(unwritten_calls)

enum counter {
#define AS_ENUM(name) COUNT_##name,
    COUNTERS(AS_ENUM)
#undef AS_ENUM
    COUNTER_COUNT
};

void count(enum counter which);
void count_by(enum counter which, uint64_t amount);
void uncount_by(enum counter which, uint64_t amount); /* of the levels: device_bytes, host_bytes */
void note_device_peak(void);

/* An integer of the environment, or `otherwise`. */
uint64_t setting(const char *name, uint64_t otherwise);

/* Says one line on the standard error. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* device.c */

int device_count(void);
int current_device(void); /* of this thread */
bool device_is_used(int device);
cudaError_t use_device(int device);
int device_attribute(int attribute); /* numbers of enum cudaDeviceAttr; CUdevice_attribute has the same */
extern const size_t DEVICE_BYTES;
extern const char DEVICE_NAME[];

/* memory.c */

enum place { PAGEABLE, PINNED, DEVICE };

struct range {
    uintptr_t begin;
    size_t bytes;
    enum place place;
    int device;
    bool ours; /* mapped here, and unmapped when it is freed; else registered by its owner */
};

/* The range of memory that holds the address; `found.place` is PAGEABLE where nobody has told us of it. */
struct range range_of(const void *address);

size_t device_bytes_free(int device);

cudaError_t device_alloc(void **address, size_t bytes);
cudaError_t device_free(void *address);
cudaError_t host_alloc(void **address, size_t bytes);
cudaError_t host_free(void *address);
cudaError_t host_register(void *address, size_t bytes);
cudaError_t host_unregister(void *address);

/* A copy, a memset or a call of a host function, as it runs at once or lies in a graph. */
struct transfer {
    enum { COPY, MEMSET, HOST_CALL } kind;
    enum cudaMemcpyKind direction;
    void *to;
    const void *from;
    size_t bytes; /* of a row */
    size_t rows, pitch_to, pitch_from;
    int value;
    cudaHostFn_t call;
    void *argument;
};

/* Fills in the direction of a `cudaMemcpyDefault`. */
enum cudaMemcpyKind direction_of(void *to, const void *from, enum cudaMemcpyKind said);

/* Whether a copy touches host memory that is not pinned. */
bool is_pageable(const struct transfer *copy);

void count_transfer(const struct transfer *transfer, bool synchronous);

/* Carries it out, unless it is larger than the limits of the environment. */
void carry_out(const struct transfer *transfer);

/* capture.c */

enum node { KERNEL, PRODUCT, COPY_NODE, MEMSET_NODE, OTHER, NODE_KINDS };

/* A kernel, product or other work put on a stream. `*runs` says whether it runs now, and is then the caller's to count;
 * in a capture it has become a node. Any error is CUDA's for such work while a stream is captured. */
cudaError_t put(const char *what, CUstream stream, enum node kind, bool *runs);

/* A copy, memset or host call put on a stream, counted and carried out. */
cudaError_t put_transfer(const char *what, CUstream stream, const struct transfer *transfer);

/* Whether a call that CUDA takes for unsafe may be made now: cudaSuccess, or why not. */
cudaError_t check_unsafe(const char *what);

/* The same for calls that work on the legacy stream and wait for it. */
cudaError_t check_synchronous(const char *what);

cudaError_t stream_create(CUstream *stream, unsigned flags, int priority);
cudaError_t stream_destroy(CUstream stream);
cudaError_t stream_priority(CUstream stream, int *priority);
cudaError_t stream_flags(CUstream stream, unsigned *flags);
cudaError_t stream_wait(const char *what, CUstream stream);
cudaError_t stream_query(const char *what, CUstream stream);
cudaError_t stream_wait_event(CUstream stream, CUevent event, unsigned flags);
cudaError_t device_wait(const char *what);

cudaError_t event_create(CUevent *event, unsigned flags);
cudaError_t event_destroy(CUevent event);
cudaError_t event_record(CUevent event, CUstream stream, unsigned flags);
cudaError_t event_wait(const char *what, CUevent event);
cudaError_t event_query(const char *what, CUevent event);
cudaError_t event_elapsed(float *milliseconds, CUevent begin, CUevent end);

cudaError_t capture_begin(CUstream stream, enum cudaStreamCaptureMode mode);
cudaError_t capture_end(CUstream stream, CUgraph *graph);
cudaError_t capture_status(CUstream stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                           CUgraph *graph);
cudaError_t exchange_capture_mode(enum cudaStreamCaptureMode *mode);

size_t graph_size(CUgraph graph);
cudaError_t graph_destroy(CUgraph graph);
cudaError_t graph_instantiate(CUgraphExec *executable, CUgraph graph);
cudaError_t graph_exec_destroy(CUgraphExec executable);
cudaError_t graph_launch(CUgraphExec executable, CUstream stream);

/* runtime.c */

const char *error_name(int error);
const char *error_text(int error);

/* driver.c */

void *driver_function(const char *name);

/* symbols.c */

/* A function of this library, or NULL. */
void *own_symbol(const char *name);

/* Ends the process with one line where torch wants a CUDA function that is not here. */
void check_symbols(void);

/* unwritten.c (made by build.py) */

/* What functions call that nobody has written: counts the call, and the first time says which it was. */
void unwritten_call(const char *name, char *told, const char *what_it_did);

struct unwritten {
    const char *name;
    void *function;
};
extern const struct unwritten unwritten_driver_functions[]; /* ends with a NULL name */

#endif
