/* Interval attention on a CPU: softmax(q k^T * scale + mask) v where key k is visible to query q exactly when
   k <= q < visible_until[k], and its gradients.

   A block of QUERIES queries of a head takes the list of keys that any of them sees. Scores and probabilities are laid
   out key by key, with a query in each lane: so the softmax has no sum across lanes. The backward pass computes the
   probabilities again from the log-sum-exp (Dao 2023, "FlashAttention-2", arXiv:2307.08691). All is computed in float32,
   and each sum is one thread's: forward, a thread has blocks to itself, and backward whole heads.

   Letters: T tokens, R queries, H heads of queries, G of keys, D head dim, W the whole vectors that hold it. */

#include <stdlib.h>

#include "common.h"

/* LANES fill a register of the processor, and a tile of a product fills its registers: KEYS by the block's queries of
   scores, and ROWS by D_VECTORS of sums of rows. */
#if defined(__AVX512F__)
enum { LANES = 16, KEYS = 8, ROWS = 4, D_VECTORS = 4 };
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
enum { LANES = 8, KEYS = 4, ROWS = 4, D_VECTORS = 2 };
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { LANES = 4, KEYS = 4, ROWS = 4, D_VECTORS = 4 };
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
enum {
    QUERIES = 16, /* of a block */
    Q_VECTORS = QUERIES / LANES,
    STEP = 8,   /* lists of keys are filled up to a multiple: KEYS and ROWS divide it */
    CHUNK = 64, /* keys whose probabilities lie in the first cache */
    SPAN = 16,  /* keys that are passed over together where none is visible */
};

#ifdef __clang__
#define INTERLEAVED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVED(a, b, ...) __builtin_shuffle(a, b, (Integers){__VA_ARGS__})
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Narrow __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* A tensor of rows and heads with D elements each in one piece; strides in elements. */
typedef struct {
    void *data;
    int64_t row, head;
} Rows;

typedef struct {
    Rows q, k, v, out, d_out, dq, dk, dv;
    float *lse; /* [H, R] */
    const int32_t *until;
    const int64_t *asked; /* the tokens that are queries; NULL where all are */
    int64_t T, R, H, G, D;
    float scale;
    int32_t is_narrow;       /* bf16 */
    int32_t is_narrow_of_keys; /* dk and dv */
    int32_t has_failed;      /* for want of memory */
} Attention;

/* What a thread has to itself. */
typedef struct {
    const Attention *given;
    int64_t W;
    float *k, *v, *dk, *dv;     /* of a head: [T + 1, W]; the last row, of zeros, is the key that fills up a list */
    float *q, *d_out, *out;     /* of a block: [QUERIES, W]; q is scaled */
    float *q_by_d, *d_out_by_d; /* [W, QUERIES] */
    float *scores, *d_scores;   /* [keys, QUERIES] */
    int32_t *position;          /* [QUERIES], the tokens that the queries are; -1, which sees nothing, beyond the last */
    int32_t *keys, *ends;       /* [keys], which they are, and until when each is visible */
    int32_t *most;              /* of each SPAN of keys, until when the last of them is visible */
    void *memory;
} Own;

static const int32_t IN_ORDER[QUERIES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Vector load(const float *at) { return *(const Vector *)at; }
static inline void store(float *at, Vector value) { *(Vector *)at = value; }
static inline Vector all(float value) { return value - (Vector){0}; }
static inline Integers all_integers(int32_t value) { return value - (Integers){0}; }

static inline Vector where(Integers is, Vector yes, Vector no) {
    return (Vector)((is & (Integers)yes) | (~is & (Integers)no));
}

static inline int64_t up_to(int64_t size, int64_t step) { return (size + step - 1) / step * step; }
static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* e^x of x up to 0 and a little more, within 2 eps of itself; 0 where it would not be a normal number. 2^n times the
   polynomial of Cephes' expf (Moshier, netlib.org/cephes) near 0; adding 1.5 * 2^23 rounds to the integer n. */
static inline Vector exponential(Vector x) {
    const float shift = 12582912.0f;
    const Vector shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Vector power = (Vector)(((Integers)shifted << 23) + (127 << 23));
    return (Vector)((Integers)(p * power) & ~(Integers)(x < all(-87.3365f)));
}

static inline Vector load_narrow(const uint16_t *at) {
    return (Vector)(__builtin_convertvector(*(const Narrow *)at, Unsigned) << 16);
}

/* As `narrowed`. */
static inline void store_narrow(uint16_t *at, Vector value) {
    const Unsigned bits = (Unsigned)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Integers is_none = (Integers)((bits & 0x7fffffff) > 0x7f800000);
    const Unsigned narrow = (rounded & ~(Unsigned)is_none) | (0x7fc0 & (Unsigned)is_none);
    *(Narrow *)at = __builtin_convertvector(narrow, Narrow);
}

/* A row times `factor`, and zeros up to W. */
static inline void read_row(float *restrict to, const Rows *rows, int64_t row, int64_t head, float factor,
                            const Own *own) {
    const int64_t at = row * rows->row + head * rows->head, D = own->given->D, W = own->W;
    const float *wide = (const float *)rows->data + at;
    const uint16_t *narrow = (const uint16_t *)rows->data + at;
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES)
        store(to + d, (own->given->is_narrow ? load_narrow(narrow + d) : load(wide + d)) * factor);
    for (; d < D; d++) to[d] = (own->given->is_narrow ? widened(narrow[d]) : wide[d]) * factor;
    for (; d < W; d++) to[d] = 0;
}

