/* Streams, events, captures and graphs, with what CUDA refuses while a stream is captured.
 *
 * All work is done as soon as it is asked for, so that outside captures streams and events have nothing to wait for.
 * Within a capture each stream has a clock: of every stream of the capture, how many of its nodes lie before whatever
 * comes next on this one. Recording an event copies the clock, waiting for the event takes the later of two clocks. So
 * a stream is joined when the origin's clock has reached its last node. */
#define _GNU_SOURCE
#include "pretended.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_STREAMS = 64 }; /* of one capture */

typedef uint32_t clock_of_streams[MOST_STREAMS];

struct CUgraph_st {
    uint64_t nodes[NODE_KINDS];
    struct transfer *transfers;
    size_t used, room;
};

struct CUgraphExec_st {
    struct CUgraph_st graph;
};

struct capture {
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
    CUstream streams[MOST_STREAMS]; /* the first is the origin; NULL: destroyed since */
    int used;
    clock_of_streams clocks[MOST_STREAMS];
    CUgraph graph;
    struct capture *next;
};

struct CUstream_st {
    unsigned flags;
    int priority;
    struct capture *capture;
    int slot; /* in the capture */
};

struct CUevent_st {
    unsigned flags;
    bool recorded;
    struct timespec time;
    unsigned long long capture; /* the id of the one that it was last recorded in, or 0 */
    clock_of_streams clock;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct capture *captures; /* those not ended; read without the lock only to see whether there are any */
static unsigned long long last_id;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread struct CUstream_st per_thread_stream;

static bool capturing(void) { return __atomic_load_n(&captures, __ATOMIC_ACQUIRE) != NULL; }

static bool is_legacy(CUstream stream) { return stream == NULL || stream == cudaStreamLegacy; }

static CUstream resolved(CUstream stream) { return stream == cudaStreamPerThread ? &per_thread_stream : stream; }

/* Refusals. */

static char last_refusal[160];

static cudaError_t refuse(const char *what, cudaError_t error) {
    count(COUNT_refusals);
    strncpy(last_refusal, what, sizeof last_refusal - 1);
    if (setting("PRETENDED_GPU_EXPLAIN", 0)) say("refused %s: %s", what, error_text(error));
    return error;
}

/* What was refused last, or an empty text. */
EXPORTED const char *pretended_gpu_last_refusal(void) { return last_refusal; }

/* Whether an unsafe call of this thread is prohibited by a capture. */
static bool prohibits(const struct capture *capture) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    if (pthread_equal(capture->thread, pthread_self())) return capture->mode != cudaStreamCaptureModeRelaxed;
    return thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
}

/* Whether the legacy stream would wait for a stream of the capture. */
static bool blocks_legacy(const struct capture *capture) {
    for (int i = 0; i < capture->used; i++)
        if (capture->streams[i] && !(capture->streams[i]->flags & cudaStreamNonBlocking)) return true;
    return false;
}

static bool any_capture(const struct capture *capture) {
    (void)capture;
    return true;
}

/* Invalidates the captures that `is_hit`: whether there were any. */
static bool invalidate(bool (*is_hit)(const struct capture *)) {
    bool any = false;
    for (struct capture *each = captures; each; each = each->next)
        if (is_hit(each)) any = each->invalid = true;
    return any;
}

static cudaError_t locked_check(const char *what, bool (*is_hit)(const struct capture *), cudaError_t error) {
    if (!capturing()) return cudaSuccess;
    pthread_mutex_lock(&lock);
    bool hit = invalidate(is_hit);
    pthread_mutex_unlock(&lock);
    return hit ? refuse(what, error) : cudaSuccess;
}

cudaError_t check_unsafe(const char *what) { return locked_check(what, prohibits, cudaErrorStreamCaptureUnsupported); }

cudaError_t check_synchronous(const char *what) {
    cudaError_t error = locked_check(what, blocks_legacy, cudaErrorStreamCaptureImplicit);
    return error != cudaSuccess ? error : check_unsafe(what);
}

cudaError_t device_wait(const char *what) {
    cudaError_t error = locked_check(what, any_capture, cudaErrorStreamCaptureUnsupported);
    if (error == cudaSuccess) count(COUNT_device_waits);
    return error;
}

cudaError_t exchange_capture_mode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

