/* Layer norm and RMS norm with the addition to the residual stream, forward and backward: one pass over memory each.

   A row is widened to float32 in a buffer that stays in the cache, and worked on there: loops over arrays of float, which
   compilers make vectors of by themselves but for the sums. The equations are in layer_norm.py and rms_norm.py. */

#include "vector.h"

enum { WIDEST = 8192 };

typedef struct {
    const void *x, *residual;    /* [N, C]; residual: or none */
    const void *weight, *bias;   /* [C]; bias: or none */
    const void *dy, *ds;         /* [N, C]; ds: or none */
    void *y;                     /* [N, C] */
    void *s;                     /* [N, C]: the sum, or none; backward: its gradient */
    void *dx;                    /* [N, C]: the gradient of s once more, in x's dtype, or none */
    float *mean, *rstd;          /* [N]; mean: none without centring */
    float *partial;              /* [chunks, 2, C]: sums of a chunk's rows for weight and bias, or none */
    int64_t N, C, chunk;         /* rows of a chunk */
    int64_t stride_x, stride_residual, stride_dy, stride_ds;
    float eps, offset;           /* the offset of the weight */
    int32_t x_is_narrow, residual_is_narrow, weight_is_narrow, bias_is_narrow, dy_is_narrow, ds_is_narrow;
    int32_t y_is_narrow, s_is_narrow, dx_is_narrow;
} Norm;

static void read_row(float *restrict to, const void *array, int64_t at, int64_t count, int is_narrow) {
    if (is_narrow) {
        const uint16_t *restrict from = (const uint16_t *)array + at;
        for (int64_t i = 0; i < count; i++) to[i] = widened(from[i]);
    } else
        memcpy(to, (const float *)array + at, count * sizeof(float));
}

static void add_row(float *restrict to, const void *array, int64_t at, int64_t count, int is_narrow) {
    if (is_narrow) {
        const uint16_t *restrict from = (const uint16_t *)array + at;
        for (int64_t i = 0; i < count; i++) to[i] += widened(from[i]);
    } else {
        const float *restrict from = (const float *)array + at;
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
}

static void write_row(void *array, int64_t at, const float *restrict from, int64_t count, int is_narrow) {
    if (is_narrow) {
        uint16_t *restrict to = (uint16_t *)array + at;
        for (int64_t i = 0; i < count; i++) to[i] = narrowed(from[i]);
    } else
        memcpy((float *)array + at, from, count * sizeof(float));
}

/* Of rows whose buffers end in zeros, to a multiple of four vectors. */
#define SUM(NAME, TERM)                                                                                                \
    static float NAME(const float *a, const float *b, int64_t C) {                                                     \
        (void)b;                                                                                                       \
        Floats sums[4] = {{0}};                                                                                        \
        for (int64_t i = 0; i < C; i += 4 * WIDTH)                                                                     \
            for (int j = 0; j < 4; j++) {                                                                              \
                const Floats u = load(a, i + j * WIDTH, WIDTH, 0);                                                     \
                sums[j] += TERM;                                                                                       \
            }                                                                                                          \
        return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));                                                      \
    }

SUM(sum, u)
SUM(sum_of_products, u * load(b, i + j * WIDTH, WIDTH, 0))

/* Where a part's chunks begin in rows. */
static int64_t first_row(const Norm *a, int64_t part, int64_t parts) {
    const int64_t chunks = (a->N + a->chunk - 1) / a->chunk, row = a->chunk * beginning(chunks, part, parts);
    return row < a->N ? row : a->N;
}

static void read_weights(const Norm *a, float *w) {
    read_row(w, a->weight, 0, a->C, a->weight_is_narrow);
    for (int64_t i = 0; i < a->C; i++) w[i] += a->offset;
}

