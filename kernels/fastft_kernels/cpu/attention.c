/* Interval attention on a CPU: softmax(q k^T * scale + mask) v where key k is visible to query q exactly when
   k <= q < visible_until[k], and its gradients.

   A block of QUERIES queries of a head takes the list of keys that any of them sees. Scores and probabilities are laid
   out key by key, with a query in each lane: so the softmax has no sum across lanes. The backward pass computes the
   probabilities again from the log-sum-exp (Dao 2023, "FlashAttention-2", arXiv:2307.08691). All is computed in float32,
   and each sum is one thread's: forward, a thread has blocks to itself, and backward whole heads.

   Letters: T tokens, R queries, H heads of queries, G of keys, D head dim, W the whole vectors that hold it. */

#include <stdlib.h>

/* WIDTH floats fill a register of the processor, and a tile of a product fills its registers: KEYS by the block's queries
   of scores, and ROWS by D_VECTORS of sums of rows. */
#if defined(__AVX512F__)
#define WIDTH 16
enum { KEYS = 8, ROWS = 4, D_VECTORS = 4 };
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define WIDTH 8
enum { KEYS = 4, ROWS = 4, D_VECTORS = 2 };
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define WIDTH 4
enum { KEYS = 4, ROWS = 4, D_VECTORS = 4 };
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif

#include "vector.h"

enum {
    QUERIES = 16, /* of a block */
    Q_VECTORS = QUERIES / WIDTH,
    STEP = 8,   /* lists of keys are filled up to a multiple: KEYS and ROWS divide it */
    CHUNK = 64, /* keys whose probabilities lie in the first cache */
    SPAN = 16,  /* keys that are passed over together where none is visible */
};

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

static inline int64_t up_to(int64_t size, int64_t step) { return (size + step - 1) / step * step; }
static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* A row times `factor`, and zeros up to W. */
INLINE void read_row(float *restrict to, const Rows *rows, int64_t row, int64_t head, float factor, const Own *own) {
    const int64_t at = row * rows->row + head * rows->head;
    const int is_narrow = own->given->is_narrow;
#define READ(D, COUNT) put(to + D, load(rows->data, at + D, COUNT, is_narrow) * factor)
    BY_WIDTH(d, 0, own->given->D, READ);
}

INLINE void write_row(const Rows *rows, int64_t row, int64_t head, int32_t is_narrow, const float *restrict from,
                      float factor, int64_t D) {
    const int64_t at = row * rows->row + head * rows->head;
#define WRITE(I, COUNT) store(rows->data, at + I, COUNT, is_narrow, load(from, I, COUNT, 0) * factor)
    BY_WIDTH(d, 0, D, WRITE);
}

/* The transpose of [WIDTH, WIDTH] into rows of QUERIES. Each step interleaves row i with the row half of them below it:
   the bits of (row, column) turn by one place. */