/* Graphs. */

static void add_nodes(CUgraph graph, enum node kind, uint64_t amount) {
    graph->nodes[kind] += amount;
    count_by(COUNT_captured_kernels + kind, amount);
}

static void add_transfer(CUgraph graph, const struct transfer *transfer) {
    if (graph->used == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 16;
        graph->transfers = realloc(graph->transfers, graph->room * sizeof *graph->transfers);
        if (graph->transfers == NULL) abort();
    }
    graph->transfers[graph->used++] = *transfer;
}

static void add_graph(CUgraph graph, const struct CUgraph_st *child) {
    for (int kind = 0; kind < NODE_KINDS; kind++) add_nodes(graph, kind, child->nodes[kind]);
    for (size_t i = 0; i < child->used; i++) add_transfer(graph, &child->transfers[i]);
}

size_t graph_size(CUgraph graph) {
    size_t nodes = 0;
    for (int kind = 0; kind < NODE_KINDS; kind++) nodes += graph->nodes[kind];
    return nodes;
}

cudaError_t graph_destroy(CUgraph graph) {
    if (graph == NULL) return cudaErrorInvalidValue;
    free(graph->transfers);
    free(graph);
    return cudaSuccess;
}

cudaError_t graph_instantiate(CUgraphExec *executable, CUgraph graph) {
    if (graph == NULL) return cudaErrorInvalidValue;
    *executable = calloc(1, sizeof **executable);
    struct CUgraph_st *copy = &(*executable)->graph;
    memcpy(copy->nodes, graph->nodes, sizeof copy->nodes);
    for (size_t i = 0; i < graph->used; i++) add_transfer(copy, &graph->transfers[i]);
    count(COUNT_graph_instantiations);
    return cudaSuccess;
}

cudaError_t graph_exec_destroy(CUgraphExec executable) {
    if (executable == NULL) return cudaErrorInvalidValue;
    free(executable->graph.transfers);
    free(executable);
    return cudaSuccess;
}

/* Work put on streams. */

/* What becomes of work put on a stream, with the lock held: `*into` is the capture that it is a node of, or NULL where
 * it runs now. */
static cudaError_t where(const char *what, CUstream stream, bool computes, struct capture **into) {
    *into = NULL;
    if (captures == NULL) return cudaSuccess; /* ended by another thread since the caller looked */
    if (is_legacy(stream)) {
        if (invalidate(blocks_legacy)) return refuse(what, cudaErrorStreamCaptureImplicit);
    } else if (stream->capture != NULL) {
        if (stream->capture->invalid) return refuse(what, cudaErrorStreamCaptureInvalidated);
        *into = stream->capture;
        return cudaSuccess;
    }
    count(COUNT_work_beside_capture);
    if (!computes || !setting("PRETENDED_GPU_STRICT", 0)) return cudaSuccess;
    invalidate(any_capture);
    return refuse(what, cudaErrorStreamCaptureImplicit);
}

/* A node more on the stream. */
static void advance(CUstream stream) { stream->capture->clocks[stream->slot][stream->slot]++; }

cudaError_t put(const char *what, CUstream stream, enum node kind, bool *runs) {
    *runs = true;
    if (!capturing()) return cudaSuccess;
    stream = resolved(stream);
    struct capture *into;
    pthread_mutex_lock(&lock);
    cudaError_t error = where(what, stream, kind == KERNEL || kind == PRODUCT, &into);
    if (into) {
        advance(stream);
        add_nodes(into->graph, kind, 1);
    }
    pthread_mutex_unlock(&lock);
    *runs = error == cudaSuccess && into == NULL;
    return error;
}

static enum node node_of(const struct transfer *transfer) {
    return transfer->kind == COPY ? COPY_NODE : transfer->kind == MEMSET ? MEMSET_NODE : OTHER;
}

static cudaError_t capture_transfer(const char *what, CUstream stream, const struct transfer *transfer, bool *runs) {
    struct capture *into;
    cudaError_t error = where(what, stream, false, &into);
    *runs = error == cudaSuccess && into == NULL;
    if (into == NULL) return error;
    if (is_pageable(transfer)) {
        into->invalid = true;
        return refuse("a copy of pageable host memory", cudaErrorStreamCaptureUnsupported);
    }
    advance(stream);
    add_nodes(into->graph, node_of(transfer), 1);
    add_transfer(into->graph, transfer);
    return cudaSuccess;
}