/* y and s of some rows. */
void fastft_norm(const void *arguments, int64_t part, int64_t parts) {
    const Norm *a = arguments;
    const int64_t C = a->C, begin = beginning(a->N, part, parts), end = beginning(a->N, part + 1, parts);
    if (begin == end) return;
    float row[WIDEST], w[WIDEST], b[WIDEST];
    read_weights(a, w);
    if (a->bias)
        read_row(b, a->bias, 0, C, a->bias_is_narrow);
    else
        for (int64_t i = 0; i < C; i++) b[i] = -0.0f; /* changes nothing */
    for (int64_t i = C; i < WIDEST && i < C + 4 * WIDTH; i++) row[i] = 0;
    for (int64_t n = begin; n < end; n++) {
        read_row(row, a->x, n * a->stride_x, C, a->x_is_narrow);
        if (a->residual) {
            add_row(row, a->residual, n * a->stride_residual, C, a->residual_is_narrow);
            write_row(a->s, n * C, row, C, a->s_is_narrow);
            if (a->s_is_narrow) read_row(row, a->s, n * C, C, 1); /* what the backward pass will read */
        }
        if (a->mean) {
            const float mean = sum(row, row, C) / C;
            for (int64_t i = 0; i < C; i++) row[i] -= mean;
            a->mean[n] = mean;
        }
        const float rstd = 1.0f / sqrtf(sum_of_products(row, row, C) / C + a->eps);
        for (int64_t i = 0; i < C; i++) row[i] = row[i] * rstd * w[i] + b[i];
        write_row(a->y, n * C, row, C, a->y_is_narrow);
        a->rstd[n] = rstd;
    }
}

/* Gradients of some chunks' rows; of each chunk the sums over its rows. */
void fastft_norm_backward(const void *arguments, int64_t part, int64_t parts) {
    const Norm *a = arguments;
    const int64_t C = a->C, begin = first_row(a, part, parts), end = first_row(a, part + 1, parts);
    if (begin == end) return;
    float g[WIDEST], normed[WIDEST], w[WIDEST];
    float *restrict dw = NULL, *restrict db = NULL;
    read_weights(a, w);
    for (int64_t i = C; i < WIDEST && i < C + 4 * WIDTH; i++) g[i] = normed[i] = 0;
    for (int64_t n = begin; n < end; n++) {
        if (a->partial && n % a->chunk == 0) {
            dw = a->partial + n / a->chunk * 2 * C;
            db = dw + C;
            memset(dw, 0, 2 * C * sizeof(float));
        }
        const float mean = a->mean ? a->mean[n] : 0.0f, rstd = a->rstd[n];
        read_row(g, a->dy, n * a->stride_dy, C, a->dy_is_narrow);
        read_row(normed, a->x, n * a->stride_x, C, a->x_is_narrow);
        for (int64_t i = 0; i < C; i++) normed[i] = (normed[i] - mean) * rstd;
        if (dw)
            for (int64_t i = 0; i < C; i++) dw[i] += g[i] * normed[i], db[i] += g[i];
        for (int64_t i = 0; i < C; i++) g[i] *= w[i];
        const float of_sum = a->mean ? sum(g, g, C) / C : 0.0f, of_products = sum_of_products(g, normed, C) / C;
        for (int64_t i = 0; i < C; i++) g[i] = (g[i] - of_sum - normed[i] * of_products) * rstd;
        if (a->ds) add_row(g, a->ds, n * a->stride_ds, C, a->ds_is_narrow);
        write_row(a->s, n * C, g, C, a->s_is_narrow);
        if (a->dx) write_row(a->dx, n * C, g, C, a->dx_is_narrow);
    }
}

typedef struct {
    const float *partial; /* [P, C] */
    void *out;            /* [C] */
    int64_t P, C;
    int32_t is_narrow;
} Columns;

/* Sums of some columns, from the first row's to the last one's. */
void fastft_sum_rows(const void *arguments, int64_t part, int64_t parts) {
    const Columns *a = arguments;
    const int64_t end = beginning(a->C, part + 1, parts);
    float sums[512];
    for (int64_t from = beginning(a->C, part, parts); from < end; from += 512) {
        const int64_t count = end - from < 512 ? end - from : 512;
        memset(sums, 0, sizeof sums);
        for (int64_t p = 0; p < a->P; p++)
            for (int64_t i = 0; i < count; i++) sums[i] += a->partial[p * a->C + from + i];
        write_row(a->out, from, sums, count, a->is_narrow);
    }
}