static inline void write_row(const Rows *rows, int64_t row, int64_t head, int32_t is_narrow,
                             const float *restrict from, float factor, int64_t D) {
    const int64_t at = row * rows->row + head * rows->head;
    float *wide = (float *)rows->data + at;
    uint16_t *narrow = (uint16_t *)rows->data + at;
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES)
        if (is_narrow)
            store_narrow(narrow + d, load(from + d) * factor);
        else
            store(wide + d, load(from + d) * factor);
    for (; d < D; d++)
        if (is_narrow)
            narrow[d] = narrowed(from[d] * factor);
        else
            wide[d] = from[d] * factor;
}

/* The transpose of [LANES, LANES] into rows of QUERIES. Each step interleaves row i with the row half of them below it:
   the bits of (row, column) turn by one place. */
static inline void transpose(const float *from, int64_t stride, float *to) {
    Vector rows[LANES], turned[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * stride);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            turned[2 * i] = INTERLEAVED(rows[i], rows[i + LANES / 2], LOW_HALVES);
            turned[2 * i + 1] = INTERLEAVED(rows[i], rows[i + LANES / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = turned[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * QUERIES, rows[i]);
}

/* [QUERIES, W] into [W, QUERIES]. */
static void transpose_block(const float *from, int64_t W, float *to) {
    for (int64_t d = 0; d < W; d += LANES)
        for (int i = 0; i < QUERIES; i += LANES) transpose(from + i * W + d, W, to + d * QUERIES + i);
}

/* The products of n rows of a panel with the queries of a block: into [n, QUERIES]. */
static void products(float *to, const float *panel, const int32_t *keys, int64_t n, const float *by_d, const Own *own) {
    const int64_t D = own->given->D, W = own->W;
    for (int64_t i = 0; i < n; i += KEYS) {
        const float *row[KEYS];
        Vector sum[KEYS][Q_VECTORS] = {{{0}}};
        for (int key = 0; key < KEYS; key++) row[key] = panel + keys[i + key] * W;
        for (int64_t d = 0; d < D; d++) {
            Vector x[Q_VECTORS];
#pragma GCC unroll 4
            for (int q = 0; q < Q_VECTORS; q++) x[q] = load(by_d + d * QUERIES + q * LANES);
#pragma GCC unroll 8
            for (int key = 0; key < KEYS; key++)
#pragma GCC unroll 4
                for (int q = 0; q < Q_VECTORS; q++) sum[key][q] += row[key][d] * x[q];
        }
#pragma GCC unroll 8
        for (int key = 0; key < KEYS; key++)
#pragma GCC unroll 4
            for (int q = 0; q < Q_VECTORS; q++) store(to + (i + key) * QUERIES + q * LANES, sum[key][q]);
    }
}

/* Which rows of a panel [., W] are meant. */
typedef struct {
    float *panel;
    const int32_t *row;
    int64_t n;
} Chosen;

/* What each row takes of another: weight `at[i * to + j * from]` of row j in row i. */
typedef struct {
    const float *at;
    int64_t to, from;
} Weights;

/* A tile of `add_rows`: ROWS rows from the i-th on, `vectors` vectors from d on. */
static inline __attribute__((always_inline)) void add_tile(Chosen to, Weights weights, Chosen from, int64_t W, int64_t i,
                                                           int64_t d, int vectors) {
    Vector sum[ROWS][D_VECTORS] = {{{0}}};
    const float *weight = weights.at + i * weights.to;
    for (int64_t j = 0; j < from.n; j++, weight += weights.from) {
        const float *x = from.panel + from.row[j] * W + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const Vector part = load(x + v * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) sum[row][v] += weight[row * weights.to] * part;
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
        float *y = to.panel + to.row[i + row] * W + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(y + v * LANES, load(y + v * LANES) + sum[row][v]);
    }
}

/* Adds weighted sums of rows to rows: `to.n` is a multiple of ROWS. */
static void add_rows(Chosen to, Weights weights, Chosen from, int64_t W) {
    for (int64_t i = 0; i < to.n; i += ROWS)
        for (int64_t d = 0; d < W;) {
            const int64_t left = (W - d) / LANES;
            const int vectors = left >= D_VECTORS ? D_VECTORS : left >= 2 ? 2 : 1;
            if (vectors == D_VECTORS)
                add_tile(to, weights, from, W, i, d, D_VECTORS);
            else if (vectors == 2)
                add_tile(to, weights, from, W, i, d, 2);
            else
                add_tile(to, weights, from, W, i, d, 1);
            d += vectors * LANES;
        }
}

/* Memory at `next`, or, as long as it counts from 0, what is needed of it. */
static void *taken(uintptr_t *next, int64_t elements) {
    void *here = (void *)*next; 
    *next += (uintptr_t)up_to(4 * elements, 64);
    return here;
}

static uintptr_t lay_out(Own *own, uintptr_t next, int is_backward) {
    const int64_t T = own->given->T, panel = (T + 1) * own->W, block = QUERIES * own->W, list = up_to(T, STEP);
    const int64_t scores = QUERIES * (is_backward ? CHUNK : list);
    own->k = taken(&next, panel);
    own->v = taken(&next, panel);
    own->q = taken(&next, block);
    own->q_by_d = taken(&next, block);
    own->out = taken(&next, block);
    own->scores = taken(&next, scores);
    own->position = taken(&next, QUERIES);
    own->keys = taken(&next, list);
    own->ends = taken(&next, list);
    own->most = taken(&next, T / SPAN + 1);
    if (is_backward) {
        own->dk = taken(&next, panel);
        own->dv = taken(&next, panel);
        own->d_out = taken(&next, block);
        own->d_out_by_d = taken(&next, block);
        own->d_scores = taken(&next, scores);
    }
    return next;
}

/* A thread's own memory; whether there is as much. */
static int prepare(Own *own, Attention *given, int is_backward) {
    *own = (Own){.given = given, .W = up_to(given->D, LANES)};
    own->memory = aligned_alloc(64, lay_out(own, 0, is_backward));
    if (own->memory == NULL) {
        given->has_failed = 1;
        return 0;
    }
    lay_out(own, (uintptr_t)own->memory, is_backward);
    for (int64_t span = 0; span * SPAN < given->T; span++) {
        int32_t most = INT32_MIN;
        for (int64_t k = span * SPAN; k < least_of(given->T, (span + 1) * SPAN); k++)
            most = given->until[k] > most ? given->until[k] : most;
        own->most[span] = most;
    }
    return 1;
}

/* The keys and values of a head. */
static void read_keys(Own *own, int64_t g) {
    const Attention *given = own->given;
    for (int64_t t = 0; t < given->T; t++) {
        read_row(own->k + t * own->W, &given->k, t, g, 1, own);
        read_row(own->v + t * own->W, &given->v, t, g, 1, own);
    }
    memset(own->k + given->T * own->W, 0, sizeof(float) * own->W);
    memset(own->v + given->T * own->W, 0, sizeof(float) * own->W);
}

static void read_block(float *to, const Rows *rows, int64_t first, int64_t head, float factor, const Own *own) {
    const int64_t count = least_of(QUERIES, own->given->R - first);
    for (int64_t i = 0; i < count; i++) read_row(to + i * own->W, rows, first + i, head, factor, own);
    memset(to + count * own->W, 0, sizeof(float) * (QUERIES - count) * own->W);
}

/* Lists the keys that are visible to some query from the `first` on; how many there are, those that fill it up among
   them. Where the queries lie apart, it may hold keys that none of them sees. */
static int64_t list_keys(Own *own, int64_t first) {
    const Attention *given = own->given;
    int64_t low = INT32_MAX, high = -1, n = 0;
    for (int64_t i = 0; i < QUERIES; i++) {
        const int64_t r = first + i, token = r >= given->R ? -1 : given->asked ? given->asked[r] : r;
        own->position[i] = (int32_t)(token < -1 ? -1 : least_of(token, INT32_MAX));
        if (r < given->R && own->position[i] < low) low = own->position[i];
        if (r < given->R && own->position[i] > high) high = own->position[i];
    }
    const int64_t end = least_of(high + 1, given->T);
    for (int64_t begin = 0; begin < end; begin += SPAN) {
        if (own->most[begin / SPAN] <= low) continue;
        const int64_t to = least_of(begin + SPAN, end);
        for (int64_t k = begin; k < to; k++) {
            own->keys[n] = (int32_t)k;
            own->ends[n] = given->until[k];
            n += given->until[k] > low;
        }
    }
    for (; n % STEP; n++) {
        own->keys[n] = (int32_t)given->T;
        own->ends[n] = INT32_MIN;
    }
    return n;
}

/* Which queries of a vector see the i-th key of the list. */
static inline Integers sees(const Own *own, int64_t i, int q) {
    const Integers position = *(const Integers *)(own->position + q * LANES);
    return (position >= all_integers(own->keys[i])) & (position < all_integers(own->ends[i]));
}

/* In place of scores [n, QUERIES], their exponentials beside each query's largest; the sums of them in `total`, and the
   weighted sums of values in `out`. */
static void soften(Own *own, int64_t n, Vector largest[Q_VECTORS], Vector total[Q_VECTORS]) {
    for (int q = 0; q < Q_VECTORS; q++) {
        largest[q] = all(-INFINITY);
        total[q] = all(0);
        for (int64_t i = 0; i < n; i++) {
            float *at = own->scores + i * QUERIES + q * LANES;
            const Vector score = where(sees(own, i, q), load(at), all(-INFINITY));
            store(at, score);
            largest[q] = where(score > largest[q], score, largest[q]);
        }
    }
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const int64_t size = least_of(CHUNK, n - begin);
        float *scores = own->scores + begin * QUERIES;
        for (int q = 0; q < Q_VECTORS; q++) {
            /* A query that sees nothing has sums of 0, and so no number for its output. */
            const Vector base = where(largest[q] == all(-INFINITY), all(0), largest[q]);
            Vector sum = all(0);
            for (int64_t i = 0; i < size; i++) {
                float *at = scores + i * QUERIES + q * LANES;
                const Vector weight = exponential(load(at) - base);
                store(at, weight);
                sum += weight;
            }
            total[q] += sum;
        }
        add_rows((Chosen){own->out, IN_ORDER, QUERIES}, (Weights){scores, 1, QUERIES},
                 (Chosen){own->v, own->keys + begin, size}, own->W);
    }
}

static void forward_block(Own *own, int64_t head, int64_t first) {
    const Attention *given = own->given;
    const int64_t n = list_keys(own, first);
    Vector largest[Q_VECTORS], total[Q_VECTORS];
    float maxima[QUERIES], sums[QUERIES];
    read_block(own->q, &given->q, first, head, given->scale, own);
    transpose_block(own->q, own->W, own->q_by_d);
    products(own->scores, own->k, own->keys, n, own->q_by_d, own);
    memset(own->out, 0, sizeof(float) * QUERIES * own->W);
    soften(own, n, largest, total);
    memcpy(maxima, largest, sizeof maxima);
    memcpy(sums, total, sizeof sums);
    for (int64_t i = 0; i < least_of(QUERIES, given->R - first); i++) {
        given->lse[head * given->R + first + i] = maxima[i] + logf(sums[i]);
        write_row(&given->out, first + i, head, given->is_narrow, own->out + i * own->W, 1 / sums[i], given->D);
    }
}

void fastft_attention(const void *arguments, int64_t part, int64_t parts) {
    Attention *given = (Attention *)arguments;
    const int64_t blocks = up_to(given->R, QUERIES) / QUERIES, all_blocks = given->H * blocks;
    const int64_t from = beginning(all_blocks, part, parts), to = beginning(all_blocks, part + 1, parts);
    int64_t read = -1; /* the head whose keys are */
    Own own;
    if (from == to || !prepare(&own, given, 0)) return;
    for (int64_t at = from; at < to; at++) {
        const int64_t head = at / blocks, g = head / (given->H / given->G);
        if (g != read) read_keys(&own, g);
        read = g;
        forward_block(&own, head, at % blocks * QUERIES);
    }
    free(own.memory);
}

/* Of each query the sum of out * d_out, which is that of p * dp over its keys. */
static void read_deltas(Own *own, Vector delta[Q_VECTORS]) {
    float sums[QUERIES * LANES], by_lane[LANES * QUERIES];
    for (int i = 0; i < QUERIES; i++) {
        Vector sum = all(0);
        for (int64_t d = i * own->W; d < (i + 1) * own->W; d += LANES) sum += load(own->out + d) * load(own->d_out + d);
        store(sums + i * LANES, sum);
    }
    for (int i = 0; i < QUERIES; i += LANES) transpose(sums + i * LANES, LANES, by_lane + i);
    for (int q = 0; q < Q_VECTORS; q++) {
        delta[q] = all(0);
        for (int lane = 0; lane < LANES; lane++) delta[q] += load(by_lane + lane * QUERIES + q * LANES);
    }
}

static void backward_block(Own *own, int64_t head, int64_t first) {
    const Attention *given = own->given;
    const int64_t n = list_keys(own, first), W = own->W, count = least_of(QUERIES, given->R - first);
    Vector delta[Q_VECTORS];
    float lse[QUERIES] = {0};
    memcpy(lse, given->lse + head * given->R + first, sizeof(float) * count);
    read_block(own->q, &given->q, first, head, given->scale, own);
    read_block(own->d_out, &given->d_out, first, head, 1, own);
    read_block(own->out, &given->out, first, head, 1, own);
    transpose_block(own->q, W, own->q_by_d);
    transpose_block(own->d_out, W, own->d_out_by_d);
    read_deltas(own, delta);
    float *dq = own->out;
    memset(dq, 0, sizeof(float) * QUERIES * W);
    const Chosen queries = {own->q, IN_ORDER, QUERIES}, d_outs = {own->d_out, IN_ORDER, QUERIES};
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const int32_t *keys = own->keys + begin;
        const int64_t size = least_of(CHUNK, n - begin);
        products(own->scores, own->k, keys, size, own->q_by_d, own);
        products(own->d_scores, own->v, keys, size, own->d_out_by_d, own);
        for (int64_t i = 0; i < size; i++)
            for (int q = 0; q < Q_VECTORS; q++) {
                float *score = own->scores + i * QUERIES + q * LANES, *d = own->d_scores + i * QUERIES + q * LANES;
                const Vector weight = exponential(load(score) - load(lse + q * LANES));
                const Vector seen = where(sees(own, begin + i, q), weight, all(0));
                store(score, seen);
                store(d, seen * (load(d) - delta[q]));
            }
        const Weights by_key = {own->scores, QUERIES, 1}, d_by_key = {own->d_scores, QUERIES, 1};
        add_rows((Chosen){own->dv, keys, size}, by_key, d_outs, W);
        add_rows((Chosen){own->dk, keys, size}, d_by_key, queries, W);
        add_rows((Chosen){dq, IN_ORDER, QUERIES}, (Weights){own->d_scores, 1, QUERIES}, (Chosen){own->k, keys, size}, W);
    }
    for (int64_t i = 0; i < count; i++)
        write_row(&given->dq, first + i, head, given->is_narrow, dq + i * W, given->scale, given->D);
}

