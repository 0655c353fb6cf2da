/* cuBLAS and cuBLASLt: every call that computes is counted as one product, and put on its stream. */
#include "pretended.h"

#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, ALLOC_FAILED = 3, EXECUTION_FAILED = 13 }; /* of cublasStatus_t */

typedef struct {
    CUstream stream;
    int math_mode, pointer_mode;
} *cublas_handle;

static int multiply(CUstream stream) {
    bool runs;
    if (put("a cuBLAS product", stream, PRODUCT, &runs) != cudaSuccess) return EXECUTION_FAILED;
    if (runs) count(COUNT_products);
    return SUCCESS;
}

EXPORTED int cublasCreate_v2(cublas_handle *handle) {
    *handle = calloc(1, sizeof **handle);
    return *handle ? SUCCESS : ALLOC_FAILED;
}
EXPORTED int cublasDestroy_v2(cublas_handle handle) { return free(handle), SUCCESS; }
EXPORTED int cublasSetStream_v2(cublas_handle handle, CUstream stream) { return handle->stream = stream, SUCCESS; }
EXPORTED int cublasGetStream_v2(cublas_handle handle, CUstream *stream) { return *stream = handle->stream, SUCCESS; }
EXPORTED int cublasSetWorkspace_v2(cublas_handle handle) { return (void)handle, SUCCESS; }
EXPORTED int cublasSetMathMode(cublas_handle handle, int mode) { return handle->math_mode = mode, SUCCESS; }
EXPORTED int cublasGetMathMode(cublas_handle handle, int *mode) { return *mode = handle->math_mode, SUCCESS; }
EXPORTED int cublasSetPointerMode_v2(cublas_handle handle, int mode) { return handle->pointer_mode = mode, SUCCESS; }
EXPORTED int cublasGetPointerMode_v2(cublas_handle handle, int *mode) { return *mode = handle->pointer_mode, SUCCESS; }

/* Of the arguments only the first is looked at. */
#define PRODUCT(name)                                                                                                 \
    EXPORTED int name(cublas_handle handle) { return multiply(handle->stream); }
#define OF_FOUR_TYPES(before, after)                                                                                  \
    PRODUCT(before##S##after) PRODUCT(before##D##after) PRODUCT(before##C##after) PRODUCT(before##Z##after)

OF_FOUR_TYPES(cublas, gemm_v2)
OF_FOUR_TYPES(cublas, gemv_v2)
OF_FOUR_TYPES(cublas, gemmStridedBatched)
OF_FOUR_TYPES(cublas, gemmBatched)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmBatchedEx)

/* cuBLASLt. */

EXPORTED int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a, void *a_layout,
                            const void *b, void *b_layout, const void *beta, const void *c, void *c_layout, void *d,
                            void *d_layout, const void *algorithm, void *workspace, size_t workspace_bytes,
                            CUstream stream) {
    (void)handle, (void)description, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout, (void)beta;
    (void)c, (void)c_layout, (void)d, (void)d_layout, (void)algorithm, (void)workspace, (void)workspace_bytes;
    return multiply(stream);
}

/* cublasLtMatmulHeuristicResult_t */
struct heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

/* One algorithm, which needs no workspace. */
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                            void *preference, int asked, struct heuristic *found, int *number) {
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)asked;
    memset(found, 0, sizeof *found);
    *number = 1;
    return SUCCESS;
}

EXPORTED size_t cublasLtGetVersion(void) { return 10 * CUDART_VERSION; }
EXPORTED int cublasLtMatmulDescCreate(void **made) { return (*made = malloc(1)) ? SUCCESS : ALLOC_FAILED; }
EXPORTED int cublasLtMatmulDescDestroy(void *made) { return free(made), SUCCESS; }
EXPORTED int cublasLtMatmulDescSetAttribute(void) { return SUCCESS; }
EXPORTED int cublasLtMatmulPreferenceCreate(void **made) { return (*made = malloc(1)) ? SUCCESS : ALLOC_FAILED; }
EXPORTED int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), SUCCESS; }
EXPORTED int cublasLtMatmulPreferenceSetAttribute(void) { return SUCCESS; }
EXPORTED int cublasLtMatrixLayoutCreate(void **made) { return (*made = malloc(1)) ? SUCCESS : ALLOC_FAILED; }
EXPORTED int cublasLtMatrixLayoutDestroy(void *made) { return free(made), SUCCESS; }
EXPORTED int cublasLtMatrixLayoutSetAttribute(void) { return SUCCESS; }
