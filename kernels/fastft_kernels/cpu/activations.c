/* GELU in its tanh form with the bias of the product before it, and SwiGLU: one pass each, forward and backward.

   Both are made of the logistic function, p = 1 / (1 + e^-t) and q = 1 - p, without an exponential that overflows. The
   equations are in gelu.py and swiglu.py. Computed are float32 values, whatever the dtype in memory. */

#include "vector.h"

enum { TILE = 512, ROWS = 64 }; /* columns whose biases and sums stay in the cache; rows that are summed at a time */

typedef struct {
    const void *x;     /* [N, F] */
    const void *other; /* [F], the bias, or none; SwiGLU: [N, F], what the gate lets through */
    const void *dy;    /* [N, F] */
    void *out;         /* [N, F]: y, or dx */
    void *out_other;   /* SwiGLU: [N, F], the gradient of `other` */
    float *sums;       /* [F]: the gradient of the bias, or none */
    int64_t N, F, stride_x, stride_other, stride_dy;
    int32_t is_narrow, other_is_narrow;
} Activation;

typedef struct {
    Floats p, q;
} Logistic;

INLINE Logistic logistic(Floats t) {
    const Floats e = exp_of((Floats)((Ints)t | INT32_MIN)); /* -|t| */
    const Floats more = 1.0f / (1.0f + e), less = e * more;
    return (Logistic){pick(t < 0.0f, less, more), pick(t < 0.0f, more, less)};
}

#define SLOPE (2 * 0.79788456f) /* 2 sqrt(2 / pi): of 2 u */
#define CUBIC 0.044715f

INLINE Floats gelu_of(Floats z) { return z * logistic(z * (z * z * (SLOPE * CUBIC) + SLOPE)).p; }

INLINE Floats gelu_slope(Floats z) {
    Floats square = z * z;
    square = pick(square > 400.0f, all_of(400.0f), square); /* p q is 0 there, which no infinite slope shall meet */
    const Logistic l = logistic(z * (square * (SLOPE * CUBIC) + SLOPE));
    return z * (l.p * l.q) * (square * (3 * SLOPE * CUBIC) + SLOPE) + l.p;
}

/* The biases of a tile; where there are none, what changes no number that it is added to. */
static void read_biases(const Activation *a, int64_t from, int count, float *biases) {
    for (int i = 0; i < count; i++)
        biases[i] = !a->other             ? -0.0f
                    : a->other_is_narrow ? widened(((const uint16_t *)a->other)[from + i])
                                         : ((const float *)a->other)[from + i];
}

INLINE const void *row_of(const void *array, int64_t row, int64_t stride, int is_narrow) {
    return (const char *)array + row * stride * (is_narrow ? sizeof(uint16_t) : sizeof(float));
}

INLINE void gelu_rows(const Activation *a, int64_t begin, int64_t end, const int is_narrow) {
    float biases[TILE];
    for (int64_t from = 0; from < a->F; from += TILE) {
        const int64_t to = from + TILE < a->F ? from + TILE : a->F;
        read_biases(a, from, (int)(to - from), biases);
        for (int64_t n = begin; n < end; n++) {
            const void *x = row_of(a->x, n, a->stride_x, is_narrow);
            void *y = (void *)row_of(a->out, n, a->F, is_narrow);
#define FORWARD(I, COUNT)                                                                                              \
    store(y, I, COUNT, is_narrow, gelu_of(load(x, I, COUNT, is_narrow) + load(biases, I - from, COUNT, 0)))
            BY_WIDTH(i, from, to, FORWARD);
        }
    }
}

/* y of some rows. */
void fastft_gelu(const void *arguments, int64_t part, int64_t parts) {
    const Activation *a = arguments;
    const int64_t begin = beginning(a->N, part, parts), end = beginning(a->N, part + 1, parts);
    if (a->is_narrow)
        gelu_rows(a, begin, end, 1);
    else
        gelu_rows(a, begin, end, 0);
}

/* A tile of columns: a thread has all rows of it, so that their sums have one order. Those of some rows are summed by
   themselves first, as a float32 that has grown large loses what is small. */