/* dq, and each head's own dk and dv. */
void fastft_attention_backward(const void *arguments, int64_t part, int64_t parts) {
    Attention *given = (Attention *)arguments;
    const int64_t from = beginning(given->H, part, parts), to = beginning(given->H, part + 1, parts), T = given->T;
    int64_t read = -1;
    Own own;
    if (from == to || !prepare(&own, given, 1)) return;
    for (int64_t head = from; head < to; head++) {
        const int64_t g = head / (given->H / given->G);
        if (g != read) read_keys(&own, g);
        read = g;
        memset(own.dk, 0, sizeof(float) * T * own.W);
        memset(own.dv, 0, sizeof(float) * T * own.W);
        for (int64_t first = 0; first < given->R; first += QUERIES) backward_block(&own, head, first);
        for (int64_t t = 0; t < T; t++) {
            write_row(&given->dk, t, head, given->is_narrow_of_keys, own.dk + t * own.W, 1, given->D);
            write_row(&given->dv, t, head, given->is_narrow_of_keys, own.dv + t * own.W, 1, given->D);
        }
    }
    free(own.memory);
}

/* dk and dv of heads that share their keys: k and v hold each head's own, in float32 [T, H, D]. */
void fastft_attention_sums(const void *arguments, int64_t part, int64_t parts) {
    const Attention *given = arguments;
    const int64_t each = given->H / given->G, D = given->D, all_rows = given->T * given->G;
    const Rows *own[2] = {&given->k, &given->v}, *of_all[2] = {&given->dk, &given->dv};
    for (int64_t at = beginning(all_rows, part, parts); at < beginning(all_rows, part + 1, parts); at++)
        for (int which = 0; which < 2; which++) {
            const int64_t t = at / given->G, g = at % given->G;
            float *sum = (float *)own[which]->data + t * own[which]->row + g * each * own[which]->head;
            for (int64_t j = 1; j < each; j++)
                for (int64_t d = 0; d < D; d++) sum[d] += sum[j * own[which]->head + d];
            write_row(of_all[which], t, g, given->is_narrow, sum, 1, D);
        }
}