static inline void transpose(const float *from, int64_t stride, float *to) {
    Floats rows[WIDTH], turned[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) rows[i] = floats_at(from + i * stride);
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; i++) {
            turned[2 * i] = SHUFFLED(Ints, rows[i], rows[i + WIDTH / 2], LOW_HALVES);
            turned[2 * i + 1] = SHUFFLED(Ints, rows[i], rows[i + WIDTH / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) rows[i] = turned[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) put(to + i * QUERIES, rows[i]);
}

/* [QUERIES, W] into [W, QUERIES]. */
static void transpose_block(const float *from, int64_t W, float *to) {
    for (int64_t d = 0; d < W; d += WIDTH)
        for (int i = 0; i < QUERIES; i += WIDTH) transpose(from + i * W + d, W, to + d * QUERIES + i);
}

/* The products of n rows of a panel with the queries of a block: into [n, QUERIES]. */
static void products(float *to, const float *panel, const int32_t *keys, int64_t n, const float *by_d, const Own *own) {
    const int64_t D = own->given->D, W = own->W;
    for (int64_t i = 0; i < n; i += KEYS) {
        const float *row[KEYS];
        Floats sum[KEYS][Q_VECTORS] = {{{0}}};
        for (int key = 0; key < KEYS; key++) row[key] = panel + keys[i + key] * W;
        for (int64_t d = 0; d < D; d++) {
            Floats x[Q_VECTORS];
#pragma GCC unroll 4
            for (int q = 0; q < Q_VECTORS; q++) x[q] = floats_at(by_d + d * QUERIES + q * WIDTH);
#pragma GCC unroll 8
            for (int key = 0; key < KEYS; key++)
#pragma GCC unroll 4
                for (int q = 0; q < Q_VECTORS; q++) sum[key][q] += row[key][d] * x[q];
        }
#pragma GCC unroll 8
        for (int key = 0; key < KEYS; key++)
#pragma GCC unroll 4
            for (int q = 0; q < Q_VECTORS; q++) put(to + (i + key) * QUERIES + q * WIDTH, sum[key][q]);
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
INLINE void add_tile(Chosen to, Weights weights, Chosen from, int64_t W, int64_t i,
                                                           int64_t d, int vectors) {
    Floats sum[ROWS][D_VECTORS] = {{{0}}};
    const float *weight = weights.at + i * weights.to;
    for (int64_t j = 0; j < from.n; j++, weight += weights.from) {
        const float *x = from.panel + from.row[j] * W + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const Floats part = floats_at(x + v * WIDTH);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) sum[row][v] += weight[row * weights.to] * part;
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
        float *y = to.panel + to.row[i + row] * W + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) put(y + v * WIDTH, floats_at(y + v * WIDTH) + sum[row][v]);
    }
}

/* Adds weighted sums of rows to rows: `to.n` is a multiple of ROWS. */
static void add_rows(Chosen to, Weights weights, Chosen from, int64_t W) {
    for (int64_t i = 0; i < to.n; i += ROWS)
        for (int64_t d = 0; d < W;) {
            const int64_t left = (W - d) / WIDTH;
            const int vectors = left >= D_VECTORS ? D_VECTORS : left >= 2 ? 2 : 1;
            if (vectors == D_VECTORS)
                add_tile(to, weights, from, W, i, d, D_VECTORS);
            else if (vectors == 2)
                add_tile(to, weights, from, W, i, d, 2);
            else
                add_tile(to, weights, from, W, i, d, 1);
            d += vectors * WIDTH;
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
    *own = (Own){.given = given, .W = up_to(given->D, WIDTH)};
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
INLINE Ints sees(const Own *own, int64_t i, int q) {
    Ints position;
    memcpy(&position, own->position + q * WIDTH, sizeof position);
    return (position >= own->keys[i]) & (position < own->ends[i]);
}

/* In place of scores [n, QUERIES], their exponentials beside each query's largest; the sums of them in `total`, and the
   weighted sums of values in `out`. */
static void soften(Own *own, int64_t n, Floats largest[Q_VECTORS], Floats total[Q_VECTORS]) {
    for (int q = 0; q < Q_VECTORS; q++) {
        largest[q] = all_of(-INFINITY);
        total[q] = (Floats){0};
        for (int64_t i = 0; i < n; i++) {
            float *at = own->scores + i * QUERIES + q * WIDTH;
            const Floats score = pick(sees(own, i, q), floats_at(at), all_of(-INFINITY));
            put(at, score);
            largest[q] = pick(score > largest[q], score, largest[q]);
        }
    }
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const int64_t size = least_of(CHUNK, n - begin);
        float *scores = own->scores + begin * QUERIES;
        for (int q = 0; q < Q_VECTORS; q++) {
            /* A query that sees nothing has sums of 0, and so no number for its output. */
            const Floats base = pick(largest[q] == all_of(-INFINITY), (Floats){0}, largest[q]);
            Floats sum = (Floats){0};
            for (int64_t i = 0; i < size; i++) {
                float *at = scores + i * QUERIES + q * WIDTH;
                const Floats weight = exp_of(floats_at(at) - base);
                put(at, weight);
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
    Floats largest[Q_VECTORS], total[Q_VECTORS];
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
static void read_deltas(Own *own, Floats delta[Q_VECTORS]) {
    float sums[QUERIES * WIDTH], by_lane[WIDTH * QUERIES];
    for (int i = 0; i < QUERIES; i++) {
        Floats sum = (Floats){0};
        for (int64_t d = i * own->W; d < (i + 1) * own->W; d += WIDTH)
            sum += floats_at(own->out + d) * floats_at(own->d_out + d);
        put(sums + i * WIDTH, sum);
    }
    for (int i = 0; i < QUERIES; i += WIDTH) transpose(sums + i * WIDTH, WIDTH, by_lane + i);
    for (int q = 0; q < Q_VECTORS; q++) {
        delta[q] = (Floats){0};
        for (int lane = 0; lane < WIDTH; lane++) delta[q] += floats_at(by_lane + lane * QUERIES + q * WIDTH);
    }
}

static void backward_block(Own *own, int64_t head, int64_t first) {
    const Attention *given = own->given;
    const int64_t n = list_keys(own, first), W = own->W, count = least_of(QUERIES, given->R - first);
    Floats delta[Q_VECTORS];
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
                float *score = own->scores + i * QUERIES + q * WIDTH, *d = own->d_scores + i * QUERIES + q * WIDTH;
                const Floats weight = exp_of(floats_at(score) - floats_at(lse + q * WIDTH));
                const Floats seen = pick(sees(own, begin + i, q), weight, (Floats){0});
                put(score, seen);
                put(d, seen * (floats_at(d) - delta[q]));
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
