/* Attention of one new token a sequence over cached keys and values, and their writing into the cache.

   It is bound by reading the cache, which torch's own operators read twice or copy where the sequences differ in length.
   Here each key and value that a sequence sees is read once, by a running softmax over runs of places (Milakov and
   Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867). All sums are float32. A sequence's
   head is one thread's work from its first place to its last, so that the number of threads changes no bit. */

#include "vector.h"

enum { RUN = 64, HEADS = 8, VECTORS = 16, AT_ONCE = 4 }; /* D is at most WIDTH * VECTORS */

/* Sizes and strides count elements of float32, or bf16 where `is_narrow`; stride_* are those of N, H and P in this
   order, and places of one head lie `place_*` apart. Keys that belong to `H / G` heads of queries are read once for up to
   HEADS of them. */
typedef struct {
    const void *q, *k, *v;               /* k and v: of the caches, or the offsets 0 of a block's keys and values */
    const void *new_k, *new_v;           /* [N, G, D], to be written into each sequence's last place; or none */
    const void *prefix_k, *prefix_v;     /* [P, G, D] */
    const int64_t *lengths;              /* [N], which count the new one */
    const int64_t *blocks;               /* [N, width] addresses of blocks; without them a row is one run */
    void *out;                           /* [N, H, D], contiguous */
    int64_t N, H, G, D, P;
    int64_t places;                      /* of a block, or of a row */
    int64_t width;
    int64_t offset_k, offset_v;          /* of a layer's keys and values in a block */
    int64_t row_q, head_q, row_new, head_new;
    int64_t row_k, head_k, place_k, row_v, head_v, place_v;
    int64_t prefix_place_k, prefix_head_k, prefix_place_v, prefix_head_v;
    float scale;
    int32_t is_narrow;
} Decode;

INLINE int64_t bytes(int64_t elements, int is_narrow) { return elements * (is_narrow ? 2 : 4); }

/* How many vectors a head's D elements are. Of bf16 two at a time are the even and the odd elements of one load: its two
   halves, in their order, would take three instructions more for each. */
INLINE int64_t vectors_of(int64_t D, int is_narrow) {
    return is_narrow ? (D + 2 * WIDTH - 1) / (2 * WIDTH) * 2 : (D + WIDTH - 1) / WIDTH;
}

