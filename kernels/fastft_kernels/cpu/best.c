/* The numbers of each row that come close to its largest: for torch's own operators it is several passes over the logits
   of a large vocabulary, the first of which is slow in bf16. */

#include "vector.h"

enum { BLOCK = 512 };

typedef struct {
    const void *x;  /* [N, V] float32 or bf16, rows `stride` apart */
    int64_t *found; /* [N, most] places, rising */
    int64_t *count; /* [N] how many there are, also where they are more than `most` */
    int64_t N, V, stride, most;
    float below, relative; /* close: at least largest - below - relative * |largest| */
    int32_t is_narrow;
} Best;

/* The bits of floating-point numbers in whole numbers of the same order; and back, by the same. In whole numbers, unlike
   in those that may be none, a compiler finds the largest of many at a time. */
static inline int32_t in_order_wide(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
static inline int16_t in_order_narrow(int16_t bits) { return (int16_t)(bits ^ ((bits >> 15) & 0x7fff)); }

static inline float of_wide(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float of_narrow(int16_t bits) { return widened((uint16_t)bits); }

/* One function for each dtype, with the largest bits of a number but for its sign; what is above is none. A number that is
   none makes the row's largest none, which nothing comes close to. */
#define BEST(NAME, BITS, INFINITE, MAGNITUDE)                                                                                    \
    static float largest_##NAME(const BITS *x, int64_t size) {                                                         \
        BITS largest = ~(BITS)MAGNITUDE, above = 0;                                                     \
        for (int64_t i = 0; i < size; i++) {                                                                           \
            const BITS value = in_order_##NAME(x[i]), magnitude = x[i] & (BITS)MAGNITUDE;            \
            largest = value > largest ? value : largest;                                                               \
            above = magnitude > above ? magnitude : above;                                                             \
        }                                                                                                              \
        return above > INFINITE ? NAN : of_##NAME(in_order_##NAME(largest));                                           \
    }                                                                                                                  \
    static int64_t close_##NAME(const Best *best, const BITS *x, int64_t *found) {                                     \
        const float largest = largest_##NAME(x, best->V);                                                              \
        const float share = best->relative ? best->relative * fabsf(largest) : 0, least = largest - best->below - share;\
        int64_t count = 0;                                                                                             \
        for (int64_t begin = 0; begin < best->V; begin += BLOCK) {                                                     \
            const int64_t end = best->V - begin < BLOCK ? best->V : begin + BLOCK;                                     \
            int is_there = 0;                                                                                          \
            for (int64_t i = begin; i < end; i++) is_there |= of_##NAME(x[i]) >= least;                                \
            for (int64_t i = begin; is_there && i < end; i++)                                                          \
                if (of_##NAME(x[i]) >= least) {                                                                        \
                    if (count < best->most) found[count] = i;                                                          \
                    count++;                                                                                           \
                }                                                                                                      \
        }                                                                                                              \
        return count;                                                                                                  \
    }

BEST(wide, int32_t, 0x7f800000, 0x7fffffff)
BEST(narrow, int16_t, 0x7f80, 0x7fff)

void fastft_best(const void *arguments, int64_t part, int64_t parts) {
    const Best *best = arguments;
    const int64_t to = beginning(best->N, part + 1, parts);
    for (int64_t n = beginning(best->N, part, parts); n < to; n++) {
        int64_t *found = best->found + n * best->most;
        best->count[n] = best->is_narrow ? close_narrow(best, (const int16_t *)best->x + n * best->stride, found)
                                         : close_wide(best, (const int32_t *)best->x + n * best->stride, found);
    }
}
