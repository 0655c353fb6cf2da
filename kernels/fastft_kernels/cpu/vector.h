/* Sixteen floats at a time: GNU vectors, which a compiler splits where a processor's are smaller, their conversions from
   and to bf16, and the exponential. No function of libm is called in a loop: none works on vectors everywhere. */

#ifndef FASTFT_VECTOR_H
#define FASTFT_VECTOR_H

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* how vectors would be given to functions: all of them are inlined */
#endif

enum { WIDTH = 16 };

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE Floats all_of(float value) { return value - (Floats){0}; }

/* `a` where the mask, of a comparison, is set, and `b` elsewhere. */
INLINE Floats pick(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

/* Elements `i` to `i + count` of an array of float32, or of bf16 where it is narrow; 0 beyond them. */
INLINE Floats load(const void *array, int64_t i, int count, int is_narrow) {
    if (is_narrow) {
        Halves halves = {0};
        memcpy(&halves, (const uint16_t *)array + i, count * sizeof(uint16_t));
        return (Floats)(__builtin_convertvector(halves, Bits) << 16);
    }
    Floats floats = {0};
    memcpy(&floats, (const float *)array + i, count * sizeof(float));
    return floats;
}

/* As `narrowed`, of sixteen. */
INLINE Halves all_narrowed(Floats values) {
    const Bits bits = (Bits)values, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Floats none = (Floats)((Bits){0} + 0x7fc0);
    return __builtin_convertvector((Bits)pick(values != values, none, (Floats)rounded), Halves);
}

INLINE void store(void *array, int64_t i, int count, int is_narrow, Floats values) {
    if (is_narrow) {
        const Halves halves = all_narrowed(values);
        memcpy((uint16_t *)array + i, &halves, count * sizeof(uint16_t));
    } else
        memcpy((float *)array + i, &values, count * sizeof(float));
}

/* The array's elements, all sixteen or the `left` ones at its end: the first is known to the compiler. */
#define BY_WIDTH(I, FROM, TO, WHAT)                                                                                    \
    do {                                                                                                               \
        int64_t I = FROM;                                                                                              \
        for (; I + WIDTH <= (TO); I += WIDTH) WHAT(I, WIDTH);                                                          \
        if (I < (TO)) WHAT(I, (int)((TO)-I));                                                                          \
    } while (0)

INLINE float sum_of(Floats values) {
    float lanes[WIDTH];
    memcpy(lanes, &values, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The largest, none of which is looked at that is no number. */
INLINE float largest_of(Floats values) {
    float lanes[WIDTH];
    memcpy(lanes, &values, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

/* e^x for x <= 0, with a relative error below 1.5 * 2^-23 down to -87, where it becomes 0; NaN stays NaN.

   x = n ln 2 + r with |r| <= ln 2 / 2: n is rounded by an addition that leaves no bits for a fraction, ln 2 taken off in
   two parts (Cody, Waite 1980, "Software Manual for the Elementary Functions"), and e^r a polynomial, the coefficients
   those of Cephes' expf (Moshier 1992). 2^n is its exponent's bits. */
INLINE Floats exp_of(Floats x) {
    const Floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: its bits end in those of n */
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Floats power = (Floats)(((Bits)shifted << 23) + 0x3f800000);
    return pick(x < -87.0f, all_of(0.0f), p * power);
}

#endif