cudaError_t put_transfer(const char *what, CUstream stream, const struct transfer *transfer) {
    bool runs = true;
    if (capturing()) {
        pthread_mutex_lock(&lock);
        cudaError_t error = capture_transfer(what, resolved(stream), transfer, &runs);
        pthread_mutex_unlock(&lock);
        if (error != cudaSuccess) return error;
    }
    if (runs) {
        count_transfer(transfer, false);
        carry_out(transfer);
    }
    return cudaSuccess;
}

cudaError_t graph_launch(CUgraphExec executable, CUstream stream) {
    if (executable == NULL) return cudaErrorInvalidValue;
    struct CUgraph_st *graph = &executable->graph;
    if (capturing()) {
        stream = resolved(stream);
        struct capture *into;
        pthread_mutex_lock(&lock);
        cudaError_t error = where("cudaGraphLaunch", stream, true, &into);
        if (into) {
            advance(stream);
            add_graph(into->graph, graph);
        }
        pthread_mutex_unlock(&lock);
        if (error != cudaSuccess || into) return error;
    }
    count(COUNT_graph_launches);
    for (int kind = 0; kind < NODE_KINDS; kind++) count_by(COUNT_replayed_kernels + kind, graph->nodes[kind]);
    for (size_t i = 0; i < graph->used; i++) carry_out(&graph->transfers[i]);
    return cudaSuccess;
}

/* Streams. */

cudaError_t stream_create(CUstream *stream, unsigned flags, int priority) {
    *stream = calloc(1, sizeof **stream);
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    use_device(current_device());
    return cudaSuccess;
}

cudaError_t stream_destroy(CUstream stream) {
    if (is_legacy(stream) || stream == cudaStreamPerThread) return cudaErrorInvalidResourceHandle;
    pthread_mutex_lock(&lock);
    if (stream->capture) {
        stream->capture->invalid = true;
        stream->capture->streams[stream->slot] = NULL;
    }
    pthread_mutex_unlock(&lock);
    free(stream);
    return cudaSuccess;
}

cudaError_t stream_priority(CUstream stream, int *priority) {
    stream = resolved(stream);
    *priority = is_legacy(stream) ? 0 : stream->priority;
    return cudaSuccess;
}

cudaError_t stream_flags(CUstream stream, unsigned *flags) {
    stream = resolved(stream);
    *flags = is_legacy(stream) ? cudaStreamDefault : stream->flags;
    return cudaSuccess;
}

/* Whether the host may wait for, or ask about, a stream. */
static cudaError_t check_stream(const char *what, CUstream stream) {
    if (!capturing()) return cudaSuccess;
    stream = resolved(stream);
    if (is_legacy(stream)) return check_synchronous(what);
    pthread_mutex_lock(&lock);
    bool captured = stream->capture != NULL;
    if (captured) stream->capture->invalid = true;
    pthread_mutex_unlock(&lock);
    return captured ? refuse(what, cudaErrorStreamCaptureUnsupported) : check_unsafe(what);
}

cudaError_t stream_wait(const char *what, CUstream stream) {
    cudaError_t error = check_stream(what, stream);
    if (error == cudaSuccess) count(COUNT_stream_waits);
    return error;
}

cudaError_t stream_query(const char *what, CUstream stream) {
    cudaError_t error = check_stream(what, stream);
    if (error == cudaSuccess) count(COUNT_stream_queries);
    return error;
}

/* Events. */

static struct capture *capture_of(CUevent event) {
    struct capture *each = captures;
    while (each && each->id != event->capture) each = each->next;
    return each;
}

cudaError_t event_create(CUevent *event, unsigned flags) {
    *event = calloc(1, sizeof **event);
    (*event)->flags = flags;
    return cudaSuccess;
}

cudaError_t event_destroy(CUevent event) {
    if (event == NULL) return cudaErrorInvalidResourceHandle;
    free(event);
    return cudaSuccess;
}

