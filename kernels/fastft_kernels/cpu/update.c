/* AdamW's update of weights on a CPU in one pass over memory, and the squares of gradients in another.

   An update is bound by memory: 28 bytes a weight with a bf16 gradient and copy, where torch's own kernel, the casts
   around it and a pass that scales the gradient move 46. The operations are those of torch's fused kernel in their
   order (aten/src/ATen/native/cpu/FusedAdamKernel.cpp), so that the results are its bits, but for the last few elements
   of a tensor, which it rounds otherwise: to be compiled without contraction of products and sums. */

#include "vector.h"

/* A tensor's parts, each of `size` elements: the gradient float32 or bf16, the copy bf16 or none. */
typedef struct {
    float *weight, *mean, *square;
    const void *gradient;
    uint16_t *copy;
    int64_t size;
    int32_t is_narrow; /* the gradient */
    float keep;        /* 1 - lr * weight decay */
    float rate;        /* lr / (1 - beta1 ^ step) */
    float root;        /* sqrt(1 - beta2 ^ step) */
} Piece;

typedef struct {
    float beta2, rest1, rest2; /* and 1 - beta1, 1 - beta2 */
    float epsilon;
    float scale; /* of the gradients */
} Common;

typedef struct {
    const Piece *pieces;
    int64_t count;
    Common common;
    double *sums; /* of `fastft_squares` */
} Update;

/* Elements `begin` to `end` of a piece. One function for each dtype of the gradient, with and without a copy. */
#define UPDATE(NAME, TYPE, READ, WRITE)                                                                                \
    static void NAME(const Piece *piece, int64_t begin, int64_t end, const Common *common) {                           \
        float *restrict w = piece->weight, *restrict m = piece->mean, *restrict v = piece->square;                     \
        const TYPE *restrict g = piece->gradient;                                                                      \
        uint16_t *restrict copy = piece->copy;                                                                         \
        const float keep = piece->keep, rate = -piece->rate, root = piece->root, scale = common->scale;                \
        const float beta2 = common->beta2, rest1 = common->rest1, rest2 = common->rest2, epsilon = common->epsilon;    \
        (void)copy;                                                                                                    \
        for (int64_t i = begin; i < end; i++) {                                                                        \
            const float gradient = READ(g[i]) * scale;                                                                 \
            const float mean = fmaf(rest1, gradient - m[i], m[i]);                                                     \
            const float square = fmaf(rest2 * gradient, gradient, beta2 * v[i]);                                       \
            const float weight = w[i] * keep + rate * mean / (sqrtf(square) / root + epsilon);                         \
            m[i] = mean;                                                                                               \
            v[i] = square;                                                                                             \
            w[i] = weight;                                                                                             \
            WRITE;                                                                                                     \
        }                                                                                                              \
    }

UPDATE(update_wide, float, same, (void)0)
UPDATE(update_wide_copied, float, same, copy[i] = narrowed(weight))
UPDATE(update_narrow, uint16_t, widened, (void)0)
UPDATE(update_narrow_copied, uint16_t, widened, copy[i] = narrowed(weight))

/* AdamW's update: a part of all pieces laid end to end. */
void fastft_adamw(const void *arguments, int64_t part, int64_t parts) {
    const Update *update = arguments;
    const Piece *pieces = update->pieces;
    const Common *common = &update->common;
    const int64_t count = update->count;
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += pieces[i].size;
    const int64_t from = beginning(total, part, parts), to = beginning(total, part + 1, parts);
    for (int64_t i = 0, at = 0; i < count && at < to; at += pieces[i].size, i++) {
        const Piece *piece = &pieces[i];
        const int64_t begin = from > at ? from - at : 0;
        const int64_t end = to - at < piece->size ? to - at : piece->size;
        if (begin >= end) continue;
        if (piece->is_narrow)
            (piece->copy ? update_narrow_copied : update_narrow)(piece, begin, end, common);
        else
            (piece->copy ? update_wide_copied : update_wide)(piece, begin, end, common);
    }
}

enum { BLOCK = 1 << 16, LANES = 64, DEPTH = 32 };

/* The sum of squares of a block's elements: in float32 over 32 of them in each lane, in float64 over these sums. */
#define SQUARES(NAME, TYPE, READ)                                                                                      \
    static double NAME(const TYPE *g, int64_t size) {                                                                  \
        double total = 0;                                                                                              \
        int64_t i = 0;                                                                                                 \
        while (i + LANES <= size) {                                                                                    \
            float lanes[LANES] = {0};                                                                                  \
            for (int row = 0; row < DEPTH && i + LANES <= size; row++, i += LANES)                                     \
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += READ(g[i + lane]) * READ(g[i + lane]);         \
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane];                                             \
        }                                                                                                              \
        for (; i < size; i++) total += (double)READ(g[i]) * READ(g[i]);                                                \
        return total;                                                                                                  \
    }

SQUARES(squares_wide, float, same)
SQUARES(squares_narrow, uint16_t, widened)

/* Into `sums`, the sums of squares of all pieces' gradients by blocks: those whose number is `part` modulo `parts`. Which
   thread sums a block changes nothing of it. */
void fastft_squares(const void *arguments, int64_t part, int64_t parts) {
    const Update *update = arguments;
    const Piece *pieces = update->pieces;
    const int64_t count = update->count;
    double *sums = update->sums;
    int64_t block = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t begin = 0; begin < pieces[i].size; begin += BLOCK, block++) {
            if (block % parts != part) continue;
            const int64_t left = pieces[i].size - begin, size = left < BLOCK ? left : BLOCK;
            sums[block] = pieces[i].is_narrow ? squares_narrow((const uint16_t *)pieces[i].gradient + begin, size)
                                              : squares_wide((const float *)pieces[i].gradient + begin, size);
        }
}