/* The `i`th vector of D elements, as float32, filled up with zeros. */
INLINE Floats vector_of(const char *at, int64_t i, int64_t D, int is_narrow) {
    const int64_t from = (is_narrow ? i / 2 : i) * (int64_t)sizeof(Floats), left = bytes(D, is_narrow) - from;
    Bits x;
    if (left >= (int64_t)sizeof x) {
        memcpy(&x, at + from, sizeof x);
    } else {
        char filled[sizeof x] = {0};
        memcpy(filled, at + from, left);
        memcpy(&x, filled, sizeof x);
    }
    return (Floats)(!is_narrow ? x : i % 2 ? x & 0xffff0000u : x << 16);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

INLINE Four quarter_of(Floats x) {
    union { Floats all; Eight half[2]; } wide = {x};
    union { Eight all; Four half[2]; } middle = {wide.half[0] + wide.half[1]};
    return middle.half[0] + middle.half[1];
}

/* The sums of four vectors, each in the order of `sum_of`. */
INLINE Four sums_of(const Floats x[4]) {
    const Four a = quarter_of(x[0]), b = quarter_of(x[1]), c = quarter_of(x[2]), d = quarter_of(x[3]);
    const Four ab = SHUFFLED(FourInts, a, b, 0, 4, 1, 5) + SHUFFLED(FourInts, a, b, 2, 6, 3, 7);
    const Four cd = SHUFFLED(FourInts, c, d, 0, 4, 1, 5) + SHUFFLED(FourInts, c, d, 2, 6, 3, 7);
    return SHUFFLED(FourInts, ab, cd, 0, 1, 4, 5) + SHUFFLED(FourInts, ab, cd, 2, 3, 6, 7);
}

/* What some heads of queries, which read the same keys, have seen so far. */
typedef struct {
    Floats q[HEADS][VECTORS], out[HEADS][VECTORS];
    float largest[HEADS], total[HEADS];
} Seen;

/* Keys and values at some places, `count` at most RUN; and what is going to be read after them. */
typedef struct {
    const char *k, *v, *next_k, *next_v;
    int64_t count, place_k, place_v;
} Run;

/* Has what lies `s` places into the next run fetched: without it, each of the short runs would begin by waiting. */
INLINE void fetch(const char *next, int64_t s, int64_t stride, int64_t size) {
    if (next)
        for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(next + s * stride + line);
}

/* Scores of `AT_ONCE` keys, or of one. */
INLINE void score_some(const Seen *seen, const char *k, int64_t stride, float scores[HEADS][RUN], int64_t s, int64_t count,
                       int64_t heads, int64_t D, int is_narrow) {
    const int64_t vectors = vectors_of(D, is_narrow);
    for (int64_t h = 0; h < heads; h++) {
        Floats sums[AT_ONCE];
        for (int64_t j = 0; j < count; j++) {
            sums[j] = seen->q[h][0] * vector_of(k + (s + j) * stride, 0, D, is_narrow);
            for (int64_t i = 1; i < vectors; i++) sums[j] += seen->q[h][i] * vector_of(k + (s + j) * stride, i, D, is_narrow);
        }
        if (count == AT_ONCE) {
            const Four four = sums_of(sums);
            memcpy(&scores[h][s], &four, sizeof four);
        } else {
            scores[h][s] = sum_of(sums[0]);
        }
    }
}

/* Scores of a run's keys; behind them, up to a whole vector, minus infinity. */
INLINE void score(const Seen *seen, const Run *run, float scores[HEADS][RUN], int64_t heads, int64_t D, int is_narrow) {
    const int64_t stride = bytes(run->place_k, is_narrow), size = bytes(D, is_narrow);
    int64_t s = 0;
    for (; s + AT_ONCE <= run->count; s += AT_ONCE) {
        for (int64_t j = 0; j < AT_ONCE; j++) fetch(run->next_k, s + j, stride, size);
        score_some(seen, run->k, stride, scores, s, AT_ONCE, heads, D, is_narrow);
    }
    for (; s < run->count; s++) score_some(seen, run->k, stride, scores, s, 1, heads, D, is_narrow);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = run->count; i % WIDTH; i++) scores[h][i] = -INFINITY;
}

/* NaN is not the largest. */
INLINE float largest_score(const float *scores, int64_t count, float largest) {
    Floats most = all_of(largest);
    for (int64_t s = 0; s < count; s += WIDTH) {
        const Floats x = floats_at(scores + s);
        most = pick(x > most, x, most);
    }
    return largest_of(most);
}

/* Scores to weights, with all that was seen before made smaller where one of them is the largest now. */
INLINE void weigh(Seen *seen, int64_t h, float *scores, int64_t count, int64_t vectors) {
    const float largest = largest_score(scores, count, seen->largest[h]);
    const float base = largest == -INFINITY ? 0 : largest; /* all minus infinity: no weight, rather than NaN */
    Floats sums = {0};
    for (int64_t s = 0; s < count; s += WIDTH) {
        const Floats weights = exp_of(floats_at(scores + s) - base);
        put(scores + s, weights);
        sums += weights;
    }
    if (largest != seen->largest[h]) {
        const Floats shrink = exp_of(all_of(seen->largest[h] - base));
        for (int64_t i = 0; i < vectors; i++) seen->out[h][i] *= shrink;
        seen->total[h] *= shrink[0];
        seen->largest[h] = largest;
    }
    seen->total[h] += sum_of(sums);
}

INLINE void add_values(Seen *seen, const Run *run, const float *weights, int64_t h, int64_t D, int is_narrow) {
    const int64_t vectors = vectors_of(D, is_narrow);
    const int64_t stride = bytes(run->place_v, is_narrow), size = bytes(D, is_narrow);
    Floats even[VECTORS], odd[VECTORS]; /* two sums, as an addition waits for the one before */
    for (int64_t i = 0; i < vectors; i++) {
        even[i] = seen->out[h][i];
        odd[i] = (Floats){0};
    }
    const char *v = run->v;
    int64_t s = 0;
    for (; s + 2 <= run->count; s += 2, v += 2 * stride) {
        if (!h) fetch(run->next_v, s, stride, size), fetch(run->next_v, s + 1, stride, size);
        for (int64_t i = 0; i < vectors; i++) {
            even[i] += weights[s] * vector_of(v, i, D, is_narrow);
            odd[i] += weights[s + 1] * vector_of(v + stride, i, D, is_narrow);
        }
    }
    for (int64_t i = 0; s < run->count && i < vectors; i++) even[i] += weights[s] * vector_of(v, i, D, is_narrow);
    for (int64_t i = 0; i < vectors; i++) seen->out[h][i] = even[i] + odd[i];
}