cudaError_t event_record(CUevent event, CUstream stream, unsigned flags) {
    if (event == NULL) return cudaErrorInvalidResourceHandle;
    struct capture *into = NULL;
    if (capturing()) {
        stream = resolved(stream);
        pthread_mutex_lock(&lock);
        cudaError_t error = cudaSuccess;
        if (is_legacy(stream)) {
            if (invalidate(blocks_legacy)) error = refuse("cudaEventRecord", cudaErrorStreamCaptureImplicit);
        } else if ((into = stream->capture) != NULL) {
            if (into->invalid) error = refuse("cudaEventRecord", cudaErrorStreamCaptureInvalidated);
            else if (flags & cudaEventRecordExternal) {
                advance(stream);
                add_nodes(into->graph, OTHER, 1);
            } else {
                event->capture = into->id;
                memcpy(event->clock, into->clocks[stream->slot], sizeof event->clock);
            }
        }
        pthread_mutex_unlock(&lock);
        if (error != cudaSuccess) return error;
    }
    if (into == NULL) {
        event->capture = 0;
        clock_gettime(CLOCK_MONOTONIC, &event->time);
    }
    event->recorded = true;
    count(COUNT_event_records);
    return cudaSuccess;
}

/* The stream, not captured so far, becomes part of the capture. */
static void join(CUstream stream, struct capture *capture, CUevent event) {
    if (capture->used == MOST_STREAMS) {
        say("more than %d streams in a capture: raise MOST_STREAMS", MOST_STREAMS);
        abort();
    }
    stream->capture = capture;
    stream->slot = capture->used;
    capture->streams[capture->used++] = stream;
    memcpy(capture->clocks[stream->slot], event->clock, sizeof event->clock);
}

static void merge_clock(uint32_t *clock, const uint32_t *other) {
    for (int i = 0; i < MOST_STREAMS; i++)
        if (other[i] > clock[i]) clock[i] = other[i];
}

/* A stream waits for an event, with the lock held. */
static cudaError_t wait_in_capture(CUstream stream, CUevent event, unsigned flags) {
    const char *what = "cudaStreamWaitEvent";
    struct capture *own = is_legacy(stream) ? NULL : stream->capture;
    if (own && own->invalid) return refuse(what, cudaErrorStreamCaptureInvalidated);
    if (event->capture == 0) {
        if (own == NULL) return cudaSuccess;
        if (flags & cudaEventWaitExternal) {
            advance(stream);
            add_nodes(own->graph, OTHER, 1);
            return cudaSuccess;
        }
        own->invalid = true;
        return refuse("cudaStreamWaitEvent for an event recorded outside the capture", cudaErrorStreamCaptureIsolation);
    }
    struct capture *others = capture_of(event);
    if (others == NULL) { /* that capture has ended */
        if (own) own->invalid = true;
        return refuse("cudaStreamWaitEvent for an event of an ended capture", cudaErrorCapturedEvent);
    }
    if (own == others) {
        merge_clock(own->clocks[stream->slot], event->clock);
        return cudaSuccess;
    }
    if (own || others->invalid || is_legacy(stream)) {
        cudaError_t error = own ? cudaErrorStreamCaptureMerge
                                : others->invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureImplicit;
        if (own) own->invalid = true;
        others->invalid = true;
        return refuse(what, error);
    }
    join(stream, others, event);
    return cudaSuccess;
}

cudaError_t stream_wait_event(CUstream stream, CUevent event, unsigned flags) {
    if (event == NULL) return cudaErrorInvalidResourceHandle;
    if (capturing() || event->capture != 0) {
        pthread_mutex_lock(&lock);
        cudaError_t error = wait_in_capture(resolved(stream), event, flags);
        pthread_mutex_unlock(&lock);
        if (error != cudaSuccess) return error;
    }
    count(COUNT_stream_wait_events);
    return cudaSuccess;
}

/* Whether the host may wait for, or ask about, an event. */
static cudaError_t check_event(const char *what, CUevent event) {
    if (event == NULL) return cudaErrorInvalidResourceHandle;
    if (event->capture == 0) return check_unsafe(what);
    pthread_mutex_lock(&lock);
    struct capture *capture = capture_of(event);
    if (capture) capture->invalid = true;
    pthread_mutex_unlock(&lock);
    return refuse(what, cudaErrorCapturedEvent);
}

cudaError_t event_wait(const char *what, CUevent event) {
    cudaError_t error = check_event(what, event);
    if (error == cudaSuccess) count(COUNT_event_waits);
    return error;
}

