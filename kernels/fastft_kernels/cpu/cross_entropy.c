/* Cross-entropy of rows of logits: their losses, and where it is asked for their gradients, which may take the logits'
   own place. A row stays in the cache: it is read three times there, and its exponentials are computed twice instead of
   kept, in float32 whatever the logits' dtype. */

#include "vector.h"

typedef struct {
    const void *logits;     /* [N, V] */
    const int64_t *targets; /* [N] */
    const float *weights;   /* [N]: of the rows' gradients, or none */
    float *losses;          /* [N] */
    void *out;              /* [N, V]: the gradients, where there are weights */
    int64_t N, V, stride, stride_out, ignore_index;
    int64_t wrong; /* a target that is none, where there is one: its row is left out */
    int32_t is_narrow, has_wrong;
} CrossEntropy;

enum { BLOCK = 64 * WIDTH };

INLINE float largest_logit(const void *z, int64_t V, const int is_narrow) {
    Floats top[4];
    for (int j = 0; j < 4; j++) top[j] = all_of(-INFINITY);
    int64_t i = 0;
    for (; i + 4 * WIDTH <= V; i += 4 * WIDTH)
        for (int j = 0; j < 4; j++) {
            const Floats u = load(z, i + j * WIDTH, WIDTH, is_narrow);
            top[j] = pick(u > top[j], u, top[j]);
        }
    Floats most = pick(top[0] > top[1], top[0], top[1]);
    most = pick(top[2] > most, top[2], most);
    most = pick(top[3] > most, top[3], most);
    float largest = largest_of(most);
    for (; i < V; i++) {
        const float u = is_narrow ? widened(((const uint16_t *)z)[i]) : ((const float *)z)[i];
        largest = u > largest ? u : largest;
    }
    return largest;
}

/* The sum of e^(z - largest): a block's by itself first, as a float32 that has grown large loses what is small. */
INLINE float sum_of_exponentials(const void *z, int64_t V, float largest, const int is_narrow) {
    Floats total = {0};
    int64_t i = 0;
    for (; i + BLOCK <= V; i += BLOCK) {
        Floats sums[4] = {{0}};
        for (int64_t k = 0; k < BLOCK; k += 4 * WIDTH)
            for (int j = 0; j < 4; j++) sums[j] += exp_of(load(z, i + k + j * WIDTH, WIDTH, is_narrow) - largest);
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    for (; i + WIDTH <= V; i += WIDTH) total += exp_of(load(z, i, WIDTH, is_narrow) - largest);
    float rest = 0;
    if (i < V) {
        const Floats e = exp_of(load(z, i, (int)(V - i), is_narrow) - largest);
        for (int j = 0; j < V - i; j++) rest += e[j];
    }
    return sum_of(total) + rest;
}

INLINE void write_gradient(const void *z, void *out, int64_t V, float largest, float scale, const int is_narrow) {
#define GRADIENT(I, COUNT)                                                                                             \
    store(out, I, COUNT, is_narrow, exp_of(load(z, I, COUNT, is_narrow) - largest) * scale)
    BY_WIDTH(i, 0, V, GRADIENT);
}

INLINE void of_row(CrossEntropy *a, int64_t n, const int is_narrow) {
    const size_t size = is_narrow ? sizeof(uint16_t) : sizeof(float);
    const void *z = (const char *)a->logits + n * a->stride * size;
    void *out = a->weights ? (char *)a->out + n * a->stride_out * size : NULL;
    const int64_t target = a->targets[n], V = a->V;
    if (target == a->ignore_index || target < 0 || target >= V) {
        if (target != a->ignore_index) a->wrong = target, a->has_wrong = 1;
        a->losses[n] = 0;
        if (out) memset(out, 0, V * size);
        return;
    }
    const float largest = largest_logit(z, V, is_narrow), sum = sum_of_exponentials(z, V, largest, is_narrow);
    const float own = is_narrow ? widened(((const uint16_t *)z)[target]) : ((const float *)z)[target];
    a->losses[n] = logf(sum) - (own - largest);
    if (!out) return;
    const float weight = a->weights[n], p = expf(own - largest) / sum; /* NaN if there is one in the row */
    write_gradient(z, out, V, largest, weight / sum, is_narrow);
    if (is_narrow)
        ((uint16_t *)out)[target] = narrowed((p - 1) * weight);
    else
        ((float *)out)[target] = (p - 1) * weight;
}

/* Losses and gradients of some rows. */
void fastft_cross_entropy(const void *arguments, int64_t part, int64_t parts) {
    CrossEntropy *a = (CrossEntropy *)arguments;
    const int64_t end = beginning(a->N, part + 1, parts);
    for (int64_t n = beginning(a->N, part, parts); n < end; n++)
        if (a->is_narrow)
            of_row(a, n, 1);
        else
            of_row(a, n, 0);
}