INLINE void see(Seen *seen, const Run *run, int64_t heads, int64_t D, int is_narrow) {
    float scores[HEADS][RUN] __attribute__((aligned(64)));
    score(seen, run, scores, heads, D, is_narrow);
    for (int64_t h = 0; h < heads; h++) {
        weigh(seen, h, scores[h], run->count, vectors_of(D, is_narrow));
        add_values(seen, run, scores[h], h, D, is_narrow);
    }
}

/* Where a block of a sequence, or its row, has a head's keys (`is_value`: values). */
INLINE char *place_of(const Decode *d, int64_t n, int64_t g, int64_t block, int is_value, int is_narrow) {
    const int64_t row = is_value ? d->row_v : d->row_k, head = is_value ? d->head_v : d->head_k;
    if (!d->blocks) return (char *)(is_value ? d->v : d->k) + bytes(n * row + g * head, is_narrow);
    const int64_t offset = is_value ? d->offset_v : d->offset_k;
    return (char *)(intptr_t)d->blocks[n * d->width + block] + bytes(offset + g * head, is_narrow);
}

INLINE void see_places(Seen *seen, Run run, int64_t count, int64_t heads, int64_t D, int is_narrow) {
    const char *next_k = run.next_k, *next_v = run.next_v;
    for (int64_t begin = 0; begin < count; begin += RUN) {
        run.count = count - begin < RUN ? count - begin : RUN;
        const int64_t step_k = bytes(run.count * run.place_k, is_narrow), step_v = bytes(run.count * run.place_v, is_narrow);
        const int is_last = begin + run.count == count;
        run.next_k = is_last ? next_k : run.k + step_k;
        run.next_v = is_last ? next_v : run.v + step_v;
        see(seen, &run, heads, D, is_narrow);
        run.k += step_k;
        run.v += step_v;
    }
}

/* Puts the `t`th of new keys and values, of a head, into a sequence's place. */
INLINE void write_new(const Decode *d, int64_t t, int64_t n, int64_t g, int64_t at, int is_narrow) {
    const int64_t block = d->blocks ? at / d->places : 0, place = d->blocks ? at % d->places : at;
    const int64_t of_new = bytes(t * d->row_new + g * d->head_new, is_narrow), size = bytes(d->D, is_narrow);
    char *k = place_of(d, n, g, block, 0, is_narrow) + bytes(place * d->place_k, is_narrow);
    char *v = place_of(d, n, g, block, 1, is_narrow) + bytes(place * d->place_v, is_narrow);
    memcpy(k, (const char *)d->new_k + of_new, size);
    memcpy(v, (const char *)d->new_v + of_new, size);
}

INLINE void begin(Seen *seen, const Decode *d, int64_t n, int64_t h0, int64_t heads, int64_t D, int is_narrow) {
    for (int64_t h = 0; h < heads; h++) {
        const char *q = (const char *)d->q + bytes(n * d->row_q + (h0 + h) * d->head_q, is_narrow);
        for (int64_t i = 0; i < vectors_of(D, is_narrow); i++) {
            seen->q[h][i] = vector_of(q, i, D, is_narrow) * d->scale;
            seen->out[h][i] = (Floats){0};
        }
        seen->largest[h] = -INFINITY;
        seen->total[h] = 0;
    }
}

INLINE void end(const Seen *seen, const Decode *d, int64_t n, int64_t h0, int64_t heads, int has_seen, int64_t D,
                int is_narrow) {
    const int64_t size = bytes(D, is_narrow), step = is_narrow ? 2 : 1;
    for (int64_t h = 0; h < heads; h++) {
        char *out = (char *)d->out + (n * d->H + h0 + h) * size;
        const float share = has_seen ? 1 / seen->total[h] : 0;
        for (int64_t i = 0, at = 0; i < vectors_of(D, is_narrow); i += step, at += sizeof(Floats)) {
            Bits x = (Bits)(seen->out[h][i] * share);
            if (is_narrow) x = (rounded((Floats)x) >> 16) | rounded(seen->out[h][i + 1] * share);
            memcpy(out + at, &x, size - at < (int64_t)sizeof x ? size - at : (int64_t)sizeof x);
        }
    }
}