cudaError_t event_query(const char *what, CUevent event) {
    cudaError_t error = check_event(what, event);
    if (error == cudaSuccess) count(COUNT_event_queries);
    return error;
}

cudaError_t event_elapsed(float *milliseconds, CUevent begin, CUevent end) {
    if (begin == NULL || end == NULL) return cudaErrorInvalidResourceHandle;
    if (begin->capture || end->capture) return refuse("cudaEventElapsedTime", cudaErrorCapturedEvent);
    if (!begin->recorded || !end->recorded || (begin->flags | end->flags) & cudaEventDisableTiming)
        return cudaErrorInvalidResourceHandle;
    double seconds = (double)(end->time.tv_sec - begin->time.tv_sec);
    *milliseconds = (float)(1e3 * seconds + 1e-6 * (double)(end->time.tv_nsec - begin->time.tv_nsec));
    return cudaSuccess;
}

/* Captures. */

cudaError_t capture_begin(CUstream stream, enum cudaStreamCaptureMode mode) {
    if (is_legacy(stream)) return refuse("cudaStreamBeginCapture", cudaErrorStreamCaptureUnsupported);
    stream = resolved(stream);
    pthread_mutex_lock(&lock);
    bool already = stream->capture != NULL;
    if (!already) {
        struct capture *capture = calloc(1, sizeof *capture);
        capture->id = ++last_id;
        capture->mode = mode;
        capture->thread = pthread_self();
        capture->graph = calloc(1, sizeof *capture->graph);
        capture->streams[capture->used++] = stream;
        capture->next = captures;
        stream->capture = capture;
        stream->slot = 0;
        __atomic_store_n(&captures, capture, __ATOMIC_RELEASE);
        count(COUNT_graph_captures);
    }
    pthread_mutex_unlock(&lock);
    return already ? refuse("cudaStreamBeginCapture", cudaErrorIllegalState) : cudaSuccess;
}

static bool is_joined(const struct capture *capture) {
    for (int i = 0; i < capture->used; i++)
        if (capture->clocks[0][i] < capture->clocks[i][i]) return false;
    return true;
}

static void unlink_capture(struct capture *capture) {
    struct capture **link = &captures;
    while (*link != capture) link = &(*link)->next;
    __atomic_store_n(link, capture->next, __ATOMIC_RELEASE);
    for (int i = 0; i < capture->used; i++)
        if (capture->streams[i]) capture->streams[i]->capture = NULL;
}

/* Ends a capture, with the lock held. */
static cudaError_t end(CUstream stream, CUgraph *graph) {
    const char *what = "cudaStreamEndCapture";
    struct capture *capture = is_legacy(stream) ? NULL : stream->capture;
    *graph = NULL;
    if (capture == NULL) return refuse(what, cudaErrorIllegalState);
    if (capture->streams[0] != stream) {
        capture->invalid = true;
        return refuse(what, cudaErrorStreamCaptureUnmatched);
    }
    if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self()))
        return refuse(what, cudaErrorStreamCaptureWrongThread);
    cudaError_t error = capture->invalid      ? cudaErrorStreamCaptureInvalidated
                        : !is_joined(capture) ? cudaErrorStreamCaptureUnjoined
                                              : cudaSuccess;
    unlink_capture(capture);
    if (error == cudaSuccess) *graph = capture->graph;
    else graph_destroy(capture->graph);
    free(capture);
    return error == cudaErrorStreamCaptureUnjoined ? refuse(what, error) : error;
}

cudaError_t capture_end(CUstream stream, CUgraph *graph) {
    pthread_mutex_lock(&lock);
    cudaError_t error = end(resolved(stream), graph);
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t capture_status(CUstream stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                           CUgraph *graph) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (graph) *graph = NULL;
    if (!capturing()) return cudaSuccess;
    stream = resolved(stream);
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    if (is_legacy(stream)) {
        for (struct capture *each = captures; each; each = each->next)
            if (blocks_legacy(each)) error = cudaErrorStreamCaptureImplicit;
    } else if (stream->capture) {
        bool invalid = stream->capture->invalid;
        *status = invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
        if (id) *id = stream->capture->id;
        if (graph) *graph = stream->capture->graph;
    }
    pthread_mutex_unlock(&lock);
    return error;
}