INLINE void gelu_gradient(const Activation *a, int64_t from, int64_t to, const int is_narrow) {
    float biases[TILE], some[TILE], sums[TILE] = {0};
    read_biases(a, from, (int)(to - from), biases);
    for (int64_t begin = 0; begin < a->N; begin += ROWS) {
        const int64_t end = begin + ROWS < a->N ? begin + ROWS : a->N;
        memset(some, 0, sizeof some);
        for (int64_t n = begin; n < end; n++) {
            const void *x = row_of(a->x, n, a->stride_x, is_narrow), *dy = row_of(a->dy, n, a->stride_dy, is_narrow);
            void *dx = (void *)row_of(a->out, n, a->F, is_narrow);
#define BACKWARD(I, COUNT)                                                                                             \
    do {                                                                                                               \
        const Floats z = load(x, I, COUNT, is_narrow) + load(biases, I - from, COUNT, 0);                              \
        const Floats dz = load(dy, I, COUNT, is_narrow) * gelu_slope(z);                                               \
        store(dx, I, COUNT, is_narrow, dz);                                                                            \
        store(some, I - from, COUNT, 0, load(some, I - from, COUNT, 0) + dz);                                          \
    } while (0)
            BY_WIDTH(i, from, to, BACKWARD);
        }
        for (int i = 0; i < TILE; i++) sums[i] += some[i];
    }
    if (a->sums) memcpy(a->sums + from, sums, (to - from) * sizeof(float));
}

/* dx of some columns, and their sums. */
void fastft_gelu_backward(const void *arguments, int64_t part, int64_t parts) {
    const Activation *a = arguments;
    const int64_t lines = (a->F + 63) / 64; /* no two threads write to one line of a cache */
    const int64_t begin = 64 * beginning(lines, part, parts), next = 64 * beginning(lines, part + 1, parts);
    const int64_t end = next < a->F ? next : a->F;
    for (int64_t from = begin; from < end; from += TILE) {
        const int64_t to = from + TILE < end ? from + TILE : end;
        if (a->is_narrow)
            gelu_gradient(a, from, to, 1);
        else
            gelu_gradient(a, from, to, 0);
    }
}

INLINE void swiglu_row(const Activation *a, int64_t n, const int is_narrow) {
    const void *gate = row_of(a->x, n, a->stride_x, is_narrow), *up = row_of(a->other, n, a->stride_other, is_narrow);
    void *y = (void *)row_of(a->out, n, a->F, is_narrow);
#define SWIGLU(I, COUNT)                                                                                               \
    do {                                                                                                               \
        const Floats z = load(gate, I, COUNT, is_narrow);                                                              \
        store(y, I, COUNT, is_narrow, z * logistic(z).p * load(up, I, COUNT, is_narrow));                              \
    } while (0)
    BY_WIDTH(i, 0, a->F, SWIGLU);
}

INLINE void swiglu_gradient(const Activation *a, int64_t n, const int is_narrow) {
    const void *gate = row_of(a->x, n, a->stride_x, is_narrow), *up = row_of(a->other, n, a->stride_other, is_narrow);
    const void *dy = row_of(a->dy, n, a->stride_dy, is_narrow);
    void *dgate = (void *)row_of(a->out, n, a->F, is_narrow), *dup = (void *)row_of(a->out_other, n, a->F, is_narrow);
#define SWIGLU_BACKWARD(I, COUNT)                                                                                      \
    do {                                                                                                               \
        const Floats z = load(gate, I, COUNT, is_narrow), d = load(dy, I, COUNT, is_narrow);                           \
        const Logistic l = logistic(z);                                                                                \
        store(dup, I, COUNT, is_narrow, d * (z * l.p));                                                                \
        store(dgate, I, COUNT, is_narrow, d * load(up, I, COUNT, is_narrow) * (z * (l.p * l.q) + l.p));                \
    } while (0)
    BY_WIDTH(i, 0, a->F, SWIGLU_BACKWARD);
}

#define OF_ROWS(NAME, ROW)                                                                                             \
    void NAME(const void *arguments, int64_t part, int64_t parts) {                                                    \
        const Activation *a = arguments;                                                                               \
        const int64_t end = beginning(a->N, part + 1, parts);                                                          \
        for (int64_t n = beginning(a->N, part, parts); n < end; n++)                                                   \
            if (a->is_narrow)                                                                                          \
                ROW(a, n, 1);                                                                                          \
            else                                                                                                       \
                ROW(a, n, 0);                                                                                          \
    }

OF_ROWS(fastft_swiglu, swiglu_row)
OF_ROWS(fastft_swiglu_backward, swiglu_gradient)
