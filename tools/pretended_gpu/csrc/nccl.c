/* Collectives that move nothing: enough that ranks start, and that what they ask for is counted. */
#include "pretended.h"

#include <stdlib.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, UNHANDLED_CUDA_ERROR = 1 }; /* of ncclResult_t */

typedef struct {
    char bytes[128];
} unique_id;

typedef struct {
    int ranks, rank;
} *communicator;

static int create(communicator *made, int ranks, int rank) {
    *made = malloc(sizeof **made);
    if (*made == NULL) return SYSTEM_ERROR;
    (*made)->ranks = ranks;
    (*made)->rank = rank;
    return SUCCESS;
}

static int collective(CUstream stream) {
    bool runs;
    if (put("a collective", stream, OTHER, &runs) != cudaSuccess) return UNHANDLED_CUDA_ERROR;
    if (runs) count(COUNT_collectives);
    return SUCCESS;
}

EXPORTED int ncclGetVersion(int *version) { return *version = 22800, SUCCESS; }
EXPORTED const char *ncclGetErrorString(int error) { return error == SUCCESS ? "no error" : "unhandled cuda error"; }
EXPORTED const char *ncclGetLastError(communicator of) { return (void)of, ""; }
EXPORTED int ncclGetUniqueId(unique_id *id) { return *id = (unique_id){{1}}, SUCCESS; }

EXPORTED int ncclCommInitRank(communicator *made, int ranks, unique_id id, int rank) {
    return (void)id, create(made, ranks, rank);
}
EXPORTED int ncclCommInitRankConfig(communicator *made, int ranks, unique_id id, int rank, void *configuration) {
    return (void)id, (void)configuration, create(made, ranks, rank);
}
EXPORTED int ncclCommCount(communicator of, int *ranks) { return *ranks = of->ranks, SUCCESS; }
EXPORTED int ncclCommUserRank(communicator of, int *rank) { return *rank = of->rank, SUCCESS; }
EXPORTED int ncclCommGetAsyncError(communicator of, int *error) { return (void)of, *error = SUCCESS, SUCCESS; }
EXPORTED int ncclCommFinalize(communicator of) { return (void)of, SUCCESS; }
EXPORTED int ncclCommDestroy(communicator of) { return free(of), SUCCESS; }
EXPORTED int ncclCommAbort(communicator of) { return free(of), SUCCESS; }
EXPORTED int ncclGroupStart(void) { return SUCCESS; }
EXPORTED int ncclGroupEnd(void) { return SUCCESS; }

EXPORTED int ncclAllReduce(const void *from, void *to, size_t number, int type, int operation, communicator of,
                           CUstream stream) {
    (void)from, (void)to, (void)number, (void)type, (void)operation, (void)of;
    return collective(stream);
}
EXPORTED int ncclReduceScatter(const void *from, void *to, size_t number, int type, int operation, communicator of,
                               CUstream stream) {
    return ncclAllReduce(from, to, number, type, operation, of, stream);
}
EXPORTED int ncclAllGather(const void *from, void *to, size_t number, int type, communicator of, CUstream stream) {
    (void)from, (void)to, (void)number, (void)type, (void)of;
    return collective(stream);
}
EXPORTED int ncclBroadcast(const void *from, void *to, size_t number, int type, int root, communicator of,
                           CUstream stream) {
    return (void)root, ncclAllGather(from, to, number, type, of, stream);
}
EXPORTED int ncclBcast(void *buffer, size_t number, int type, int root, communicator of, CUstream stream) {
    return ncclBroadcast(buffer, buffer, number, type, root, of, stream);
}
EXPORTED int ncclReduce(const void *from, void *to, size_t number, int type, int operation, int root, communicator of,
                        CUstream stream) {
    return (void)root, ncclAllReduce(from, to, number, type, operation, of, stream);
}
EXPORTED int ncclSend(const void *from, size_t number, int type, int peer, communicator of, CUstream stream) {
    return (void)peer, ncclAllGather(from, NULL, number, type, of, stream);
}
EXPORTED int ncclRecv(void *to, size_t number, int type, int peer, communicator of, CUstream stream) {
    return (void)peer, ncclAllGather(NULL, to, number, type, of, stream);
}