/* Up to HEADS heads of queries, from h0 on, which read the keys of head g. */
INLINE void attend(const Decode *d, int64_t n, int64_t g, int64_t h0, int64_t heads, int64_t D, int is_narrow) {
    Seen seen;
    begin(&seen, d, n, h0, heads, D, is_narrow);
    const int64_t length = d->lengths[n];
    if (d->P) {
        const Run prefix = {
            (const char *)d->prefix_k + bytes(g * d->prefix_head_k, is_narrow),
            (const char *)d->prefix_v + bytes(g * d->prefix_head_v, is_narrow),
            0, 0, 0, d->prefix_place_k, d->prefix_place_v,
        };
        see_places(&seen, prefix, d->P, heads, D, is_narrow);
    }
    for (int64_t from = 0, block = 0; from < length; from += d->places, block++) {
        const int is_last = length - from <= d->places;
        Run run = {place_of(d, n, g, block, 0, is_narrow), place_of(d, n, g, block, 1, is_narrow), 0, 0, 0, d->place_k, d->place_v};
        if (!is_last || g + 1 < d->G) { /* after the last run of a head, the first of the next one */
            run.next_k = place_of(d, n, g + is_last, is_last ? 0 : block + 1, 0, is_narrow);
            run.next_v = place_of(d, n, g + is_last, is_last ? 0 : block + 1, 1, is_narrow);
        }
        see_places(&seen, run, is_last ? length - from : d->places, heads, D, is_narrow);
    }
    end(&seen, d, n, h0, heads, d->P + length > 0, D, is_narrow);
}

static void attend_wide_64(const Decode *d, int64_t n, int64_t g, int64_t h) { attend(d, n, g, h, 1, 64, 0); }
static void attend_narrow_64(const Decode *d, int64_t n, int64_t g, int64_t h) { attend(d, n, g, h, 1, 64, 1); }
static void attend_wide(const Decode *d, int64_t n, int64_t g, int64_t h, int64_t heads) {
    attend(d, n, g, h, heads, d->D, 0);
}
static void attend_narrow(const Decode *d, int64_t n, int64_t g, int64_t h, int64_t heads) {
    attend(d, n, g, h, heads, d->D, 1);
}

static void attend_all(const Decode *d, int64_t n, int64_t g) {
    const int64_t heads = d->H / d->G;
    if (heads == 1 && d->D == 64) {
        (d->is_narrow ? attend_narrow_64 : attend_wide_64)(d, n, g, g);
        return;
    }
    for (int64_t h = 0; h < heads; h += HEADS)
        (d->is_narrow ? attend_narrow : attend_wide)(d, n, g, g * heads + h, heads - h < HEADS ? heads - h : HEADS);
}

/* A part of all sequences and heads: those that begin in its part of all places, as sequences differ in length. A
   sequence's heads follow each other, as they lie in a block. */
void fastft_attention_decode(const void *arguments, int64_t part, int64_t parts) {
    const Decode *d = arguments;
    int64_t total = 0;
    for (int64_t n = 0; n < d->N; n++) total += (d->P + d->lengths[n] + 1) * d->G;
    const int64_t from = beginning(total, part, parts), to = beginning(total, part + 1, parts);
    for (int64_t n = 0, at = 0; n < d->N && at < to; n++)
        for (int64_t g = 0; g < d->G; g++, at += d->P + d->lengths[n] + 1) {
            if (at < from || at >= to) continue;
            if (d->new_k) write_new(d, n, n, g, d->lengths[n] - 1, d->is_narrow);
            attend_all(d, n, g);
        }
}

/* Keys and values of T tokens, `new_k` and `new_v` [T, G, D], written where `rows` and `at` say. */
typedef struct {
    const Decode *cache;
    const int64_t *rows, *at;
    int64_t T;
} Fill;

void fastft_fill_places(const void *arguments, int64_t part, int64_t parts) {
    const Fill *fill = arguments;
    const Decode *d = fill->cache;
    const int64_t to = beginning(fill->T, part + 1, parts);
    for (int64_t t = beginning(fill->T, part, parts); t < to; t++)
        for (int64_t g = 0; g < d->G; g++) write_new(d, t, fill->rows[t], g, fill->at[t], d->is_narrow);
}
